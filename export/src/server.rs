//! The server: accepts clients within its limits, and ends in good order.

use crate::address::NbdAddress;
use crate::backend::Backend;
use crate::buffer::BufferPool;
use crate::connection::Connection;
use crate::export::Export;
use crate::flight::Total;
use crate::listener::Listener;
use crate::monitor::Monitor;
use crate::options::{Event, ServerOptions, from_now};
use crate::pace::Pace;
use crate::pool::{Pool, Task};
use crate::protocol::MAX_PAYLOAD_BYTES;
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::fd::OwnedFd;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The pause after the system refused to accept a client, for lack of descriptors as a rule.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long connections that were cut have to get out of the way.
const CUT_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a server could not start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// An address that cannot be understood.
    #[error("cannot listen on \"{address}\": {why}")]
    Address {
        /// The address as given.
        address: String,
        /// What is wrong with it.
        why: String,
    },
    /// The system refused to listen.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address.
        address: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The address can be reached from other machines, and that was not allowed.
    #[error(
        "{address} can be reached from other machines, without password or encryption; \
         allow remote clients explicitly or use a loopback address"
    )]
    RemoteNotAllowed {
        /// The address.
        address: String,
    },
    /// The backend's size cannot be exported.
    #[error("a disk of {size_bytes} bytes cannot be exported: its size must be a multiple of 512")]
    Size {
        /// The size.
        size_bytes: u64,
    },
    /// The system refused something the server needs to run.
    #[error("cannot serve: {0}")]
    Run(#[from] io::Error),
}

/// What a server did, once it has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// Clients accepted.
    pub connections: u64,
    /// Connections that were cut because their requests did not finish within the drain timeout.
    pub cut: usize,
    /// Threads that were still inside the backend when the server gave up waiting for them. If this is not 0, requests
    /// may still change the disk.
    pub unfinished: usize,
}

/// What the connections share.
pub(crate) struct Shared {
    pub(crate) export: Export,
    pub(crate) options: ServerOptions,
    pub(crate) pace: Pace,
    pub(crate) pool: Arc<Pool>,
    pub(crate) total: Arc<Total>,
    pub(crate) monitor: Monitor,
    pub(crate) busy_workers: AtomicUsize,
    draining: AtomicBool,
    connections: Mutex<Vec<Arc<Connection>>>,
    removed: Condvar,
}

impl Shared {
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    pub(crate) fn observe(&self, event: impl FnOnce() -> Event) {
        if let Some(observer) = &self.options.observer {
            observer(&event());
        }
    }

    pub(crate) fn connections(&self) -> Vec<Arc<Connection>> {
        self.connections.lock().clone()
    }

    pub(crate) fn remove(&self, number: u64) {
        let mut connections = self.connections.lock();
        if let Some(at) = connections.iter().position(|other| other.number == number) {
            // In order of arrival: the oldest first.
            let removed = connections.remove(at);
            drop(connections);
            drop(removed);
            self.removed.notify_all();
        }
    }

    /// Waits until a connection that was cut is gone, and drops it from the list if it takes too long.
    fn await_removal(&self, number: u64) -> MutexGuard<'_, Vec<Arc<Connection>>> {
        let deadline = Instant::now() + CUT_TIMEOUT;
        let mut connections = self.connections.lock();
        while connections.iter().any(|other| other.number == number) {
            if self.removed.wait_until(&mut connections, deadline).timed_out() {
                connections.retain(|other| other.number != number);
            }
        }
        connections
    }

    /// Waits until no connection is left or `deadline` passes; returns how many are.
    fn wait_for_connections(&self, deadline: Instant) -> usize {
        let mut connections = self.connections.lock();
        while !connections.is_empty() {
            if self.removed.wait_until(&mut connections, deadline).timed_out() {
                break;
            }
        }
        connections.len()
    }
}

/// Stops a server from any thread, or from a signal handler's thread; clones stop the same server.
#[derive(Clone)]
pub struct ShutdownHandle {
    shared: Arc<Shared>,
    stop: Arc<UnixStream>,
}

impl ShutdownHandle {
    /// Asks the server to end and returns at once: it accepts nobody any more, reads no further request, finishes
    /// those it has begun, answers them and closes. [`Server::run`] returns when that is done.
    pub fn shutdown(&self) {
        self.shared.draining.store(true, Ordering::Release);
        // If its buffer is full the server has been told already.
        let _ = self.stop.set_nonblocking(true);
        let _ = (&*self.stop).write(&[0]);
    }

    /// Clients connected now.
    pub fn connections(&self) -> usize {
        self.shared.connections.lock().len()
    }
}

/// An NBD server for one disk, listening but not yet serving.
pub struct Server {
    listener: Listener,
    shared: Arc<Shared>,
    stop: Arc<UnixStream>,
    stopped: UnixStream,
}

