//! Where the parents of a differencing disk may lie: the options that every verb has that opens one.

use cowvhd::OpenOptions;
use std::path::{Path, PathBuf};

/// Folders of parents.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Folders {
    /// A folder in which parents may lie, too, and below it; may be given several times.
    #[arg(long, value_name = "FOLDER")]
    allow_parents_in: Vec<PathBuf>,
}

impl Folders {
    /// How a disk is opened with them.
    pub(crate) fn options(&self) -> OpenOptions {
        let allow = |options: OpenOptions, folder: &PathBuf| options.allow_parents_in(folder);
        self.allow_parents_in.iter().fold(OpenOptions::new(), allow)
    }
}

/// Parents of a differencing disk. Without these they have to lie in the disk's own folder or below it.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Parents {
    /// Takes this file for the disk's parent, wherever the disk says it is; it still has to be the right one.
    #[arg(long, value_name = "FILE")]
    parent: Option<PathBuf>,
    #[command(flatten)]
    folders: Folders,
}

impl Parents {
    /// How a disk is opened with them.
    pub(crate) fn options(&self) -> OpenOptions {
        let options = self.folders.options();
        match &self.parent {
            Some(parent) => options.parent(parent),
            None => options,
        }
    }

    /// Whether none was given.
    pub(crate) fn are_default(&self) -> bool {
        self.parent.is_none() && self.folders.allow_parents_in.is_empty()
    }

    /// The caller's own path of the disk's parent.
    pub(crate) fn parent(&self) -> Option<&Path> {
        self.parent.as_deref()
    }
}
