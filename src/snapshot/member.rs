//! A disk's part in a checkpoint: what whoever has the disk open does for it, one step after the other.
//!
//! ```text
//! begin ─▶ prepare ─▶ hold ─▶ switch ─▶ seal ─▶ commit
//! └─────── dropped: ───────┘  └─────── dropped: ─────┘
//!    the disk goes on             the manifest's name
//!    as it was                    decides
//! ```
//!
//! A member that is dropped is one whose checkpoint has nobody any more who leads it: its leader was killed, or took too long. Before
//! the switch nothing has happened to the disk. Afterwards what it was promised is in a file without a place in the chain: if all
//! disks are sealed the member commits the checkpoint itself; else nobody can any more ([`crate::chain::decide`]), and the disk
//! stops.

use super::checkpoint::{Participant, StateRef};
use super::create::{Prepared, Snapshot};
use crate::chain::{self, SnapshotName};
use crate::defect::{self, Defect};
use crate::disk::{Checkpointing, Disk, Stopped, Switch};
use crate::error::{Error, Result};
use crate::layer::{Layer, StateLink};
use crate::state::{ManifestDisk, StateNames};
use std::mem;
use std::path::{Path, PathBuf};

/// A disk that takes part in a checkpoint. See [`Participant`] for its steps.
#[derive(Debug)]
#[must_use]
pub struct Member<'a> {
    stage: Stage<'a>,
    snapshot: Snapshot<'a>,
    disk: ManifestDisk,
    /// Of the disk whose leaf notes that the state's files are under way.
    kept: Option<StateNames>,
    _turn: Checkpointing<'a>,
}

