//! Space in the file that nothing uses: slots and gaps without a block, and what stands behind the last block.

use super::code::Code;
use super::data;
use super::image::Image;
use super::report::Report;
use super::table::Extent;
use crate::error::{Error, Result};
use crate::ext::PAGE_BYTES;
use crate::layer::Condition;
use crate::vfs::File;
use crate::vhd::{self, Footer};
use std::ops::Range;
use std::path::Path;

/// Checks what lies between and behind `extents`, which are in the order of the file.
pub(super) fn check(
    report: &mut Report,
    file: &dyn File,
    path: &Path,
    image: &mut Image,
    extents: &[Extent],
) -> Result<()> {
    let place = *image.place();
    let stride = vhd::bat::block_stride(place.block_bytes);
    let file_bytes = image.inspection.headers.file_bytes;
    let table = image.vhd_table();
    let ours = image.inspection.decision.superblock.is_some() && place.temporary.is_none();
    // In front of our first slot there is room for the table to grow; elsewhere anything may be there.
    let mut used_to = match (ours, extents.first()) {
        (true, _) => place.slot_origin,
        (false, Some(first)) => place.bitmap_offset(first.entry),
        (false, None) => table.end,
    };
    // Other programs may have put it behind blocks.
    let behind_table = |used_to: u64, end: u64| match (used_to..end).contains(&table.start) {
        true => table.end,
        false => used_to,
    };
    let mut leaks = Leaks { file, path, gaps: Vec::new(), bytes: 0 };
    for extent in extents {
        // A block of ours begins with its page.
        let start = match ours && place.slot_index(extent.entry).is_some() {
            true => place.block_page_offset(extent.entry),
            false => place.bitmap_offset(extent.entry),
        };
        let free_from = behind_table(used_to, start);
        if start.saturating_sub(free_from) >= stride {
            leaks.add(free_from, start)?;
        }
        used_to = used_to.max(place.block_end(extent.entry));
    }
    let end = match image.inspection.decision.condition {
        Condition::Clean => match data::room(image) {
            Some(crcs) if crcs.offset >= used_to => crcs.offset,
            _ => file_bytes.saturating_sub(Footer::SIZE as u64),
        },
        _ => file_bytes.min(place.slots_end()),
    };
    used_to = behind_table(used_to, end);
    match end.saturating_sub(used_to) {
        0 => {}
        behind if behind >= stride => leaks.add(used_to, end)?,
        behind if image.inspection.decision.condition == Condition::Clean => {
            report.add(Code::Tail, "end of the file", used_to, format!("{behind} bytes"));
        }
        _ => {}
    }
    report.leaked_bytes = leaks.bytes;
    if let Some(first) = leaks.gaps.first() {
        let what = format!("{} bytes in {} places", leaks.bytes, leaks.gaps.len());
        report.add(Code::LeakedSpace, "unused space", first.start, what);
    }
    image.gaps = leaks.gaps;
    Ok(())
}

/// Unused space that the file occupies; holes cost nothing.
struct Leaks<'a> {
    file: &'a dyn File,
    path: &'a Path,
    gaps: Vec<Range<u64>>,
    bytes: u64,
}

impl Leaks<'_> {
    fn add(&mut self, from: u64, to: u64) -> Result<()> {
        // A page at the edge has its space for what is beside the gap.
        let (first, last) = (from.next_multiple_of(PAGE_BYTES), to / PAGE_BYTES * PAGE_BYTES);
        let mut at = first;
        let before = self.bytes;
        while at < last {
            let next = self
                .file
                .next_data(at)
                .map_err(|error| Error::io(self.path, format!("looking for data at offset {at}"), error))?;
            let Some(data) = next.filter(|data| data.start < last) else { break };
            let (start, end) = (data.start.max(at), data.end.min(last));
            self.bytes += end.saturating_sub(start);
            at = end.max(at + 1);
        }
        if self.bytes > before {
            self.gaps.push(from..to);
        }
        Ok(())
    }
}
