//! The snapshot commit, as an open finds it: what a crash left of one is finished or undone before a leaf is written to.
//!
//! A snapshot NAME of `vm.vhd` is made in this order, each step durable before the next: a complete child C without a name · in
//! the leaf, as *under way*: {C, NAME} · C in the leaf's registry · C's name `vm@NAME.vhd` · the leaf's seal, which names C and
//! `vm.vhd` · **the two names exchanged**, which is the commit. So `vm.vhd` is always there, and says by itself which of these is
//! true:
//!
//! | `vm.vhd` | C | open for writing |
//! |---|---|---|
//! | not sealed, a snapshot under way | anywhere or nowhere | undo: C's name is taken away, durably; then its registration and the record |
//! | sealed under this name | at `vm@NAME.vhd` | finish: exchange |
//! | sealed under this name | at `vm@NAME.vhd~new` | finish, where names cannot be exchanged: link, rename |
//! | sealed otherwise | | refused |
//!
//! A seal may name the manifest of a VM state, which may be shared by several disks. Then **the manifest's name** is the commit: the
//! exchanges follow, and are finished by whoever opens a disk. As long as there is no such manifest the seal is taken away again,
//! durably, and what is left is a snapshot under way; `decision.rs` sees to it that there never will be one. The state's files go
//! with the rest of it.
//!
//! C's content was never promised to anybody before the exchange was durable, and afterwards C is `vm.vhd`. A read-only open changes
//! nothing: it shows the leaf.
//!
//! A fixed disk has a place for none of this: `fixed_leaf.rs` says what stands in for it.

use super::decision::decide;
use super::fixed_leaf::settle_fixed;
use super::leaf::{Leaf, SnapshotName};
use super::registry::Children;
use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::ext::Lineage;
use crate::layer::{Decision, Headers, Image, LockedImage, StateLink, refusal};
use crate::state::StateNames;
use crate::sync::Arc;
use crate::vfs::{Access, Vfs};
use crate::vhd::UniqueId;
use std::io;
use std::path::{Path, PathBuf};

/// A commit is finished at most once; after that another process is at work.
const MAX_ATTEMPTS: u32 = 4;

/// Opens and locks the image at `path` by way of `image_vfs`; one that is to be written to is a leaf afterwards of which no
/// snapshot is under way.
pub(crate) fn open_leaf(
    vfs: &Arc<dyn Vfs>,
    image_vfs: Arc<dyn Vfs>,
    path: &Path,
    access: Access,
) -> Result<LockedImage> {
    for _ in 0..MAX_ATTEMPTS {
        let mut image = LockedImage::new(Arc::clone(&image_vfs), path, access)?;
        if access == Access::ReadOnly {
            return Ok(image);
        }
        if image.header().is_none() {
            settle_fixed(&**vfs, &image)?;
            return Ok(image);
        }
        let Some(lineage) = image.lineage() else { return Ok(image) };
        if lineage == Lineage::default() {
            return Ok(image);
        }
        let leaf = Leaf::resolve(&**vfs, path)?;
        if lineage.is_sealed() {
            if !finish(&**vfs, &image, &leaf, &lineage)? {
                // Maintenance that was cut would keep its children from being read.
                image.finish_seal()?;
                return Err(refusal(path, &lineage));
            }
            continue;
        }
        if lineage.has_snapshot_under_way() {
            undo(&**vfs, &image, &leaf, &lineage)?;
            image.forget_snapshot();
        }
        // Whoever gave the image its name may have been killed before that was durable; what is flushed from now on must
        // not be lost with it.
        if !defect::active(Defect::NameNotDurable) {
            sync_folder(&**vfs, &leaf)?;
        }
        return Ok(image);
    }
    let what = "its names change again and again: try later".to_string();
    Err(Error::Unsupported { path: path.to_path_buf(), what })
}

