//! Crash points and the states that a power cut there may leave.
//!
//! A *piece* is one pending operation: a write, a hole, a change of a file's length, a change of names. Each may be lost or
//! kept, independently of all others; changes of names in any order; a write may be torn at any 512-byte boundary, or leave
//! garbage in whole 4 KiB physical sectors. [`Bounds`] says how many of these states are made. What became of each piece is
//! a [`Fates`], which can be printed and read back to make one state again.

use super::fates::{Fate, Fates};
use super::names::{NameChange, Names};
use super::pages::{Change, Pages, mix};
use super::rng::Rng;
use super::vfs::SimVfs;
use crate::vfs::FileTime;
use std::collections::BTreeMap;
use std::path::Path;

const SECTOR: u64 = 512;

/// A file when the power failed.
#[derive(Debug, Clone)]
pub(super) struct FileAtCrash {
    pub(super) medium: Pages,
    pub(super) pending: Vec<Change>,
    pub(super) modified: FileTime,
    pub(super) read_only: bool,
}

/// A file after a power cut.
#[derive(Debug, Clone)]
pub(super) struct FileOnMedium {
    pub(super) pages: Pages,
    pub(super) modified: FileTime,
    pub(super) read_only: bool,
}

/// A moment at which the power may fail.
#[derive(Debug, Clone)]
pub struct CrashPoint {
    pub(super) clock: u64,
    pub(super) files: BTreeMap<usize, FileAtCrash>,
    pub(super) names: Names,
    pub(super) renamed: Vec<NameChange>,
}

/// One state that a crash point may leave.
#[derive(Debug, Clone)]
pub struct CrashState {
    names: Names,
    files: Vec<FileOnMedium>,
    clock: u64,
    fates: Fates,
    /// In-flight physical sectors may hold garbage.
    pub garbage: bool,
    /// The hash of all names and their files.
    pub hash: u64,
}

impl CrashState {
    /// The file system after the power came back.
    pub fn to_vfs(&self, seed: u64) -> SimVfs {
        SimVfs::with_files(seed, self.clock, self.names.clone(), self.files.iter().cloned())
    }

    /// What became of each piece: [`CrashPoint::state`] makes the same state of it.
    pub fn fates(&self) -> &Fates {
        &self.fates
    }

    /// Whether a name survived.
    pub fn has(&self, path: &Path) -> bool {
        self.names.contains_key(path)
    }
}

/// How many states of a crash point are made.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Of up to so many pieces, every subset.
    pub every_subset: usize,
    /// Of more pieces, every subset that lacks at most so many, or holds at most so many.
    pub apart: usize,
    /// Every way to tear up to two writes, where that makes no more states than this.
    pub tears: usize,
    /// So many states from a seed: subsets, torn writes, garbage, names in another order.
    pub seeded: usize,
    /// No more than this in all.
    pub most: usize,
    /// Writes that touch this part of a file, from the first byte to the second, never leave garbage: there metadata shares physical
    /// sectors with a guest's data.
    pub spared: (u64, u64),
}

impl Bounds {
    /// About `most` states, seeded ones if others do not fill the number.
    pub fn sample(most: usize) -> Self {
        Bounds {
            every_subset: (most.max(1).ilog2() as usize).min(12),
            apart: 1,
            tears: most,
            seeded: most,
            most,
            spared: (0, 0),
        }
    }

    /// Every subset of up to 12 pieces; of more, all that lack or hold at most 3, and 1000 seeded ones; up to two writes torn
    /// in every way.
    pub fn full() -> Self {
        Bounds { every_subset: 12, apart: 3, tears: 1 << 17, seeded: 1000, most: usize::MAX, spared: (0, 0) }
    }
}

impl CrashPoint {
    /// The clock when the power failed.
    pub fn clock(&self) -> u64 {
        self.clock
    }

    /// How many pieces there are.
    pub fn pending(&self) -> usize {
        self.files.values().map(|file| file.pending.len()).sum::<usize>() + self.renamed.len()
    }

