//! `cowvhd rebase`: names another parent in a differencing disk.

use crate::failure::Failure;
use cowvhd::OpenOptions;
use cowvhd::snapshot::relink;
use std::path::PathBuf;

/// Names another parent in a differencing disk.
///
/// With --relink the parent is the one that the disk has, which has moved: nothing else is changed. The disk must not be in use.
#[derive(Debug, clap::Args)]
pub(crate) struct Rebase {
    /// The disk's file.
    file: PathBuf,
    /// Where the parent is.
    #[arg(long, value_name = "FILE")]
    parent: PathBuf,
    /// The parent has moved, and is the same disk.
    #[arg(long, required = true)]
    relink: bool,
    /// A folder in which the parent's own parents may lie, besides the disk's; may be given several times.
    #[arg(long, value_name = "FOLDER")]
    allow_parents_in: Vec<PathBuf>,
}

impl Rebase {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let allow = |options: OpenOptions, folder: &PathBuf| options.allow_parents_in(folder);
        let options = self.allow_parents_in.iter().fold(OpenOptions::new(), allow);
        Ok(relink(&options, &self.file, &self.parent)?)
    }
}