/// The same for a change of the image's own metadata that no guest sees: a sealed image is opened, too, and keeps its seal. It has
/// to be closed afterwards.
pub(crate) fn open_for_maintenance(vfs: &Arc<dyn Vfs>, path: &Path) -> Result<LockedImage> {
    match open_leaf(vfs, Arc::clone(vfs), path, Access::ReadWrite) {
        Err(Error::Sealed { .. }) => {
            let open = || LockedImage::new(Arc::clone(vfs), path, Access::ReadWrite);
            open()?.finish_seal()?;
            let mut image = open()?;
            image.maintain();
            Ok(image)
        }
        result => result,
    }
}

/// Does `work`, and recovers the sealed layers that it finds not to be closed: a snapshot was being deleted, and something was copied
/// into the layer over it. Unsealed ones are nobody's to recover but their owner's.
pub(crate) fn with_recovered_layers<T>(vfs: &Arc<dyn Vfs>, mut work: impl FnMut() -> Result<T>) -> Result<T> {
    let mut last = None;
    loop {
        match work() {
            Err(Error::NotClosed { path }) if last.as_ref() != Some(&path) => {
                if !recover_sealed(vfs, &path)? {
                    return Err(Error::NotClosed { path });
                }
                last = Some(path);
            }
            result => return result,
        }
    }
}

/// Recovers a sealed layer; false if it is not sealed.
fn recover_sealed(vfs: &Arc<dyn Vfs>, path: &Path) -> Result<bool> {
    let image = open_for_maintenance(vfs, path)?;
    if !image.lineage().is_some_and(|lineage| lineage.is_sealed()) {
        return Ok(false);
    }
    // What is below does not matter: nothing is read.
    match image.open(|_, _, _| Ok(()))?.0 {
        Image::Dynamic(layer) => layer.close()?,
        Image::Fixed(fixed) => fixed.close()?,
    }
    Ok(true)
}

/// Finishes the commit if this is a leaf that was sealed for one, so that the leaf has to be looked at again; false if not.
fn finish(vfs: &dyn Vfs, image: &LockedImage, leaf: &Leaf, lineage: &Lineage) -> Result<bool> {
    if lineage.leaf_name.as_bytes() != leaf.name().as_encoded_bytes() || lineage.child_id.is_zero() {
        return Ok(false);
    }
    let Some(name) = snapshot_name(lineage) else { return Ok(false) };
    let Some(child) = find_child(vfs, leaf, &name, lineage.child_id)? else { return Ok(false) };
    // The child must not be the leaf before other tools can read its parent.
    if image.finish_seal()? {
        if is_committed(vfs, leaf, lineage)? {
            exchange(vfs, leaf, &name, &child)?;
        } else {
            // What is left then is a snapshot under way. Not the other way round: a sealed leaf without its child is nobody's.
            if defect::active(Defect::UnlinkBeforeUnseal) {
                remove_child(vfs, leaf, &name, lineage.child_id)?;
            }
            image.unseal()?;
        }
    }
    Ok(true)
}

/// Whether the seal counts: it names no VM state, or that is there.
fn is_committed(vfs: &dyn Vfs, leaf: &Leaf, lineage: &Lineage) -> Result<bool> {
    if lineage.manifest.as_bytes().is_empty() || defect::active(Defect::ExchangeWithoutManifest) {
        return Ok(true);
    }
    decide(vfs, leaf.folder(), &StateLink { digest: lineage.state_digest, manifest: lineage.manifest })
}

/// Takes away what there is of a snapshot that was not committed, its VM state included.
fn undo(vfs: &dyn Vfs, image: &LockedImage, leaf: &Leaf, lineage: &Lineage) -> Result<()> {
    if let Some(name) = snapshot_name(lineage) {
        remove_child(vfs, leaf, &name, lineage.child_id)?;
        if let Ok(names) = StateNames::new(&leaf.path(), name.as_str()) {
            names.remove_all(vfs)?;
        }
    }
    Children::of(&**image.file(), image.path())?.remove(lineage.child_id)
}

