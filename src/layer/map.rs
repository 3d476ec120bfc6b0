//! The block map that guests read through, and the pins that keep a slot from being reused under them.
//!
//! One word per block, read without a lock. A reader or writer *pins* the slot it was told, then looks at the map again;
//! whoever frees a slot changes the map first and looks at the pins later. So either the user sees that the block moved
//! and tries again, or the one who frees sees the pin and waits (I3). Pins are counted per stripe of slots: a stranger's
//! pin on the same stripe only delays a reuse.

use crate::defect::{self, Defect};
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, FEWER_STRIPES, Ordering, yield_now};
use crate::vhd;

const STRIPES: usize = 1024 / FEWER_STRIPES;
const ENTRY_MASK: u64 = 0xffff_ffff;
const VERIFIED: u64 = 1 << 32;
const PARTIAL: u64 = 1 << 33;

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// Nowhere: it reads as zeros.
    Absent,
    /// In a slot (named by its BAT entry) whose block page was not looked at yet.
    Unverified(u32),
    /// In a slot, every bit of the bitmap set.
    Whole(u32),
    /// In a slot, with bits that are not set.
    Partial(u32),
}

impl Mapping {
    fn from_word(word: u64) -> Self {
        let entry = (word & ENTRY_MASK) as u32;
        match entry {
            vhd::UNALLOCATED => Mapping::Absent,
            _ if word & PARTIAL != 0 => Mapping::Partial(entry),
            _ if word & VERIFIED != 0 => Mapping::Whole(entry),
            _ => Mapping::Unverified(entry),
        }
    }

    fn to_word(self) -> u64 {
        match self {
            Mapping::Absent => vhd::UNALLOCATED.into(),
            Mapping::Unverified(entry) => entry.into(),
            Mapping::Whole(entry) => u64::from(entry) | VERIFIED,
            Mapping::Partial(entry) => u64::from(entry) | VERIFIED | PARTIAL,
        }
    }

    /// The slot, if there is one.
    pub(crate) fn slot(self) -> Option<u32> {
        match self {
            Mapping::Absent => None,
            Mapping::Unverified(slot) | Mapping::Whole(slot) | Mapping::Partial(slot) => Some(slot),
        }
    }
}

/// The map of one layer.
#[derive(Debug)]
pub(crate) struct BlockMap {
    words: Box<[AtomicU64]>,
    pins: Box<[AtomicU32]>,
    closed: AtomicBool,
}

/// Keeps a slot from being punched and reused until dropped.
#[derive(Debug)]
pub(crate) struct Pin<'a> {
    counter: &'a AtomicU32,
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.counter.fetch_sub(1, Ordering::SeqCst);
    }
}

impl BlockMap {
    /// A map with the given entries, none of them verified.
    pub(crate) fn new(entries: impl Iterator<Item = u32>) -> Self {
        BlockMap {
            words: entries.map(|entry| AtomicU64::new(entry.into())).collect(),
            pins: (0..STRIPES).map(|_| AtomicU32::new(0)).collect(),
            closed: AtomicBool::new(false),
        }
    }

    /// Where `block` is now.
    pub(crate) fn get(&self, block: u32) -> Mapping {
        let word = self
            .words
            .get(block as usize)
            .map_or(vhd::UNALLOCATED.into(), |word| word.load(Ordering::SeqCst));
        Mapping::from_word(word)
    }

    /// Changes where `block` is; the caller holds the allocator's lock.
    pub(crate) fn set(&self, block: u32, mapping: Mapping) {
        if let Some(word) = self.words.get(block as usize) {
            word.store(mapping.to_word(), Ordering::SeqCst);
        }
    }

    /// Notes what the block page of an unverified block says, unless the block moved in the meantime.
    pub(crate) fn verified(&self, block: u32, found: Mapping) {
        if let (Some(word), Some(slot)) = (self.words.get(block as usize), found.slot()) {
            let unverified = Mapping::Unverified(slot).to_word();
            // A lost exchange means that somebody else verified or moved the block: theirs is as good or newer.
            let _ = word.compare_exchange(unverified, found.to_word(), Ordering::SeqCst, Ordering::SeqCst);
        }
    }

    /// Where `block` is, with a pin on its slot.
    pub(crate) fn get_pinned(&self, block: u32) -> (Mapping, Option<Pin<'_>>) {
        loop {
            let mapping = self.get(block);
            let Some(slot) = mapping.slot() else { return (mapping, None) };
            let pin = self.pin(slot);
            // What the second look says counts: the block may have left the slot and come back to it, as another allocation.
            let now = match defect::active(Defect::PinWithoutSecondLook) {
                true => mapping,
                false => self.get(block),
            };
            if now.slot() == Some(slot) {
                return (if defect::active(Defect::FirstLookCounts) { mapping } else { now }, pin);
            }
        }
    }

    /// Pins a slot that the caller knows to be its own.
    pub(crate) fn pin(&self, slot: u32) -> Option<Pin<'_>> {
        let counter = self.stripe(slot)?;
        counter.fetch_add(1, Ordering::SeqCst);
        Some(Pin { counter })
    }

    /// Whether anyone may still use a slot that is no longer mapped.
    pub(crate) fn is_pinned(&self, slot: u32) -> bool {
        !defect::active(Defect::PinsIgnored)
            && self.stripe(slot).is_some_and(|counter| counter.load(Ordering::SeqCst) != 0)
    }

    fn stripe(&self, slot: u32) -> Option<&AtomicU32> {
        // Slots are a fixed stride apart; the multiplication spreads any stride over the stripes.
        self.pins.get((slot.wrapping_mul(0x9e37_79b1) >> 22) as usize % STRIPES)
    }

    /// Whether [`BlockMap::close`] was called. A writer asks after it pinned.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Turns new writers away and waits until no pin is left.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        while !defect::active(Defect::CloseDoesNotWait)
            && self.pins.iter().any(|counter| counter.load(Ordering::SeqCst) != 0)
        {
            yield_now();
        }
    }
}
