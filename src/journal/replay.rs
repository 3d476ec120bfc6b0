//! Replaying records over metadata, in memory, strictly by sequence: an image replaces, a record changes.
//!
//! The result is the metadata as the journal says it is, whatever torn state the file is in: every page that a record
//! changes and that may be torn has an image among the records, and an `alloc` record alone determines a whole block page.

use super::block_page::BlockPage;
use crate::error::FormatError;
use crate::ext::{BlockHeader, HEADER_BACKUP_OFFSET, PAGE_BYTES, Placement, Record};
use crate::vhd::{self, UniqueId};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;

const PAGE: usize = PAGE_BYTES as usize;

/// Guest data to be written again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReplayedData<'a> {
    /// File offset in bytes.
    pub(crate) offset: u64,
    /// Length in bytes.
    pub(crate) length: u64,
    /// The data; `None` for zeros.
    pub(crate) bytes: Option<&'a [u8]>,
}

/// Guest data with the slot and the allocation that it was journaled for.
#[derive(Debug)]
struct SlotData<'a> {
    slot: u32,
    allocation: u64,
    data: ReplayedData<'a>,
}

/// The metadata of an image while records are replayed over it.
#[derive(Debug)]
pub(crate) struct Replay<'a> {
    place: Placement,
    disk_id: UniqueId,
    table: Vec<u8>,
    changed_table_pages: BTreeSet<usize>,
    imaged_table_pages: BTreeSet<usize>,
    pages: BTreeMap<u64, BlockPage>,
    data: Vec<SlotData<'a>>,
    /// The allocation that each slot has by the live records, where they tell.
    allocations: HashMap<u32, u64>,
    next_allocation: u64,
    /// The image of the start of the file.
    front: Option<&'a [u8]>,
}

