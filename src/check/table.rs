//! The BAT: every block within the file, clear of metadata and of every other block. Sorted once, so n log n.

use super::code::Code;
use super::image::Image;
use super::report::{Finding, Report};
use crate::ext::{PAGE_BYTES, SUPERBLOCK_OFFSETS, TEMPORARY_HEAD_BYTES};
use crate::vhd::{self, DynamicHeader, Footer};
use std::ops::Range;

const STRUCTURE: &str = "block table";

/// A block in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Extent {
    /// The sector at which its bitmap starts: its BAT entry.
    pub(super) entry: u32,
    /// Its index in the BAT.
    pub(super) block: u32,
}

/// Checks all entries; returns the blocks whose entries can be right, in the order of the file.
pub(super) fn check(report: &mut Report, image: &mut Image) -> Vec<Extent> {
    let areas = metadata(image);
    let place = *image.place();
    let blocks = image.disk_blocks();
    let mut extents = Vec::new();
    let mut bad = Vec::new();
    for (block, &entry) in (0..).zip(&image.entries).filter(|&(_, &entry)| entry != vhd::UNALLOCATED) {
        let (start, end) = (place.bitmap_offset(entry), place.block_end(entry));
        let finding = |code, what: String| Finding {
            code,
            structure: STRUCTURE,
            offset: Some(place.table_offset + u64::from(block) * vhd::bat::ENTRY_BYTES),
            block: Some(block),
            guest: None,
            what,
        };
        if u64::from(block) >= blocks {
            let what = format!("entry {block} is sector {entry}; the disk has {blocks} blocks");
            report.push(finding(Code::BatBeyondDisk, what));
        }
        let file_end = file_end(image, entry);
        if end > file_end {
            let what =
                format!("block {block} is at offset {start} and ends at {end}, past the end at {file_end}");
            report.push(finding(Code::BatRange, what));
            bad.push(block);
        } else if let Some((_, name)) = areas.iter().find(|(area, _)| start < area.end && area.start < end) {
            let what = format!("block {block} is at offset {start}, over the {name}");
            report.push(finding(Code::BatMetadata, what));
            bad.push(block);
        } else {
            extents.push(Extent { entry, block });
        }
    }
    report.allocated_blocks = extents.len() as u64;
    extents.sort_unstable();
    let mut furthest: Option<(u64, u32)> = None;
    for extent in &extents {
        let (start, end) = (place.bitmap_offset(extent.entry), place.block_end(extent.entry));
        if let Some((before, other)) = furthest
            && before > start
        {
            let block = extent.block;
            let shared = before.min(end) - start;
            report.push(Finding {
                code: Code::BatOverlap,
                structure: STRUCTURE,
                offset: Some(place.table_offset + u64::from(block) * vhd::bat::ENTRY_BYTES),
                block: Some(block),
                guest: None,
                what: format!("block {block} at offset {start} shares {shared} bytes with block {other}"),
            });
            bad.push(block);
            bad.push(other);
        }
        if furthest.is_none_or(|(before, _)| end > before) {
            furthest = Some((end, extent.block));
        }
    }
    bad.sort_unstable();
    bad.dedup();
    image.bad_entries = bad;
    extents
}

/// Blocks end before this. A file that was not closed may be shorter than the blocks that live records of its journal make.
fn file_end(image: &Image, entry: u32) -> u64 {
    match image.inspection.allocated.contains(&entry) {
        true => u64::MAX,
        false => image.inspection.headers.file_bytes,
    }
}

/// The places where no block may lie.
fn metadata(image: &Image) -> Vec<(Range<u64>, &'static str)> {
    let (decision, place) = (&image.inspection.decision, image.place());
    let header_at = decision.footer.data_offset;
    let mut areas = vec![
        (0..Footer::SIZE as u64, "footer copy"),
        (header_at..header_at + DynamicHeader::SIZE as u64, "dynamic header"),
        (image.vhd_table(), "block table"),
    ];
    if let Some(temporary) = place.temporary {
        areas.push((place.ring_offset..temporary.head + TEMPORARY_HEAD_BYTES, "temporary journal"));
    } else if decision.superblock.is_some() {
        areas.push((SUPERBLOCK_OFFSETS[0]..SUPERBLOCK_OFFSETS[1] + PAGE_BYTES, "superblocks"));
        areas.push((place.ring_offset..place.ring_offset + place.ring_bytes, "journal ring"));
        areas.push((0..place.table_offset, "private area"));
    }
    areas
}
