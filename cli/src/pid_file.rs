//! A file that names this process, for whoever has to stop it.

use crate::failure::Failure;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

/// Removes the file when dropped, unless another process has put its own in place.
pub(crate) struct PidFile {
    path: PathBuf,
    content: String,
}

impl PidFile {
    /// Writes the file. It appears under its name complete.
    pub(crate) fn write(path: &Path) -> Result<Self, Failure> {
        let content = format!("{}\n", std::process::id());
        let mut temporary = OsString::from(path);
        temporary.push(format!(".{}", std::process::id()));
        let written = fs::write(&temporary, &content).and_then(|()| fs::rename(&temporary, path));
        if let Err(error) = written {
            let _ = fs::remove_file(&temporary);
            return Err(Failure::new(format!("{}: cannot write the pid file: {error}", path.display())));
        }
        Ok(PidFile { path: path.to_path_buf(), content })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if fs::read_to_string(&self.path).is_ok_and(|content| content == self.content) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
