//! The BAT: made again from the block headers where they tell, else each bad entry by itself.
//!
//! The header of a block, at its own offset and with the highest allocation sequence, is right. An entry without such a
//! header is cleared if it names no place where a block can be; two blocks that share space and of which no header tells
//! whose it is get a copy each of what a guest sees. A block whose page alone is lost keeps its entry (`pages.rs`).

use super::Work;
use super::pages::blocks;
use crate::check::code::Code;
use crate::check::image::Image;
use crate::check::report::Report;
use crate::check::slots::{self, FoundSlots};
use crate::error::{Error, Result};
use crate::ext::PAGE_BYTES;
use crate::layer::Condition;
use crate::vfs::{File, FileExt};
use crate::vhd::{self, Footer, bitmap};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const ENTRIES_PER_PAGE: u32 = (PAGE_BYTES / vhd::bat::ENTRY_BYTES) as u32;

/// What can be done about the table.
pub(super) fn works(image: &Image, report: &Report, file: &dyn File, path: &Path) -> Result<Vec<Work>> {
    if image.rebuilt {
        let what = "make the block table again from the block headers: it is what the last close left";
        let writes = changed_pages(image, &image.entries);
        return Ok(vec![Work { what: what.into(), safe: true, writes, ..Work::default() }]);
    }
    let mut works = Vec::new();
    if !image.bad_entries.is_empty() {
        works.extend(bad_entries(image, file, path)?);
    }
    if works.is_empty() && report.count(Code::BatBeyondDisk) > 0 {
        let first = u32::try_from(image.disk_blocks()).unwrap_or(u32::MAX);
        let beyond: Vec<u32> = (0..)
            .zip(&image.entries)
            .filter(|&(block, &entry)| block >= first && entry != vhd::UNALLOCATED)
            .map(|(block, _)| block)
            .collect();
        let what = format!("clear the entries of {}, behind the end of the disk", blocks(&beyond));
        let mut work = change(image, what, &beyond.iter().map(|&block| (block, vhd::UNALLOCATED)).collect());
        // With their headers: these would bring them back.
        let slots = beyond.iter().filter_map(|&block| image.entries.get(block as usize));
        let slots = slots.filter(|&&entry| image.place().slot_index(entry).is_some());
        work.punches.extend(slots.map(|&e| image.place().block_page_offset(e)..image.place().block_end(e)));
        works.push(work);
    }
    Ok(works)
}

/// New entries by block.
type Changes = BTreeMap<u32, u32>;

fn bad_entries(image: &Image, file: &dyn File, path: &Path) -> Result<Vec<Work>> {
    let ours = image.inspection.decision.superblock.is_some();
    let found = match ours {
        true => slots::scan(file, path, image.place(), image.inspection.decision.footer.unique_id)?,
        false => FoundSlots::default(),
    };
    let entry_of = |block: u32| image.entries.get(block as usize).copied().unwrap_or(vhd::UNALLOCATED);
    let holder = found.holders();
    let mut moved = Changes::new();
    let mut cleared = Changes::new();
    let mut shared = Vec::new();
    let mut kept_short = Vec::new();
    // Slots whose headers would bring cleared entries back.
    let mut stale = Vec::new();
    for &block in &image.bad_entries {
        let entry = entry_of(block);
        match found.get(block) {
            Some(right) if right.slot != entry => {
                moved.insert(block, right.slot);
            }
            // Its header is right, and the file was cut behind that.
            Some(_) if can_be_completed(image, entry) => kept_short.push(block),
            Some(_) if is_cut(image, entry) => {
                cleared.insert(block, vhd::UNALLOCATED);
                stale.push(entry);
            }
            Some(_) => {}
            None if holder.contains_key(&entry) && image.place().slot_index(entry).is_some() => {
                cleared.insert(block, vhd::UNALLOCATED);
            }
            None if can_be_completed(image, entry) => kept_short.push(block),
            None if is_elsewhere(image, entry) => shared.push(block),
            None => {
                cleared.insert(block, vhd::UNALLOCATED);
            }
        }
    }
    // In a page of the table with a bad entry the empty ones prove nothing either.
    let pages: BTreeSet<u32> = image.bad_entries.iter().map(|block| block / ENTRIES_PER_PAGE).collect();
    let taken: BTreeSet<u32> = image.entries.iter().copied().collect();
    for block in pages.iter().flat_map(|page| page * ENTRIES_PER_PAGE..(page + 1) * ENTRIES_PER_PAGE) {
        if entry_of(block) == vhd::UNALLOCATED
            && let Some(right) = found.get(block)
            && !taken.contains(&right.slot)
        {
            moved.insert(block, right.slot);
        }
    }
    let mut works = Vec::new();
    if !moved.is_empty() {
        let names: Vec<u32> = moved.keys().copied().collect();
        works.push(change(
            image,
            format!("take the entries of {} from their headers", blocks(&names)),
            &moved,
        ));
    }
    if !cleared.is_empty() {
        let names: Vec<u32> = cleared.keys().copied().collect();
        let what = format!("clear the entries of {}, which read as zeros then", blocks(&names));
        // Both kinds in one write of each page.
        let mut work = change(image, what, &moved.iter().chain(&cleared).map(|(&b, &e)| (b, e)).collect());
        let (place, file_bytes) = (image.place(), image.inspection.headers.file_bytes);
        work.punches.extend(stale.iter().map(|&entry| place.block_page_offset(entry)..file_bytes));
        works.push(work);
    }
    if works.is_empty() && !kept_short.is_empty() {
        works.extend(complete(image, &kept_short));
    }
    if works.is_empty() && !shared.is_empty() {
        works.extend(copies(image, &shared, &found, file, path)?);
    }
    Ok(works)
}