/// Takes the names of a child away that is not the leaf; durable on return.
pub(crate) fn remove_child(vfs: &dyn Vfs, leaf: &Leaf, name: &SnapshotName, id: UniqueId) -> Result<()> {
    while let Some(child) = find_child(vfs, leaf, name, id)? {
        vfs.remove(&child)
            .map_err(|error| Error::io(&child, "removing the child of an unfinished snapshot", error))?;
    }
    sync_folder(vfs, leaf)
}

/// The name of the snapshot that a layer says it is, or that is under way.
pub(crate) fn snapshot_name(lineage: &Lineage) -> Option<SnapshotName> {
    SnapshotName::new(std::str::from_utf8(lineage.snapshot.as_bytes()).ok()?).ok()
}

/// The child that a commit is about, as long as it is not the leaf.
fn find_child(vfs: &dyn Vfs, leaf: &Leaf, name: &SnapshotName, id: UniqueId) -> Result<Option<PathBuf>> {
    for path in [leaf.snapshot(name), leaf.waiting_child(name)] {
        if decision_at(vfs, &path)?.is_some_and(|decision| decision.footer.unique_id == id) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// What the image at `path` says, if there is one. A file that cannot be read is an error: it may be the child.
pub(super) fn decision_at(vfs: &dyn Vfs, path: &Path) -> Result<Option<Decision>> {
    let file = match vfs.open(path, Access::ReadOnly) {
        // Nothing, or a folder or device.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => {
            return Ok(None);
        }
        file => file.map_err(|error| {
            Error::io(path, "opening what may be the child of an unfinished snapshot", error)
        })?,
    };
    match Headers::read(&*file, path).and_then(|headers| headers.decide(path)) {
        Ok(decision) => Ok(Some(decision)),
        Err(error @ Error::Io { .. }) => Err(error),
        Err(_) => Ok(None),
    }
}

/// Gives the child the leaf's name, and the leaf the snapshot's: the commit, durable on return.
pub(crate) fn exchange(vfs: &dyn Vfs, leaf: &Leaf, name: &SnapshotName, child: &Path) -> Result<()> {
    let (path, snapshot, waiting) = (leaf.path(), leaf.snapshot(name), leaf.waiting_child(name));
    let naming = |error| Error::io(&snapshot, "giving the snapshot its name", error);
    if child == snapshot {
        match vfs.exchange(&path, &snapshot) {
            Ok(()) => return sync_folder(vfs, leaf),
            Err(error) if error.kind() != io::ErrorKind::Unsupported => return Err(naming(error)),
            Err(_) => {}
        }
        // The child goes out of the way first, durably: or a crash could keep the link, and lose the child with its name.
        vfs.rename(&snapshot, &waiting).map_err(naming)?;
        if !defect::active(Defect::ChildNotAside) {
            sync_folder(vfs, leaf)?;
        }
    }
    let is_linked = match (vfs.identity(&snapshot), vfs.identity(&path)) {
        (Ok(snapshot), Ok(leaf)) => snapshot == leaf,
        _ => false,
    };
    if !is_linked {
        vfs.link(&path, &snapshot).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Error::Exists { path: snapshot.clone() },
            _ => naming(error),
        })?;
    }
    // Before the leaf's own name goes.
    if !defect::active(Defect::RenameBeforeLink) {
        sync_folder(vfs, leaf)?;
    }
    vfs.rename(&waiting, &path).map_err(naming)?;
    sync_folder(vfs, leaf)
}

/// Makes the names in a leaf's folder durable.
pub(crate) fn sync_folder(vfs: &dyn Vfs, leaf: &Leaf) -> Result<()> {
    vfs.sync_dir(leaf.folder())
        .map_err(|error| Error::io(leaf.folder(), "making the names in the folder durable", error))
}
