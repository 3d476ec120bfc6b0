//! Snapshots of several disks at one point, with or without the state of the VM: all of it or nothing.
//!
//! Each step is durable before the next; `chain/commit.rs` says what an open makes of what a crash leaves:
//!
//! 1. In the first disk's leaf: NAME is under way. From here on whoever opens it takes the state's files away.
//! 2. The blobs, as they are written by whoever saves the VM. They are synced, and their digests taken.
//! 3. The names of the blobs; the manifest, under another name than its own.
//! 4. Of each disk the child, as for any snapshot.
//! 5. Changes of all disks stop at one point, and go into the children from then on; flushes wait.
//! 6. Each leaf is flushed and sealed; the seals name the manifest and its digest.
//! 7. The manifest gets its name: **the commit**.
//! 8. The names of each leaf and its child are exchanged. Flushes go on.
//!
//! A seal whose manifest has no name is taken away again by the next open: nothing was acknowledged since step 5. One whose
//! manifest has its name is finished.

use super::SnapshotName;
use super::create::{Prepared, Snapshot};
use crate::defect::{self, Defect};
use crate::disk::{Checkpointing, Disk, Ready};
use crate::error::{Error, Result};
use crate::ext::Name;
use crate::layer::{Layer, StateLink};
use crate::state::{Blob, Draft, Manifest, StateNames};
use crate::sync::Arc;
use std::path::{Path, PathBuf};

/// A snapshot of the disks of a VM and of its state that is being made. Dropped, it leaves the disks as they are and the
/// state's files nowhere.
///
/// The VM has to stand still from before its state is saved until the commit: what it writes to a disk in between would be in the
/// snapshot and not in the state. Until then the disks can be used as ever.
#[derive(Debug)]
#[must_use]
pub struct Checkpoint<'a> {
    snapshots: Vec<Snapshot<'a>>,
    names: StateNames,
    /// `None` once its files are not to be taken away any more.
    draft: Option<Draft>,
    _turns: Vec<Checkpointing<'a>>,
}

impl Disk {
    /// Starts a snapshot of the disk with the state of its VM: see [`Checkpoint`]. Fails with [`ErrorKind::Exists`] where there is
    /// a snapshot or a state of this name.
    ///
    /// [`ErrorKind::Exists`]: crate::ErrorKind::Exists
    pub fn checkpoint(&self, name: &SnapshotName) -> Result<Checkpoint<'_>> {
        Checkpoint::begin(&[self], name)
    }
}

/// Takes a snapshot of several disks at one point, of all of them or of none: no write is in the snapshot of one disk that began
/// after the return of a write that is not in that of another. All the disks lie in one folder. Durable on return; returns the
/// paths of the snapshots. Otherwise as [`Disk::snapshot`].
pub fn group(disks: &[&Disk], name: &SnapshotName) -> Result<Vec<PathBuf>> {
    Checkpoint::begin(disks, name)?.commit()
}

