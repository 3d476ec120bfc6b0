//! Layers as one disk: the parents of a differencing layer, found and read.
//!
//! ```text
//! leaf (layer::Layer, the only one that is written to)
//!   │ what it does not hold
//!   ▼
//! Parents ── flat map ──▶ the one parent that holds a block, or its runs ──▶ pread
//!                └ first touch ──▶ every parent asked from the top down
//! ```
//!
//! Parents never change while a chain is open, so what the flat map says stays true, and a read asks one parent for each run
//! whatever the depth. The leaf is looked at first and is not part of the map. When a running disk gets a new leaf, the old one
//! becomes a parent and is folded into the map.

mod candidates;
mod commit;
mod create;
mod decision;
mod descriptors;
mod fixed_leaf;
mod flat;
mod leaf;
mod locate;
mod nearby;
mod open;
mod open_layer;
mod parent;
mod parents;
mod registry;
mod runs;
mod source;

pub(crate) use commit::{
    exchange, open_for_maintenance, open_leaf, remove_child, snapshot_name, sync_folder,
    with_recovered_layers,
};
pub(crate) use create::{check_registry, create_child, register, seal_parent, unregister};
pub(crate) use decision::{commit_if_sealed, decide};
pub(crate) use descriptors::bound;
pub(crate) use fixed_leaf::{is_noted_in_child, unfinished_over_fixed};
pub use leaf::SnapshotName;
pub(crate) use leaf::{Leaf, snapshot_of, snapshot_path};
pub(crate) use locate::{ParentPolicy, claimed_path, folder};
pub(crate) use nearby::{NearbyChild, children_of};
pub(crate) use open::{ChildClaims, link_to, open_from, open_images, open_parents};
pub(crate) use parent::ParentImage;
pub(crate) use parents::Parents;
pub(crate) use registry::{Children, RegistryState, child as registered_child, open_for_registry};
pub(crate) use source::{Found, Source};

use crate::error::Error;
use std::path::Path;

/// More layers than this are refused, when a child is made as well as when a chain is opened.
pub(crate) const MAX_DEPTH: usize = 4096;

/// Why the image at `path` gets no child.
pub(crate) fn too_deep(path: &Path) -> Error {
    let what = format!(
        "{}: its chain has {MAX_DEPTH} layers already, the most that are opened; merge layers or delete snapshots first",
        path.display()
    );
    Error::Invalid { what }
}
