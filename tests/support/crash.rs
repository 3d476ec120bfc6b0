//! Opens every state that a power cut may leave of a disk, and judges it.
//!
//! Oracles, in every state: it opens unaided (O1); each sector holds its last flushed value or a later one (O2), so no
//! guest reads what it does not own (O7); a strict, independent VHD reader agrees on what looks clean and on the closed file
//! (O3); the checker finds no corruption, before and after, and nothing but notes in the closed file (O4), and changes nothing
//! (O5); recovering what was recovered changes nothing (O6); recovery cut by another crash, and again, or failing at one of its
//! operations and cut then, ends in an allowed state as well (F5, F6).

use super::failing::{Failing, left_by, left_by_any};
use crate::strict_vhd::{Guest, Kind, Positional, StrictVhd};
use cowvhd::check::{Code, Finding, Severity, check};
use cowvhd::sim::{Bounds, CrashPoint, CrashState, Fates, History, Rng, SimVfs};
use cowvhd::vfs::{Access, Vfs};
use cowvhd::vhd::DynamicHeader;
use cowvhd::{Disk, OpenOptions};
use std::collections::HashSet;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

#[path = "workload.rs"]
mod workload;
pub use workload::*;

/// When the power is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// At this crash point.
    Point(usize),
    /// When an operation of the opening had failed, and the opening with it, or not.
    Failed(Failing),
}

/// A power cut, and what became of what was pending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    pub when: When,
    pub fates: Fates,
}

/// The way to one state: a crash point of a segment, then crash points of recoveries. As text, such as `0/17:o0.3k/5@12:o0`, it
/// replays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatePath {
    pub segment: usize,
    pub cuts: Vec<Cut>,
}

impl fmt::Display for StatePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.segment)?;
        self.cuts.iter().try_for_each(|cut| match cut.when {
            When::Point(point) => write!(f, "/{point}:{}", cut.fates),
            When::Failed(failing) => write!(f, "/{failing}:{}", cut.fates),
        })
    }
}

impl FromStr for StatePath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split('/');
        let segment = parts.next().and_then(|segment| segment.parse().ok());
        let cut = |part: &str| {
            let (when, fates) = part.split_once(':')?;
            let when = match when.contains('@') {
                true => When::Failed(when.parse().ok()?),
                false => When::Point(when.parse().ok()?),
            };
            Some(Cut { when, fates: fates.parse().ok()? })
        };
        let cuts: Option<Vec<Cut>> = parts.map(cut).collect();
        match (segment, cuts) {
            (Some(segment), Some(cuts)) if !cuts.is_empty() => Ok(StatePath { segment, cuts }),
            _ => Err(format!("'{text}' is not the way to a state")),
        }
    }
}

/// What is wrong with a state, and the way to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub path: StatePath,
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (state {})", self.what, self.path)
    }
}

/// A state with what it is to be judged by.
struct Suspect<'a> {
    history: &'a History,
    clock: u64,
    /// In-flight physical sectors may hold garbage, in this state or in one that led to it.
    garbage: bool,
    state: CrashState,
}

/// Opens crash states and judges them.
#[derive(Debug)]
pub struct Explorer {
    shape: Shape,
    /// Judged already: the state, and when.
    judged: HashSet<u64>,
    images: HashSet<u64>,
    /// Distinct states, by what the medium holds.
    pub states: u64,
    /// Of these, states of recoveries that were cut.
    pub of_recoveries: u64,
}

impl Explorer {
    pub fn new(shape: Shape) -> Self {
        Explorer { shape, judged: HashSet::new(), images: HashSet::new(), states: 0, of_recoveries: 0 }
    }

