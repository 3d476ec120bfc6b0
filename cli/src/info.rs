//! `cowvhd info`: what a file says about itself.

use crate::failure::Failure;
use crate::output;
use crate::size::Human;
use cowvhd::vhd::{DiskType, UniqueId};
use cowvhd::{DiskInfo, ForeignChanges, JournalState};
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;

/// The version of the JSON shape: it grows when a key changes its meaning or goes; new keys alone leave it.
const SCHEMA: u32 = 1;

/// Describes a disk file without changing it.
///
/// Works beside a server that has the file open; the file then reads as dirty.
#[derive(Debug, clap::Args)]
pub(crate) struct Info {
    /// The disk's file.
    file: PathBuf,
    /// Prints one JSON object; its keys are those of "qemu-img info", and more.
    #[arg(long)]
    json: bool,
}

impl Info {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let report = Report::new(&DiskInfo::read(&self.file)?);
        if !self.json {
            return output::print(&report.to_string());
        }
        output::print_json(&report)
    }
}

/// What is told about a disk. Sizes are in bytes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    schema: u32,
    filename: String,
    /// QEMU's name for VHD.
    format: &'static str,
    vhd_type: String,
    virtual_size: u64,
    /// What the file occupies on its file system.
    actual_size: u64,
    /// The file's length.
    file_size: u64,
    /// The size of a block; a fixed disk has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u32>,
    /// Whether the journal may hold what is not in place yet.
    dirty_flag: bool,
    journal: &'static str,
    sync_failed: bool,
    /// What another program did since the last close here.
    foreign_changes: &'static str,
    /// Why it can be read and not written; null where nothing speaks against it.
    doubt: Option<String>,
    /// The process that has it open; null where there is none, or nothing tells.
    in_use_by: Option<String>,
    unique_id: String,
    created: String,
    sealed: bool,
    /// The name of the snapshot that it is, or null.
    snapshot: Option<String>,
    /// QEMU's key for the parent, as the image names it; null where it has none.
    backing_filename: Option<String>,
    parent_unique_id: Option<String>,
    /// The images that are registered as made over it.
    children: Vec<Child>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Child {
    filename: String,
    unique_id: String,
}

impl Report {
    fn new(info: &DiskInfo) -> Self {
        Report {
            schema: SCHEMA,
            filename: info.path.to_string_lossy().into_owned(),
            format: "vpc",
            vhd_type: info.disk_type.to_string(),
            virtual_size: info.virtual_size,
            actual_size: info.allocated_bytes,
            file_size: info.file_bytes,
            cluster_size: info.block_bytes,
            dirty_flag: info.journal == JournalState::Dirty,
            journal: match info.journal {
                JournalState::None => "none",
                JournalState::Clean => "clean",
                JournalState::Dirty => "dirty",
            },
            sync_failed: info.sync_failed,
            foreign_changes: match info.foreign_changes {
                ForeignChanges::None => "none",
                ForeignChanges::Time => "time",
                ForeignChanges::Structure => "structure",
            },
            doubt: info.doubt.clone(),
            in_use_by: info.holder.clone(),
            unique_id: info.unique_id.to_string(),
            created: info.created.to_string(),
            sealed: info.sealed,
            snapshot: info.snapshot.clone(),
            backing_filename: info.parent.as_ref().and_then(|parent| parent.path.clone()),
            parent_unique_id: info.parent.as_ref().map(|parent| parent.unique_id.to_string()),
            children: info.children.iter().map(Child::new).collect(),
        }
    }
}

impl Child {
    fn new((unique_id, path): &(UniqueId, PathBuf)) -> Self {
        Child { filename: path.to_string_lossy().into_owned(), unique_id: unique_id.to_string() }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "image: {}", self.filename)?;
        writeln!(f, "file format: {} (VHD, {})", self.format, self.vhd_type)?;
        writeln!(f, "virtual size: {} ({} bytes)", Human(self.virtual_size), self.virtual_size)?;
        writeln!(f, "disk size: {}", Human(self.actual_size))?;
        if let Some(cluster_size) = self.cluster_size {
            writeln!(f, "cluster_size: {cluster_size}")?;
        }
        writeln!(f, "unique id: {}", self.unique_id)?;
        writeln!(f, "created: {}", self.created)?;
        match (&self.snapshot, self.sealed) {
            (Some(name), _) => writeln!(f, "sealed: as snapshot \"{name}\"")?,
            (None, true) => writeln!(f, "sealed: other disks are made over it")?,
            (None, false) => {}
        }
        if let Some(id) = &self.parent_unique_id {
            let name = self.backing_filename.as_deref().unwrap_or("not named");
            writeln!(f, "backing file: {name} (unique id {id})")?;
        }
        for child in &self.children {
            writeln!(f, "child: {} (unique id {})", child.filename, child.unique_id)?;
        }
        let journal = match self.journal {
            "none" if self.vhd_type == DiskType::Fixed.to_string() => "none (a fixed disk has none)",
            "none" => "none (not made by cowvhd)",
            "dirty" if self.in_use_by.is_some() => "dirty (open now)",
            "dirty" => "dirty (open now, or was not closed: the next open for writing recovers it)",
            other => other,
        };
        writeln!(f, "journal: {journal}")?;
        if let Some(holder) = &self.in_use_by {
            writeln!(f, "in use by: {holder}")?;
        }
        match self.foreign_changes {
            "structure" => writeln!(f, "changed since it was closed: another program has written to it")?,
            "time" => writeln!(
                f,
                "changed since it was closed: only its time differs (it was copied, or data was overwritten in place)"
            )?,
            _ => {}
        }
        if let Some(doubt) = &self.doubt {
            writeln!(f, "warning: {doubt}; it can be read, but not written")?;
        }
        if self.sync_failed {
            writeln!(
                f,
                "warning: a sync failed in this or an earlier session: data that was acknowledged may be missing"
            )?;
        }
        Ok(())
    }
}
