//! Which process holds an image's lock, as far as `/proc` tells: the kernel names no owner of an open-file-description
//! lock, but shows the locks of every descriptor of the processes that we may look into.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Finds a process that holds a lock of the kind in `lock.rs` on the file of `fd`: its name and number.
pub(super) fn find(fd: &OwnedFd) -> Option<String> {
    let stat = rustix::fs::fstat(fd).ok()?;
    let file = (stat.st_dev, stat.st_ino);
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let process = processes
        .filter(|entry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit))
        .find(|entry| holds_lock(&entry.path(), file).unwrap_or(false))?
        .path();
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    let pid = process.file_name()?.to_str()?;
    match name.trim_end() {
        "" => Some(format!("pid {pid}")),
        name => Some(format!("{name} (pid {pid})")),
    }
}

/// Whether one of a process's descriptors is of the file and has a lock. `None` where we may not look, or the process ended.
fn holds_lock(process: &Path, file: (u64, u64)) -> Option<bool> {
    let descriptors = fs::read_dir(process.join("fd")).ok()?.flatten();
    let mut of_file = descriptors.filter(|entry| {
        fs::metadata(entry.path()).is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == file)
    });
    Some(of_file.any(|entry| {
        let information = process.join("fdinfo").join(entry.file_name());
        fs::read_to_string(information)
            .is_ok_and(|text| text.lines().any(|line| line.starts_with("lock:") && line.contains("OFDLCK")))
    }))
}

#[cfg(test)]
mod tests {
    use crate::vfs::{Access, HostVfs, LockMode, Vfs};

    #[test]
    fn the_holder_of_a_lock_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        drop(HostVfs.create_new(&path).unwrap());
        let (first, second) = (
            HostVfs.open(&path, Access::ReadWrite).unwrap(),
            HostVfs.open(&path, Access::ReadWrite).unwrap(),
        );
        assert_eq!(second.holder(), None);
        first.lock(LockMode::Exclusive).unwrap();
        let holder = second.holder().unwrap();
        assert!(holder.ends_with(&format!("(pid {})", std::process::id())), "{holder}");
        first.unlock().unwrap();
        assert_eq!(second.holder(), None);
    }
}
