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
//! A fixed disk has no place for step 2: the note of it stands in the child, and goes when that has its place (`sealing.rs`).
//!
//! What fails before step 5 is taken back, and the disk goes on as it was. What fails later stops the disk: the next open finishes
//! or undoes the snapshot.

use crate::chain::{self, Leaf, ParentImage, SnapshotName, Source};
use crate::defect::{self, Defect};
use crate::disk::{Disk, Ready, RunningLeaf, Switch};
use crate::error::{Error, Result};
use crate::ext::{Name, SealId};
use crate::layer::{CreateParameters, Layer, NewImage, ParentLink, Seal, StateLink};
use crate::state::{ManifestDisk, StateNames};
use crate::sync::Arc;
use crate::vfs::{Access, File, FileTime, Vfs};
use crate::vhd::{Timestamp, UniqueId};
use std::fmt;
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
        let _one_at_a_time = self.origin().snapshots.snapshot(self.path())?;
        Snapshot::new(self, name)?.take()
    }
}

/// A snapshot that is being taken.
#[derive(Debug)]
pub(super) struct Snapshot<'a> {
    disk: &'a Disk,
    vfs: &'a Arc<dyn Vfs>,
    places: &'a Leaf,
    name: SnapshotName,
    /// Where it will be.
    path: PathBuf,
    leaf: RunningLeaf,
    seal_id: SealId,
    modified: FileTime,
}

/// A snapshot whose child is there, under the snapshot's name, and not the leaf yet.
#[derive(Debug)]
pub(super) struct Prepared {
    child_id: UniqueId,
    file: Arc<dyn File>,
}

impl<'a> Snapshot<'a> {
    /// Looks whether there can be one of this name.
    pub(super) fn new(disk: &'a Disk, name: &SnapshotName) -> Result<Self> {
        let origin = disk.origin();
        let (Some(places), false) = (&origin.leaf, disk.is_read_only()) else {
            return Err(Error::ReadOnly { path: disk.path().to_path_buf() });
        };
        let (vfs, path) = (&origin.options.vfs, places.snapshot(name));
        for taken in [path.clone(), places.waiting_child(name)] {
            if vfs.identity(&taken).is_ok() {
                return Err(Error::Exists { path: taken });
            }
        }
        let leaf = disk.leaf()?;
        leaf.check()?;
        let random = || vfs.random_id().map_err(|error| Error::io(&path, "asking for a random id", error));
        let seal_id = match leaf {
            RunningLeaf::Layer(_) => SealId(random()?),
            RunningLeaf::Fixed(_) => SealId::default(),
        };
        Ok(Snapshot { disk, vfs, places, name: name.clone(), path, leaf, seal_id, modified: vfs.now() })
    }

    /// The unique id of the disk's layer, its seal, and the name of its file.
    pub(super) fn sealed_disk(&self) -> ManifestDisk {
        ManifestDisk {
            disk_id: self.leaf.footer().unique_id,
            seal_id: self.seal_id.0,
            file_name: self.places.name().as_encoded_bytes().to_vec(),
        }
    }

