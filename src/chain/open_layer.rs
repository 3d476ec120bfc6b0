//! A layer that is open for writing, as a parent: one that was the leaf until a new one came over it, or one in the middle of a chain
//! that takes over what is beneath it. What shows through it does not change. The same for a fixed disk, which was the leaf.

use super::source::{Found, Source};
use crate::defect::{self, Defect};
use crate::error::Result;
use crate::layer::{Fixed, Layer, Located};
use crate::vhd::{self, DiskType};
use std::ops::Range;

impl Source for Layer {
    fn resolve(&self, range: Range<u64>, visit: &mut dyn FnMut(Range<u64>, Found)) -> Result<()> {
        let absent = match self.footer().disk_type {
            DiskType::Differencing => Found::Below,
            DiskType::Dynamic | DiskType::Fixed => Found::Zero,
        };
        let block_bytes = u64::from(self.place().block_bytes);
        // Past its end are zeros, whatever is beneath it.
        let inside = match defect::active(Defect::OpenLayerHasNoEnd) {
            true => range.end,
            false => range.end.min(self.footer().current_size.max(range.start)),
        };
        let mut at = range.start;
        while at < inside {
            let block = at / block_bytes;
            let start = block * block_bytes;
            let end = inside.min(start + block_bytes);
            self.locate(block as u32, at - start..end - start, &mut |part, located| {
                let found = match located {
                    Located::Absent => absent,
                    Located::Hidden(_) => Found::Zero,
                    Located::File(at) => Found::File(at),
                };
                visit(start + part.start..start + part.end, found);
                Ok(())
            })?;
            at = end;
        }
        if inside < range.end {
            visit(inside..range.end, Found::Zero);
        }
        Ok(())
    }

    fn blocks(&self, blocks: Range<u64>, block_bytes: u64, visit: &mut dyn FnMut(u64, u32)) -> Result<()> {
        // One that was the leaf has blocks like its disk; with others, each may hold anything.
        let has_such_blocks = u64::from(self.place().block_bytes) == block_bytes;
        for block in blocks {
            let entry = match self.known_mapping(block as u32).slot() {
                _ if !has_such_blocks => Some(0),
                None if (block + 1).saturating_mul(block_bytes) > self.footer().current_size => {
                    Some(vhd::UNALLOCATED)
                }
                slot => slot,
            };
            if let Some(entry) = entry {
                visit(block, entry);
            }
        }
        Ok(())
    }

    fn read_file(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        Layer::read_file(self, at, buf)
    }
}

impl Source for Fixed {
    fn resolve(&self, range: Range<u64>, visit: &mut dyn FnMut(Range<u64>, Found)) -> Result<()> {
        let inside = range.end.min(self.footer().current_size.max(range.start));
        for (part, found) in
            [(range.start..inside, Found::File(range.start)), (inside..range.end, Found::Zero)]
        {
            if !part.is_empty() {
                visit(part, found);
            }
        }
        Ok(())
    }

    fn blocks(&self, blocks: Range<u64>, _: u64, visit: &mut dyn FnMut(u64, u32)) -> Result<()> {
        blocks.for_each(|block| visit(block, 0));
        Ok(())
    }

    fn read_file(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.read_below(at, buf)
    }
}
