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
