//! Journal entries and the records in them (FORMAT.md, "Journal").
//!
//! An entry starts and ends on a page of the ring: a header of [`ENTRY_HEADER_BYTES`], then records, each a multiple of
//! 8 bytes, then zeros. Its CRC starts from the session id, which no guest ever sees: bytes that a guest wrote into a data
//! record can never pass for an entry, nor can an entry of an older lap or session.

use super::place::{MAX_COUNTER, PAGE_BYTES};
use crate::defect::{self, Defect};
use crate::error::FormatError;
use std::mem::{offset_of, size_of};
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 8] = *b"cowvhdJE";
const NAME: &str = "journal entry";
/// Size of an entry's header, in bytes.
pub const ENTRY_HEADER_BYTES: usize = 96;
const CRC_OFFSET: usize = 92;

/// The random name of one dirty open or one recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SessionId(pub [u8; 16]);

/// The first entry that still counts, by sequence and by place in the ring in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tail {
    /// The entry's sequence.
    pub sequence: u64,
    /// Where it starts, in bytes from the start of the ring.
    pub place: u64,
}

impl Tail {
    /// Where a session starts.
    pub const FIRST: Tail = Tail { sequence: 1, place: 0 };
}

/// What an entry is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// Holds records.
    Records,
    /// Fills the rest of a lap; only its first page is written and covered by the CRC.
    Filler,
}

/// An entry's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryHeader {
    /// Records or filler.
    pub kind: EntryKind,
    /// Bytes from this entry to the next, a multiple of the page.
    pub length: u64,
    /// The session that wrote it.
    pub session: SessionId,
    /// 1 for the first entry of a session, then one more for each.
    pub sequence: u64,
    /// Where the entry starts, in bytes from the start of the ring.
    pub place: u64,
    /// The CRC of the entry before; for the first [`session_crc`].
    pub previous_crc: u32,
    /// From where map records count.
    pub meta_tail: Tail,
    /// From where data and zero records count.
    pub data_tail: Tail,
    /// Bytes of records behind the header.
    pub record_bytes: u32,
    /// The CRC of this entry.
    pub crc: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    length: U32,
    kind: U32,
    session: [u8; 16],
    sequence: U64,
    place: U64,
    meta_sequence: U64,
    meta_place: U64,
    data_sequence: U64,
    data_place: U64,
    record_bytes: U32,
    previous_crc: U32,
    reserved: U32,
    crc: U32,
}

const _: () = {
    assert!(size_of::<RawHeader>() == ENTRY_HEADER_BYTES);
    assert!(offset_of!(RawHeader, length) == 8);
    assert!(offset_of!(RawHeader, kind) == 12);
    assert!(offset_of!(RawHeader, session) == 16);
    assert!(offset_of!(RawHeader, sequence) == 32);
    assert!(offset_of!(RawHeader, place) == 40);
    assert!(offset_of!(RawHeader, meta_sequence) == 48);
    assert!(offset_of!(RawHeader, meta_place) == 56);
    assert!(offset_of!(RawHeader, data_sequence) == 64);
    assert!(offset_of!(RawHeader, data_place) == 72);
    assert!(offset_of!(RawHeader, record_bytes) == 80);
    assert!(offset_of!(RawHeader, previous_crc) == 84);
    assert!(offset_of!(RawHeader, reserved) == 88);
    assert!(offset_of!(RawHeader, crc) == CRC_OFFSET);
    assert!(size_of::<RawRecord>() == 32);
    assert!(offset_of!(RawRecord, length) == 4);
    assert!(offset_of!(RawRecord, block) == 8);
    assert!(offset_of!(RawRecord, slot) == 12);
    assert!(offset_of!(RawRecord, allocation) == 16);
    assert!(offset_of!(RawRecord, first_sector) == 24);
    assert!(offset_of!(RawRecord, sectors) == 28);
};

const KIND_RECORDS: u32 = 1;
const KIND_FILLER: u32 = 2;

