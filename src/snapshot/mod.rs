//! Points of a chain: each layer is one, with what the disk held when a child was put over it.
//!
//! [`diff()`] tells what changed between two of them.

mod diff;
mod point;

pub use diff::{Change, ChangeKind, Diff, diff};
pub use point::snapshot_path;
