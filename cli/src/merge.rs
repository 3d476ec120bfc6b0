//! `cowvhd merge`: a disk takes over what layers beneath it hold.

use crate::failure::Failure;
use crate::long_work::long_work;
use crate::output;
use crate::parents::Parents;
use crate::progress::Style;
use cowvhd::snapshot::merge;
use serde::Serialize;
use std::path::PathBuf;

/// The version of the JSON object.
const SCHEMA: u32 = 1;

/// Merges the layers beneath a disk into it.
///
/// The disk shows what it did, and needs those layers no more; their files stay, since other disks may be made over them. It must not
/// be in use. ^C ends it at any time, and so does a kill: started again, it goes on where it was.
#[derive(Debug, clap::Args)]
pub(crate) struct Merge {
    /// The disk's file.
    file: PathBuf,
    /// Merges the layers above this ancestor, which becomes the disk's parent: the name of a snapshot, or the path of a layer. Without
    /// it the disk takes over all layers and needs no parent any more.
    #[arg(long, value_name = "POINT")]
    until: Option<PathBuf>,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
    /// How progress is shown; "auto" draws a bar on a terminal and nothing elsewhere.
    #[arg(long, value_name = "STYLE", default_value = "auto")]
    progress: Style,
    #[command(flatten)]
    parents: Parents,
}

/// The JSON object; docs/tool.md describes it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    schema: u32,
    filename: String,
    copied_bytes: u64,
    layers: Vec<String>,
}

impl Merge {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let options = self.parents.options();
        let merged = long_work(self.progress, |progress| {
            merge(&options, &self.file, self.until.as_deref(), progress)
        })??;
        if self.json {
            let report = Report {
                schema: SCHEMA,
                filename: self.file.to_string_lossy().into_owned(),
                copied_bytes: merged.copied,
                layers: merged.layers.iter().map(|path| path.to_string_lossy().into_owned()).collect(),
            };
            let json = serde_json::to_string_pretty(&report)
                .map_err(|error| Failure::new(format!("cannot write JSON: {error}")))?;
            return output::print(&format!("{json}\n"));
        }
        let lines = merged.layers.iter().map(|path| format!("no longer needed: {}\n", path.display()));
        output::print(&lines.collect::<String>())
    }
}
