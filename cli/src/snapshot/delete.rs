//! `cowvhd snapshot delete`.

use crate::control::{Request, Sockets};
use crate::failure::Failure;
use crate::long_work::Steps;
use crate::output;
use crate::parents::Parents;
use cowvhd::snapshot::{SnapshotName, delete};
use serde::Serialize;
use std::path::PathBuf;

/// The version of the JSON object.
const SCHEMA: u32 = 1;

/// Deletes a snapshot. What the disk, its other snapshots and all other disks show stays the same.
///
/// What the snapshot holds moves into the layer over it; then its file goes. A disk that is being served goes on being served: its server
/// does it. A snapshot that another disk is made over stays. ^C ends it at any time, and so does a kill: started again, it goes on where
/// it was.
///
/// A snapshot that is a fixed disk cannot say which other disks are made over it: its file stays, and this says so.
#[derive(Debug, clap::Args)]
pub(crate) struct Delete {
    /// The disk's file.
    file: PathBuf,
    /// The snapshot.
    name: String,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    steps: Steps,
    #[command(flatten)]
    sockets: Sockets,
    #[command(flatten)]
    parents: Parents,
}

/// The JSON object; docs/tool.md describes it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    schema: u32,
    filename: String,
    name: String,
    copied_bytes: u64,
    kept: Option<String>,
}

impl Delete {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let name = SnapshotName::new(&self.name)?;
        let (copied_bytes, kept) = match self.sockets.connect(&self.file)? {
            Some(mut client) => {
                let request = Request::SnapshotDelete { name: self.name.clone(), rate: self.steps.rate };
                let answer = client.work(&request, &self.steps)?;
                let copied = answer.get("copied-bytes").and_then(|bytes| bytes.as_u64()).unwrap_or_default();
                (copied, answer.get("kept").and_then(|path| path.as_str()).map(String::from))
            }
            None => {
                let options = self.parents.options();
                let deleted = self.steps.run(|progress| delete(&options, &self.file, &name, progress));
                let deleted = deleted.map_err(Failure::without_server)?;
                (deleted.copied, deleted.kept.map(|path| path.to_string_lossy().into_owned()))
            }
        };
        if !self.json {
            return match kept {
                None => Ok(()),
                Some(kept) => output::print(&format!(
                    "kept: {kept}: the disk does without it; it is a fixed disk, which cannot say what else is made over it: \
                     remove it yourself if nothing needs it\n"
                )),
            };
        }
        let filename = self.file.to_string_lossy().into_owned();
        let name = name.to_string();
        output::print_json(&Report { schema: SCHEMA, filename, name, copied_bytes, kept })
    }
}
