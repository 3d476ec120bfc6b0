//! `cowvhd create`: makes a new disk.

use crate::failure::Failure;
use crate::size;
use cowvhd::CreateOptions;
use std::path::PathBuf;

/// Makes a new, empty dynamic disk.
///
/// The file appears under its name only when it is complete. It starts at about 2 MiB and grows as the disk is written.
#[derive(Debug, clap::Args)]
pub(crate) struct Create {
    /// The file to make; it must not exist.
    file: PathBuf,
    /// Size of the disk: bytes, or 512M, 64G, 1T; a multiple of 512, at most 2040G.
    #[arg(value_parser = size::parse)]
    size: u64,
}

impl Create {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        Ok(CreateOptions::new(self.size).create(&self.file)?)
    }
}
