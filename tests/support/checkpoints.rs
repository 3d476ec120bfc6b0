//! A VM with two disks and a state, on a simulated file system: a checkpoint of all of it is there whole or not at all.

use super::failing::left_by_each;
use cowvhd::sim::{Bounds, CrashPoint, CrashState, History, Rng, SimVfs};
use cowvhd::snapshot::{self, Checkpoint, SnapshotName};
use cowvhd::vfs::Vfs;
use cowvhd::{CreateOptions, Disk, Error, ErrorKind, OpenOptions};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// In the folder of the simulated file system.
pub const DISKS: [&str; 2] = ["/a.vhd", "/b.vhd"];
pub const SNAPSHOTS: [&str; 2] = ["/a@one.vhd", "/b@one.vhd"];
pub const MANIFEST: &str = "/a@one.vmstate";
pub const BLOBS: [(&str, usize); 2] = [("ram", 9000), ("devices", 700)];
const BLOCK: u32 = 16 << 10;
const RING: u64 = 128 << 10;
const SIZE: u64 = 6 * (16 << 10);
const SECTOR: u64 = 512;

/// One life of the VM.
pub struct Story {
    pub vfs: SimVfs,
    count: usize,
    pub disks: Vec<Disk>,
    histories: Vec<History>,
    pub contents: Vec<Vec<u8>>,
    /// What the snapshots have to hold.
    pub saved: Vec<Vec<u8>>,
    /// When the commit returned successfully.
    pub done: Option<u64>,
    rng: Rng,
}

pub fn options(vfs: &SimVfs) -> OpenOptions {
    OpenOptions::new().vfs(Arc::new(vfs.clone()))
}

pub fn name() -> SnapshotName {
    SnapshotName::new("one").unwrap()
}

pub fn blob(index: usize) -> Vec<u8> {
    (0..BLOBS[index].1).map(|at| (at / 100) as u8 ^ 0x5a).collect()
}

impl Story {
    /// A VM with `count` disks.
    pub fn new(seed: u64, count: usize) -> Self {
        let vfs = SimVfs::new(seed);
        let disks = DISKS[..count].iter().map(|path| {
            let create = CreateOptions::new(SIZE).test_geometry(BLOCK, RING).vfs(Arc::new(vfs.clone()));
            create.create(Path::new(path)).unwrap();
            options(&vfs).open(Path::new(path)).unwrap()
        });
        let disks = disks.collect();
        Story {
            vfs,
            count,
            disks,
            histories: vec![History::default(); count],
            contents: vec![vec![0; SIZE as usize]; count],
            saved: Vec::new(),
            done: None,
            rng: Rng::new(seed),
        }
    }

    pub fn write_some(&mut self, count: u32) {
        for _ in 0..count {
            for (number, disk) in self.disks.iter().enumerate() {
                let count = 1 + self.rng.below(12);
                let first = self.rng.below(SIZE / SECTOR - count);
                let history = &mut self.histories[number];
                let value = history.new_value();
                let submitted = history.submit(self.vfs.tick(), first, count, value);
                let mut bytes = vec![0; (count * SECTOR) as usize];
                History::fill(value, &mut bytes);
                if disk.write_at(&bytes, first * SECTOR).is_ok() {
                    history.completed(submitted, self.vfs.tick(), first, count);
                    self.contents[number][(first * SECTOR) as usize..][..bytes.len()].copy_from_slice(&bytes);
                }
            }
        }
    }

    pub fn flush(&mut self) {
        for (disk, history) in self.disks.iter().zip(&mut self.histories) {
            let called = self.vfs.tick();
            match disk.flush() {
                Ok(()) => history.flushed(called, self.vfs.tick()),
                Err(_) => history.flush_failed(self.vfs.tick()),
            }
        }
    }

    /// Saves the VM, of which disks and state are what they are from here on.
    pub fn checkpoint(&mut self) -> Result<(), Error> {
        self.saved = self.contents.clone();
        let disks: Vec<&Disk> = self.disks.iter().collect();
        let checkpoint = Checkpoint::begin(&disks, &name())?;
        for (index, (name, length)) in BLOBS.into_iter().enumerate() {
            let bytes = blob(index);
            let blob = checkpoint.blob(name)?;
            blob.set_len(length as u64)?;
            for (number, piece) in bytes.chunks(4096).enumerate() {
                blob.write_at(piece, number as u64 * 4096)?;
            }
        }
        checkpoint.commit()?;
        self.done = Some(self.vfs.tick());
        Ok(())
    }

