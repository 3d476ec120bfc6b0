//! A file system in which one file, that its owner holds locked, is another handle; all others can only be read, unless said
//! otherwise.

use crate::sync::Arc;
use crate::vfs::{Access, File, FileIdentity, FileTime, Vfs};
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

/// Opening the one file gives the same handle again.
#[derive(Debug)]
pub(super) struct OneFile {
    pub(super) inner: Arc<dyn Vfs>,
    pub(super) path: PathBuf,
    pub(super) file: Arc<dyn File>,
    /// How all others may be opened.
    pub(super) others: Access,
}

impl Vfs for OneFile {
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        match path == self.path {
            true => Ok(Arc::clone(&self.file)),
            false if self.others == Access::ReadWrite => self.inner.open(path, access),
            false => self.inner.open(path, Access::ReadOnly),
        }
    }

    fn open_beneath(&self, folder: &Path, path: &Path) -> io::Result<Arc<dyn File>> {
        self.inner.open_beneath(folder, path)
    }

    fn create_new(&self, _path: &Path) -> io::Result<Arc<dyn File>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn identity(&self, path: &Path) -> io::Result<FileIdentity> {
        self.inner.identity(path)
    }

    fn link(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn rename(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn exchange(&self, _one: &Path, _other: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn remove(&self, _path: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn files(&self, directory: &Path, prefix: &OsStr) -> io::Result<Vec<OsString>> {
        self.inner.files(directory, prefix)
    }

    fn files_below(&self, folder: &Path, limit: usize) -> io::Result<Vec<PathBuf>> {
        self.inner.files_below(folder, limit)
    }

    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        self.inner.sync_dir(directory)
    }

    fn random_id(&self) -> io::Result<[u8; 16]> {
        self.inner.random_id()
    }

    fn now(&self) -> FileTime {
        self.inner.now()
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::*;
    use crate::sim::SimVfs;

    #[test]
    fn one_file_is_the_handle_and_no_name_changes() {
        let (disk, other, folder) = (Path::new("/disk"), Path::new("/other"), Path::new("/"));
        let vfs = SimVfs::new(1);
        let file = vfs.create_new(disk).unwrap();
        vfs.create_new(other).unwrap();
        let names = vfs.paths();
        let one = |others| OneFile {
            inner: Arc::new(vfs.clone()),
            path: disk.to_path_buf(),
            file: Arc::clone(&file),
            others,
        };
        let view = one(Access::ReadOnly);
        assert!(Arc::ptr_eq(&view.open(disk, Access::ReadWrite).unwrap(), &file));
        assert!(view.open(other, Access::ReadWrite).unwrap().write_at(&[1], 0).is_err());
        assert!(one(Access::ReadWrite).open(other, Access::ReadWrite).unwrap().write_at(&[1], 0).is_ok());
        for refused in [
            view.create_new(Path::new("/new")).map(drop),
            view.link(other, Path::new("/new")),
            view.rename(other, Path::new("/new")),
            view.exchange(disk, other),
            view.remove(other),
        ] {
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::Unsupported);
        }
        assert_eq!(vfs.paths(), names);
        assert_eq!(view.files(folder, OsStr::new("o")).unwrap(), ["other"]);
        assert_eq!(view.files_below(folder, 9).unwrap(), vfs.files_below(folder, 9).unwrap());
        assert!(view.files_below(folder, 9).unwrap().len() == 2);
        // The session of an open that recovers the image is one of its own.
        assert_ne!(view.random_id().unwrap(), view.random_id().unwrap());
        assert!(vfs.crash_now().pending() > 0);
        view.sync_dir(folder).unwrap();
        view.open(other, Access::ReadOnly).unwrap().sync_data().unwrap();
        assert_eq!(vfs.crash_now().pending(), 0);
    }
}
