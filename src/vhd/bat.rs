//! The block allocation table: for each block of the disk, the sector of the file at which its bitmap starts.
//!
//! Source: VHD specification, "Block Allocation Table and Data Blocks". Entries are big-endian `u32`, the table is
//! padded to whole sectors with 0xFF. These functions work on the table's bytes as they stand in the file, whole or in
//! part; what is asked for beyond them does not exist.

use zerocopy::FromBytes;
use zerocopy::big_endian::U32;

use super::{SECTOR, bitmap_bytes};

/// The entry of a block that has no place in the file.
pub const UNALLOCATED: u32 = 0xFFFF_FFFF;

/// Bytes of one entry.
pub const ENTRY_BYTES: u64 = 4;

const _: () = assert!(size_of::<U32>() as u64 == ENTRY_BYTES);

/// Bytes of a table with that many entries, padded to whole sectors.
pub const fn bat_bytes(entries: u32) -> u64 {
    (entries as u64 * ENTRY_BYTES).next_multiple_of(SECTOR)
}

/// The entry with that index: a sector of the file, or [`UNALLOCATED`]. `None` if `table` ends before it.
pub fn entry(table: &[u8], index: u32) -> Option<u32> {
    let start = usize::try_from(u64::from(index) * ENTRY_BYTES).ok()?;
    let (entry, _) = U32::ref_from_prefix(table.get(start..)?).ok()?;
    Some(entry.get())
}

/// Sets the entry with that index to `sector` and returns what it was. `None`, and nothing changed, if `table` ends
/// before it.
#[must_use = "None means that the table has no such entry"]
pub fn set_entry(table: &mut [u8], index: u32, sector: u32) -> Option<u32> {
    let start = usize::try_from(u64::from(index) * ENTRY_BYTES).ok()?;
    let (entry, _) = U32::mut_from_prefix(table.get_mut(start..)?).ok()?;
    let former = entry.get();
    entry.set(sector);
    Some(former)
}

/// All whole entries of `table` in order, padding included.
pub fn entries(table: &[u8]) -> impl ExactSizeIterator<Item = u32> + '_ {
    table
        .chunks_exact(ENTRY_BYTES as usize)
        .map(|bytes| bytes.iter().fold(0, |sum, &byte| sum << 8 | u32::from(byte)))
}

/// Byte offset in the file at which the block of a BAT entry starts, with its bitmap. `None` if it has no place: the
/// entry is [`UNALLOCATED`], or 0, where the footer copy lies.
pub const fn block_offset(entry: u32) -> Option<u64> {
    match entry {
        0 | UNALLOCATED => None,
        sector => Some(sector as u64 * SECTOR),
    }
}

/// Bytes that a block takes up in the file: its bitmap and `block_size` bytes of data.
pub const fn block_stride(block_size: u32) -> u64 {
    bitmap_bytes(block_size) as u64 + block_size as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_whole_sectors() {
        for (entries, bytes) in [(0, 0), (1, 512), (32, 512), (128, 512), (129, 1024), (1_044_480, 4_177_920)]
        {
            assert_eq!(bat_bytes(entries), bytes);
        }
        assert_eq!(bat_bytes(u32::MAX), 1 << 34);
    }

    #[test]
    fn entries_are_big_endian() {
        let mut table = [0xFF; 12];
        assert_eq!(set_entry(&mut table, 1, 0x0102_0304), Some(UNALLOCATED));
        assert_eq!(table, [255, 255, 255, 255, 1, 2, 3, 4, 255, 255, 255, 255]);
        assert_eq!(entry(&table, 1), Some(0x0102_0304));
        assert_eq!(entries(&table).collect::<Vec<_>>(), [UNALLOCATED, 0x0102_0304, UNALLOCATED]);
    }

    #[test]
    fn nothing_is_beyond_the_table() {
        let mut table = [0; 7];
        for index in [1, 2, u32::MAX] {
            assert_eq!(entry(&table, index), None);
            assert_eq!(set_entry(&mut table, index, 1), None);
        }
        assert_eq!(table, [0; 7]);
        assert_eq!(entry(&[], 0), None);
        assert_eq!(entries(&table).len(), 1);
    }

    #[test]
    fn blocks_have_their_place() {
        assert_eq!(block_offset(0), None);
        assert_eq!(block_offset(UNALLOCATED), None);
        assert_eq!(block_offset(0x9F), Some(81_408));
        assert_eq!(block_offset(0xFFFF_FFFE), Some(0xFFFF_FFFE * 512));
        assert_eq!(block_stride(2 << 20), 2_097_664);
        assert_eq!(block_stride(512), 1024);
    }

    proptest! {
        #[test]
        fn what_is_set_is_read(
            mut table in prop::collection::vec(any::<u8>(), 0..64),
            index in 0u32..20,
            sector: u32,
        ) {
            let before = entry(&table, index);
            prop_assert_eq!(set_entry(&mut table, index, sector), before);
            prop_assert_eq!(entry(&table, index), before.map(|_| sector));
            prop_assert_eq!(entries(&table).nth(index as usize), before.map(|_| sector));
        }
    }
}
