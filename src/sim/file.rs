//! A file of the simulated file system: its cache, its medium, and what waits between them.

use super::faults::{Fault, Operation};
use super::pages::{Change, PAGE, Pages};
use super::vfs::{SimVfs, Underway};
use crate::sync::scheduling_point;
use crate::vfs::{Access, File, FileExt, FileIdentity, FileTime, LockMode};
use parking_lot::Mutex;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

#[derive(Debug, Default)]
pub(super) struct FileState {
    /// What reads see.
    pub(super) cache: Pages,
    /// What a power cut leaves.
    pub(super) medium: Pages,
    /// In the order of their numbers.
    pending: Vec<Pending>,
    last_number: u64,
    shared_locks: u32,
    exclusive_lock: bool,
    registry_lock: bool,
    pub(super) read_only: bool,
    pub(super) modified: FileTime,
    /// What the medium does not give back.
    pub(super) unreadable: Vec<Range<u64>>,
}

#[derive(Debug, Clone)]
struct Pending {
    number: u64,
    change: Change,
}

impl FileState {
    /// A file that is on the medium.
    pub(super) fn durable(pages: Pages, modified: FileTime, read_only: bool) -> Self {
        FileState { cache: pages.clone(), medium: pages, modified, read_only, ..FileState::default() }
    }

    pub(super) fn pending(&self) -> impl Iterator<Item = &Change> {
        self.pending.iter().map(|pending| &pending.change)
    }

    /// Nobody holds a lock any more.
    pub(super) fn break_locks(&mut self) {
        (self.shared_locks, self.exclusive_lock, self.registry_lock) = (0, false, false);
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        const EIO: i32 = 5;
        let end = offset.saturating_add(buf.len() as u64);
        match self.unreadable.iter().any(|bad| bad.start < end && offset < bad.end) {
            true => Err(io::Error::from_raw_os_error(EIO)),
            false => Ok(self.cache.read(buf, offset)),
        }
    }

    /// Puts a change into the cache and gives it a number.
    fn change(&mut self, change: Change) {
        self.cache.apply(&change);
        self.last_number += 1;
        self.pending.push(Pending { number: self.last_number, change });
    }

    /// Extends the file, as a change of its own, so that a write up to `end` fits.
    fn reach(&mut self, end: u64) {
        if end > self.cache.length() {
            self.change(Change::SetLength(end));
        }
    }

    /// What is pending up to change `last` is on the medium now, or, where the sync failed, never will be.
    fn complete(&mut self, last: u64, kept: bool) {
        let count = self.pending.partition_point(|pending| pending.number <= last);
        for pending in self.pending.drain(..count) {
            if kept {
                self.medium.apply(&pending.change);
            }
        }
    }

    /// A durable write, begun after change `last`, is on the medium: what was pending below it can no longer come to light
    /// there.
    fn complete_durable(&mut self, last: u64, offset: u64, bytes: &Arc<[u8]>) {
        let end = offset + bytes.len() as u64;
        for Pending { number, change } in std::mem::take(&mut self.pending) {
            let mut keep = |change| self.pending.push(Pending { number, change });
            match change {
                Change::SetLength(length) if length >= end && self.medium.length() < end => {
                    self.medium.apply(&Change::SetLength(length));
                }
                Change::Write { offset: at, bytes: old } if number <= last => {
                    for (from, to) in outside(at, at + old.len() as u64, offset, end) {
                        let kept = old.get((from - at) as usize..(to - at) as usize).unwrap_or_default();
                        keep(Change::Write { offset: from, bytes: kept.into() });
                    }
                }
                Change::Punch { offset: at, length } if number <= last => {
                    for (from, to) in outside(at, at + length, offset, end) {
                        keep(Change::Punch { offset: from, length: to - from });
                    }
                }
                later => keep(later),
            }
        }
        self.medium.apply(&Change::Write { offset, bytes: Arc::clone(bytes) });
    }
}

