//! `cowvhd snapshot revert`.

use super::state::State;
use crate::failure::Failure;
use crate::output;
use crate::parents::Parents;
use cowvhd::snapshot::{Reverted, SnapshotName, revert};
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;

/// The version of the JSON object.
const SCHEMA: u32 = 1;

/// Goes back to a snapshot: the disk shows again what it holds.
///
/// What was written to the disk since the last snapshot is lost. All snapshots stay. The disk must not be in use. Says which saved
/// state of a virtual machine goes with the disk now, and which one does no more.
#[derive(Debug, clap::Args)]
pub(crate) struct Revert {
    /// The disk's file.
    file: PathBuf,
    /// The snapshot's name.
    name: String,
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
    name: String,
    restored_state: Option<State>,
    dropped_state: Option<Dropped>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Dropped {
    /// Its manifest.
    filename: String,
    #[serde(flatten)]
    state: State,
}

impl Revert {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let name = SnapshotName::new(&self.name)?;
        let reverted = revert(&self.parents.options(), &self.file, &name)?;
        let report = self.report(&reverted)?;
        if self.json {
            return output::print_json(&report);
        }
        output::print(&report.text())
    }

    fn report(&self, reverted: &Reverted) -> Result<Report, Failure> {
        let dropped = reverted.dropped.as_ref().map(|state| {
            let filename = state.path().to_string_lossy().into_owned();
            Ok::<_, Failure>(Dropped { filename, state: State::of(state)? })
        });
        Ok(Report {
            schema: SCHEMA,
            filename: self.file.to_string_lossy().into_owned(),
            name: self.name.clone(),
            restored_state: reverted.restored.as_ref().map(State::new).transpose()?,
            dropped_state: dropped.transpose()?,
        })
    }
}

impl Report {
    fn text(&self) -> String {
        let mut text = match &self.restored_state {
            Some(state) => format!("restored: VM state{state}\n"),
            None => "restored: no VM state; none was saved with the snapshot\n".into(),
        };
        if let Some(Dropped { filename, state }) = &self.dropped_state {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "dropped: VM state{state}; it stays in {filename}");
        }
        text
    }
}
