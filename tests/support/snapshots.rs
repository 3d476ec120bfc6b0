//! A disk with snapshots on a simulated file system, what was written to it and flushed, and what each snapshot may hold.

use super::failing::left_by_each;
use cowvhd::check::{Code, Severity, check};
use cowvhd::sim::{Bounds, CrashState, FileSystem, History, Rng, SimVfs, Underway};
use cowvhd::snapshot::SnapshotName;
use cowvhd::vfs::Vfs;
use cowvhd::{CreateOptions, Disk, Error, ErrorKind, OpenOptions};
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

pub const LEAF: &str = "/vm.vhd";
const BLOCK: u32 = 16 << 10;
const RING: u64 = 128 << 10;
const SIZE: u64 = 8 * (16 << 10) - 1024;
const SECTOR: u64 = 512;

const ABLE: FileSystem = FileSystem {
    no_exchange: false,
    no_nameless_files: false,
    no_clones: false,
    no_holes: false,
    no_copies: false,
    available_bytes: None,
};
/// What file systems can do.
pub const KINDS: [FileSystem; 3] = [
    ABLE,
    FileSystem { no_exchange: true, ..ABLE },
    FileSystem { no_exchange: true, no_nameless_files: true, ..ABLE },
];

/// What the disk is before its first snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Root {
    Dynamic,
    Fixed,
}

/// Where the stories play.
pub fn stages() -> impl Iterator<Item = (Root, FileSystem)> {
    [Root::Dynamic, Root::Fixed].into_iter().flat_map(|root| KINDS.map(|kind| (root, kind)))
}

/// Up to `most` states of a crash point. A fixed disk's footer shares a physical sector with the guest's last data.
pub fn sample(root: Root, most: usize) -> Bounds {
    let shared = SIZE / 4096 * 4096;
    let spared = if root == Root::Fixed { (shared, shared + 4096) } else { (0, 0) };
    Bounds { spared, ..Bounds::sample(most) }
}

/// A disk that is written to, gets a snapshot under live writes, is written to, gets another one, and is written to.
fn tell(story: &mut Story) {
    story.write_some(3);
    story.flush();
    story.snapshot("s1", 2);
    story.write_some(2);
    story.flush();
    story.write_some(2);
    story.snapshot("s2", 1);
    story.write_some(2);
    story.flush();
    story.write_some(1);
}

/// Cuts the power at every step; judges up to `most` states of each, and says how many there were.
pub fn cut_anywhere((root, kind): (Root, FileSystem), most: usize) -> Result<u64, String> {
    let mut story = Story::new(1, root, kind);
    story.vfs.record(true);
    tell(&mut story);
    let mut points = story.vfs.take_crash_points();
    points.push(story.vfs.crash_now());
    story.vfs.record(false);
    let mut seen = HashSet::new();
    for (p, point) in points.iter().enumerate() {
        let mut result = Ok(());
        point.for_each_state(p as u64, &sample(root, most), |state| {
            if seen.insert(state.hash ^ point.clock()) {
                let judged = judge(&story, &state, point.clock(), 1);
                result = judged
                    .map_err(|what| format!("{root:?}, {kind:?}, point {p}, {}: {what}", state.fates()));
            }
            result.is_ok()
        });
        result?;
    }
    Ok(seen.len() as u64)
}

/// The process ends at every step; another one goes on with what the cache shows, flushes, and then the power fails. Says how
/// many steps there were.
pub fn kill_anywhere((root, kind): (Root, FileSystem), most: usize) -> Result<u64, String> {
    for step in 0.. {
        let mut story = Story::new(2, root, kind);
        story.kill_at = Some(step);
        if catch_unwind(AssertUnwindSafe(|| tell(&mut story))).is_ok() {
            return Ok(step);
        }
        story.kill_at = None;
        story.vfs.set_hook(None);
        story.reopen().map_err(|error| format!("{root:?}, {kind:?}, killed at {step}: {error}"))?;
        story.write_some(2);
        story.flush();
        let point = story.vfs.crash_now();
        let mut result = Ok(());
        point.for_each_state(step, &sample(root, most), |state| {
            let judged = judge(&story, &state, point.clock(), 0);
            result = judged
                .map_err(|what| format!("{root:?}, {kind:?}, killed at {step}, {}: {what}", state.fates()));
            result.is_ok()
        });
        result?;
    }
    Ok(0)
}

