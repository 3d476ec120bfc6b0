//! The snapshots of a disk: the files beside it that say of themselves that they are. A fixed disk cannot say it: it is one by its
//! name, and if nobody may write to it.

use super::point::Lineage;
use super::state::state_of;
use crate::chain::{self, Leaf, ParentImage, SnapshotName};
use crate::disk::OpenOptions;
use crate::error::{Error, Result};
use crate::layer::Headers;
use crate::state::VmState;
use crate::vfs::{Access, File, FileTime};
use crate::vhd::UniqueId;
use std::path::{Path, PathBuf};

/// A snapshot of a disk.
#[derive(Debug)]
pub struct Listed {
    /// Its name.
    pub name: SnapshotName,
    /// Its file.
    pub path: PathBuf,
    /// The unique id of that image.
    pub unique_id: UniqueId,
    /// When it was taken.
    pub taken: FileTime,
    /// Bytes of the medium that the file occupies: what was written between the snapshot before and this one.
    pub allocated_bytes: u64,
    /// How many layers it lies below the disk as it is now; `None` where the disk no longer stands on it.
    pub depth: Option<u32>,
    /// The VM state that was saved with it, if any; or why it cannot be used.
    pub state: Option<Result<VmState>>,
}

/// The snapshots of the disk at `path`, in the order in which they were taken. Also while the disk is in use. Files that cannot be
/// read are left out: a check says what is wrong with them.
pub fn list(options: &OpenOptions, path: &Path) -> Result<Vec<Listed>> {
    let vfs = &options.vfs;
    let leaf = Leaf::resolve(&**vfs, path)?;
    // The disk may stand on less than it once did.
    let chain: Vec<UniqueId> =
        Lineage::open(options, path)?.parents.iter().map(ParentImage::unique_id).collect();
    let mut prefix = Path::new(leaf.name()).file_stem().unwrap_or_default().to_os_string();
    prefix.push("@");
    let names = vfs
        .files(leaf.folder(), &prefix)
        .map_err(|error| Error::io(leaf.folder(), "listing the folder", error))?;
    let mut found = Vec::new();
    for file_name in names {
        let path = leaf.folder().join(&file_name);
        let Ok(file) = vfs.open(&path, Access::ReadOnly) else { continue };
        let Ok(image) = ParentImage::open(file, &path) else { continue };
        let lineage = image.lineage().unwrap_or_default();
        let name = match image.is_fixed() {
            true => chain::snapshot_of(&leaf.path(), &file_name),
            false => chain::snapshot_name(&lineage),
        };
        let Some(name) = name else { continue };
        // A copy under another name is a snapshot of nothing.
        if !image.is_sealed() || leaf.snapshot(&name) != path {
            continue;
        }
        let handle = vfs
            .open(&path, Access::ReadOnly)
            .map_err(|error| Error::io(&path, "opening the snapshot", error))?;
        let depth = chain.iter().position(|id| *id == image.unique_id());
        found.push(Listed {
            taken: taken(&*handle, &image)?,
            allocated_bytes: handle
                .allocated_bytes()
                .map_err(|error| Error::io(&path, "asking for its space", error))?,
            depth: depth.and_then(|depth| u32::try_from(depth + 1).ok()),
            unique_id: image.unique_id(),
            state: (!lineage.manifest.as_bytes().is_empty()).then(|| state_of(vfs, &image)),
            name,
            path,
        });
    }
    found.sort_by(|one, other| (one.taken, &one.name).cmp(&(other.taken, &other.name)));
    Ok(found)
}

/// When a snapshot was taken.
fn taken(file: &dyn File, image: &ParentImage) -> Result<FileTime> {
    let path = image.path();
    if image.is_fixed() {
        return file.modified().map_err(|error| Error::io(path, "asking for the modification time", error));
    }
    // As the seal says: a crash while a child was noted in it may have changed the file's own time.
    let superblock = Headers::read(file, path)?.decide(path)?.superblock;
    Ok(superblock.map(|(superblock, _)| superblock.fingerprint.modified).unwrap_or_default())
}