/// The parts of `from..to` that lie outside `hole_from..hole_to`.
fn outside(from: u64, to: u64, hole_from: u64, hole_to: u64) -> impl Iterator<Item = (u64, u64)> {
    [(from, to.min(hole_from)), (from.max(hole_to), to)].into_iter().filter(|(from, to)| from < to)
}

/// A handle of a file.
#[derive(Debug)]
pub(super) struct SimFile {
    vfs: SimVfs,
    id: usize,
    access: Access,
    lock: Mutex<Option<LockMode>>,
    has_registry: Mutex<bool>,
}

impl SimFile {
    pub(super) fn new(vfs: SimVfs, id: usize, access: Access) -> Self {
        SimFile { vfs, id, access, lock: Mutex::new(None), has_registry: Mutex::new(false) }
    }

    fn with<T>(&self, f: impl FnOnce(&mut FileState) -> T) -> io::Result<T> {
        self.vfs.state().file(self.id).map(f)
    }

    /// Changes the file, through a handle that was opened for it.
    fn change<T>(&self, f: impl FnOnce(&mut FileState) -> T) -> io::Result<T> {
        const EBADF: i32 = 9;
        if self.access == Access::ReadOnly {
            return Err(io::Error::from_raw_os_error(EBADF));
        }
        let mut state = self.vfs.state();
        let now = state.now();
        let file = state.file(self.id)?;
        file.modified = now;
        Ok(f(file))
    }

