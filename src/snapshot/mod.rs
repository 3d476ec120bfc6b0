//! Points of a chain: each layer is one, with what the disk held when a child was put over it.
//!
//! [`diff()`] tells what changed between two of them, [`export_delta`] makes a differencing disk of that, and
//! [`relink`] finds a parent again that has moved, [`rebase`] gives a disk another one, and [`merge`] lets it do without some.

mod create;
mod diff;
mod export;
mod merge;
mod point;
mod pull;
mod rebase;

pub use crate::chain::SnapshotName;
pub use diff::{Change, ChangeKind, Diff, diff};
pub use export::export_delta;
pub use merge::{Merged, merge};
pub use point::snapshot_path;
pub use rebase::{rebase, relink};
