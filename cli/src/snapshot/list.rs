//! `cowvhd snapshot list`.

use crate::failure::Failure;
use crate::output;
use crate::parents::Parents;
use crate::size::Human;
use cowvhd::snapshot::{Listed, list};
use cowvhd::vhd::Timestamp;
use serde::Serialize;
use std::path::PathBuf;

/// The version of the JSON object.
const SCHEMA: u32 = 1;

/// Lists the snapshots of a disk, with the VM states that were saved with them. Works while the disk is served.
#[derive(Debug, clap::Args)]
pub(crate) struct List {
    /// The disk's file.
    file: PathBuf,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    parents: Parents,
}

/// The JSON object; docs/tool.md describes it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    schema: u32,
    filename: String,
    snapshots: Vec<Entry>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Entry {
    name: String,
    filename: String,
    taken: String,
    unique_id: String,
    actual_size: u64,
    depth: Option<u32>,
    vm_state: Option<State>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct State {
    /// Why it cannot be used, if so.
    error: Option<String>,
    disks: usize,
    parts: Vec<Part>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Part {
    name: String,
    file_size: u64,
    actual_size: u64,
}

impl List {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let found = list(&self.parents.options(), &self.file)?;
        let snapshots = found.iter().map(Entry::new).collect::<Result<Vec<_>, Failure>>()?;
        if !self.json {
            return output::print(&snapshots.iter().map(Entry::line).collect::<String>());
        }
        let filename = self.file.to_string_lossy().into_owned();
        let json = serde_json::to_string_pretty(&Report { schema: SCHEMA, filename, snapshots })
            .map_err(|error| Failure::new(format!("cannot write JSON: {error}")))?;
        output::print(&format!("{json}\n"))
    }
}

impl Entry {
    fn new(found: &Listed) -> Result<Self, Failure> {
        let vm_state = match &found.state {
            None => None,
            Some(Err(error)) => Some(State { error: Some(error.to_string()), disks: 0, parts: Vec::new() }),
            Some(Ok(state)) => {
                let part = |blob: &cowvhd::state::StateBlob| {
                    Ok(Part {
                        name: blob.name().into(),
                        file_size: blob.length(),
                        actual_size: blob.allocated_bytes()?,
                    })
                };
                let parts = state.blobs().iter().map(part).collect::<Result<_, Failure>>()?;
                Some(State { error: None, disks: state.disks().len(), parts })
            }
        };
        Ok(Entry {
            name: found.name.to_string(),
            filename: found.path.to_string_lossy().into_owned(),
            taken: Timestamp::from_unix_seconds(found.taken.seconds).to_string(),
            unique_id: found.unique_id.to_string(),
            actual_size: found.allocated_bytes,
            depth: found.depth,
            vm_state,
        })
    }

    fn line(&self) -> String {
        let state = match &self.vm_state {
            None => String::new(),
            Some(State { error: Some(error), .. }) => format!("  VM state that cannot be used: {error}"),
            Some(State { disks, parts, .. }) => {
                let parts: Vec<String> =
                    parts.iter().map(|part| format!("{} {}", part.name, Human(part.actual_size))).collect();
                let disks = if *disks > 1 { format!(" of {disks} disks") } else { String::new() };
                format!("  VM state{disks}: {}", parts.join(", "))
            }
        };
        let aside = if self.depth.is_none() { "  (not beneath the disk)" } else { "" };
        format!("{}  {}  {}{state}{aside}\n", self.name, self.taken, Human(self.actual_size))
    }
}
