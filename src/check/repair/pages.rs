//! Block pages: headers that are gone are made again, bits that must be set are set, space without a block is given back.

use super::Work;
use super::superblocks::next_superblock;
use crate::check::code::Code;
use crate::check::data;
use crate::check::image::Image;
use crate::check::report::Report;
use crate::check::slots;
use crate::error::{Error, Result};
use crate::ext::{BlockHeader, PAGE_BYTES};
use crate::layer::Condition;
use crate::vfs::{File, FileExt};
use crate::vhd::{self, DiskType, bitmap};
use std::collections::BTreeMap;
use std::path::Path;

/// What can be done about block pages and unused space.
pub(super) fn works(image: &Image, report: &Report, file: &dyn File, path: &Path) -> Result<Vec<Work>> {
    let mut works = Vec::new();
    let (decision, place) = (&image.inspection.decision, image.place());
    let Some((superblock, _)) = decision.superblock else { return Ok(works) };
    // Above every number in the file as well, should the superblock not know them all.
    let mut next = superblock.next_allocation.max(image.last_allocation.saturating_add(1));
    let lost: Vec<u32> = image.bad_pages.iter().copied().filter(|&block| is_mapped(image, block)).collect();
    if !lost.is_empty() {
        let found = slots::scan(file, path, place, decision.footer.unique_id)?;
        next = next.max(found.last_allocation().saturating_add(1));
    }
    let first = next;
    let ones = full_bitmap(image);
    let differencing = decision.footer.disk_type == DiskType::Differencing;
    // As a seal's CRCs tell them: of all blocks, or the others are guessed.
    let told: BTreeMap<u32, Vec<u8>> = match differencing {
        true => lost.iter().filter_map(|&b| Some((b, data::sealed_bitmap(file, image, b)?))).collect(),
        false => BTreeMap::new(),
    };
    let all_told = differencing && told.len() == lost.len();
    let mut headers = Work {
        what: match differencing {
            true if all_told => {
                format!("make the headers of {} again, the bits set that the CRCs tell", blocks(&lost))
            }
            true => {
                format!("make the headers of {} again, the bits set where data is not zero", blocks(&lost))
            }
            false => format!("make the headers of {} again, all their bits set", blocks(&lost)),
        },
        // Which sectors of a child were written, its bitmaps alone say.
        safe: image.has_table_of_last_close() && (!differencing || all_told),
        ..Work::default()
    };
    for block in lost {
        let Some(&entry) = image.entries.get(block as usize) else { continue };
        let page_offset = place.block_page_offset(entry);
        let header = BlockHeader { page_offset, disk_id: decision.footer.unique_id, block, allocation: next };
        let bits = match told.get(&block) {
            Some(bits) => bits.clone(),
            None if differencing => bits_of_data(image, entry, file, path)?,
            None => ones.clone(),
        };
        headers.writes.push((page_offset, header.to_page(&bits).to_vec()));
        next = next.saturating_add(1);
    }
    let count_from = |next: u64, safe: bool| Work {
        what: format!("the superblock counts allocations on from {next}"),
        safe,
        writes: next_superblock(image, |superblock| superblock.next_allocation = next),
        ..Work::default()
    };
    if report.count(Code::AllocationSequence) > 0 {
        works.push(count_from(first, true));
    }
    if next > first {
        // With the headers that get these numbers, or not at all.
        works.push(count_from(next, headers.safe));
    }
    if !headers.writes.is_empty() {
        works.push(headers);
    }
    if !image.clear_bits.is_empty() {
        let entries = image.clear_bits.iter().filter_map(|&block| image.entries.get(block as usize));
        works.push(Work {
            what: format!("set all bits of {}", blocks(&image.clear_bits)),
            safe: true,
            writes: entries.map(|&entry| (place.bitmap_offset(entry), ones.clone())).collect(),
            ..Work::default()
        });
    }
    let closed = decision.condition == Condition::Clean;
    if closed && !image.gaps.is_empty() && image.bad_entries.is_empty() && image.bad_pages.is_empty() {
        works.push(Work {
            what: format!("give back {} bytes that belong to no block", report.leaked_bytes),
            // Where other programs placed blocks, one may have been lost there.
            safe: image.described,
            punches: image.gaps.clone(),
            ..Work::default()
        });
    }
    Ok(works)
}

fn is_mapped(image: &Image, block: u32) -> bool {
    let entry = image.entries.get(block as usize).copied().unwrap_or(vhd::UNALLOCATED);
    let bad = image.bad_entries.binary_search(&block).is_ok();
    entry != vhd::UNALLOCATED && image.place().slot_index(entry).is_some() && !bad
}

fn full_bitmap(image: &Image) -> Vec<u8> {
    let mut bits = vec![0; image.place().bitmap_bytes() as usize];
    let sectors = u64::from(image.place().block_bytes) / vhd::SECTOR;
    bitmap::set_range(&mut bits, 0..u32::try_from(sectors).unwrap_or(u32::MAX), true);
    bits
}

/// The bits of the 4 KiB units that are not zero: what was never written reads as zeros.
fn bits_of_data(image: &Image, entry: u32, file: &dyn File, path: &Path) -> Result<Vec<u8>> {
    let place = image.place();
    let mut bits = vec![0; place.bitmap_bytes() as usize];
    let mut unit = [0; PAGE_BYTES as usize];
    let sectors_per_unit = (PAGE_BYTES / vhd::SECTOR) as u32;
    for (index, first) in
        (0..u64::from(place.block_bytes) / PAGE_BYTES).zip((0..).step_by(sectors_per_unit as usize))
    {
        let at = place.data_offset(entry) + index * PAGE_BYTES;
        file.read_or_zero_at(&mut unit, at)
            .map_err(|error| Error::io(path, format!("reading data at offset {at}"), error))?;
        image.inspection.overlay.apply(at, &mut unit);
        if unit.iter().any(|&byte| byte != 0) {
            bitmap::set_range(&mut bits, first..first + sectors_per_unit, true);
        }
    }
    Ok(bits)
}

/// Names some blocks and counts the others.
pub(super) fn blocks(blocks: &[u32]) -> String {
    const NAMED: usize = 8;
    let names: Vec<String> = blocks.iter().take(NAMED).map(u32::to_string).collect();
    let more = blocks.len().saturating_sub(NAMED);
    match (blocks.len(), more) {
        (1, _) => format!("block {}", names.join("")),
        (_, 0) => format!("blocks {}", names.join(", ")),
        _ => format!("blocks {} and {more} more", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_blocks_are_named() {
        let named = |count: u32| blocks(&(1..=count).collect::<Vec<_>>());
        assert_eq!(named(1), "block 1");
        assert_eq!(named(2), "blocks 1, 2");
        assert_eq!(named(8), "blocks 1, 2, 3, 4, 5, 6, 7, 8");
        assert_eq!(named(9), "blocks 1, 2, 3, 4, 5, 6, 7, 8 and 1 more");
    }
}
