//! A disk of blocks: splits ranges into blocks and hands each to the layer.

use super::storage::Storage;
use super::{Extent, ExtentKind, MappedExtent, info};
use crate::chain::Parents;
use crate::defect::{self, Defect};
use crate::error::Result;
use crate::layer::{Below, Layer, Located, Nothing};
use std::path::Path;

/// A layer as a guest's bytes.
#[derive(Debug)]
pub(super) struct Blocks {
    layer: Box<Layer>,
    /// Of a differencing disk.
    parents: Option<Parents>,
    size: u64,
}

impl Blocks {
    pub(super) fn new(layer: Box<Layer>, parents: Option<Parents>) -> Self {
        Blocks { size: layer.footer().current_size, layer, parents }
    }

    fn below(&self) -> &dyn Below {
        match &self.parents {
            Some(parents) => parents,
            None => &Nothing,
        }
    }

    /// What is below the leaf, as extents.
    fn map_below(&self, start: u64, end: u64, visit: &mut dyn FnMut(MappedExtent)) -> Result<()> {
        let mut push = |from: u64, to: u64, kind, file_offset, depth| {
            visit(MappedExtent {
                extent: Extent { offset: from, length: to - from, kind },
                file_offset,
                depth,
            });
        };
        let Some(parents) = &self.parents else {
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
}

impl Storage for Blocks {
    fn path(&self) -> &Path {
        self.layer.path()
    }

    fn is_read_only(&self) -> bool {
        self.layer.is_read_only()
    }

    fn notices(&self) -> Vec<String> {
        info::notices(self.layer.report(), self.is_read_only())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut rest = buf;
        for piece in self.pieces(offset, rest.len() as u64) {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(piece.length as usize);
            self.layer.read_block(piece.block, piece.offset, now, self.below())?;
            rest = later;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut rest = buf;
        for piece in self.pieces(offset, rest.len() as u64) {
            let (now, later) = rest.split_at(piece.length as usize);
            self.layer.write_block(piece.block, piece.offset, now, self.below())?;
            rest = later;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, keep_allocated: bool) -> Result<()> {
        for piece in self.pieces(offset, length) {
            // In a differencing disk a block that is given back shows what is below.
            let start = u64::from(piece.block) * self.block_bytes();
            let frees = !keep_allocated
                && self.covers_block(&piece)
                && (self.below().is_zero(start..start + self.block_bytes())?
                    || defect::active(Defect::DiscardShowsParent));
            if frees {
                self.layer.free_block(piece.block)?;
            } else {
                self.layer.zero_block(piece.block, piece.range(), keep_allocated, self.below())?;
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.layer.flush()
    }

    fn close(&self) -> Result<()> {
        self.layer.close()
    }

    fn map(&self, offset: u64, length: u64, visit: &mut dyn FnMut(MappedExtent)) -> Result<()> {
        for piece in self.pieces(offset, length) {
            let start = u64::from(piece.block) * self.block_bytes();
            self.layer.locate(piece.block, piece.range(), &mut |range, located| {
                let (from, to) = (start + range.start, start + range.end);
                let (kind, file_offset) = match located {
                    Located::Absent => return self.map_below(from, to, visit),
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
