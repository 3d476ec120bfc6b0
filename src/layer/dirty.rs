//! Which guest data was committed since the last flush, and which is being written right now.
//!
//! A small flush journals the data itself, read back from the page cache. For that it has to know where the data is, and
//! that nobody writes there while it reads: a sector that is half one value and half another must not enter the journal.
//! So each write announces the 4 KiB units it touches before it begins and after it ended, in counters that units share by
//! a hash; a stranger's write on the same counter only makes a flush a full one.

use super::units::{UNIT_BYTES, UNIT_SECTORS};
use crate::defect::{self, Defect};
use crate::journal::DirtyExtent;
use crate::sync::{AtomicBool, AtomicU32, FEWER_STRIPES, Mutex, Ordering};
use crate::vhd::SECTOR;
use std::ops::Range;

/// A flush of more data than this syncs instead of journaling it, in bytes.
const MAX_JOURNALED_BYTES: u64 = 128 * 1024;
/// So many pieces at most are remembered.
const MAX_EXTENTS: usize = 256;
/// A write of more units than this announces itself to all units.
const MAX_UNITS: u64 = 32;
const STRIPES: usize = 1024 / FEWER_STRIPES;

/// The data committed since the last cut.
#[derive(Debug, Default)]
pub(super) struct DirtyData {
    overflowed: AtomicBool,
    extents: Mutex<Vec<DirtyExtent>>,
}

impl DirtyData {
    /// Adds a piece that was committed.
    pub(super) fn add(&self, extent: DirtyExtent) {
        // Once there is too much, the next flush syncs, and a commit before that flush's cut is covered by its sync.
        if self.overflowed.load(Ordering::SeqCst) {
            return;
        }
        let mut extents = self.extents.lock();
        if extents.len() >= MAX_EXTENTS || (!extent.zero && extent.bytes() > MAX_JOURNALED_BYTES) {
            self.overflowed.store(true, Ordering::SeqCst);
            extents.clear();
        } else {
            extents.push(extent);
        }
    }

    /// The next flush must sync: there is more to make durable than is known here.
    pub(super) fn overflow(&self) {
        self.overflowed.store(true, Ordering::SeqCst);
    }

    /// The cut: everything added so far, merged; `None` if it is too much to be journaled.
    pub(super) fn take(&self) -> Option<Vec<DirtyExtent>> {
        let mut extents = self.extents.lock();
        let taken = std::mem::take(&mut *extents);
        if self.overflowed.swap(false, Ordering::SeqCst) {
            return None;
        }
        drop(extents);
        let merged = merge(taken);
        let bytes: u64 = merged.iter().filter(|extent| !extent.zero).map(DirtyExtent::bytes).sum();
        (bytes <= MAX_JOURNALED_BYTES).then_some(merged)
    }
}

/// Widens pieces to whole 4 KiB units, since a power cut may spoil a whole physical sector of which only a part was being
/// written in place; sorts zeros before data (data is read back later and so is newer), and joins what touches.
fn merge(extents: Vec<DirtyExtent>) -> Vec<DirtyExtent> {
    let mut extents: Vec<DirtyExtent> = extents.into_iter().flat_map(in_units).collect();
    // A piece of a block that was discarded meanwhile may name a slot where another block is now: the two stay apart, or who
    // drops the one would drop the other.
    let owner = |extent: &DirtyExtent| match defect::active(Defect::ExtentsJoinedBySlot) {
        true => 0,
        false => extent.block,
    };
    extents.sort_unstable_by_key(|extent| (!extent.zero, extent.slot, owner(extent), extent.first_sector));
    let mut merged: Vec<DirtyExtent> = Vec::new();
    for extent in extents {
        match merged.last_mut() {
            Some(last)
                if (last.zero, last.slot, owner(last)) == (extent.zero, extent.slot, owner(&extent))
                    && last.end_sector() >= extent.first_sector =>
            {
                let end = last.end_sector().max(extent.end_sector());
                last.sectors = end - last.first_sector;
            }
            _ => merged.push(extent),
        }
    }
    merged
}

/// The whole units of a piece. Of zeros, a unit that is zeroed in part counts as data.
fn in_units(extent: DirtyExtent) -> impl Iterator<Item = DirtyExtent> {
    let (start, end) = (extent.first_sector, extent.end_sector());
    let outer = start / UNIT_SECTORS * UNIT_SECTORS..end.next_multiple_of(UNIT_SECTORS);
    let inner = start.next_multiple_of(UNIT_SECTORS)..end / UNIT_SECTORS * UNIT_SECTORS;
    let pieces = match extent.zero {
        true if inner.start < inner.end => {
            [(outer.start..inner.start, false), (inner.clone(), true), (inner.end..outer.end, false)]
        }
        _ => [(outer, false), (0..0, false), (0..0, false)],
    };
    pieces.into_iter().filter(|(range, _)| !range.is_empty()).map(move |(range, zero)| DirtyExtent {
        first_sector: range.start,
        sectors: range.end - range.start,
        zero,
        ..extent
    })
}

/// Counts the writes that began and ended, per 4 KiB unit of the file.
#[derive(Debug)]
pub(super) struct WritesUnderWay {
    stripes: Box<[Stripe]>,
    /// Writes too long to name their units.
    long: Stripe,
}

#[derive(Debug, Default)]
struct Stripe {
    begun: AtomicU32,
    ended: AtomicU32,
}