    /// The whole of it, as it is judged.
    pub fn tell(&mut self) -> Result<(), Error> {
        self.write_some(2);
        self.flush();
        self.write_some(1);
        let result = self.checkpoint();
        self.write_some(2);
        self.flush();
        self.write_some(1);
        result
    }

    /// The points at which the power may be cut while it is told.
    pub fn record(&mut self) -> Vec<CrashPoint> {
        self.vfs.record(true);
        self.tell().unwrap();
        let mut points = self.vfs.take_crash_points();
        points.push(self.vfs.crash_now());
        self.vfs.record(false);
        points
    }
}

/// Cuts the power at every step of a VM's life with `count` disks, in so many ways each; how many of them there were, or what is
/// wrong with one.
pub fn cut_anywhere(count: usize, states: usize) -> Result<u64, String> {
    let mut judged = 0;
    let mut story = Story::new(count as u64, count);
    let points = story.record();
    let mut seen = HashSet::new();
    for (p, point) in points.iter().enumerate() {
        let mut wrong = None;
        point.for_each_state(p as u64, &Bounds::sample(states), |state| {
            if seen.insert(state.hash ^ point.clock()) {
                judged += 1;
                wrong = judge(&story, &state, point.clock(), 1, judged % 2 == 0).err().map(|what| {
                    format!("{count} disks, point {p} of {}, {}: {what}", points.len(), state.fates())
                });
            }
            wrong.is_none()
        });
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
    }
    Ok(judged)
}

