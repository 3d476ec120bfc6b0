//! The parents of a leaf as one read-only disk.
//!
//! A running disk that gets a new leaf makes a parent of the old one. Its parents then share one flat map with those before,
//! and the old leaf is *folded* into it: for each block that the leaf holds, the word is laid anew from the leaf and from what the
//! word said before. Until that is done the old leaf is asked first. A word that was folded already says the same of what the leaf does
//! not hold, so that it does not matter which one a reader meets.

use super::candidates::{Candidate, Candidates};
use super::flat::{self, Flat, FlatMap, Place, Run};
use super::source::{Found, Source};
use crate::error::{Error, Result};
use crate::layer::{Below, Layer, Mapping, Stored};
use crate::sync::{Arc, AtomicBool, Ordering};
use crate::vhd::SECTOR;
use std::ops::Range;

/// From so many parents on, those are found first that hold a block at all.
const MANY: usize = 8;

/// The layers beneath a leaf, from the bottom up.
#[derive(Debug)]
pub(crate) struct Parents {
    sources: Vec<Arc<dyn Source>>,
    flat: Arc<FlatMap>,
    candidates: Arc<Candidates>,
    /// The topmost source was the leaf, and is not in the flat map yet.
    top_first: AtomicBool,
    block_bytes: u64,
    /// Size of the leaf's disk in bytes.
    size: u64,
}

/// A part of the disk beneath the leaf: guest bytes, and where they are; `None` is zeros.
pub(crate) type Part = (Range<u64>, Option<Place>);

impl Parents {
    /// The parents of a leaf whose disk has `size` bytes in blocks of `block_bytes`. `sources` go from the bottom up.
    pub(crate) fn new(sources: Vec<Arc<dyn Source>>, block_bytes: u32, size: u64) -> Self {
        let block_bytes = u64::from(block_bytes);
        let flat = Arc::new(FlatMap::new(size.div_ceil(block_bytes)));
        let candidates = Arc::new(Candidates::new());
        Parents { sources, flat, candidates, top_first: AtomicBool::new(false), block_bytes, size }
    }

    /// The layers, from the bottom up.
    pub(crate) fn sources(&self) -> &[Arc<dyn Source>] {
        &self.sources
    }

    /// Which of them may not be what their children were made over, in words for a person.
    pub(crate) fn doubts(&self) -> Vec<String> {
        let images = self.sources.iter().filter_map(|source| source.as_parent());
        images.filter_map(|image| image.doubt().map(String::from)).collect()
    }

    /// The lowest `count` of them alone.
    pub(crate) fn lowest(&self, count: usize) -> Self {
        let sources = self.sources.iter().take(count).cloned().collect();
        Parents::new(sources, self.block_bytes as u32, self.size)
    }

    /// What is beneath the next leaf of a disk whose leaf is `leaf` now, over `below`. To be folded in ([`Parents::fold`]) once
    /// nothing is written to that leaf any more.
    pub(crate) fn over(below: Option<&Parents>, leaf: &Arc<Layer>) -> Self {
        let block_bytes = u64::from(leaf.place().block_bytes);
        let size = leaf.footer().current_size;
        let (below, flat, candidates) = match below {
            None => {
                let flat = FlatMap::zeros(size.div_ceil(block_bytes));
                (&[][..], Arc::new(flat), Arc::new(Candidates::new()))
            }
            Some(below) => (&below.sources[..], Arc::clone(&below.flat), Arc::clone(&below.candidates)),
        };
        let sources = below.iter().cloned().chain([Arc::clone(leaf) as Arc<dyn Source>]).collect();
        Parents { sources, flat, candidates, top_first: AtomicBool::new(true), block_bytes, size }
    }

    /// The same with `source`, which holds the same in the same places, as parent `number` from the bottom; all are folded in.
    pub(crate) fn with_source(&self, number: usize, source: Arc<dyn Source>) -> Self {
        let mut sources = self.sources.clone();
        if let Some(place) = sources.get_mut(number) {
            *place = source;
        }
        Parents {
            sources,
            flat: Arc::clone(&self.flat),
            candidates: Arc::clone(&self.candidates),
            top_first: AtomicBool::new(self.top_first.load(Ordering::Acquire)),
            ..*self
        }
    }

    /// The same without the parent beneath parent `number`, which is read by way of `source` and holds all that one does.
    pub(crate) fn absorbing(&self, number: usize, source: Arc<dyn Source>) -> Self {
        let mut sources = self.with_source(number, source).sources;
        if number > 0 && number < sources.len() {
            sources.remove(number - 1);
        }
        Parents::new(sources, self.block_bytes as u32, self.size)
    }

