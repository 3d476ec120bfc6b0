//! Listening sockets: who may reach them, and waiting for a client or the end.

use crate::address::NbdAddress;
use crate::options::ServerOptions;
use crate::private_socket::{self, PrivateSocket};
use crate::server::ServeError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::sockopt;
use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Room for several answers in a Unix socket, so that sending seldom waits. The system doubles it for its own
/// structures, may cut it, and a client that fetches nothing ties it up. TCP adapts its buffers by itself.
const SEND_BUFFER_BYTES: usize = 512 << 10;

pub(crate) struct Listener {
    socket: Socket,
    address: NbdAddress,
}

enum Socket {
    Tcp(TcpListener),
    Unix(PrivateSocket),
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
                Ok(Listener { socket: Socket::Tcp(listener), address })
            }
            NbdAddress::Unix(path) => {
                let socket = PrivateSocket::bind(path, options.replace_stale_socket).map_err(failed)?;
                Ok(Listener { socket: Socket::Unix(socket), address: address.clone() })
            }
        }
    }

    pub(crate) fn address(&self) -> &NbdAddress {
        &self.address
    }

    /// The next client; `None` once `stop` can be read.
    pub(crate) fn accept(&self, stop: &UnixStream) -> io::Result<Option<OwnedFd>> {
        let client = private_socket::accept(self.as_fd(), stop)?;
        Ok(client.inspect(|client| self.tune(client)))
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(listener) => listener.as_fd(),
            Socket::Unix(socket) => socket.as_fd(),
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
