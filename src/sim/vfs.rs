//! The simulated file system: a volatile cache over a medium that keeps only what was synced.
//!
//! Every change goes into the cache at once and waits, as *pending*, for a sync of its file. At each sync and each durable
//! write, just before it completes, the state is a crash point: the medium so far plus any part of what is pending.
//! A durable write makes its own bytes durable and nothing else.

use super::crash::{CrashPoint, FileAtCrash};
use super::faults::{Fault, FaultPlan, Operation};
use super::pages::{Change, Pages};
use super::rng::Rng;
use crate::vfs::{Access, File, FileTime, LockMode, Vfs};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An operation that is under way when a hook is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Underway {
    /// A plain write, not in the cache yet.
    Write,
    /// A durable write, not complete.
    DurableWrite,
    /// A sync, not complete: what the hook writes is not covered by it.
    Sync,
}

/// Called in the middle of an operation.
pub type Hook = Box<dyn Fn(Underway) + Send + Sync>;

/// Counts of what was asked of the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Plain writes.
    pub writes: u64,
    /// Writes that were durable on return.
    pub durable_writes: u64,
    /// Data syncs.
    pub syncs: u64,
    /// Reads.
    pub reads: u64,
    /// Punched ranges.
    pub punches: u64,
    /// Changes of a file's length.
    pub set_lengths: u64,
}

/// A simulated file system. Clones are the same one.
#[derive(Clone)]
pub struct SimVfs {
    state: Arc<Mutex<State>>,
    hook: Arc<Mutex<Option<Arc<Hook>>>>,
}

struct State {
    names: BTreeMap<PathBuf, usize>,
    files: Vec<FileState>,
    clock: u64,
    rng: Rng,
    recording: bool,
    points: Vec<CrashPoint>,
    counts: Counts,
    faults: FaultPlan,
}

#[derive(Debug, Default)]
struct FileState {
    /// What reads see.
    cache: Pages,
    /// What a power cut leaves.
    medium: Pages,
    pending: Vec<Change>,
    shared_locks: u32,
    exclusive_lock: bool,
    modified: FileTime,
}

impl fmt::Debug for SimVfs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimVfs")
    }
}

impl SimVfs {
    /// An empty file system. `seed` determines its random ids.
    pub fn new(seed: u64) -> Self {
        let state = State {
            names: BTreeMap::new(),
            files: Vec::new(),
            clock: 0,
            rng: Rng::new(seed),
            recording: false,
            points: Vec::new(),
            counts: Counts::default(),
            faults: FaultPlan::default(),
        };
        SimVfs { state: Arc::new(Mutex::new(state)), hook: Arc::default() }
    }

    /// A file system whose medium and cache hold `files`, as after a power cut.
    pub(super) fn with_files(seed: u64, files: impl IntoIterator<Item = (PathBuf, Pages)>) -> Self {
        let vfs = SimVfs::new(seed);
        {
            let mut state = vfs.state.lock();
            for (path, pages) in files {
                let id = state.files.len();
                state.files.push(FileState { cache: pages.clone(), medium: pages, ..FileState::default() });
                state.names.insert(path, id);
            }
        }
        vfs
    }

    /// Starts or stops keeping crash points.
    pub fn record(&self, recording: bool) {
        self.state.lock().recording = recording;
    }

    /// Takes the crash points kept so far.
    pub fn take_crash_points(&self) -> Vec<CrashPoint> {
        std::mem::take(&mut self.state.lock().points)
    }

    /// The crash point of this very moment, which no sync has reached yet.
    pub fn crash_now(&self) -> CrashPoint {
        self.state.lock().crash_point(None)
    }

    /// Steps and returns the clock; crash points carry its value, so that they can be placed among a driver's own events.
    pub fn tick(&self) -> u64 {
        let mut state = self.state.lock();
        state.clock += 1;
        state.clock
    }

    /// What was asked for so far.
    pub fn counts(&self) -> Counts {
        self.state.lock().counts
    }

    /// Calls `hook` in the middle of every write and sync, without holding a lock of the file system.
    pub fn set_hook(&self, hook: Option<Hook>) {
        *self.hook.lock() = hook.map(Arc::new);
    }

    /// Plans faults for the operations to come.
    pub fn set_faults(&self, faults: FaultPlan) {
        self.state.lock().faults = faults;
    }

    /// How many faults were injected since the plan was set.
    pub fn injected_faults(&self) -> u64 {
        self.state.lock().faults.injected()
    }

    /// How many operations the fault plan has seen.
    pub fn fallible_operations(&self) -> u64 {
        self.state.lock().faults.seen()
    }

    /// The content of a file as reads see it.
    pub fn content(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.state.lock();
        let file = state.files.get(*state.names.get(path)?)?;
        let mut bytes = vec![0; file.cache.length() as usize];
        file.cache.read(&mut bytes, 0);
        Some(bytes)
    }

    /// A hash of a file's content as reads see it.
    pub fn content_hash(&self, path: &Path) -> Option<u64> {
        let state = self.state.lock();
        Some(state.files.get(*state.names.get(path)?)?.cache.hash())
    }

