//! The VM state that belongs to a snapshot, or that a disk can be resumed with.

use super::SnapshotName;
use super::point::Lineage;
use crate::chain::{Leaf, ParentImage};
use crate::disk::OpenOptions;
use crate::error::{Error, Result};
use crate::layer::{self, Foreign};
use crate::state::{Digest, StateNames, VmState};
use crate::sync::Arc;
use crate::vfs::{Access, Vfs};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Opens the VM state that was saved with the snapshot `name` of the disk at `path`. The state goes with a disk that is an
/// untouched child of that snapshot, and with no other: [`resumable`] opens it for such a disk.
///
/// Fails with [`ErrorKind::NotFound`] where the snapshot has no state, and with [`ErrorKind::StateMismatch`] where the
/// state is not whole, was changed, or is not that of the snapshot, or another program changed the snapshot's structure. What the
/// blobs hold is not looked at: [`VmState::verify`] does that.
///
/// [`ErrorKind::NotFound`]: crate::ErrorKind::NotFound
/// [`ErrorKind::StateMismatch`]: crate::ErrorKind::StateMismatch
pub fn state(options: &OpenOptions, path: &Path, name: &SnapshotName) -> Result<VmState> {
    let leaf = Leaf::resolve(&*options.vfs, path)?;
    let snapshot = leaf.snapshot(name);
    let file = options.vfs.open(&snapshot, Access::ReadOnly);
    let file = file.map_err(|error| Error::io(&snapshot, "opening the snapshot", error))?;
    state_of(&options.vfs, &ParentImage::open(file, &snapshot)?)
}

/// Opens the VM state that the disk at `path` can be resumed with: the one of the snapshot right beneath it. Nothing may have been
/// written to the disk since it was made, be it by the snapshot itself, by a revert or as a clone; else it fails with
/// [`ErrorKind::StateMismatch`]: what the VM remembers of its disk would be wrong. Otherwise as [`state`].
///
/// Fails with [`ErrorKind::InUse`] while somebody has the disk open for writing.
///
/// [`ErrorKind::StateMismatch`]: crate::ErrorKind::StateMismatch
/// [`ErrorKind::InUse`]: crate::ErrorKind::InUse
pub fn resumable(options: &OpenOptions, path: &Path) -> Result<VmState> {
    let lineage = Lineage::open(options, path)?;
    let Some(parent) = lineage.parents.first() else {
        let what = "it is not the child of a snapshot, so that no VM state goes with it".into();
        return Err(Error::NotFound { path: path.to_path_buf(), what });
    };
    let state = state_of(&options.vfs, parent)?;
    let disk = options.clone().read_only(true).open(path)?;
    let written =
        disk.map(0, disk.size())?.into_iter().find(|part| part.depth == 0 && part.file_offset.is_some());
    match written {
        None => Ok(state),
        Some(part) => Err(Error::StateMismatch {
            path: path.to_path_buf(),
            what: format!(
                "the disk was written to (at byte {}, for one) since the VM state of {} was saved",
                part.extent.offset,
                parent.path().display()
            ),
            hint: "revert the disk to that snapshot, or make a clone of it, and resume on that",
        }),
    }
}

/// The state that belongs to a sealed layer.
pub(super) fn state_of(vfs: &Arc<dyn Vfs>, image: &ParentImage) -> Result<VmState> {
    let path = image.path();
    let lineage = image.lineage().unwrap_or_default();
    if !lineage.is_sealed() || lineage.manifest.as_bytes().is_empty() {
        let what = "no VM state was saved with it".into();
        return Err(Error::NotFound { path: path.to_path_buf(), what });
    }
    let file =
        vfs.open(path, Access::ReadOnly).map_err(|error| Error::io(path, "opening the snapshot", error))?;
    if layer::foreign_changes(Arc::clone(vfs), file, path)? == Foreign::StructureChanged {
        return Err(Error::StateMismatch {
            path: path.to_path_buf(),
            what: "another program has written to the snapshot since it was taken".into(),
            hint: "put the file back from a backup, or start the VM from its disk, without the state",
        });
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let names = StateNames::of_manifest(folder, OsStr::from_bytes(lineage.manifest.as_bytes()))?;
    VmState::open(&**vfs, &names, image.unique_id(), lineage.seal_id.0, Digest(lineage.state_digest))
}
