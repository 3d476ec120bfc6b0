//! The operating system's files (Linux).

use super::{Access, DirectVfs, File, FileIdentity, FileTime, LockMode, Vfs, holder, lock, share};
use rustix::fs::{
    Advice, AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, ResolveFlags, SeekFrom,
    Timespec, Timestamps, UTIME_OMIT,
};
use rustix::io::ReadWriteFlags;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::{self, IoSlice};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const ALL_MAY_WRITE: Mode = Mode::WUSR.union(Mode::WGRP).union(Mode::WOTH);
const ALL_PERMISSIONS: Mode = Mode::RWXU.union(Mode::RWXG).union(Mode::RWXO);

/// The file system of the host.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostVfs;

impl Vfs for HostVfs {
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(HostFile::open(path, access)?))
    }

    fn open_beneath(&self, folder: &Path, path: &Path) -> io::Result<Arc<dyn File>> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(folder, flags, Mode::empty())?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        match rustix::fs::openat2(&folder, path, flags, Mode::empty(), resolve) {
            Ok(fd) => Ok(Arc::new(regular(fd)?)),
            Err(rustix::io::Errno::XDEV) => {
                let what = "a link on its path leads out of the allowed folder";
                Err(io::Error::new(io::ErrorKind::PermissionDenied, what))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::from_raw_mode(0o666))?;
        Ok(Arc::new(HostFile::new(fd)))
    }

    fn create_nameless(&self, folder: &Path) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(HostFile::nameless(folder)?))
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        std::fs::canonicalize(path)
    }

    fn identity(&self, path: &Path) -> io::Result<FileIdentity> {
        let stat = rustix::fs::stat(path)?;
        Ok(FileIdentity { device: stat.st_dev, inode: stat.st_ino })
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        Ok(rustix::fs::link(from, to)?)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Ok(rustix::fs::rename(from, to)?)
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        use rustix::io::Errno;
        match rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(()),
            // File systems without it answer so; names of files give no other cause for the first.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => Err(io::ErrorKind::Unsupported.into()),
            Err(error) => Err(error.into()),
        }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::unlink(path)?)
    }

    fn files(&self, directory: &Path, prefix: &OsStr) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(or_current(directory))? {
            let entry = entry?;
            let name = entry.file_name();
            if name.as_bytes().starts_with(prefix.as_bytes()) && entry.file_type()?.is_file() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn files_below(&self, folder: &Path, limit: usize) -> io::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        let mut folders = VecDeque::from([PathBuf::new()]);
        let mut rest = limit;
        while let Some(inside) = folders.pop_front() {
            let entries = match std::fs::read_dir(or_current(folder).join(&inside)) {
                Ok(entries) => entries,
                Err(error) if inside.as_os_str().is_empty() => return Err(error),
                Err(_) => continue,
            };
            let mut names: Vec<_> = entries.filter_map(Result::ok).take(rest).collect();
            rest -= names.len();
            names.sort_by_key(std::fs::DirEntry::file_name);
            for name in names {
                let path = inside.join(name.file_name());
                match name.file_type() {
                    Ok(kind) if kind.is_file() => files.push(path),
                    Ok(kind) if kind.is_dir() => folders.push_back(path),
                    _ => {}
                }
            }
        }
        Ok(files)
    }

    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(or_current(directory), flags, Mode::empty())?;
        Ok(rustix::fs::fsync(fd)?)
    }

    fn direct(&self) -> Option<Arc<dyn Vfs>> {
        Some(Arc::new(DirectVfs))
    }

    fn random_id(&self) -> io::Result<[u8; 16]> {
        let mut id = [0; 16];
        // The kernel never returns less than asked for up to 256 bytes once its pool is ready, and waits until it is.
        match rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())? {
            16 => Ok(id),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn now(&self) -> FileTime {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        FileTime { seconds: now.tv_sec, nanoseconds: u32::try_from(now.tv_nsec).unwrap_or(0) }
    }
}

/// The folder of a path of one component is an empty path.
fn or_current(directory: &Path) -> &Path {
    if directory.as_os_str().is_empty() { Path::new(".") } else { directory }
}

/// Takes a descriptor that must be a regular file.
fn regular(fd: OwnedFd) -> io::Result<HostFile> {
    let what = match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
        FileType::RegularFile => return Ok(HostFile::new(fd)),
        FileType::Directory => "a folder",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Symlink | FileType::Unknown => "no file",
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is {what}, expected a regular file")))
}

/// An open file of the host; one descriptor carries its writes, its syncs and its lock.
#[derive(Debug)]
pub(super) struct HostFile {
    fd: OwnedFd,
}

