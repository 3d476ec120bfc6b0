//! The CRCs of a sealed layer's data: where they lie, and one page of them (FORMAT.md, "Data CRCs").
//!
//! A sequence of 32-bit words, 1016 in a page: for each allocated block, in the order of the BAT, the CRC-32 of its sector
//! bitmap, then a word for each 4 KiB unit of its data. A page counts by its own CRC and the seal that it names; one of zeros
//! was not written yet.

use super::lineage::SealId;
use super::place::{PAGE_BYTES, Placement};
use crate::error::FormatError;
use std::mem::{offset_of, size_of};
use zerocopy::big_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 8] = *b"cowvhdCR";
const NAME: &str = "page of data CRCs";
/// Words in a page.
pub const CRC_WORDS: usize = 1016;
const CRC_OFFSET: usize = 28;
/// Where the words begin.
const WORDS_OFFSET: usize = 32;

/// The room in which the CRCs of a sealed layer's data stand; empty where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DataCrcs {
    /// File offset in bytes: behind the last slot.
    pub offset: u64,
    /// Its length in pages.
    pub pages: u32,
}

impl DataCrcs {
    /// The room that `blocks` allocated blocks need, from `offset` on.
    pub fn new(place: &Placement, blocks: u64, offset: u64) -> Self {
        let pages = (blocks * words_per_block(place)).div_ceil(CRC_WORDS as u64);
        match u32::try_from(pages) {
            Ok(pages) if pages > 0 => DataCrcs { offset, pages },
            _ => DataCrcs::default(),
        }
    }

    /// Whether there is any.
    pub fn is_some(&self) -> bool {
        self.pages > 0
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE_BYTES
    }

    /// The file offset behind it.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes())
    }

    /// File offset of a page of it.
    pub fn page_offset(&self, index: u32) -> u64 {
        self.offset.saturating_add(u64::from(index) * PAGE_BYTES)
    }
}

/// Words of one block: its bitmap, and each unit of its data.
pub fn words_per_block(place: &Placement) -> u64 {
    1 + u64::from(place.block_bytes) / PAGE_BYTES
}

/// The word of a unit that is present: its CRC-32, but never the 0 of one that is not.
pub fn unit_word(data: &[u8]) -> u32 {
    match crc32fast::hash(data) {
        0 => u32::MAX,
        crc => crc,
    }
}

/// One page of words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrcPage {
    /// The seal of the layer that they are about.
    pub seal_id: SealId,
    /// Which page it is, from 0.
    pub index: u32,
    /// The words.
    pub words: [u32; CRC_WORDS],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawCrcPage {
    magic: [u8; 8],
    seal_id: [u8; 16],
    index: U32,
    crc: U32,
    words: [U32; CRC_WORDS],
}

const _: () = {
    assert!(size_of::<RawCrcPage>() == PAGE_BYTES as usize);
    assert!(offset_of!(RawCrcPage, seal_id) == 8);
    assert!(offset_of!(RawCrcPage, index) == 24);
    assert!(offset_of!(RawCrcPage, crc) == CRC_OFFSET);
    assert!(offset_of!(RawCrcPage, words) == WORDS_OFFSET);
};

impl CrcPage {
    /// Reads a page. `None` where nothing was written yet. The caller compares seal and index.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, FormatError> {
        let wrong = |field, offset, found: String, expected: &str| {
            Err(FormatError::new(NAME, field, offset, found, expected))
        };
        let Ok(raw) = RawCrcPage::ref_from_bytes(bytes) else {
            return wrong("length", 0, bytes.len().to_string(), "4096 bytes");
        };
        if bytes.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        if raw.magic != MAGIC {
            return wrong("magic", 0, format!("{:02x?}", raw.magic), "cowvhdCR");
        }
        let crc = page_crc(bytes);
        if raw.crc.get() != crc {
            return wrong("CRC", CRC_OFFSET as u64, format!("{:#010x}", raw.crc), &format!("{crc:#010x}"));
        }
        Ok(Some(CrcPage {
            seal_id: SealId(raw.seal_id),
            index: raw.index.get(),
            words: raw.words.map(|word| word.get()),
        }))
    }

    /// The page as it is written.
    pub fn to_bytes(&self) -> [u8; PAGE_BYTES as usize] {
        let mut raw = RawCrcPage {
            magic: MAGIC,
            seal_id: self.seal_id.0,
            index: self.index.into(),
            crc: 0.into(),
            words: self.words.map(U32::from),
        };
        raw.crc = page_crc(raw.as_bytes()).into();
        zerocopy::transmute!(raw)
    }
}

