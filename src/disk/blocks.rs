//! A disk of blocks: splits ranges into blocks and hands each to the layer.

use super::storage::Storage;
use super::{Extent, ExtentKind, MappedExtent, info};
use crate::error::Result;
use crate::layer::{Layer, Mapping};
use crate::vhd::{self, bitmap};
use std::path::Path;

/// A layer as a guest's bytes.
#[derive(Debug)]
pub(super) struct Blocks {
    layer: Box<Layer>,
    size: u64,
}

impl Blocks {
    pub(super) fn new(layer: Box<Layer>) -> Self {
        Blocks { size: layer.footer().current_size, layer }
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
            self.layer.read_block(piece.block, piece.offset, now)?;
            rest = later;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut rest = buf;
        for piece in self.pieces(offset, rest.len() as u64) {
            let (now, later) = rest.split_at(piece.length as usize);
            self.layer.write_block(piece.block, piece.offset, now)?;
            rest = later;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, keep_allocated: bool) -> Result<()> {
        for piece in self.pieces(offset, length) {
            if !keep_allocated && self.covers_block(&piece) {
                self.layer.free_block(piece.block)?;
            } else {
                self.layer.zero_block(piece.block, piece.offset, piece.length, keep_allocated)?;
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
            let mut push = |from: u64, to: u64, kind, slot: Option<u32>| {
                let file_offset = slot.map(|slot| self.layer.place().data_offset(slot) + from);
                visit(MappedExtent {
                    extent: Extent { offset: start + from, length: to - from, kind },
                    file_offset,
                });
            };
            let end = piece.offset + piece.length;
            match self.layer.mapping(piece.block)? {
                Mapping::Absent | Mapping::Unverified(_) => push(piece.offset, end, ExtentKind::Hole, None),
                Mapping::Whole(slot) => push(piece.offset, end, ExtentKind::Data, Some(slot)),
                Mapping::Partial(slot) => {
                    let bits = self.layer.bitmap(slot)?;
                    let sectors = (piece.offset / vhd::SECTOR) as u32..end.div_ceil(vhd::SECTOR) as u32;
                    for run in bitmap::runs(&bits, sectors) {
                        let from = (u64::from(run.sectors.start) * vhd::SECTOR).max(piece.offset);
                        let to = (u64::from(run.sectors.end) * vhd::SECTOR).min(end);
                        push(from, to, if run.set { ExtentKind::Data } else { ExtentKind::Zero }, Some(slot));
                    }
                }
            }
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