    /// Explores every crash point of `segments`. The error names the state.
    pub fn explore(&mut self, segments: &[Segment], seed: u64, bounds: &Bounds) -> Result<(), Failure> {
        let bounds = &Bounds { spared: self.shape.spared(), ..*bounds };
        for (s, segment) in segments.iter().enumerate() {
            for (p, point) in segment.points.iter().enumerate() {
                let mut result = Ok(());
                point.for_each_state(seed ^ p as u64, bounds, |state| {
                    let (history, clock, garbage) = (&segment.history, point.clock(), state.garbage);
                    let mut cuts = vec![Cut { when: When::Point(p), fates: state.fates().clone() }];
                    let judged = self.judge(Suspect { history, clock, garbage, state }, 2, &mut cuts);
                    result = judged.map_err(|what| Failure { path: StatePath { segment: s, cuts }, what });
                    result.is_ok()
                });
                result?;
            }
        }
        Ok(())
    }

    /// Explores the recoveries of an image whose first page a crash has spoiled, each cut at every point: `of_each` states of
    /// every point of the session, and of every point of their recoveries.
    pub fn explore_lost_starts(
        &mut self,
        segments: &[Segment],
        seed: u64,
        of_each: usize,
    ) -> Result<(), String> {
        let bounds = Bounds { spared: self.shape.spared(), ..Bounds::sample(of_each) };
        for segment in segments {
            let of_point = |point: &CrashPoint| {
                let mut lost = Vec::new();
                point.for_each_state(seed, &bounds, |state| {
                    if state.garbage && !has_headers(&state.to_vfs(seed)) {
                        lost.push(state);
                    }
                    true
                });
                lost
            };
            for (point, lost) in
                segment.points.iter().flat_map(|p| of_point(p).into_iter().map(move |s| (p, s)))
            {
                let judge =
                    |state| Suspect { history: &segment.history, clock: point.clock(), garbage: true, state };
                for cut in self.judge_alone(&judge(lost))? {
                    let mut result = Ok(());
                    cut.for_each_state(seed, &bounds, |state| {
                        self.states += 1;
                        self.of_recoveries += 1;
                        result = self.judge_alone(&judge(state)).map(drop);
                        result.is_ok()
                    });
                    result?;
                }
            }
        }
        Ok(())
    }

    /// Judges one state again.
    pub fn replay(&self, segments: &[Segment], path: &StatePath) -> Result<(), Failure> {
        let failure = |what: String| Failure { path: path.clone(), what };
        let segment = segments.get(path.segment).ok_or_else(|| failure("no such segment".into()))?;
        let mut garbage = false;
        let mut clock = None;
        let mut points = segment.points.clone();
        let mut before: Option<CrashState> = None;
        for (number, cut) in path.cuts.iter().enumerate() {
            let point = match cut.when {
                When::Point(number) => points.get(number).cloned(),
                When::Failed(failing) => before.and_then(|before| left_by(&before, failing, open).1),
            };
            let point = point.ok_or_else(|| failure("no such crash point".into()))?;
            let state = point.state(&cut.fates).ok_or_else(|| failure("no such state".into()))?;
            before = Some(state.clone());
            garbage |= state.garbage;
            let clock = *clock.get_or_insert_with(|| point.clock());
            let suspect = Suspect { history: &segment.history, clock, garbage, state };
            match self.judge_alone(&suspect) {
                Ok(next) => points = next,
                Err(what) if number + 1 == path.cuts.len() => return Err(failure(what)),
                Err(what) => return Err(failure(format!("a state on the way fails, too: {what}"))),
            }
        }
        Ok(())
    }

    /// Judges one state of a crash at `clock`, by itself.
    pub fn judge_one(&self, history: &History, clock: u64, state: CrashState) -> Result<(), String> {
        let garbage = state.garbage;
        self.judge_alone(&Suspect { history, clock, garbage, state }).map(drop)
    }