/// Whether a block ends past the end of the file.
fn is_cut(image: &Image, entry: u32) -> bool {
    image.place().block_end(entry) > image.inspection.headers.file_bytes
}

/// Whether a block starts in the file, behind all metadata, and only ends past it: the file was cut.
fn can_be_completed(image: &Image, entry: u32) -> bool {
    let place = image.place();
    let (start, file_bytes) = (place.bitmap_offset(entry), image.inspection.headers.file_bytes);
    let last = image.entries.iter().filter(|&&other| other != vhd::UNALLOCATED && other != entry);
    image.inspection.decision.condition == Condition::Clean
        && start >= place.table_end()
        && start + place.bitmap_bytes() < file_bytes
        && is_cut(image, entry)
        && last.clone().all(|&other| {
            place.block_end(other) <= start || place.bitmap_offset(other) >= place.block_end(entry)
        })
}

/// Whether a block lies where one can be, so that it was found bad by what it shares.
fn is_elsewhere(image: &Image, entry: u32) -> bool {
    let place = image.place();
    let decision = &image.inspection.decision;
    let header_end = decision.footer.data_offset + 1024;
    let (start, end) = (place.bitmap_offset(entry), place.block_end(entry));
    let clear = |from: u64, to: u64| end <= from || to <= start;
    end <= image.inspection.headers.file_bytes
        && start >= Footer::SIZE as u64
        && clear(decision.footer.data_offset, header_end)
        && clear(place.table_offset, place.table_end())
        && (decision.superblock.is_none() || start >= place.table_end())
}

/// The file becomes long enough for its last blocks; what was cut off reads as zeros.
fn complete(image: &Image, cut: &[u32]) -> Option<Work> {
    let place = image.place();
    let end = cut
        .iter()
        .filter_map(|&block| image.entries.get(block as usize))
        .map(|&e| place.block_end(e))
        .max()?;
    let footer = image.inspection.decision.footer.to_bytes().to_vec();
    Some(Work {
        what: format!("extend the file over the end of {}, which was cut off and is lost", blocks(cut)),
        writes: vec![(end, footer)],
        ..Work::default()
    })
}

