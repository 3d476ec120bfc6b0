//! Copying a disk from one image into a new one of another kind.
//!
//! ```text
//! source: ranges that may hold data ──► pieces of a block ──► 4 KiB units that are not zero ──► destination: written in runs
//! ```
//!
//! Holes of the source are never read, zeros never written. Where source and destination both hold the disk's bytes in order, and
//! the file system can share space between files, the destination takes over the source's file instead, zeros included; where a
//! run stands in a file as it is to stand in the new one, the file system is asked to copy it. The destination is made under a temporary name and gets its own
//! when it is complete and durable; after a failure nothing of it stays behind.

mod destination;
mod pace;
mod source;

use crate::disk::{Disk, OpenOptions};
use crate::error::{Error, Result};
use crate::layer::{NewFile, lock};
use crate::sync::Arc;
use crate::vfs::{Access, File, Vfs};
use crate::vhd::{self, DiskType};
use destination::{Destination, Stored};
pub use pace::Pace;
use source::{Data, Source};
use std::io;
use std::ops::ControlFlow;
use std::path::Path;

/// Bytes that are read at once, and between two reports of progress: a block of a dynamic disk.
const PIECE_BYTES: u64 = vhd::BLOCK_SIZE as u64;
/// Bytes of the disk of which the source is asked for data at once.
const WINDOW_BYTES: u64 = 1 << 30;

/// A kind of image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The bytes of the disk and nothing else.
    Raw,
    /// A VHD of blocks, with the journal of cowvhd if it is made here.
    Dynamic,
    /// A VHD of the disk's bytes and a footer.
    Fixed,
}

impl Format {
    /// The format that a name stands for: `.vhd` for a dynamic disk, anything else for a raw one. The content does not count,
    /// since a guest writes it.
    pub fn of_name(path: &Path) -> Self {
        match path.extension() {
            Some(extension) if extension.eq_ignore_ascii_case("vhd") => Format::Dynamic,
            _ => Format::Raw,
        }
    }
}

/// What long work is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Copying data.
    Copy,
    /// Making the new image durable.
    Sync,
    /// Reading data and comparing it.
    Verify,
}

/// How far long work has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// Bytes of the disk that are done, holes included.
    pub done: u64,
    /// Size of the disk in bytes.
    pub total: u64,
    /// Bytes that were copied: without holes, and without what was there already.
    pub copied: u64,
}

/// What a conversion did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Converted {
    /// Size of the new disk in bytes.
    pub size: u64,
    /// Zero bytes at its end that the source does not have: the size of a VHD is a multiple of 512.
    pub padding: u64,
    /// Bytes that were written as data.
    pub written: u64,
    /// Of these, bytes that the file system copied, or shared, by itself.
    pub copied: u64,
    /// The new image shares the space of the source, until one of them changes: nothing was written.
    pub cloned: bool,
}

/// How a disk is converted.
#[derive(Debug, Clone, Default)]
pub struct ConvertOptions {
    from: Option<Format>,
    to: Option<Format>,
    replace: bool,
    source: OpenOptions,
}

impl ConvertOptions {
    /// Formats by the names of the files; a destination that exists is an error.
    pub fn new() -> Self {
        Self::default()
    }

    /// What the source is, whatever its name says.
    pub fn from(mut self, format: Format) -> Self {
        self.from = Some(format);
        self
    }

    /// What the destination is to be, whatever its name says.
    pub fn to(mut self, format: Format) -> Self {
        self.to = Some(format);
        self
    }

    /// How a source that is a VHD is opened, e.g. where its parents may lie. It is opened for reading in any case. The destination,
    /// and a raw source, are in the place ([`OpenOptions::vfs`]) that these options name.
    pub fn open_source_with(mut self, options: OpenOptions) -> Self {
        self.source = options;
        self
    }

    /// Lets the destination take the place of a file that nobody has in use.
    pub fn replace(mut self, replace: bool) -> Self {
        self.replace = replace;
        self
    }

