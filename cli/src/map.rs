//! `cowvhd map`: where the data of a disk stands in its file.

use crate::failure::Failure;
use crate::output;
use crate::parents::Parents;
use cowvhd::{ExtentKind, MappedExtent};
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;

/// Shows which parts of a disk hold data, and where in the file.
///
/// Works on a disk that nobody has open for writing, and does not change it.
#[derive(Debug, clap::Args)]
pub(crate) struct Map {
    /// The disk's file.
    file: PathBuf,
    /// Prints a JSON array in the shape of "qemu-img map --output=json".
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    parents: Parents,
}

/// A range of the disk, in bytes.
#[derive(Debug, Serialize)]
struct Range {
    start: u64,
    length: u64,
    /// How many layers down the chain; 0 is the file itself.
    depth: u32,
    /// Whether the file decides what it reads as; as in qemu-img, that is always so where there is no parent.
    present: bool,
    zero: bool,
    data: bool,
    /// Where it starts in the file, if it has a place there.
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

impl From<&MappedExtent> for Range {
    fn from(mapped: &MappedExtent) -> Self {
        let data = mapped.extent.kind == ExtentKind::Data;
        Range {
            start: mapped.extent.offset,
            length: mapped.extent.length,
            depth: mapped.depth,
            present: true,
            zero: !data,
            data,
            offset: mapped.file_offset,
        }
    }
}

impl Map {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let disk = self.parents.options().read_only(true).open(&self.file)?;
        let ranges: Vec<Range> = disk.map(0, disk.size())?.iter().map(Range::from).collect();
        output::print(&if self.json { json(&ranges)? } else { self.table(&ranges) })
    }

    fn table(&self, ranges: &[Range]) -> String {
        let mut text = format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to");
        for Range { start, length, offset, .. } in ranges.iter().filter(|range| range.data) {
            let offset = offset.unwrap_or_default();
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{start:<#16x}{length:<#16x}{offset:<#16x}{}", self.file.display());
        }
        text
    }
}

/// One range a line, as qemu-img has it.
fn json(ranges: &[Range]) -> Result<String, Failure> {
    let lines: Result<Vec<String>, _> = ranges.iter().map(serde_json::to_string).collect();
    let lines = lines.map_err(|error| Failure::new(format!("cannot write JSON: {error}")))?;
    Ok(format!("[{}]\n", lines.join(",\n")))
}
