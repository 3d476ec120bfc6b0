//! Which slots are free, which are being allocated, and which map changes wait for a flush.
//!
//! An allocation belongs to all writes that ride on it (I5): the first one that commits publishes the block; it is undone
//! only when none is left and none committed. A slot that such writes have touched is *soiled* and goes back by way of the
//! quarantine. Growth is in whole slots, ahead of need, and only by `set_len`, so that a new slot reads as zeros.

use super::map::{BlockMap, Mapping};
use super::owners::Owners;
use super::reserve::Reserve;
use crate::defect::{self, Defect};
use crate::ext::{MAX_COUNTER, Placement};
use crate::journal::MapChange;
use crate::vfs::File;
use crate::vhd;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::ops::Range;

/// At most this many slots are added at once.
const MAX_GROWTH_SLOTS: u64 = 32;
/// No slot is given out once this allocation was: those under way still get legal numbers.
const LAST_ALLOCATION: u64 = MAX_COUNTER - u32::MAX as u64;

/// What a write has brought of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Written {
    /// All of it; in a root disk always, since what was not written reads as zeros.
    Whole,
    /// Sectors of a block of a differencing layer.
    Sectors {
        /// The first one.
        first: u32,
        /// How many.
        count: u32,
    },
}

#[derive(Debug)]
struct InFlight {
    slot: u32,
    allocation: u64,
    riders: u32,
    published: bool,
}

/// The allocator of an open session; its lock nests inside the session's.
#[derive(Debug)]
pub(crate) struct Allocator {
    place: Placement,
    free: BTreeSet<u32>,
    /// The first slot that was never used.
    fresh: u64,
    /// Length of the file in bytes.
    file_bytes: u64,
    in_flight: HashMap<u32, InFlight>,
    pending: Vec<MapChange>,
    soiled: Vec<u32>,
    next_allocation: u64,
    freed_since_flush: usize,
    /// Slots taken whose pages no checkpoint has brought in place.
    without_page: u64,
    reserve: Reserve,
    owners: Owners,
}

impl Allocator {
    /// An allocator over a file of `file_bytes` whose slots from `fresh` on were never used and whose slots in `free` read
    /// as zeros, durably; `owners` say what is in use.
    pub(crate) fn new(
        place: Placement,
        free: BTreeSet<u32>,
        fresh: u64,
        file_bytes: u64,
        next_allocation: u64,
        owners: Owners,
    ) -> Self {
        Allocator {
            place,
            free,
            fresh,
            file_bytes,
            in_flight: HashMap::new(),
            pending: Vec::new(),
            soiled: Vec::new(),
            next_allocation,
            freed_since_flush: 0,
            without_page: 0,
            reserve: Reserve::default(),
            owners,
        }
    }

    /// A slot for `block`: that of an allocation under way, or, then with `true`, a new one. `Ok(None)` where no slot is left.
    pub(crate) fn ride(&mut self, file: &dyn File, block: u32) -> io::Result<Option<(u32, bool)>> {
        if let Some(allocation) = self.in_flight.get_mut(&block) {
            allocation.riders += 1;
            return Ok(Some((allocation.slot, false)));
        }
        let Some(slot) = self.take_slot(file, block)? else { return Ok(None) };
        let allocation = self.next_allocation;
        self.next_allocation += 1;
        self.in_flight.insert(block, InFlight { slot, allocation, riders: 1, published: false });
        Ok(Some((slot, true)))
    }

    fn take_slot(&mut self, file: &dyn File, block: u32) -> io::Result<Option<u32>> {
        if self.next_allocation > LAST_ALLOCATION {
            return Ok(None);
        }
        self.reserve.cover(file, self.without_page + 1)?;
        let slot = self.next_slot(file)?;
        self.without_page += u64::from(slot.is_some());
        if let Some(slot) = slot {
            self.owners.take(&self.place, slot, block);
        }
        Ok(slot)
    }

    /// All that was journaled is in place: what is taken and not journaled yet still needs its pages.
    pub(crate) fn pages_in_place(&mut self) {
        let allocated =
            self.pending.iter().filter(|change| matches!(change, MapChange::Alloc { .. })).count();
        self.without_page = (allocated + self.in_flight.len()) as u64;
    }

    /// Gives the space back that is kept for block pages, which now need it; whether there was any.
    pub(crate) fn give_back_reserve(&mut self, file: &dyn File) -> io::Result<bool> {
        self.reserve.give_back(file, self.file_bytes)
    }

    fn next_slot(&mut self, file: &dyn File) -> io::Result<Option<u32>> {
        if defect::active(Defect::LiveSlotIsHandedOut) && self.fresh > 5 {
            return Ok(self.place.slot_entry(self.fresh - 1));
        }
        if let Some(slot) = self.free.pop_first() {
            return Ok(Some(slot));
        }
        let Some(slot) = self.place.slot_entry(self.fresh) else { return Ok(None) };
        if self.place.file_bytes(self.fresh + 1) > self.file_bytes {
            let ahead = (self.fresh / 8).clamp(1, MAX_GROWTH_SLOTS);
            let length = self.place.file_bytes(self.fresh + ahead);
            file.set_len(length)?;
            self.file_bytes = length;
        }
        self.fresh += 1;
        Ok(Some(slot))
    }

    /// A slot of its own for a block that is to move. `Ok(None)` where no slot is left.
    pub(crate) fn reserve(&mut self, file: &dyn File, block: u32) -> io::Result<Option<u32>> {
        self.take_slot(file, block)
    }

