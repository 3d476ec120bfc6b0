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
use crate::ext::{HEADER_BACKUP_OFFSET, PAGE_BYTES, SUPERBLOCK_OFFSETS};
use crate::layer::{Decision, Headers, Inspection};
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
        if let Ok(place) = decision.placement(path, file_bytes)
            && decision.superblock.is_some()
            && place.temporary.is_none()
        {
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
        if let Ok(place) = decision.placement(self.path, file_bytes)
            && decision.superblock.is_some()
            && place.temporary.is_none()
        {
            slots::for_each_used(&*file, self.path, &place, |_, page| self.leave_out(page..page + 1))?;
        }
        Ok(self)
    }

    fn decision(&self) -> Option<Decision> {
        Headers::read(&*self.file, self.path).and_then(|headers| headers.decide(self.path)).ok()
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
    for &offset in left_out {
        let structure = structure_at(offset, image);
        report.add(
            Code::Unreadable,
            structure,
            offset,
            "the medium does not give this page back: it is taken for lost",
        );
    }
}

/// What stands at an offset in front of the blocks of an image, in a block's page, or at its end.
fn structure_at(offset: u64, image: &Image) -> &'static str {
    let Inspection { headers, decision, .. } = &image.inspection;
    let page = offset / PAGE_BYTES * PAGE_BYTES;
    let table = image.vhd_table();
    let superblock = decision.superblock.map(|(superblock, _)| superblock);
    let ring = superblock.map(|s| s.ring_offset..s.ring_offset.saturating_add(s.ring_bytes));
    let place = image.place();
    match offset {
        0 => "start of the file",
        _ if superblock.is_some() && SUPERBLOCK_OFFSETS.contains(&page) => "superblock",
        HEADER_BACKUP_OFFSET if superblock.is_some() => "header backup",
        _ if page < table.end && table.start < page + PAGE_BYTES => "block table",
        _ if ring.is_some_and(|ring| ring.contains(&page)) => "journal ring",
        _ if page + PAGE_BYTES >= headers.file_bytes => "end of the file",
        _ if superblock.is_some() && place.temporary.is_none() && page >= place.slot_origin => "block page",
        _ => "private area",
    }
}
