//! What a guest sees: a disk of bytes.
//!
//! [`Disk`] splits guest ranges into blocks and hands each to the layer; it knows nothing of journals or slots.

mod info;

pub use info::{DiskInfo, JournalState};

use crate::error::{Error, Result};
use crate::layer::{self, CreateParameters, Layer, Mapping};
use crate::sync::Arc;
use crate::vfs::{Access, HostVfs, Vfs};
use crate::vhd::{self, bitmap};
use std::io::{IoSlice, IoSliceMut};
use std::path::Path;

/// Journal ring of a new image, in bytes.
const RING_BYTES: u64 = 2 << 20;

/// How a new disk is made.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    vfs: Arc<dyn Vfs>,
    size: u64,
    block_bytes: u32,
    ring_bytes: u64,
}

impl CreateOptions {
    /// A dynamic disk of `size` bytes: a multiple of 512, at most 2040 GiB.
    pub fn new(size: u64) -> Self {
        CreateOptions { vfs: Arc::new(HostVfs), size, block_bytes: vhd::BLOCK_SIZE, ring_bytes: RING_BYTES }
    }

    /// Makes the image in another place than the host's file system.
    pub fn vfs(mut self, vfs: Arc<dyn Vfs>) -> Self {
        self.vfs = vfs;
        self
    }

    /// Small blocks and a small ring, so that a simulator meets every boundary soon. Other tools need not understand such
    /// an image; not for anything but tests.
    #[cfg(feature = "sim")]
    pub fn test_geometry(mut self, block_bytes: u32, ring_bytes: u64) -> Self {
        (self.block_bytes, self.ring_bytes) = (block_bytes, ring_bytes);
        self
    }

    /// Creates the image at `path`, which must not exist. It appears under its name complete and durable, or not at all.
    pub fn create(&self, path: &Path) -> Result<()> {
        let (size, block_bytes, ring_bytes) = (self.size, self.block_bytes, self.ring_bytes);
        layer::create(&*self.vfs, path, &CreateParameters { size, block_bytes, ring_bytes })
    }
}

/// How a disk is opened.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    vfs: Arc<dyn Vfs>,
    access: Access,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl OpenOptions {
    /// For reading and writing, on the host's file system.
    pub fn new() -> Self {
        OpenOptions { vfs: Arc::new(HostVfs), access: Access::ReadWrite }
    }

    /// For reading alone: the file is not changed, not even to recover it; a journal is replayed in memory.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
        self
    }

    /// Opens the image in another place than the host's file system.
    pub fn vfs(mut self, vfs: Arc<dyn Vfs>) -> Self {
        self.vfs = vfs;
        self
    }

    /// Opens the image at `path`. One opened for writing after a crash is recovered first.
    ///
    /// Fails with [`ErrorKind::InUse`](crate::ErrorKind::InUse) while another process has it open for writing (or, to open
    /// it for writing, at all).
    pub fn open(&self, path: &Path) -> Result<Disk> {
        let layer = layer::open(Arc::clone(&self.vfs), path, self.access)?;
        Ok(Disk { size: layer.footer().current_size, layer })
    }
}

/// What a range of a disk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data.
    Data,
    /// Zeros for which the file has space.
    Zero,
    /// Zeros for which the file has no space.
    Hole,
}

/// A range of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Guest byte offset.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// What is there.
    pub kind: ExtentKind,
}

/// How [`Disk::write_zeroes`] goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroMode {
    /// Space may be given back.
    MayPunch,
    /// The range stays, or becomes, allocated, so that later writes to it cannot run out of space.
    KeepAllocated,
}

/// An open disk.
///
/// All methods take `&self` and may be called from many threads at once. A write counts from its return; it survives a
/// crash once a [`flush`](Disk::flush) that was called after it has returned. Overlapping calls at the same time leave
/// each 512-byte sector as one of them wanted it.
///
/// Dropping a disk without [`close`](Disk::close) leaves it as a crash would: the next open recovers it, and other tools
/// refuse the file until then.
#[derive(Debug)]
pub struct Disk {
    layer: Layer,
    size: u64,
}

