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
    for_each_used(file, path, place, |slot, at| {
        let mut head = [0; BlockHeader::SIZE];
        file.read_or_zero_at(&mut head, at)
            .map_err(|error| Error::io(path, format!("reading the block page at offset {at}"), error))?;
        let Ok(Some(header)) = BlockHeader::parse(&head) else { return Ok(()) };
        if header.page_offset != at || header.disk_id != disk_id {
            return Ok(());
        }
        if let Some(best) = by_block.get_mut(header.block as usize)
            && best.is_none_or(|best| best.allocation < header.allocation)
        {
            *best = Some(Found { slot, allocation: header.allocation });
        }
        Ok(())
    })?;
    Ok(FoundSlots { by_block })
}

/// Visits the slots within the file that are no hole, each with the offset of its page.
pub(super) fn for_each_used(
    file: &dyn File,
    path: &Path,
    place: &Placement,
    mut visit: impl FnMut(u32, u64) -> Result<()>,
) -> Result<()> {
    let mut index = 0;
    while let Some(slot) = place.slot_entry(index) {
        let at = place.slot_offset(index);
        // Over holes at once: a sparse file may claim two tebibytes.
        let data = file
            .next_data(at)
            .map_err(|error| Error::io(path, format!("looking for data from offset {at} on"), error))?;
        let Some(data) = data else { break };
        let next = data.start.saturating_sub(place.slot_origin) / place.slot_stride();
        if next > index {
            index = next;
            continue;
        }
        index += 1;
        visit(slot, at)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks 0, 1 and 2 are in slots 1, 3 and 0 of a file with five slots; where another entry stands, what it names decides.
    #[test]
    fn an_entry_that_names_a_free_place_off_the_grid_is_another_programs() {
        let place = Placement::new(8, 2 << 20, 128 << 10);
        let slot = |index| place.slot_entry(index).unwrap();
        let mut by_block = vec![None; 8];
        for (block, index) in [(0, 1), (1, 3), (2, 0)] {
            by_block[block] = Some(Found { slot: slot(index), allocation: block as u64 + 1 });
        }
        let found = FoundSlots { by_block };
        assert_eq!(found.holders(), HashMap::from([(slot(1), 0), (slot(3), 1), (slot(0), 2)]));
        // With a sector of the footer.
        let file_bytes = place.slot_offset(5) + vhd::SECTOR;
        let explained = |entry: u32| {
            let mut table = found.table(&place);
            table[5] = entry;
            found.explain(&table, &place, file_bytes)
        };
        assert!(found.explain(&found.table(&place), &place, file_bytes));
        let entry = |at: u64| (at / vhd::SECTOR) as u32;
        // Slot 2 is free from its start to that of slot 3: what stands there, and not where a block of ours would, was moved there.
        let free = place.slot_offset(2);
        assert!(!explained(entry(free)));
        assert!(!explained(entry(free + 3072)));
        let touches_bitmap =
            place.bitmap_offset(slot(3)) - (place.block_end(slot(3)) - place.bitmap_offset(slot(3)));
        assert!(!explained(entry(touches_bitmap)), "the bitmap of slot 3 begins where it ends");
        assert!(explained(entry(touches_bitmap + vhd::SECTOR)), "it is over the bitmap of slot 3");
        assert!(explained(entry(free - vhd::SECTOR)), "it is over the end of slot 1");
        assert!(explained(slot(2)), "it is on the grid, and no header says so");
        assert!(explained(entry(place.table_end() - vhd::SECTOR)), "it is in the table");
        let last = file_bytes - (place.block_end(1) - place.bitmap_offset(1));
        assert!(!explained(entry(last)), "it ends with the file");
        assert!(explained(entry(last + vhd::SECTOR)), "it ends behind the file");
        let mut table = found.table(&place);
        table[0] = vhd::UNALLOCATED;
        assert!(found.explain(&table, &place, file_bytes));
    }
}
