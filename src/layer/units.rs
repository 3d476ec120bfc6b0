//! Which 4 KiB units of the partial blocks of a differencing layer are present, and who brings an absent one.
//!
//! The bitmap of a block has a bit per sector; we set the bits of a whole unit at a time, when the unit has been written
//! whole: the parts that nobody wrote are copied up from below. Another tool may leave a unit of which some sectors are
//! present: it counts as absent here, and whoever reads it looks at the bitmap itself.
//!
//! **I8** An absent unit has one writer from [`Units::bring`] to its commit. Whoever waited finds it present and overwrites.

use crate::defect::{self, Defect};
use crate::ext::PAGE_BYTES;
use crate::sync::{Arc, AtomicBool, AtomicU64, Condvar, Mutex, Ordering, RwLock};
use crate::vhd::{SECTOR, bitmap};
use std::collections::HashMap;
use std::ops::Range;

/// Bytes of a unit.
pub(super) const UNIT_BYTES: u64 = PAGE_BYTES;
/// Sectors of a unit.
pub(super) const UNIT_SECTORS: u32 = (UNIT_BYTES / SECTOR) as u32;
const SHARDS: usize = 64;
const WORD_BITS: u32 = u64::BITS;

/// The units that a byte range of a block touches.
pub(super) fn touched(range: &Range<u64>) -> Range<u32> {
    (range.start / UNIT_BYTES) as u32..range.end.div_ceil(UNIT_BYTES) as u32
}

/// The present units of one block in one slot.
#[derive(Debug)]
pub(super) struct PresentUnits {
    words: Box<[AtomicU64]>,
    units: u32,
    /// Sectors of absent units may be present.
    mixed: bool,
    /// The bitmap that says which, if a checkpoint may not have brought all of it in place.
    bits: Option<Box<[u8]>>,
}

impl PresentUnits {
    fn none(block_bytes: u32) -> Self {
        let units = block_bytes.div_ceil(UNIT_BYTES as u32);
        let words = (0..units.div_ceil(WORD_BITS)).map(|_| AtomicU64::new(0)).collect();
        PresentUnits { words, units, mixed: false, bits: None }
    }

    /// As a block's bitmap says.
    pub(super) fn from_bitmap(bits: &[u8], block_bytes: u32) -> Self {
        let mut present = Self::none(block_bytes);
        for unit in 0..present.units {
            let sectors = unit * UNIT_SECTORS..(unit + 1) * UNIT_SECTORS;
            if bitmap::all_set(bits, sectors.clone()) {
                present.set(unit..unit + 1);
            } else if !bitmap::none_set(bits, sectors) {
                present.mixed = true;
            }
        }
        present
    }

    /// The same for a block that has just moved: its bitmap goes through the journal, in one entry or in several with checkpoints
    /// between, and in place there may be none of it, or a part.
    pub(super) fn of_moved_block(bits: &[u8], block_bytes: u32) -> Self {
        let mut present = Self::from_bitmap(bits, block_bytes);
        present.bits = present.mixed.then(|| bits.into());
        present
    }

    /// The bitmap as far as absent units are concerned, if the file may lack it.
    pub(super) fn bits(&self) -> Option<&[u8]> {
        self.bits.as_deref()
    }

    /// Whether sectors of absent units may be present.
    pub(super) fn is_mixed(&self) -> bool {
        self.mixed
    }

    /// Whether one unit is present.
    pub(super) fn get(&self, unit: u32) -> bool {
        self.words
            .get((unit / WORD_BITS) as usize)
            .is_some_and(|word| word.load(Ordering::SeqCst) & (1 << (unit % WORD_BITS)) != 0)
    }

    /// Whether all of some units are.
    pub(super) fn all(&self, mut units: Range<u32>) -> bool {
        units.all(|unit| self.get(unit))
    }

    /// Whether every unit of the block is.
    pub(super) fn is_whole(&self) -> bool {
        self.all(0..self.units)
    }

    /// They are present from now on.
    pub(super) fn set(&self, units: Range<u32>) {
        for unit in units {
            if let Some(word) = self.words.get((unit / WORD_BITS) as usize) {
                word.fetch_or(1 << (unit % WORD_BITS), Ordering::SeqCst);
            }
        }
    }

    /// Splits a byte range of the block into runs of units that are all present, or all absent.
    pub(super) fn runs(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, bool)> + '_ {
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let first = (at / UNIT_BYTES) as u32;
            let present = self.get(first);
            let mut next = first + 1;
            while u64::from(next) * UNIT_BYTES < range.end && self.get(next) == present {
                next += 1;
            }
            let start = std::mem::replace(&mut at, range.end.min(u64::from(next) * UNIT_BYTES));
            Some((start..at, present))
        })
    }
}

