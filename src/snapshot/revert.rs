//! Going back to a snapshot, and going on from one elsewhere: a new, empty child of it.
//!
//! Order of a revert, each step durable before the next: the child `vm.vhd~new`, complete, under that name · registered in the
//! snapshot, as the `vm.vhd` that it will be · renamed over `vm.vhd`, **the commit** · the old leaf taken out of its parent's
//! registry. What a crash leaves of it before the commit the next revert takes away.

use super::state::{resumable, state_of};
use crate::chain::{self, ChildClaims, Leaf, ParentImage, SnapshotName};
use crate::disk::{CreateOptions, OpenOptions};
use crate::error::{Error, Result};
use crate::ext::FixedParent;
use crate::layer::{CreateParameters, LockedImage, NewImage};
use crate::state::VmState;
use crate::sync::Arc;
use crate::vfs::Access;
use crate::vhd::UniqueId;
use std::path::Path;

/// What a revert means for the states of a disk's VM. The states themselves stay with their snapshots.
#[derive(Debug)]
pub struct Reverted {
    /// The state that was saved with the snapshot: the disk can be resumed with it, as long as nothing is written to it. Or why it
    /// cannot be used. `None` where none was saved.
    pub restored: Option<Result<VmState>>,
    /// The state that the disk could be resumed with before, and cannot any more: that of another snapshot.
    pub dropped: Option<VmState>,
}

/// Makes the disk at `path` show again what its snapshot `name` holds. What was written since the last snapshot is lost. The disk
/// must not be open; the snapshots stay. A crash leaves the disk as it was or reverted, and so does an I/O error.
pub fn revert(options: &OpenOptions, path: &Path, name: &SnapshotName) -> Result<Reverted> {
    let vfs = &options.vfs;
    // Where there is none, or it is not known, there is none to tell of.
    let before = resumable(options, path).ok();
    let old = chain::open_leaf(vfs, Arc::clone(vfs), path, Access::ReadWrite)?;
    let leaf = Leaf::resolve(&**vfs, path)?;
    let snapshot = sealed(options, path, &leaf, name)?;
    let old_id = old.footer().unique_id;
    let old_parent = parent_of(options, &leaf, &old);
    old_parent.as_ref().map_or(Ok(()), chain::check_registry)?;
    let (place, next) = (leaf.path(), leaf.next());
    clear(options, &leaf, &next)?;

    let parameters = CreateParameters {
        size: snapshot.footer().current_size,
        block_bytes: snapshot.block_bytes().unwrap_or(options.child_geometry.0),
        ring_bytes: options.child_geometry.1,
        parent: Some(chain::link_to(&place, &snapshot)?),
    };
    let image = NewImage::new(&**vfs, &next, &parameters)?;
    let id = image.unique_id();
    image.publish()?;
    chain::register(&**vfs, id, &place, &snapshot)?;
    vfs.rename(&next, &place).map_err(|error| Error::io(&place, "putting the new leaf in place", error))?;
    chain::sync_folder(&**vfs, &leaf)?;
    if let Some(parent) = old_parent {
        chain::unregister(&**vfs, old_id, &parent)?;
    }
    let restored = match state_of(vfs, &snapshot) {
        Err(Error::NotFound { .. }) => None,
        state => Some(state),
    };
    let is_restored = |state: &VmState| {
        restored.as_ref().is_some_and(|new| new.as_ref().is_ok_and(|new| new.path() == state.path()))
    };
    let dropped = before.filter(|state| !is_restored(state));
    Ok(Reverted { restored, dropped })
}

/// Makes a new disk at `new`, which must not exist, that starts with what the sealed image at `snapshot` holds. The image notes it,
/// so that it is not taken away under it.
///
/// If `new` is in a folder that is neither that of the snapshot nor above it, whoever opens it has to allow the snapshot's folder
/// ([`OpenOptions::allow_parents_in`]).
pub fn clone_to(options: &OpenOptions, snapshot: &Path, new: &Path) -> Result<()> {
    let file = options
        .vfs
        .open(snapshot, Access::ReadOnly)
        .map_err(|error| Error::io(snapshot, "opening the snapshot", error))?;
    if !ParentImage::open(file, snapshot)?.is_sealed() {
        let what = format!(
            "{}: only a sealed image can be cloned: take a snapshot of it first and clone that",
            snapshot.display()
        );
        return Err(Error::Invalid { what });
    }
    let create = CreateOptions::child_of(snapshot).vfs(Arc::clone(&options.vfs));
    let allowed = options.policy.allowed.iter();
    allowed.fold(create, |create, folder| create.allow_parents_in(folder)).create(new)
}

/// The snapshot, with all that it needs.
fn sealed(options: &OpenOptions, path: &Path, leaf: &Leaf, name: &SnapshotName) -> Result<ParentImage> {
    let snapshot = leaf.snapshot(name);
    let none = |what: String| Error::NotFound { path: path.to_path_buf(), what };
    if options.vfs.identity(&snapshot).is_err() {
        return Err(none(format!("it has no snapshot \"{name}\": {} does not exist", snapshot.display())));
    }
    let images = chain::open_from(&options.vfs, &snapshot, &options.policy)?;
    match images.into_iter().next() {
        Some(image) if image.is_sealed() => Ok(image),
        Some(image) if image.is_fixed() => Err(none(format!(
            "{} is a fixed disk that may be written to: if it is the snapshot, and nobody did so, take that permission away (`chmod a-w`)",
            snapshot.display()
        ))),
        _ => Err(none(format!("{} is no snapshot: it is not sealed", snapshot.display()))),
    }
}

/// The parent of a leaf, if it has one that is found.
fn parent_of(options: &OpenOptions, leaf: &Leaf, image: &LockedImage) -> Option<ParentImage> {
    let claims = ChildClaims {
        path: &leaf.path(),
        file: &**image.file(),
        footer: image.footer(),
        header: image.header()?,
        lineage: image.lineage()?,
    };
    chain::open_images(&options.vfs, &claims, &options.policy).ok()?.into_iter().next()
}

/// Takes away what a revert that was cut has left. Nobody else makes this file while the leaf is locked.
fn clear(options: &OpenOptions, leaf: &Leaf, next: &Path) -> Result<()> {
    let vfs = &options.vfs;
    if vfs.identity(next).is_err() {
        return Ok(());
    }
    let left = LockedImage::new(Arc::clone(vfs), next, Access::ReadOnly)?;
    let is_ours = left.lineage().is_some_and(|lineage| {
        let knows_its_parent =
            lineage.parent_seal.is_some() || lineage.fixed_parent != FixedParent::default();
        knows_its_parent && !lineage.is_sealed()
    });
    if !is_ours {
        return Err(Error::Exists { path: next.to_path_buf() });
    }
    let (id, parent): (UniqueId, _) = (left.footer().unique_id, parent_of(options, leaf, &left));
    vfs.remove(next).map_err(|error| Error::io(next, "removing what a revert left", error))?;
    chain::sync_folder(&**vfs, leaf)?;
    parent.map_or(Ok(()), |parent| chain::unregister(&**vfs, id, &parent))
}
