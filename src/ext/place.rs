//! Where things lie in an image made here (FORMAT.md, "Layout").
//!
//! The private area sits between the dynamic header and the BAT, the one place no other tool writes to. Data is 4 KiB
//! aligned: a slot is one page for the block header and the sector bitmap, then the block's data.

use crate::vhd;
use std::ops::Range;

/// A page: the unit of alignment and of metadata writes, in bytes.
pub const PAGE_BYTES: u64 = 4096;
/// File offsets of superblock A and B.
pub const SUPERBLOCK_OFFSETS: [u64; 2] = [4096, 8192];
/// File offset of the backup of footer and dynamic header.
pub const HEADER_BACKUP_OFFSET: u64 = 12288;
/// File offset of the parent locators of differencing images made here, a page each.
pub const LOCATORS_OFFSET: u64 = 16384;
/// Behind the pages for parent locators: four times as many as one parent takes.
pub const LOCATORS_END: u64 = 65536;
/// File offset of the journal ring in images made here. From 16384 up to it space is kept for parent locators and for
/// records of later versions.
pub const RING_OFFSET: u64 = 256 * 1024;
/// Room kept for the BAT, in bytes: that of the largest disk, so that growing never moves a block.
pub const BAT_ROOM_BYTES: u64 = 4 * 1024 * 1024;
/// No sequence and no allocation number of a sound image is higher: none gets there by use, and counting on cannot overflow.
pub const MAX_COUNTER: u64 = u64::MAX >> 1;
/// The BAT starts at a multiple of this.
const TABLE_ALIGNMENT: u64 = 1024 * 1024;

/// The fixed part of a temporary journal (FORMAT.md, "Temporary journal"), from its head on: a copy of the file's first page,
/// superblock A and B and the header backup at the offsets that they have in an image made here, then these.
pub const FIRST_TABLE_PAGE_OFFSET: u64 = 16384;
/// A copy of the last page that holds a part of the BAT.
pub const LAST_TABLE_PAGE_OFFSET: u64 = 20480;
/// From the head of a temporary journal to the end of the file, in bytes. The last 512 are a copy of the footer.
pub const TEMPORARY_HEAD_BYTES: u64 = 28672;
/// The end of the dynamic header in an image that may be written to.
const HEADERS_END: u64 = 1536;

/// What a session on an image made elsewhere adds to its places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Temporary {
    /// Where the fixed part of the temporary journal starts; it ends the file.
    pub head: u64,
    /// Where the BAT starts that other programs read.
    pub table_offset: u64,
    /// Its end.
    pub table_end: u64,
}

impl Temporary {
    /// The pages that hold a part of the first `entries` of the BAT that other programs read, by file offset.
    pub fn table_pages(&self, entries: u32) -> impl Iterator<Item = u64> + use<> {
        let start = self.table_offset / PAGE_BYTES * PAGE_BYTES;
        let end = self.table_offset + u64::from(entries) * vhd::bat::ENTRY_BYTES;
        (start..end).step_by(PAGE_BYTES as usize)
    }
}

/// The places of one image, all in bytes from the start of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Where the journal ring starts.
    pub ring_offset: u64,
    /// Length of the ring, a multiple of [`PAGE_BYTES`].
    pub ring_bytes: u64,
    /// Where the BAT starts.
    pub table_offset: u64,
    /// Number of BAT entries.
    pub table_entries: u32,
    /// Where the first slot starts.
    pub slot_origin: u64,
    /// Data bytes of a block.
    pub block_bytes: u32,
    /// Of an image made elsewhere, while it is open for writing: ring and BAT are those of its temporary journal.
    pub temporary: Option<Temporary>,
}

impl Placement {
    /// The layout of a new image with `table_entries` blocks of `block_bytes` and a ring of `ring_bytes`.
    pub fn new(table_entries: u32, block_bytes: u32, ring_bytes: u64) -> Self {
        let table_offset = (RING_OFFSET + ring_bytes).next_multiple_of(TABLE_ALIGNMENT);
        Placement {
            ring_offset: RING_OFFSET,
            ring_bytes,
            table_offset,
            table_entries,
            slot_origin: table_offset + BAT_ROOM_BYTES,
            block_bytes,
            temporary: None,
        }
    }

