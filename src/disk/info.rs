//! What a file says about itself, read without locking or changing it: works beside a server that has it open.

use crate::chain::{self, Children};
use crate::error::{Error, Result};
use crate::ext::Child;
use crate::layer::{self, Condition, Foreign, Headers, OpenReport};
use crate::sync::Arc;
use crate::vfs::{Access, File, HostVfs, Vfs};
use crate::vhd::{DiskType, Footer, Timestamp, UniqueId};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Whether the journal of an image holds anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JournalState {
    /// The image was not made by cowvhd: it has no journal.
    None,
    /// Closed cleanly.
    Clean,
    /// Open now, or left without closing: the next open for writing recovers it, unless there is a doubt.
    Dirty,
}

/// What another program did to an image since cowvhd closed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForeignChanges {
    /// Nothing.
    None,
    /// The file's time differs and nothing else: it was copied, or another program overwrote data in place.
    Time,
    /// Its structure differs: another program added blocks, or wrote headers.
    Structure,
}

/// What an image says of its parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentInfo {
    /// The unique id that the parent has to have.
    pub unique_id: UniqueId,
    /// The path by which it is looked for first, as the image has it; `None` where it has none that can be read.
    pub path: Option<String>,
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
    /// Data bytes of a block; a fixed disk has none.
    pub block_bytes: Option<u32>,
    /// The disk's unique id.
    pub unique_id: UniqueId,
    /// When the disk was made.
    pub created: Timestamp,
    /// The journal.
    pub journal: JournalState,
    /// A sync failed in this or an earlier session: acknowledged data may be missing.
    pub sync_failed: bool,
    /// What another program did to it since it was closed here; only a clean image tells.
    pub foreign_changes: ForeignChanges,
    /// Why it can be read and not written: its structures contradict each other.
    pub doubt: Option<String>,
    /// It is sealed, or a fixed disk that nobody may write to: other disks show what it holds, so that it never changes.
    pub sealed: bool,
    /// The name of the snapshot that it is, if it is one.
    pub snapshot: Option<String>,
    /// What it is made over.
    pub parent: Option<ParentInfo>,
    /// The images that are registered as made over it, found or not: their unique ids, and their paths from its folder.
    pub children: Vec<(UniqueId, PathBuf)>,
    /// The process that has it open, such as `cowvhd (pid 123)`, as far as the system tells.
    pub holder: Option<String>,
}

impl DiskInfo {
    /// Describes the image at `path`.
    pub fn read(path: &Path) -> Result<Self> {
        let file = HostVfs
            .open(path, Access::ReadOnly)
            .map_err(|error| Error::io(path, "opening the image", error))?;
        if let Some(footer) = layer::fixed_footer(&*file, path)? {
            let sealed = file.is_read_only();
            let sealed = sealed.map_err(|error| Error::io(path, "asking who may write to it", error))?;
            return Ok(DiskInfo { sealed, ..Self::new(&file, path, &footer)? });
        }
        let headers = Headers::read(&*file, path)?;
        let decision = headers.decide(path)?;
        let superblock = decision.superblock.map(|(superblock, _)| superblock);
        let journal = match (superblock, decision.condition) {
            (None, _) => JournalState::None,
            (Some(_), Condition::Clean) if decision.unreplayed.is_none() => JournalState::Clean,
            (Some(_), _) => JournalState::Dirty,
        };
        let foreign_changes = match journal {
            JournalState::Clean => layer::foreign_changes(Arc::new(HostVfs), Arc::clone(&file), path)?.into(),
            JournalState::None | JournalState::Dirty => ForeignChanges::None,
        };
        let lineage = decision.lineage();
        let snapshot = String::from_utf8_lossy(lineage.snapshot.as_bytes()).into_owned();
        let parent = (decision.footer.disk_type == DiskType::Differencing).then(|| ParentInfo {
            unique_id: decision.header.parent_unique_id,
            path: chain::claimed_path(&*file, &decision.header),
        });
        // An image without a registry has none.
        let children = Children::of(&*file, path).and_then(|children| children.read()).unwrap_or_default();
        let child = |child: Child| (child.id, PathBuf::from(OsString::from_vec(child.path)));
        Ok(DiskInfo {
            sealed: lineage.is_sealed(),
            snapshot: Some(snapshot).filter(|name| lineage.is_sealed() && !name.is_empty()),
            parent,
            children: children.into_iter().map(child).collect(),
            block_bytes: Some(decision.header.block_size),
            journal,
            sync_failed: superblock.is_some_and(|superblock| superblock.sync_failed),
            foreign_changes,
            doubt: decision.doubt.clone(),
            ..Self::new(&file, path, &decision.footer)?
        })
    }

    /// What holds for every kind of image.
    fn new(file: &Arc<dyn File>, path: &Path, footer: &Footer) -> Result<Self> {
        Ok(DiskInfo {
            path: path.to_path_buf(),
            disk_type: footer.disk_type,
            virtual_size: footer.current_size,
            allocated_bytes: file
                .allocated_bytes()
                .map_err(|error| Error::io(path, "asking for the space it occupies", error))?,
            file_bytes: file.length().map_err(|error| Error::io(path, "asking for the length", error))?,
            block_bytes: None,
            unique_id: footer.unique_id,
            created: footer.timestamp,
            journal: JournalState::None,
            sync_failed: false,
            foreign_changes: ForeignChanges::None,
            doubt: None,
            sealed: false,
            snapshot: None,
            parent: None,
            children: Vec::new(),
            holder: file.holder(),
        })
    }
}

impl From<Foreign> for ForeignChanges {
    fn from(foreign: Foreign) -> Self {
        match foreign {
            Foreign::Untouched => ForeignChanges::None,
            Foreign::TimeChanged => ForeignChanges::Time,
            Foreign::StructureChanged => ForeignChanges::Structure,
        }
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
    notices.extend(report.stand_ins.iter().cloned());
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
