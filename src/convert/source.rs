//! What is copied from.

use crate::disk::{Disk, Extent, ExtentKind};
use crate::error::{Error, Result};
use crate::layer::lock;
use crate::sync::Arc;
use crate::vfs::{Access, File, FileExt, Vfs};
use crate::vhd::DiskType;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// An image that is read.
#[derive(Debug)]
pub(super) enum Source {
    /// A file that is the disk.
    Raw {
        /// The file's path.
        path: PathBuf,
        /// The file, locked against those who would write to it.
        file: Arc<dyn File>,
        /// Its length.
        bytes: u64,
    },
    /// A VHD.
    Disk {
        /// The disk, read-only.
        disk: Disk,
        /// The file that holds what it shows, where one does.
        file: Option<Arc<dyn File>>,
    },
}

/// A part of the disk that may hold data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Data {
    /// Bytes of the disk.
    pub(super) range: Range<u64>,
    /// Where it starts in [`Source::file`], if it stands there.
    pub(super) file_offset: Option<u64>,
}

impl Source {
    /// Opens a raw image.
    pub(super) fn raw(vfs: &dyn Vfs, path: &Path) -> Result<Self> {
        let io = |operation: &'static str| move |error| Error::io(path, operation, error);
        let file = vfs.open(path, Access::ReadOnly).map_err(io("opening the image"))?;
        lock(&*file, path, Access::ReadOnly)?;
        let bytes = file.length().map_err(io("asking for the length"))?;
        Ok(Source::Raw { path: path.to_path_buf(), file, bytes })
    }

    /// A VHD that is open for reading.
    pub(super) fn disk(disk: Disk) -> Self {
        Source::Disk { file: disk.stored_in(), disk }
    }

    /// The file from which the file system itself may copy, or share, data.
    pub(super) fn file(&self) -> Option<&dyn File> {
        match self {
            Source::Raw { file, .. } => Some(&**file),
            Source::Disk { file, .. } => file.as_deref(),
        }
    }

    /// The same file, if it starts with all bytes of the disk in order.
    pub(super) fn plain_file(&self) -> Option<&dyn File> {
        match self {
            Source::Disk { disk, .. } if disk.disk_type() != DiskType::Fixed => None,
            _ => self.file(),
        }
    }

    /// Size in bytes; of a raw image, not always whole sectors.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Source::Raw { bytes, .. } => *bytes,
            Source::Disk { disk, .. } => disk.size(),
        }
    }

    /// The parts of a range that may hold data, in order.
    pub(super) fn data(&self, range: Range<u64>) -> Result<Vec<Data>> {
        match self {
            Source::Raw { path, file, .. } => {
                let mut parts = Vec::new();
                let mut at = range.start;
                while at < range.end {
                    let next = file.next_data(at).map_err(|error| {
                        Error::io(path, format!("looking for data from offset {at} on"), error)
                    })?;
                    let Some(data) = next.filter(|data| data.start < range.end) else { break };
                    let part = data.start.max(at)..data.end.min(range.end);
                    parts.push(Data { file_offset: Some(part.start), range: part });
                    at = data.end;
                }
                Ok(parts)
            }
            Source::Disk { disk, .. } => Ok(disk
                .map(range.start, range.end - range.start)?
                .into_iter()
                .filter(|mapped| mapped.extent.kind == ExtentKind::Data)
                .map(|mapped| {
                    let Extent { offset, length, .. } = mapped.extent;
                    let file_offset = mapped.file_offset.filter(|_| mapped.depth == 0);
                    Data { range: offset..offset + length, file_offset }
                })
                .collect()),
        }
    }

    /// Reads within the disk.
    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match self {
            Source::Raw { path, file, .. } => file.read_or_zero_at(buf, offset).map_err(|error| {
                Error::io(path, format!("reading {} bytes at offset {offset}", buf.len()), error)
            }),
            Source::Disk { disk, .. } => disk.read_at(buf, offset),
        }
    }
}