/// Each block but the first of those that share space gets a copy at the end of the file.
fn copies(
    image: &Image,
    shared: &[u32],
    found: &FoundSlots,
    file: &dyn File,
    path: &Path,
) -> Result<Vec<Work>> {
    let place = image.place();
    let file_bytes = file.length().map_err(|error| Error::io(path, "asking for the length", error))?;
    let mut extents: Vec<(u32, u32)> =
        image.bad_entries.iter().filter_map(|&b| Some((*image.entries.get(b as usize)?, b))).collect();
    extents.sort_unstable();
    let is_shared: BTreeSet<u32> = shared.iter().copied().collect();
    let stride = vhd::bat::block_stride(place.block_bytes);
    let mut at = file_bytes.next_multiple_of(PAGE_BYTES);
    // So that the data is aligned, as ours is.
    at += PAGE_BYTES - place.bitmap_bytes() % PAGE_BYTES;
    let mut changes = Changes::new();
    let (mut moves, mut bitmaps) = (Vec::new(), Vec::new());
    let mut copied_to = 0;
    let mut kept_to = 0;
    for (entry, block) in extents {
        let (start, end) = (place.bitmap_offset(entry), place.block_end(entry));
        if start >= kept_to || !is_shared.contains(&block) || found.get(block).is_some() {
            kept_to = kept_to.max(end);
            continue;
        }
        let Some(new) = u32::try_from(at / vhd::SECTOR).ok().filter(|&new| new != vhd::UNALLOCATED) else {
            continue;
        };
        let bits = sound_bits(image, block, start, file, path)?;
        for run in bitmap::runs(&bits, 0..(bits.len() * 8) as u32).filter(|run| run.set) {
            let offset = place.bitmap_bytes() + u64::from(run.sectors.start) * vhd::SECTOR;
            let length = u64::from(run.sectors.end - run.sectors.start) * vhd::SECTOR;
            moves.push((start + offset, at + offset, length));
        }
        bitmaps.push((at, bits));
        copied_to = at + stride;
        changes.insert(block, new);
        at = (at + stride).next_multiple_of(PAGE_BYTES) + PAGE_BYTES - place.bitmap_bytes() % PAGE_BYTES;
    }
    if changes.is_empty() {
        return Ok(Vec::new());
    }
    let end = copied_to;
    let names: Vec<u32> = changes.keys().copied().collect();
    let footer = image.inspection.decision.footer.to_bytes().to_vec();
    let copied = Work {
        what: format!("copy {} to the end of the file, so that no two share space", blocks(&names)),
        copies: moves,
        writes: bitmaps.into_iter().chain([(end, footer)]).collect(),
        ..Work::default()
    };
    let entries = change(image, format!("let the entries of {} name the copies", blocks(&names)), &changes);
    Ok(vec![copied, entries])
}

/// The bitmap at `start`, as far as the disk reaches: so that the copy holds what a guest sees, and nothing beneath.
fn sound_bits(image: &Image, block: u32, start: u64, file: &dyn File, path: &Path) -> Result<Vec<u8>> {
    let place = image.place();
    let mut bits = vec![0; place.bitmap_bytes() as usize];
    file.read_or_zero_at(&mut bits, start)
        .map_err(|error| Error::io(path, format!("reading the bitmap of block {block}"), error))?;
    let from = u64::from(block) * u64::from(place.block_bytes);
    let on_disk = image.inspection.decision.footer.current_size.saturating_sub(from);
    let sectors = on_disk.min(place.block_bytes.into()) / vhd::SECTOR;
    bitmap::set_range(&mut bits, u32::try_from(sectors).unwrap_or(u32::MAX)..u32::MAX, false);
    Ok(bits)
}

/// The pages of the table with these entries cleared.
pub(super) fn without(image: &Image, blocks: &[u32]) -> Vec<(u64, Vec<u8>)> {
    change(image, String::new(), &blocks.iter().map(|&block| (block, vhd::UNALLOCATED)).collect()).writes
}

fn change(image: &Image, what: String, changes: &Changes) -> Work {
    let mut entries = image.entries.clone();
    for (&block, &entry) in changes {
        if let Some(slot) = entries.get_mut(block as usize) {
            *slot = entry;
        }
    }
    Work { what, writes: changed_pages(image, &entries), ..Work::default() }
}

/// The pages of the table in which `entries` differ from what the file, with its journal, says; sectors of them in an image
/// made elsewhere, whose table may share a page with a block.
fn changed_pages(image: &Image, entries: &[u32]) -> Vec<(u64, Vec<u8>)> {
    let unit = if image.inspection.decision.superblock.is_some() { PAGE_BYTES } else { vhd::SECTOR } as usize;
    let mut table = image.inspection.table.clone();
    for (block, &entry) in (0..).zip(entries) {
        // The table holds all entries.
        let _ = vhd::bat::set_entry(&mut table, block, entry);
    }
    let old = image.inspection.table.chunks(unit);
    let changed = table.chunks(unit).zip(old).enumerate().filter(|(_, (new, old))| new != old);
    changed
        .map(|(index, (new, _))| (image.place().table_offset + (index * unit) as u64, new.to_vec()))
        .collect()
}