    /// Folds the topmost parent into the flat map: `leaf`, which was the leaf until now and is not written to any more. Nobody may
    /// use the parents that it was over.
    pub(crate) fn fold(&self, leaf: &Layer) {
        if !self.top_first.load(Ordering::Acquire) {
            return;
        }
        let source = self.top();
        for block in 0..self.flat.blocks() {
            let mapping = leaf.known_mapping(block);
            if mapping == Mapping::Absent {
                continue;
            }
            loop {
                let seen = self.flat.get(block);
                let flat = match (mapping, &seen.flat) {
                    (Mapping::Whole(slot), _) => {
                        let file_offset = leaf.place().data_offset(slot);
                        Some(Flat::Whole(Place { source, file_offset }))
                    }
                    (Mapping::Partial(_), Some(beneath)) => self.lay_over(block, beneath),
                    // Something would have to be read first: all parents are asked again when it is needed.
                    _ => None,
                };
                if self.flat.put(block, &seen, flat.as_ref()) {
                    break;
                }
            }
        }
        self.top_first.store(false, Ordering::Release);
    }

    /// A block as the topmost parent shows it over `beneath`; `None` where it cannot be read.
    fn lay_over(&self, block: u32, beneath: &Flat) -> Option<Flat> {
        let range = self.sectors_of(block);
        let source = self.top();
        let mut runs = Vec::new();
        let resolved = self.sources.last()?.resolve(range.clone(), &mut |part, found| {
            let first_sector = ((part.start - range.start) / SECTOR) as u32;
            let sectors = ((part.end - part.start) / SECTOR) as u32;
            match found {
                Found::Zero => {}
                Found::File(file_offset) => {
                    runs.push(Run { first_sector, sectors, place: Place { source, file_offset } });
                }
                Found::Below => push_part(&mut runs, beneath, first_sector..first_sector + sectors),
            }
        });
        resolved.ok().map(|()| from_runs(runs, ((range.end - range.start) / SECTOR) as u32))
    }

    /// The number of the topmost parent.
    fn top(&self) -> u32 {
        self.sources.len().saturating_sub(1) as u32
    }

    /// How many there are.
    pub(crate) fn depth(&self) -> usize {
        self.sources.len()
    }

    /// Calls `visit` with the parts that make up a range, in order.
    pub(crate) fn parts(&self, range: Range<u64>, visit: &mut dyn FnMut(Part) -> Result<()>) -> Result<()> {
        match self.sources.last() {
            Some(top) if self.top_first.load(Ordering::Acquire) => self.parts_by_top(&**top, range, visit),
            _ => self.parts_by_map(range, visit),
        }
    }

    /// The same where the topmost parent is not in the map.
    fn parts_by_top(
        &self,
        top: &dyn Source,
        range: Range<u64>,
        visit: &mut dyn FnMut(Part) -> Result<()>,
    ) -> Result<()> {
        let sectors = range.start / SECTOR * SECTOR..range.end.next_multiple_of(SECTOR);
        let mut found_parts = Vec::new();
        top.resolve(sectors, &mut |part, found| found_parts.push((part, found)))?;
        for (part, found) in found_parts {
            let wanted = part.start.max(range.start)..part.end.min(range.end);
            match found {
                Found::Below => self.parts_by_map(wanted, visit)?,
                Found::Zero => visit((wanted, None))?,
                Found::File(at) => {
                    let file_offset = at + (wanted.start - part.start);
                    visit((wanted, Some(Place { source: self.top(), file_offset })))?;
                }
            }
        }
        Ok(())
    }