    /// Other threads may see a write when half of it is done, and that half ends inside a sector.
    fn half_write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let half = bytes.get(..(bytes.len() / 2).saturating_sub(248)).unwrap_or_default();
        self.change(|file| {
            file.reach(offset + bytes.len() as u64);
            file.cache.apply(&Change::Write { offset, bytes: half.into() });
        })?;
        scheduling_point();
        Ok(())
    }

    /// Asks the fault plan; a short transfer is given as the number of bytes that still go through.
    fn fault(&self, length: usize, operation: Operation) -> io::Result<usize> {
        match self.vfs.state().faults.next(operation) {
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
        self.vfs.state().counts.reads += 1;
        self.vfs.run_hook(Underway::Read);
        let count = self.fault(buf.len(), Operation::Read)?;
        self.with(|file| file.read(buf.get_mut(..count).unwrap_or_default(), offset))?
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.vfs.state().counts.writes += 1;
        self.vfs.run_hook(Underway::Write);
        let result = self.fault(buf.len(), Operation::Write);
        // A failed write may have written any part.
        let count = *result.as_ref().unwrap_or(&(buf.len() / 1024 * 512));
        let bytes = buf.get(..count).unwrap_or_default();
        if cfg!(feature = "schedules") {
            self.half_write(bytes, offset)?;
        }
        self.change(|file| {
            file.reach(offset + bytes.len() as u64);
            file.change(Change::Write { offset, bytes: bytes.into() });
        })?;
        result
    }

    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.vfs.state().counts.durable_writes += 1;
        let count = self.fault(buf.len(), Operation::DurableWrite);
        let bytes: Arc<[u8]> = buf.into();
        let change = Change::Write { offset, bytes: Arc::clone(&bytes) };
        let last = self.change(|file| {
            file.reach(offset + bytes.len() as u64);
            if !matches!(count, Ok(count) if count == buf.len()) {
                // A failed durable write may have left any part of it.
                file.change(change.clone());
                return Err(count.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into()));
            }
            file.cache.apply(&change);
            Ok(file.last_number)
        })??;
        self.vfs.state().keep_crash_point(Some((self.id, &change)));
        self.vfs.run_hook(Underway::DurableWrite);
        self.with(|file| file.complete_durable(last, offset, &bytes))
    }

    fn sync_data(&self) -> io::Result<()> {
        let last = {
            let mut state = self.vfs.state();
            state.counts.syncs += 1;
            let last = state.file(self.id)?.last_number;
            state.keep_crash_point(None);
            last
        };
        self.vfs.run_hook(Underway::Sync);
        let fault = self.fault(0, Operation::Sync);
        // The kernel forgets what it could not write; the next sync will not mention it (F7).
        self.with(|file| file.complete(last, fault.is_ok()))?;
        fault.map(|_| ())
    }

    fn forget_cached(&self, _length: u64) -> io::Result<()> {
        self.with(|file| {
            file.cache = file.medium.clone();
            file.pending.iter().for_each(|pending| file.cache.apply(&pending.change));
        })
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        scheduling_point();
        self.vfs.state().counts.set_lengths += 1;
        self.fault(0, Operation::SetLength)?;
        self.change(|file| file.change(Change::SetLength(length)))
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        scheduling_point();
        self.vfs.state().counts.punches += 1;
        if self.vfs.kind().no_holes {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.fault(0, Operation::Punch)?;
        self.change(|file| file.change(Change::Punch { offset, length }))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.with(|file| file.cache.next_data(offset))
    }

    fn clone_whole(&self, source: &dyn File) -> io::Result<()> {
        if self.vfs.kind().no_clones {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut bytes = vec![0; source.length()? as usize];
        source.read_or_zero_at(&mut bytes, 0)?;
        (self as &dyn File).write_all_at(&bytes, 0)
    }

    fn copy_from(&self, offset: u64, source: &dyn File, source_offset: u64, length: u64) -> io::Result<u64> {
        if self.vfs.kind().no_copies {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut bytes = vec![0; length as usize];
        let read = source.read_at(&mut bytes, source_offset)?;
        Ok(self.write_at(bytes.get(..read).unwrap_or_default(), offset)? as u64)
    }

    /// A write in what a crash leaves of it, though no file system would tear it within a block.
    fn share_from(&self, offset: u64, source: &dyn File, source_offset: u64, length: u64) -> io::Result<()> {
        let whole = |at: u64| at.is_multiple_of(PAGE as u64);
        if self.vfs.kind().no_clones || ![offset, source_offset, length].into_iter().all(whole) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        if source_offset + length > source.length()? {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.vfs.state().counts.shares += 1;
        let mut bytes = vec![0; length as usize];
        source.read_or_zero_at(&mut bytes, source_offset)?;
        (self as &dyn File).write_all_at(&bytes, offset)
    }

    fn shares_with(&self, _source: &dyn File) -> bool {
        !self.vfs.kind().no_clones
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.with(|file| file.cache.allocated_bytes())
    }

    fn available_bytes(&self) -> io::Result<Option<u64>> {
        Ok(self.vfs.kind().available_bytes)
    }

    fn modified(&self) -> io::Result<FileTime> {
        self.with(|file| file.modified)
    }

    fn set_modified(&self, time: FileTime) -> io::Result<()> {
        self.with(|file| file.modified = time)
    }

    fn lock(&self, mode: LockMode) -> io::Result<()> {
        // In place of the one that it has.
        self.unlock()?;
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

    fn identity(&self) -> io::Result<FileIdentity> {
        Ok(FileIdentity { device: 0, inode: self.id as u64 })
    }

    fn link(&self, path: &Path) -> io::Result<()> {
        self.vfs.link_file(self.id, path)
    }

    fn set_read_only(&self, read_only: bool) -> io::Result<()> {
        self.with(|file| file.read_only = read_only)
    }

    fn is_read_only(&self) -> io::Result<bool> {
        self.with(|file| file.read_only)
    }

    /// There is nobody to wait for in one thread.
    fn lock_registry(&self) -> io::Result<()> {
        let taken = self.with(|file| std::mem::replace(&mut file.registry_lock, true))?;
        match taken {
            true => Err(io::ErrorKind::WouldBlock.into()),
            false => {
                *self.has_registry.lock() = true;
                Ok(())
            }
        }
    }

    fn unlock_registry(&self) -> io::Result<()> {
        match std::mem::take(&mut *self.has_registry.lock()) {
            true => self.with(|file| file.registry_lock = false),
            false => Ok(()),
        }
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let _ = self.unlock();
        let _ = self.unlock_registry();
    }
}