    /// Changes bytes of a file behind everybody's back, on the medium and in the cache: bit rot, or another program.
    pub fn corrupt(&self, path: &Path, offset: u64, bytes: &[u8]) {
        let mut state = self.state.lock();
        let Some(&id) = state.names.get(path) else { return };
        if let Some(file) = state.files.get_mut(id) {
            let change = Change::Write { offset, bytes: bytes.into() };
            file.cache.apply(&change);
            file.medium.apply(&change);
        }
    }

    fn run_hook(&self, underway: Underway) {
        let hook = self.hook.lock().clone();
        if let Some(hook) = hook {
            hook(underway);
        }
    }
}

impl State {
    /// The state of all files; `in_flight` is a durable write that has not completed.
    fn crash_point(&self, in_flight: Option<(usize, &Change)>) -> CrashPoint {
        let files = self.names.iter().filter_map(|(path, &id)| {
            let file = self.files.get(id)?;
            let mut pending = file.pending.clone();
            pending.extend(in_flight.filter(|(of, _)| *of == id).map(|(_, change)| change.clone()));
            Some(FileAtCrash { path: path.clone(), medium: file.medium.clone(), pending })
        });
        CrashPoint { clock: self.clock, files: files.collect() }
    }

    fn keep_crash_point(&mut self, in_flight: Option<(usize, &Change)>) {
        if self.recording {
            let point = self.crash_point(in_flight);
            self.points.push(point);
        }
    }

    fn file(&mut self, id: usize) -> io::Result<&mut FileState> {
        self.files.get_mut(id).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn create(&mut self, path: &Path) -> io::Result<usize> {
        if self.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let id = self.files.len();
        self.files.push(FileState::default());
        self.names.insert(path.to_path_buf(), id);
        Ok(id)
    }
}

impl FileState {
    fn change(&mut self, change: Change) {
        self.cache.apply(&change);
        self.pending.push(change);
    }

    /// Extends the file, as a change of its own, so that a write up to `end` fits.
    fn reach(&mut self, end: u64) {
        if end > self.cache.length() {
            self.change(Change::SetLength(end));
        }
    }

    /// The first `count` pending changes are on the medium now.
    fn complete(&mut self, count: usize) {
        for change in self.pending.drain(..count.min(self.pending.len())) {
            self.medium.apply(&change);
        }
    }

    /// A durable write is on the medium: what is pending below it can no longer come to light there.
    fn complete_durable(&mut self, offset: u64, bytes: &Arc<[u8]>) {
        let end = offset + bytes.len() as u64;
        let pending = std::mem::take(&mut self.pending);
        for change in pending {
            match change {
                Change::SetLength(length) if length >= end && self.medium.length() < end => {
                    self.medium.apply(&Change::SetLength(length));
                }
                Change::SetLength(_) => self.pending.push(change),
                Change::Write { offset: at, bytes: old } => {
                    for (from, to) in outside(at, at + old.len() as u64, offset, end) {
                        let kept = old.get((from - at) as usize..(to - at) as usize).unwrap_or_default();
                        self.pending.push(Change::Write { offset: from, bytes: kept.into() });
                    }
                }
                Change::Punch { offset: at, length } => {
                    for (from, to) in outside(at, at + length, offset, end) {
                        self.pending.push(Change::Punch { offset: from, length: to - from });
                    }
                }
            }
        }
        self.medium.apply(&Change::Write { offset, bytes: Arc::clone(bytes) });
    }
}

/// The parts of `from..to` that lie outside `hole_from..hole_to`.
fn outside(from: u64, to: u64, hole_from: u64, hole_to: u64) -> impl Iterator<Item = (u64, u64)> {
    [(from, to.min(hole_from)), (from.max(hole_to), to)].into_iter().filter(|(from, to)| from < to)
}

impl Vfs for SimVfs {
    fn open(&self, path: &Path, _access: Access) -> io::Result<Arc<dyn File>> {
        let state = self.state.lock();
        let id = state.names.get(path).copied().ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(SimFile { vfs: self.clone(), id, lock: Mutex::new(None) }))
    }

    fn open_beneath(&self, folder: &Path, path: &Path) -> io::Result<Arc<dyn File>> {
        self.open(&folder.join(path), Access::ReadOnly)
    }

    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let id = self.state.lock().create(path)?;
        Ok(Arc::new(SimFile { vfs: self.clone(), id, lock: Mutex::new(None) }))
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state.lock();
        let id = state.names.get(from).copied().ok_or(io::ErrorKind::NotFound)?;
        if state.names.contains_key(to) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        state.names.insert(to.to_path_buf(), id);
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state.lock();
        let id = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.to_path_buf(), id);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.state.lock().names.remove(path).map(|_| ()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn sync_dir(&self, _directory: &Path) -> io::Result<()> {
        Ok(())
    }

    fn random_id(&self) -> io::Result<[u8; 16]> {
        let rng = &mut self.state.lock().rng;
        let (high, low) = (rng.next_u64(), rng.next_u64());
        Ok((u128::from(high) << 64 | u128::from(low)).to_be_bytes())
    }

    fn now(&self) -> FileTime {
        FileTime { seconds: 1_700_000_000 + self.state.lock().clock as i64, nanoseconds: 0 }
    }
}

