//! A fixed disk: the guest's bytes in order, then the footer. There is nothing between a request and the file, and no
//! journal: what is promised is what a raw file promises.
//!
//! All but the last sector of the file is the guest's, who may write any structure of VHD or of ours there. So nothing but
//! the last sector decides whether a file is a fixed disk, and nothing else of it is interpreted.

use super::image::lock;
use super::new_file::NewFile;
use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::journal::{write_zeros, zero_range};
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering, RwLock, RwLockReadGuard};
use crate::vfs::{Access, File, FileExt, FileTime, Vfs};
use crate::vhd::{DiskType, Footer, Timestamp, UniqueId};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

const FOOTER_BYTES: u64 = Footer::SIZE as u64;
/// A footer without its last byte, as products before Virtual PC 2004 wrote it.
const SHORT_FOOTER_BYTES: u64 = FOOTER_BYTES - 1;

/// Creates a fixed disk of `size` bytes at `path`, which must not exist. The file is sparse.
pub(crate) fn create_fixed(vfs: &dyn Vfs, path: &Path, size: u64) -> Result<()> {
    let end = FixedEnd::new(vfs, path, size)?;
    let new = NewFile::new(vfs, path)?;
    let file = vfs
        .create_new(new.temporary())
        .map_err(|error| Error::io(new.temporary(), "creating the image", error))?;
    end.write(&*file, new.temporary())?;
    new.publish(false)
}

/// What makes a file of a disk's bytes a fixed disk.
#[derive(Debug)]
pub(crate) struct FixedEnd {
    footer: Box<Footer>,
}

impl FixedEnd {
    /// The end of a new fixed disk of `size` bytes.
    pub(crate) fn new(vfs: &dyn Vfs, path: &Path, size: u64) -> Result<Self> {
        let id = vfs.random_id().map_err(|error| Error::io(path, "asking for a random id", error))?;
        let now = Timestamp::from_unix_seconds(vfs.now().seconds);
        let footer = Footer::new(DiskType::Fixed, size, UniqueId::from_bytes(id), now);
        footer.validate_size().map_err(|error| Error::Invalid {
            what: format!("a fixed disk of {size} bytes cannot be created: {error}"),
        })?;
        Ok(FixedEnd { footer: Box::new(footer) })
    }

    /// Gives a file its length and its footer; all of it is durable on return.
    pub(crate) fn write(&self, file: &dyn File, path: &Path) -> Result<()> {
        let size = self.footer.current_size;
        let io = |operation: &'static str| move |error| Error::io(path, operation, error);
        file.set_len(size + FOOTER_BYTES).map_err(io("giving the new image its length"))?;
        file.write_all_at(&self.footer.to_bytes(), size).map_err(io("writing the footer"))?;
        file.sync_data().map_err(io("making the new image durable"))
    }
}

/// The footer of a fixed disk, if the file is one.
pub(crate) fn fixed_footer(file: &dyn File, path: &Path) -> Result<Option<Footer>> {
    let file_bytes = file.length().map_err(|error| Error::io(path, "asking for the length", error))?;
    for length in [FOOTER_BYTES, SHORT_FOOTER_BYTES] {
        let Some(offset) = file_bytes.checked_sub(length) else { continue };
        let mut bytes = [0; Footer::SIZE];
        file.read_or_zero_at(&mut bytes, offset)
            .map_err(|error| Error::io(path, format!("reading the footer at offset {offset}"), error))?;
        if let Ok(footer) = Footer::parse(&bytes)
            && footer.disk_type == DiskType::Fixed
            && footer.current_size == offset
            && footer.validate_size().is_ok()
        {
            return Ok(Some(footer));
        }
    }
    Ok(None)
}

