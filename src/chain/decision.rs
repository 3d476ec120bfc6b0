//! Whether a checkpoint was committed: its manifest's name is the commit, and the one name that it has before is what everybody
//! who could give it needs.
//!
//! The disks of a checkpoint may be open in several processes. Each of them can end at any time, and whoever opens its disk then has
//! to know for good what the others will say. So an answer *no* is made true first: the manifest's temporary name is taken away. Of a
//! rename and a removal of one name one alone succeeds. An answer *yes* is made durable before anything is built on it.

use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::layer::{Headers, StateLink};
use crate::state::{self, Digest, ManifestDisk, StateNames, read_manifest};
use crate::vfs::{Access, Vfs};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Whether the checkpoint that a seal in `folder` names was committed; from here on it is or never will be.
pub(crate) fn decide(vfs: &dyn Vfs, folder: &Path, link: &StateLink) -> Result<bool> {
    let (name, digest) = (link.manifest.as_bytes(), link.digest);
    if !state::is_published(vfs, folder, name, digest)? {
        if defect::active(Defect::UndecidedCheckpoint) {
            return Ok(false);
        }
        let path = StateNames::of_manifest(folder, OsStr::from_bytes(name))?.new_manifest();
        match vfs.remove(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(&path, "ending a checkpoint that was not committed", error));
            }
            _ => {}
        }
        // It may have got its name in between.
        if !state::is_published(vfs, folder, name, digest)? {
            return Ok(false);
        }
    }
    // Whoever gave it the name may have been killed before that was durable.
    if !defect::active(Defect::CommitFromCache) {
        vfs.sync_dir(folder)
            .map_err(|error| Error::io(folder, "making the manifest's name durable", error))?;
    }
    Ok(true)
}

/// Commits the checkpoint that a seal in `folder` names in place of whoever should have, if all its disks are sealed for it; else it
/// does nothing. Nobody who is still about to commit it, or to end it, is disturbed.
pub(crate) fn commit_if_sealed(vfs: &dyn Vfs, folder: &Path, link: &StateLink) -> Result<()> {
    let names = StateNames::of_manifest(folder, OsStr::from_bytes(link.manifest.as_bytes()))?;
    let Ok(manifest) = read_manifest(vfs, &names.new_manifest(), Digest(link.digest)) else { return Ok(()) };
    match manifest.disks.iter().all(|disk| is_sealed(vfs, folder, disk, link)) {
        true => names.publish(vfs),
        false => Ok(()),
    }
}

/// Whether a disk is sealed for a checkpoint, durably: the file loses its permission to be written when all else is on the medium
/// (`layer/seal.rs`). Where a file system knows no permissions it never is.
fn is_sealed(vfs: &dyn Vfs, folder: &Path, disk: &ManifestDisk, link: &StateLink) -> bool {
    let path = folder.join(OsStr::from_bytes(&disk.file_name));
    let Ok(file) = vfs.open(&path, Access::ReadOnly) else { return false };
    let Ok(decision) = Headers::read(&*file, &path).and_then(|headers| headers.decide(&path)) else {
        return false;
    };
    let Some((superblock, _)) = decision.superblock else { return false };
    let lineage = superblock.lineage;
    let is_for_it = decision.footer.unique_id == disk.disk_id
        && lineage.seal_id.0 == disk.seal_id
        && lineage.state_digest == link.digest
        && lineage.manifest == link.manifest;
    is_for_it && (file.is_read_only().unwrap_or(false) || defect::active(Defect::CommitBeforeDurableSeals))
}
