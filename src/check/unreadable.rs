//! Metadata that the medium does not give back: a view of the file in which it reads as zeros, as where it is lost. A copy of it, or
//! what it describes, may tell the same.
//!
//! The data of blocks is left as it is: what cannot be read of it is nowhere else.

use super::code::Code;
use super::image::Image;
use super::report::Report;
use super::shadow::Shadow;
use super::slots;
use crate::error::{Error, Result};
use crate::ext::{HEADER_BACKUP_OFFSET, PAGE_BYTES, Placement, SUPERBLOCK_OFFSETS};
use crate::layer::{Condition, Decision, Headers};
use crate::sync::Arc;
use crate::vfs::{File, FileExt};
use crate::vhd;
use std::ops::Range;
use std::path::Path;

/// A view of a file without what cannot be read.
#[derive(Debug)]
pub(super) struct Readable<'a> {
    /// The view; what is written to it stays in memory.
    pub(super) file: Arc<dyn File>,
    path: &'a Path,
    /// The pages that were left out, by their offsets, in order of the look at them.
    pub(super) left_out: Vec<u64>,
}

impl<'a> Readable<'a> {
    /// Leaves out what cannot be read of footers and headers, superblocks, tables and, of an image of ours, all that lies in front of
    /// its blocks.
    pub(super) fn new(file: Arc<dyn File>, path: &'a Path) -> Result<Self> {
        let io = |error| Error::io(path, "looking at the image", error);
        let file_bytes = file.length().map_err(io)?;
        let file: Arc<dyn File> = Arc::new(Shadow::new(file).map_err(io)?);
        let mut view = Readable { file, path, left_out: Vec::new() };
        view.leave_out(0..HEADER_BACKUP_OFFSET + PAGE_BYTES)?;
        view.leave_out(file_bytes.saturating_sub(1) / PAGE_BYTES * PAGE_BYTES..file_bytes)?;
        let Some(decision) = view.decision() else { return Ok(view) };
        let table = decision.header.table_offset;
        view.leave_out(0..table.saturating_add(vhd::bat_bytes(decision.header.max_table_entries)))?;
        if let Some(place) = view.place_of_ours(&decision, file_bytes) {
            view.leave_out(0..place.slot_origin)?;
        }
        Ok(view)
    }

    /// Leaves out the pages of blocks, too.
    pub(super) fn without_block_pages(mut self) -> Result<Self> {
        let Some(decision) = self.decision() else { return Ok(self) };
        let file = Arc::clone(&self.file);
        let file_bytes =
            file.length().map_err(|error| Error::io(self.path, "looking at the image", error))?;
        if let Some(place) = self.place_of_ours(&decision, file_bytes) {
            slots::for_each_used(&*file, self.path, &place, |_, page| self.leave_out(page..page + 1))?;
        }
        Ok(self)
    }

    fn decision(&self) -> Option<Decision> {
        Headers::read(&*self.file, self.path).and_then(|headers| headers.decide(self.path)).ok()
    }

    /// Where things lie in an image that keeps its metadata in front of its blocks, and a page with each.
    fn place_of_ours(&self, decision: &Decision, file_bytes: u64) -> Option<Placement> {
        let place = decision.placement(self.path, file_bytes).ok()?;
        (decision.superblock.is_some() && place.temporary.is_none()).then_some(place)
    }

    fn leave_out(&mut self, range: Range<u64>) -> Result<()> {
        let io = |error| Error::io(self.path, "looking at the image", error);
        let mut at = range.start;
        while let Some(data) = self.file.next_data(at).map_err(io)?.filter(|data| data.start < range.end) {
            for page in
                (data.start / PAGE_BYTES * PAGE_BYTES..data.end.min(range.end)).step_by(PAGE_BYTES as usize)
            {
                if self.file.read_or_zero_at(&mut [0; PAGE_BYTES as usize], page).is_err() {
                    self.file.punch_hole(page, PAGE_BYTES).map_err(io)?;
                    self.left_out.push(page);
                }
            }
            at = data.end;
        }
        Ok(())
    }
}

/// Adds the pages that were left out to what was found.
pub(super) fn report(report: &mut Report, left_out: &[u64], image: &Image) {
    for &page in left_out {
        let what = "the medium does not give this page back: it is taken for lost";
        report.add(Code::Unreadable, structure_at(page, image), page, what);
    }
}

/// Ranges of the disk of which the data, or the bits that tell it from nothing, is in pages that were left out. Of an image of ours there
/// are none: its blocks share no page with other metadata.
pub(super) fn lost_data(image: &Image, left_out: &[u64]) -> Vec<Range<u64>> {
    let place = image.place();
    let block_bytes = u64::from(place.block_bytes);
    let mut lost = Vec::new();
    for &page in if is_ours(image) { &[] } else { left_out } {
        let end = page + PAGE_BYTES;
        for (block, &entry) in (0..).zip(&image.entries).filter(|(_, entry)| **entry != vhd::UNALLOCATED) {
            let (bits, data) = (place.bitmap_offset(entry), place.data_offset(entry));
            let from: u64 = block * block_bytes;
            if bits < end && page < data {
                lost.push(from..from + block_bytes);
            } else if data < end && page < place.block_end(entry) {
                lost.push(from + page.saturating_sub(data)..from + (end - data).min(block_bytes));
            }
        }
    }
    lost
}

/// The pages of the ring of a journal that is to be replayed, if there is one.
pub(super) fn live_ring(image: &Image) -> Option<Range<u64>> {
    let decision = &image.inspection.decision;
    let (superblock, _) = decision.superblock.filter(|_| decision.condition == Condition::Dirty)?;
    Some(superblock.ring_offset..superblock.ring_offset.saturating_add(superblock.ring_bytes))
}

fn is_ours(image: &Image) -> bool {
    image.inspection.decision.superblock.is_some() && image.place().temporary.is_none()
}

/// What stands in a page.
fn structure_at(page: u64, image: &Image) -> &'static str {
    let (place, table) = (image.place(), image.vhd_table());
    match page {
        0 => "start of the file",
        _ if page < table.end && table.start < page + PAGE_BYTES => "block table",
        _ if page + PAGE_BYTES >= image.inspection.headers.file_bytes => "end of the file",
        _ if !is_ours(image) => "block or locator",
        _ if SUPERBLOCK_OFFSETS.contains(&page) => "superblock",
        HEADER_BACKUP_OFFSET => "header backup",
        _ if (place.ring_offset..place.ring_offset + place.ring_bytes).contains(&page) => "journal ring",
        _ if page >= place.slot_origin => "block page",
        _ => "private area",
    }
}
