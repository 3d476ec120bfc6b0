//! The dynamic header: block size, place of the BAT, and the parent of a differencing disk.
//!
//! Source: VHD specification, "Dynamic Disk Header Format". The file holds no second copy of it.
//!
//! The second cookie, `cowdirty`, is our own: it stands there while the journal is ahead of the file, and every other
//! tool then refuses the file instead of misreading it.

use std::fmt::Display;
use std::mem::offset_of;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::locator::RawLocator;
use super::{ParentLocator, SECTOR, Timestamp, UniqueId, bat_bytes, checksum, quoted};
use crate::FormatError;

const STRUCTURE: &str = "dynamic header";

const VERSION: u32 = 0x0001_0000;

/// The smallest block size read, in bytes: one sector.
const MIN_BLOCK_SIZE: u32 = 512;

/// The largest block size read, in bytes: far beyond any in use, and its bitmap is still small (256 KiB).
const MAX_BLOCK_SIZE: u32 = 1 << 30;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDynamicHeader {
    cookie: [u8; 8],
    data_offset: U64,
    table_offset: U64,
    version: U32,
    max_table_entries: U32,
    block_size: U32,
    checksum: U32,
    parent_unique_id: [u8; 16],
    parent_timestamp: U32,
    reserved1: U32,
    parent_name: [U16; 256],
    locators: [RawLocator; 8],
    reserved2: [u8; 256],
}

assert_layout!(RawDynamicHeader: 1024 {
    cookie @ 0,
    data_offset @ 8,
    table_offset @ 16,
    version @ 24,
    max_table_entries @ 28,
    block_size @ 32,
    checksum @ 36,
    parent_unique_id @ 40,
    parent_timestamp @ 56,
    reserved1 @ 60,
    parent_name @ 64,
    locators @ 576,
    reserved2 @ 768,
});

/// Which of the two cookies a dynamic header bears.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HeaderCookie {
    /// `cxsparse`, as published: the file is complete in itself.
    Normal,
    /// `cowdirty`, ours: the journal holds changes that the file may lack.
    Dirty,
}

impl HeaderCookie {
    /// The eight bytes in the file.
    pub const fn as_bytes(self) -> &'static [u8; 8] {
        match self {
            HeaderCookie::Normal => b"cxsparse",
            HeaderCookie::Dirty => b"cowdirty",
        }
    }

    /// The cookie for its eight bytes, if they are one.
    pub fn from_bytes(bytes: &[u8; 8]) -> Option<Self> {
        [HeaderCookie::Normal, HeaderCookie::Dirty].into_iter().find(|cookie| cookie.as_bytes() == bytes)
    }
}

/// The dynamic header of a dynamic or differencing disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DynamicHeader {
    /// Normal, or dirty while the journal is ahead of the file.
    pub cookie: HeaderCookie,
    /// Unused by the format: all ones.
    pub data_offset: u64,
    /// Byte offset of the BAT in the file, a multiple of 512.
    pub table_offset: u64,
    /// Version of the format: major in the upper 16 bits, minor in the lower.
    pub version: u32,
    /// Entries in the BAT: at least one for each block of the disk.
    pub max_table_entries: u32,
    /// Bytes of data in a block, without its bitmap: a power of two from 512 to 1 GiB.
    pub block_size: u32,
    /// The parent's unique id; zero on a dynamic disk.
    pub parent_unique_id: UniqueId,
    /// When the parent's file was last modified; zero on a dynamic disk, and in files that Windows writes.
    pub parent_timestamp: Timestamp,
    /// Zero by the specification: kept as found.
    pub reserved1: u32,
    /// The parent's file name or path, UTF-16 units, padded with zeros. See [`DynamicHeader::parent_name_units`].
    pub parent_name: [u16; 256],
    /// Where the parent may be found; zero on a dynamic disk.
    pub locators: [ParentLocator; 8],
    /// Zero by the specification: kept as found.
    pub reserved2: [u8; 256],
}

impl DynamicHeader {
    /// Bytes of a dynamic header.
    pub const SIZE: usize = 1024;

    /// A new header of a dynamic disk without parent: BAT at `table_offset` (bytes, a multiple of 512) with
    /// `max_table_entries` entries, blocks of `block_size` bytes.
    pub fn new(table_offset: u64, max_table_entries: u32, block_size: u32) -> Self {
        DynamicHeader {
            cookie: HeaderCookie::Normal,
            data_offset: u64::MAX,
            table_offset,
            version: VERSION,
            max_table_entries,
            block_size,
            parent_unique_id: UniqueId::default(),
            parent_timestamp: Timestamp::default(),
            reserved1: 0,
            parent_name: [0; 256],
            locators: [ParentLocator::default(); 8],
            reserved2: [0; 256],
        }
    }

