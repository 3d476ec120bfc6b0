//! The parents of a leaf as one read-only disk.

use super::flat::{Flat, FlatMap, Run};
use super::source::{Found, Source};
use crate::error::Result;
use crate::layer::Below;
use crate::sync::Arc;
use crate::vhd::SECTOR;
use std::ops::Range;

/// The layers beneath a leaf, from the bottom up.
#[derive(Debug)]
pub(crate) struct Parents {
    sources: Vec<Arc<dyn Source>>,
    flat: FlatMap,
    block_bytes: u64,
    /// Size of the leaf's disk in bytes.
    size: u64,
}

/// A part of the disk beneath the leaf: guest bytes, and where they are; `None` is zeros.
pub(crate) type Part = (Range<u64>, Option<Place>);

/// Where bytes are beneath the leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// The parent, counted from the bottom.
    pub(crate) source: u32,
    /// Byte of its file.
    pub(crate) file_offset: u64,
}

impl Parents {
    /// The parents of a leaf whose disk has `size` bytes in blocks of `block_bytes`. `sources` go from the bottom up.
    pub(crate) fn new(sources: Vec<Arc<dyn Source>>, block_bytes: u32, size: u64) -> Self {
        let block_bytes = u64::from(block_bytes);
        Parents { sources, flat: FlatMap::new(size.div_ceil(block_bytes)), block_bytes, size }
    }

    /// How many there are.
    pub(crate) fn depth(&self) -> usize {
        self.sources.len()
    }

    /// Calls `visit` with the parts that make up a range, in order.
    pub(crate) fn parts(&self, range: Range<u64>, visit: &mut dyn FnMut(Part) -> Result<()>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let block = at / self.block_bytes;
            let start = block * self.block_bytes;
            let end = range.end.min(start + self.block_bytes);
            match self.block(block as u32)? {
                Flat::Zero => visit((at..end, None))?,
                Flat::Whole { source, file_offset } => {
                    visit((at..end, Some(Place { source, file_offset: file_offset + (at - start) })))?;
                }
                Flat::Mixed(runs) => mixed_parts(&runs, start, at..end, visit)?,
            }
            at = end;
        }
        Ok(())
    }

    /// What is beneath the leaf in a block, asking all parents where that is not known yet.
    fn block(&self, block: u32) -> Result<Flat> {
        if let Some(flat) = self.flat.get(block) {
            return Ok(flat);
        }
        let flat = self.look(block)?;
        self.flat.set(block, &flat);
        Ok(flat)
    }

    fn look(&self, block: u32) -> Result<Flat> {
        let start = u64::from(block) * self.block_bytes;
        // Parents resolve whole sectors; the last one of a disk may be named in part.
        let end = (start + self.block_bytes).min(self.size.next_multiple_of(SECTOR));
        let mut wanted: Vec<Range<u64>> = std::iter::once(start..end).collect();
        let mut runs: Vec<Run> = Vec::new();
        for (source, layer) in self.sources.iter().enumerate().rev() {
            let mut below: Vec<Range<u64>> = Vec::new();
            for range in wanted {
                layer.resolve(range, &mut |part, found| match found {
                    Found::Zero => {}
                    Found::Below => match below.last_mut() {
                        Some(last) if last.end == part.start => last.end = part.end,
                        _ => below.push(part),
                    },
                    Found::File(file_offset) => runs.push(Run {
                        first_sector: ((part.start - start) / SECTOR) as u32,
                        sectors: ((part.end - part.start) / SECTOR) as u32,
                        source: source as u32,
                        file_offset,
                    }),
                })?;
            }
            wanted = below;
            if wanted.is_empty() {
                break;
            }
        }
        runs.sort_unstable_by_key(|run| run.first_sector);
        runs.dedup_by(|next, run| {
            let follows = run.source == next.source
                && run.first_sector + run.sectors == next.first_sector
                && run.file_offset + u64::from(run.sectors) * SECTOR == next.file_offset;
            if follows {
                run.sectors += next.sectors;
            }
            follows
        });
        Ok(match runs.as_slice() {
            [] => Flat::Zero,
            [run] if u64::from(run.sectors) * SECTOR == end - start => {
                Flat::Whole { source: run.source, file_offset: run.file_offset }
            }
            _ => Flat::Mixed(runs.into()),
        })
    }
}

/// The parts of `range` in a mixed block that starts at `start`.
fn mixed_parts(
    runs: &[Run],
    start: u64,
    range: Range<u64>,
    visit: &mut dyn FnMut(Part) -> Result<()>,
) -> Result<()> {
    let mut at = range.start;
    let first = runs.partition_point(|run| {
        start + (u64::from(run.first_sector) + u64::from(run.sectors)) * SECTOR <= range.start
    });
    for run in runs.iter().skip(first) {
        let run_start = start + u64::from(run.first_sector) * SECTOR;
        if run_start >= range.end {
            break;
        }
        if at < run_start {
            visit((at..run_start, None))?;
            at = run_start;
        }
        let end = range.end.min(run_start + u64::from(run.sectors) * SECTOR);
        let place = Place { source: run.source, file_offset: run.file_offset + (at - run_start) };
        visit((at..end, Some(place)))?;
        at = end;
    }
    if at < range.end {
        visit((at..range.end, None))?;
    }
    Ok(())
}

impl Below for Parents {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut rest = buf;
        // A block may reach past the end of the disk.
        let inside = rest.len().min(self.size.saturating_sub(offset) as usize);
        let (buf, past) = std::mem::take(&mut rest).split_at_mut(inside);
        past.fill(0);
        rest = buf;
        self.parts(offset..offset + inside as u64, &mut |(range, place)| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut((range.end - range.start) as usize);
            rest = later;
            match place {
                None => now.fill(0),
                Some(Place { source, file_offset }) => {
                    if let Some(source) = self.sources.get(source as usize) {
                        source.read_file(file_offset, now)?;
                    }
                }
            }
            Ok(())
        })
    }

    fn is_zero(&self, range: Range<u64>) -> Result<bool> {
        let mut zero = true;
        self.parts(range.start..range.end.min(self.size), &mut |(_, place)| {
            zero &= place.is_none();
            Ok(())
        })?;
        Ok(zero)
    }
}