impl<'a> Replay<'a> {
    /// Replays `records` over `table`, the bytes of the BAT's pages as the file has them (which may be torn). `read_page`
    /// reads the page at a file offset.
    pub(crate) fn new(
        place: Placement,
        disk_id: UniqueId,
        table: Vec<u8>,
        records: &[Record<'a>],
        mut read_page: impl FnMut(u64) -> io::Result<[u8; PAGE]>,
    ) -> Result<Self, ReplayError> {
        let mut replay = Replay {
            place,
            disk_id,
            table,
            changed_table_pages: BTreeSet::new(),
            imaged_table_pages: BTreeSet::new(),
            pages: BTreeMap::new(),
            data: Vec::new(),
            allocations: HashMap::new(),
            next_allocation: 0,
            front: None,
        };
        for record in records {
            replay.apply(record, &mut read_page)?;
        }
        replay.keep_data_of_mapped_slots();
        Ok(replay)
    }

    fn apply(
        &mut self,
        record: &Record<'a>,
        read_page: &mut impl FnMut(u64) -> io::Result<[u8; PAGE]>,
    ) -> Result<(), ReplayError> {
        match *record {
            Record::Alloc { block, slot, allocation, bitmap_set } => {
                let page_offset = self.block_page(slot)?;
                self.set_entry(block, slot)?;
                self.next_allocation = self.next_allocation.max(allocation.saturating_add(1));
                self.allocations.insert(slot, allocation);
                let header = BlockHeader { page_offset, disk_id: self.disk_id, block, allocation };
                self.pages.insert(page_offset, BlockPage::Fresh { header, bitmap_set });
            }
            Record::Free { block, slot } => {
                if !self.is_off_grid(slot) {
                    let page_offset = self.block_page(slot)?;
                    self.pages.remove(&page_offset);
                }
                self.set_entry(block, vhd::UNALLOCATED)?;
                self.allocations.remove(&slot);
            }
            Record::Bits { slot, allocation, first_sector, sectors } => {
                let page_offset = self.block_page(slot)?;
                self.check_sectors(first_sector, sectors)?;
                if !self.is_of_current(slot, allocation) {
                    return Ok(());
                }
                let page = match self.pages.entry(page_offset) {
                    Entry::Occupied(page) => page.into_mut(),
                    Entry::Vacant(place) => {
                        let bytes = Box::new(read_page(page_offset)?);
                        place.insert(BlockPage::Bytes { bytes, determined: false })
                    }
                };
                page.set_bits(&self.place, first_sector..first_sector + sectors);
            }
            Record::Data { slot, allocation, first_sector, bytes } => {
                self.push_data(slot, allocation, first_sector, bytes.len() as u64, Some(bytes))?;
            }
            Record::Zero { slot, allocation, first_sector, sectors } => {
                let length = u64::from(sectors) * vhd::SECTOR;
                self.push_data(slot, allocation, first_sector, length, None)?;
            }
            Record::Image { offset, bytes } => self.apply_image(offset, bytes)?,
        }
        Ok(())
    }

    fn set_entry(&mut self, block: u32, entry: u32) -> Result<(), ReplayError> {
        let at = block as usize * 4;
        if block >= self.place.table_entries {
            let expected = format!("below {}", self.place.table_entries);
            return Err(FormatError::new("journal record", "block", 8, block, expected).into());
        }
        if let Some(bytes) = self.table.get_mut(at..at + 4) {
            bytes.copy_from_slice(&entry.to_be_bytes());
        }
        self.changed_table_pages.insert(at / PAGE);
        Ok(())
    }

    /// Whether it can be another tool's block, which lies anywhere behind the BAT and has no page.
    fn is_off_grid(&self, slot: u32) -> bool {
        self.place.slot_index(slot).is_none() && self.place.is_clear(slot)
    }

    /// The file offset of the block page of a slot on our grid.
    fn block_page(&self, slot: u32) -> Result<u64, ReplayError> {
        match self.place.slot_index(slot) {
            Some(_) => Ok(self.place.block_page_offset(slot)),
            None => {
                Err(FormatError::new("journal record", "slot", 12, slot, "the sector of a slot's bitmap")
                    .into())
            }
        }
    }

    fn check_sectors(&self, first: u32, count: u32) -> Result<(), ReplayError> {
        let in_block = u64::from(self.place.block_bytes) / vhd::SECTOR;
        if u64::from(first) + u64::from(count) > in_block {
            let found = format!("{first} + {count}");
            return Err(FormatError::new(
                "journal record",
                "sectors",
                24,
                found,
                format!("at most {in_block}"),
            )
            .into());
        }
        Ok(())
    }

    fn push_data(
        &mut self,
        slot: u32,
        allocation: u64,
        first_sector: u32,
        length: u64,
        bytes: Option<&'a [u8]>,
    ) -> Result<(), ReplayError> {
        if !self.is_off_grid(slot) {
            self.block_page(slot)?;
        }
        let sectors = u32::try_from(length / vhd::SECTOR).unwrap_or(u32::MAX);
        self.check_sectors(first_sector, sectors)?;
        let offset = self.place.data_offset(slot) + u64::from(first_sector) * vhd::SECTOR;
        self.data.push(SlotData { slot, allocation, data: ReplayedData { offset, length, bytes } });
        Ok(())
    }

    /// An image may only aim at the BAT's pages, at a block page, at the start of the file or at its backup.
    fn apply_image(&mut self, offset: u64, bytes: &'a [u8]) -> Result<(), ReplayError> {
        if let Some(at) = offset.checked_sub(self.place.table_offset).map(|at| at as usize)
            && let Some(target) = self.table.get_mut(at..at.saturating_add(bytes.len()))
            && at.is_multiple_of(PAGE)
            && bytes.len() == PAGE
        {
            target.copy_from_slice(bytes);
            self.changed_table_pages.insert(at / PAGE);
            self.imaged_table_pages.insert(at / PAGE);
            return Ok(());
        }
        let holds_headers = self.place.temporary.is_none() && [0, HEADER_BACKUP_OFFSET].contains(&offset);
        if bytes.len() == PAGE && holds_headers {
            // The backup holds the same, which is written from there.
            if offset == 0 {
                self.front = Some(bytes);
            }
            return Ok(());
        }
        // Of a slot that an entry can name: a page elsewhere would only make the file longer.
        let on_grid = offset.checked_sub(self.place.slot_origin).is_some_and(|from_origin| {
            let stride = self.place.slot_stride();
            from_origin.is_multiple_of(stride) && self.place.slot_entry(from_origin / stride).is_some()
        });
        match <[u8; PAGE]>::try_from(bytes) {
            Ok(bytes) if on_grid => {
                let page = BlockPage::Bytes { bytes: Box::new(bytes), determined: true };
                self.pages.insert(offset, page);
                Ok(())
            }
            _ => {
                let found = format!("{} bytes at {offset}", bytes.len());
                Err(FormatError::new(
                    "journal record",
                    "image",
                    8,
                    found,
                    "a page of the BAT, a block page, or the headers",
                )
                .into())
            }
        }
    }

    /// Whether a record speaks of the allocation that a slot has now. 0 names none, and a slot that no live record allocates
    /// has the one that it had all along.
    fn is_of_current(&self, slot: u32, allocation: u64) -> bool {
        allocation == 0 || self.allocations.get(&slot).is_none_or(|&current| current == allocation)
    }

    /// Data of a slot that was freed later must not come back to life in it, nor in its next block.
    fn keep_data_of_mapped_slots(&mut self) {
        if self.data.is_empty() {
            return;
        }
        let mapped: HashMap<u32, ()> = self.entries().map(|entry| (entry, ())).collect();
        let data = std::mem::take(&mut self.data);
        let counts = |data: &SlotData<'_>| {
            mapped.contains_key(&data.slot) && self.is_of_current(data.slot, data.allocation)
        };
        self.data = data.into_iter().filter(counts).collect();
    }

