//! Listening sockets: who may reach them, what becomes of a stale one, and waiting for a client or the end.

use crate::address::NbdAddress;
use crate::options::ServerOptions;
use crate::server::ServeError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

const BACKLOG: i32 = 128;
/// Room for several answers in a Unix socket, so that sending seldom waits. The system doubles it for its own
/// structures, may cut it, and a client that fetches nothing ties it up. TCP adapts its buffers by itself.
const SEND_BUFFER_BYTES: usize = 512 << 10;

pub(crate) struct Listener {
    socket: OwnedFd,
    address: NbdAddress,
    /// The Unix socket to remove at the end, by device and inode: another server's socket at the same path is not ours.
    bound: Option<(PathBuf, u64, u64)>,
}

impl Listener {
    pub(crate) fn bind(address: &NbdAddress, options: &ServerOptions) -> Result<Self, ServeError> {
        let failed = |source: io::Error| ServeError::Bind { address: address.to_string(), source };
        match address {
            NbdAddress::Tcp(wanted) => {
                if !wanted.ip().is_loopback() && !options.allow_remote {
                    return Err(ServeError::RemoteNotAllowed { address: address.to_string() });
                }
                let listener = TcpListener::bind(wanted).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let address = NbdAddress::Tcp(listener.local_addr().map_err(failed)?);
                Ok(Listener { socket: listener.into(), address, bound: None })
            }
            NbdAddress::Unix(path) => {
                if options.replace_stale_socket {
                    remove_stale(path).map_err(failed)?;
                }
                let socket = bind_unix(path).map_err(failed)?;
                let bound = fs::symlink_metadata(path).map_err(failed)?;
                let bound = Some((path.clone(), bound.dev(), bound.ino()));
                Ok(Listener { socket, address: address.clone(), bound })
            }
        }
    }

    pub(crate) fn address(&self) -> &NbdAddress {
        &self.address
    }

    /// The next client; `None` once `stop` can be read.
    pub(crate) fn accept(&self, stop: &UnixStream) -> io::Result<Option<OwnedFd>> {
        loop {
            let mut sources = [PollFd::new(&self.socket, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
            match poll(&mut sources, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !sources[1].revents().is_empty() {
                return Ok(None);
            }
            match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC) {
                Ok(socket) => {
                    self.tune(&socket);
                    return Ok(Some(socket));
                }
                Err(error) => match error {
                    // The client left before it was accepted, or there is none.
                    rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED => {}
                    error => return Err(error.into()),
                },
            }
        }
    }

    /// Waits a moment, or until `stop` can be read.
    pub(crate) fn pause(stop: &UnixStream, length: Duration) {
        let length = Timespec { tv_sec: length.as_secs() as i64, tv_nsec: length.subsec_nanos().into() };
        let _ = poll(&mut [PollFd::new(&stop.as_fd(), PollFlags::IN)], Some(&length));
    }

    /// Answers leave at once, and a peer whose machine is gone is noticed. What fails here costs speed only.
    fn tune(&self, socket: &OwnedFd) {
        if let NbdAddress::Tcp(_) = self.address {
            let _ = sockopt::set_tcp_nodelay(socket, true);
            let _ = sockopt::set_socket_keepalive(socket, true);
            let _ = sockopt::set_tcp_keepidle(socket, Duration::from_secs(60));
            let _ = sockopt::set_tcp_keepintvl(socket, Duration::from_secs(10));
            let _ = sockopt::set_tcp_keepcnt(socket, 6);
        } else {
            let _ = sockopt::set_socket_send_buffer_size(socket, SEND_BUFFER_BYTES);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, device, inode)) = &self.bound
            && fs::symlink_metadata(path).is_ok_and(|now| now.dev() == *device && now.ino() == *inode)
        {
            let _ = fs::remove_file(path);
        }
    }
}

/// Binds and listens; only the owner may connect, from the first moment on.
fn bind_unix(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    let listening = fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .and_then(|()| Ok(rustix::net::listen(&socket, BACKLOG)?));
    if let Err(error) = listening {
        let _ = fs::remove_file(path);
        return Err(error);
    }
    Ok(socket)
}

/// Removes a socket that nobody listens on; anything else at that path is left for `bind` to complain about.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {}
        _ => return Ok(()),
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ => Ok(()),
    }
}
