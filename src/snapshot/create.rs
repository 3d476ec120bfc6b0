//! Taking a snapshot of an open disk: `vm.vhd` becomes `vm@NAME.vhd`, sealed, and a new, empty child takes its name.
//!
//! Each step is durable before the next; `chain/commit.rs` says what an open makes of what a crash leaves:
//!
//! 1. The child, complete, in a session of its own, locked; it has no name.
//! 2. In the leaf: a snapshot is under way, {child, NAME}. Then the child in the leaf's registry, as the `vm.vhd` that it will be.
//! 3. The child's name `vm@NAME.vhd`.
//! 4. A flush and a checkpoint of the leaf, so that little is left to do later.
//! 5. Changes stop for a moment, and go into the child from then on; flushes wait.
//! 6. The leaf is flushed and sealed.
//! 7. The two names are exchanged: the commit. Flushes go on.
//!
//! What fails before step 5 is taken back, and the disk goes on as it was. What fails later stops the disk: the next open finishes
//! or undoes the snapshot.

use crate::chain::{self, Children, Leaf, ParentImage, SnapshotName, Source};
use crate::defect::{self, Defect};
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::ext::{FixedParent, Name, SealId};
use crate::layer::{CreateParameters, Layer, NewImage, ParentLink, Seal};
use crate::sync::Arc;
use crate::vfs::{Access, FileTime, Vfs};
use crate::vhd::{Timestamp, UniqueId};
use std::io;
use std::path::{Path, PathBuf};

impl Disk {
    /// Takes a snapshot of the disk as it is now, while others read and write it: what was changed by calls that returned before is
    /// in the snapshot, what begins later is not. It is the file `vm@NAME.vhd` beside the disk's `vm.vhd`, which goes on under its
    /// name. Durable on return.
    ///
    /// Changes stop for a moment; flushes wait until the snapshot is durable. Fails with [`ErrorKind::Exists`] where there is one
    /// of this name. An error before the changes go into the new file leaves the disk as it was; after one later it is
    /// stopped ([`ErrorKind::Poisoned`]), and opening it again shows it with the snapshot or without.
    ///
    /// [`ErrorKind::Exists`]: crate::ErrorKind::Exists
    /// [`ErrorKind::Poisoned`]: crate::ErrorKind::Poisoned
    pub fn snapshot(&self, name: &SnapshotName) -> Result<PathBuf> {
        let origin = self.origin();
        let _one_at_a_time = origin.snapshots.lock();
        let (Some(places), false) = (&origin.leaf, self.is_read_only()) else {
            return Err(Error::ReadOnly { path: self.path().to_path_buf() });
        };
        let snapshot = Snapshot { disk: self, vfs: &*origin.options.vfs, places, name };
        snapshot.take()
    }
}

/// A snapshot that is being taken.
struct Snapshot<'a> {
    disk: &'a Disk,
    vfs: &'a dyn Vfs,
    places: &'a Leaf,
    name: &'a SnapshotName,
}

impl Snapshot<'_> {
    fn take(&self) -> Result<PathBuf> {
        let path = self.places.snapshot(self.name);
        for taken in [path.clone(), self.places.waiting_child(self.name)] {
            if self.vfs.identity(&taken).is_ok() {
                return Err(Error::Exists { path: taken });
            }
        }
        let leaf = self.disk.leaf()?;
        let children = Children::of_layer(&leaf)?;
        let modified = self.vfs.now();
        let random = self.vfs.random_id();
        let seal_id = SealId(random.map_err(|error| Error::io(&path, "asking for a random id", error))?);
        let image_vfs = &self.disk.origin().image_vfs;
        let parameters = self.child_parameters(&leaf, &path, seal_id, modified);
        let image = NewImage::new(&**image_vfs, &path, &parameters)?;
        let child = image.open(Arc::clone(image_vfs), self.disk.path())?;
        let (child_id, child_file) = (image.unique_id(), Arc::clone(image.file()));

        let snapshot_name = Name::new(self.name.as_str().as_bytes()).unwrap_or_default();
        let leaf_name = Name::new(self.places.name().as_encoded_bytes()).unwrap_or_default();
        let prepared = leaf
            .begin_snapshot(child_id, snapshot_name)
            .and_then(|()| {
                let registered = chain::registered_child(child_id, self.places.folder(), &self.places.path());
                children.add(registered)
            })
            .and_then(|()| image.publish())
            .and_then(|()| leaf.reclaim())
            .and_then(|()| self.disk.switch_leaf(Box::new(child)));
        let switch = match prepared {
            Ok(switch) => switch,
            Err(error) => {
                // Where this fails, too, the note in the leaf is left, for the next open.
                let _ = self.take_back(&leaf, &children, child_id);
                return Err(error);
            }
        };

        let seal = Seal { id: seal_id, child_id, snapshot: snapshot_name, leaf_name, modified };
        let seal = || match defect::active(Defect::CommitBeforeSeal) {
            true => Ok(()),
            false => switch.old_leaf().seal(&seal),
        };
        let committed = seal()
            .and_then(|()| self.check_names(&leaf, &path, &child_file))
            .and_then(|()| chain::exchange(self.vfs, self.places, self.name, &path));
        match committed {
            Ok(()) => {
                switch.commit(self.sealed(&path));
                Ok(path)
            }
            Err(error) => {
                switch.fail(&format!("the snapshot \"{}\" failed: {error}", self.name));
                Err(error)
            }
        }
    }

    fn child_parameters(
        &self,
        leaf: &Layer,
        path: &Path,
        seal_id: SealId,
        modified: FileTime,
    ) -> CreateParameters {
        CreateParameters {
            size: leaf.footer().current_size,
            block_bytes: leaf.place().block_bytes,
            ring_bytes: leaf.place().ring_bytes,
            parent: Some(ParentLink {
                unique_id: leaf.footer().unique_id,
                modified: Timestamp::from_unix_seconds(modified.seconds),
                path: path.file_name().map(PathBuf::from).unwrap_or_default(),
                seal_id,
                fixed: FixedParent::default(),
            }),
        }
    }

    /// Takes away what there is of the snapshot; the leaf has not been changed by it.
    fn take_back(&self, leaf: &Layer, children: &Children<'_>, child_id: UniqueId) -> Result<()> {
        chain::remove_child(self.vfs, self.places, self.name, child_id)?;
        children.remove(child_id)?;
        leaf.forget_snapshot()
    }

    /// Fails if the names are not those of the two files any more.
    fn check_names(&self, leaf: &Layer, path: &Path, child: &Arc<dyn crate::vfs::File>) -> Result<()> {
        let io = |error: io::Error| Error::io(path, "looking at the snapshot's names", error);
        let (at_leaf, at_snapshot) =
            (self.vfs.identity(&self.places.path()).map_err(io)?, self.vfs.identity(path).map_err(io)?);
        if at_leaf == leaf.file().identity().map_err(io)? && at_snapshot == child.identity().map_err(io)? {
            return Ok(());
        }
        let what = format!(
            "another file took the name of {} or of {} while the snapshot was taken",
            self.places.path().display(),
            path.display()
        );
        Err(Error::Unsupported { path: self.places.path(), what })
    }

    /// The sealed leaf as a parent that needs less memory. Without, it stays open as it is.
    fn sealed(&self, path: &Path) -> Option<Arc<dyn Source>> {
        let file = self.vfs.open(path, Access::ReadOnly).ok()?;
        let image = ParentImage::open(file, path).ok()?;
        let image = chain::bound(&self.disk.origin().options.vfs, image).ok()?;
        Some(Arc::new(image))
    }
}