/// Keeps everybody from writing to a fixed disk, by its file's mode, since it has no place for a seal; or lets its owner write to it
/// again. Durable on return. The handle need not be open for writing.
pub(crate) fn set_protected(file: &dyn File, path: &Path, protected: bool) -> Result<()> {
    let io = |operation: &'static str| move |error| Error::io(path, operation, error);
    file.set_read_only(protected).map_err(io("changing who may write to the file"))?;
    file.sync_all().map_err(io("making durable who may write to the file"))?;
    let stays = is_protected(file, path)?;
    if protected && !stays {
        let what = "its file system does not keep a file from being written to, and a fixed disk has no other protection: copy \
                    it into a dynamic disk (`cowvhd convert`) and use the copy";
        return Err(Error::Unsupported { path: path.to_path_buf(), what: what.into() });
    }
    Ok(())
}

/// Whether nobody may write to a fixed disk, as its file's mode says.
pub(crate) fn is_protected(file: &dyn File, path: &Path) -> Result<bool> {
    file.is_read_only().map_err(|error| Error::io(path, "asking who may write to the file", error))
}

/// Why a fixed disk that is protected is not opened for writing.
pub(crate) fn fixed_refusal(path: &Path) -> Error {
    let what = "it is a fixed disk that nobody may write to, as its file's mode says: other disks show what it holds";
    Error::Sealed { path: path.to_path_buf(), what: what.into() }
}

/// An open fixed disk.
#[derive(Debug)]
pub(crate) struct Fixed {
    path: PathBuf,
    file: Arc<dyn File>,
    footer: Footer,
    access: Access,
    /// Whether the disk is open; held for reading by every request.
    open: RwLock<bool>,
    /// Counts changes, so that a flush knows whether there is anything to do.
    changes: AtomicU64,
    /// The value of `changes` that the last sync covered. One sync at a time; those who wait may find theirs done.
    synced: Mutex<u64>,
    poisoned: AtomicBool,
    cause: Mutex<Option<String>>,
}

impl Fixed {
    /// Takes a locked file that is a fixed disk.
    pub(super) fn open(file: Arc<dyn File>, path: &Path, footer: Footer, access: Access) -> Result<Self> {
        let whole = footer.current_size + FOOTER_BYTES;
        let file_bytes = file.length().map_err(|error| Error::io(path, "asking for the length", error))?;
        if access == Access::ReadWrite {
            if file_bytes < whole {
                // The byte that a short footer lacks is zero, as is what the file is extended by.
                file.set_len(whole).map_err(|error| Error::io(path, "completing the footer", error))?;
            }
            // What a killed process left in the page cache is read from now on, and no flush of ours would count it.
            file.sync_data().map_err(|error| Error::io(path, "syncing the image", error))?;
        }
        Ok(Fixed {
            path: path.to_path_buf(),
            file,
            footer,
            access,
            open: RwLock::new(true),
            changes: AtomicU64::new(0),
            synced: Mutex::new(0),
            poisoned: AtomicBool::new(false),
            cause: Mutex::new(None),
        })
    }

    /// The file's path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file.
    pub(crate) fn file(&self) -> &Arc<dyn File> {
        &self.file
    }

    /// The footer.
    pub(crate) fn footer(&self) -> &Footer {
        &self.footer
    }

