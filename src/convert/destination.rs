//! What is copied into: a new image, all zeros at first.

use super::Format;
use crate::disk::{CreateOptions, Disk, OpenOptions};
use crate::error::{Error, Result};
use crate::layer::FixedEnd;
use crate::sync::Arc;
use crate::vfs::{File, FileExt, Vfs};
use crate::vhd;
use std::path::{Path, PathBuf};

/// A new image that is being written.
#[derive(Debug)]
pub(super) enum Destination {
    /// A file of the disk's bytes, and what comes behind them.
    Plain {
        /// The file's path.
        path: PathBuf,
        /// The file.
        file: Arc<dyn File>,
        /// Size of the disk in bytes.
        size: u64,
        /// Of a fixed VHD: its footer.
        end: Option<FixedEnd>,
    },
    /// A dynamic VHD.
    Dynamic(Disk),
}

impl Destination {
    /// Creates an image of `size` bytes at `path`, which must not exist.
    pub(super) fn create(vfs: &dyn Vfs, path: &Path, format: Format, size: u64) -> Result<Self> {
        let end = match format {
            Format::Raw => None,
            Format::Fixed => Some(FixedEnd::new(vfs, path, size)?),
            Format::Dynamic => {
                CreateOptions::new(size).create(path)?;
                return OpenOptions::new().open(path).map(Destination::Dynamic);
            }
        };
        let file = vfs.create_new(path).map_err(|error| Error::io(path, "creating the image", error))?;
        Ok(Destination::Plain { path: path.to_path_buf(), file, size, end })
    }

    /// Writes at any offset. The piece may end past the last whole sector only at the end of the disk.
    pub(super) fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        match self {
            Destination::Plain { path, file, .. } => file.write_all_at(buf, offset).map_err(|error| {
                Error::io(path, format!("writing {} bytes at offset {offset}", buf.len()), error)
            }),
            Destination::Dynamic(disk) => {
                let whole = buf.len() - buf.len() % vhd::SECTOR as usize;
                let (sectors, rest) = buf.split_at(whole);
                if !sectors.is_empty() {
                    disk.write_at(sectors, offset)?;
                }
                if !rest.is_empty() {
                    let mut last = [0; vhd::SECTOR as usize];
                    if let Some(start) = last.get_mut(..rest.len()) {
                        start.copy_from_slice(rest);
                    }
                    disk.write_at(&last, offset + whole as u64)?;
                }
                Ok(())
            }
        }
    }

    /// Makes the image complete and durable.
    pub(super) fn finish(self) -> Result<()> {
        match self {
            Destination::Plain { path, file, end: Some(end), .. } => end.write(&*file, &path),
            Destination::Plain { path, file, size, end: None } => file
                .set_len(size)
                .and_then(|()| file.sync_data())
                .map_err(|error| Error::io(&path, "making the new image durable", error)),
            Destination::Dynamic(disk) => disk.close(),
        }
    }
}