    /// The block's content is complete in a reserved slot: the block lives there from now on, as far as `sectors` say; `None`
    /// is all of it.
    pub(crate) fn move_block(
        &mut self,
        map: &BlockMap,
        block: u32,
        slot: u32,
        sectors: Option<&[Range<u32>]>,
    ) {
        self.free(map, block);
        let allocation = self.next_allocation;
        self.next_allocation += 1;
        self.pending.push(MapChange::Alloc { block, slot, allocation, whole: sectors.is_none() });
        for run in sectors.unwrap_or_default() {
            let (first_sector, sectors) = (run.start, run.end - run.start);
            self.pending.push(MapChange::Bits { block, slot, first_sector, sectors });
        }
        map.set(block, if sectors.is_none() { Mapping::Whole(slot) } else { Mapping::Partial(slot) });
    }

    /// A reserved slot is not used after all; something may have been written to it.
    pub(crate) fn give_up(&mut self, slot: u32) {
        self.soil(slot);
    }

    /// A write that rode on an allocation (`rode`), or brought sectors of a partial block, is complete: publishes the block if
    /// it is the first one there. Does nothing where the block was discarded in the meantime.
    pub(crate) fn commit(&mut self, map: &BlockMap, block: u32, slot: u32, rode: bool, written: Written) {
        if rode {
            let any = defect::active(Defect::CommitToNextAllocation);
            let Some(allocation) = self.in_flight.get_mut(&block).filter(|a| a.slot == slot || any) else {
                return;
            };
            allocation.riders -= 1;
            if !allocation.published {
                allocation.published = true;
                let (allocation, whole) = (allocation.allocation, written == Written::Whole);
                self.pending.push(MapChange::Alloc { block, slot, allocation, whole });
                map.set(block, if whole { Mapping::Whole(slot) } else { Mapping::Partial(slot) });
            }
            self.forget_if_done(block);
        }
        if map.get(block) == Mapping::Partial(slot) && !defect::active(Defect::BitsNotJournaled) {
            let (first_sector, sectors) = match written {
                Written::Whole => (0, (u64::from(self.place.block_bytes) / vhd::SECTOR) as u32),
                Written::Sectors { first, count } => (first, count),
            };
            self.pending.push(MapChange::Bits { block, slot, first_sector, sectors });
        }
    }

    /// A write that rode on an allocation failed: undoes the allocation if nobody else rides on it and nobody committed.
    pub(crate) fn abort(&mut self, map: &BlockMap, block: u32, slot: u32) {
        if defect::active(Defect::FailedWriteStaysMapped) {
            self.commit(map, block, slot, true, Written::Whole);
            self.free.insert(slot);
            return;
        }
        if defect::active(Defect::FailedWriteTakesSlot) {
            self.in_flight.remove(&block);
            self.soiled.push(slot);
            map.set(block, Mapping::Absent);
            return;
        }
        let Some(allocation) = self.in_flight.get_mut(&block).filter(|a| a.slot == slot) else { return };
        allocation.riders -= 1;
        if allocation.riders == 0 && !allocation.published {
            if defect::active(Defect::SoiledSlotIsReused) {
                self.free.insert(slot);
            } else {
                self.soil(slot);
            }
        }
        self.forget_if_done(block);
    }

    fn soil(&mut self, slot: u32) {
        self.owners.leave(&self.place, slot);
        self.soiled.push(slot);
    }

    fn forget_if_done(&mut self, block: u32) {
        if self.in_flight.get(&block).is_some_and(|allocation| allocation.riders == 0) {
            self.in_flight.remove(&block);
        }
    }

    /// Takes a published block out of the map; its slot goes through journal and quarantine.
    pub(crate) fn free(&mut self, map: &BlockMap, block: u32) -> bool {
        let Some(slot) = map.get(block).slot() else { return false };
        map.set(block, Mapping::Absent);
        self.in_flight.remove(&block);
        self.pending.push(MapChange::Free { block, slot });
        self.owners.leave(&self.place, slot);
        if defect::active(Defect::ReuseAtOnce) {
            self.free.insert(slot);
        }
        self.freed_since_flush += 1;
        true
    }

    /// Whether the block left the slot and no cut knows of it yet.
    pub(crate) fn waits_to_be_freed(&self, block: u32, slot: u32) -> bool {
        self.pending.contains(&MapChange::Free { block, slot })
    }

    /// The cut: all map changes committed so far, and the soiled slots.
    pub(crate) fn cut(&mut self) -> (Vec<MapChange>, Vec<u32>) {
        self.freed_since_flush = 0;
        (std::mem::take(&mut self.pending), std::mem::take(&mut self.soiled))
    }

    /// Puts changes back that a flush took and could not make durable; they go before all newer ones.
    pub(crate) fn put_back(&mut self, changes: Vec<MapChange>) {
        self.pending.splice(0..0, changes);
    }

    /// Takes slots back that read as zeros, durably.
    pub(crate) fn give_back(&mut self, slots: impl IntoIterator<Item = u32>) {
        // Slots off our grid (another program's) are left as holes.
        let place = self.place;
        for slot in slots {
            self.owners.give_back(&place, slot);
            if place.slot_index(slot).is_some() {
                self.free.insert(slot);
            }
        }
    }

    /// Freed slots that no flush has journaled yet.
    pub(crate) fn freed_since_flush(&self) -> usize {
        self.freed_since_flush
    }

    /// Above every allocation sequence used so far.
    pub(crate) fn next_allocation(&self) -> u64 {
        self.next_allocation
    }

    /// Notes that the file was cut to `file_bytes`.
    pub(crate) fn set_file_bytes(&mut self, file_bytes: u64) {
        self.file_bytes = file_bytes;
    }
}
