//! The simulated file system: a volatile cache over a medium that keeps only what was synced.
//!
//! Every change goes into the cache at once and waits, as *pending*, for a sync: changes of a file for a sync of that file,
//! changes of names for a sync of their directory. At each sync and each durable write, just before it completes, the
//! state is a crash point: the medium so far plus any part of what is pending. A durable write makes its own bytes durable
//! and nothing else. A file whose names are not durable is gone after a power cut, however well its content was synced.

use super::crash::{CrashPoint, FileAtCrash, FileOnMedium};
use super::faults::{Fault, FaultPlan, Operation};
use super::file::{FileState, SimFile};
use super::names::{NameTable, Names};
use super::pages::Change;
use super::rng::Rng;
use crate::sync::scheduling_point;
use crate::vfs::{Access, File, FileIdentity, FileTime, Vfs};
use parking_lot::{Mutex, MutexGuard};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An operation that is under way when a hook is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Underway {
    /// A read, whose bytes are not taken yet.
    Read,
    /// A plain write, not in the cache yet.
    Write,
    /// A durable write, not complete.
    DurableWrite,
    /// A sync, not complete: what the hook writes is not covered by it.
    Sync,
    /// A sync of a directory, not complete: the names that the hook changes are not covered by it.
    DirectorySync,
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
    /// Ranges that were to share the space of another file's; each of them is a read and a write as well.
    pub shares: u64,
}

/// What the file system can do. The default is all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileSystem {
    /// It has no [`Vfs::exchange`].
    pub no_exchange: bool,
    /// It has no [`Vfs::create_nameless`].
    pub no_nameless_files: bool,
    /// It has no [`File::clone_whole`], and no [`File::share_from`].
    pub no_clones: bool,
    /// It has no [`File::punch_hole`].
    pub no_holes: bool,
    /// It has no [`File::copy_from`].
    pub no_copies: bool,
    /// Bytes that it says it has left; it does not keep to them.
    pub available_bytes: Option<u64>,
}

/// A simulated file system. Clones are the same one.
#[derive(Clone)]
pub struct SimVfs {
    state: Arc<Mutex<State>>,
    hook: Arc<Mutex<Option<Arc<Hook>>>>,
}

