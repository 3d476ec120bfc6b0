//! How many descriptors parents may take, and parents that are opened again when they are needed.
//!
//! A process may have 1024 files open, and a chain a thousand layers. So parents keep their files open as long as all of them
//! together, of all disks of the process, take less than half of what the process may have. The files of later ones go to a pool
//! that keeps some open, those that were used last, and opens the others again.
//!
//! Whatever is opened again must be what was there before: the same file (device and inode), closed, the disk with the same id, and
//! with the same seal; without a seal it must not have been changed since (modification time), which in a sealed one the registry
//! of its children may be. Anything else is an error and never read. A closed descriptor holds no image lock.
//! So nobody is kept from writing to a parent while it is closed. Who does is noticed when it is opened again: as a holder who
//! excludes us, or by what he left.

use super::parent::ParentImage;
use crate::error::Result;
use crate::ext::SealId;
use crate::sync::{Arc, AtomicBool, Mutex, OnceLock, Ordering, process_wide};
use crate::vfs::{Access, File, FileIdentity, FileTime, LockMode, Vfs};
use crate::vhd::UniqueId;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Weak;

/// What a process may have open, if the system does not say.
const USUAL_LIMIT: usize = 1024;

/// The files of parents that are kept open as long as the parent is.
static KEPT: process_wide::AtomicUsize = process_wide::AtomicUsize::new(0);

fn limit() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit.map_or(USUAL_LIMIT, |limit| usize::try_from(limit).unwrap_or(usize::MAX))
}

fn pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| Pool { open: process_wide::Mutex::default() })
}

/// The right to keep a file open; given back when dropped.
#[derive(Debug)]
pub(super) struct Permit(());

impl Permit {
    /// Takes one, if there is one left.
    pub(super) fn take() -> Option<Self> {
        let most = (limit() / 2).saturating_sub(Pool::capacity());
        let taken =
            KEPT.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |kept| (kept < most).then_some(kept + 1));
        taken.is_ok().then(|| Permit(()))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        KEPT.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The files that are open now among those that need not be.
#[derive(Debug)]
struct Pool {
    open: process_wide::Mutex<VecDeque<Weak<Slot>>>,
}

impl Pool {
    /// So many may be open: an eighth of what the process may have.
    fn capacity() -> usize {
        (limit() / 8).max(1)
    }

    /// Takes in a file that was just opened, and closes others for it, if there are too many.
    fn admit(&self, slot: &Arc<Slot>) {
        let mut closed = Vec::new();
        let mut open = self.open.lock();
        open.push_back(Arc::downgrade(slot));
        let mut looks = 2 * open.len();
        while open.len() > Self::capacity() && looks > 0 {
            looks -= 1;
            let Some(Some(oldest)) = open.pop_front().map(|slot| slot.upgrade()) else { continue };
            // Another round for what was used since the last one, or is being opened or handed out right now.
            let stays = oldest.used.swap(false, Ordering::Relaxed);
            match oldest.file.try_lock().filter(|_| !stays) {
                Some(mut file) => closed.push(file.take()),
                None => open.push_back(Arc::downgrade(&oldest)),
            }
        }
        drop(open);
        drop(closed);
    }
}

/// A file that may be closed while nobody reads it.
#[derive(Debug)]
struct Slot {
    file: Mutex<Option<Arc<dyn File>>>,
    /// Since the pool looked at it last.
    used: AtomicBool,
}

/// The file of a parent, opened again when it is needed.
#[derive(Debug)]
pub(super) struct PooledFile {
    vfs: Arc<dyn Vfs>,
    path: PathBuf,
    identity: FileIdentity,
    modified: FileTime,
    unique_id: UniqueId,
    seal_id: SealId,
    slot: Arc<Slot>,
}

impl PooledFile {
    /// Takes over the open file of a parent.
    pub(super) fn new(vfs: &Arc<dyn Vfs>, parent: &ParentImage, file: Arc<dyn File>) -> io::Result<Self> {
        let (identity, modified) = (file.identity()?, file.modified()?);
        let slot = Arc::new(Slot { file: Mutex::new(Some(file)), used: AtomicBool::new(false) });
        pool().admit(&slot);
        // The working directory may be another one by then.
        let (path, unique_id) = (std::path::absolute(parent.path())?, parent.unique_id());
        let seal_id = parent.seal_id();
        Ok(PooledFile { vfs: Arc::clone(vfs), path, identity, modified, unique_id, seal_id, slot })
    }

    /// The file, open.
    pub(super) fn open(&self) -> io::Result<Arc<dyn File>> {
        let mut slot = self.slot.file.lock();
        self.slot.used.store(true, Ordering::Relaxed);
        if let Some(file) = &*slot {
            return Ok(Arc::clone(file));
        }
        let file = self.open_again()?;
        *slot = Some(Arc::clone(&file));
        drop(slot);
        pool().admit(&self.slot);
        Ok(file)
    }

    fn open_again(&self) -> io::Result<Arc<dyn File>> {
        let file = self.vfs.open(&self.path, Access::ReadOnly)?;
        let changed = |what: &str| {
            let what = format!(
                "{what} since the disk was opened: the parents of an open disk must stay what they are"
            );
            Err(io::Error::new(io::ErrorKind::InvalidData, what))
        };
        if file.identity()? != self.identity {
            return changed("another file has taken its place");
        }
        let parent = ParentImage::open(Arc::clone(&file), &self.path).map_err(io::Error::other)?;
        if parent.unique_id() != self.unique_id {
            return changed("it has become another disk");
        }
        if parent.seal_id() != self.seal_id {
            return changed("it lost its seal or got another one");
        }
        if !self.seal_id.is_some() && file.modified()? != self.modified {
            return changed("it was written to");
        }
        Ok(file)
    }
}

/// A parent is only read, and its lock is a matter of whoever opens it.
fn not_for_parents<T>() -> io::Result<T> {
    Err(io::ErrorKind::Unsupported.into())
}

impl File for PooledFile {
    fn length(&self) -> io::Result<u64> {
        self.open()?.length()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.open()?.read_at(buf, offset)
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> io::Result<usize> {
        not_for_parents()
    }

    fn write_durable_at(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        not_for_parents()
    }

    fn sync_data(&self) -> io::Result<()> {
        not_for_parents()
    }

    fn forget_cached(&self, length: u64) -> io::Result<()> {
        self.open()?.forget_cached(length)
    }

    fn set_len(&self, _length: u64) -> io::Result<()> {
        not_for_parents()
    }

    fn punch_hole(&self, _offset: u64, _length: u64) -> io::Result<()> {
        not_for_parents()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.open()?.next_data(offset)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.open()?.allocated_bytes()
    }

    fn modified(&self) -> io::Result<FileTime> {
        self.open()?.modified()
    }

    fn set_modified(&self, _time: FileTime) -> io::Result<()> {
        not_for_parents()
    }

    fn lock(&self, _mode: LockMode) -> io::Result<()> {
        not_for_parents()
    }

    fn unlock(&self) -> io::Result<()> {
        not_for_parents()
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        Ok(self.identity)
    }

    fn is_read_only(&self) -> io::Result<bool> {
        self.open()?.is_read_only()
    }
}

/// Lets the file of a parent be closed when too many are open.
pub(crate) fn bound(vfs: &Arc<dyn Vfs>, parent: ParentImage) -> Result<ParentImage> {
    match Permit::take() {
        Some(permit) => Ok(parent.kept_open(permit)),
        None => parent.in_pool(vfs),
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests;
