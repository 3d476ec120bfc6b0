//! QEMU's image locks: open-file-description locks on single bytes, so that `qemu-img` and cowvhd see each other.
//!
//! QEMU gives every permission on an image two bytes. Whoever *uses* permission `p` holds byte `100 + p` shared; whoever
//! *denies* `p` to others holds byte `200 + p` shared. Both are taken first, then the opposite bytes of everyone else are
//! tested: a permission that is used must not be denied by another, one that is denied must not be used by another.
//! Taking before testing means that of two openers at the same moment at most one succeeds. The locks belong to the
//! descriptor and are given back before it is closed; the end of the process does it, too.

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{self, c_short};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

const USED_BASE: u8 = 100;
const DENIED_BASE: u8 = 200;
/// Ours: whoever changes the registry of children.
const REGISTRY: u16 = 300;

const CONSISTENT_READ: u8 = 1 << 0;
const WRITE: u8 = 1 << 1;
const WRITE_UNCHANGED: u8 = 1 << 2;
const RESIZE: u8 = 1 << 3;
const PERMISSIONS: u8 = 4;

/// How an image is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// For reading: others may read, nobody may write.
    Shared,
    /// For writing: nobody else may read or write.
    Exclusive,
}

impl LockMode {
    /// The permissions used, and those denied to everyone else.
    fn permissions(self) -> (u8, u8) {
        match self {
            LockMode::Shared => (CONSISTENT_READ, WRITE | RESIZE),
            LockMode::Exclusive => {
                (CONSISTENT_READ | WRITE | RESIZE, CONSISTENT_READ | WRITE | WRITE_UNCHANGED | RESIZE)
            }
        }
    }
}

/// Takes the bytes of `mode` on `fd`, then tests those of others and gives back what `fd` had beyond them; gives all back and
/// fails with `WouldBlock` where another holder excludes this one.
pub(super) fn lock(fd: &OwnedFd, mode: LockMode) -> io::Result<()> {
    let (used, denied) = mode.permissions();
    let result = take(fd, USED_BASE, used)
        .and_then(|()| take(fd, DENIED_BASE, denied))
        .and_then(|()| test(fd, DENIED_BASE, used))
        .and_then(|()| test(fd, USED_BASE, denied))
        .and_then(|()| give_back(fd, USED_BASE, !used))
        .and_then(|()| give_back(fd, DENIED_BASE, !denied));
    if result.is_err() {
        // The descriptor is about to be dropped by the caller, which releases all bytes as well.
        let _ = unlock(fd);
    }
    result
}

/// Takes the bytes of `mode` on a second descriptor of whoever holds them on another one.
pub(super) fn join(fd: &OwnedFd, mode: LockMode) -> io::Result<()> {
    let (used, denied) = mode.permissions();
    take(fd, USED_BASE, used).and_then(|()| take(fd, DENIED_BASE, denied))
}

/// Gives all bytes back.
pub(super) fn unlock(fd: &OwnedFd) -> io::Result<()> {
    set(fd, libc::F_UNLCK as c_short, USED_BASE, i64::from(DENIED_BASE - USED_BASE + PERMISSIONS))
}

fn take(fd: &OwnedFd, base: u8, permissions: u8) -> io::Result<()> {
    for bit in (0..PERMISSIONS).filter(|bit| permissions & (1 << bit) != 0) {
        set(fd, libc::F_RDLCK as c_short, base + bit, 1)?;
    }
    Ok(())
}

fn give_back(fd: &OwnedFd, base: u8, permissions: u8) -> io::Result<()> {
    for bit in (0..PERMISSIONS).filter(|bit| permissions & (1 << bit) != 0) {
        set(fd, libc::F_UNLCK as c_short, base + bit, 1)?;
    }
    Ok(())
}

/// Takes the byte that whoever changes the registry of children holds alone; waits for it.
pub(super) fn lock_registry(fd: &OwnedFd) -> io::Result<()> {
    fcntl(fd.as_fd(), FcntlArg::F_OFD_SETLKW(&flock(libc::F_WRLCK as c_short, REGISTRY, 1)))?;
    Ok(())
}

