//! Deleting a snapshot: what it holds moves up into the one layer over it, so that nothing that anybody sees changes; then its file goes.
//!
//! Order, each step durable before the next: the copies · the layer beneath registers the child · the child names it · the snapshot's
//! registry loses the child · the snapshot is locked, so that it gets no reader and no child any more · the registry of the layer beneath
//! loses the snapshot · the VM state that was saved with it is removed, if it is no other disk's · the file is unlinked. Cut anywhere, the
//! same call does the rest: copies that are there are not made again, and a snapshot that no child names any more is only removed.
//!
//! A fixed disk has no registry: it is never removed, so that nobody can lose it. With the child's new parent its deletion is done.

use super::merge::{merge_image, merge_into_leaf, merge_layer};
use super::point::{Lineage, snapshot_path};
use crate::chain::{self, Children, Leaf, ParentImage, SnapshotName};
use crate::convert::Progress;
use crate::disk::{Disk, OpenOptions, Origin};
use crate::error::{Error, Result};
use crate::ext::{self, Child};
use crate::layer::{self, Headers};
use crate::state::{Digest, ManifestDisk, StateNames, read_manifest};
use crate::vfs::{Access, File, Vfs};
use crate::vhd::UniqueId;
use std::ffi::OsStr;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a deletion did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deleted {
    /// Bytes that were copied into the layer over the snapshot.
    pub copied: u64,
    /// The snapshot's file, if it stays: a fixed disk cannot say which other disks are made over it, so that it is never removed. The
    /// disk does without it; whoever knows that nobody else needs it may remove it.
    pub kept: Option<PathBuf>,
}