impl Disk {
    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.layer.path()
    }

    /// Whether the disk was opened read-only.
    pub fn is_read_only(&self) -> bool {
        self.layer.is_read_only()
    }

    /// What opening the disk found and did, in words for a person; empty if there is nothing to say.
    pub fn notices(&self) -> Vec<String> {
        info::notices(self.layer.report(), self.is_read_only())
    }

    /// Reads `buf.len()` bytes at byte `offset`. Any offset and length within the disk are served.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        let mut rest = buf;
        for piece in self.pieces(offset, rest.len() as u64) {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(piece.length as usize);
            self.layer.read_block(piece.block, piece.offset, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Reads into several buffers, one after the other, from byte `offset` on.
    pub fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let mut at = offset;
        self.check_range(offset, bufs.iter().map(|buf| buf.len() as u64).sum())?;
        for buf in bufs {
            self.read_at(buf, at)?;
            at += buf.len() as u64;
        }
        Ok(())
    }

    /// Writes `buf` at byte `offset`; both must be multiples of 512.
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_writable(offset, buf.len() as u64)?;
        let mut rest = buf;
        for piece in self.pieces(offset, rest.len() as u64) {
            let (now, later) = rest.split_at(piece.length as usize);
            self.layer.prepare(piece.block, piece.offset..piece.offset + piece.length)?.write(now)?;
            rest = later;
        }
        Ok(())
    }

    /// Writes several buffers, one after the other, from byte `offset` on; each must be a multiple of 512 long.
    pub fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let mut at = offset;
        self.check_writable(offset, bufs.iter().map(|buf| buf.len() as u64).sum())?;
        for buf in bufs {
            self.write_at(buf, at)?;
            at += buf.len() as u64;
        }
        Ok(())
    }

    /// Makes a range read as zeros; offset and length must be multiples of 512.
    pub fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<()> {
        self.check_writable(offset, length)?;
        for piece in self.pieces(offset, length) {
            let keep = mode == ZeroMode::KeepAllocated;
            if !keep && self.covers_block(&piece) {
                self.layer.free_block(piece.block)?;
            } else {
                self.layer.zero_block(piece.block, piece.offset, piece.length, keep)?;
            }
        }
        Ok(())
    }

    /// The guest no longer needs a range: it reads as zeros afterwards and its space is given back as far as possible.
    pub fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.write_zeroes(offset, length, ZeroMode::MayPunch)
    }

    /// Returns when every write, zeroing and discard that returned before the call, on any thread, is durable.
    ///
    /// An error means that this is not known. After a failed sync the disk stops
    /// ([`ErrorKind::Poisoned`](crate::ErrorKind::Poisoned)); a lack of space leaves it usable, and a later flush may succeed.
    pub fn flush(&self) -> Result<()> {
        self.layer.flush()
    }

    /// Flushes and closes the file cleanly, so that other tools can open it. Waits for calls under way; later writes fail.
    pub fn close(&self) -> Result<()> {
        self.layer.close()
    }

    /// What a range holds, from metadata alone; neighbours of one kind are joined.
    pub fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>> {
        self.check_range(offset, length)?;
        let mut extents: Vec<Extent> = Vec::new();
        let mut push = |offset, length, kind| match extents.last_mut() {
            Some(last) if last.kind == kind => last.length += length,
            _ => extents.push(Extent { offset, length, kind }),
        };
        for piece in self.pieces(offset, length) {
            let start = u64::from(piece.block) * self.block_bytes() + piece.offset;
            match self.layer.mapping(piece.block)? {
                Mapping::Absent | Mapping::Unverified(_) => push(start, piece.length, ExtentKind::Hole),
                Mapping::Whole(_) => push(start, piece.length, ExtentKind::Data),
                Mapping::Partial(slot) => {
                    let bits = self.layer.bitmap(slot)?;
                    let mut at = piece.offset;
                    let end = piece.offset + piece.length;
                    while at < end {
                        let sector = at / vhd::SECTOR;
                        let next = ((sector + 1) * vhd::SECTOR).min(end);
                        let data = bitmap::get(&bits, sector as u32);
                        let kind = if data { ExtentKind::Data } else { ExtentKind::Zero };
                        push(start + (at - piece.offset), next - at, kind);
                        at = next;
                    }
                }
            }
        }
        Ok(extents)
    }

    fn block_bytes(&self) -> u64 {
        self.layer.place().block_bytes.into()
    }

    /// A range's pieces, one per block.
    fn pieces(&self, offset: u64, length: u64) -> impl Iterator<Item = Piece> + use<> {
        let block_bytes = self.block_bytes();
        let mut at = offset;
        let end = offset + length;
        std::iter::from_fn(move || {
            let block = at / block_bytes;
            let length = ((block + 1) * block_bytes).min(end).checked_sub(at).filter(|&length| length > 0)?;
            let piece = Piece { block: u32::try_from(block).ok()?, offset: at % block_bytes, length };
            at += length;
            Some(piece)
        })
    }

    /// Whether a piece is all that its block shows of the disk.
    fn covers_block(&self, piece: &Piece) -> bool {
        let start = u64::from(piece.block) * self.block_bytes();
        piece.offset == 0 && piece.length == self.block_bytes().min(self.size - start)
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(Error::OutOfRange { offset, length, size: self.size, why: "it ends past the disk" }),
        }
    }

    fn check_writable(&self, offset: u64, length: u64) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::ReadOnly { path: self.path().to_path_buf() });
        }
        self.check_range(offset, length)?;
        if !offset.is_multiple_of(vhd::SECTOR) || !length.is_multiple_of(vhd::SECTOR) {
            let why = "offset and length must be multiples of 512";
            return Err(Error::OutOfRange { offset, length, size: self.size, why });
        }
        Ok(())
    }
}

/// A part of a guest range that lies within one block.
#[derive(Debug, Clone, Copy)]
struct Piece {
    block: u32,
    /// Bytes from the block's start.
    offset: u64,
    /// Bytes.
    length: u64,
}
