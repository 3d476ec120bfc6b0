//! What the block headers in the slots say (FORMAT.md, "Rebuilder of the block table").
//!
//! A header counts only at its own offset, with the disk's id and a block that the table has; of two that name one block the
//! higher allocation sequence is right.

use crate::error::{Error, Result};
use crate::ext::{BlockHeader, Placement};
use crate::vfs::{File, FileExt};
use crate::vhd::{self, UniqueId};
use std::collections::HashMap;
use std::path::Path;

/// The slot that holds a block, by its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    /// The slot, as a BAT entry.
    pub(super) slot: u32,
    /// The allocation sequence.
    pub(super) allocation: u64,
}

/// For every block the best header.
#[derive(Debug, Default)]
pub(super) struct FoundSlots {
    by_block: Vec<Option<Found>>,
}

impl FoundSlots {
    /// What the headers say of a block.
    pub(super) fn get(&self, block: u32) -> Option<Found> {
        self.by_block.get(block as usize).copied().flatten()
    }

    /// The block that each slot holds.
    pub(super) fn holders(&self) -> HashMap<u32, u32> {
        (0..).zip(&self.by_block).filter_map(|(block, found)| Some(((*found)?.slot, block))).collect()
    }

    /// The highest allocation sequence.
    pub(super) fn last_allocation(&self) -> u64 {
        self.by_block.iter().flatten().map(|found| found.allocation).max().unwrap_or(0)
    }

    /// Whether a table that differs from the one the headers give was damaged, rather than changed: no entry that differs
    /// names a place off the grid where a block could be. Another program that moved a block there left its header behind.
    pub(super) fn explain(&self, table: &[u32], place: &Placement, file_bytes: u64) -> bool {
        let right = self.table(place);
        let mut slots: Vec<u32> = right.iter().copied().filter(|&entry| entry != vhd::UNALLOCATED).collect();
        slots.sort_unstable();
        let is_free = |start: u64, end: u64| {
            let behind = slots.partition_point(|&slot| place.bitmap_offset(slot) < end);
            let before = slots.get(..behind).unwrap_or_default().last();
            before.is_none_or(|&slot| place.block_end(slot) <= start)
        };
        right.iter().zip(table).filter(|(right, found)| right != found).all(|(_, &entry)| {
            let (start, end) = (place.bitmap_offset(entry), place.block_end(entry));
            entry == vhd::UNALLOCATED
                || place.slot_index(entry).is_some()
                || start < place.table_end()
                || end > file_bytes
                || !is_free(start, end)
        })
    }

    /// The table that the headers give.
    pub(super) fn table(&self, place: &Placement) -> Vec<u32> {
        let entry = |found: &Option<Found>| found.map_or(vhd::UNALLOCATED, |found| found.slot);
        self.by_block.iter().map(entry).take(place.table_entries as usize).collect()
    }
}

/// Reads the header of every slot within the file. Costs one small read for each slot that is no hole.
pub(super) fn scan(file: &dyn File, path: &Path, place: &Placement, disk_id: UniqueId) -> Result<FoundSlots> {
    let mut by_block: Vec<Option<Found>> = vec![None; place.table_entries as usize];
    let mut index = 0;
    while let Some(slot) = place.slot_entry(index) {
        let at = place.slot_offset(index);
        let io = |error| Error::io(path, format!("reading the block page at offset {at}"), error);
        // Over holes at once: a sparse file may claim two tebibytes.
        let Some(data) = file.next_data(at).map_err(io)? else { break };
        let next = data.start.saturating_sub(place.slot_origin) / place.slot_stride();
        if next > index {
            index = next;
            continue;
        }
        index += 1;
        let mut head = [0; BlockHeader::SIZE];
        file.read_or_zero_at(&mut head, at).map_err(io)?;
        let Ok(Some(header)) = BlockHeader::parse(&head) else { continue };
        if header.page_offset != at || header.disk_id != disk_id {
            continue;
        }
        if let Some(best) = by_block.get_mut(header.block as usize)
            && best.is_none_or(|best| best.allocation < header.allocation)
        {
            *best = Some(Found { slot, allocation: header.allocation });
        }
    }
    Ok(FoundSlots { by_block })
}