    /// Calls `visit` with states of this point, within `bounds`, until it returns false. The same seed gives the same states.
    pub fn for_each_state(&self, seed: u64, bounds: &Bounds, mut visit: impl FnMut(CrashState) -> bool) {
        let count = self.pending();
        let mut made = 0;
        let mut emit = |pieces: Vec<Fate>, order: u64| {
            made += 1;
            let state = self.state(&Fates { pieces, order });
            state.is_none_or(&mut visit) && made < bounds.most
        };
        let go_on = match count <= bounds.every_subset {
            true => every_subset(count, &mut |pieces| emit(pieces, 0)),
            false => {
                (0..=bounds.apart).all(|apart| few(count, apart, Fate::Lost, &mut |pieces| emit(pieces, 0)))
                    && (0..=bounds.apart)
                        .all(|apart| few(count, apart, Fate::Kept, &mut |pieces| emit(pieces, 0)))
            }
        };
        if count == 0 || !go_on || !self.every_tear(bounds.tears, &mut |pieces| emit(pieces, 0)) {
            return;
        }
        let mut rng = Rng::new(seed);
        for _ in 0..bounds.seeded {
            let style = rng.below(4);
            let spared = self.spared(bounds);
            let pieces = (0..count).map(|piece| match (style, rng.below(4)) {
                (1, 0) | (2, 0 | 1) => Fate::Torn(rng.next_u64()),
                (3, 0 | 1) if !spared.contains(&piece) => Fate::Garbage(rng.next_u64()),
                (3, 0 | 1) => Fate::Torn(rng.next_u64()),
                (_, choice) => Fate::kept_if(choice & 1 == 1),
            });
            let pieces = pieces.collect();
            let order = if self.renamed.len() > 1 { rng.next_u64() } else { 0 };
            if !emit(pieces, order) {
                return;
            }
        }
    }

    /// One state, that `rng` picks among the first few of this point.
    pub fn pick(&self, rng: &mut Rng) -> Option<CrashState> {
        let mut skip = rng.below(6);
        let mut picked = None;
        self.for_each_state(rng.next_u64(), &Bounds::sample(10), |state| {
            picked = Some(state);
            skip = skip.saturating_sub(1);
            skip > 0
        });
        picked
    }

    /// The pieces that never leave garbage.
    fn spared(&self, bounds: &Bounds) -> Vec<usize> {
        let (from, to) = bounds.spared;
        let touches = |change: &Change| match change {
            Change::Write { offset, bytes } => *offset < to && offset + bytes.len() as u64 > from,
            Change::Punch { .. } | Change::SetLength(_) => false,
        };
        let changes = self.files.values().flat_map(|file| &file.pending);
        changes.enumerate().filter(|(_, change)| touches(change)).map(|(piece, _)| piece).collect()
    }

    /// The state that `fates` leave, which were made for this crash point (`None` if their number shows that they were not).
    pub fn state(&self, fates: &Fates) -> Option<CrashState> {
        if fates.pieces.len() != self.pending() {
            return None;
        }
        let mut pieces = fates.pieces.iter().copied();
        let mut files = Vec::new();
        let mut numbers = BTreeMap::new();
        for (&id, file) in &self.files {
            let mut pages = file.medium.clone();
            for (change, fate) in file.pending.iter().zip(pieces.by_ref()) {
                fate.apply(change, &mut pages);
            }
            numbers.insert(id, files.len());
            files.push(FileOnMedium { pages, modified: file.modified, read_only: file.read_only });
        }
        let mut renamed: Vec<&NameChange> = self
            .renamed
            .iter()
            .zip(pieces)
            .filter(|(_, fate)| *fate != Fate::Lost)
            .map(|(change, _)| change)
            .collect();
        shuffle(&mut renamed, fates.order);
        let mut names = self.names.clone();
        renamed.into_iter().for_each(|change| change.apply(&mut names));
        // Files are numbered from 0 here, and a name without a file of this point cannot be.
        names.values_mut().for_each(|id| *id = numbers.get(id).copied().unwrap_or(usize::MAX));
        let mut hash = 0;
        for (path, &file) in &names {
            path.as_os_str().as_encoded_bytes().iter().for_each(|&byte| hash = mix(hash ^ u64::from(byte)));
            hash = mix(hash ^ files.get(file).map_or(0, |file| file.pages.hash()));
        }
        let garbage = fates.pieces.iter().any(|fate| matches!(fate, Fate::Garbage(_)));
        Some(CrashState { names, files, clock: self.clock, fates: fates.clone(), garbage, hash })
    }