impl HostFile {
    /// Reads of an image are not noted in its access time, where that is allowed (to the owner of the file): each would look at
    /// three times in the inode before it is done.
    fn new(fd: OwnedFd) -> Self {
        let _ = rustix::fs::fcntl_getfl(&fd)
            .and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags | OFlags::NOATIME));
        HostFile { fd }
    }

    pub(super) fn open(path: &Path, access: Access) -> io::Result<Self> {
        let mode = match access {
            Access::ReadOnly => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        // NONBLOCK: opening a FIFO must not wait for a writer. It has no effect on regular files.
        let fd = rustix::fs::open(
            path,
            mode | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
            Mode::empty(),
        )?;
        regular(fd)
    }

    pub(super) fn nameless(folder: &Path) -> io::Result<Self> {
        use rustix::io::Errno;
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        match rustix::fs::open(or_current(folder), flags, Mode::from_raw_mode(0o666)) {
            Ok(fd) => Ok(HostFile::new(fd)),
            // Old kernels take it for an attempt to write to the folder.
            Err(Errno::NOTSUP | Errno::ISDIR | Errno::INVAL) => Err(io::ErrorKind::Unsupported.into()),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// A path that leads to the file, also where it has no name.
    pub(super) fn own_path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd()).into()
    }
}

impl Drop for HostFile {
    fn drop(&mut self) {
        // Closing does it, too, but not before a program that is just being started has given up its copy of the descriptor.
        let _ = lock::unlock(&self.fd);
    }
}

impl File for HostFile {
    fn length(&self) -> io::Result<u64> {
        let size = rustix::fs::fstat(&self.fd)?.st_size;
        u64::try_from(size).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        Ok(rustix::io::pread(&self.fd, buf, offset)?)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        Ok(rustix::io::pwrite(&self.fd, buf, offset)?)
    }