    /// The folder of the disk.
    pub(super) fn folder(&self) -> &'a Path {
        self.places.folder()
    }

    /// The disk's path.
    pub(super) fn leaf_path(&self) -> PathBuf {
        self.places.path()
    }

    /// The file system.
    pub(super) fn vfs(&self) -> &'a Arc<dyn Vfs> {
        self.vfs
    }

    /// Fails where there is a VM state of the snapshot's name: whoever finds the snapshot would take it for its own.
    pub(super) fn check_no_state(&self) -> Result<()> {
        let Ok(names) = StateNames::new(&self.places.path(), self.name.as_str()) else { return Ok(()) };
        match names.existing(&**self.vfs)?.into_iter().next() {
            Some(path) => Err(Error::Exists { path }),
            None => Ok(()),
        }
    }

    /// Notes in the leaf that something of this name is under way; durable on return.
    pub(super) fn note_in_leaf(&self) -> Result<()> {
        match defect::active(Defect::StateNotNoted) {
            true => Ok(()),
            false => self.layer()?.begin_snapshot(UniqueId::default(), self.name_in_leaf()),
        }
    }

    /// Takes that note back, as far as that works; it is left for the next open else.
    pub(super) fn forget_in_leaf(&self) {
        let _ = self.layer().and_then(Layer::forget_snapshot);
    }

    /// The leaf, if it is a layer, which can have a VM state and be one of several disks at one point.
    pub(super) fn layer(&self) -> Result<&Layer> {
        match &self.leaf {
            RunningLeaf::Layer(layer) => Ok(layer),
            RunningLeaf::Fixed(_) => {
                let what = "it is a fixed disk, which has no place to name a VM state or a group in: take a snapshot of it alone \
                            first; its new file has such a place";
                Err(Error::Unsupported { path: self.places.path(), what: what.into() })
            }
        }
    }

    /// The child is to be the leaf.
    pub(super) fn ready(&self, child: Box<Layer>) -> Result<Ready<'a>> {
        self.disk.prepare_leaf(child)
    }

    /// Steps 1 to 4. What fails is taken back.
    pub(super) fn prepare(&self) -> Result<(Box<Layer>, Prepared)> {
        let image_vfs = &self.disk.origin().image_vfs;
        let image = NewImage::new(&**image_vfs, &self.path, &self.child_parameters())?;
        let child = image.open(Arc::clone(image_vfs), self.disk.path())?;
        let prepared = Prepared { child_id: image.unique_id(), file: Arc::clone(image.file()) };
        let result = self
            .leaf
            .begin_snapshot(&child, self.name_in_leaf())
            .and_then(|()| {
                let path = self.places.path();
                let child = chain::registered_child(prepared.child_id, self.places.folder(), &path);
                self.leaf.register(child)
            })
            .and_then(|()| image.publish())
            .and_then(|()| self.leaf.prepare_seal());
        match result {
            Ok(()) => Ok((Box::new(child), prepared)),
            Err(error) => {
                self.take_back(&prepared);
                Err(error)
            }
        }
    }

    /// Takes away what there is of the snapshot; the leaf has not been changed by it. Where this fails the note in the leaf is left,
    /// for the next open.
    pub(super) fn take_back(&self, prepared: &Prepared) {
        let _ = self.leaf.take_back(prepared.child_id, || {
            chain::remove_child(&**self.vfs, self.places, &self.name, prepared.child_id)
        });
    }

    /// Step 6, and a look at the names that step 7 exchanges.
    pub(super) fn seal(&self, prepared: &Prepared, state: StateLink) -> Result<()> {
        let seal = Seal {
            id: self.seal_id,
            child_id: prepared.child_id,
            snapshot: self.name_in_leaf(),
            leaf_name: Name::new(self.places.name().as_encoded_bytes()).unwrap_or_default(),
            state,
            modified: self.modified,
        };
        if !defect::active(Defect::CommitBeforeSeal) {
            self.leaf.seal(&seal)?;
        }
        self.check_names(&prepared.file)
    }

    /// Step 7.
    pub(super) fn exchange(&self, switch: &Switch<'_>) -> Result<()> {
        chain::exchange(&**self.vfs, self.places, &self.name, &self.path)?;
        self.leaf.committed(switch.leaf())
    }

    /// The end, which is the snapshot's path, or stops the disk.
    pub(super) fn end(&self, switch: Switch<'_>, result: &Result<()>) -> PathBuf {
        match result {
            Ok(()) => {
                let sealed = self.sealed();
                let is_read_by_it = sealed.is_some();
                switch.commit(sealed);
                if is_read_by_it {
                    self.leaf.release();
                }
            }
            Err(error) => self.stop(switch, error),
        }
        self.path.clone()
    }

    /// Stops the disk: its snapshot failed after changes went into the new file.
    pub(super) fn stop(&self, switch: Switch<'_>, why: &dyn fmt::Display) {
        switch.fail(&format!("the snapshot \"{}\" failed: {why}", self.name));
    }

    fn take(self) -> Result<PathBuf> {
        self.check_no_state()?;
        let (child, prepared) = self.prepare()?;
        let switch = self.disk.switch_leaf(child).inspect_err(|_| self.take_back(&prepared))?;
        let result = self.seal(&prepared, StateLink::default()).and_then(|()| self.exchange(&switch));
        let path = self.end(switch, &result);
        result.map(|()| path)
    }

    fn name_in_leaf(&self) -> Name<64> {
        Name::new(self.name.as_str().as_bytes()).unwrap_or_default()
    }

    fn child_parameters(&self) -> CreateParameters {
        let (block_bytes, ring_bytes) = self.leaf.child_geometry(&self.disk.origin().options);
        CreateParameters {
            size: self.leaf.footer().current_size,
            block_bytes,
            ring_bytes,
            parent: Some(ParentLink {
                unique_id: self.leaf.footer().unique_id,
                modified: Timestamp::from_unix_seconds(self.modified.seconds),
                path: self.path.file_name().map(PathBuf::from).unwrap_or_default(),
                seal_id: self.seal_id,
                fixed: self.leaf.as_parent(self.modified),
            }),
        }
    }

    /// Fails if the names are not those of the two files any more.
    fn check_names(&self, child: &Arc<dyn File>) -> Result<()> {
        let (leaf, path) = (&self.leaf, &self.path);
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
    fn sealed(&self) -> Option<Arc<dyn Source>> {
        let file = self.vfs.open(&self.path, Access::ReadOnly).ok()?;
        let image = ParentImage::open(file, &self.path).ok()?;
        let image = chain::bound(&self.disk.origin().options.vfs, image).ok()?;
        Some(Arc::new(image))
    }
}