    /// Copies the disk in `source` into the new image `destination`. A source that was not closed is read with its journal
    /// replayed in memory; it is not changed.
    ///
    /// `progress` is called now and then; when it breaks, the conversion ends with [`Error::Cancelled`].
    pub fn run(
        &self,
        source: &Path,
        destination: &Path,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Converted> {
        let vfs = &self.source.vfs;
        let source = self.open_source(&**vfs, source)?;
        // Held to the end: nobody begins to use what is about to be replaced.
        let _replaced = self.check_destination(&**vfs, destination)?;
        let to = self.to.unwrap_or_else(|| Format::of_name(destination));
        let total = match to {
            Format::Raw => source.bytes(),
            Format::Dynamic | Format::Fixed => source.bytes().next_multiple_of(vhd::SECTOR),
        };
        let new = NewFile::new(&**vfs, destination)?;
        let sink = Destination::create(vfs, new.temporary(), to, total)?;
        let mut report = |phase, done, copied| match progress(Progress { phase, done, total, copied }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Cancelled { path: destination.to_path_buf() }),
        };
        let plain = source.plain_file();
        let cloned = plain.map_or(Ok(false), |file| sink.clone_whole(file, source.bytes()))?;
        let Copied { written, copied } = match cloned {
            true => Copied::default(),
            false => copy(&source, &sink, &mut |done, copied| report(Phase::Copy, done, copied))?,
        };
        report(Phase::Sync, total, written)?;
        sink.finish()?;
        report(Phase::Sync, total, written)?;
        new.publish(self.replace)?;
        Ok(Converted { size: total, padding: total - source.bytes(), written, copied, cloned })
    }

    fn open_source(&self, vfs: &dyn Vfs, path: &Path) -> Result<Source> {
        if self.from.unwrap_or_else(|| Format::of_name(path)) == Format::Raw {
            return Source::raw(vfs, path);
        }
        let disk: Disk = self.source.clone().read_only(true).open(path)?;
        let expected = match self.from {
            Some(Format::Dynamic) => DiskType::Dynamic,
            Some(Format::Fixed) => DiskType::Fixed,
            Some(Format::Raw) | None => disk.disk_type(),
        };
        if disk.disk_type() != expected {
            let what = format!("{}: it is a {} disk, not a {expected} one", path.display(), disk.disk_type());
            return Err(Error::Invalid { what });
        }
        Ok(Source::disk(disk))
    }

    /// Fails where the destination must not be written; else what is there now, locked.
    fn check_destination(&self, vfs: &dyn Vfs, path: &Path) -> Result<Option<Arc<dyn File>>> {
        let file = match vfs.open(path, Access::ReadOnly) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(path, "opening the file that is there", error)),
        };
        if !self.replace {
            return Err(Error::Exists { path: path.to_path_buf() });
        }
        lock(&*file, path, Access::ReadWrite)?;
        Ok(Some(file))
    }
}

/// Bytes that were written.
#[derive(Debug, Clone, Copy, Default)]
struct Copied {
    /// As data.
    written: u64,
    /// Of these, by the file system itself.
    copied: u64,
}

/// Copies what is not zero.
fn copy(
    source: &Source,
    destination: &Destination,
    report: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<Copied> {
    let bytes = source.bytes();
    let mut buf = vec![0; PIECE_BYTES as usize];
    let mut done = Copied::default();
    let mut window = 0;
    while window < bytes {
        let window_end = (window + WINDOW_BYTES).min(bytes);
        report(window, done.written)?;
        for Data { range, file_offset } in source.data(window..window_end)? {
            let stored_at = |at: u64| {
                let (file, offset) = (source.file()?, file_offset?);
                Some(Stored { file, offset: offset + (at - range.start) })
            };
            let mut at = range.start;
            while at < range.end {
                // To the end of a block, so that no block is visited twice.
                let end = ((at / PIECE_BYTES + 1) * PIECE_BYTES).min(range.end);
                let piece = buf.get_mut(..(end - at) as usize).unwrap_or_default();
                source.read_at(piece, at)?;
                for run in crate::vfs::runs_of_data(piece, at) {
                    let (offset, length) = (at + run.start as u64, (run.end - run.start) as u64);
                    let run = piece.get(run).unwrap_or_default();
                    let copied = destination.write_at(run, offset, stored_at(offset))?;
                    done.written += length;
                    done.copied += if copied { length } else { 0 };
                }
                at = end;
                report(at, done.written)?;
            }
        }
        window = window_end;
    }
    Ok(done)
}
