//! `cowvhd upgrade`: an image of another program becomes one like those made here.

use crate::failure::Failure;
use crate::output;
use cowvhd::vfs::HostVfs;
use std::path::PathBuf;
use std::sync::Arc;

/// Gives a dynamic or differencing VHD that another program made a journal of its own, in place.
///
/// What a guest sees stays the same, and every VHD tool reads the file as before. A few MiB at most are moved. May be
/// stopped and repeated at any moment.
#[derive(Debug, clap::Args)]
pub(crate) struct Upgrade {
    /// The disk's file.
    file: PathBuf,
}

impl Upgrade {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let file = self.file.display();
        match cowvhd::upgrade(Arc::new(HostVfs), &self.file)? {
            true => output::print(&format!("{file}: upgraded\n")),
            false => output::print(&format!("{file}: nothing to do, it has a journal of its own\n")),
        }
    }
}