    /// Where the offsets of superblocks and header backup count from.
    pub fn private_base(&self) -> u64 {
        self.temporary.map_or(0, |temporary| temporary.head)
    }

    /// The file offset of the header backup.
    pub fn backup_offset(&self) -> u64 {
        self.private_base() + HEADER_BACKUP_OFFSET
    }

    /// Where headers, BAT and journal are, from the start of the file on: no block lies there.
    pub fn metadata(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let ranges = match self.temporary {
            None => [0..self.table_end(), 0..0, 0..0],
            Some(Temporary { table_offset, table_end, .. }) => {
                [0..HEADERS_END, table_offset..table_end, self.ring_offset..u64::MAX]
            }
        };
        ranges.into_iter().filter(|range| !range.is_empty())
    }

    /// Whether the block of an entry is clear of all metadata.
    pub fn is_clear(&self, entry: u32) -> bool {
        let (start, end) = (self.bitmap_offset(entry), self.block_end(entry));
        self.metadata().all(|range| end <= range.start || range.end <= start)
    }

    /// Whether the block of an entry shares a page with metadata of which whole pages are written.
    pub fn shares_metadata_page(&self, entry: u32) -> bool {
        let (start, end) = (self.bitmap_offset(entry), self.block_end(entry));
        match self.temporary {
            None => start < self.table_pages_end(),
            Some(Temporary { table_offset, table_end, .. }) => {
                start < PAGE_BYTES
                    || (start < table_end.next_multiple_of(PAGE_BYTES)
                        && end > table_offset / PAGE_BYTES * PAGE_BYTES)
            }
        }
    }

    /// No slot ends behind this.
    pub fn slots_end(&self) -> u64 {
        self.temporary.map_or(u64::MAX, |_| self.ring_offset)
    }

    /// The file offset behind the BAT: other tools place blocks from here on.
    pub fn table_end(&self) -> u64 {
        self.table_offset + vhd::bat_bytes(self.table_entries)
    }

    /// The file offset behind the last page of the BAT, which is written whole.
    pub fn table_pages_end(&self) -> u64 {
        self.table_end().next_multiple_of(PAGE_BYTES)
    }

    /// Bytes of a block's sector bitmap, a multiple of 512.
    pub fn bitmap_bytes(&self) -> u64 {
        vhd::bitmap_bytes(self.block_bytes).into()
    }

    /// Bytes from the start of one slot to the next: the block page, then the data.
    pub fn slot_stride(&self) -> u64 {
        PAGE_BYTES + u64::from(self.block_bytes)
    }

    /// The file offset of the sector bitmap that BAT entry `entry` names.
    pub fn bitmap_offset(&self, entry: u32) -> u64 {
        u64::from(entry) * vhd::SECTOR
    }

    /// The file offset of the data of the block whose BAT entry is `entry`.
    pub fn data_offset(&self, entry: u32) -> u64 {
        self.bitmap_offset(entry) + self.bitmap_bytes()
    }

    /// The file offset behind the data of the block whose BAT entry is `entry`.
    pub fn block_end(&self, entry: u32) -> u64 {
        self.data_offset(entry) + u64::from(self.block_bytes)
    }

    /// Whether `length` bytes from file offset `at` on are guest data of the block whose BAT entry is `entry`, and of nothing else:
    /// behind headers, journal and BAT, and clear of its own and of every other block's page.
    pub fn is_data(&self, entry: u32, at: u64, length: u64) -> bool {
        self.is_clear(entry)
            && self.data_offset(entry) <= at
            && at.checked_add(length).is_some_and(|end| end <= self.block_end(entry))
    }

    /// The file offset of the block page of a block in a slot of ours: the page whose end is the bitmap.
    pub fn block_page_offset(&self, entry: u32) -> u64 {
        (self.bitmap_offset(entry) + self.bitmap_bytes()).saturating_sub(PAGE_BYTES)
    }

