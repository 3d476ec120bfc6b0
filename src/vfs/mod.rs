//! Where bytes live. All file access of the library goes through [`Vfs`] and [`File`], so that a simulator can see,
//! order, tear and lose every single operation.
//!
//! What the traits promise is what POSIX promises and no more: a write is in some cache until a sync returns, writes
//! between two syncs reach the medium in any order and in any part, and a failed sync says nothing about what was kept.

mod direct;
mod holder;
mod host;
mod lock;
mod share;
mod zeros;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use direct::DirectVfs;
pub use host::HostVfs;
pub use lock::LockMode;
pub(crate) use zeros::runs_of_data;

/// A point in time as file systems store it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct FileTime {
    /// Seconds since 1970-01-01 00:00:00 UTC.
    pub seconds: i64,
    /// Nanoseconds within the second, below 1,000,000,000.
    pub nanoseconds: u32,
}

/// Which file it is, whatever its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// The file system.
    pub device: u64,
    /// The file in it.
    pub inode: u64,
}

/// Whether a file is opened for reading alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads only; the file is never changed through this handle.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// A place that holds files: the operating system's, or a simulated one. What has a default is for snapshots and clones, and
/// may be left out where there are none.
pub trait Vfs: Send + Sync + fmt::Debug {
    /// Opens an existing regular file or block device. Anything else (a FIFO, a directory) is an error, without blocking.
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>>;

    /// Opens a file for reading by a path that starts in `folder` and does not leave it, not by way of links either.
    fn open_beneath(&self, folder: &Path, path: &Path) -> io::Result<Arc<dyn File>>;

    /// Creates an empty file for reading and writing; fails with `AlreadyExists` where the name is taken.
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn File>>;

    /// Creates an empty file that will be in `folder` but has no name there yet: it is gone with its handle, or at a crash,
    /// unless [`File::link`] gave it one. Fails with `Unsupported` where the file system cannot.
    fn create_nameless(&self, folder: &Path) -> io::Result<Arc<dyn File>> {
        let _ = folder;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The path without links in it, from the root: what it leads to from now on does not depend on the working directory.
    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        Ok(path.to_path_buf())
    }

    /// Which file a path leads to now.
    fn identity(&self, path: &Path) -> io::Result<FileIdentity>;

    /// Gives a file a second name; fails with `AlreadyExists` where `to` is taken. Durable after [`Vfs::sync_dir`].
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Gives a file another name, in the place of whatever had that name. Durable after [`Vfs::sync_dir`].
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Swaps what two names stand for, in one step; both must exist. Fails with `Unsupported` where the file system cannot.
    /// Durable after [`Vfs::sync_dir`].
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()>;

    /// Takes a name away from a file. Durable after [`Vfs::sync_dir`].
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// The names of the regular files in a directory that start with `prefix`, in any order. Links are none.
    fn files(&self, directory: &Path, prefix: &OsStr) -> io::Result<Vec<OsString>>;

    /// The regular files in a folder and in the folders below it, by their paths from there, the nearest first. Links are not
    /// followed, and no more than `limit` names of any kind are read.
    fn files_below(&self, folder: &Path, limit: usize) -> io::Result<Vec<PathBuf>> {
        let mut names = self.files(folder, OsStr::new(""))?;
        names.sort();
        Ok(names.into_iter().take(limit).map(PathBuf::from).collect())
    }

    /// Makes the names in a directory durable.
    fn sync_dir(&self, directory: &Path) -> io::Result<()>;

    /// The same files past the page cache, where there is such a way.
    fn direct(&self) -> Option<Arc<dyn Vfs>> {
        None
    }

    /// 128 bits that nobody can guess.
    fn random_id(&self) -> io::Result<[u8; 16]>;

    /// The current time.
    fn now(&self) -> FileTime;
}

/// An open file. Positions are bytes from its start; all methods may be called from several threads at once.
pub trait File: Send + Sync + fmt::Debug {
    /// Length in bytes.
    fn length(&self) -> io::Result<u64>;

    /// Whether whole pages bypass the cache: reading back what was just written costs as much as any read.
    fn is_direct(&self) -> bool {
        false
    }

    /// Reads at most `buf.len()` bytes; fewer at the end of the file or when interrupted, 0 only at the end.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes at most `buf.len()` bytes into the cache, extending the file where needed; returns how many.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize>;

    /// Writes all of `buf` and returns when these bytes, and what is needed to read them back, are on the medium.
    /// Says nothing about other writes. On an error any part may have been written.
    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Returns when all writes, size changes and holes that completed before the call are on the medium.
    fn sync_data(&self) -> io::Result<()>;

