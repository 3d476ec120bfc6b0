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
    /// Size of the disk: bytes, or 512M, 64G, 1T; a multiple of 512, at most 2040G unless fixed.
    #[arg(value_parser = size::parse)]
    size: u64,
    /// Makes a fixed disk: the guest's bytes in order, for Azure and other readers; it has no journal.
    #[arg(long)]
    fixed: bool,
}

impl Create {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let options = CreateOptions::new(self.size);
        let options = if self.fixed { options.fixed() } else { options };
        Ok(options.create(&self.file)?)
    }
}
