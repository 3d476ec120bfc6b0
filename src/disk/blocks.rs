//! A disk of blocks: splits ranges into blocks and hands each to the leaf of the current generation.

use super::generation::{Generation, Generations, Ready, Switch};
use super::storage::Storage;
use super::{Extent, ExtentKind, MappedExtent, info};
use crate::chain::Parents;
use crate::defect::{self, Defect};
use crate::error::{ErrorKind, Result};
use crate::layer::{Layer, Located};
use crate::sync::{Arc, AtomicBool};
use crate::vfs::File;
use crate::vhd::DiskType;
use std::cell::Cell;
use std::path::{Path, PathBuf};

/// Layers as a guest's bytes.
#[derive(Debug)]
pub(super) struct Blocks {
    generations: Generations,
    /// Layers are being merged into the leaf.
    pub(super) merging: AtomicBool,
    /// Of the file that was opened, whichever layer has that name now.
    path: PathBuf,
    notices: Vec<String>,
    is_read_only: bool,
    block_bytes: u64,
    size: u64,
}

impl Blocks {
    pub(super) fn new(leaf: Box<Layer>, parents: Option<Parents>) -> Self {
        Self::with(leaf, parents, Generations::new)
    }

    /// Blocks over a fixed disk, of which the leaf has no place in the chain yet.
    pub(super) fn awaited(leaf: Box<Layer>, parents: Parents) -> Self {
        Self::with(leaf, Some(parents), Generations::awaited)
    }

    fn with(
        leaf: Box<Layer>,
        parents: Option<Parents>,
        generations: impl FnOnce(Generation) -> Generations,
    ) -> Self {
        let mut notices = info::notices(leaf.report(), leaf.is_read_only());
        notices.extend(parents.iter().flat_map(Parents::doubts));
        Blocks {
            path: leaf.path().to_path_buf(),
            notices,
            is_read_only: leaf.is_read_only(),
            block_bytes: leaf.place().block_bytes.into(),
            size: leaf.footer().current_size,
            merging: AtomicBool::new(false),
            generations: generations(Generation { leaf: Arc::from(leaf), parents }),
        }
    }

    /// The layer that is written to at this moment.
    pub(super) fn leaf(&self) -> Arc<Layer> {
        Arc::clone(&self.generations.latest().leaf)
    }

    pub(super) fn generations(&self) -> &Generations {
        &self.generations
    }

    /// See [`Generations::switch`].
    pub(super) fn switch(&self, child: Box<Layer>) -> Result<Switch<'_>> {
        self.generations.switch(child)
    }

    /// See [`Generations::prepare`].
    pub(super) fn prepare(&self, child: Box<Layer>) -> Result<Ready<'_>> {
        self.generations.prepare(child)
    }

    /// Runs a change of one block; where no space is left for it, brings the freed slots back, with their space, and runs it
    /// once more.
    pub(super) fn change(&self, change: impl Fn(&Generation) -> Result<()>) -> Result<()> {
        let result = change(&self.generations.for_changing());
        if !matches!(&result, Err(error) if error.kind() == ErrorKind::NoSpace) {
            return result;
        }
        // Nothing of the write that failed keeps a slot from coming back, or another leaf from coming in.
        match self.leaf().reclaim() {
            Err(error) if error.kind() != ErrorKind::NoSpace => Err(error),
            _ => change(&self.generations.for_changing()),
        }
    }

    /// Makes a piece read as zeros. True where the leaf should bring slots back.
    fn zero(&self, generation: &Generation, piece: &Piece, keep_allocated: bool) -> Result<bool> {
        let Generation { leaf, .. } = generation;
        // In a differencing disk a block that is given back shows what is below.
        let start = u64::from(piece.block) * self.block_bytes;
        let frees = !keep_allocated
            && !self.keeps_blocks()
            && self.covers_block(piece)
            && (generation.below().is_zero(start..start + self.block_bytes)?
                || defect::active(Defect::DiscardShowsParent));
        if frees {
            return leaf.free_block(piece.block);
        }
        leaf.zero_block(piece.block, piece.range(), keep_allocated, generation.below())?;
        Ok(false)
    }

    /// What is below the leaf, as extents.
    fn map_below(
        parents: Option<&Parents>,
        start: u64,
        end: u64,
        visit: &mut dyn FnMut(MappedExtent),
    ) -> Result<()> {
        let mut push = |from: u64, to: u64, kind, file_offset, depth| {
            visit(MappedExtent {
                extent: Extent { offset: from, length: to - from, kind },
                file_offset,
                depth,
            });
        };
        let Some(parents) = parents else {
            push(start, end, ExtentKind::Hole, None, 0);
            return Ok(());
        };
        parents.parts(start..end, &mut |(range, place)| {
            match place {
                None => push(range.start, range.end, ExtentKind::Hole, None, 0),
                Some(place) => {
                    let depth = (parents.depth() - place.source as usize) as u32;
                    push(range.start, range.end, ExtentKind::Data, Some(place.file_offset), depth);
                }
            }
            Ok(())
        })
    }

    /// A range's pieces, one per block.
    fn pieces(&self, offset: u64, length: u64) -> impl Iterator<Item = Piece> + use<> {
        let block_bytes = self.block_bytes;
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
        let start = u64::from(piece.block) * self.block_bytes;
        piece.offset == 0 && piece.length == self.block_bytes.min(self.size - start)
    }
}

