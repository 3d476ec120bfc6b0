//! `cowvhd snapshot list`.

use super::state::State;
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

impl List {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let found = list(&self.parents.options(), &self.file)?;
        let snapshots = found.iter().map(Entry::new).collect::<Result<Vec<_>, Failure>>()?;
        if !self.json {
            return output::print(&snapshots.iter().map(Entry::line).collect::<String>());
        }
        let filename = self.file.to_string_lossy().into_owned();
        output::print_json(&Report { schema: SCHEMA, filename, snapshots })
    }
}

impl Entry {
    fn new(found: &Listed) -> Result<Self, Failure> {
        let vm_state = found.state.as_ref().map(State::new).transpose()?;
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
            Some(state) => format!("  VM state{state}"),
        };
        let aside = if self.depth.is_none() { "  (not beneath the disk)" } else { "" };
        format!("{}  {}  {}{state}{aside}\n", self.name, self.taken, Human(self.actual_size))
    }
}
