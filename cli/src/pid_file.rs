//! A file that names this process, for whoever has to stop it.

use crate::failure::Failure;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
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
        let written = write_new(Path::new(&temporary), &content).and_then(|()| fs::rename(&temporary, path));
        if let Err(error) = written {
            let _ = fs::remove_file(&temporary);
            return Err(Failure::new(format!("{}: cannot write the pid file: {error}", path.display())));
        }
        Ok(PidFile { path: path.to_path_buf(), content })
    }
}

/// In a folder where others may write, what has that name already may be a link of theirs: it is not followed.
fn write_new(path: &Path, content: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    File::create_new(path)?.write_all(content.as_bytes())
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if fs::read_to_string(&self.path).is_ok_and(|content| content == self.content) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_waits_at_the_temporary_name_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, precious) = (dir.path().join("pid"), dir.path().join("precious"));
        fs::write(&precious, "precious").unwrap();
        let temporary = dir.path().join(format!("pid.{}", std::process::id()));
        std::os::unix::fs::symlink(&precious, temporary).unwrap();
        let written = PidFile::write(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert!(fs::symlink_metadata(&path).unwrap().is_file());
        drop(written);
        assert!(!path.exists());
        assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
    }
}
