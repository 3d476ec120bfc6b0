//! `cowvhd merge`: a disk takes over what layers beneath it hold.

use crate::control::{Client, Request, Sockets};
use crate::failure::Failure;
use crate::long_work::Steps;
use crate::output;
use crate::parents::Parents;
use cowvhd::snapshot::{merge, snapshot_path};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The version of the JSON object.
const SCHEMA: u32 = 1;

/// Merges the layers beneath a disk into it.
///
/// The disk shows what it did, and needs those layers no more; their files stay, since other disks may be made over them. A disk that is
/// being served goes on being served: its server merges. ^C ends it at any time, and so does a kill: started again, it goes on where
/// it was.
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
    #[command(flatten)]
    steps: Steps,
    #[command(flatten)]
    sockets: Sockets,
    #[command(flatten)]
    parents: Parents,
}

/// What a merge did; a server tells it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Merged {
    pub(crate) copied_bytes: u64,
    pub(crate) layers: Vec<PathBuf>,
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
        let merged = match self.sockets.connect(&self.file)? {
            Some(client) => self.ask(client)?,
            None => {
                let (options, until) = (self.parents.options(), self.until.as_deref());
                let merged = self.steps.run(|progress| merge(&options, &self.file, until, progress));
                let merged = merged.map_err(Failure::without_server)?;
                Merged { copied_bytes: merged.copied, layers: merged.layers }
            }
        };
        if self.json {
            let report = Report {
                schema: SCHEMA,
                filename: self.file.to_string_lossy().into_owned(),
                copied_bytes: merged.copied_bytes,
                layers: merged.layers.iter().map(|path| path.to_string_lossy().into_owned()).collect(),
            };
            return output::print_json(&report);
        }
        let lines = merged.layers.iter().map(|path| format!("no longer needed: {}\n", path.display()));
        output::print(&lines.collect::<String>())
    }

    fn ask(&self, mut client: Client) -> Result<Merged, Failure> {
        let until = self.until.as_deref().map(|until| self.point(until)).transpose()?;
        let merged = client.work(&Request::Merge { until, rate: self.steps.rate }, &self.steps)?;
        serde_json::from_value(merged)
            .map_err(|error| Failure::new(format!("the server's answer cannot be understood: {error}")))
    }

    /// A point as a server understands it, whose working directory may be another one.
    fn point(&self, until: &Path) -> Result<PathBuf, Failure> {
        let snapshot = until.to_str().and_then(|name| snapshot_path(&self.file, name));
        if snapshot.is_some_and(|path| path.exists()) {
            return Ok(until.to_path_buf());
        }
        std::path::absolute(until).map_err(|error| Failure::new(format!("{}: {error}", until.display())))
    }
}
