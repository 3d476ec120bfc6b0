//! A layer that was written to until a new leaf came over it, as a parent: what it holds does not change any more.

use super::source::{Found, Source};
use crate::error::Result;
use crate::layer::{Layer, Located};
use crate::vhd::DiskType;
use std::ops::Range;

impl Source for Layer {
    fn resolve(&self, range: Range<u64>, visit: &mut dyn FnMut(Range<u64>, Found)) -> Result<()> {
        let absent = match self.footer().disk_type {
            DiskType::Differencing => Found::Below,
            DiskType::Dynamic | DiskType::Fixed => Found::Zero,
        };
        let block_bytes = u64::from(self.place().block_bytes);
        let mut at = range.start;
        while at < range.end {
            let block = at / block_bytes;
            let start = block * block_bytes;
            let end = range.end.min(start + block_bytes);
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
        Ok(())
    }

    fn blocks(&self, blocks: Range<u64>, _: u64, visit: &mut dyn FnMut(u64, u32)) -> Result<()> {
        // A leaf has blocks like its disk.
        for block in blocks {
            if let Some(slot) = self.known_mapping(block as u32).slot() {
                visit(block, slot);
            }
        }
        Ok(())
    }

    fn resolve_block(
        &self,
        range: Range<u64>,
        _: u64,
        _: u32,
        visit: &mut dyn FnMut(Range<u64>, Found),
    ) -> Result<()> {
        self.resolve(range, visit)
    }

    fn read_file(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        Layer::read_file(self, at, buf)
    }
}