    /// If up to two pieces are writes, and few others are there: the writes cut at every boundary, each with every fate of the
    /// others, and a short one with any of its sectors.
    fn every_tear(&self, most: usize, emit: &mut dyn FnMut(Vec<Fate>) -> bool) -> bool {
        let changes = || self.files.values().flat_map(|file| &file.pending);
        let writes = changes().filter(|change| matches!(change, Change::Write { .. })).count();
        let choices: Vec<Vec<Fate>> = changes()
            .map(|change| match change {
                Change::Write { bytes, .. } => Fate::every_cut((bytes.len() as u64).div_ceil(SECTOR)),
                Change::Punch { .. } | Change::SetLength(_) => vec![Fate::Lost, Fate::Kept],
            })
            .chain(self.renamed.iter().map(|_| vec![Fate::Lost, Fate::Kept]))
            .collect();
        let states = choices.iter().try_fold(1usize, |states, choices| states.checked_mul(choices.len()));
        if writes > 2 || states.is_none_or(|states| states > most) {
            return true;
        }
        // Counts through all combinations, the first piece fastest.
        (0..states.unwrap_or(0)).all(|mut number| {
            let pieces = choices.iter().filter_map(|choices| {
                let choice = choices.get(number % choices.len()).copied();
                number /= choices.len();
                choice
            });
            emit(pieces.collect())
        })
    }
}

fn every_subset(count: usize, emit: &mut dyn FnMut(Vec<Fate>) -> bool) -> bool {
    (0..1u64 << count).all(|subset| emit((0..count).map(|i| Fate::kept_if(subset >> i & 1 == 1)).collect()))
}

/// All ways to give `apart` of `count` pieces the fate `fate`, and the others the other one.
fn few(count: usize, apart: usize, fate: Fate, emit: &mut dyn FnMut(Vec<Fate>) -> bool) -> bool {
    let other = Fate::kept_if(fate == Fate::Lost);
    let mut chosen: Vec<usize> = (0..apart).collect();
    loop {
        if apart > count
            || !emit((0..count).map(|i| if chosen.contains(&i) { fate } else { other }).collect())
        {
            return apart > count;
        }
        // The next combination: the last number that can still grow does, and those behind it follow.
        let Some(at) = (0..apart).rev().find(|&i| chosen.get(i).is_some_and(|&n| n < count - apart + i))
        else {
            return true;
        };
        let start = chosen.get(at).map_or(0, |n| n + 1);
        chosen.iter_mut().skip(at).zip(start..).for_each(|(number, next)| *number = next);
    }
}

