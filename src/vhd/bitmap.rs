//! The sector bitmap in front of each block's data: one bit per sector.
//!
//! Source: VHD specification, "Sector Bitmap and Data". Bits count from the most significant of each byte: sector 0 is
//! 0x80 of byte 0, sector 9 is 0x40 of byte 1. A set bit means, in a dynamic disk, that the sector was written; in a
//! differencing disk, that it is here and not in the parent.
//!
//! These functions work on the bitmap's bytes. Sectors are numbered within the block; those past the end of the bytes
//! read as clear, and changes to them are ignored.

use std::ops::Range;

use super::SECTOR;

/// Sectors whose bits share a word, when whole words are tested at once.
const SECTORS_PER_WORD: u32 = u64::BITS;

/// Bytes that the bitmap of a block with `block_size` bytes of data takes up in the file: whole sectors.
pub const fn bitmap_bytes(block_size: u32) -> u32 {
    block_size.div_ceil(SECTOR as u32).div_ceil(8).next_multiple_of(SECTOR as u32)
}

/// Whether the bit of `sector` is set.
pub fn get(bitmap: &[u8], sector: u32) -> bool {
    bitmap.get(sector as usize / 8).is_some_and(|byte| byte & mask(sector) != 0)
}

/// Sets the bit of `sector` to `value`.
pub fn set(bitmap: &mut [u8], sector: u32, value: bool) {
    set_range(bitmap, sector..sector.saturating_add(1), value);
}

/// Sets the bits of all `sectors` to `value`.
pub fn set_range(bitmap: &mut [u8], sectors: Range<u32>, value: bool) {
    let sectors = clip(bitmap, sectors);
    if sectors.is_empty() {
        return;
    }
    let (first, last) = (sectors.start as usize / 8, (sectors.end - 1) as usize / 8);
    let head = 0xFF >> (sectors.start % 8);
    let tail = !(0x7F >> ((sectors.end - 1) % 8));
    let mut change = |byte: usize, mask: u8| {
        if value {
            bitmap[byte] |= mask;
        } else {
            bitmap[byte] &= !mask;
        }
    };
    if first == last {
        change(first, head & tail);
    } else {
        change(first, head);
        change(last, tail);
        bitmap[first + 1..last].fill(if value { 0xFF } else { 0 });
    }
}

/// Whether the bits of all `sectors` are set. True of an empty range.
pub fn all_set(bitmap: &[u8], sectors: Range<u32>) -> bool {
    run_end(bitmap, sectors.start, sectors.end, true) >= sectors.end
}

/// Whether none of the bits of `sectors` is set. True of an empty range.
pub fn none_set(bitmap: &[u8], sectors: Range<u32>) -> bool {
    run_end(bitmap, sectors.start, sectors.end, false) >= sectors.end
}

/// Neighbouring sectors whose bits are alike.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Run {
    /// The sectors, numbered within the block; never empty.
    pub sectors: Range<u32>,
    /// What their bits are.
    pub set: bool,
}

/// The runs of equal bits that make up `sectors`, in order, each as long as can be.
pub fn runs(bitmap: &[u8], sectors: Range<u32>) -> Runs<'_> {
    Runs { bitmap, rest: sectors }
}

/// The iterator that [`runs`] returns.
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    bitmap: &'a [u8],
    rest: Range<u32>,
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        if self.rest.is_empty() {
            return None;
        }
        let start = self.rest.start;
        let set = get(self.bitmap, start);
        self.rest.start = run_end(self.bitmap, start, self.rest.end, set);
        Some(Run { sectors: start..self.rest.start, set })
    }
}

impl std::iter::FusedIterator for Runs<'_> {}

/// The first sector from `start` on whose bit is not `value`, or `end`.
fn run_end(bitmap: &[u8], start: u32, end: u32, value: bool) -> u32 {
    let mut sector = start;
    while sector < end {
        // The word that holds `sector`, turned so that a bit looked for is a one and earlier ones are cut off.
        let word = word(bitmap, sector / SECTORS_PER_WORD);
        let unlike = if value { !word } else { word } << (sector % SECTORS_PER_WORD);
        if unlike != 0 {
            return sector.saturating_add(unlike.leading_zeros()).min(end);
        }
        let beyond = u64::from(sector) >= bitmap.len() as u64 * 8;
        if beyond {
            return end;
        }
        sector = (sector / SECTORS_PER_WORD + 1).saturating_mul(SECTORS_PER_WORD);
    }
    end
}

/// The bits of 64 sectors, the first in the most significant place; zeros beyond the end.
fn word(bitmap: &[u8], index: u32) -> u64 {
    let rest = bitmap.get(index as usize * 8..).unwrap_or_default();
    match rest.first_chunk() {
        Some(bytes) => u64::from_be_bytes(*bytes),
        None => {
            let mut bytes = [0; 8];
            bytes[..rest.len()].copy_from_slice(rest);
            u64::from_be_bytes(bytes)
        }
    }
}