    fn parts_by_map(&self, range: Range<u64>, visit: &mut dyn FnMut(Part) -> Result<()>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let block = at / self.block_bytes;
            let start = block * self.block_bytes;
            let end = range.end.min(start + self.block_bytes);
            let sector = |at: u64| ((at - start) / SECTOR) as u32;
            match self.flat.part(block as u32, sector(at)) {
                Some(part) => at = visit_part(start, at..end, part, visit)?,
                None => {
                    let flat = self.find(block as u32)?;
                    while at < end {
                        at = visit_part(start, at..end, flat.at(sector(at)), visit)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Asks all parents what is beneath the leaf in a block, and notes it.
    fn find(&self, block: u32) -> Result<Flat> {
        let seen = self.flat.get(block);
        let flat = self.look(block)?;
        self.flat.put(block, &seen, Some(&flat));
        Ok(flat)
    }

    /// The bytes of a block. Parents resolve whole sectors; the last one of a disk may be named in part.
    fn sectors_of(&self, block: u32) -> Range<u64> {
        let start = u64::from(block) * self.block_bytes;
        start..(start + self.block_bytes).min(self.size.next_multiple_of(SECTOR))
    }

    fn look(&self, block: u32) -> Result<Flat> {
        let mut look = Look::new(self.sectors_of(block));
        if self.sources.len() < MANY {
            for (source, parent) in self.sources.iter().enumerate().rev() {
                look.ask(source as u32, |range, visit| parent.resolve(range, visit))?;
            }
        } else {
            let window = self.candidates.window(block, self.block_bytes, &self.sources)?;
            for &Candidate { source, entry } in window.of(block) {
                let Some(parent) = self.sources.get(source as usize) else { continue };
                look.ask(source, |range, visit| parent.resolve_block(range, self.block_bytes, entry, visit))?;
            }
        }
        Ok(look.end())
    }
}

/// A block that is being looked for, from the topmost parent down.
struct Look {
    block: Range<u64>,
    /// What no parent has decided yet, in order.
    wanted: Vec<Range<u64>>,
    runs: Vec<Run>,
}

impl Look {
    fn new(block: Range<u64>) -> Self {
        Look { wanted: vec![block.clone()], block, runs: Vec::new() }
    }

    /// Takes over what the next parent has to say; it is not asked if nothing is left to be decided.
    fn ask(
        &mut self,
        source: u32,
        resolve: impl FnOnce(Range<u64>, &mut dyn FnMut(Range<u64>, Found)) -> Result<()>,
    ) -> Result<()> {
        let (Some(first), Some(last)) = (self.wanted.first(), self.wanted.last()) else { return Ok(()) };
        // In one go, since it may have to read its bitmap for it.
        let hull = first.start..last.end;
        let start = self.block.start;
        let (runs, wanted) = (&mut self.runs, &self.wanted);
        let mut below: Vec<Range<u64>> = Vec::new();
        let mut next = 0;
        resolve(hull, &mut |part, found| {
            // Parts and wanted ranges are both in order.
            while let Some(range) = wanted.get(next) {
                let common = range.start.max(part.start)..range.end.min(part.end);
                if !common.is_empty() {
                    match found {
                        Found::Zero => {}
                        Found::Below => match below.last_mut() {
                            Some(last) if last.end == common.start => last.end = common.end,
                            _ => below.push(common),
                        },
                        Found::File(at) => runs.push(Run {
                            first_sector: ((common.start - start) / SECTOR) as u32,
                            sectors: ((common.end - common.start) / SECTOR) as u32,
                            place: Place { source, file_offset: at + (common.start - part.start) },
                        }),
                    }
                }
                if range.end > part.end {
                    break;
                }
                next += 1;
            }
        })?;
        self.wanted = below;
        Ok(())
    }

    fn end(self) -> Flat {
        from_runs(self.runs, ((self.block.end - self.block.start) / SECTOR) as u32)
    }
}

/// Visits what `range` has of a part of the block that starts at `start`. Returns where that ends.
fn visit_part(
    start: u64,
    range: Range<u64>,
    (sectors, place): flat::Part,
    visit: &mut dyn FnMut(Part) -> Result<()>,
) -> Result<u64> {
    let end = match sectors.end {
        u32::MAX => range.end,
        sector => range.end.min(start + u64::from(sector) * SECTOR),
    };
    let from = start + u64::from(sectors.start) * SECTOR;
    let place = place.map(|place| Place { file_offset: place.file_offset + (range.start - from), ..place });
    visit((range.start..end, place))?;
    Ok(end)
}

/// Adds what a block of which `flat` is known holds in a range of its sectors.
fn push_part(runs: &mut Vec<Run>, flat: &Flat, wanted: Range<u32>) {
    let mut sector = wanted.start;
    while sector < wanted.end {
        let (sectors, place) = flat.at(sector);
        let end = sectors.end.min(wanted.end);
        if let Some(place) = place {
            let place = place.behind(sector - sectors.start);
            runs.push(Run { first_sector: sector, sectors: end - sector, place });
        }
        sector = end;
    }
}

/// What a block of `sectors` holds that consists of `runs`.
fn from_runs(mut runs: Vec<Run>, sectors: u32) -> Flat {
    runs.sort_unstable_by_key(|run| run.first_sector);
    runs.dedup_by(|next, run| {
        let follows = run.first_sector + run.sectors == next.first_sector
            && run.place.behind(run.sectors) == next.place;
        if follows {
            run.sectors += next.sectors;
        }
        follows
    });
    match runs.as_slice() {
        [] => Flat::Zero,
        [run] if run.sectors == sectors => Flat::Whole(run.place),
        _ => Flat::Mixed(runs),
    }
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
                    let Some(source) = self.sources.get(source as usize) else {
                        return Err(Error::Invalid { what: format!("there is no parent {source}") });
                    };
                    source.read_file(file_offset, now)?;
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

    fn stored(&self, range: Range<u64>, visit: &mut dyn FnMut(Stored)) -> Result<()> {
        let inside = range.start..range.end.min(self.size);
        if inside.is_empty() {
            return Ok(());
        }
        self.parts(inside, &mut |(range, place)| {
            let Some(Place { source, file_offset }) = place else { return Ok(()) };
            let image = self.sources.get(source as usize).and_then(|source| source.as_parent());
            if let Some(image) = image {
                visit(Stored { range, file: image.open_file()?, offset: file_offset });
            }
            Ok(())
        })
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests;