/// Another order, or for 0 the same.
fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut rng = Rng::new(seed);
    for last in (1..items.len()).rev() {
        if seed != 0 {
            items.swap(last, rng.below(last as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfs::Vfs;
    use std::collections::HashSet;

    fn states(vfs: &SimVfs, bounds: &Bounds) -> Vec<CrashState> {
        let mut states = Vec::new();
        vfs.crash_now().for_each_state(1, bounds, |state| {
            states.push(state);
            true
        });
        states
    }

    /// The names that states have, each set of them once.
    fn names(states: &[CrashState]) -> HashSet<String> {
        let names = |state: &CrashState| {
            let name = |(path, id): (&std::path::PathBuf, &usize)| {
                let first = state.files.get(*id).map_or(0, |file| {
                    let mut byte = [0];
                    file.pages.read(&mut byte, 0);
                    byte[0]
                });
                format!("{}={first} ", path.display())
            };
            state.names.iter().map(name).collect::<String>().trim_end().to_string()
        };
        states.iter().map(names).collect()
    }

    fn set(names: &[&str]) -> HashSet<String> {
        names.iter().map(ToString::to_string).collect()
    }

    fn file(vfs: &SimVfs, path: &str, byte: u8) {
        let file = vfs.create_new(Path::new(path)).unwrap();
        file.write_at(&[byte], 0).unwrap();
        file.sync_data().unwrap();
    }

    #[test]
    fn names_wait_for_a_sync_of_their_directory() {
        let vfs = SimVfs::new(1);
        let (a, b) = (Path::new("/a"), Path::new("/b"));
        file(&vfs, "/a", 1);
        assert_eq!(
            names(&states(&vfs, &Bounds::full())),
            set(&["", "/a=1"]),
            "a synced file without a name is gone"
        );
        vfs.sync_dir(Path::new("/else")).unwrap();
        assert_eq!(names(&states(&vfs, &Bounds::full())).len(), 2);
        vfs.sync_dir(Path::new("/")).unwrap();
        assert_eq!(names(&states(&vfs, &Bounds::full())), set(&["/a=1"]));
        vfs.link(a, b).unwrap();
        vfs.remove(a).unwrap();
        let all = set(&["/a=1", "/a=1 /b=1", "/b=1", ""]);
        assert_eq!(names(&states(&vfs, &Bounds::full())), all, "a link and a removal are independent");
        assert!(vfs.open(a, crate::vfs::Access::ReadOnly).is_err());
    }

    #[test]
    fn renames_and_exchanges_are_whole_and_in_any_order() {
        let vfs = SimVfs::new(1);
        let [a, b, c] = ["/a", "/b", "/c"].map(Path::new);
        file(&vfs, "/a", 1);
        file(&vfs, "/b", 2);
        file(&vfs, "/c", 3);
        vfs.sync_dir(Path::new("/")).unwrap();
        vfs.exchange(a, b).unwrap();
        let two = set(&["/a=1 /b=2 /c=3", "/a=2 /b=1 /c=3"]);
        assert_eq!(names(&states(&vfs, &Bounds::full())), two);
        vfs.rename(b, c).unwrap();
        let four = set(&["/a=1 /b=2 /c=3", "/a=2 /b=1 /c=3", "/a=1 /c=1", "/a=2 /c=1", "/a=2 /b=1 /c=1"]);
        assert_eq!(names(&states(&vfs, &Bounds::full())), four, "the last one is the other order");
        vfs.link(c, b).unwrap();
        vfs.rename(b, c).unwrap();
        assert_eq!(vfs.paths(), ["/a", "/b", "/c"].map(Path::new), "two names of one file both stay");
        assert!(vfs.exchange(a, Path::new("/none")).is_err());
    }

    #[test]
    fn a_rename_over_two_directories_is_a_change_in_each() {
        let vfs = SimVfs::new(1);
        file(&vfs, "/x/a", 1);
        vfs.sync_dir(Path::new("/x")).unwrap();
        vfs.rename(Path::new("/x/a"), Path::new("/y/a")).unwrap();
        vfs.sync_dir(Path::new("/y")).unwrap();
        assert_eq!(names(&states(&vfs, &Bounds::full())), set(&["/x/a=1 /y/a=1", "/y/a=1"]));
    }

    #[test]
    fn a_failed_sync_of_a_directory_forgets_what_it_took() {
        use crate::sim::{Fault, FaultPlan, Operation};
        let vfs = SimVfs::new(1);
        file(&vfs, "/a", 1);
        vfs.set_faults(FaultPlan::new(Fault::Error(5), 0, 1).only(Operation::SyncDirectory));
        assert!(vfs.sync_dir(Path::new("/")).is_err());
        assert!(vfs.sync_dir(Path::new("/")).is_ok());
        assert_eq!(names(&states(&vfs, &Bounds::full())), set(&[""]));
        assert_eq!(vfs.paths(), [Path::new("/a")], "the cache still shows it");
    }

    #[test]
    fn enumeration_is_complete_and_its_states_can_be_made_again() {
        let vfs = SimVfs::new(1);
        let path = Path::new("/a");
        let file = vfs.create_new(path).unwrap();
        vfs.sync_dir(Path::new("/")).unwrap();
        file.set_len(64 << 10).unwrap();
        file.sync_data().unwrap();
        let distinct =
            |bounds: Bounds| states(&vfs, &bounds).iter().map(|s| s.hash).collect::<HashSet<_>>().len();
        let whole = Bounds { seeded: 0, tears: 0, ..Bounds::full() };
        file.write_at(&[1; 1024], 0).unwrap();
        file.write_at(&[2; 1536], 4096).unwrap();
        assert_eq!(
            distinct(Bounds { seeded: 0, ..Bounds::full() }),
            4 * 8,
            "any sectors of two short writes"
        );
        for n in 2..12 {
            file.write_at(&[3; 512], n * 4096).unwrap();
        }
        assert_eq!(distinct(whole), 1 << 12);
        file.write_at(&[3; 512], 12 * 4096).unwrap();
        assert_eq!(distinct(whole), 2 * (1 + 13 + 13 * 12 / 2 + 13 * 12 * 11 / 6));
        let point = vfs.crash_now();
        for state in states(&vfs, &Bounds { seeded: 300, ..Bounds::full() }) {
            let fates: Fates = state.fates().to_string().parse().unwrap();
            assert_eq!(point.state(&fates).unwrap().hash, state.hash, "{fates}");
        }
    }
}
