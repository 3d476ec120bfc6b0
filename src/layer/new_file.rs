//! A file that is being made: it gets its name when it is complete and durable. Until then it has none, or a temporary one beside
//! its own where the file system knows no nameless files or another program makes it.

use crate::error::{Error, Result};
use crate::sync::Arc;
use crate::vfs::{File, Vfs};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

/// A file under construction. Dropped before [`NewFile::publish`], it is gone: nothing half made stays behind.
#[derive(Debug)]
pub(crate) struct NewFile<'a> {
    vfs: &'a dyn Vfs,
    path: &'a Path,
    state: State,
}

#[derive(Debug)]
enum State {
    Nameless(Arc<dyn File>),
    Temporary(PathBuf),
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
        Ok(NewFile { vfs, path, state: State::Temporary(path.with_file_name(name)) })
    }

    /// Creates the file that is to be `path`.
    pub(crate) fn create(vfs: &'a dyn Vfs, path: &'a Path) -> Result<(Self, Arc<dyn File>)> {
        match vfs.create_nameless(path.parent().unwrap_or(Path::new(""))) {
            Ok(file) => Ok((NewFile { vfs, path, state: State::Nameless(Arc::clone(&file)) }, file)),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let new = NewFile::new(vfs, path)?;
                let created = vfs.create_new(new.temporary());
                let file = created.map_err(|error| Error::io(path, "creating the image", error))?;
                Ok((new, file))
            }
            Err(error) => Err(Error::io(path, "creating the image", error)),
        }
    }

    /// The name to work under.
    pub(crate) fn temporary(&self) -> &Path {
        match &self.state {
            State::Temporary(path) => path,
            State::Nameless(_) => self.path,
        }
    }

    /// Gives the file its name, durably; its content must be durable already. Fails where the name is taken, unless
    /// `replace` says that this file, which has a temporary name, takes the place of that one.
    pub(crate) fn publish(self, replace: bool) -> Result<()> {
        let naming = |error: io::Error| match error.kind() {
            io::ErrorKind::AlreadyExists => Error::Exists { path: self.path.to_path_buf() },
            _ => Error::io(self.path, "giving the new image its name", error),
        };
        match &self.state {
            // A link never replaces a file.
            State::Nameless(file) => file.link(self.path).map_err(naming)?,
            State::Temporary(temporary) if replace => {
                self.vfs.rename(temporary, self.path).map_err(naming)?;
            }
            State::Temporary(temporary) => {
                // The temporary name goes when `self` does, if this does not work.
                self.vfs.link(temporary, self.path).map_err(naming)?;
                let _ = self.vfs.remove(temporary);
            }
        }
        self.vfs
            .sync_dir(self.path.parent().unwrap_or(Path::new("")))
            .map_err(|error| Error::io(self.path, "making the new image's name durable", error))
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        // Also after a failure, and for a name that is gone already. What removing says is of no use to the caller.
        if let State::Temporary(temporary) = &self.state {
            let _ = self.vfs.remove(temporary);
        }
    }
}