/// CRC-32 of what is in front of the CRC, and of the words.
fn page_crc(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(bytes.get(..CRC_OFFSET).unwrap_or_default());
    hasher.update(bytes.get(WORDS_OFFSET..).unwrap_or_default());
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhd;

    fn sample() -> CrcPage {
        let mut words = [0; CRC_WORDS];
        words[..3].copy_from_slice(&[0x0102_0304, 0, u32::MAX]);
        CrcPage { seal_id: SealId([0xa1; 16]), index: 5, words }
    }

    #[test]
    fn what_is_written_is_read_back_and_any_flipped_bit_is_noticed() {
        let bytes = sample().to_bytes();
        assert_eq!(CrcPage::parse(&bytes), Ok(Some(sample())));
        for byte in 0..bytes.len() {
            let mut bad = bytes;
            bad[byte] ^= 0x10;
            assert!(CrcPage::parse(&bad).is_err(), "byte {byte}");
        }
        assert_eq!(CrcPage::parse(&[0; 4096]), Ok(None));
        assert_eq!(CrcPage::parse(&[0; 4095]).unwrap_err().field, "length");
    }

    #[test]
    fn the_room_is_what_the_blocks_need() {
        let place = Placement::new(1_044_480, vhd::BLOCK_SIZE, 2 << 20);
        assert_eq!(words_per_block(&place), 513);
        assert_eq!(DataCrcs::new(&place, 0, 4096), DataCrcs::default());
        assert_eq!(DataCrcs::new(&place, 1, 4096), DataCrcs { offset: 4096, pages: 1 });
        assert_eq!(DataCrcs::new(&place, 2, 4096).pages, 2);
        let largest = DataCrcs::new(&place, 1_044_480, 1 << 40);
        assert_eq!((largest.pages, largest.end() - (1 << 40)), (527_381, 527_381 * 4096));
        assert_eq!(largest.page_offset(3), (1 << 40) + 3 * 4096);
        assert_eq!(DataCrcs::new(&place, u32::MAX.into(), 0), DataCrcs { offset: 0, pages: 2_168_620_298 });
    }

    #[test]
    fn errors_name_the_field_and_its_place() {
        let mut bytes = sample().to_bytes();
        bytes[0] = b'C';
        let error = CrcPage::parse(&bytes).unwrap_err();
        assert_eq!((error.field, error.offset), ("magic", 0));
        bytes[0] = b'c';
        bytes[CRC_OFFSET] ^= 1;
        let error = CrcPage::parse(&bytes).unwrap_err();
        assert_eq!((error.field, error.offset), ("CRC", 28));
    }

    #[test]
    fn places_do_not_come_round_and_no_word_of_data_is_zero() {
        let last = DataCrcs { offset: u64::MAX - 4096, pages: 2 };
        assert_eq!((last.bytes(), last.end(), last.page_offset(2)), (8192, u64::MAX, u64::MAX));
        assert!(last.is_some() && !DataCrcs::default().is_some());
        assert_eq!(unit_word(b"123456789"), 0xcbf4_3926);
        assert_eq!(unit_word(&[0x9d, 0x0a, 0xd9, 0x6d]), u32::MAX);
    }

    /// The golden vector of FORMAT.md.
    #[test]
    fn golden_vector() {
        let bytes = sample().to_bytes();
        let hex: String = bytes[..44].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            concat!(
                "636f777668644352",
                "a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1",
                "00000005",
                "422bed42",
                "01020304",
                "00000000",
                "ffffffff",
            )
        );
        assert!(bytes[44..].iter().all(|&b| b == 0));
    }
}