/// Partial blocks by their slots.
type Shard = RwLock<HashMap<u32, Arc<PresentUnits>>>;

/// The partial blocks of a layer, by slot.
#[derive(Debug)]
pub(super) struct Units {
    shards: Box<[Shard]>,
    under_way: Mutex<Vec<(u32, Range<u32>)>>,
    ended: Condvar,
    /// Nothing shows through absent blocks but zeros, so that blocks are taken whole, as in a root disk.
    takes_whole_blocks: AtomicBool,
}

impl Default for Units {
    fn default() -> Self {
        Units {
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            under_way: Mutex::default(),
            ended: Condvar::new(),
            takes_whole_blocks: AtomicBool::new(false),
        }
    }
}

impl Units {
    fn shard(&self, slot: u32) -> Option<&Shard> {
        self.shards.get((slot.wrapping_mul(0x9e37_79b1) >> 26) as usize % SHARDS)
    }

    /// New blocks are whole from now on; no write is under way.
    pub(super) fn take_whole_blocks(&self) {
        self.takes_whole_blocks.store(true, Ordering::SeqCst);
    }

    /// Whether new blocks are whole.
    pub(super) fn takes_whole_blocks(&self) -> bool {
        self.takes_whole_blocks.load(Ordering::SeqCst)
    }

    /// The units of the block in `slot`, which the caller has pinned; `None` once the block is whole or left the slot.
    pub(super) fn get(&self, slot: u32) -> Option<Arc<PresentUnits>> {
        self.shard(slot)?.read().get(&slot).cloned()
    }

    /// A block was allocated: none of its units is present.
    pub(super) fn insert_empty(&self, slot: u32, block_bytes: u32) {
        self.insert(slot, PresentUnits::none(block_bytes));
    }

    /// A block came to lie in `slot`, as said.
    pub(super) fn insert(&self, slot: u32, present: PresentUnits) {
        if let Some(shard) = self.shard(slot) {
            shard.write().insert(slot, Arc::new(present));
        }
    }

    /// Notes what the bitmap of a block says that was there when the layer was opened, unless somebody did so already.
    pub(super) fn found(&self, slot: u32, present: PresentUnits) {
        if let Some(shard) = self.shard(slot) {
            shard.write().entry(slot).or_insert_with(|| Arc::new(present));
        }
    }

    /// The block in `slot` is whole, or left it.
    pub(super) fn remove(&self, slot: u32) {
        if let Some(shard) = self.shard(slot) {
            shard.write().remove(&slot);
        }
    }

    /// Waits until nobody else brings one of these units of `block`, and keeps others from it until the value is dropped.
    pub(super) fn bring(&self, block: u32, units: Range<u32>) -> Bringing<'_> {
        let mut under_way = self.under_way.lock();
        let clashes = |held: &(u32, Range<u32>)| {
            held.0 == block && held.1.start < units.end && units.start < held.1.end
        };
        while under_way.iter().any(clashes) && !defect::active(Defect::UnitsWithoutOwner) {
            self.ended.wait(&mut under_way);
        }
        under_way.push((block, units.clone()));
        Bringing { table: self, block, units }
    }
}

/// Units of a block that one writer brings.
#[derive(Debug)]
pub(super) struct Bringing<'a> {
    table: &'a Units,
    block: u32,
    pub(super) units: Range<u32>,
}

impl Drop for Bringing<'_> {
    fn drop(&mut self) {
        let mut under_way = self.table.under_way.lock();
        if let Some(index) = under_way.iter().position(|(b, u)| (*b, u) == (self.block, &self.units)) {
            under_way.swap_remove(index);
        }
        drop(under_way);
        self.table.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_follow_the_bitmap() {
        let mut bits = vec![0; 512];
        bitmap::set_range(&mut bits, 8..24, true);
        bitmap::set_range(&mut bits, 27..28, true);
        let present = PresentUnits::from_bitmap(&bits, 2 << 20);
        assert!(present.all(1..3) && !present.get(0) && !present.get(3) && present.is_mixed());
        let runs: Vec<_> = present.runs(512..5 * 4096).collect();
        assert_eq!(runs, [(512..4096, false), (4096..12288, true), (12288..20480, false)]);
        present.set(0..512);
        assert!(present.is_whole());
    }
}
