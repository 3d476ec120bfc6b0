//! The host's files past its page cache (`O_DIRECT`): what a guest reads and writes goes from its buffers to the device, and the
//! host's memory stays free for others.
//!
//! A file has two descriptors. Whole pages at whole page offsets go through the one that bypasses the cache; from a buffer
//! that is not aligned, by way of one that is. Everything else (headers, footers, single sectors) goes through the cache, as do
//! syncs. The kernel writes back and drops cached pages around a direct transfer, but not against a cached access to the same
//! page at the same moment: old data could then be written back over new. So a cached access has its region of the file for
//! itself, and direct ones share it.
//!
//! Both descriptors hold QEMU's locks, so that no write of a killed process can outlive them.

use super::host::{HostFile, HostVfs};
use super::{Access, File, FileIdentity, FileTime, LockMode, Vfs, lock};
use crate::sync::{Arc, Mutex, RwLock};
use rustix::fs::{Mode, OFlags};
use rustix::io::ReadWriteFlags;
use std::ffi::{OsStr, OsString};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// What every file system's `O_DIRECT` is content with: for offsets, lengths and places in memory.
const PAGE: usize = 4096;
/// A transfer stays within one region.
const REGION_BYTES: u64 = 2 << 20;
/// Regions that share a lock.
const STRIPES: usize = 64;
/// Pages of a bounce buffer: what is longer goes in pieces.
const BOUNCE_PAGES: usize = 64;
/// So many bounce buffers are kept for the next requests.
const SPARE_BUFFERS: usize = 8;

/// The file system of the host, past its page cache where pages are read and written whole.
#[derive(Debug, Clone, Copy, Default)]
pub struct DirectVfs;

impl Vfs for DirectVfs {
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(DirectFile::new(HostFile::open(path, access)?, path, access)?))
    }

    fn open_beneath(&self, folder: &Path, path: &Path) -> io::Result<Arc<dyn File>> {
        HostVfs.open_beneath(folder, path)
    }

    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        HostVfs.create_new(path)
    }

    fn create_nameless(&self, folder: &Path) -> io::Result<Arc<dyn File>> {
        let cached = HostFile::nameless(folder)?;
        let path = cached.own_path();
        Ok(Arc::new(DirectFile::new(cached, &path, Access::ReadWrite)?))
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        HostVfs.resolve(path)
    }

    fn identity(&self, path: &Path) -> io::Result<FileIdentity> {
        HostVfs.identity(path)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        HostVfs.link(from, to)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        HostVfs.rename(from, to)
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        HostVfs.exchange(one, other)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        HostVfs.remove(path)
    }

    fn files(&self, directory: &Path, prefix: &OsStr) -> io::Result<Vec<OsString>> {
        HostVfs.files(directory, prefix)
    }

    fn files_below(&self, folder: &Path, limit: usize) -> io::Result<Vec<PathBuf>> {
        HostVfs.files_below(folder, limit)
    }

    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        HostVfs.sync_dir(directory)
    }

    fn random_id(&self) -> io::Result<[u8; 16]> {
        HostVfs.random_id()
    }

    fn now(&self) -> FileTime {
        HostVfs.now()
    }
}

/// A page of memory at a whole page.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// A file with a descriptor that bypasses the cache beside one that does not.
#[derive(Debug)]
struct DirectFile {
    cached: HostFile,
    direct: OwnedFd,
    /// By region of the file: shared by direct transfers, taken alone by those through the cache.
    regions: Box<[RwLock<()>]>,
    buffers: Mutex<Vec<Vec<Page>>>,
}

impl Drop for DirectFile {
    fn drop(&mut self) {
        // As the other descriptor does after this one.
        let _ = lock::unlock(&self.direct);
    }
}

/// How much of a transfer of `length` bytes at `offset` is done at once, and whether directly.
fn first_piece(offset: u64, length: usize) -> (usize, bool) {
    let page = PAGE as u64;
    let to_region_end = usize::try_from(REGION_BYTES - offset % REGION_BYTES).unwrap_or(usize::MAX);
    let length = length.min(to_region_end);
    match usize::try_from(offset % page).unwrap_or(0) {
        0 if length >= PAGE => (length / PAGE * PAGE, true),
        inside => (length.min(PAGE - inside), false),
    }
}

