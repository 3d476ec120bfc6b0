//! A file whose bytes are saved in an undo file before they change, whoever changes them: the repair itself, or an open that
//! recovers the image.

use super::undo::{Before, UndoFile};
use crate::error::{Error, Result};
use crate::sync::{Arc, Mutex};
use crate::vfs::{File, FileIdentity, FileTime, LockMode, Vfs};
use crate::vhd::UniqueId;
use std::io;
use std::ops::Range;
use std::path::Path;

/// The image. Whoever made this holds its lock; locking it again succeeds, and giving the lock back is left to the owner.
#[derive(Debug)]
pub(super) struct GuardedFile {
    inner: Arc<dyn File>,
    undo: Mutex<UndoFile>,
}

impl GuardedFile {
    /// The image at `path` of the disk `disk_id`, as it is from here on, with the undo file at `undo` ([`UndoFile::open`]).
    pub(super) fn new(
        vfs: &dyn Vfs,
        undo: &Path,
        (inner, path): (Arc<dyn File>, &Path),
        disk_id: UniqueId,
    ) -> Result<Arc<Self>> {
        let io = |error| Error::io(path, "looking at the image", error);
        let before = Before {
            file_bytes: inner.length().map_err(io)?,
            modified: inner.modified().map_err(io)?,
            disk_id,
        };
        let undo = Mutex::new(UndoFile::open(vfs, undo, (&*inner, path), before)?);
        Ok(Arc::new(GuardedFile { inner, undo }))
    }

    /// Ends the undo file: the repair is complete. Durable on return.
    pub(super) fn finish(&self) -> Result<()> {
        self.undo.lock().finish(&*self.inner)
    }

    /// Saves what many ranges hold with one sync, so that changing them later costs none.
    pub(super) fn save(&self, ranges: &[Range<u64>]) -> io::Result<()> {
        self.undo.lock().save(&*self.inner, ranges)
    }

    fn save_one(&self, offset: u64, length: u64) -> io::Result<()> {
        self.save(std::slice::from_ref(&(offset..offset.saturating_add(length))))
    }
}

impl File for GuardedFile {
    fn length(&self) -> io::Result<u64> {
        self.inner.length()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.save_one(offset, buf.len() as u64)?;
        self.inner.write_at(buf, offset)
    }

    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.save_one(offset, buf.len() as u64)?;
        self.inner.write_durable_at(buf, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }

    fn forget_cached(&self, length: u64) -> io::Result<()> {
        self.inner.forget_cached(length)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let now = self.inner.length()?;
        if length < now {
            self.save_one(length, now - length)?;
        }
        self.inner.set_len(length)
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.save_one(offset, length)?;
        self.inner.punch_hole(offset, length)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.inner.next_data(offset)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.inner.allocated_bytes()
    }

    fn modified(&self) -> io::Result<FileTime> {
        self.inner.modified()
    }

    fn set_modified(&self, time: FileTime) -> io::Result<()> {
        self.inner.set_modified(time)
    }

    fn lock(&self, _mode: LockMode) -> io::Result<()> {
        Ok(())
    }

    fn unlock(&self) -> io::Result<()> {
        Ok(())
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        self.inner.identity()
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::*;
    use crate::sim::SimVfs;

    #[test]
    fn what_a_guarded_file_says_of_itself_is_the_files() {
        let vfs = SimVfs::new(1);
        let path = Path::new("/image");
        let inner = vfs.create_new(path).unwrap();
        inner.write_at(&[1; 8192], 0).unwrap();
        let time = FileTime { seconds: 7, nanoseconds: 8 };
        inner.set_modified(time).unwrap();
        let image = (Arc::clone(&inner), path);
        let guarded = GuardedFile::new(&vfs, Path::new("/undo"), image, UniqueId::default()).unwrap();
        assert_eq!(guarded.modified().unwrap(), time);
        assert_eq!(guarded.allocated_bytes().unwrap(), inner.allocated_bytes().unwrap());
        assert!(guarded.allocated_bytes().unwrap() >= 8192);
        assert_eq!(guarded.length().unwrap(), 8192);
    }
}