    /// All BAT entries in order.
    pub(crate) fn entries(&self) -> impl Iterator<Item = u32> + '_ {
        self.table
            .chunks_exact(4)
            .take(self.place.table_entries as usize)
            .map(|bytes| bytes.try_into().map_or(vhd::UNALLOCATED, u32::from_be_bytes))
    }

    /// Whether a live record puts a block into `slot`, and none takes it out again.
    pub(crate) fn allocates(&self, slot: u32) -> bool {
        self.allocations.contains_key(&slot)
    }

    /// The slots of which that is so.
    pub(crate) fn allocated(&self) -> impl Iterator<Item = u32> + '_ {
        self.allocations.keys().copied()
    }

    /// The BAT's pages that records or images touched, as (file offset, bytes, imaged).
    pub(crate) fn table_pages(&self) -> impl Iterator<Item = (u64, &[u8], bool)> + '_ {
        self.changed_table_pages.iter().filter_map(|&page| {
            let bytes = self.table.get(page * PAGE..(page + 1) * PAGE)?;
            let offset = self.place.table_offset + (page * PAGE) as u64;
            Some((offset, bytes, self.imaged_table_pages.contains(&page)))
        })
    }

    /// The block pages that records or images touched, by file offset.
    pub(crate) fn block_pages(&self) -> impl Iterator<Item = (u64, &BlockPage)> + '_ {
        self.pages.iter().map(|(&offset, page)| (offset, page))
    }

    /// The start of the file, where another parent was named.
    pub(crate) fn front(&self) -> Option<&'a [u8]> {
        self.front
    }

    /// The guest data to be written again, in order.
    pub(crate) fn data(&self) -> impl Iterator<Item = ReplayedData<'a>> + '_ {
        self.data.iter().map(|data| data.data)
    }

    /// The pages of the BAT, and the block pages that records or images touched, by file offset.
    pub(crate) fn into_metadata(self) -> (Vec<u8>, BTreeMap<u64, BlockPage>) {
        (self.table, self.pages)
    }

    /// Above every allocation sequence among the records.
    pub(crate) fn next_allocation(&self) -> u64 {
        self.next_allocation
    }
}

