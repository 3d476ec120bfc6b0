//! What a server may be told: limits, permissions and where events go.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How a server behaves; the defaults suit a hypervisor's disk.
#[derive(Clone, Default)]
pub struct ServerOptions {
    /// Allows TCP addresses off the loopback interface. The protocol as served here has neither passwords nor
    /// encryption: whoever reaches the port owns the disk.
    pub allow_remote: bool,
    /// Replaces a Unix socket that nobody listens on. Only for callers that already exclude a second server, such as by
    /// holding the image's lock.
    pub replace_stale_socket: bool,
    /// Bounds on what clients may take.
    pub limits: Limits,
    /// Called with what happens; see [`Event`]. Must not block.
    pub observer: Option<Observer>,
}

impl fmt::Debug for ServerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerOptions")
            .field("allow_remote", &self.allow_remote)
            .field("replace_stale_socket", &self.replace_stale_socket)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// A function that is told of events.
pub type Observer = Arc<dyn Fn(&Event) + Send + Sync>;

/// Something worth a line in a log.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A client connected.
    Connected {
        /// Counts connections of this server, from 1.
        connection: u64,
    },
    /// A client was turned away, or dropped while still in its handshake, because there were too many.
    Refused {
        /// Why.
        reason: String,
    },
    /// A connection ended.
    Disconnected {
        /// Which.
        connection: u64,
        /// Why.
        reason: String,
    },
    /// The backend failed a request; the client was told the errno.
    RequestFailed {
        /// On which connection.
        connection: u64,
        /// Command, offset and length: `write offset=4096 length=512`.
        request: String,
        /// The backend's error.
        error: crate::backend::Errno,
    },
}

/// Bounds on what clients may take, all of them together and each alone.
///
/// The memory that clients can make the server hold is at most `total_bytes`, `idle_buffer_bytes`, 0.5 MiB for each
/// connection and 1 MiB for each request that is being executed. The system's socket buffers come on top, about 1 MiB
/// for a Unix socket whose client fetches nothing. Threads: two for each connection, and `workers`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once. When they are used up, a newcomer takes the place of the oldest client that has not
    /// finished its handshake; if all have, the newcomer is turned away.
    pub max_connections: usize,
    /// Payloads and answers in flight on one connection, in bytes.
    pub connection_bytes: usize,
    /// Payloads and answers in flight on all connections together, in bytes; not counted are the first 256 KiB of each.
    /// At least 128 MiB, whatever is set: four requests of the maximum size.
    pub total_bytes: usize,
    /// Slow requests of one connection that are executed at once.
    pub workers_per_connection: usize,
    /// Slow requests of all connections that are executed at once.
    pub workers: usize,
    /// The time a client has for its handshake.
    pub handshake_timeout: Duration,
    /// The time a client may leave a transfer (the rest of a request, or the answers it does not fetch) without
    /// progress, and by which it may be behind `min_bytes_per_second`. A client with nothing under way may be idle
    /// forever.
    pub stall_timeout: Duration,
    /// The slowest transfer that is put up with. Being faster for a while does not buy more than `stall_timeout`.
    pub min_bytes_per_second: u64,
    /// The time that requests in flight have to finish when the server shuts down.
    pub drain_timeout: Duration,
    /// Memory kept for reuse when nothing is in flight, in bytes.
    pub idle_buffer_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            max_connections: 128,
            connection_bytes: 64 << 20,
            total_bytes: 256 << 20,
            workers_per_connection: 16,
            workers: 64,
            handshake_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            min_bytes_per_second: 64 << 10,
            drain_timeout: Duration::from_secs(10),
            idle_buffer_bytes: 32 << 20,
        }
    }
}

/// The moment `length` from now, or one that nobody will live to see.
pub(crate) fn from_now(length: Duration) -> Instant {
    const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    Instant::now() + length.min(FOREVER)
}