fn is_aligned(buf: &[u8]) -> bool {
    (buf.as_ptr() as usize).is_multiple_of(PAGE)
}

/// Copies the front of `from` over the pages; both have room for `count` bytes.
fn fill(pages: &mut [Page], from: &[u8]) {
    for (page, bytes) in pages.iter_mut().zip(from.chunks(PAGE)) {
        if let Some(start) = page.0.get_mut(..bytes.len()) {
            start.copy_from_slice(bytes);
        }
    }
}

impl DirectFile {
    /// Opens the file of `cached`, to which `path` leads, once more.
    fn new(cached: HostFile, path: &Path, access: Access) -> io::Result<Self> {
        let mode = match access {
            Access::ReadOnly => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        let flags = mode | OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let refused = |error: io::Error| match error.kind() {
            io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported => io::Error::new(
                io::ErrorKind::Unsupported,
                "the file system cannot bypass its page cache (O_DIRECT): open the image without it",
            ),
            _ => error,
        };
        let direct = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| refused(error.into()))?;
        let [first, second] = [rustix::fs::fstat(cached.fd())?, rustix::fs::fstat(&direct)?];
        if (first.st_dev, first.st_ino) != (second.st_dev, second.st_ino) {
            return Err(io::Error::other("another file took its name while it was opened: try again"));
        }
        let file = DirectFile {
            cached,
            direct,
            regions: (0..STRIPES).map(|_| RwLock::new(())).collect(),
            buffers: Mutex::default(),
        };
        // Some file systems take the flag and refuse the transfers.
        file.read_direct(&mut [0; PAGE], 0).map_err(refused)?;
        Ok(file)
    }