    /// The same, and the time of the last change and who may write to the file are on the medium, too.
    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }

    /// Makes the next reads below `length` come from the medium, as far as the cache lets go of it (best effort). After a
    /// failed sync a cache may show what the medium does not hold, and call it clean.
    fn forget_cached(&self, length: u64) -> io::Result<()>;

    /// Cuts the file, or extends it with zeros.
    fn set_len(&self, length: u64) -> io::Result<()>;

    /// Takes space for a range behind the end of the file, whose length stays: nothing else gets that space before the file is
    /// cut, to its own length or another. Any error but a lack of space means that the file system cannot.
    fn allocate_beyond_end(&self, offset: u64, length: u64) -> io::Result<()> {
        let _ = (offset, length);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes a range read as zeros, giving its space back where the file system can; never changes the length.
    /// Fails with `Unsupported` where the file system cannot.
    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()>;

    /// The next range at or behind `offset` that may hold data; what lies before it reads as zeros, and has no space in the
    /// file. `None` if there is no more data. Where the file system does not tell, all is data.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;

    /// Makes this file, which is empty, hold what `source` holds, with the space that `source` has: nothing is copied until one
    /// of them changes. Fails, and changes nothing, where the file system cannot.
    fn clone_whole(&self, source: &dyn File) -> io::Result<()> {
        let _ = source;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Writes at `offset` what stands in `source` from `source_offset` on, without moving it through this process: at most
    /// `length` bytes, and returns how many. The file system may share the space, or have a server copy. Fails where it cannot
    /// do either.
    fn copy_from(&self, offset: u64, source: &dyn File, source_offset: u64, length: u64) -> io::Result<u64> {
        let _ = (offset, source, source_offset, length);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes `length` bytes at `offset` hold what stands in `source` from `source_offset` on, with the space that they have there:
    /// nothing is copied until one of them changes, and holes stay holes. Otherwise it is a write like any other: the next sync makes
    /// it durable, and after an error any part of it may have been done. Fails with `Unsupported`, and changes nothing, where the file
    /// system cannot share these ranges: most can share none, the others only whole blocks of theirs, of 4 KiB as a rule.
    fn share_from(&self, offset: u64, source: &dyn File, source_offset: u64, length: u64) -> io::Result<()> {
        let _ = (offset, source, source_offset, length);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Whether [`File::share_from`] can be expected to share ranges of `source`; some may be refused all the same.
    fn shares_with(&self, source: &dyn File) -> bool {
        let _ = source;
        false
    }

    /// Bytes of the medium that the file occupies.
    fn allocated_bytes(&self) -> io::Result<u64>;

    /// Bytes that the file system of the file has left for it; `None` where it does not say.
    fn available_bytes(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }

    /// When the content was last changed.
    fn modified(&self) -> io::Result<FileTime>;

    /// Sets the time of the last change.
    fn set_modified(&self, time: FileTime) -> io::Result<()>;

    /// Takes the image lock, held until the handle is dropped, in place of the one that this handle has. `WouldBlock` where
    /// another handle excludes it; then this one holds none.
    fn lock(&self, mode: LockMode) -> io::Result<()>;

    /// Gives the image lock back before the handle is dropped.
    fn unlock(&self) -> io::Result<()>;

    /// The descriptor, where the file has one, for those who map it or hand it to another program.
    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Which file it is.
    fn identity(&self) -> io::Result<FileIdentity>;

    /// Gives the file a name, its first if it was made by [`Vfs::create_nameless`]; fails with `AlreadyExists` where the name is
    /// taken. Durable after [`Vfs::sync_dir`].
    fn link(&self, path: &Path) -> io::Result<()> {
        let _ = path;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Takes everyone's permission to write away, or gives it to the owner. Handles that are open keep theirs.
    fn set_read_only(&self, read_only: bool) -> io::Result<()> {
        let _ = read_only;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Whether nobody has the permission to write.
    fn is_read_only(&self) -> io::Result<bool> {
        Ok(false)
    }

    /// Waits until nobody else changes the registry of children, and keeps others from it until [`File::unlock_registry`] or
    /// the end of the handle. Has nothing to do with the image lock.
    fn lock_registry(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Lets others change the registry.
    fn unlock_registry(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The process that holds the image lock through another handle, such as `cowvhd (pid 123)`, as far as the system tells.
    fn holder(&self) -> Option<String> {
        None
    }
}

/// The loops around [`File`]'s short transfers.
pub(crate) trait FileExt {
    /// Reads all of `buf`; what lies past the end of the file reads as zeros.
    fn read_or_zero_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf`.
    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
}

impl FileExt for dyn File + '_ {
    fn read_or_zero_at(&self, buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.read_at(rest, offset) {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(n) => {
                    done += n;
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write_all_at(&self, mut buf: &[u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.write_at(buf, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    buf = buf.get(n..).unwrap_or_default();
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}