    /// Reads a dynamic header of 1024 bytes.
    ///
    /// # Errors
    ///
    /// Names the first field that is wrong: `cookie`, then `checksum`, `version` (major other than 1),
    /// `table offset` (zero, or not on a sector), `max table entries` (zero), `block size` (not a power of two from
    /// 512 to 1 GiB). Whether these fit the footer is for [`validate_geometry`](super::validate_geometry).
    pub fn parse(bytes: &[u8]) -> Result<DynamicHeader, FormatError> {
        let raw = RawDynamicHeader::read_from_bytes(bytes)
            .map_err(|_| FormatError::new(STRUCTURE, "length", 0, bytes.len(), "1024 bytes"))?;

        let Some(cookie) = HeaderCookie::from_bytes(&raw.cookie) else {
            let expected = "\"cxsparse\" (or \"cowdirty\")";
            return Err(wrong("cookie", offset_of!(RawDynamicHeader, cookie), quoted(&raw.cookie), expected));
        };
        let checksum = checksum(bytes, offset_of!(RawDynamicHeader, checksum));
        if raw.checksum != checksum {
            let (found, expected) = (format!("{:#010x}", raw.checksum), format!("{checksum:#010x}"));
            return Err(wrong("checksum", offset_of!(RawDynamicHeader, checksum), found, expected));
        }
        if raw.version.get() >> 16 != VERSION >> 16 {
            let found = format!("{:#010x}", raw.version);
            return Err(wrong("version", offset_of!(RawDynamicHeader, version), found, "0x00010000"));
        }
        let table_offset = raw.table_offset.get();
        if table_offset == 0 || !table_offset.is_multiple_of(SECTOR) {
            let expected = "a multiple of 512 above zero";
            return Err(wrong_table_offset(table_offset, expected));
        }
        if raw.max_table_entries == 0 {
            return Err(wrong_table_entries(0, "at least 1"));
        }
        let block_size = raw.block_size.get();
        if !block_size.is_power_of_two() || !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&block_size) {
            let expected = "a power of two from 512 bytes to 1 GiB";
            let offset = offset_of!(RawDynamicHeader, block_size);
            return Err(wrong("block size", offset, block_size, expected));
        }

        Ok(DynamicHeader {
            cookie,
            data_offset: raw.data_offset.get(),
            table_offset,
            version: raw.version.get(),
            max_table_entries: raw.max_table_entries.get(),
            block_size,
            parent_unique_id: UniqueId(raw.parent_unique_id),
            parent_timestamp: Timestamp(raw.parent_timestamp.get()),
            reserved1: raw.reserved1.get(),
            parent_name: raw.parent_name.map(U16::get),
            locators: raw.locators.map(ParentLocator::from_raw),
            reserved2: raw.reserved2,
        })
    }

    /// The header as it stands in the file, with its checksum.
    pub fn to_bytes(&self) -> [u8; DynamicHeader::SIZE] {
        let mut raw = RawDynamicHeader {
            cookie: *self.cookie.as_bytes(),
            data_offset: self.data_offset.into(),
            table_offset: self.table_offset.into(),
            version: self.version.into(),
            max_table_entries: self.max_table_entries.into(),
            block_size: self.block_size.into(),
            checksum: U32::ZERO,
            parent_unique_id: self.parent_unique_id.0,
            parent_timestamp: self.parent_timestamp.0.into(),
            reserved1: self.reserved1.into(),
            parent_name: self.parent_name.map(U16::new),
            locators: self.locators.map(ParentLocator::to_raw),
            reserved2: self.reserved2,
        };
        raw.checksum = checksum(raw.as_bytes(), offset_of!(RawDynamicHeader, checksum)).into();
        zerocopy::transmute!(raw)
    }

    /// The parent's name up to its terminating zero, as UTF-16 units, surrogates paired or not. Usually a file name,
    /// from Windows also a full path; [`ParentPath::from_units`](super::ParentPath::from_units) reads it.
    pub fn parent_name_units(&self) -> &[u16] {
        let end = self.parent_name.iter().position(|&unit| unit == 0).unwrap_or(self.parent_name.len());
        &self.parent_name[..end]
    }

    /// Sets the parent's name from UTF-16 units.
    ///
    /// # Errors
    ///
    /// Field `parent name`, if it is longer than 255 units or holds a zero; the name is then unchanged.
    pub fn set_parent_name(&mut self, units: &[u16]) -> Result<(), FormatError> {
        let offset = offset_of!(RawDynamicHeader, parent_name);
        if units.len() >= self.parent_name.len() {
            let found = format!("{} UTF-16 units", units.len());
            return Err(wrong("parent name", offset, found, "at most 255 UTF-16 units"));
        }
        if units.contains(&0) {
            return Err(wrong("parent name", offset, "a name with a zero in it", "a name without"));
        }
        self.parent_name.fill(0);
        self.parent_name[..units.len()].copy_from_slice(units);
        Ok(())
    }

    /// Byte offset in this structure of the locator with that index.
    pub(crate) fn locator_offset(index: usize) -> u64 {
        (offset_of!(RawDynamicHeader, locators) + index * size_of::<RawLocator>()) as u64
    }

    /// The bytes of the file that the BAT covers, padding included; `None` if they end beyond all files.
    pub(super) fn table_range(&self) -> Option<std::ops::Range<u64>> {
        let end = self.table_offset.checked_add(bat_bytes(self.max_table_entries))?;
        (end <= super::MAX_FILE_OFFSET).then_some(self.table_offset..end)
    }
}

/// An error for the table offset, also for checks against other structures.
pub(super) fn wrong_table_offset(found: u64, expected: &str) -> FormatError {
    wrong("table offset", offset_of!(RawDynamicHeader, table_offset), found, expected)
}

/// An error for the number of BAT entries, also for checks against other structures.
pub(super) fn wrong_table_entries(found: u32, expected: &str) -> FormatError {
    wrong("max table entries", offset_of!(RawDynamicHeader, max_table_entries), found, expected)
}

fn wrong(field: &'static str, offset: usize, found: impl Display, expected: impl Display) -> FormatError {
    FormatError::new(STRUCTURE, field, offset as u64, found, expected)
}
