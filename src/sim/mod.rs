//! A simulated medium that loses power at any moment, for tests of cowvhd and of programs that use it (feature `sim`).
//!
//! [`SimVfs`] is a [`Vfs`](crate::vfs::Vfs): give it to [`CreateOptions`](crate::CreateOptions) and
//! [`OpenOptions`](crate::OpenOptions), run a workload on the disk, and note in a [`History`] what was written and flushed.
//! Every sync is a [`CrashPoint`]; each state it may leave opens as another `SimVfs`, and the history says whether what the
//! disk then shows is allowed.

mod crash;
mod fates;
mod faults;
mod file;
mod history;
mod names;
mod pages;
mod rng;
mod vfs;

pub use crash::{Bounds, CrashPoint, CrashState};
pub use fates::{BadFates, Fates};
pub use faults::{Fault, FaultPlan, Operation};
pub use history::{History, Violation};
pub use rng::Rng;
pub use vfs::{Counts, FileSystem, Hook, SimVfs, Underway};
