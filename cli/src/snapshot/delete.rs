//! `cowvhd snapshot delete`.

use crate::failure::Failure;
use crate::long_work::long_work;
use crate::parents::Parents;
use crate::progress::Style;
use cowvhd::snapshot::{SnapshotName, delete};
use std::path::PathBuf;

/// Deletes a snapshot of a disk that is not in use. What the disk, its other snapshots and all other disks show stays the same.
///
/// What the snapshot holds moves into the layer over it; then its file goes. One that another disk is made over stays. ^C ends it at any
/// time, and so does a kill: started again, it goes on where it was.
#[derive(Debug, clap::Args)]
pub(crate) struct Delete {
    /// The disk's file.
    file: PathBuf,
    /// The snapshot.
    name: String,
    /// How progress is shown; "auto" draws a bar on a terminal and nothing elsewhere.
    #[arg(long, value_name = "STYLE", default_value = "auto")]
    progress: Style,
    #[command(flatten)]
    parents: Parents,
}

impl Delete {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let name = SnapshotName::new(&self.name)?;
        let options = self.parents.options();
        long_work(self.progress, |progress| delete(&options, &self.file, &name, progress))??;
        Ok(())
    }
}