/// Cuts the power at every `every`th step; of the opening that finds what is left each operation fails in its turn, and what that
/// leaves is judged. Says how many there were.
pub fn fail_recovery((root, kind): (Root, FileSystem), every: usize) -> Result<u64, String> {
    let mut story = Story::new(3, root, kind);
    story.vfs.record(true);
    tell(&mut story);
    let points = story.vfs.take_crash_points();
    story.vfs.record(false);
    let (mut failed, mut result) = (0, Ok(()));
    for (p, point) in points.iter().enumerate().step_by(every) {
        point.for_each_state(p as u64, &sample(root, 2), |state| {
            let open = |vfs: &SimVfs| drop(options(vfs).open(Path::new(LEAF)));
            left_by_each(&state, open, |failing, left| {
                failed += 1;
                left.for_each_state(failing.operation, &sample(root, 2), |mut left| {
                    left.garbage |= state.garbage;
                    result = judge(&story, &left, point.clock(), 0).map_err(|what| {
                        format!("{root:?}, {kind:?}, point {p}, {}, error {failing}: {what}", state.fates())
                    });
                    result.is_ok()
                });
                result.is_ok()
            });
            result.is_ok()
        });
        result.clone()?;
    }
    Ok(failed)
}

/// A snapshot that was taken or begun.
#[derive(Debug, Clone)]
pub struct Taken {
    pub name: String,
    /// What it may hold: the disk's content after each change while it was taken.
    pub versions: Vec<Vec<u8>>,
    /// When the call returned successfully.
    pub done: Option<u64>,
}

/// What the disk is believed to hold, shared with the writes in the middle of others.
#[derive(Debug)]
struct Belief {
    history: History,
    content: Vec<u8>,
    versions: Vec<Vec<u8>>,
    rng: Rng,
    /// Writes in the middle of operations that are still to come.
    live_writes: u32,
    steps: u64,
}

/// One life of a disk.
pub struct Story {
    pub vfs: SimVfs,
    pub taken: Vec<Taken>,
    /// The operation at which the process ends.
    pub kill_at: Option<u64>,
    disk: Option<Arc<Disk>>,
    belief: Arc<Mutex<Belief>>,
}

pub fn options(vfs: &SimVfs) -> OpenOptions {
    OpenOptions::new().test_geometry(BLOCK, RING).vfs(Arc::new(vfs.clone()))
}

impl Story {
    pub fn new(seed: u64, root: Root, kind: FileSystem) -> Self {
        let vfs = SimVfs::new(seed);
        vfs.set_kind(kind);
        let create = CreateOptions::new(SIZE).test_geometry(BLOCK, RING).vfs(Arc::new(vfs.clone()));
        let create = if root == Root::Fixed { create.fixed() } else { create };
        create.create(Path::new(LEAF)).unwrap();
        let disk = Some(Arc::new(options(&vfs).open(Path::new(LEAF)).unwrap()));
        let belief = Belief {
            history: History::default(),
            content: vec![0; SIZE as usize],
            versions: Vec::new(),
            rng: Rng::new(seed),
            live_writes: 0,
            steps: 0,
        };
        Story { vfs, taken: Vec::new(), kill_at: None, disk, belief: Arc::new(Mutex::new(belief)) }
    }

    fn disk(&self) -> Arc<Disk> {
        Arc::clone(self.disk.as_ref().unwrap())
    }

    pub fn write_some(&mut self, count: u32) {
        (0..count).for_each(|_| write_one(&self.vfs, &self.disk(), &self.belief));
    }

    /// Flushes; a disk that was stopped says so.
    pub fn try_flush(&mut self) {
        let called = self.vfs.tick();
        let result = self.disk().flush();
        let mut belief = self.belief.lock().unwrap();
        match result {
            Ok(()) => belief.history.flushed(called, self.vfs.tick()),
            Err(_) => belief.history.flush_failed(self.vfs.tick()),
        }
    }

    pub fn flush(&mut self) {
        let called = self.vfs.tick();
        self.disk().flush().unwrap();
        self.belief.lock().unwrap().history.flushed(called, self.vfs.tick());
    }