pub(super) struct State {
    names: NameTable,
    files: Vec<FileState>,
    clock: u64,
    rng: Rng,
    recording: bool,
    points: Vec<CrashPoint>,
    kind: FileSystem,
    pub(super) counts: Counts,
    pub(super) faults: FaultPlan,
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
            names: NameTable::default(),
            files: Vec::new(),
            clock: 0,
            rng: Rng::new(seed),
            recording: false,
            points: Vec::new(),
            kind: FileSystem::default(),
            counts: Counts::default(),
            faults: FaultPlan::default(),
        };
        SimVfs { state: Arc::new(Mutex::new(state)), hook: Arc::default() }
    }

    /// A file system whose medium and cache hold `files`, as after a power cut.
    pub(super) fn with_files(
        seed: u64,
        clock: u64,
        names: Names,
        files: impl IntoIterator<Item = FileOnMedium>,
    ) -> Self {
        let vfs = SimVfs::new(seed);
        {
            let mut state = vfs.state.lock();
            state.clock = clock;
            state.names = NameTable::durable(names);
            let durable = |file: FileOnMedium| FileState::durable(file.pages, file.modified, file.read_only);
            state.files = files.into_iter().map(durable).collect();
        }
        vfs
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Takes abilities away, or gives them back.
    pub fn set_kind(&self, kind: FileSystem) {
        self.state.lock().kind = kind;
    }

    pub(super) fn kind(&self) -> FileSystem {
        self.state.lock().kind
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

    /// The processes that have the file at `path` open are killed, as far as locks go: whoever plays one must not use its handles
    /// any more, and must not drop them either.
    pub fn break_locks(&self, path: &Path) {
        let mut state = self.state.lock();
        if let Some(id) = state.names.get(path)
            && let Ok(file) = state.file(id)
        {
            file.break_locks();
        }
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
        let file = state.files.get(state.names.get(path)?)?;
        let mut bytes = vec![0; file.cache.length() as usize];
        file.cache.read(&mut bytes, 0);
        Some(bytes)
    }

    /// All names.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.state.lock().names.paths().cloned().collect()
    }

    /// A hash of a file's content as reads see it.
    pub fn content_hash(&self, path: &Path) -> Option<u64> {
        let state = self.state.lock();
        Some(state.files.get(state.names.get(path)?)?.cache.hash())
    }

    /// The same as if zeros stood in a range of bytes of whole 4 KiB pages.
    pub fn content_hash_without(&self, path: &Path, range: Range<u64>) -> Option<u64> {
        let state = self.state.lock();
        Some(state.files.get(state.names.get(path)?)?.cache.hash_without(range))
    }

    /// Changes bytes of a file on the medium and in the cache, and nothing else: bit rot.
    pub fn corrupt(&self, path: &Path, offset: u64, bytes: &[u8]) {
        self.replace(path, offset, bytes, false);
    }

    /// Reads that touch these bytes of a file fail from now on, and no others: sectors that the medium does not give back.
    pub fn set_unreadable(&self, path: &Path, ranges: &[Range<u64>]) {
        let mut state = self.state.lock();
        let Some(id) = state.names.get(path) else { return };
        if let Some(file) = state.files.get_mut(id) {
            file.unreadable = ranges.to_vec();
        }
    }

    /// Changes bytes of a file, as another program does that writes them and syncs: the file's time tells of it.
    pub fn foreign_write(&self, path: &Path, offset: u64, bytes: &[u8]) {
        self.replace(path, offset, bytes, true);
    }

    fn replace(&self, path: &Path, offset: u64, bytes: &[u8], told: bool) {
        let mut state = self.state.lock();
        let Some(id) = state.names.get(path) else { return };
        state.clock += u64::from(told);
        let now = state.now();
        if let Some(file) = state.files.get_mut(id) {
            let change = Change::Write { offset, bytes: bytes.into() };
            file.cache.apply(&change);
            file.medium.apply(&change);
            if told {
                file.modified = now;
            }
        }
    }

    /// In the middle of an operation: other threads may run, and so may the hook.
    pub(super) fn run_hook(&self, underway: Underway) {
        scheduling_point();
        let hook = self.hook.lock().clone();
        if let Some(hook) = hook {
            hook(underway);
        }
    }
}

impl State {
    /// The state of all files that may have a name; `in_flight` is a durable write that has not completed.
    fn crash_point(&self, in_flight: Option<(usize, &Change)>) -> CrashPoint {
        let reachable = self.names.reachable().into_iter();
        let files = reachable.filter_map(|id| {
            let file = self.files.get(id)?;
            let mut pending: Vec<Change> = file.pending().cloned().collect();
            pending.extend(in_flight.filter(|(of, _)| *of == id).map(|(_, change)| change.clone()));
            let medium = file.medium.clone();
            Some((id, FileAtCrash { medium, pending, modified: file.modified, read_only: file.read_only }))
        });
        CrashPoint {
            clock: self.clock,
            files: files.collect(),
            names: self.names.medium().clone(),
            renamed: self.names.pending().cloned().collect(),
        }
    }

    pub(super) fn keep_crash_point(&mut self, in_flight: Option<(usize, &Change)>) {
        if self.recording {
            let point = self.crash_point(in_flight);
            self.points.push(point);
        }
    }

