//! A fixed disk as a leaf that gets a snapshot. It has no place for a note, a registry or a seal:
//!
//! - The note that the snapshot is under way stands **in the child**, until the child is the leaf: its own id as the child's, and the
//!   snapshot's name. So a child that has it was never the leaf, and nothing that was promised to anybody is in it.
//! - The seal is the file's **mode**: nobody may write to it. It is set when the child has its name. So a leaf that nobody may write to
//!   has such a child beside it, or is a parent.
//! - What the child remembers of the fixed disk, length and time, shows who wrote to it all the same.
//! - Nobody knows which other disks are made over it. So it is never removed.
//!
//! | `vm.vhd` | a child of it with a note | open for writing |
//! |---|---|---|
//! | fixed | at `vm@NAME.vhd` or `vm@NAME.vhd~new` | undo: the mode, durably; a second name `vm@NAME.vhd` of the disk; the child's name |
//! | fixed, nobody may write to it | nowhere | refused |
//! | the child | itself | committed: the note goes |

use super::commit::{decision_at, remove_child, snapshot_name, sync_folder};
use super::leaf::{Leaf, SnapshotName};
use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::ext::Lineage;
use crate::layer::{self, LockedImage};
use crate::vfs::Vfs;
use crate::vhd::{DiskType, UniqueId};
use std::path::Path;

/// Sees to it that a fixed disk which is open for writing and locked may be written to.
pub(super) fn settle_fixed(vfs: &dyn Vfs, image: &LockedImage) -> Result<()> {
    let (file, path) = (&**image.file(), image.path());
    let leaf = Leaf::resolve(vfs, path)?;
    let left = unfinished_over_fixed(vfs, &leaf, image.footer().unique_id)?;
    if left.is_empty() {
        return match layer::is_protected(file, path)? {
            true => Err(layer::fixed_refusal(path)),
            false => Ok(()),
        };
    }
    // First of all: without a child it would be taken for a parent.
    if !defect::active(Defect::FixedChildGoesFirst) {
        layer::set_protected(file, path, false)?;
    }
    for (name, child) in left {
        let snapshot = leaf.snapshot(&name);
        if file.identity().is_ok_and(|this| vfs.identity(&snapshot).is_ok_and(|other| this == other)) {
            vfs.remove(&snapshot).map_err(|error| {
                Error::io(&snapshot, "removing the name of an unfinished snapshot", error)
            })?;
            sync_folder(vfs, &leaf)?;
        }
        remove_child(vfs, &leaf, &name, child)?;
    }
    match defect::active(Defect::FixedChildGoesFirst) {
        true => layer::set_protected(file, path, false),
        false => Ok(()),
    }
}

/// The snapshots of a leaf, the fixed disk `id`, that were begun and are not committed, each with its child.
pub(crate) fn unfinished_over_fixed(
    vfs: &dyn Vfs,
    leaf: &Leaf,
    id: UniqueId,
) -> Result<Vec<(SnapshotName, UniqueId)>> {
    let mut prefix = Path::new(leaf.name()).file_stem().unwrap_or_default().to_os_string();
    prefix.push("@");
    let names = vfs
        .files(leaf.folder(), &prefix)
        .map_err(|error| Error::io(leaf.folder(), "looking for a snapshot that was cut", error))?;
    let mut unfinished = Vec::new();
    for name in names {
        let path = leaf.folder().join(name);
        let Some(decision) = decision_at(vfs, &path)? else { continue };
        let (child, lineage) = (decision.footer.unique_id, decision.lineage());
        let is_child = decision.footer.disk_type == DiskType::Differencing
            && decision.header.parent_unique_id == id
            && lineage.parent_id == id;
        let Some(name) = snapshot_name(&lineage) else { continue };
        let is_here = [leaf.snapshot(&name), leaf.waiting_child(&name)].contains(&path);
        if is_child && is_here && is_noted_in_child(&lineage, child) {
            unfinished.push((name, child));
        }
    }
    Ok(unfinished)
}

/// Whether a layer with this lineage and id says of itself that it was made by a snapshot of a fixed disk, and has not been the leaf.
pub(crate) fn is_noted_in_child(lineage: &Lineage, id: UniqueId) -> bool {
    lineage.has_snapshot_under_way() && lineage.child_id == id
}
