//! What becomes a sealed parent when a snapshot is taken: a layer, which says so itself, or a fixed disk, of which its child and its
//! file's mode say it (`chain/fixed_leaf.rs`).

use crate::chain::Children;
use crate::defect::{self, Defect};
use crate::disk::{OpenOptions, RunningLeaf};
use crate::error::Result;
use crate::ext::{Child, FixedParent, Name};
use crate::layer::{self, Layer, Seal};
use crate::sync::Arc;
use crate::vfs::{File, FileTime};
use crate::vhd::{Footer, UniqueId};

impl RunningLeaf {
    /// Fails where it has no room for a registry: then there are no snapshots.
    pub(super) fn check(&self) -> Result<()> {
        match self {
            RunningLeaf::Layer(layer) => Children::of_layer(layer).map(drop),
            RunningLeaf::Fixed(_) => Ok(()),
        }
    }

    /// The footer.
    pub(super) fn footer(&self) -> &Footer {
        match self {
            RunningLeaf::Layer(layer) => layer.footer(),
            RunningLeaf::Fixed(fixed) => fixed.footer(),
        }
    }

    /// The file.
    pub(super) fn file(&self) -> &Arc<dyn File> {
        match self {
            RunningLeaf::Layer(layer) => layer.file(),
            RunningLeaf::Fixed(fixed) => fixed.file(),
        }
    }

    /// Data bytes of a block, and bytes of the ring, of a child.
    pub(super) fn child_geometry(&self, options: &OpenOptions) -> (u32, u64) {
        match self {
            RunningLeaf::Layer(layer) => (layer.place().block_bytes, layer.place().ring_bytes),
            RunningLeaf::Fixed(_) => options.child_geometry,
        }
    }

    /// What a child is to know of it when it is sealed with this time.
    pub(super) fn as_parent(&self, modified: FileTime) -> FixedParent {
        match self {
            RunningLeaf::Layer(_) => FixedParent::default(),
            RunningLeaf::Fixed(fixed) => {
                FixedParent { file_bytes: fixed.footer().current_size + Footer::SIZE as u64, modified }
            }
        }
    }

    /// Notes, where there is a place for it, that `child` is being made over it; durable on return.
    pub(super) fn begin_snapshot(&self, child: &Layer, name: Name<64>) -> Result<()> {
        let place = match self {
            RunningLeaf::Layer(layer) => layer,
            RunningLeaf::Fixed(_) if defect::active(Defect::FixedChildNotNoted) => return Ok(()),
            RunningLeaf::Fixed(_) => child,
        };
        place.begin_snapshot(child.footer().unique_id, name)
    }

    /// Notes a child in the registry, where there is one; durable on return.
    pub(super) fn register(&self, child: Child) -> Result<()> {
        match self {
            RunningLeaf::Layer(layer) => Children::of_layer(layer)?.add(child),
            RunningLeaf::Fixed(_) => Ok(()),
        }
    }

    /// Does what can be done of a sealing while changes go on. The child has its name.
    pub(super) fn prepare_seal(&self) -> Result<()> {
        match self {
            RunningLeaf::Layer(layer) => layer.reclaim(),
            RunningLeaf::Fixed(fixed) => {
                fixed.flush()?;
                if defect::active(Defect::FixedStaysWritable) {
                    return Ok(());
                }
                layer::set_protected(&**fixed.file(), fixed.path(), true)
            }
        }
    }

    /// Seals it; durable on return. Nothing is written to it any more.
    pub(super) fn seal(&self, seal: &Seal) -> Result<()> {
        match self {
            RunningLeaf::Layer(layer) => layer.seal(seal),
            RunningLeaf::Fixed(fixed) => fixed.seal(seal.modified),
        }
    }

    /// The child has its place: what it notes of the snapshot goes; durable on return.
    pub(super) fn committed(&self, child: &Layer) -> Result<()> {
        match self {
            RunningLeaf::Layer(_) => Ok(()),
            RunningLeaf::Fixed(_) => child.forget_snapshot(),
        }
    }

    /// It is read in another way from now on: whoever wants it gets its lock, as far as readers allow.
    pub(super) fn release(&self) {
        if let RunningLeaf::Fixed(fixed) = self {
            // Dropping the handle would do it, too.
            let _ = fixed.file().unlock();
        }
    }

    /// Goes on without the child, which `remove` takes away.
    pub(super) fn take_back(&self, child: UniqueId, remove: impl FnOnce() -> Result<()>) -> Result<()> {
        match self {
            RunningLeaf::Layer(layer) => {
                remove()?;
                Children::of_layer(layer)?.remove(child)?;
                layer.forget_snapshot()
            }
            RunningLeaf::Fixed(fixed) => {
                layer::set_protected(&**fixed.file(), fixed.path(), false)?;
                remove()
            }
        }
    }
}