/// Why a journal could not be replayed.
#[derive(Debug)]
pub(crate) enum ReplayError {
    /// A record is impossible.
    Format(FormatError),
    /// A page could not be read.
    Io(io::Error),
}

impl From<FormatError> for ReplayError {
    fn from(error: FormatError) -> Self {
        ReplayError::Format(error)
    }
}

impl From<io::Error> for ReplayError {
    fn from(error: io::Error) -> Self {
        ReplayError::Io(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK_BYTES: u32 = 16 << 10;

    fn place() -> Placement {
        Placement::new(8, BLOCK_BYTES, 128 << 10)
    }

    fn replay<'a>(records: &[Record<'a>]) -> Replay<'a> {
        let read_page = |_| Ok([0; PAGE]);
        match Replay::new(place(), UniqueId::default(), vec![0xff; PAGE], records, read_page) {
            Ok(replay) => replay,
            Err(error) => panic!("{error:?}"),
        }
    }

    fn alloc(block: u32, slot: u32, allocation: u64) -> Record<'static> {
        Record::Alloc { block, slot, allocation, bitmap_set: false }
    }

    /// Records of a block that has left its slot do not touch the next block there, even if they are still live.
    #[test]
    fn records_of_an_earlier_allocation_are_dropped() {
        let place = place();
        let slot = place.slot_entry(0).unwrap();
        let bytes = [7; 512];
        let data = |allocation| Record::Data { slot, allocation, first_sector: 1, bytes: &bytes };
        let zero = |allocation| Record::Zero { slot, allocation, first_sector: 2, sectors: 1 };
        let bits = |allocation| Record::Bits { slot, allocation, first_sector: 0, sectors: 8 };
        let free = Record::Free { block: 1, slot };

        let before = [alloc(1, slot, 5), data(5), zero(5), free, alloc(2, slot, 9)];
        assert_eq!(replay(&before).data().count(), 0);
        let after = [alloc(1, slot, 5), free, alloc(2, slot, 9), data(5), zero(5), bits(5)];
        assert_eq!(replay(&after).data().count(), 0);
        let set_bits = |records: &[Record<'_>]| {
            let replay = replay(records);
            let (_, page) = replay.block_pages().next().unwrap();
            page.bytes(&place)[PAGE - 512]
        };
        assert_eq!(set_bits(&after), 0);
        assert_eq!(set_bits(&[alloc(2, slot, 9), bits(9)]), 0xff);
        // Of the allocation itself, of none in particular, and of a slot that no live record allocates.
        assert_eq!(replay(&[alloc(2, slot, 9), data(9), zero(0)]).data().count(), 2);
        let mut table = vec![0xff; PAGE];
        table[..4].copy_from_slice(&slot.to_be_bytes());
        let unknown = Replay::new(place, UniqueId::default(), table, &[data(3)], |_| Ok([0; PAGE])).unwrap();
        assert_eq!(unknown.data().count(), 1);
    }

    /// A block of another program can be freed and written to; nothing may aim in front of the end of the table.
    #[test]
    fn records_off_the_grid() {
        let place = place();
        let behind_the_table = (place.table_end() / 512) as u32;
        let bytes = [7; 512];
        let data = |slot| Record::Data { slot, allocation: 0, first_sector: 0, bytes: &bytes };
        let free = |slot| Record::Free { block: 1, slot };
        assert_eq!(replay(&[data(behind_the_table), free(behind_the_table)]).data().count(), 0);
        let inside = behind_the_table - 1;
        for record in [data(inside), free(inside), data(0), alloc(1, behind_the_table, 1)] {
            let table = vec![0xff; PAGE];
            assert!(Replay::new(place, UniqueId::default(), table, &[record], |_| Ok([0; PAGE])).is_err());
        }
    }
}