impl<'a> Checkpoint<'a> {
    /// The same as [`Disk::checkpoint`] for a VM with several disks, which all lie in one folder. The files of the state are
    /// called after the first of them.
    pub fn begin(disks: &[&'a Disk], name: &SnapshotName) -> Result<Self> {
        if disks.is_empty() || disks.len() > Manifest::MAX_DISKS {
            let what = format!("a snapshot is of 1 to {} disks, not of {}", Manifest::MAX_DISKS, disks.len());
            return Err(Error::Invalid { what });
        }
        let turns = disks.iter().map(|disk| disk.origin().snapshots.checkpoint(disk.path()));
        let turns = turns.collect::<Result<Vec<_>>>()?;
        let snapshots = disks.iter().map(|disk| Snapshot::new(disk, name)).collect::<Result<Vec<_>>>()?;
        let [first, others @ ..] = &snapshots[..] else {
            return Err(Error::Invalid { what: "no disk".into() });
        };
        let vfs = Arc::clone(first.vfs());
        for snapshot in others {
            if snapshot.folder() != first.folder() {
                let what = format!(
                    "{} does not lie in {}, where the first disk is: the disks of one snapshot lie in one folder",
                    snapshot.leaf_path().display(),
                    first.folder().display()
                );
                return Err(Error::Invalid { what });
            }
            snapshot.check_no_state()?;
        }
        let names = StateNames::new(&first.leaf_path(), name.as_str())?;
        let draft = Draft::new(vfs, names.clone())?;
        first.note_in_leaf()?;
        Ok(Checkpoint { snapshots, names, draft: Some(draft), _turns: turns })
    }

    /// Starts another part of the VM's state, with a name of 1 to 64 of the characters `A-Z a-z 0-9 . _ -`, such as `ram`. Its file
    /// is there when this returns.
    pub fn blob(&self, name: &str) -> Result<Blob> {
        self.draft()?.blob(name)
    }

    /// The same with all that the file at `source` holds: see [`Draft::blob_from`].
    pub fn blob_from(&self, name: &str, source: &Path) -> Result<Blob> {
        self.draft()?.blob_from(name, source)
    }

    fn draft(&self) -> Result<&Draft> {
        self.draft.as_ref().ok_or_else(|| Error::Invalid { what: "the checkpoint was committed".into() })
    }

    /// Makes disks and state one, durably, and returns the paths of the snapshots. Nobody may write to a blob any more.
    ///
    /// Fails as [`Disk::snapshot`] does, for all disks: before their changes go into the new files an error leaves them as they were
    /// and takes the state's files away; after one later they are stopped, and opening them again shows all with the
    /// snapshot or all without.
    pub fn commit(mut self) -> Result<Vec<PathBuf>> {
        let disks = self.snapshots.iter().map(Snapshot::sealed_disk).collect();
        let digest = self.draft()?.write_manifest(disks)?;
        let manifest = self.names.manifest();
        let manifest = manifest.file_name().unwrap_or_default().as_encoded_bytes();
        let state = StateLink { digest: digest.0, manifest: Name::new(manifest).unwrap_or_default() };

        let mut children = Vec::new();
        let ready = self.prepare(&mut children);
        let ready = match ready {
            Ok(ready) => ready,
            Err(error) => {
                // First the files, then the notes of them. The rest is left for the next open.
                if self.draft.take().is_none_or(|draft| draft.discard().is_ok()) {
                    self.snapshots
                        .iter()
                        .zip(&children)
                        .for_each(|(snapshot, child)| snapshot.take_back(child));
                    if children.is_empty() {
                        self.forget();
                    }
                }
                return Err(error);
            }
        };
        let switches = Ready::switch_together(ready);

        let mut result = self
            .snapshots
            .iter()
            .zip(&children)
            .zip(&switches)
            .try_for_each(|((snapshot, child), switch)| snapshot.seal(child, switch, state));
        let exchange = |snapshots: &[Snapshot<'_>]| snapshots.iter().try_for_each(Snapshot::exchange);
        let too_early = defect::active(Defect::ExchangeBeforeManifest);
        if result.is_ok() && too_early {
            result = exchange(&self.snapshots);
        }
        if let (Ok(()), Some(draft)) = (&result, self.draft.take()) {
            result = draft.publish();
        }
        if result.is_ok() && !too_early {
            result = exchange(&self.snapshots);
        }
        let ends = self.snapshots.drain(..).zip(switches);
        let paths = ends.map(|(snapshot, switch)| snapshot.end(switch, &result)).collect();
        result.map(|()| paths)
    }

    /// Makes the children, and adds them to `children` as far as they come.
    fn prepare(&self, children: &mut Vec<Prepared>) -> Result<Vec<Ready<'a>>> {
        let mut layers: Vec<Box<Layer>> = Vec::new();
        for snapshot in &self.snapshots {
            let (layer, prepared) = snapshot.prepare()?;
            layers.push(layer);
            children.push(prepared);
        }
        self.snapshots.iter().zip(layers).map(|(snapshot, layer)| snapshot.ready(layer)).collect()
    }

    /// There is nothing of the state any more.
    fn forget(&self) {
        if let Some(first) = self.snapshots.first() {
            first.forget_in_leaf();
        }
    }
}

impl Drop for Checkpoint<'_> {
    fn drop(&mut self) {
        if let Some(draft) = self.draft.take()
            && draft.discard().is_ok()
        {
            self.forget();
        }
    }
}
