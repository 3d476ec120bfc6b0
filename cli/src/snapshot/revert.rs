//! `cowvhd snapshot revert`.

use crate::failure::Failure;
use crate::parents::Parents;
use cowvhd::snapshot::{SnapshotName, revert};
use std::path::PathBuf;

/// Goes back to a snapshot: the disk shows again what it holds.
///
/// What was written to the disk since the last snapshot is lost. All snapshots stay. The disk must not be in use.
#[derive(Debug, clap::Args)]
pub(crate) struct Revert {
    /// The disk's file.
    file: PathBuf,
    /// The snapshot's name.
    name: String,
    #[command(flatten)]
    parents: Parents,
}

impl Revert {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        Ok(revert(&self.parents.options(), &self.file, &SnapshotName::new(&self.name)?)?)
    }
}