    fn region(&self, offset: u64) -> io::Result<&RwLock<()>> {
        let index = usize::try_from(offset / REGION_BYTES % STRIPES as u64).unwrap_or(0);
        self.regions.get(index).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn with_buffer<T>(&self, work: impl FnOnce(&mut [Page]) -> T) -> T {
        let spare = self.buffers.lock().pop();
        let mut buffer = spare.unwrap_or_else(|| vec![Page([0; PAGE]); BOUNCE_PAGES]);
        let result = work(&mut buffer);
        let mut buffers = self.buffers.lock();
        if buffers.len() < SPARE_BUFFERS {
            buffers.push(buffer);
        }
        result
    }

    /// Reads whole pages, at most what a bounce buffer holds if `buf` is not aligned.
    fn read_direct(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        if is_aligned(buf) {
            return Ok(rustix::io::pread(&self.direct, buf, offset)?);
        }
        self.with_buffer(|pages| {
            let count = (buf.len() / PAGE).min(pages.len());
            let pages = pages.get_mut(..count).unwrap_or_default();
            let mut slices: Vec<_> = pages.iter_mut().map(|page| io::IoSliceMut::new(&mut page.0)).collect();
            let read = rustix::io::preadv(&self.direct, &mut slices, offset)?;
            let target = buf.get_mut(..read).unwrap_or_default();
            for (bytes, page) in target.chunks_mut(PAGE).zip(pages.iter()) {
                bytes.copy_from_slice(page.0.get(..bytes.len()).unwrap_or_default());
            }
            Ok(read)
        })
    }

    /// Writes whole pages, at most what a bounce buffer holds if `buf` is not aligned.
    fn write_direct(&self, buf: &[u8], offset: u64, flags: ReadWriteFlags) -> io::Result<usize> {
        if is_aligned(buf) {
            return Ok(rustix::io::pwritev2(&self.direct, &[IoSlice::new(buf)], offset, flags)?);
        }
        self.with_buffer(|pages| {
            let count = (buf.len() / PAGE).min(pages.len());
            let pages = pages.get_mut(..count).unwrap_or_default();
            fill(pages, buf);
            let slices: Vec<_> = pages.iter().map(|page| IoSlice::new(&page.0)).collect();
            Ok(rustix::io::pwritev2(&self.direct, &slices, offset, flags)?)
        })
    }

    fn write(&self, buf: &[u8], offset: u64, durable: bool) -> io::Result<usize> {
        let (length, direct) = first_piece(offset, buf.len());
        let piece = buf.get(..length).unwrap_or_default();
        let region = self.region(offset)?;
        if direct {
            let _shared = region.read();
            let flags = if durable { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
            return self.write_direct(piece, offset, flags);
        }
        let _alone = region.write();
        match durable {
            true => self.cached.write_durable_at(piece, offset).map(|()| length),
            false => self.cached.write_at(piece, offset),
        }
    }
}

impl File for DirectFile {
    fn is_direct(&self) -> bool {
        true
    }

    fn length(&self) -> io::Result<u64> {
        self.cached.length()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let (length, direct) = first_piece(offset, buf.len());
        let piece = buf.get_mut(..length).unwrap_or_default();
        let region = self.region(offset)?;
        if direct {
            let _shared = region.read();
            return self.read_direct(piece, offset);
        }
        let _alone = region.write();
        self.cached.read_at(piece, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.write(buf, offset, false)
    }

    fn write_durable_at(&self, mut buf: &[u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.write(buf, offset, true) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    buf = buf.get(count..).unwrap_or_default();
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.cached.sync_data()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.cached.sync_all()
    }

    fn forget_cached(&self, length: u64) -> io::Result<()> {
        self.cached.forget_cached(length)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.cached.set_len(length)
    }

    fn allocate_beyond_end(&self, offset: u64, length: u64) -> io::Result<()> {
        self.cached.allocate_beyond_end(offset, length)
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.cached.punch_hole(offset, length)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.cached.next_data(offset)
    }

    /// By way of the descriptor that goes through the cache, which the kernel empties of what is replaced.
    fn share_from(
        &self,
        mut offset: u64,
        source: &dyn File,
        mut source_offset: u64,
        mut length: u64,
    ) -> io::Result<()> {
        while length > 0 {
            let part = length.min(REGION_BYTES - offset % REGION_BYTES);
            let _alone = self.region(offset)?.write();
            self.cached.share_from(offset, source, source_offset, part)?;
            (offset, source_offset, length) = (offset + part, source_offset + part, length - part);
        }
        Ok(())
    }

    fn shares_with(&self, source: &dyn File) -> bool {
        self.cached.shares_with(source)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.cached.allocated_bytes()
    }

    fn available_bytes(&self) -> io::Result<Option<u64>> {
        self.cached.available_bytes()
    }

    fn modified(&self) -> io::Result<FileTime> {
        self.cached.modified()
    }

    fn set_modified(&self, time: FileTime) -> io::Result<()> {
        self.cached.set_modified(time)
    }

    fn lock(&self, mode: LockMode) -> io::Result<()> {
        // What it held before would be another's.
        lock::unlock(&self.direct)?;
        self.cached.lock(mode)?;
        // Nobody else has what excludes this; the locks of the other descriptor would.
        lock::join(&self.direct, mode).inspect_err(|_| drop(self.unlock()))
    }

    fn unlock(&self) -> io::Result<()> {
        lock::unlock(&self.direct).and(self.cached.unlock())
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.cached.as_fd()
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        self.cached.identity()
    }

    fn link(&self, path: &Path) -> io::Result<()> {
        self.cached.link(path)
    }

    fn set_read_only(&self, read_only: bool) -> io::Result<()> {
        self.cached.set_read_only(read_only)
    }

    fn is_read_only(&self) -> io::Result<bool> {
        self.cached.is_read_only()
    }

    fn lock_registry(&self) -> io::Result<()> {
        self.cached.lock_registry()
    }

    fn unlock_registry(&self) -> io::Result<()> {
        self.cached.unlock_registry()
    }

    fn holder(&self) -> Option<String> {
        self.cached.holder()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_pages_are_direct_and_the_rest_is_not() {
        assert_eq!(first_piece(0, 4096), (4096, true));
        assert_eq!(first_piece(0, 10_000), (8192, true));
        assert_eq!(first_piece(0, 4095), (4095, false));
        assert_eq!(first_piece(512, 10_000), (3584, false));
        assert_eq!(first_piece(4096 + 512, 100), (100, false));
        assert_eq!(first_piece(REGION_BYTES - 4096, 10_000), (4096, true));
        assert_eq!(first_piece(REGION_BYTES - 512, 10_000), (512, false));
        assert_eq!(first_piece(3 * REGION_BYTES, 5 << 20), (2 << 20, true));
    }
}
