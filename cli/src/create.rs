//! `cowvhd create`: makes a new disk.

use crate::failure::Failure;
use crate::size;
use cowvhd::CreateOptions;
use std::path::PathBuf;

/// Makes a new, empty disk.
///
/// The file appears under its name only when it is complete. That of a dynamic disk starts at about 2 MiB and grows as
/// the disk is written. That of a fixed disk is sparse: it has its length at once, and takes up space as it is written.
#[derive(Debug, clap::Args)]
pub(crate) struct Create {
    /// The file to make; it must not exist.
    file: PathBuf,
    /// Size of the disk: bytes, or 512M, 64G, 1T; a multiple of 512, at most 2040G unless fixed. A differencing disk has that
    /// of its parent.
    #[arg(value_parser = size::parse, required_unless_present = "parent", conflicts_with = "parent")]
    size: Option<u64>,
    /// Makes a fixed disk: the guest's bytes in order, for Azure and other readers; it has no journal.
    #[arg(long)]
    fixed: bool,
    /// Makes a differencing disk over this one, which must not be written to from then on.
    #[arg(long, value_name = "FILE", conflicts_with = "fixed")]
    parent: Option<PathBuf>,
    /// A folder in which the parent's own parents may lie, besides the parent's; may be given several times.
    #[arg(long, value_name = "FOLDER", requires = "parent")]
    allow_parents_in: Vec<PathBuf>,
}

impl Create {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let options = match &self.parent {
            Some(parent) => CreateOptions::child_of(parent),
            None => CreateOptions::new(self.size.unwrap_or_default()),
        };
        let options = if self.fixed { options.fixed() } else { options };
        let options =
            self.allow_parents_in.iter().fold(options, |options, folder| options.allow_parents_in(folder));
        Ok(options.create(&self.file)?)
    }
}