impl Storage for Blocks {
    fn path(&self) -> &Path {
        &self.path
    }

    fn disk_type(&self) -> DiskType {
        // As of now: a merge may have taken the parents away.
        match self.generations.latest().parents {
            Some(_) => DiskType::Differencing,
            None => DiskType::Dynamic,
        }
    }

    fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    fn notices(&self) -> Vec<String> {
        self.notices.clone()
    }

    fn as_blocks(&self) -> Option<&Blocks> {
        Some(self)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let generation = self.generations.for_reading();
        let mut rest = buf;
        for piece in self.pieces(offset, rest.len() as u64) {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(piece.length as usize);
            generation.leaf.read_block(piece.block, piece.offset, now, generation.below())?;
            rest = later;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut rest = buf;
        for piece in self.pieces(offset, rest.len() as u64) {
            let (now, later) = rest.split_at(piece.length as usize);
            self.change(|generation| {
                generation.leaf.write_block(piece.block, piece.offset, now, generation.below())
            })?;
            rest = later;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, keep_allocated: bool) -> Result<()> {
        for piece in self.pieces(offset, length) {
            let reclaim = Cell::new(false);
            self.change(|generation| {
                reclaim.set(self.zero(generation, &piece, keep_allocated)?);
                Ok(())
            })?;
            if reclaim.get() {
                self.leaf().reclaim()?;
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.generations.latest_settled().leaf.flush()
    }

    fn close(&self) -> Result<()> {
        self.generations.close()
    }

    fn stored_in(&self) -> Option<Arc<dyn File>> {
        self.leaf().complete_file().filter(|_| self.is_read_only).map(Arc::clone)
    }

    fn map(&self, offset: u64, length: u64, visit: &mut dyn FnMut(MappedExtent)) -> Result<()> {
        let generation = self.generations.for_reading();
        for piece in self.pieces(offset, length) {
            let start = u64::from(piece.block) * self.block_bytes;
            generation.leaf.locate(piece.block, piece.range(), &mut |range, located| {
                let (from, to) = (start + range.start, start + range.end);
                let (kind, file_offset) = match located {
                    Located::Absent => {
                        return Self::map_below(generation.parents.as_ref(), from, to, visit);
                    }
                    Located::Hidden(at) => (ExtentKind::Zero, Some(at)),
                    Located::File(at) => (ExtentKind::Data, Some(at)),
                };
                let extent = Extent { offset: from, length: to - from, kind };
                visit(MappedExtent { extent, file_offset, depth: 0 });
                Ok(())
            })?;
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

impl Piece {
    /// Bytes of the block.
    fn range(&self) -> std::ops::Range<u64> {
        self.offset..self.offset + self.length
    }
}