    pub(super) fn file(&mut self, id: usize) -> io::Result<&mut FileState> {
        self.files.get_mut(id).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    pub(super) fn now(&self) -> FileTime {
        FileTime { seconds: 1_700_000_000 + self.clock as i64, nanoseconds: 0 }
    }

    fn id(&self, path: &Path) -> io::Result<usize> {
        self.names.get(path).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn is_free(&self, path: &Path) -> io::Result<()> {
        match self.names.get(path) {
            None => Ok(()),
            Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
        }
    }
}

impl SimVfs {
    /// An operation on names, if the fault plan lets it happen.
    fn on_names(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state.lock();
        match state.faults.next(Operation::Names) {
            Some(Fault::Error(error)) => Err(io::Error::from_raw_os_error(error)),
            // There is nothing to transfer.
            Some(Fault::Short) | None => Ok(state),
        }
    }
}

impl SimVfs {
    /// Gives a file of which there is a handle a name.
    pub(super) fn link_file(&self, id: usize, to: &Path) -> io::Result<()> {
        let mut state = self.on_names()?;
        state.is_free(to)?;
        state.names.change(&[(to, Some(id))]);
        Ok(())
    }
}

impl Vfs for SimVfs {
    /// Everybody is the files' owner, and bound by their permissions.
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        let id = {
            let mut state = self.state.lock();
            let id = state.id(path)?;
            if access == Access::ReadWrite && state.file(id)?.read_only {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            id
        };
        Ok(Arc::new(SimFile::new(self.clone(), id, access)))
    }

    fn open_beneath(&self, folder: &Path, path: &Path) -> io::Result<Arc<dyn File>> {
        self.open(&folder.join(path), Access::ReadOnly)
    }

    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let mut state = self.on_names()?;
        state.is_free(path)?;
        let id = state.files.len();
        state.files.push(FileState::default());
        state.names.change(&[(path, Some(id))]);
        drop(state);
        Ok(Arc::new(SimFile::new(self.clone(), id, Access::ReadWrite)))
    }

    fn create_nameless(&self, _folder: &Path) -> io::Result<Arc<dyn File>> {
        let mut state = self.on_names()?;
        if state.kind.no_nameless_files {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let id = state.files.len();
        state.files.push(FileState::default());
        drop(state);
        Ok(Arc::new(SimFile::new(self.clone(), id, Access::ReadWrite)))
    }

    /// There are no links here, and the root is the working directory.
    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        self.state.lock().id(path)?;
        Ok(Path::new("/").join(path))
    }

    fn identity(&self, path: &Path) -> io::Result<FileIdentity> {
        Ok(FileIdentity { device: 0, inode: self.state.lock().id(path)? as u64 })
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let id = self.state.lock().id(from)?;
        self.link_file(id, to)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.on_names()?;
        let id = state.id(from)?;
        // Two names of one file: both stay, says POSIX.
        if state.names.get(to) != Some(id) {
            state.names.change(&[(from, None), (to, Some(id))]);
        }
        Ok(())
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        let mut state = self.on_names()?;
        if state.kind.no_exchange {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let (id, other_id) = (state.id(one)?, state.id(other)?);
        state.names.change(&[(one, Some(other_id)), (other, Some(id))]);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.on_names()?;
        state.id(path)?;
        state.names.change(&[(path, None)]);
        Ok(())
    }

    fn files(&self, directory: &Path, prefix: &OsStr) -> io::Result<Vec<OsString>> {
        let state = self.state.lock();
        let inside = state.names.paths().filter(|path| path.parent() == Some(directory));
        let names = inside.filter_map(|path| path.file_name());
        let wanted = names.filter(|name| name.as_bytes().starts_with(prefix.as_bytes()));
        Ok(wanted.map(OsStr::to_os_string).collect())
    }

    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        let last = {
            let mut state = self.state.lock();
            state.keep_crash_point(None);
            state.names.last_number()
        };
        self.run_hook(Underway::DirectorySync);
        let mut state = self.state.lock();
        let fault = state.faults.next(Operation::SyncDirectory);
        state.names.complete(directory, last, fault.is_none());
        match fault {
            Some(Fault::Error(error)) => Err(io::Error::from_raw_os_error(error)),
            Some(Fault::Short) | None => Ok(()),
        }
    }

    fn random_id(&self) -> io::Result<[u8; 16]> {
        let rng = &mut self.state.lock().rng;
        let (high, low) = (rng.next_u64(), rng.next_u64());
        Ok((u128::from(high) << 64 | u128::from(low)).to_be_bytes())
    }

    fn now(&self) -> FileTime {
        self.state.lock().now()
    }
}
