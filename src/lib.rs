//! Disks for virtual machines that survive: VHD files with a journal inside.
//!
//! A write that was flushed is there after any crash. A file that was closed is an ordinary VHD for every other tool;
//! one that was not is refused by them and recovered by the next open.
//!
//! # Lifecycle
//!
//! ```text
//! CreateOptions ──create──▶ clean file ◀──────────────close──────────────┐
//!                              │                                          │
//!                              └──OpenOptions::open──▶ Disk: read, write, flush, discard, …
//!                                      ▲                                  │
//!                              recovery│                                  │ crash, kill, drop without close
//!                                      └────────── dirty file ◀───────────┘
//! ```
//!
//! # How a request goes
//!
//! ```text
//! read     block map ──slot, pinned──▶ pread                        (absent block: zeros, no I/O)
//! write    block map ──slot, pinned──▶ pwrite ──▶ commit            the write counts from here
//!             └absent──▶ allocator: new slot ──▶ pwrite ──▶ commit  publishes the block
//! flush    cut of what was committed ──▶ little data: one durable journal entry with data and map changes
//!                                    └─▶ much data:   fdatasync, then one durable entry with the map changes
//! later    checkpoint: images of pages into the journal, pages in place, fdatasync; freed slots come back
//! ```
//!
//! [`Disk`] is used through `&self` from any number of threads. Errors are one type, [`Error`], with a [`kind`](Error::kind)
//! for programs and an [`errno`](Error::errno) for guests.
//!
//! ```no_run
//! use cowvhd::{CreateOptions, OpenOptions};
//!
//! # fn main() -> cowvhd::Result<()> {
//! let path = std::path::Path::new("vm.vhd");
//! CreateOptions::new(64 << 30).create(path)?;
//! let disk = OpenOptions::new().open(path)?;
//! disk.write_at(&[7; 4096], 0)?;
//! disk.flush()?; // From here on the data survives a crash.
//! disk.close()?; // From here on other VHD tools can open the file.
//! # Ok(())
//! # }
//! ```
//!
//! FORMAT.md describes the file, docs/design.md the code, docs/crash-safety.md what is promised and how it is tested.
//!
//! Features: `sim` adds a simulated medium that loses power at any moment, `defects` known defects to switch on; both are
//! for tests.

#![cfg_attr(
    feature = "schedules",
    allow(clippy::large_enum_variant, reason = "the locks of the schedule checker are large")
)]

mod chain;
pub mod check;
pub mod convert;
#[cfg(feature = "defects")]
pub mod defect;
#[cfg(not(feature = "defects"))]
mod defect;
mod disk;
mod error;
mod ext;
mod journal;
mod layer;
#[cfg(feature = "sim")]
pub mod sim;
pub mod snapshot;
pub mod state;
mod sync;
mod upgrade;
pub mod vfs;
pub mod vhd;

pub use disk::{
    CreateOptions, Disk, DiskInfo, Extent, ExtentKind, ForeignChanges, JournalState, MappedExtent,
    OpenOptions, ParentInfo, ZeroMode,
};
pub use error::{Error, ErrorKind, FormatError, Result};
pub use upgrade::upgrade;