/// Cuts the power at every `every`th step; of the openings that find what is left each operation fails in its turn, and what that
/// leaves is judged. How many there were, or what is wrong.
pub fn fail_recovery(count: usize, every: usize) -> Result<u64, String> {
    let mut story = Story::new(count as u64 + 2, count);
    let points = story.record();
    let (mut failed, mut result) = (0, Ok(()));
    for (p, point) in points.iter().enumerate().step_by(every) {
        point.for_each_state(p as u64, &Bounds::sample(2), |state| {
            // One after the other, all open to the end.
            let open = |vfs: &SimVfs| {
                let disks: Vec<_> =
                    DISKS[..count].iter().map(|path| options(vfs).open(Path::new(path))).collect();
                drop(disks);
            };
            left_by_each(&state, open, |failing, left| {
                failed += 1;
                left.for_each_state(failing.operation, &Bounds::sample(2), |mut left| {
                    left.garbage |= state.garbage;
                    let reversed = failing.operation % 2 == 0;
                    result = judge(&story, &left, point.clock(), 0, reversed).map_err(|what| {
                        format!("{count} disks, point {p}, {}, error {failing}: {what}", state.fates())
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

fn read_all(disk: &Disk) -> Result<Vec<u8>, String> {
    let mut content = vec![0xee; SIZE as usize];
    disk.read_at(&mut content, 0).map_err(|error| error.to_string())?;
    Ok(content)
}

/// Judges what a power cut left at `clock`; then cuts its recovery as well, down to `depth`. The disks are opened in the order that
/// `reversed` says.
pub fn judge(
    story: &Story,
    state: &CrashState,
    clock: u64,
    depth: u32,
    reversed: bool,
) -> Result<(), String> {
    let vfs = state.to_vfs(state.hash);
    let mut order: Vec<usize> = (0..story.count).collect();
    if reversed {
        order.reverse();
    }
    let check_leaf = |number: usize, disk: &Disk| -> Result<(), String> {
        let content = read_all(disk)?;
        let history = &story.histories[number];
        history.check(clock, 0, &content, state.garbage).map_err(|what| format!("{}: {what}", DISKS[number]))
    };
    for &number in &order {
        let disk = options(&vfs).read_only(true).open(Path::new(DISKS[number]));
        check_leaf(number, &disk.map_err(|error| format!("read-only: {error}"))?)?;
    }
    // Nobody resumes on what is not finished, or on the wrong disk.
    if let Ok(found) = snapshot::state(&options(&vfs), Path::new(DISKS[0]), &name()) {
        check_state(&found, story)?;
    }

    vfs.record(true);
    let mut opened = Vec::new();
    for &number in &order {
        let disk =
            options(&vfs).open(Path::new(DISKS[number])).map_err(|error| format!("opening: {error}"))?;
        check_leaf(number, &disk)?;
        opened.push((number, disk));
    }
    let points = vfs.take_crash_points();
    vfs.record(false);

    let there = |path: &str| vfs.paths().contains(&PathBuf::from(path));
    let snapshots: Vec<bool> = SNAPSHOTS[..story.count].iter().map(|path| there(path)).collect();
    let all = there(MANIFEST);
    if snapshots.iter().any(|&there| there != all) {
        return Err(format!("half a checkpoint: manifest {all}, snapshots {snapshots:?}"));
    }
    if !all && story.done.is_some_and(|done| done <= clock) {
        return Err("the checkpoint is gone".into());
    }
    let stray = |path: &&PathBuf| {
        let name = path.to_string_lossy();
        let belongs = DISKS.contains(&&*name) || all && name.contains("@one");
        !belongs && !name.contains(".new-")
    };
    if let Some(stray) = vfs.paths().iter().find(stray) {
        return Err(format!("{} is left over", stray.display()));
    }
    for (_, disk) in &opened {
        disk.close().map_err(|error| format!("closing: {error}"))?;
    }
    drop(opened);
    if all {
        for (number, path) in SNAPSHOTS[..story.count].iter().enumerate() {
            let snapshot = options(&vfs).read_only(true).open(Path::new(path));
            let snapshot = snapshot.map_err(|error| format!("snapshot: {error}"))?;
            if read_all(&snapshot)? != story.saved[number] {
                return Err(format!("{path} holds something else than the VM saw"));
            }
        }
        let found = snapshot::state(&options(&vfs), Path::new(DISKS[0]), &name());
        check_state(&found.map_err(|error| format!("the state: {error}"))?, story)?;
        // Of whichever disk it is asked for.
        for path in &DISKS[..story.count] {
            let found = snapshot::state(&options(&vfs), Path::new(path), &name());
            found.map_err(|error| format!("the state of {path}: {error}"))?;
            resumes_if_untouched(&vfs, path)?;
        }
    }

    let mut rng = Rng::new(state.hash);
    for _ in 0..if depth > 0 && !points.is_empty() { 2 } else { 0 } {
        let point = &points[rng.below(points.len() as u64) as usize];
        if let Some(mut next) = point.pick(&mut rng) {
            next.garbage |= state.garbage;
            judge(story, &next, clock, depth - 1, rng.below(2) == 0)
                .map_err(|what| format!("recovery cut ({}): {what}", next.fates()))?;
        }
    }
    Ok(())
}

/// What is opened as the state is exactly what was saved.
fn check_state(found: &cowvhd::state::VmState, story: &Story) -> Result<(), String> {
    found.verify().map_err(|error| format!("the state: {error}"))?;
    if found.disks().len() != story.count || found.blobs().len() != BLOBS.len() {
        return Err(format!("another state: {found:?}"));
    }
    for (index, (name, length)) in BLOBS.into_iter().enumerate() {
        let mut bytes = vec![0; length];
        let part = found.blob(name).map_err(|error| error.to_string())?;
        part.read_at(&mut bytes, 0).map_err(|error| error.to_string())?;
        if part.length() != length as u64 || bytes != blob(index) {
            return Err(format!("{name} holds something else"));
        }
    }
    Ok(())
}

/// A disk that shows exactly what was saved can be resumed, and one that was written to since cannot.
fn resumes_if_untouched(vfs: &SimVfs, path: &str) -> Result<(), String> {
    let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
    let clone = PathBuf::from(format!("{path}.clone"));
    let sealed = path.replace(".vhd", "@one.vhd");
    CreateOptions::child_of(Path::new(&sealed))
        .vfs(Arc::clone(&shared))
        .create(&clone)
        .map_err(|error| format!("a clone: {error}"))?;
    snapshot::resumable(&options(vfs), &clone).map_err(|error| format!("resuming a clone: {error}"))?;
    let disk = options(vfs).open(&clone).map_err(|error| format!("a clone: {error}"))?;
    disk.write_at(&[1; 512], SIZE - 512).map_err(|error| error.to_string())?;
    disk.close().map_err(|error| error.to_string())?;
    drop(disk);
    match snapshot::resumable(&options(vfs), &clone) {
        Err(error) if error.kind() == ErrorKind::StateMismatch => Ok(()),
        other => Err(format!("a clone that was written to: {other:?}")),
    }
}
