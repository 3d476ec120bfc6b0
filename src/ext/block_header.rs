//! The block header: makes a slot describe itself, so that a lost BAT can be rebuilt (FORMAT.md, "Block page").
//!
//! A slot of ours starts with one page; the VHD sector bitmap is its last bytes, the header its first 64. A header counts
//! only at its own file offset (other tools move blocks without it) and the highest allocation sequence wins.

use super::place::{MAX_COUNTER, PAGE_BYTES};
use crate::error::FormatError;
use crate::vhd::UniqueId;
use std::mem::{offset_of, size_of};
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 8] = *b"cowvhdBL";
const NAME: &str = "block header";

/// Which block a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockHeader {
    /// File offset of the page this header stands in, in bytes.
    pub page_offset: u64,
    /// The footer's unique id.
    pub disk_id: UniqueId,
    /// Index of the block in the BAT.
    pub block: u32,
    /// The allocation's sequence: grows with every allocation of the disk.
    pub allocation: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBlockHeader {
    magic: [u8; 8],
    page_offset: U64,
    disk_id: [u8; 16],
    block: U32,
    reserved: U32,
    allocation: U64,
    reserved2: [u8; 12],
    crc: U32,
}

const _: () = {
    assert!(size_of::<RawBlockHeader>() == BlockHeader::SIZE);
    assert!(offset_of!(RawBlockHeader, page_offset) == 8);
    assert!(offset_of!(RawBlockHeader, disk_id) == 16);
    assert!(offset_of!(RawBlockHeader, block) == 32);
    assert!(offset_of!(RawBlockHeader, reserved) == 36);
    assert!(offset_of!(RawBlockHeader, allocation) == 40);
    assert!(offset_of!(RawBlockHeader, reserved2) == 48);
    assert!(offset_of!(RawBlockHeader, crc) == CRC_OFFSET);
};

const CRC_OFFSET: usize = 60;

impl BlockHeader {
    /// Size on disk, in bytes.
    pub const SIZE: usize = 64;

    /// Reads the header at the start of a block page. `Ok(None)` where there is none (no magic): a block that another
    /// program allocated, or a slot that was never written.
    pub fn parse(page: &[u8]) -> Result<Option<Self>, FormatError> {
        let Some(bytes) = page.get(..Self::SIZE) else {
            return Err(FormatError::new(NAME, "length", 0, page.len(), Self::SIZE));
        };
        let Ok(raw) = RawBlockHeader::ref_from_bytes(bytes) else { return Ok(None) };
        if raw.magic != MAGIC {
            return Ok(None);
        }
        let crc = crc32fast::hash(bytes.get(..CRC_OFFSET).unwrap_or_default());
        if raw.crc.get() != crc {
            let found = format!("{:#010x}", raw.crc);
            return Err(FormatError::new(NAME, "CRC", CRC_OFFSET as u64, found, format_args!("{crc:#010x}")));
        }
        if raw.allocation.get() > MAX_COUNTER {
            let expected = "at most 2^63 - 1";
            return Err(FormatError::new(NAME, "allocation sequence", 40, raw.allocation, expected));
        }
        Ok(Some(BlockHeader {
            page_offset: raw.page_offset.get(),
            disk_id: UniqueId::from_bytes(raw.disk_id),
            block: raw.block.get(),
            allocation: raw.allocation.get(),
        }))
    }

    /// The whole page: header, zeros, and `bitmap` as its last bytes.
    pub fn to_page(self, bitmap: &[u8]) -> [u8; PAGE_BYTES as usize] {
        let mut raw = RawBlockHeader {
            magic: MAGIC,
            page_offset: self.page_offset.into(),
            disk_id: *self.disk_id.as_bytes(),
            block: self.block.into(),
            reserved: 0.into(),
            allocation: self.allocation.into(),
            reserved2: [0; 12],
            crc: 0.into(),
        };
        raw.crc = crc32fast::hash(raw.as_bytes().get(..CRC_OFFSET).unwrap_or_default()).into();
        let mut page = [0; PAGE_BYTES as usize];
        if let Some(head) = page.get_mut(..Self::SIZE) {
            head.copy_from_slice(raw.as_bytes());
        }
        let start = page.len().saturating_sub(bitmap.len());
        if let Some(tail) = page.get_mut(start..) {
            tail.copy_from_slice(bitmap);
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> BlockHeader {
        BlockHeader {
            page_offset: 0x700000,
            disk_id: UniqueId::from_bytes([0x10; 16]),
            block: 5,
            allocation: 9,
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let page = sample().to_page(&[0xff; 512]);
        assert_eq!(BlockHeader::parse(&page), Ok(Some(sample())));
        assert!(
            page[4096 - 512..].iter().all(|&b| b == 0xff) && page[64..4096 - 512].iter().all(|&b| b == 0)
        );
        assert_eq!(BlockHeader::parse(&[0; 4096]), Ok(None));
        for byte in 8..64 {
            let mut bad = page;
            bad[byte] ^= 1;
            assert!(BlockHeader::parse(&bad).is_err(), "byte {byte}");
        }
    }

    #[test]
    fn what_is_no_header_and_what_is_a_bad_one() {
        let page = sample().to_page(&[]);
        // Without the magic there is none; with it, everything has to be right.
        for byte in 0..8 {
            let mut other = page;
            other[byte] ^= 1;
            assert_eq!(BlockHeader::parse(&other), Ok(None));
        }
        for length in [0, 63] {
            assert_eq!(BlockHeader::parse(&page[..length]).unwrap_err().field, "length");
        }
        assert_eq!(BlockHeader::parse(&page[..64]), Ok(Some(sample())));
        for (allocation, legal) in
            [(0, true), (MAX_COUNTER, true), (MAX_COUNTER + 1, false), (u64::MAX, false)]
        {
            let header = BlockHeader { allocation, ..sample() };
            match BlockHeader::parse(&header.to_page(&[0xff; 512])) {
                Ok(read) => assert!(legal && read == Some(header)),
                Err(error) => {
                    assert!(!legal, "{error}");
                    assert_eq!((error.field, error.offset), ("allocation sequence", 40));
                }
            }
        }
    }

    /// The golden vector of FORMAT.md.
    #[test]
    fn golden_vector() {
        let hex: String = sample().to_page(&[])[..64].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            concat!(
                "636f77766864424c",
                "0000000000700000",
                "10101010101010101010101010101010",
                "00000005",
                "00000000",
                "0000000000000009",
                "000000000000000000000000",
                "8e4bf9f5",
            )
        );
    }
}