fn mask(sector: u32) -> u8 {
    0x80 >> (sector % 8)
}

/// The part of `sectors` that the bitmap has bits for.
fn clip(bitmap: &[u8], sectors: Range<u32>) -> Range<u32> {
    let bits = u32::try_from(bitmap.len().saturating_mul(8)).unwrap_or(u32::MAX);
    sectors.start..sectors.end.min(bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn takes_up_whole_sectors() {
        for (block_size, bytes) in [
            (0, 0),
            (512, 512),
            (4096, 512),
            (512 << 10, 512),
            (2 << 20, 512),
            (4 << 20, 1024),
            (1 << 30, 256 << 10),
        ] {
            assert_eq!(bitmap_bytes(block_size), bytes);
        }
    }

    #[test]
    fn most_significant_bit_comes_first() {
        let bitmap = [0x80, 0x40, 0x01];
        assert_eq!((0..24).filter(|&sector| get(&bitmap, sector)).collect::<Vec<_>>(), [0, 9, 23]);

        let mut bitmap = [0; 2];
        set(&mut bitmap, 6, true);
        set_range(&mut bitmap, 9..12, true);
        assert_eq!(bitmap, [0x02, 0x70]);
        set(&mut bitmap, 10, false);
        assert_eq!(bitmap, [0x02, 0x50]);
    }

    #[test]
    fn nothing_is_set_beyond_the_end() {
        let mut bitmap = [0xFF; 2];
        assert!(!get(&bitmap, 16));
        assert!(!get(&bitmap, u32::MAX));
        assert!(all_set(&bitmap, 0..16));
        assert!(!all_set(&bitmap, 0..17));
        assert!(none_set(&bitmap, 16..u32::MAX));
        set_range(&mut bitmap, 4..u32::MAX, false);
        set(&mut bitmap, u32::MAX, true);
        assert_eq!(bitmap, [0xF0, 0]);
        assert_eq!(
            runs(&bitmap, 0..u32::MAX).collect::<Vec<_>>(),
            [Run { sectors: 0..4, set: true }, Run { sectors: 4..u32::MAX, set: false }]
        );
    }

    #[test]
    fn nothing_and_reversed_ranges_are_empty() {
        let mut bitmap = [0x0F];
        let reversed = Range { start: 6, end: 2 };
        set_range(&mut bitmap, reversed.clone(), true);
        set_range(&mut bitmap, 3..3, true);
        assert_eq!(bitmap, [0x0F]);
        assert!(all_set(&bitmap, 3..3) && none_set(&bitmap, 5..5));
        assert!(all_set(&bitmap, reversed.clone()) && none_set(&bitmap, reversed.clone()));
        assert_eq!(runs(&bitmap, reversed).next(), None);
    }

    #[test]
    fn reads_what_windows_wrote() {
        let bitmap = [0x02, 0x01, 0xCB, 0xA8];
        let set: Vec<_> = runs(&bitmap, 0..32).filter(|run| run.set).map(|run| run.sectors).collect();
        assert_eq!(set, [6..7, 15..18, 20..21, 22..25, 26..27, 28..29]);
    }

    proptest! {
        #[test]
        fn behaves_like_a_row_of_bools(
            mut bitmap in prop::collection::vec(prop_oneof![Just(0u8), Just(0xFF), any::<u8>()], 0..40),
            changed in (0u32..330, 0u32..330),
            value: bool,
            asked in (0u32..330, 0u32..330),
        ) {
            let mut model: Vec<bool> = (0..bitmap.len() as u32 * 8).map(|sector| get(&bitmap, sector)).collect();
            set_range(&mut bitmap, changed.0..changed.1, value);
            for sector in changed.0..changed.1 {
                if let Some(bit) = model.get_mut(sector as usize) {
                    *bit = value;
                }
            }
            let bit = |sector: u32| model.get(sector as usize).copied().unwrap_or(false);
            for sector in 0..340 {
                prop_assert_eq!(get(&bitmap, sector), bit(sector));
            }

            let asked = asked.0..asked.1;
            prop_assert_eq!(all_set(&bitmap, asked.clone()), asked.clone().all(bit));
            prop_assert_eq!(none_set(&bitmap, asked.clone()), !asked.clone().any(bit));
            let mut next = asked.start;
            let mut former = None;
            for run in runs(&bitmap, asked.clone()) {
                prop_assert_eq!(run.sectors.start, next);
                prop_assert!(!run.sectors.is_empty());
                prop_assert_ne!(former, Some(run.set));
                prop_assert!(run.sectors.clone().all(|sector| bit(sector) == run.set));
                (next, former) = (run.sectors.end, Some(run.set));
            }
            prop_assert_eq!(next, asked.end.max(asked.start));
        }
    }
}