impl Default for WritesUnderWay {
    fn default() -> Self {
        WritesUnderWay { stripes: (0..STRIPES).map(|_| Stripe::default()).collect(), long: Stripe::default() }
    }
}

impl WritesUnderWay {
    /// A write to these bytes of the file begins; it ends when the returned value is dropped.
    pub(super) fn begin(&self, range: Range<u64>) -> UnderWay<'_> {
        self.for_each(&range, |stripe| {
            stripe.begun.fetch_add(1, Ordering::SeqCst);
        });
        UnderWay { writes: self, range }
    }

    /// How many writes to these bytes had begun, if all of them have ended. The same answer before and after reading the
    /// bytes means that no write touched them in between.
    pub(super) fn quiet(&self, range: &Range<u64>) -> Option<u64> {
        if defect::active(Defect::JournaledWhileWritten) {
            return Some(0);
        }
        let mut total = 0u64;
        let mut quiet = true;
        let mut look = |stripe: &Stripe| {
            // First what ended: a write that ends in between then counts as under way, not the other way round.
            let ended = stripe.ended.load(Ordering::SeqCst);
            let begun = stripe.begun.load(Ordering::SeqCst);
            quiet &= begun == ended;
            total += u64::from(begun);
        };
        look(&self.long);
        self.for_each(range, look);
        quiet.then_some(total)
    }

    fn for_each(&self, range: &Range<u64>, mut f: impl FnMut(&Stripe)) {
        let units = range.start / UNIT_BYTES..range.end.div_ceil(UNIT_BYTES);
        if units.end - units.start > MAX_UNITS {
            return f(&self.long);
        }
        for unit in units {
            let hash = unit.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            if let Some(stripe) = self.stripes.get(hash as usize % STRIPES) {
                f(stripe);
            }
        }
    }
}

/// A write under way.
#[derive(Debug)]
pub(super) struct UnderWay<'a> {
    writes: &'a WritesUnderWay,
    range: Range<u64>,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.writes.for_each(&self.range, |stripe| {
            stripe.ended.fetch_add(1, Ordering::SeqCst);
        });
    }
}

/// The file range of a piece of a block whose data starts at `data_offset`.
pub(super) fn file_range(data_offset: u64, extent: &DirtyExtent) -> Range<u64> {
    let start = data_offset + u64::from(extent.first_sector) * SECTOR;
    start..start + extent.bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(zero: bool, slot: u32, first_sector: u32, sectors: u32) -> DirtyExtent {
        DirtyExtent { block: slot, slot, first_sector, sectors, zero }
    }

    #[test]
    fn pieces_are_merged_and_zeros_come_first() {
        let dirty = DirtyData::default();
        for piece in [
            extent(false, 2, 8, 8),
            extent(true, 2, 0, 64),
            extent(false, 2, 0, 8),
            extent(false, 2, 4, 2),
            extent(false, 2, 20, 1),
            extent(false, 1, 0, 8),
            extent(true, 3, 4, 16),
            extent(true, 4, 1, 6),
        ] {
            dirty.add(piece);
        }
        let merged = dirty.take().unwrap();
        let expected = [
            extent(true, 2, 0, 64),
            extent(true, 3, 8, 8),
            extent(false, 1, 0, 8),
            extent(false, 2, 0, 24),
            extent(false, 3, 0, 8),
            extent(false, 3, 16, 8),
            extent(false, 4, 0, 8),
        ];
        assert_eq!(merged, expected);
        assert_eq!(dirty.take(), Some(Vec::new()));
    }

    #[test]
    fn pieces_of_two_blocks_that_were_in_one_slot_stay_apart() {
        let dirty = DirtyData::default();
        let of_block = |block, first_sector| DirtyExtent { block, ..extent(false, 9, first_sector, 8) };
        [of_block(0, 8), of_block(2, 8), of_block(2, 16)].into_iter().for_each(|piece| dirty.add(piece));
        let merged = dirty.take().unwrap();
        assert_eq!(merged, [of_block(0, 8), DirtyExtent { sectors: 16, ..of_block(2, 8) }]);
    }

    #[test]
    fn too_much_data_is_not_remembered() {
        let dirty = DirtyData::default();
        dirty.add(extent(false, 1, 0, 257));
        dirty.add(extent(false, 1, 0, 1));
        assert_eq!(dirty.take(), None);
        (0..5).for_each(|slot| dirty.add(extent(false, slot, 0, 57)));
        assert_eq!(dirty.take(), None, "five times 32 KiB, in whole units");
        (0..1000).for_each(|slot| dirty.add(extent(false, slot, 0, 1)));
        assert_eq!(dirty.take(), None, "too many pieces");
        dirty.add(extent(true, 1, 8, 4096));
        assert_eq!(dirty.take().map(|extents| extents.len()), Some(1), "zeros cost nothing");
    }

    #[test]
    fn a_write_under_way_is_noticed_where_it_writes() {
        let writes = WritesUnderWay::default();
        let before = writes.quiet(&(8192..12288)).unwrap();
        let short = writes.begin(10000..10512);
        assert_eq!(writes.quiet(&(8192..12288)), None);
        drop(short);
        assert_ne!(writes.quiet(&(8192..12288)), Some(before), "one came and went");
        let long = writes.begin(0..1 << 20);
        assert_eq!(writes.quiet(&(8192..12288)), None);
        drop(long);
        assert!(writes.quiet(&(8192..12288)).is_some());
    }
}
