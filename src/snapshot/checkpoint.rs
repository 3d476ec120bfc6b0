//! Snapshots of several disks at one point, with or without the state of the VM: all of it or nothing.
//!
//! The disks may be open in several processes. One leads: it makes the files of the state, and tells each disk's [`Participant`] what to
//! do. Each step is durable before the next; `chain/commit.rs` says what an open makes of what a crash leaves:
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
//! manifest has its name is finished. Whoever takes a seal away sees to it first that nobody can give the manifest its name
//! any more (`chain/decision.rs`).

use super::SnapshotName;
use super::member::Member;
use crate::chain;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::ext::Name;
use crate::layer::StateLink;
use crate::state::{Blob, Digest, Draft, Manifest, ManifestDisk, StateNames};
use crate::sync::Arc;
use crate::vfs::Vfs;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A disk of a checkpoint, wherever it is open. The steps come in this order, each of them for all disks before the next. One that is
/// dropped before its switch leaves the disk as it was.
pub trait Participant: std::fmt::Debug {
    /// The layer that is sealed, with its seal, and the name of the disk.
    fn disk(&self) -> &ManifestDisk;

    /// The folder of the disk, as a path without links.
    fn folder(&self) -> &Path;

    /// Makes the child that is to take the changes; durable on return.
    fn prepare(&mut self) -> Result<()>;

    /// Stops changes: on return none is under way. Reads and flushes go on.
    fn hold(&mut self) -> Result<()>;

    /// Lets changes go on, into the child, while flushes wait; and names the state that the seal is to name.
    fn switch(&mut self, state: &StateRef) -> Result<()>;

    /// Flushes and seals the leaf; durable on return.
    fn seal(&mut self) -> Result<()>;

    /// Gives the child its place, when the manifest has its name durably, and returns the snapshot's path. Flushes go on.
    fn commit(&mut self) -> Result<PathBuf>;

    /// Stops the disk after a switch: it is unknown whether the checkpoint is committed.
    fn fail(&mut self, cause: &str);
}

/// A VM state as seals name it: its manifest's name and digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateRef {
    manifest: Vec<u8>,
    digest: Digest,
}

impl StateRef {
    /// The state whose manifest has this file name, in the disks' folder, and this digest.
    pub fn new(manifest: &OsStr, digest: Digest) -> Result<Self> {
        // What is no name of a manifest here is none later, when it decides what becomes of the disk.
        StateNames::of_manifest(Path::new(""), manifest)?;
        Ok(StateRef { manifest: manifest.as_bytes().to_vec(), digest })
    }

    /// The manifest's file name.
    pub fn manifest(&self) -> &OsStr {
        OsStr::from_bytes(&self.manifest)
    }

    /// The manifest's digest.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    pub(super) fn link(&self) -> StateLink {
        StateLink { digest: self.digest.0, manifest: Name::new(&self.manifest).unwrap_or_default() }
    }
}

/// A snapshot of the disks of a VM and of its state that is being made. Dropped, it leaves the disks as they are and the
/// state's files nowhere.
///
/// The VM has to stand still from before its state is saved until the commit: what it writes to a disk in between would be in the
/// snapshot and not in the state. Until then the disks can be used as ever.
#[derive(Debug)]
#[must_use]
pub struct Checkpoint<'a> {
    vfs: Arc<dyn Vfs>,
    names: StateNames,
    /// `None` once its files are not to be taken away any more. Goes before the participants, the first of which forgets it then.
    draft: Option<Draft>,
    participants: Vec<Box<dyn Participant + 'a>>,
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
        check_count(disks.len())?;
        let Some(first) = disks.first() else { return Err(Error::Invalid { what: "no disk".into() }) };
        let mut participants: Vec<Box<dyn Participant + 'a>> = Vec::new();
        for (number, disk) in disks.iter().enumerate() {
            participants.push(Box::new(Member::begin(disk, name, number == 0)?));
        }
        Self::of(Arc::clone(&first.origin().options.vfs), participants, name)
    }

    /// The same for disks that are open in any processes: the first of the participants keeps the state ([`Member::begin`]), the
    /// others do not. `vfs` is where the disks lie.
    pub fn of(
        vfs: Arc<dyn Vfs>,
        participants: Vec<Box<dyn Participant + 'a>>,
        name: &SnapshotName,
    ) -> Result<Self> {
        check_count(participants.len())?;
        let path = |participant: &dyn Participant| {
            participant.folder().join(OsStr::from_bytes(&participant.disk().file_name))
        };
        let Some(first) = participants.first() else { return Err(Error::Invalid { what: "no disk".into() }) };
        for other in &participants {
            if other.folder() != first.folder() {
                let what = format!(
                    "{} does not lie in {}, where the first disk is: the disks of one snapshot lie in one folder",
                    path(&**other).display(),
                    first.folder().display()
                );
                return Err(Error::Invalid { what });
            }
        }
        let names = StateNames::new(&path(&**first), name.as_str())?;
        let draft = Draft::new(Arc::clone(&vfs), names.clone())?;
        Ok(Checkpoint { vfs, names, draft: Some(draft), participants })
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
        let disks = self.participants.iter().map(|participant| participant.disk().clone()).collect();
        let digest = self.draft()?.write_manifest(disks)?;
        let manifest = self.names.manifest();
        let state = StateRef::new(manifest.file_name().unwrap_or_default(), digest)?;
        let participants = &mut self.participants;
        participants.iter_mut().try_for_each(|participant| participant.prepare())?;
        participants.iter_mut().try_for_each(|participant| participant.hold())?;
        let sealed = participants
            .iter_mut()
            .try_for_each(|participant| participant.switch(&state))
            .and_then(|()| participants.iter_mut().try_for_each(|participant| participant.seal()));
        let published = sealed.and_then(|()| self.draft.take().map_or(Ok(()), Draft::publish));
        let published = match published {
            // Somebody was faster: a disk that waited too long ended it, or committed it.
            Err(error @ Error::NotFound { .. }) => {
                let committed = chain::decide(&*self.vfs, self.names.folder(), &state.link());
                committed.and_then(|committed| if committed { Ok(()) } else { Err(error) })
            }
            published => published,
        };
        if let Err(error) = published {
            let cause = error.to_string();
            self.participants.iter_mut().for_each(|participant| participant.fail(&cause));
            return Err(error);
        }
        // What one of them cannot do now the next open of its disk does.
        let ended: Vec<_> = self.participants.iter_mut().map(|participant| participant.commit()).collect();
        ended.into_iter().collect()
    }
}

fn check_count(disks: usize) -> Result<()> {
    match disks {
        1..=Manifest::MAX_DISKS => Ok(()),
        _ => {
            let what = format!("a snapshot is of 1 to {} disks, not of {disks}", Manifest::MAX_DISKS);
            Err(Error::Invalid { what })
        }
    }
}
