//! A listening Unix socket that only its owner can connect to, and that goes when it is dropped.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

const BACKLOG: i32 = 128;

/// A listening Unix socket at a path.
#[derive(Debug)]
pub struct PrivateSocket {
    socket: OwnedFd,
    path: PathBuf,
    /// The device and inode of the path: another server's socket at the same path is not ours to remove.
    bound: (u64, u64),
}

impl PrivateSocket {
    /// Listens at `path`; only the owner may connect, from the first moment on. Fails with `AddrInUse` where the path is taken;
    /// with `replace_stale`, a socket that nobody listens on is removed first.
    pub fn bind(path: &Path, replace_stale: bool) -> io::Result<Self> {
        if replace_stale {
            remove_stale(path)?;
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        let listening = fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .and_then(|()| Ok(rustix::net::listen(&socket, BACKLOG)?))
            .and_then(|()| fs::symlink_metadata(path));
        match listening {
            Ok(found) => {
                let bound = (found.dev(), found.ino());
                Ok(PrivateSocket { socket, path: path.to_path_buf(), bound })
            }
            Err(error) => {
                let _ = fs::remove_file(path);
                Err(error)
            }
        }
    }

    /// The next client; `None` once `stop` can be read.
    pub fn accept(&self, stop: &UnixStream) -> io::Result<Option<UnixStream>> {
        Ok(accept(self.socket.as_fd(), stop)?.map(UnixStream::from))
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for PrivateSocket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.bound) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The next client of a listening socket that does not block; `None` once `stop` can be read.
pub(crate) fn accept(socket: BorrowedFd<'_>, stop: &UnixStream) -> io::Result<Option<OwnedFd>> {
    loop {
        let mut sources = [PollFd::new(&socket, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut sources, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !sources[1].revents().is_empty() {
            return Ok(None);
        }
        match rustix::net::accept_with(socket, SocketFlags::CLOEXEC) {
            Ok(client) => return Ok(Some(client)),
            Err(error) => match error {
                // The client left before it was accepted, or there is none.
                rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED => {}
                error => return Err(error.into()),
            },
        }
    }
}

/// Removes a socket that nobody listens on; anything else at that path is left for `bind` to complain about.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {}
        _ => return Ok(()),
    }
    // Without waiting: of a server that is stopped the queue may be full.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let asking = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&asking, &SocketAddrUnix::new(path)?) {
        Err(rustix::io::Errno::CONNREFUSED) => fs::remove_file(path),
        _ => Ok(()),
    }
}