    /// Judges one state; then cuts its recovery as well, down to `depth`. On an error `cuts` leads to the state at fault.
    fn judge(&mut self, suspect: Suspect<'_>, depth: u32, cuts: &mut Vec<Cut>) -> Result<(), String> {
        let hash = suspect.state.hash;
        if !self.judged.insert(hash ^ suspect.clock.wrapping_mul(0x9e37_79b9_7f4a_7c15)) {
            return Ok(());
        }
        if self.images.insert(hash) {
            self.states += 1;
            self.of_recoveries += u64::from(cuts.len() > 1);
        }
        let points = self.judge_alone(&suspect)?;
        let mut rng = Rng::new(hash);
        if depth == 0 {
            return Ok(());
        }
        for _ in 0..if points.is_empty() { 0 } else { 2 } {
            let number = rng.below(points.len() as u64) as usize;
            self.judge_cut(&suspect, When::Point(number), &points[number], &mut rng, depth, cuts)?;
        }
        if rng.one_in(4)
            && let Some((failing, left)) = left_by_any(&suspect.state, open, &mut rng)
        {
            self.judge_cut(&suspect, When::Failed(failing), &left, &mut rng, depth, cuts)?;
        }
        Ok(())
    }

    /// Judges a state that another power cut leaves, in the middle of the recovery of `before`.
    fn judge_cut(
        &mut self,
        before: &Suspect<'_>,
        when: When,
        point: &CrashPoint,
        rng: &mut Rng,
        depth: u32,
        cuts: &mut Vec<Cut>,
    ) -> Result<(), String> {
        let mut skip = rng.below(8);
        let mut chosen = None;
        let bounds = Bounds { spared: self.shape.spared(), ..Bounds::sample(12) };
        point.for_each_state(rng.next_u64(), &bounds, |state| {
            chosen = Some(state);
            skip = skip.saturating_sub(1);
            skip > 0
        });
        let Some(state) = chosen else { return Ok(()) };
        cuts.push(Cut { when, fates: state.fates().clone() });
        let garbage = before.garbage || state.garbage;
        self.judge(Suspect { garbage, state, ..*before }, depth - 1, cuts)?;
        cuts.pop();
        Ok(())
    }

    /// Judges one state; returns the crash points of its recovery.
    fn judge_alone(&self, suspect: &Suspect<'_>) -> Result<Vec<CrashPoint>, String> {
        let Suspect { history, clock, garbage, state } = suspect;
        let vfs = state.to_vfs(state.hash);
        let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
        vfs.record(true);
        let path = Path::new(PATH);
        let options = OpenOptions::new().vfs(Arc::clone(&shared));
        let judge = |disk: &Disk| {
            let parts = read_hot(disk, self.shape).map_err(|error| format!("O2: reading: {error}"))?;
            check_content(history, *clock, &parts, *garbage).map(|()| parts)
        };

        if looks_clean(&vfs) {
            let strict = strict_reader(&vfs, false);
            // While a temporary journal is being put behind an image the footer at its end may be missing; tools that want it refuse
            // the file, others go by the copy at the start.
            let strict = match self.shape.elsewhere {
                Some(_) => strict.or_else(|_| strict_reader(&vfs, true)),
                None => strict,
            };
            let mut strict = strict.map_err(|error| format!("O3: looks clean, but {error}"))?;
            let read = |at, buf: &mut [u8]| strict.read_at(at, buf);
            let parts =
                hot_parts(self.shape, read).map_err(|error| format!("O3: looks clean, but {error}"))?;
            check_content(history, *clock, &parts, *garbage)
                .map_err(|error| format!("O3: looks clean: {error}"))?;
        }

        let before = vfs.content_hash(path);
        checker_finds(&shared, Severity::Risk).map_err(|error| format!("O4: before recovery: {error}"))?;
        let disk =
            options.clone().read_only(true).open(path).map_err(|error| format!("O1: read-only: {error}"))?;
        judge(&disk).map_err(|error| format!("read-only: {error}"))?;
        drop(disk);
        if vfs.content_hash(path) != before {
            return Err("O5: a check or a read-only open changed the file".into());
        }

        let disk = options.open(path).map_err(|error| format!("O1: {error}"))?;
        let points = vfs.take_crash_points();
        vfs.record(false);
        let parts = judge(&disk)?;
        // The process is killed: its successor finds a medium that was recovered but for what is in no hurry.
        drop(disk);
        let disk = options.open(path).map_err(|error| format!("O6: a second recovery: {error}"))?;
        let again = read_hot(&disk, self.shape).map_err(|error| format!("O6: reading: {error}"))?;
        if again != parts {
            return Err("O6: a second recovery changed what the guest sees".into());
        }
        disk.close().map_err(|error| format!("O1: closing: {error}"))?;
        drop(disk);
        agree_with_strict_reader(&vfs, &parts).map_err(|error| format!("O3: {error}"))?;
        // A block of another program that is gone leaves the pages that it shared with its neighbours.
        let allowed = if self.shape.elsewhere.is_some() { Severity::Leak } else { Severity::Note };
        checker_finds(&shared, allowed).map_err(|error| format!("O4: after the close: {error}"))?;
        Ok(points)
    }
}

