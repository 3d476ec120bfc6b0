//! Points of a chain: each layer is one, with what the disk held when a child was put over it.
//!
//! [`diff()`] tells what changed between two of them, [`export_delta`] makes a differencing disk of that, and
//! [`Disk::snapshot`](crate::Disk::snapshot) takes a snapshot, [`list()`] names those of a disk, [`revert`] goes back to one and
//! [`clone_to`] goes on from one elsewhere. [`relink`] finds a parent again that has moved, [`rebase`] gives a disk another one, and [`merge`] lets it do without some.

mod checkpoint;
mod create;
mod delete;
mod diff;
mod export;
mod list;
mod member;
mod merge;
mod point;
mod pull;
mod rebase;
mod revert;
mod sealing;
mod space;
mod state;
mod tree;

pub use crate::chain::SnapshotName;
pub use checkpoint::{Checkpoint, Participant, StateRef, group};
pub use delete::{Deleted, delete, delete_running};
pub use diff::{Change, ChangeKind, Diff, diff};
pub use export::export_delta;
pub use list::{Listed, list};
pub use member::Member;
pub use merge::{Merged, layers_to_merge, merge, merge_running};
pub use point::snapshot_path;
pub use rebase::{rebase, relink};
pub use revert::{Reverted, clone_to, revert};
pub use state::{resumable, state};
pub use tree::{LayerState, TreeLayer, tree};