/// One change. A slot is named as in the BAT: the sector of the file at which the block's bitmap starts. Sectors within a
/// block count from the block's first data sector; all sectors are 512 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record<'a> {
    /// Block `block` now lives in `slot`; its bitmap is all ones or all zeros.
    Alloc {
        /// Index in the BAT.
        block: u32,
        /// The slot.
        slot: u32,
        /// The allocation's sequence.
        allocation: u64,
        /// Whether the whole bitmap is set.
        bitmap_set: bool,
    },
    /// Block `block` no longer lives in `slot`; it is not allocated.
    Free {
        /// Index in the BAT.
        block: u32,
        /// The slot it lived in.
        slot: u32,
    },
    /// A run of bitmap bits of the slot is set.
    Bits {
        /// The slot.
        slot: u32,
        /// The sequence of the allocation it belongs to.
        allocation: u64,
        /// First sector.
        first_sector: u32,
        /// Number of sectors.
        sectors: u32,
    },
    /// Guest data.
    Data {
        /// The slot.
        slot: u32,
        /// The sequence of the allocation it belongs to.
        allocation: u64,
        /// First sector.
        first_sector: u32,
        /// The data: a whole number of sectors.
        bytes: &'a [u8],
    },
    /// Guest data that is all zeros.
    Zero {
        /// The slot.
        slot: u32,
        /// The sequence of the allocation it belongs to.
        allocation: u64,
        /// First sector.
        first_sector: u32,
        /// Number of sectors.
        sectors: u32,
    },
    /// The exact bytes of metadata at a place in the file.
    Image {
        /// File offset in bytes, a multiple of 512.
        offset: u64,
        /// At most a page, a multiple of 512.
        bytes: &'a [u8],
    },
}

/// All records share one shape; `offset` of an image lies over `block` and `slot`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecord {
    kind: U16,
    flags: U16,
    length: U32,
    block: U32,
    slot: U32,
    allocation: U64,
    first_sector: U32,
    sectors: U32,
}

const RECORD_BYTES: usize = size_of::<RawRecord>();
const RECORD_ALLOC: u16 = 1;
const RECORD_FREE: u16 = 2;
const RECORD_BITS: u16 = 3;
const RECORD_DATA: u16 = 4;
const RECORD_ZERO: u16 = 5;
const RECORD_IMAGE: u16 = 6;
const FLAG_BITMAP_SET: u16 = 1;
const SECTOR: usize = 512;

impl Record<'_> {
    /// Bytes of a record without data.
    pub const HEADER_BYTES: usize = RECORD_BYTES;

    /// Bytes this record takes in an entry.
    pub fn encoded_bytes(&self) -> usize {
        match self {
            Record::Data { bytes, .. } | Record::Image { bytes, .. } => RECORD_BYTES + bytes.len(),
            _ => RECORD_BYTES,
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let (kind, flags, block, slot, allocation, first_sector, sectors, bytes): (
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            &[u8],
        ) = match *self {
            Record::Alloc { block, slot, allocation, bitmap_set } => {
                let flags = if bitmap_set { FLAG_BITMAP_SET } else { 0 };
                (RECORD_ALLOC, flags, block, slot, allocation, 0, 0, &[])
            }
            Record::Free { block, slot } => (RECORD_FREE, 0, block, slot, 0, 0, 0, &[]),
            Record::Bits { slot, allocation, first_sector, sectors } => {
                (RECORD_BITS, 0, 0, slot, allocation, first_sector, sectors, &[])
            }
            Record::Data { slot, allocation, first_sector, bytes } => {
                (RECORD_DATA, 0, 0, slot, allocation, first_sector, sectors_of(bytes), bytes)
            }
            Record::Zero { slot, allocation, first_sector, sectors } => {
                (RECORD_ZERO, 0, 0, slot, allocation, first_sector, sectors, &[])
            }
            Record::Image { offset, bytes } => {
                let (high, low) = ((offset >> 32) as u32, offset as u32);
                (RECORD_IMAGE, 0, high, low, 0, 0, sectors_of(bytes), bytes)
            }
        };
        let raw = RawRecord {
            kind: kind.into(),
            flags: flags.into(),
            length: (self.encoded_bytes() as u32).into(),
            block: block.into(),
            slot: slot.into(),
            allocation: allocation.into(),
            first_sector: first_sector.into(),
            sectors: sectors.into(),
        };
        out.extend_from_slice(raw.as_bytes());
        out.extend_from_slice(bytes);
    }
}

