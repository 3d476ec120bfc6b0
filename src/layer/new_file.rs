//! A file that is being made: it has a temporary name beside its own and gets its own when it is complete and durable.

use crate::error::{Error, Result};
use crate::vfs::Vfs;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

/// The name of a file under construction. Dropped before [`NewFile::publish`], it takes the file away: nothing half made
/// stays behind.
#[derive(Debug)]
pub(crate) struct NewFile<'a> {
    vfs: &'a dyn Vfs,
    path: &'a Path,
    temporary: PathBuf,
}

impl<'a> NewFile<'a> {
    /// Chooses a temporary name for what is to be `path`; the caller creates the file.
    pub(crate) fn new(vfs: &'a dyn Vfs, path: &'a Path) -> Result<Self> {
        let random = vfs.random_id().map_err(|error| Error::io(path, "asking for a random id", error))?;
        // It says whose it is, should a crash leave it behind.
        let mut name = OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        let suffix: String = random.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        name.push(format!(".new-{suffix}"));
        Ok(NewFile { vfs, path, temporary: path.with_file_name(name) })
    }

    /// The name to work under.
    pub(crate) fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Gives the file its name, durably; its content must be durable already. Fails where the name is taken, unless
    /// `replace` says that this file takes the place of that one.
    pub(crate) fn publish(self, replace: bool) -> Result<()> {
        let naming = |error: io::Error| match error.kind() {
            io::ErrorKind::AlreadyExists => Error::Exists { path: self.path.to_path_buf() },
            _ => Error::io(self.path, "giving the new image its name", error),
        };
        if replace {
            self.vfs.rename(&self.temporary, self.path).map_err(naming)?;
        } else {
            // A link never replaces a file. The temporary name goes when `self` does.
            self.vfs.link(&self.temporary, self.path).map_err(naming)?;
            let _ = self.vfs.remove(&self.temporary);
        }
        self.vfs
            .sync_dir(self.path.parent().unwrap_or(Path::new("")))
            .map_err(|error| Error::io(self.path, "making the new image's name durable", error))
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        // Also after a failure, and for a name that is gone already. What removing says is of no use to the caller.
        let _ = self.vfs.remove(&self.temporary);
    }
}
