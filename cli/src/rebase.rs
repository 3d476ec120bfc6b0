//! `cowvhd rebase`: names another parent in a differencing disk.

use crate::failure::Failure;
use crate::long_work::Steps;
use cowvhd::OpenOptions;
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
    /// A folder in which parents may lie, too, and below it; may be given several times.
    #[arg(long, value_name = "FOLDER")]
    allow_parents_in: Vec<PathBuf>,
    #[command(flatten)]
    steps: Steps,
}

impl Rebase {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let allow = |options: OpenOptions, folder: &PathBuf| options.allow_parents_in(folder);
        let options = self.allow_parents_in.iter().fold(OpenOptions::new(), allow);
        if self.relink {
            return Ok(relink(&options, &self.file, &self.parent)?);
        }
        self.steps.run(|progress| rebase(&options, &self.file, &self.parent, progress)).map(drop)
    }
}
