//! Who owns which bytes of an image that is open for writing: an allocator that hands out what is in use is stopped where it does so.
//!
//! A second account, by ranges of the file, kept apart from the allocator's own: metadata, the blocks, and slots that wait to be
//! reused. In builds with debug assertions, and in those for the simulator; elsewhere it is empty and costs nothing. A slot
//! that has an owner is a bug of the program, never of the file, so it ends the thread.

use crate::defect::{self, Defect};
use crate::ext::Placement;
use crate::vhd;
use std::collections::BTreeMap;

const KEPT: bool = cfg!(any(debug_assertions, feature = "sim"));

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Metadata,
    Block(u32),
    /// Freed or soiled: waits until it reads as zeros, durably.
    Waiting,
}

/// Ranges of the file that are in use, by their start, with their end.
#[derive(Debug, Default)]
pub(super) struct Owners {
    ranges: BTreeMap<u64, (u64, Owner)>,
}

impl Owners {
    /// What a table says, and where the image's own structures are.
    pub(super) fn new(place: &Placement, entries: &[u32]) -> Self {
        let mut owners = Owners::default();
        if !KEPT {
            return owners;
        }
        for range in place.metadata() {
            owners.ranges.insert(range.start, (range.end, Owner::Metadata));
        }
        for (block, &entry) in (0..).zip(entries).filter(|&(_, &entry)| entry != vhd::UNALLOCATED) {
            let start = start_of(place, entry);
            owners.ranges.insert(start, (place.block_end(entry), Owner::Block(block)));
        }
        owners
    }

    /// A slot is given to `block`, or to be a block's new place: nothing may be there.
    pub(super) fn take(&mut self, place: &Placement, slot: u32, block: u32) {
        if !is_watching() {
            return;
        }
        let (start, end) = (start_of(place, slot), place.block_end(slot));
        let before = self.ranges.range(..end).next_back().filter(|(_, (other, _))| *other > start);
        assert!(
            before.is_none() && place.slot_index(slot).is_some(),
            "the slot at offset {start} was given to block {block}, and belongs to {before:?}"
        );
        self.ranges.insert(start, (end, Owner::Block(block)));
    }

    /// A slot is no block's any more, and waits.
    pub(super) fn leave(&mut self, place: &Placement, slot: u32) {
        if !is_watching() {
            return;
        }
        let (start, end) = (start_of(place, slot), place.block_end(slot));
        let owner = self.ranges.insert(start, (end, Owner::Waiting)).map(|(_, owner)| owner);
        assert!(matches!(owner, Some(Owner::Block(_))), "slot {slot} was freed, and belongs to {owner:?}");
    }

    /// A slot that has waited may be used again.
    pub(super) fn give_back(&mut self, place: &Placement, slot: u32) {
        if !is_watching() {
            return;
        }
        let owner = self.ranges.remove(&start_of(place, slot)).map(|(_, owner)| owner);
        assert!(owner == Some(Owner::Waiting), "slot {slot} was given back, and belongs to {owner:?}");
    }
}

/// Where a block begins that the table names: in a slot with its page.
fn start_of(place: &Placement, entry: u32) -> u64 {
    match place.slot_index(entry) {
        Some(_) => place.block_page_offset(entry),
        None => place.bitmap_offset(entry),
    }
}

/// Other defects than its own are left to the oracles that are to notice them.
fn is_watching() -> bool {
    KEPT && (!defect::any() || defect::active(Defect::LiveSlotIsHandedOut))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn place() -> Placement {
        Placement::new(16, 64 << 10, 128 << 10)
    }

    fn slot(index: u64) -> u32 {
        place().slot_entry(index).unwrap()
    }

    #[test]
    fn what_is_in_use_is_handed_out_to_nobody() {
        let place = place();
        // One block on the grid, one of another program that lies over slots 2 and 3.
        let foreign = slot(2) + 20;
        let refuses = |change: &dyn Fn(&mut Owners)| {
            let mut owners = Owners::new(&place, &[slot(0), vhd::UNALLOCATED, foreign]);
            catch_unwind(AssertUnwindSafe(|| change(&mut owners))).is_err()
        };
        assert!(!refuses(&|owners| owners.take(&place, slot(1), 9)));
        assert!(!refuses(&|owners| owners.take(&place, slot(4), 9)));
        for taken in [slot(0), slot(2), slot(3), slot(1) + 1, 8, 600, (place.table_offset / 512) as u32] {
            assert!(refuses(&|owners| owners.take(&place, taken, 9)), "{taken}");
        }
        let again = |owners: &mut Owners| {
            owners.leave(&place, slot(0));
            owners.give_back(&place, slot(0));
            owners.take(&place, slot(0), 9);
        };
        assert!(!refuses(&again));
        assert!(refuses(&|owners| owners.give_back(&place, slot(0))));
        assert!(refuses(&|owners| {
            owners.leave(&place, slot(0));
            owners.take(&place, slot(0), 9);
        }));
        assert!(refuses(&|owners| owners.leave(&place, slot(1))));
    }
}