/// Deletes the snapshot `name` of the disk at `disk`, which must not be in use. What the disk, its other snapshots and all other disks show
/// stays the same. A VM state that was saved with it goes, too, with the last of the snapshots that it was saved with.
///
/// A crash, or a `progress` that breaks ([`Error::Stopped`]), loses nothing; called again, it goes on.
///
/// # Errors
///
/// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) where there is no such snapshot; [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported)
/// where another disk is made over it, or it cannot say which ones are; [`ErrorKind::InUse`](crate::ErrorKind::InUse) where somebody
/// reads it.
pub fn delete(
    options: &OpenOptions,
    disk: &Path,
    name: &SnapshotName,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Deleted> {
    // A deletion that was cut may have left a layer unclosed.
    chain::with_recovered_layers(&options.vfs, || delete_once(options, disk, name, progress))
}

fn delete_once(
    options: &OpenOptions,
    disk: &Path,
    name: &SnapshotName,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Deleted> {
    let vfs = &options.vfs;
    let missing =
        || Error::NotFound { path: disk.to_path_buf(), what: format!("it has no snapshot \"{name}\"") };
    let path = snapshot_path(disk, name.as_str()).ok_or_else(missing)?;
    // Held to the end: nobody starts to use the disk.
    let locked = chain::open_leaf(vfs, Arc::clone(vfs), disk, Access::ReadWrite)?;
    let beneath_policy = options.for_a_parent().policy;
    let mut own = match chain::open_from(vfs, &path, &beneath_policy) {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Err(missing()),
        images => images?.into_iter(),
    };
    let snapshot = own.next().ok_or_else(missing)?;
    let beneath = own.next();
    let (id, above) = (snapshot.unique_id(), child_in_chain(options, disk, snapshot.unique_id())?);
    let stays = snapshot.is_fixed();
    check(&**vfs, &snapshot, above.as_ref().map(|above| above.0))?;
    drop((snapshot, own));
    // Before anything is copied.
    if !stays {
        drop(alone(&**vfs, &path)?);
    }
    let mut copied = 0;
    // A journal may have named another parent already.
    let one = |images: &[ParentImage]| {
        Ok(usize::from(images.first().is_some_and(|parent| parent.unique_id() == id)))
    };
    match above {
        // The disk itself.
        Some((_, None)) => {
            copied = merge_image(vfs, locked, disk, &options.policy, progress, one)?.copied;
        }
        Some((_, Some(child))) => {
            let image = chain::open_for_maintenance(vfs, &child)?;
            copied = merge_image(vfs, image, &child, &beneath_policy, progress, one)?.copied;
        }
        None => {}
    }
    end(&**vfs, path, id, beneath.as_ref(), (stays, copied))
}

/// The same for a disk that is open, beside whoever reads and writes. If the layer over the snapshot is itself a snapshot, the disk goes on
/// reading it, and nobody else may.
///
/// # Errors
///
/// Those of [`delete()`], and [`ErrorKind::InUse`](crate::ErrorKind::InUse) while a merge or another deletion of the disk is under way.
pub fn delete_running(
    disk: &Disk,
    name: &SnapshotName,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Deleted> {
    let origin = disk.origin();
    let Some(places) = &origin.leaf else {
        return Err(Error::ReadOnly { path: disk.path().to_path_buf() });
    };
    let (vfs, path) = (&origin.options.vfs, places.snapshot(name));
    // A deletion that was cut may have left a layer unclosed that is none of this disk.
    let merging = disk.merging()?;
    let snapshot = match vfs.open(&path, Access::ReadOnly) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let what = format!("it has no snapshot \"{name}\"");
            return Err(Error::NotFound { path: disk.path().to_path_buf(), what });
        }
        file => file.map_err(|error| Error::io(&path, "opening the snapshot", error))?,
    };
    let snapshot = ParentImage::open(snapshot, &path)?;
    let (id, stays) = (snapshot.unique_id(), snapshot.is_fixed());
    let images = merging.images();
    let depth = images.iter().position(|image| image.unique_id() == id);
    let above = depth.map(|depth| match depth.checked_sub(1).and_then(|above| images.get(above)) {
        Some(above) => above.unique_id(),
        None => merging.leaf_id(),
    });
    check(&**vfs, &snapshot, above)?;
    let beneath = beneath(origin, &snapshot)?;
    drop(snapshot);
    let copied = match depth {
        Some(0) => merge_into_leaf(disk, merging, 1, progress)?.copied,
        Some(depth) => {
            let child = merging.maintain(depth - 1)?;
            let merged =
                merge_layer(child.vfs(), child.layer(), &child.images(), &child.below(), 1, progress);
            let ended = child.end(merged.is_ok());
            let merged = merged?;
            ended?;
            merged.copied
        }
        None => 0,
    };
    end(&**vfs, path, id, beneath.as_ref(), (stays, copied))
}

/// Fails where the snapshot is none, or cannot be deleted; `above` is the layer of the disk over it.
fn check(vfs: &dyn Vfs, snapshot: &ParentImage, above: Option<UniqueId>) -> Result<()> {
    let refuse =
        |what: &str| Err(Error::Unsupported { path: snapshot.path().to_path_buf(), what: what.to_string() });
    match (snapshot.is_fixed(), above) {
        (true, None) => refuse(
            "the disk does not stand on it, and it is a fixed disk, which cannot say what else does: remove it yourself if nothing needs it",
        ),
        // It stays, so nobody loses it.
        (true, Some(_)) => Ok(()),
        (false, _) if !snapshot.is_sealed() => {
            refuse("it is not sealed as a snapshot: remove it yourself if nothing needs it")
        }
        (false, _) => refuse_others(vfs, snapshot, above),
    }
}

/// The layer over the snapshot holds what that does (so many bytes were copied): its file goes, unless it stays.
fn end(
    vfs: &dyn Vfs,
    path: PathBuf,
    id: UniqueId,
    beneath: Option<&ParentImage>,
    (stays, copied): (bool, u64),
) -> Result<Deleted> {
    if !stays {
        remove(vfs, &path, id, beneath)?;
    }
    Ok(Deleted { copied, kept: stays.then_some(path) })
}

/// The layer beneath a snapshot of a running disk.
fn beneath(origin: &Origin, snapshot: &ParentImage) -> Result<Option<ParentImage>> {
    let Some(claims) = snapshot.claims() else { return Ok(None) };
    let images = chain::open_images(&origin.options.vfs, &claims, &origin.options.for_a_parent().policy)?;
    Ok(images.into_iter().next())
}

/// The layer of the disk's chain over the image `id`: its id, and its path if it is not the disk itself.
fn child_in_chain(
    options: &OpenOptions,
    disk: &Path,
    id: UniqueId,
) -> Result<Option<(UniqueId, Option<PathBuf>)>> {
    let lineage = Lineage::open(options, disk)?;
    let Some(depth) = lineage.parents.iter().position(|parent| parent.unique_id() == id) else {
        return Ok(None);
    };
    let above = depth.checked_sub(1).and_then(|depth| lineage.parents.get(depth));
    Ok(Some(match above {
        Some(parent) => (parent.unique_id(), Some(parent.path().to_path_buf())),
        None => (lineage.footer.unique_id, None),
    }))
}

/// The children that the snapshot `id` at `path` has, by its registry, but for those that name another parent by now.
fn children(vfs: &dyn Vfs, file: &dyn File, path: &Path, id: UniqueId) -> Result<Vec<Child>> {
    let registered = Children::of(file, path)?.read()?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let is_child = |child: &Child| {
        let path = folder.join(OsStr::from_bytes(&child.path));
        let Ok(file) = vfs.open(&path, Access::ReadOnly) else { return true };
        let Ok(decision) = Headers::read(&*file, &path).and_then(|headers| headers.decide(&path)) else {
            return true;
        };
        // One that is found and is another disk says nothing of the child.
        decision.footer.unique_id != child.id || decision.header.parent_unique_id == id
    };
    Ok(registered.into_iter().filter(is_child).collect())
}

/// The file of a snapshot that nobody else has open, locked.
fn alone(vfs: &dyn Vfs, path: &Path) -> Result<Arc<dyn File>> {
    let file =
        vfs.open(path, Access::ReadOnly).map_err(|error| Error::io(path, "opening the snapshot", error))?;
    layer::lock(&*file, path, Access::ReadWrite)?;
    Ok(file)
}

/// Fails where a snapshot has other children than `above`.
fn refuse_others(vfs: &dyn Vfs, snapshot: &ParentImage, above: Option<UniqueId>) -> Result<()> {
    let children = children(vfs, snapshot.file(), snapshot.path(), snapshot.unique_id())?;
    let others = children.into_iter().filter(|child| Some(child.id) != above);
    refuse_children(snapshot.path(), others.collect())
}

fn refuse_children(path: &Path, children: Vec<Child>) -> Result<()> {
    if children.is_empty() {
        return Ok(());
    }
    let names: Vec<String> =
        children.iter().map(|child| String::from_utf8_lossy(&child.path).into_owned()).collect();
    let what = format!("other disks are made over it ({}): delete or merge those first", names.join(", "));
    Err(Error::Unsupported { path: path.to_path_buf(), what })
}

/// Removes the file of a snapshot that no child names any more.
fn remove(vfs: &dyn Vfs, path: &Path, id: UniqueId, beneath: Option<&ParentImage>) -> Result<()> {
    // From before the last look at its children to the end: nobody makes another one, and nobody starts to read it, who would miss it
    // later. Until it is sure that it goes, the layer beneath knows of it.
    let file = alone(vfs, path)?;
    refuse_children(path, children(vfs, &*file, path, id)?)?;
    if let Some(beneath) = beneath {
        chain::unregister(vfs, id, beneath)?;
    }
    remove_state(vfs, path, id, &Headers::read(&*file, path)?.decide(path)?.lineage())?;
    vfs.remove(path).map_err(|error| Error::io(path, "removing the snapshot", error))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    vfs.sync_dir(folder).map_err(|error| Error::io(path, "making the removal durable", error))
}

/// Removes the VM state that was saved with a snapshot, unless that of another disk of the VM is still there.
fn remove_state(vfs: &dyn Vfs, path: &Path, id: UniqueId, lineage: &ext::Lineage) -> Result<()> {
    if lineage.manifest.as_bytes().is_empty() {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let names = StateNames::of_manifest(folder, OsStr::from_bytes(lineage.manifest.as_bytes()))?;
    let name = SnapshotName::new(&String::from_utf8_lossy(lineage.snapshot.as_bytes()))?;
    let is_there = |disk: &ManifestDisk| {
        let leaf = Leaf::in_folder(folder, OsStr::from_bytes(&disk.file_name));
        // In the middle of its commit it may have no other name than the second.
        let names = [leaf.snapshot(&name), leaf.waiting_child(&name)];
        // What cannot be looked at may be there.
        let is_gone = |path| vfs.identity(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        disk.disk_id != id && !names.iter().all(|path| is_gone(path))
    };
    // One that is missing or damaged is of use to nobody.
    match read_manifest(vfs, &names.manifest(), Digest(lineage.state_digest)) {
        Err(error @ Error::Io { .. }) => Err(error),
        Ok(manifest) if manifest.disks.iter().any(is_there) => Ok(()),
        _ => names.remove_all(vfs).map(drop),
    }
}
