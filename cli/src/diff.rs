//! `cowvhd diff`: which parts of a disk changed between two points of its chain.

use crate::failure::Failure;
use crate::output;
use crate::parents::Parents;
use crate::size::Human;
use cowvhd::snapshot::{Change, ChangeKind, Diff as Found, diff};
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;

/// The version of the JSON object.
const SCHEMA: u32 = 1;

/// Shows which parts of a disk changed between two points of its chain.
///
/// A point is the name of a snapshot (NAME is vm@NAME.vhd beside vm.vhd) or the path of a layer. Block tables and bitmaps
/// tell; no data is read, so that this takes moments whatever the size. What was written with the bytes that were there
/// counts as changed. Between two snapshots this works while the disk is in use.
#[derive(Debug, clap::Args)]
pub(crate) struct Diff {
    /// The disk's file.
    file: PathBuf,
    /// The older point.
    #[arg(long, value_name = "POINT")]
    from: PathBuf,
    /// The newer point; without it, the disk as it is now.
    #[arg(long, value_name = "POINT")]
    to: Option<PathBuf>,
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
    from: String,
    to: Option<String>,
    virtual_size_before: u64,
    virtual_size: u64,
    changed_bytes: u64,
    extents: Vec<Extent>,
}

/// A range of the disk, in bytes; keys as qemu-img map has them.
#[derive(Debug, Serialize)]
struct Extent {
    start: u64,
    length: u64,
    zero: bool,
    data: bool,
}

impl From<&Change> for Extent {
    fn from(change: &Change) -> Self {
        let data = change.kind == ChangeKind::Data;
        Extent { start: change.offset, length: change.length, zero: !data, data }
    }
}

impl Diff {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let found = diff(&self.parents.options(), &self.file, &self.from, self.to.as_deref())?;
        output::print(&if self.json { self.json(&found)? } else { table(&found) })
    }

    fn json(&self, found: &Found) -> Result<String, Failure> {
        let report = Report {
            schema: SCHEMA,
            filename: self.file.to_string_lossy().into_owned(),
            from: self.from.to_string_lossy().into_owned(),
            to: self.to.as_ref().map(|to| to.to_string_lossy().into_owned()),
            virtual_size_before: found.size_before,
            virtual_size: found.size,
            changed_bytes: found.changes.iter().map(|change| change.length).sum(),
            extents: found.changes.iter().map(Extent::from).collect(),
        };
        output::json(&report)
    }
}

fn table(found: &Found) -> String {
    let mut text = format!("{:<16}{:<16}Holds\n", "Offset", "Length");
    for Change { offset, length, kind } in &found.changes {
        let kind = match kind {
            ChangeKind::Data => "data",
            ChangeKind::Zero => "zeros",
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{offset:<#16x}{length:<#16x}{kind}");
    }
    let bytes =
        |kind| found.changes.iter().filter(|change| change.kind == kind).map(|change| change.length).sum();
    let (data, zeros) = (Human(bytes(ChangeKind::Data)), Human(bytes(ChangeKind::Zero)));
    let _ = writeln!(text, "{} changes: {data} of data, {zeros} of zeros", found.changes.len());
    if found.size != found.size_before {
        let _ = writeln!(text, "size: {} bytes, before {}", found.size, found.size_before);
    }
    text
}