/// Gives that byte back.
pub(super) fn unlock_registry(fd: &OwnedFd) -> io::Result<()> {
    fcntl(fd.as_fd(), FcntlArg::F_OFD_SETLK(&flock(libc::F_UNLCK as c_short, REGISTRY, 1)))?;
    Ok(())
}

/// Fails where anyone else holds one of the bytes.
fn test(fd: &OwnedFd, base: u8, permissions: u8) -> io::Result<()> {
    for bit in (0..PERMISSIONS).filter(|bit| permissions & (1 << bit) != 0) {
        let mut query = flock(libc::F_WRLCK as c_short, (base + bit).into(), 1);
        fcntl(fd.as_fd(), FcntlArg::F_OFD_GETLK(&mut query))?;
        if query.l_type != libc::F_UNLCK as c_short {
            return Err(io::ErrorKind::WouldBlock.into());
        }
    }
    Ok(())
}

fn set(fd: &OwnedFd, kind: c_short, start: u8, length: i64) -> io::Result<()> {
    fcntl(fd.as_fd(), FcntlArg::F_OFD_SETLK(&flock(kind, start.into(), length)))?;
    Ok(())
}

fn flock(kind: c_short, start: u16, length: i64) -> libc::flock {
    libc::flock {
        l_type: kind,
        l_whence: libc::SEEK_SET as c_short,
        l_start: start.into(),
        l_len: length,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::LockMode::{Exclusive, Shared};
    use crate::vfs::{Access, HostVfs, Vfs};
    use std::io::ErrorKind;

    #[test]
    fn readers_share_and_a_writer_excludes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let open = || HostVfs.open(&path, Access::ReadWrite).unwrap();
        drop(HostVfs.create_new(&path).unwrap());

        let (first, second, writer) = (open(), open(), open());
        first.lock(Shared).unwrap();
        second.lock(Shared).unwrap();
        assert_eq!(writer.lock(Exclusive).unwrap_err().kind(), ErrorKind::WouldBlock);
        drop((first, second));
        writer.lock(Exclusive).unwrap();
        assert_eq!(open().lock(Exclusive).unwrap_err().kind(), ErrorKind::WouldBlock);
        assert_eq!(open().lock(Shared).unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(writer);
        open().lock(Shared).unwrap();
    }

    #[test]
    fn a_writer_that_becomes_a_reader_lets_readers_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let open = || HostVfs.open(&path, Access::ReadWrite).unwrap();
        drop(HostVfs.create_new(&path).unwrap());
        let (first, second) = (open(), open());
        first.lock(Exclusive).unwrap();
        assert_eq!(second.lock(Shared).unwrap_err().kind(), ErrorKind::WouldBlock);
        first.lock(Shared).unwrap();
        second.lock(Shared).unwrap();
        assert_eq!(open().lock(Exclusive).unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(second);
        first.lock(Exclusive).unwrap();
        // The registry has a lock of its own.
        let other = open();
        other.lock_registry().unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                first.lock_registry().unwrap();
                sender.send("second").unwrap();
            });
            sender.send("first").unwrap();
            other.unlock_registry().unwrap();
        });
        assert_eq!(receiver.try_iter().collect::<Vec<_>>(), ["first", "second"]);
    }

    /// A child has a copy of every descriptor from its fork to its exec: closing ours alone leaves the lock with it.
    #[test]
    fn a_lock_ends_with_its_handle_while_programs_are_started() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        drop(HostVfs.create_new(&path).unwrap());
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::SeqCst) {
                    let _ = std::process::Command::new("/proc/self/no-such-program").status();
                }
            });
            let results: Vec<_> = (0..2000)
                .map(|_| {
                    HostVfs.open(&path, Access::ReadWrite).unwrap().lock(Exclusive).map_err(|e| e.kind())
                })
                .collect();
            done.store(true, std::sync::atomic::Ordering::SeqCst);
            assert!(results.iter().all(Result::is_ok));
        });
    }
}