    /// Whether the disk is open for reading alone.
    pub(crate) fn is_read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }

    /// Reads `buf.len()` bytes at `offset`, a range within the disk.
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let _open = self.request()?;
        self.read_below(offset, buf)
    }

    /// The same for a disk over this one, also when this one was closed.
    pub(crate) fn read_below(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file
            .read_or_zero_at(buf, offset)
            .map_err(|error| self.io_error("reading", offset, buf.len() as u64, error))
    }

    /// Writes `buf` at `offset`, a range within the disk.
    pub(crate) fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.change("writing", offset, buf.len() as u64, |file| file.write_all_at(buf, offset))
    }

    /// Makes a range within the disk read as zeros; its space is given back unless it is to stay allocated.
    pub(crate) fn write_zeroes(&self, offset: u64, length: u64, keep_allocated: bool) -> Result<()> {
        self.change("zeroing", offset, length, |file| match keep_allocated {
            _ if length == 0 => Ok(()),
            true => write_zeros(file, offset, length),
            false => zero_range(file, offset, length),
        })
    }

    fn change(
        &self,
        operation: &str,
        offset: u64,
        length: u64,
        change: impl FnOnce(&dyn File) -> io::Result<()>,
    ) -> Result<()> {
        let _open = self.request()?;
        self.check()?;
        let result = change(&*self.file);
        // Also after a failure: a part may have reached the file. A flush that sees this count also sees the change.
        self.changes.fetch_add(1, Ordering::SeqCst);
        result.map_err(|error| self.io_error(operation, offset, length, error))
    }

    /// Returns when every change that returned before the call is durable.
    pub(crate) fn flush(&self) -> Result<()> {
        match self.is_read_only() {
            true => Ok(()),
            false => self.sync(),
        }
    }

    fn sync(&self) -> Result<()> {
        let mut synced = self.synced.lock();
        self.check()?;
        let changes = self.changes.load(Ordering::SeqCst);
        if *synced == changes {
            return Ok(());
        }
        if let Err(error) = self.file.sync_data() {
            // It is unknown what is on the medium, and the next sync would not tell.
            *self.cause.lock() = Some(format!("syncing the image: {error}"));
            self.poisoned.store(true, Ordering::SeqCst);
            return Err(Error::io(&self.path, "syncing the image", error));
        }
        *synced = changes;
        Ok(())
    }

    /// Flushes and gives the file back. Waits for requests under way; later ones fail.
    pub(crate) fn close(&self) -> Result<()> {
        let mut open = self.open.write();
        if !std::mem::replace(&mut *open, false) || self.is_read_only() {
            return Ok(());
        }
        self.sync()?;
        // Dropping the handle would do it, too; whoever waits for the file need not wait for that.
        let _ = self.file.unlock();
        Ok(())
    }

    /// Fails where the disk is closed or stopped.
    pub(crate) fn check_open(&self) -> Result<()> {
        let _open = self.request()?;
        self.check()
    }

    /// Everything is durable on return, and so is the time of the last change that the file is to have from then on. It is
    /// protected ([`set_protected`]), and nothing is written to it any more. Others may read it.
    pub(crate) fn seal(&self, modified: FileTime) -> Result<()> {
        self.sync()?;
        self.file
            .set_modified(modified)
            .map_err(|error| Error::io(&self.path, "setting the time of the last change", error))?;
        if !defect::active(Defect::FixedStaysWritable) {
            set_protected(&*self.file, &self.path, true)?;
        }
        lock(&*self.file, &self.path, Access::ReadOnly)
    }

    /// The ranges of `offset..offset + length` that have space in the file, in order.
    pub(crate) fn data_ranges(&self, offset: u64, length: u64) -> Result<Vec<Range<u64>>> {
        let _open = self.request()?;
        let end = offset + length;
        let mut ranges = Vec::new();
        let mut at = offset;
        while at < end {
            let next = self
                .file
                .next_data(at)
                .map_err(|error| self.io_error("looking for data in", at, end - at, error))?;
            let Some(data) = next.filter(|data| data.start < end) else { break };
            let data = data.start.max(at)..data.end.min(end);
            at = data.end;
            ranges.push(data);
        }
        Ok(ranges)
    }

    /// Admits a request, which holds what is returned until it is done.
    fn request(&self) -> Result<RwLockReadGuard<'_, bool>> {
        let open = self.open.read();
        match *open {
            true => Ok(open),
            false => Err(Error::Invalid { what: format!("{}: the disk is closed", self.path.display()) }),
        }
    }

    /// Fails if a sync failed earlier.
    fn check(&self) -> Result<()> {
        if !self.poisoned.load(Ordering::SeqCst) {
            return Ok(());
        }
        let cause = self.cause.lock().clone().unwrap_or_default();
        Err(Error::Poisoned { path: self.path.clone(), cause })
    }

    fn io_error(&self, operation: &str, offset: u64, length: u64, error: io::Error) -> Error {
        Error::io(&self.path, format!("{operation} {length} bytes at file offset {offset}"), error)
    }
}