    fn write_durable_at(&self, mut buf: &[u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match rustix::io::pwritev2(&self.fd, &[IoSlice::new(buf)], offset, ReadWriteFlags::DSYNC) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    buf = buf.get(n..).unwrap_or_default();
                    offset += n as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.fd)?)
    }

    fn sync_all(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.fd)?)
    }

    fn forget_cached(&self, length: u64) -> io::Result<()> {
        Ok(rustix::fs::fadvise(&self.fd, 0, NonZeroU64::new(length), Advice::DontNeed)?)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        Ok(rustix::fs::ftruncate(&self.fd, length)?)
    }

    fn allocate_beyond_end(&self, offset: u64, length: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(&self.fd, FallocateFlags::KEEP_SIZE, offset, length)?)
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.fd, flags, offset, length)?)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        use rustix::io::Errno;
        // The position that these change is used by nobody.
        let start = match rustix::fs::seek(&self.fd, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::NOTSUP) => {
                let end = self.length()?;
                return Ok((offset < end).then_some(offset..end));
            }
            Err(error) => return Err(error.into()),
        };
        match rustix::fs::seek(&self.fd, SeekFrom::Hole(start)) {
            Ok(end) => Ok(Some(start..end)),
            // The file was cut in between.
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn clone_whole(&self, source: &dyn File) -> io::Result<()> {
        let source = source.as_fd().ok_or(io::ErrorKind::Unsupported)?;
        Ok(rustix::fs::ioctl_ficlone(&self.fd, source)?)
    }

    fn copy_from(
        &self,
        mut offset: u64,
        source: &dyn File,
        mut source_offset: u64,
        length: u64,
    ) -> io::Result<u64> {
        let source = source.as_fd().ok_or(io::ErrorKind::Unsupported)?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let copied = rustix::fs::copy_file_range(
            source,
            Some(&mut source_offset),
            &self.fd,
            Some(&mut offset),
            length,
        )?;
        Ok(copied as u64)
    }

    fn share_from(&self, offset: u64, source: &dyn File, source_offset: u64, length: u64) -> io::Result<()> {
        let source = source.as_fd().ok_or(io::ErrorKind::Unsupported)?;
        share::share(&self.fd, offset, source, source_offset, length)
    }

    fn shares_with(&self, source: &dyn File) -> bool {
        source.as_fd().is_some_and(|source| share::is_possible(&self.fd, source))
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        // st_blocks counts units of 512 bytes, whatever the file system's block size.
        u64::try_from(rustix::fs::fstat(&self.fd)?.st_blocks)
            .map(|blocks| blocks.saturating_mul(512))
            .map_err(|_| io::ErrorKind::InvalidData.into())
    }

    fn available_bytes(&self) -> io::Result<Option<u64>> {
        let found = rustix::fs::fstatvfs(&self.fd)?;
        // What is kept for root is left for root alone.
        let blocks = if rustix::process::geteuid().is_root() { found.f_bfree } else { found.f_bavail };
        Ok(Some(blocks.saturating_mul(found.f_frsize)))
    }

    fn modified(&self) -> io::Result<FileTime> {
        let stat = rustix::fs::fstat(&self.fd)?;
        Ok(FileTime { seconds: stat.st_mtime, nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or(0) })
    }

    fn set_modified(&self, time: FileTime) -> io::Result<()> {
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() },
        };
        Ok(rustix::fs::futimens(&self.fd, &times)?)
    }

    fn lock(&self, mode: LockMode) -> io::Result<()> {
        lock::lock(&self.fd, mode)
    }

    fn unlock(&self) -> io::Result<()> {
        lock::unlock(&self.fd)
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd())
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        let stat = rustix::fs::fstat(&self.fd)?;
        Ok(FileIdentity { device: stat.st_dev, inode: stat.st_ino })
    }

    fn link(&self, path: &Path) -> io::Result<()> {
        // A descriptor itself may be linked only by who may read any file.
        Ok(rustix::fs::linkat(CWD, self.own_path(), CWD, path, AtFlags::SYMLINK_FOLLOW)?)
    }

    fn set_read_only(&self, read_only: bool) -> io::Result<()> {
        let mode = Mode::from_raw_mode(rustix::fs::fstat(&self.fd)?.st_mode) & ALL_PERMISSIONS;
        let mode = if read_only { mode & !ALL_MAY_WRITE } else { mode | Mode::WUSR };
        Ok(rustix::fs::fchmod(&self.fd, mode)?)
    }

    fn is_read_only(&self) -> io::Result<bool> {
        Ok(!Mode::from_raw_mode(rustix::fs::fstat(&self.fd)?.st_mode).intersects(ALL_MAY_WRITE))
    }

    fn lock_registry(&self) -> io::Result<()> {
        lock::lock_registry(&self.fd)
    }

    fn unlock_registry(&self) -> io::Result<()> {
        lock::unlock_registry(&self.fd)
    }

    fn holder(&self) -> Option<String> {
        holder::find(&self.fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_with_the_prefix_are_listed() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["vm+a", "vm+b", "other"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        std::fs::create_dir(dir.path().join("vm+folder")).unwrap();
        std::os::unix::fs::symlink("other", dir.path().join("vm+link")).unwrap();
        let mut names = HostVfs.files(dir.path(), OsStr::new("vm+")).unwrap();
        names.sort();
        assert_eq!(names, ["vm+a", "vm+b"]);
        assert!(HostVfs.files(&dir.path().join("none"), OsStr::new("")).is_err());
    }

    #[test]
    fn reading_an_image_does_not_touch_its_access_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.vhd");
        std::fs::write(&path, [7; 4096]).unwrap();
        // Older than the content, so that any other reader would change it.
        let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1);
        let times = std::fs::FileTimes::new().set_accessed(long_ago);
        std::fs::File::options().write(true).open(&path).unwrap().set_times(times).unwrap();
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let file = HostVfs.open(&path, access).unwrap();
            assert_eq!(file.read_at(&mut [0; 4096], 0).unwrap(), 4096);
        }
        assert_eq!(std::fs::metadata(&path).unwrap().accessed().unwrap(), long_ago);
    }

    #[test]
    fn a_nameless_file_gets_its_name_whole_and_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let [name, taken] = ["name", "taken"].map(|name| dir.path().join(name));
        std::fs::write(&taken, "other").unwrap();
        let file = HostVfs.create_nameless(dir.path()).unwrap();
        file.write_at(b"content", 0).unwrap();
        assert_eq!(HostVfs.files(dir.path(), OsStr::new("")).unwrap(), ["taken"]);
        assert_eq!(file.link(&taken).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        file.link(&name).unwrap();
        assert_eq!(file.identity().unwrap(), HostVfs.identity(&name).unwrap());
        assert_ne!(file.identity().unwrap(), HostVfs.identity(&taken).unwrap());
        assert_eq!(std::fs::read(&name).unwrap(), b"content");
        drop(file);
        drop(HostVfs.create_nameless(dir.path()).unwrap());
        assert_eq!(HostVfs.files(dir.path(), OsStr::new("")).unwrap().len(), 2);
    }

    #[test]
    fn permissions_to_write_go_and_come_back() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
        let file = HostVfs.create_new(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o664)).unwrap();
        assert!(!file.is_read_only().unwrap());
        file.set_read_only(true).unwrap();
        assert_eq!(mode(), 0o444);
        assert!(file.is_read_only().unwrap());
        HostVfs.open(&path, Access::ReadOnly).unwrap().set_read_only(false).unwrap();
        assert_eq!(mode(), 0o644);
    }

    #[test]
    fn files_below_a_folder_are_listed_nearest_first_and_no_more_than_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        for name in ["z", "a/y", "a/b/x"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        std::os::unix::fs::symlink("/", dir.path().join("link")).unwrap();
        let files = |limit| HostVfs.files_below(dir.path(), limit).unwrap();
        assert_eq!(files(100), ["z", "a/y", "a/b/x"].map(PathBuf::from));
        // The folder `a`, the link and `z`, then a name in `a`.
        assert!(files(4).len() < 3);
        assert!(HostVfs.files_below(&dir.path().join("none"), 9).is_err());
    }

    #[test]
    fn exchange_swaps_two_names_and_needs_both() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, none] = ["a", "b", "none"].map(|name| dir.path().join(name));
        std::fs::write(&a, "1").unwrap();
        std::fs::write(&b, "2").unwrap();
        HostVfs.exchange(&a, &b).unwrap();
        assert_eq!((std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap()), (b"2".to_vec(), b"1".to_vec()));
        assert_eq!(HostVfs.exchange(&a, &none).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(a.exists() && !none.exists());
    }
}
