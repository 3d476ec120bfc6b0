//! `cowvhd snapshot state` and `resumable`: what was saved of a virtual machine.

use crate::failure::Failure;
use crate::output;
use crate::parents::Parents;
use crate::size::Human;
use cowvhd::snapshot::{self, SnapshotName};
use cowvhd::state::{StateBlob, VmState};
use serde::Serialize;
use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::path::PathBuf;

/// The version of the JSON object.
const SCHEMA: u32 = 1;
/// Bytes that are written at once.
const PIECE_BYTES: u64 = 1 << 20;

/// Shows the VM state that was saved with a snapshot, or writes a part of it to standard output.
///
/// It has to be the one that the snapshot was taken with, and whole; a part that is written out is compared with its digest
/// first.
#[derive(Debug, clap::Args)]
pub(crate) struct StateOf {
    /// The disk's file.
    file: PathBuf,
    /// The snapshot's name.
    name: String,
    /// The part to write to standard output, such as ram.
    part: Option<String>,
    #[command(flatten)]
    how: How,
}

/// Shows the VM state that a disk can be resumed with: that of the snapshot beneath it.
///
/// Fails if anything was written to the disk since it was reverted to that snapshot, cloned from it, or went on from it:
/// the machine would find another disk than it remembers.
#[derive(Debug, clap::Args)]
pub(crate) struct Resumable {
    /// The disk's file, which nobody has open for writing.
    file: PathBuf,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, clap::Args)]
struct How {
    /// Reads all parts and compares them with their digests.
    #[arg(long)]
    verify: bool,
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
    verified: bool,
    disks: Vec<DiskOf>,
    parts: Vec<PartOf>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct DiskOf {
    filename: String,
    unique_id: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct PartOf {
    name: String,
    filename: String,
    file_size: u64,
    actual_size: u64,
    blake3: String,
}

/// A VM state in a few words.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct State {
    /// Why it cannot be used, if so.
    error: Option<String>,
    disks: usize,
    parts: Vec<Size>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Size {
    name: String,
    file_size: u64,
    actual_size: u64,
}

impl State {
    pub(super) fn new(found: &cowvhd::Result<VmState>) -> Result<Self, Failure> {
        match found {
            Err(error) => Ok(State { error: Some(error.to_string()), disks: 0, parts: Vec::new() }),
            Ok(state) => Self::of(state),
        }
    }

    pub(super) fn of(state: &VmState) -> Result<Self, Failure> {
        let size = |blob: &StateBlob| {
            let actual_size = blob.allocated_bytes()?;
            Ok(Size { name: blob.name().into(), file_size: blob.length(), actual_size })
        };
        let parts = state.blobs().iter().map(size).collect::<Result<_, Failure>>()?;
        Ok(State { error: None, disks: state.disks().len(), parts })
    }
}

/// Behind the words "VM state".
impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(error) = &self.error {
            return write!(f, " that cannot be used: {error}");
        }
        if self.disks > 1 {
            write!(f, " of {} disks", self.disks)?;
        }
        let part = |part: &Size| format!("{} {}", part.name, Human(part.actual_size));
        write!(f, ": {}", self.parts.iter().map(part).collect::<Vec<_>>().join(", "))
    }
}

impl StateOf {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let name = SnapshotName::new(&self.name)?;
        let state = snapshot::state(&self.how.parents.options(), &self.file, &name)?;
        match &self.part {
            None => self.how.show(&state),
            Some(part) => {
                let part = state.blob(part)?;
                part.verify()?;
                write_out(part)
            }
        }
    }
}

impl Resumable {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        self.how.show(&snapshot::resumable(&self.how.parents.options(), &self.file)?)
    }
}

fn write_out(part: &StateBlob) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::new(format!("cannot write to standard output: {error}"));
    let mut stdout = io::stdout().lock();
    let mut piece = vec![0; PIECE_BYTES as usize];
    let mut at = 0;
    while at < part.length() {
        let count = (part.length() - at).min(PIECE_BYTES);
        let piece = piece.get_mut(..count as usize).unwrap_or_default();
        part.read_at(piece, at)?;
        stdout.write_all(piece).map_err(failed)?;
        at += count;
    }
    stdout.flush().map_err(failed)
}

impl How {
    fn show(&self, state: &VmState) -> Result<(), Failure> {
        if self.verify {
            state.verify()?;
        }
        let part = |blob: &StateBlob| {
            Ok(PartOf {
                name: blob.name().into(),
                filename: blob.path().to_string_lossy().into_owned(),
                file_size: blob.length(),
                actual_size: blob.allocated_bytes()?,
                blake3: blob.digest().to_string(),
            })
        };
        let report = Report {
            schema: SCHEMA,
            filename: state.path().to_string_lossy().into_owned(),
            verified: self.verify,
            disks: state
                .disks()
                .iter()
                .map(|disk| DiskOf {
                    filename: String::from_utf8_lossy(&disk.file_name).into_owned(),
                    unique_id: disk.disk_id.to_string(),
                })
                .collect(),
            parts: state.blobs().iter().map(part).collect::<Result<_, Failure>>()?,
        };
        if self.json {
            return output::print_json(&report);
        }
        output::print(&report.text())
    }
}

impl Report {
    fn text(&self) -> String {
        let mut text = format!("VM state: {}\n", self.filename);
        for disk in &self.disks {
            let _ = writeln!(text, "disk: {} ({})", disk.filename, disk.unique_id);
        }
        for part in &self.parts {
            let _ = writeln!(
                text,
                "part: {}, {} ({} in use): {}",
                part.name,
                Human(part.file_size),
                Human(part.actual_size),
                part.filename
            );
        }
        if self.verified {
            text.push_str("all parts are what they were when the state was saved\n");
        }
        text
    }
}
