//! Exports of cowvhd disks over the network: an NBD server.
//!
//! Any [`Backend`] becomes a disk that QEMU, libnbd, the Linux kernel and everything else that speaks NBD can attach.
//! One server serves one disk to many clients at once; a flush on any connection covers what all connections wrote.
//!
//! ```no_run
//! use cowvhd_export::{MemoryBackend, NbdAddress, Server, ServerOptions};
//! use std::sync::Arc;
//!
//! # fn main() -> Result<(), cowvhd_export::ServeError> {
//! let disk = Arc::new(MemoryBackend::new(1 << 30));
//! let server = Server::bind(&NbdAddress::parse("unix:/run/vm.sock")?, disk, ServerOptions::default())?;
//! let handle = server.shutdown_handle(); // for whoever handles SIGTERM
//! let summary = server.run()?; // until handle.shutdown()
//! # drop((handle, summary));
//! # Ok(())
//! # }
//! ```
//!
//! # What is spoken
//!
//! Fixed newstyle negotiation without TLS; every export name is the one disk. Simple and structured replies,
//! `base:allocation` block status, trim, zeroing (also fast, also without holes), cache hints, FUA, flush,
//! `CAN_MULTI_CONN`. Clients that negotiate block sizes are held to 512 bytes; others may access any byte range.
//!
//! # How a request travels
//!
//! ```text
//!             accept                     one per connection                     any thread
//!  listener ─────────> handshake ──────> reader ── check ── budget ──> execute ──────────> output ──> socket
//!                                          │                              │                   │
//!                                          └── slow kind: another thread ─┘                   └── socket full:
//!                                              reads on, or executes                             own thread waits
//! ```
//!
//! `handshake` negotiates; `reader` takes requests off the socket; `execute` judges and executes them on `export`,
//! which turns byte ranges into sectors; `frame` and `output` carry the answers. `connection` says which thread does
//! what, by the experience in `pace` and under the eyes of `monitor`; `pool` holds the threads, `flight` the memory
//! budget.
//!
//! # Hostile clients
//!
//! Nothing a client sends is believed before it was checked. Memory, threads, connections and the time of a handshake
//! or transfer are bounded by [`Limits`]; a client that stalls holds only what is its own share and is disconnected
//! in time. [`serve_stream`] runs the same protocol code on any byte stream, for fuzzers.

mod address;
mod backend;
mod buffer;
mod connection;
mod disk;
mod execute;
mod export;
mod flight;
mod frame;
mod handshake;
mod listener;
mod memory;
mod monitor;
mod options;
mod output;
mod pace;
mod patience;
mod pool;
mod private_socket;
mod protocol;
mod ranges;
mod reader;
mod server;
mod socket;
mod stream;

pub use address::NbdAddress;
pub use backend::{Backend, Errno, Extent, ExtentKind};
pub use memory::MemoryBackend;
pub use options::{Event, Limits, Observer, ServerOptions};
pub use private_socket::PrivateSocket;
pub use server::{ServeError, Server, ShutdownHandle, Summary};
pub use stream::serve_stream;
