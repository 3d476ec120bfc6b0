//! `cowvhd clone`: a new disk that goes on from a snapshot.

use crate::failure::Failure;
use crate::output;
use crate::parents::Folders;
use cowvhd::snapshot::clone_to;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// The version of the JSON object.
const SCHEMA: u32 = 1;

/// Makes a new disk that starts with what a snapshot holds.
///
/// It takes moments and almost no space: the new disk reads what it has not written itself from the snapshot, which stays as it is.
#[derive(Debug, clap::Args)]
pub(crate) struct Clone {
    /// The snapshot's file, or any other sealed image.
    snapshot: PathBuf,
    /// The file to make; it must not exist.
    file: PathBuf,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    folders: Folders,
}

/// The JSON object; docs/tool.md describes it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    schema: u32,
    filename: String,
    snapshot: String,
}

impl Clone {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        clone_to(&self.folders.options(), &self.snapshot, &self.file)?;
        let (of_snapshot, of_clone) = (folder(&self.snapshot), folder(&self.file));
        if of_snapshot.zip(of_clone).is_some_and(|(snapshot, clone)| !snapshot.starts_with(clone)) {
            output::say(format_args!(
                "{} is elsewhere than its snapshot: open it with --allow-parents-in {}",
                self.file.display(),
                folder(&self.snapshot).unwrap_or_default().display()
            ));
        }
        if !self.json {
            return Ok(());
        }
        let name = |path: &Path| path.to_string_lossy().into_owned();
        let (filename, snapshot) = (name(&self.file), name(&self.snapshot));
        output::print_json(&Report { schema: SCHEMA, filename, snapshot })
    }
}

/// The folder of a file, without links.
fn folder(path: &Path) -> Option<PathBuf> {
    Some(path.canonicalize().ok()?.parent()?.to_path_buf())
}