    /// Takes a snapshot with so many writes in the middle of it.
    pub fn snapshot(&mut self, name: &str, live_writes: u32) {
        let disk = self.disk();
        {
            let mut belief = self.belief.lock().unwrap();
            belief.versions = vec![belief.content.clone()];
            belief.live_writes = live_writes;
        }
        let (vfs, belief, weak) = (self.vfs.clone(), Arc::clone(&self.belief), Arc::downgrade(&disk));
        let kill_at = self.kill_at;
        self.vfs.set_hook(Some(Box::new(move |underway| {
            let mut state = belief.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            state.steps += 1;
            let killed = kill_at.is_some_and(|step| state.steps > step);
            let writes = state.live_writes > 0
                && !matches!(underway, Underway::Read | Underway::Write)
                && state.rng.below(3) == 0;
            if writes {
                state.live_writes -= 1;
            }
            drop(state);
            if killed && !std::thread::panicking() {
                // Without a word on standard error.
                std::panic::resume_unwind(Box::new("killed"));
            }
            if let Some(disk) = weak.upgrade().filter(|_| writes) {
                write_one(&vfs, &disk, &belief);
            }
        })));
        self.taken.push(Taken { name: name.into(), versions: Vec::new(), done: None });
        let result = disk.snapshot(&SnapshotName::new(name).unwrap());
        self.vfs.set_hook(None);
        let mut belief = self.belief.lock().unwrap();
        belief.live_writes = 0;
        let taken = self.taken.last_mut().unwrap();
        taken.versions = std::mem::take(&mut belief.versions);
        if result.is_ok() {
            taken.done = Some(self.vfs.tick());
        }
    }

    /// What the disk holds, if no change failed.
    pub fn content(&self) -> Vec<u8> {
        self.belief.lock().unwrap().content.clone()
    }

    pub fn close(&mut self) {
        let called = self.vfs.tick();
        self.disk().close().unwrap();
        self.belief.lock().unwrap().history.flushed(called, self.vfs.tick());
        self.disk = None;
    }

    /// The process was killed: another one opens the disk, of which nothing is lost that is in the cache.
    pub fn reopen(&mut self) -> Result<(), Error> {
        self.disk = None;
        let mut belief = self.belief.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(taken) = self.taken.last_mut().filter(|taken| taken.done.is_none()) {
            taken.versions = std::mem::take(&mut belief.versions);
        }
        belief.live_writes = 0;
        // What was not flushed may be gone with the process.
        belief.history.flush_failed(self.vfs.tick());
        drop(belief);
        self.belief.clear_poison();
        self.disk = Some(Arc::new(options(&self.vfs).open(Path::new(LEAF))?));
        Ok(())
    }
}

fn write_one(vfs: &SimVfs, disk: &Disk, belief: &Mutex<Belief>) {
    let (submitted, first, count, value) = {
        let mut belief = belief.lock().unwrap();
        let sectors = SIZE / SECTOR;
        let count = 1 + belief.rng.below(12);
        let first = belief.rng.below(sectors - count);
        let value = belief.history.new_value();
        let at = vfs.tick();
        let submitted = belief.history.submit(at, first, count, value);
        (submitted, first, count, value)
    };
    let mut bytes = vec![0; (count * SECTOR) as usize];
    History::fill(value, &mut bytes);
    let result = disk.write_at(&bytes, first * SECTOR);
    let mut belief = belief.lock().unwrap();
    if result.is_ok() {
        belief.history.completed(submitted, vfs.tick(), first, count);
        belief.content[(first * SECTOR) as usize..][..bytes.len()].copy_from_slice(&bytes);
        let content = belief.content.clone();
        belief.versions.push(content);
    }
}

fn read_all(disk: &Disk) -> Result<Vec<u8>, Error> {
    let mut content = vec![0xee; SIZE as usize];
    disk.read_at(&mut content, 0).map(|()| content)
}

/// The files that this state has, by their content; and their names.
fn all_files(vfs: &SimVfs) -> Vec<(PathBuf, Option<u64>)> {
    vfs.paths().into_iter().map(|path| (path.clone(), vfs.content_hash(&path))).collect()
}

/// The hash of what no maintenance changes of a sealed file: all but its registry of children.
fn sealed_hash(vfs: &SimVfs, path: &Path) -> Option<u64> {
    vfs.content_hash_without(path, 65536..262_144)
}