/// Opens the disk, and is killed.
fn open(vfs: &SimVfs) {
    drop(OpenOptions::new().vfs(Arc::new(vfs.clone())).open(Path::new(PATH)));
}

/// Whether the checker finds nothing worse than `allowed`, but for the mark of an injected fault.
fn checker_finds(vfs: &Arc<dyn Vfs>, allowed: Severity) -> Result<(), String> {
    let report = check(Arc::clone(vfs), Path::new(PATH)).map_err(|error| error.to_string())?;
    let bad = |finding: &&Finding| finding.severity() > allowed && finding.code != Code::SyncFailed;
    match report.findings().iter().find(bad) {
        Some(finding) => Err(format!("{finding:?}")),
        None => Ok(()),
    }
}

/// Whether a dynamic header stands in its place, with either cookie.
fn has_headers(vfs: &SimVfs) -> bool {
    let mut header = [0; 1024];
    let file = vfs.open(Path::new(PATH), Access::ReadOnly).unwrap();
    file.read_at(&mut header, 512).is_ok() && DynamicHeader::parse(&header).is_ok()
}

/// Whether other tools would open the file: its dynamic header has its normal cookie.
fn looks_clean(vfs: &SimVfs) -> bool {
    let mut cookie = [0; 8];
    let file = vfs.open(Path::new(PATH), Access::ReadOnly).unwrap();
    file.read_at(&mut cookie, 512).is_ok() && cookie == *b"cxsparse"
}

/// Opens the disk with the strict reader; with `front_counts` as one that goes by the footer copy at the start.
fn strict_reader(vfs: &SimVfs, front_counts: bool) -> Result<StrictVhd<'static>, String> {
    let open = |path| {
        let file = vfs.open(Path::new(path), Access::ReadOnly).map_err(|error| error.to_string())?;
        let length = file.length().map_err(|error| error.to_string())?.next_multiple_of(SECTOR);
        let footer = if front_counts { SECTOR } else { 0 };
        StrictVhd::open(Positional::new(length + footer, move |buf, at| match at.checked_sub(length) {
            Some(within) => file.read_at(buf, within),
            None => {
                let count = buf.len().min((length - at) as usize);
                let count = file.read_at(&mut buf[..count], at)?;
                // What the last sector lacks.
                buf[..1].iter_mut().take(usize::from(count == 0)).for_each(|byte| *byte = 0);
                Ok(count.max(1))
            }
        }))
    };
    let disk = open(PATH)?;
    match disk.kind() {
        Kind::Differencing => disk.with_parent(open(PARENT_PATH)?),
        _ => Ok(disk),
    }
}

fn agree_with_strict_reader(vfs: &SimVfs, parts: &[(u64, Vec<u8>)]) -> Result<(), String> {
    let mut strict = strict_reader(vfs, false)?;
    for (first, content) in parts {
        let mut buf = vec![0xee; content.len()];
        strict.read_at(first * SECTOR, &mut buf)?;
        if buf != *content {
            return Err(format!("reads other content from sector {first} on"));
        }
    }
    Ok(())
}