#[derive(Debug)]
enum Stage<'a> {
    Begun,
    Prepared(Box<Layer>, Prepared),
    Held(Stopped<'a>, Prepared),
    Switched(Switch<'a>, Prepared, StateLink),
    Sealed(Switch<'a>, StateLink),
    Ended,
}

impl<'a> Member<'a> {
    /// Begins a checkpoint of this name, of which the disk is a part. The state's files are called after the first disk of a
    /// checkpoint, which is the one that `keeps_state`: they are taken away with it if the checkpoint is not committed.
    ///
    /// Fails with [`ErrorKind::Exists`] where there is a snapshot or a state of this name, and with [`ErrorKind::InUse`] while another
    /// checkpoint of the disk is made.
    ///
    /// [`ErrorKind::Exists`]: crate::ErrorKind::Exists
    /// [`ErrorKind::InUse`]: crate::ErrorKind::InUse
    pub fn begin(disk: &'a Disk, name: &SnapshotName, keeps_state: bool) -> Result<Self> {
        let turn = disk.origin().snapshots.checkpoint(disk.path())?;
        let snapshot = Snapshot::new(disk, name)?;
        snapshot.layer()?;
        // Before anything says that they are under way, and may be removed.
        snapshot.check_no_state()?;
        let kept = match keeps_state {
            true => Some(StateNames::new(&snapshot.leaf_path(), name.as_str())?),
            false => None,
        };
        if kept.is_some() {
            snapshot.note_in_leaf()?;
        }
        Ok(Member { stage: Stage::Begun, disk: snapshot.sealed_disk(), snapshot, kept, _turn: turn })
    }

    fn out_of_turn<T>(&self) -> Result<T> {
        let what = format!("{}: this step of a checkpoint is not due", self.snapshot.leaf_path().display());
        Err(Error::Invalid { what })
    }

    /// The disk goes on as it was. First the files, then the notes of them; what fails is left for the next open.
    fn take_back(&self, child: Option<&Prepared>) {
        let vfs = &**self.snapshot.vfs();
        if self.kept.as_ref().is_some_and(|names| names.remove_all(vfs).is_err()) {
            return;
        }
        match child {
            Some(child) => self.snapshot.take_back(child),
            None if self.kept.is_some() => self.snapshot.forget_in_leaf(),
            None => {}
        }
    }

    fn exchange(&self, switch: &Switch<'_>) -> Result<()> {
        match defect::active(Defect::ExchangeBeforeManifest) {
            true => Ok(()),
            false => self.snapshot.exchange(switch),
        }
    }

    /// Nobody leads the checkpoint any more.
    fn settle(&self, switch: &Switch<'_>, link: &StateLink) -> Result<()> {
        let (vfs, folder) = (&**self.snapshot.vfs(), self.snapshot.folder());
        // If that fails it may have been done all the same.
        let _ = chain::commit_if_sealed(vfs, folder, link);
        if !chain::decide(vfs, folder, link)? {
            let what = "it was not committed: other disks of it are not sealed".into();
            return Err(Error::Unsupported { path: self.snapshot.leaf_path(), what });
        }
        self.exchange(switch)
    }

    /// The process that has the disk open is killed: nothing more is done for the checkpoint. The disk has to be dropped, too.
    #[cfg(feature = "sim")]
    pub fn kill(mut self) {
        self.stage = Stage::Ended;
    }
}

impl Participant for Member<'_> {
    fn disk(&self) -> &ManifestDisk {
        &self.disk
    }

    fn folder(&self) -> &Path {
        self.snapshot.folder()
    }

    fn prepare(&mut self) -> Result<()> {
        let Stage::Begun = self.stage else { return self.out_of_turn() };
        let (layer, child) = self.snapshot.prepare()?;
        self.stage = Stage::Prepared(layer, child);
        Ok(())
    }

    fn hold(&mut self) -> Result<()> {
        match mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Prepared(layer, child) => match self.snapshot.ready(layer) {
                Ok(ready) => {
                    self.stage = Stage::Held(ready.hold(), child);
                    Ok(())
                }
                Err(error) => {
                    self.take_back(Some(&child));
                    Err(error)
                }
            },
            other => {
                self.stage = other;
                self.out_of_turn()
            }
        }
    }

    fn switch(&mut self, state: &StateRef) -> Result<()> {
        match mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Held(stopped, child) => {
                self.stage = Stage::Switched(stopped.switch(), child, state.link());
                Ok(())
            }
            other => {
                self.stage = other;
                self.out_of_turn()
            }
        }
    }

    fn seal(&mut self) -> Result<()> {
        match mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Switched(switch, child, link) => {
                switch.drain();
                let mut sealed = self.snapshot.seal(&child, link);
                if sealed.is_ok() && defect::active(Defect::ExchangeBeforeManifest) {
                    sealed = self.snapshot.exchange(&switch);
                }
                match sealed {
                    Ok(()) => self.stage = Stage::Sealed(switch, link),
                    Err(ref error) => self.snapshot.stop(switch, error),
                }
                sealed
            }
            other => {
                self.stage = other;
                self.out_of_turn()
            }
        }
    }

    fn commit(&mut self) -> Result<PathBuf> {
        match mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Sealed(switch, _) => {
                let result = self.exchange(&switch);
                let path = self.snapshot.end(switch, &result);
                result.map(|()| path)
            }
            other => {
                self.stage = other;
                self.out_of_turn()
            }
        }
    }

    fn fail(&mut self, cause: &str) {
        match mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Switched(switch, ..) | Stage::Sealed(switch, _) => self.snapshot.stop(switch, &cause),
            other => self.stage = other,
        }
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        match mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Begun => self.take_back(None),
            Stage::Prepared(layer, child) => {
                drop(layer);
                self.take_back(Some(&child));
            }
            Stage::Held(stopped, child) => {
                // The guest first.
                drop(stopped);
                self.take_back(Some(&child));
            }
            Stage::Switched(switch, ..) => self.snapshot.stop(switch, &"it ended before the disk was sealed"),
            Stage::Sealed(switch, link) => {
                let result = self.settle(&switch, &link);
                self.snapshot.end(switch, &result);
            }
            Stage::Ended => {}
        }
    }
}
