//! `cowvhd rebase`: names another parent in a differencing disk.

use crate::failure::Failure;
use crate::long_work::Steps;
use crate::parents::Folders;
use cowvhd::snapshot::{rebase, relink};
use std::path::PathBuf;

/// Gives a differencing disk another parent and keeps what it shows.
///
/// What the new parent shows otherwise is copied into the disk first. With --relink the parent is the one that the disk has, which
/// has moved: nothing is copied. The disk must not be in use. After ^C the disk is as it was, with some more of its own.
#[derive(Debug, clap::Args)]
pub(crate) struct Rebase {
    /// The disk's file.
    file: PathBuf,
    /// The parent that it is to have.
    #[arg(long, value_name = "FILE")]
    parent: PathBuf,
    /// The parent is the one that the disk has, and has moved here.
    #[arg(long)]
    relink: bool,
    #[command(flatten)]
    folders: Folders,
    #[command(flatten)]
    steps: Steps,
}

impl Rebase {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let options = self.folders.options();
        if self.relink {
            return Ok(relink(&options, &self.file, &self.parent)?);
        }
        self.steps.run(|progress| rebase(&options, &self.file, &self.parent, progress)).map(drop)
    }
}
