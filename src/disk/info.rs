//! What a file says about itself, read without locking or changing it: works beside a server that has it open.

use crate::error::{Error, Result};
use crate::layer::{Condition, Foreign, Headers, OpenReport};
use crate::vfs::{Access, HostVfs, Vfs};
use crate::vhd::{DiskType, Timestamp, UniqueId};
use std::path::{Path, PathBuf};

/// Whether the journal of an image holds anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JournalState {
    /// The image was not made by cowvhd: it has no journal.
    None,
    /// Closed cleanly.
    Clean,
    /// Open now, or left without closing: the next open for writing recovers it.
    Dirty,
}

/// The description of an image file.
#[derive(Debug, Clone)]
pub struct DiskInfo {
    /// The file.
    pub path: PathBuf,
    /// Fixed, dynamic or differencing.
    pub disk_type: DiskType,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Bytes of the medium that the file occupies.
    pub allocated_bytes: u64,
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// Data bytes of a block.
    pub block_bytes: u32,
    /// The disk's unique id.
    pub unique_id: UniqueId,
    /// When the disk was made.
    pub created: Timestamp,
    /// The journal.
    pub journal: JournalState,
    /// A sync failed in this or an earlier session: acknowledged data may be missing.
    pub sync_failed: bool,
}

impl DiskInfo {
    /// Describes the image at `path`.
    pub fn read(path: &Path) -> Result<Self> {
        let file = HostVfs
            .open(path, Access::ReadOnly)
            .map_err(|error| Error::io(path, "opening the image", error))?;
        let headers = Headers::read(&*file, path)?;
        let decision = headers.decide(path)?;
        let superblock = decision.superblock.map(|(superblock, _)| superblock);
        let journal = match (superblock, decision.condition) {
            (None, _) => JournalState::None,
            (Some(_), Condition::Clean) => JournalState::Clean,
            (Some(_), _) => JournalState::Dirty,
        };
        Ok(DiskInfo {
            path: path.to_path_buf(),
            disk_type: decision.footer.disk_type,
            virtual_size: decision.footer.current_size,
            allocated_bytes: file
                .allocated_bytes()
                .map_err(|error| Error::io(path, "asking for the space it occupies", error))?,
            file_bytes: headers.file_bytes,
            block_bytes: decision.header.block_size,
            unique_id: decision.footer.unique_id,
            created: decision.footer.timestamp,
            journal,
            sync_failed: superblock.is_some_and(|superblock| superblock.sync_failed),
        })
    }
}

/// What an open has to tell a person.
pub(super) fn notices(report: &OpenReport, read_only: bool) -> Vec<String> {
    let mut notices = Vec::new();
    match (report.condition, read_only) {
        (Condition::Clean, _) => {}
        (Condition::Dirty, false) => {
            notices.push("recovered from its journal: it had not been closed".into())
        }
        (Condition::Dirty, true) => {
            notices.push(
                "it had not been closed: its journal was replayed in memory, the file is unchanged".into(),
            );
        }
        (Condition::HalfClosed, _) => notices.push("its last close was cut short; nothing was lost".into()),
    }
    if report.front_lost {
        notices.push(
            "the start of the file was unreadable: footer and header were taken from their backup".into(),
        );
    }
    match report.foreign {
        Foreign::StructureChanged => {
            notices.push(
                "another program has written to it since it was closed here: what it wrote is kept".into(),
            );
        }
        Foreign::Untouched | Foreign::TimeChanged => {}
    }
    if let Some(doubt) = &report.doubt {
        notices.push(format!("{doubt}; it can be read, but not written"));
    }
    if report.sync_failed {
        notices.push("a sync failed in an earlier session: data that was acknowledged may be missing".into());
    }
    notices
}