fn sectors_of(bytes: &[u8]) -> u32 {
    (bytes.len() / SECTOR) as u32
}

/// The CRC that the first entry of a session names as that of its predecessor.
pub fn session_crc(session: SessionId) -> u32 {
    crc32fast::hash(&session.0)
}

/// The CRC of an entry's bytes (its own field counts as zero), starting from the session id.
pub fn entry_crc(session: SessionId, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&session.0);
    hasher.update(bytes.get(..CRC_OFFSET).unwrap_or_default());
    hasher.update(&[0; 4]);
    hasher.update(bytes.get(ENTRY_HEADER_BYTES..).unwrap_or_default());
    hasher.finalize()
}

/// Writes an entry of `records` into `out` (which is cleared): length, record length and CRC of `header` are filled in,
/// and the finished header is returned.
pub fn write_entry(header: EntryHeader, records: &[Record<'_>], out: &mut Vec<u8>) -> EntryHeader {
    out.clear();
    out.resize(ENTRY_HEADER_BYTES, 0);
    for record in records {
        record.encode(out);
    }
    let record_bytes = (out.len() - ENTRY_HEADER_BYTES) as u32;
    out.resize(out.len().next_multiple_of(PAGE_BYTES as usize), 0);
    let header = EntryHeader { kind: EntryKind::Records, length: out.len() as u64, record_bytes, ..header };
    seal(header, out)
}

/// Writes a filler of `length` bytes into `out` (which is cleared): only its first page.
pub fn write_filler(header: EntryHeader, length: u64, out: &mut Vec<u8>) -> EntryHeader {
    out.clear();
    out.resize(PAGE_BYTES as usize, 0);
    seal(EntryHeader { kind: EntryKind::Filler, length, record_bytes: 0, ..header }, out)
}

fn seal(mut header: EntryHeader, out: &mut [u8]) -> EntryHeader {
    let mut raw = RawHeader {
        magic: MAGIC,
        length: (header.length as u32).into(),
        kind: match header.kind {
            EntryKind::Records => KIND_RECORDS.into(),
            EntryKind::Filler => KIND_FILLER.into(),
        },
        session: header.session.0,
        sequence: header.sequence.into(),
        place: header.place.into(),
        meta_sequence: header.meta_tail.sequence.into(),
        meta_place: header.meta_tail.place.into(),
        data_sequence: header.data_tail.sequence.into(),
        data_place: header.data_tail.place.into(),
        record_bytes: header.record_bytes.into(),
        previous_crc: header.previous_crc.into(),
        reserved: 0.into(),
        crc: 0.into(),
    };
    copy_header(&raw, out);
    header.crc = entry_crc(header.session, out);
    raw.crc = header.crc.into();
    copy_header(&raw, out);
    header
}

fn copy_header(raw: &RawHeader, out: &mut [u8]) {
    if let Some(head) = out.get_mut(..ENTRY_HEADER_BYTES) {
        head.copy_from_slice(raw.as_bytes());
    }
}

/// Reads the entry of `session` at `place`, `bytes` being the ring from there to its end. `None` where no valid entry of
/// that session stands there.
pub fn parse_entry_header(session: SessionId, place: u64, bytes: &[u8]) -> Option<EntryHeader> {
    let raw = RawHeader::ref_from_bytes(bytes.get(..ENTRY_HEADER_BYTES)?).ok()?;
    if raw.magic != MAGIC || raw.session != session.0 || raw.place.get() != place {
        return None;
    }
    let length = raw.length.get() as usize;
    if length == 0 || !(length as u64).is_multiple_of(PAGE_BYTES) || length > bytes.len() {
        return None;
    }
    let (kind, covered) = match raw.kind.get() {
        KIND_RECORDS => (EntryKind::Records, length),
        KIND_FILLER => (EntryKind::Filler, PAGE_BYTES as usize),
        _ => return None,
    };
    if raw.record_bytes.get() as usize > covered - ENTRY_HEADER_BYTES {
        return None;
    }
    let crc_is_right = entry_crc(session, bytes.get(..covered)?) == raw.crc.get();
    if !crc_is_right && !defect::active(Defect::EntryCrcUnchecked) {
        return None;
    }
    Some(EntryHeader {
        kind,
        length: length as u64,
        session,
        sequence: raw.sequence.get(),
        place,
        previous_crc: raw.previous_crc.get(),
        meta_tail: Tail { sequence: raw.meta_sequence.get(), place: raw.meta_place.get() },
        data_tail: Tail { sequence: raw.data_sequence.get(), place: raw.data_place.get() },
        record_bytes: raw.record_bytes.get(),
        crc: raw.crc.get(),
    })
}

/// Reads the records of an entry whose header was parsed; `entry` starts at the header.
pub fn parse_records<'a>(header: &EntryHeader, entry: &'a [u8]) -> Result<Vec<Record<'a>>, FormatError> {
    let end = ENTRY_HEADER_BYTES + header.record_bytes as usize;
    let mut records = Vec::new();
    let mut at = ENTRY_HEADER_BYTES;
    while at < end {
        let wrong = |field, offset: usize, found: String, expected: &str| {
            FormatError::new(NAME, field, (at + offset) as u64, found, expected)
        };
        let rest = entry.get(at..end).unwrap_or_default();
        let Ok((raw, body)) = RawRecord::ref_from_prefix(rest) else {
            return Err(wrong("record", 0, format!("{} bytes left", rest.len()), "at least 32"));
        };
        let length = raw.length.get() as usize;
        let Some(bytes) = length.checked_sub(RECORD_BYTES).and_then(|n| body.get(..n)) else {
            return Err(wrong("record length", 4, length.to_string(), "32 to the end of the entry"));
        };
        let (block, slot, allocation) = (raw.block.get(), raw.slot.get(), raw.allocation.get());
        let (first_sector, sectors) = (raw.first_sector.get(), raw.sectors.get());
        let payload_fits = bytes.len() == sectors as usize * SECTOR;
        let record = match raw.kind.get() {
            RECORD_ALLOC if allocation > MAX_COUNTER => {
                let (found, expected) = (allocation.to_string(), "at most 2^63 - 1");
                return Err(wrong("record allocation sequence", 16, found, expected));
            }
            RECORD_ALLOC => {
                let bitmap_set = raw.flags.get() & FLAG_BITMAP_SET != 0;
                Record::Alloc { block, slot, allocation, bitmap_set }
            }
            RECORD_FREE => Record::Free { block, slot },
            RECORD_BITS => Record::Bits { slot, allocation, first_sector, sectors },
            RECORD_ZERO => Record::Zero { slot, allocation, first_sector, sectors },
            RECORD_DATA if payload_fits => Record::Data { slot, allocation, first_sector, bytes },
            RECORD_IMAGE if payload_fits && bytes.len() as u64 <= PAGE_BYTES => {
                Record::Image { offset: u64::from(block) << 32 | u64::from(slot), bytes }
            }
            RECORD_DATA | RECORD_IMAGE => {
                let expected = "the number of sectors the record carries";
                return Err(wrong("record sectors", 28, sectors.to_string(), expected));
            }
            other => return Err(wrong("record type", 0, other.to_string(), "1 to 6")),
        };
        records.push(record);
        at += length;
    }
    Ok(records)
}

#[cfg(test)]
mod tests;