impl Server {
    /// Listens on `address`. Clients can connect from now on and are served by [`run`](Server::run).
    ///
    /// A Unix socket is made accessible to its owner only and removed when the server ends.
    ///
    /// # Errors
    ///
    /// An address that is in use, not allowed or not usable, or a disk of an odd size.
    pub fn bind(
        address: &NbdAddress,
        backend: Arc<dyn Backend>,
        options: ServerOptions,
    ) -> Result<Server, ServeError> {
        let size_bytes = backend.size_bytes();
        if !size_bytes.is_multiple_of(512) {
            return Err(ServeError::Size { size_bytes });
        }
        let listener = Listener::bind(address, &options)?;
        let (stop, stopped) = UnixStream::pair()?;
        // The largest request occupies one and a bit of its size.
        let total = Total::new(options.limits.total_bytes.max(4 * MAX_PAYLOAD_BYTES as usize));
        let buffers = BufferPool::new(options.limits.idle_buffer_bytes);
        let shared = Arc::new(Shared {
            export: Export::new(backend, buffers),
            options,
            pace: Pace::new(),
            pool: Arc::default(),
            total,
            monitor: Monitor::default(),
            busy_workers: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            connections: Mutex::default(),
            removed: Condvar::new(),
        });
        Ok(Server { listener, shared, stop: Arc::new(stop), stopped })
    }

    /// Where the server listens; a TCP port of 0 has become the one the system chose.
    pub fn local_address(&self) -> &NbdAddress {
        self.listener.address()
    }

    /// A handle that ends [`run`](Server::run).
    pub fn shutdown_handle(&self) -> ShutdownHandle {
        ShutdownHandle { shared: Arc::clone(&self.shared), stop: Arc::clone(&self.stop) }
    }

    /// Serves clients until [`ShutdownHandle::shutdown`]. Afterwards nothing of the server uses the backend any more
    /// (unless [`Summary::unfinished`] says so), and the caller flushes and closes the disk.
    ///
    /// # Errors
    ///
    /// The system refused a thread or broke the listening socket. Clients have been disconnected then too.
    pub fn run(self) -> Result<Summary, ServeError> {
        let Server { listener, shared, stop: _stop, stopped } = self;
        let watched = Arc::clone(&shared);
        let monitor = std::thread::Builder::new()
            .name("nbd-monitor".into())
            .spawn(move || watched.monitor.run(&watched))?;
        let mut accepted = 0;
        let result = loop {
            match listener.accept(&stopped) {
                Ok(Some(socket)) => {
                    accepted += 1;
                    admit(&shared, accepted, socket);
                }
                Ok(None) => break Ok(()),
                Err(error) if is_fatal(&error) => break Err(error),
                Err(error) => {
                    shared.observe(|| Event::Refused { reason: format!("cannot accept: {error}") });
                    Listener::pause(&stopped, ACCEPT_PAUSE);
                }
            }
        };
        drop(listener);
        let (cut, unfinished) = drain(&shared);
        shared.monitor.end();
        let _ = monitor.join();
        result?;
        Ok(Summary { connections: accepted, cut, unfinished })
    }
}

/// Whether accepting will not get better by waiting.
fn is_fatal(error: &io::Error) -> bool {
    const EBADF: i32 = 9;
    const EINVAL: i32 = 22;
    const ENOTSOCK: i32 = 88;
    matches!(error.raw_os_error(), Some(EBADF | EINVAL | ENOTSOCK))
}

/// Lets a client in, if need be in the place of one that has been dawdling over its handshake.
fn admit(shared: &Arc<Shared>, number: u64, socket: OwnedFd) {
    let refuse = |reason: String| shared.observe(|| Event::Refused { reason });
    let max = shared.options.limits.max_connections;
    let connection = Connection::new(number, socket, Arc::clone(shared));
    {
        let mut connections = shared.connections.lock();
        if connections.len() >= max {
            let Some(evicted) = connections.iter().find(|other| other.in_handshake()).cloned() else {
                drop(connections);
                return refuse(format!("{max} clients are connected already"));
            };
            drop(connections);
            evicted.cut();
            refuse(format!("connection {} made room, still in its handshake among {max}", evicted.number));
            // Its thread goes first: else those who connect fastest have as many threads as they like.
            connections = shared.await_removal(evicted.number);
        }
        connections.push(Arc::clone(&connection));
    }
    shared.observe(|| Event::Connected { connection: number });
    if shared.pool.submit(Task::Greet(connection)).is_err() {
        shared.remove(number);
        refuse("the system has no thread for another client".into());
    }
}

/// Ends all connections: those with requests in flight when they are done or out of time.
fn drain(shared: &Arc<Shared>) -> (usize, usize) {
    shared.draining.store(true, Ordering::Release);
    let deadline = from_now(shared.options.limits.drain_timeout);
    for connection in shared.connections() {
        if connection.in_handshake() {
            connection.cut();
        }
        connection.stop_reading();
    }
    let cut = shared.wait_for_connections(deadline);
    shared.total.close();
    for connection in shared.connections() {
        connection.cut();
        connection.flight.abandon();
    }
    shared.wait_for_connections(Instant::now() + CUT_TIMEOUT);
    shared.pool.close();
    let unfinished = shared.pool.wait_until(deadline.max(Instant::now() + CUT_TIMEOUT));
    (cut, unfinished)
}