#[derive(Debug)]
struct SimFile {
    vfs: SimVfs,
    id: usize,
    lock: Mutex<Option<LockMode>>,
}

impl SimFile {
    fn with<T>(&self, f: impl FnOnce(&mut FileState) -> T) -> io::Result<T> {
        self.vfs.state.lock().file(self.id).map(f)
    }

    /// Asks the fault plan; a short transfer is given as the number of bytes that still go through.
    fn fault(&self, length: usize, operation: Operation) -> io::Result<usize> {
        match self.vfs.state.lock().faults.next(operation) {
            None => Ok(length),
            Some(Fault::Error(error)) => Err(io::Error::from_raw_os_error(error)),
            Some(Fault::Short) => Ok((length / 2).next_multiple_of(512).min(length)),
        }
    }
}

impl File for SimFile {
    fn length(&self) -> io::Result<u64> {
        self.with(|file| file.cache.length())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.vfs.state.lock().counts.reads += 1;
        let count = self.fault(buf.len(), Operation::Read)?;
        self.with(|file| file.cache.read(buf.get_mut(..count).unwrap_or_default(), offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.vfs.state.lock().counts.writes += 1;
        self.vfs.run_hook(Underway::Write);
        let result = self.fault(buf.len(), Operation::Write);
        // A failed write may have written any part.
        let count = *result.as_ref().unwrap_or(&(buf.len() / 1024 * 512));
        let bytes = buf.get(..count).unwrap_or_default();
        self.with(|file| {
            file.reach(offset + bytes.len() as u64);
            file.change(Change::Write { offset, bytes: bytes.into() });
        })?;
        result
    }

    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.vfs.state.lock().counts.durable_writes += 1;
        let count = self.fault(buf.len(), Operation::DurableWrite);
        let bytes: Arc<[u8]> = buf.into();
        let change = Change::Write { offset, bytes: Arc::clone(&bytes) };
        {
            let mut state = self.vfs.state.lock();
            let file = state.file(self.id)?;
            file.reach(offset + bytes.len() as u64);
            if !matches!(count, Ok(count) if count == buf.len()) {
                // A failed durable write may have left any part of it.
                file.change(change);
                return Err(count.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into()));
            }
            file.cache.apply(&change);
            state.keep_crash_point(Some((self.id, &change)));
        }
        self.vfs.run_hook(Underway::DurableWrite);
        self.with(|file| file.complete_durable(offset, &bytes))
    }

    fn sync_data(&self) -> io::Result<()> {
        let count = {
            let mut state = self.vfs.state.lock();
            state.counts.syncs += 1;
            let count = state.file(self.id)?.pending.len();
            state.keep_crash_point(None);
            count
        };
        self.vfs.run_hook(Underway::Sync);
        let fault = self.fault(0, Operation::Sync);
        self.with(|file| match fault {
            Ok(_) => file.complete(count),
            // The kernel forgets what it could not write; the next sync will not mention it (F7).
            Err(_) => drop(file.pending.drain(..count)),
        })?;
        fault.map(|_| ())
    }

    fn forget_cached(&self, _length: u64) -> io::Result<()> {
        self.with(|file| {
            file.cache = file.medium.clone();
            file.pending.iter().for_each(|change| file.cache.apply(change));
        })
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.vfs.state.lock().counts.set_lengths += 1;
        self.fault(0, Operation::SetLength)?;
        self.with(|file| file.change(Change::SetLength(length)))
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.vfs.state.lock().counts.punches += 1;
        self.fault(0, Operation::Punch)?;
        self.with(|file| file.change(Change::Punch { offset, length }))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.with(|file| file.cache.next_data(offset))
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.with(|file| file.cache.allocated_bytes())
    }

    fn modified(&self) -> io::Result<FileTime> {
        self.with(|file| file.modified)
    }

    fn set_modified(&self, time: FileTime) -> io::Result<()> {
        self.with(|file| file.modified = time)
    }

    fn lock(&self, mode: LockMode) -> io::Result<()> {
        self.with(|file| {
            let free = match mode {
                LockMode::Shared => !file.exclusive_lock,
                LockMode::Exclusive => !file.exclusive_lock && file.shared_locks == 0,
            };
            if !free {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            match mode {
                LockMode::Shared => file.shared_locks += 1,
                LockMode::Exclusive => file.exclusive_lock = true,
            }
            *self.lock.lock() = Some(mode);
            Ok(())
        })?
    }

    fn unlock(&self) -> io::Result<()> {
        self.with(|file| match self.lock.lock().take() {
            Some(LockMode::Shared) => file.shared_locks -= 1,
            Some(LockMode::Exclusive) => file.exclusive_lock = false,
            None => {}
        })
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let _ = self.unlock();
    }
}