    /// The BAT entry that names slot `index`, or `None` where it lies past what an entry can name or where slots may be.
    pub fn slot_entry(&self, index: u64) -> Option<u32> {
        let page = self.slot_origin.checked_add(index.checked_mul(self.slot_stride())?)?;
        if page.checked_add(self.slot_stride())? > self.slots_end() {
            return None;
        }
        let entry = u32::try_from((page + PAGE_BYTES - self.bitmap_bytes()) / vhd::SECTOR).ok()?;
        (entry != vhd::UNALLOCATED).then_some(entry)
    }

    /// The slot that BAT entry `entry` names, if it lies on our grid.
    pub fn slot_index(&self, entry: u32) -> Option<u64> {
        let page = (self.bitmap_offset(entry) + self.bitmap_bytes()).checked_sub(PAGE_BYTES)?;
        let from_origin = page.checked_sub(self.slot_origin)?;
        from_origin.is_multiple_of(self.slot_stride()).then(|| from_origin / self.slot_stride())
    }

    /// The file offset at which slot `index` starts.
    pub fn slot_offset(&self, index: u64) -> u64 {
        self.slot_origin + index * self.slot_stride()
    }

    /// Length of a file that ends with slot `fresh - 1`. Behind the slot one sector more: of zeros while the image is
    /// dirty, the footer once it is clean. So the last bytes of a file are never a guest's, who could write a footer there.
    /// With a temporary journal the file has one length.
    pub fn file_bytes(&self, fresh: u64) -> u64 {
        match self.temporary {
            Some(temporary) => temporary.head + TEMPORARY_HEAD_BYTES,
            None => self.slot_offset(fresh) + vhd::SECTOR,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_disk_fits_below_two_tebibytes() {
        let place = Placement::new(1_044_480, vhd::BLOCK_SIZE, 2 << 20);
        assert_eq!((place.table_offset, place.slot_origin), (3 << 20, 7 << 20));
        // FORMAT.md: at 2040 GiB some 2,048 spare slots remain.
        let slots = (0..).take_while(|&i| place.slot_entry(i).is_some()).count() as u64;
        assert!((1_044_480 + 2_000..1_044_480 + 2_100).contains(&slots), "{slots}");
    }

    /// FORMAT.md says it in digits: the tests of its bounds, elsewhere, take the constant.
    #[test]
    fn the_highest_counter() {
        assert_eq!(MAX_COUNTER, 0x7fff_ffff_ffff_ffff);
    }

    /// The worked example of FORMAT.md, "Slots".
    #[test]
    fn the_first_slots_of_a_new_image() {
        let place = Placement::new(32, vhd::BLOCK_SIZE, 2 << 20);
        assert_eq!((place.ring_offset, place.table_offset), (262_144, 3_145_728));
        assert_eq!((place.slot_origin, place.slot_stride()), (7_340_032, 2_101_248));
        for (index, page, bitmap, entry, data) in [
            (0, 7_340_032, 7_343_616, 14_343, 7_344_128),
            (1, 9_441_280, 9_444_864, 18_447, 9_445_376),
            (2, 11_542_528, 11_546_112, 22_551, 11_546_624),
        ] {
            assert_eq!(place.slot_entry(index), Some(entry));
            assert_eq!((place.slot_offset(index), place.block_page_offset(entry)), (page, page));
            assert_eq!((place.bitmap_offset(entry), place.data_offset(entry)), (bitmap, data));
        }
    }

    /// Blocks of 4 KiB, a table of 64 entries at 1 MiB.
    #[test]
    fn blocks_are_clear_of_the_front_of_an_image_made_here() {
        let place = Placement::new(64, 4096, 1 << 16);
        assert!(place.metadata().eq(std::iter::once(0..(1 << 20) + 512)));
        assert_eq!((place.private_base(), place.backup_offset(), place.slots_end()), (0, 12288, u64::MAX));
        assert_eq!([2048, 2049].map(|entry| place.is_clear(entry)), [false, true]);
        assert_eq!([2049, 2055, 2056].map(|entry| place.shares_metadata_page(entry)), [true, true, false]);
        let data = place.data_offset(2056);
        assert_eq!(data, (1 << 20) + 4096 + 512);
        for (entry, at, length, is_data) in [
            (2056, data, 4096, true),
            (2056, data + 4096, 0, true),
            (2056, data - 1, 2, false),
            (2056, data, 4097, false),
            (2056, data, u64::MAX, false),
            (2049, data - 7 * 512, 4096, true),
            (2048, data - 8 * 512, 4096, false),
        ] {
            assert_eq!(place.is_data(entry, at, length), is_data, "{length} bytes at {at} of {entry}");
        }
        assert_eq!((place.block_page_offset(0), place.slot_index(0)), (0, None));
        assert_eq!((place.file_bytes(0), place.file_bytes(3)), ((5 << 20) + 512, (5 << 20) + 3 * 8192 + 512));
        assert_eq!((place.slot_entry(u64::MAX), place.slot_entry(u64::MAX / 8192)), (None, None));
    }

    /// A file of 1 MiB that another program has laid out, with its table at 9216, while it is open for writing.
    #[test]
    fn blocks_are_clear_of_the_ends_of_an_image_made_elsewhere() {
        let head = (1 << 20) - TEMPORARY_HEAD_BYTES;
        let place = Placement {
            ring_offset: head - 4096 - 65536,
            ring_bytes: 65536,
            table_offset: head - 4096,
            table_entries: 64,
            slot_origin: 16384,
            block_bytes: 4096,
            temporary: Some(Temporary { head, table_offset: 9216, table_end: 9728 }),
        };
        let ring = place.ring_offset;
        assert_eq!(place.metadata().collect::<Vec<_>>(), [0..1536, 9216..9728, ring..u64::MAX]);
        assert_eq!(
            (place.private_base(), place.backup_offset(), place.slots_end()),
            (head, head + 12288, ring)
        );
        assert_eq!((place.file_bytes(0), place.file_bytes(9)), (1 << 20, 1 << 20));
        // Behind the headers; in front of and behind the table; in front of the ring.
        let last = (ring - 4096 - 512) as u32 / 512;
        for (entry, clear) in [
            (2, false),
            (3, true),
            (9, true),
            (10, false),
            (18, false),
            (19, true),
            (last, true),
            (last + 1, false),
        ] {
            assert_eq!(place.is_clear(entry), clear, "entry {entry}");
        }
        // Blocks of a sector: the first page, and that of the table.
        let place = Placement { block_bytes: 512, ..place };
        for (entry, shares) in
            [(7, true), (8, false), (14, false), (15, true), (19, true), (23, true), (24, false)]
        {
            assert_eq!(place.shares_metadata_page(entry), shares, "entry {entry}");
        }
        let place = Placement { block_bytes: 4096, ..place };
        let slots = (ring - 16384) / 8192;
        assert_eq!(place.slot_entry(slots), None);
        assert_eq!(place.slot_entry(slots - 1).and_then(|entry| place.slot_index(entry)), Some(slots - 1));
        let pages = |entries| place.temporary.unwrap().table_pages(entries).collect::<Vec<_>>();
        assert_eq!((pages(64), pages(768), pages(769)), (vec![8192], vec![8192], vec![8192, 12288]));
    }

    #[test]
    fn entries_and_slots_are_inverse_and_data_is_page_aligned() {
        for block_bytes in [4096, 8192, vhd::BLOCK_SIZE] {
            let place = Placement::new(64, block_bytes, 1 << 16);
            for index in [0, 1, 2, 63, 1000] {
                let entry = place.slot_entry(index).unwrap();
                assert_eq!(place.slot_index(entry), Some(index));
                assert_eq!(place.slot_index(entry + 1), None);
                assert_eq!(place.block_page_offset(entry), place.slot_offset(index));
                assert_eq!(place.data_offset(entry), place.slot_offset(index) + PAGE_BYTES);
                assert_eq!(place.block_end(entry), place.slot_offset(index + 1));
            }
        }
    }
}