/// Judges what a power cut left at `clock`; then cuts its recovery as well, down to `depth`.
pub fn judge(story: &Story, state: &CrashState, clock: u64, depth: u32) -> Result<(), String> {
    let vfs = state.to_vfs(state.hash);
    let leaf = Path::new(LEAF);
    let belief = story.belief.lock().unwrap();
    let history = &belief.history;
    let judge_leaf = |disk: &Disk, how: &str| -> Result<(), String> {
        let content = read_all(disk).map_err(|error| format!("O2: {how}: {error}"))?;
        history.check(clock, 0, &content, state.garbage).map_err(|error| format!("O2: {how}: {error}"))
    };

    let before = all_files(&vfs);
    let disk = options(&vfs).read_only(true).open(leaf).map_err(|error| format!("O1: read-only: {error}"))?;
    judge_leaf(&disk, "read-only")?;
    drop(disk);
    if all_files(&vfs) != before {
        return Err("O5: a read-only open changed something".into());
    }

    vfs.record(true);
    let disk = options(&vfs).open(leaf).map_err(|error| format!("O1: {error}"))?;
    let points = vfs.take_crash_points();
    vfs.record(false);
    judge_leaf(&disk, "recovered")?;
    let mut sealed = Vec::new();
    for taken in &story.taken {
        let path = PathBuf::from(format!("/vm@{}.vhd", taken.name));
        let there = vfs.paths().contains(&path);
        if taken.done.is_some_and(|done| done <= clock) && !there {
            return Err(format!("O8: the snapshot {} is gone", taken.name));
        }
        if !there {
            continue;
        }
        let old = options(&vfs).read_only(true).open(&path);
        let old = old.map_err(|error| format!("O8: snapshot {}: {error}", taken.name))?;
        let content = read_all(&old).map_err(|error| format!("O8: snapshot {}: {error}", taken.name))?;
        if !taken.versions.contains(&content) {
            return Err(format!("O8: the snapshot {} holds what the disk never did", taken.name));
        }
        match options(&vfs).open(&path) {
            Err(error) if error.kind() == ErrorKind::Sealed || error.kind() == ErrorKind::InUse => {}
            Ok(_) => return Err(format!("O8: the snapshot {} can be written to", taken.name)),
            Err(other) => {
                return Err(format!("O8: the snapshot {} is refused otherwise: {other}", taken.name));
            }
        }
        sealed.push((path.clone(), sealed_hash(&vfs, &path), content));
    }
    let known: Vec<PathBuf> =
        sealed.iter().map(|(path, ..)| path.clone()).chain([leaf.to_path_buf()]).collect();
    let stray = |path: &&PathBuf| !known.contains(path) && !path.to_string_lossy().contains(".new-");
    if let Some(stray) = vfs.paths().iter().find(stray) {
        return Err(format!("{} is left over", stray.display()));
    }

    // Life goes on; it changes no snapshot.
    let mut content = read_all(&disk).map_err(|error| error.to_string())?;
    let goes_on = |result: Result<(), Error>| result.map_err(|error| format!("going on: {error}"));
    for (first, byte) in [(3, 0xa1), (90, 0xa2)] {
        goes_on(disk.write_at(&[byte; 1024], first * SECTOR))?;
        content[(first * SECTOR) as usize..][..1024].fill(byte);
    }
    for name in story.taken.iter().map(|taken| taken.name.as_str()).chain(["later"]) {
        let path = PathBuf::from(format!("/vm@{name}.vhd"));
        if !known.contains(&path) {
            let name = SnapshotName::new(name).unwrap();
            goes_on(disk.snapshot(&name).map(drop))?;
            sealed.push((path.clone(), sealed_hash(&vfs, &path), content.clone()));
        }
    }
    goes_on(disk.discard(0, SIZE / 2 / u64::from(BLOCK) * u64::from(BLOCK)))?;
    goes_on(disk.close())?;
    drop(disk);
    for (path, bytes, content) in &sealed {
        if sealed_hash(&vfs, path) != *bytes {
            return Err(format!("O8: {} changed", path.display()));
        }
        // Now that nobody has it open, nothing but the seal is in the way.
        match options(&vfs).open(path) {
            Err(error) if error.kind() == ErrorKind::Sealed => {}
            Ok(_) => return Err(format!("O8: {} can be written to", path.display())),
            Err(other) => return Err(format!("O8: {} is refused otherwise: {other}", path.display())),
        }
        let old = options(&vfs).read_only(true).open(path).map_err(|error| format!("O8: {error}"))?;
        if read_all(&old).map_err(|error| error.to_string())? != *content {
            return Err(format!("O8: {} shows something else", path.display()));
        }
    }
    let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
    for path in sealed.iter().map(|(path, ..)| path.as_path()).chain([leaf]) {
        let report = check(Arc::clone(&shared), path).map_err(|error| format!("O4: {error}"))?;
        let bad = |finding: &&cowvhd::check::Finding| {
            finding.severity() > Severity::Note && finding.code != Code::SyncFailed
        };
        if let Some(finding) = report.findings().iter().find(bad) {
            return Err(format!("O4: {}: {finding:?}", path.display()));
        }
    }

    drop(belief);
    let mut rng = Rng::new(state.hash);
    for _ in 0..if depth > 0 && !points.is_empty() { 2 } else { 0 } {
        let point = &points[rng.below(points.len() as u64) as usize];
        if let Some(mut next) = point.pick(&mut rng) {
            next.garbage |= state.garbage;
            judge(story, &next, clock, depth - 1)
                .map_err(|what| format!("recovery cut ({}): {what}", next.fates()))?;
        }
    }
    Ok(())
}
