//! A fixed disk as a guest's bytes; and how a running one becomes the parent of blocks, when it gets a snapshot.
//!
//! Until then requests go straight to the file. A change holds `changes` for reading; whoever puts the blocks in holds it for writing: then
//! no change is under way, and all that were before are in the file. No I/O happens meanwhile. A read that began before may still read the
//! file, which does not change any more. Flushes from there on wait for the blocks' place in the chain, as after any other snapshot
//! (`generation.rs`).

use super::blocks::Blocks;
use super::generation::Switch;
use super::storage::Storage;
use super::{Extent, ExtentKind, MappedExtent};
use crate::chain::{Parents, Source};
use crate::error::{Error, Result};
use crate::layer::{Fixed, Layer};
use crate::sync::{Arc, OnceLock, RwLock};
use crate::vfs::File;
use crate::vhd::DiskType;
use std::path::Path;

/// A disk that was opened as a fixed one.
#[derive(Debug)]
pub(super) struct FixedDisk {
    fixed: Arc<Fixed>,
    changes: RwLock<()>,
    over: OnceLock<Blocks>,
}

impl FixedDisk {
    pub(super) fn new(fixed: Box<Fixed>) -> Self {
        FixedDisk { fixed: Arc::from(fixed), changes: RwLock::new(()), over: OnceLock::new() }
    }

    /// The file.
    pub(super) fn fixed(&self) -> &Arc<Fixed> {
        &self.fixed
    }

    /// Makes `child`, which holds nothing, the leaf, and this disk its parent, as [`super::generation::Generations::switch`] does.
    pub(super) fn switch(&self, child: Box<Layer>) -> Result<Switch<'_>> {
        let (size, block_bytes) = (child.footer().current_size, child.place().block_bytes);
        let invalid = |why: &str| {
            let what = format!("{}: as the new leaf of an open disk {why}", child.path().display());
            Err(Error::Invalid { what })
        };
        if self.fixed.is_read_only() || child.is_read_only() {
            return Err(Error::ReadOnly { path: self.fixed.path().to_path_buf() });
        }
        if size != self.fixed.footer().current_size {
            return invalid("it has another size");
        }
        let parents = Parents::new(vec![Arc::clone(&self.fixed) as Arc<dyn Source>], block_bytes, size);
        let blocks = Blocks::awaited(child, parents);
        let stopped = self.changes.write();
        self.fixed.check_open()?;
        if self.over.set(blocks).is_err() {
            let what = format!("{}: it has another leaf already", self.fixed.path().display());
            return Err(Error::Invalid { what });
        }
        drop(stopped);
        self.blocks().map(|blocks| blocks.generations().first_switch())
    }

    fn blocks(&self) -> Result<&Blocks> {
        let none =
            || Error::Invalid { what: format!("{}: it has no other leaf", self.fixed.path().display()) };
        self.over.get().ok_or_else(none)
    }

    /// What keeps the bytes now: `by_blocks`, or `by_file` while no blocks are put in.
    fn change(
        &self,
        by_file: impl FnOnce(&Fixed) -> Result<()>,
        by_blocks: impl FnOnce(&Blocks) -> Result<()>,
    ) -> Result<()> {
        let unchanged = self.changes.read();
        if self.over.get().is_none() {
            return by_file(&self.fixed);
        }
        drop(unchanged);
        by_blocks(self.blocks()?)
    }
}

impl Storage for FixedDisk {
    fn path(&self) -> &Path {
        self.fixed.path()
    }

    fn disk_type(&self) -> DiskType {
        self.over.get().map_or(DiskType::Fixed, Storage::disk_type)
    }

    fn as_blocks(&self) -> Option<&Blocks> {
        self.over.get()
    }

    fn as_fixed(&self) -> Option<&FixedDisk> {
        self.over.get().is_none().then_some(self)
    }

    fn is_read_only(&self) -> bool {
        self.fixed.is_read_only()
    }

    fn notices(&self) -> Vec<String> {
        Vec::new()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match self.over.get() {
            Some(blocks) => blocks.read_at(buf, offset),
            None => self.fixed.read_at(buf, offset),
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.change(|fixed| fixed.write_at(buf, offset), |blocks| blocks.write_at(buf, offset))
    }

    fn write_zeroes(&self, offset: u64, length: u64, keep_allocated: bool) -> Result<()> {
        self.change(
            |fixed| fixed.write_zeroes(offset, length, keep_allocated),
            |blocks| blocks.write_zeroes(offset, length, keep_allocated),
        )
    }

    fn flush(&self) -> Result<()> {
        match self.over.get() {
            Some(blocks) => blocks.flush(),
            None => self.fixed.flush(),
        }
    }

    fn close(&self) -> Result<()> {
        self.change(Fixed::close, Storage::close)
    }

    fn stored_in(&self) -> Option<Arc<dyn File>> {
        self.fixed.is_read_only().then(|| Arc::clone(self.fixed.file()))
    }

    fn map(&self, offset: u64, length: u64, visit: &mut dyn FnMut(MappedExtent)) -> Result<()> {
        if let Some(blocks) = self.over.get() {
            return blocks.map(offset, length, visit);
        }
        let mut push = |from: u64, to: u64, kind| {
            if from < to {
                let extent = Extent { offset: from, length: to - from, kind };
                visit(MappedExtent { extent, file_offset: Some(from), depth: 0 });
            }
        };
        let mut at = offset;
        for data in self.fixed.data_ranges(offset, length)? {
            push(at, data.start, ExtentKind::Hole);
            push(data.start, data.end, ExtentKind::Data);
            at = data.end;
        }
        push(at, offset + length, ExtentKind::Hole);
        Ok(())
    }
}
