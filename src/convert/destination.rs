//! What is copied into: a new image, all zeros at first.

use super::Format;
use crate::disk::{CreateOptions, Disk, OpenOptions};
use crate::error::{Error, Result};
use crate::layer::FixedEnd;
use crate::sync::Arc;
use crate::vfs::{File, FileExt, Vfs};
use crate::vhd;
use std::cell::Cell;
use std::io;
use std::path::{Path, PathBuf};

/// The file system is asked to copy, or share, what is at least so long: each piece that is shared costs it an extent.
const MIN_COPY_BYTES: u64 = 64 << 10;

/// Where data that is to be written stands already.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stored<'a> {
    /// The file.
    pub(super) file: &'a dyn File,
    /// The byte in it.
    pub(super) offset: u64,
}

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
        /// The file system copies from the source's file by itself, as far as is known.
        copies: Cell<bool>,
    },
    /// A dynamic VHD.
    Dynamic(Disk),
}

impl Destination {
    /// Creates an image of `size` bytes at `path`, which must not exist.
    pub(super) fn create(vfs: &Arc<dyn Vfs>, path: &Path, format: Format, size: u64) -> Result<Self> {
        let end = match format {
            Format::Raw => None,
            Format::Fixed => Some(FixedEnd::new(&**vfs, path, size)?),
            Format::Dynamic => {
                CreateOptions::new(size).vfs(Arc::clone(vfs)).create(path)?;
                return OpenOptions::new().vfs(Arc::clone(vfs)).open(path).map(Destination::Dynamic);
            }
        };
        let file = vfs.create_new(path).map_err(|error| Error::io(path, "creating the image", error))?;
        let copies = Cell::new(true);
        Ok(Destination::Plain { path: path.to_path_buf(), file, size, end, copies })
    }

    /// Takes over, with its space, all of a file that starts with the `bytes` bytes of the disk in order. False, and nothing is
    /// changed, where the file system or the kind of image does not allow it.
    pub(super) fn clone_whole(&self, source: &dyn File, bytes: u64) -> Result<bool> {
        match self {
            Destination::Plain { path, file, .. } if file.clone_whole(source).is_ok() => file
                .set_len(bytes)
                .map(|()| true)
                .map_err(|error| Error::io(path, "giving the new image its length", error)),
            _ => Ok(false),
        }
    }

    /// Writes at any offset. The piece may end past the last whole sector only at the end of the disk. `stored` is where the same
    /// bytes stand already. True if the file system copied them from there.
    pub(super) fn write_at(&self, buf: &[u8], offset: u64, stored: Option<Stored<'_>>) -> Result<bool> {
        match self {
            Destination::Plain { path, file, copies, .. } => {
                if let Some(stored) = stored.filter(|_| copies.get() && buf.len() as u64 >= MIN_COPY_BYTES) {
                    // What a failed copy has left is overwritten; if the file system is full, writing says so.
                    copies.set(copy_all(&**file, offset, stored, buf.len() as u64).is_ok());
                    if copies.get() {
                        return Ok(true);
                    }
                }
                file.write_all_at(buf, offset).map(|()| false).map_err(|error| {
                    Error::io(path, format!("writing {} bytes at offset {offset}", buf.len()), error)
                })
            }
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
                Ok(false)
            }
        }
    }

    /// Makes the image complete and durable.
    pub(super) fn finish(self) -> Result<()> {
        match self {
            Destination::Plain { path, file, end: Some(end), .. } => end.write(&*file, &path),
            Destination::Plain { path, file, size, end: None, .. } => file
                .set_len(size)
                .and_then(|()| file.sync_data())
                .map_err(|error| Error::io(&path, "making the new image durable", error)),
            Destination::Dynamic(disk) => disk.close(),
        }
    }
}

/// Has the file system copy `length` bytes.
fn copy_all(file: &dyn File, mut offset: u64, mut stored: Stored<'_>, mut length: u64) -> io::Result<()> {
    while length > 0 {
        match file.copy_from(offset, stored.file, stored.offset, length) {
            // The source ends here, or the file system copies nothing and does not say so.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(copied) => {
                let copied = copied.min(length);
                length -= copied;
                offset += copied;
                stored.offset += copied;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
