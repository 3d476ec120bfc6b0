//! The registry of children, as bytes (FORMAT.md, "Child registry").
//!
//! A parent names every image that was made over it, so that nobody takes it away under them. The list is kept twice; each
//! change writes the whole list over the older copy, and the valid copy with the higher sequence counts.

use super::place::{LOCATORS_END, PAGE_BYTES, RING_OFFSET};
use crate::error::FormatError;
use crate::vhd::UniqueId;
use std::mem::{offset_of, size_of};
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 8] = *b"cowvhdRG";
const NAME: &str = "child registry";

/// Bytes kept for each copy.
pub const REGISTRY_BYTES: usize = 96 * 1024;

/// File offsets of the two copies: right in front of the ring. `None` where an image has no room for them.
pub fn registry_offsets(ring_offset: u64) -> Option<[u64; 2]> {
    let second = ring_offset.checked_sub(REGISTRY_BYTES as u64)?;
    let first = second.checked_sub(REGISTRY_BYTES as u64)?;
    (first >= LOCATORS_END).then_some([first, second])
}

/// An image made over this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Child {
    /// Its unique id.
    pub id: UniqueId,
    /// Its path from the folder of this image, as bytes.
    pub path: Vec<u8>,
}

/// The children of an image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Registry {
    /// Counts the writes; the higher of the two copies is the current one.
    pub sequence: u64,
    /// The children, in no order.
    pub children: Vec<Child>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    sequence: U64,
    disk_id: [u8; 16],
    count: U32,
    bytes: U32,
    reserved: [u8; 20],
    crc: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawChild {
    id: [u8; 16],
    flags: U16,
    path_bytes: U16,
}

const HEADER_BYTES: usize = size_of::<RawHeader>();
const CRC_OFFSET: usize = 60;

const _: () = {
    assert!(HEADER_BYTES == 64);
    assert!(offset_of!(RawHeader, sequence) == 8);
    assert!(offset_of!(RawHeader, disk_id) == 16);
    assert!(offset_of!(RawHeader, count) == 32);
    assert!(offset_of!(RawHeader, bytes) == 36);
    assert!(offset_of!(RawHeader, reserved) == 40);
    assert!(offset_of!(RawHeader, crc) == CRC_OFFSET);
    assert!(size_of::<RawChild>() == 20);
    assert!(offset_of!(RawChild, flags) == 16);
    assert!(offset_of!(RawChild, path_bytes) == 18);
    // Both fit between the locators and the ring of a new image.
    assert!(LOCATORS_END + 2 * REGISTRY_BYTES as u64 == RING_OFFSET);
};

impl Registry {
    /// Reads one copy of the registry of the disk `disk_id`. `bytes` is all the room of the copy.
    pub fn parse(bytes: &[u8], disk_id: UniqueId) -> Result<Self, FormatError> {
        let wrong = |field, offset: usize, found: String, expected: String| {
            Err(FormatError::new(NAME, field, offset as u64, found, expected))
        };
        let Some((head, body)) = bytes.split_at_checked(HEADER_BYTES) else {
            return wrong("length", 0, bytes.len().to_string(), format!("at least {HEADER_BYTES}"));
        };
        let Ok(raw) = RawHeader::ref_from_bytes(head) else {
            return wrong("length", 0, bytes.len().to_string(), format!("at least {HEADER_BYTES}"));
        };
        if raw.magic != MAGIC {
            return wrong("magic", 0, format!("{:02x?}", raw.magic), "cowvhdRG".into());
        }
        if raw.disk_id != *disk_id.as_bytes() {
            let found = UniqueId::from_bytes(raw.disk_id).to_string();
            return wrong("disk id", 16, found, disk_id.to_string());
        }
        let Some(mut rest) = body.get(..raw.bytes.get() as usize) else {
            return wrong("bytes", 36, raw.bytes.to_string(), format!("at most {}", body.len()));
        };
        let crc = registry_crc(head, rest);
        if raw.crc.get() != crc {
            return wrong("CRC", CRC_OFFSET, format!("{:#010x}", raw.crc), format!("{crc:#010x}"));
        }
        let mut children = Vec::new();
        while !rest.is_empty() {
            let at = HEADER_BYTES + raw.bytes.get() as usize - rest.len();
            let child = RawChild::ref_from_prefix(rest).ok();
            let child = child.and_then(|(raw, behind)| {
                let (path, behind) = behind.split_at_checked(raw.path_bytes.get().into())?;
                Some((Child { id: UniqueId::from_bytes(raw.id), path: path.to_vec() }, behind))
            });
            let Some((child, behind)) = child else {
                return wrong("child", at, format!("{} bytes left", rest.len()), "a whole child".into());
            };
            children.push(child);
            rest = behind;
        }
        if children.len() != raw.count.get() as usize {
            return wrong("count", 32, raw.count.to_string(), children.len().to_string());
        }
        Ok(Registry { sequence: raw.sequence.get(), children })
    }

    /// The copy as it is written, whole pages long; `None` where it does not fit.
    pub fn to_bytes(&self, disk_id: UniqueId) -> Option<Vec<u8>> {
        let mut bytes = vec![0; HEADER_BYTES];
        for child in &self.children {
            let raw = RawChild {
                id: *child.id.as_bytes(),
                flags: 0.into(),
                path_bytes: u16::try_from(child.path.len()).ok()?.into(),
            };
            bytes.extend_from_slice(raw.as_bytes());
            bytes.extend_from_slice(&child.path);
        }
        let mut raw = RawHeader {
            magic: MAGIC,
            sequence: self.sequence.into(),
            disk_id: *disk_id.as_bytes(),
            count: u32::try_from(self.children.len()).ok()?.into(),
            bytes: u32::try_from(bytes.len() - HEADER_BYTES).ok()?.into(),
            reserved: [0; 20],
            crc: 0.into(),
        };
        raw.crc = registry_crc(raw.as_bytes(), bytes.get(HEADER_BYTES..)?).into();
        bytes.get_mut(..HEADER_BYTES)?.copy_from_slice(raw.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(PAGE_BYTES as usize), 0);
        (bytes.len() <= REGISTRY_BYTES).then_some(bytes)
    }
}

fn registry_crc(head: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head.get(..CRC_OFFSET).unwrap_or_default());
    hasher.update(body);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(byte: u8) -> UniqueId {
        UniqueId::from_bytes([byte; 16])
    }

    fn sample() -> Registry {
        let child = |byte, path: &str| Child { id: id(byte), path: path.into() };
        Registry { sequence: 3, children: vec![child(1, "vm.vhd"), child(2, "../clones/a.vhd")] }
    }

    #[test]
    fn what_is_written_is_read_back_and_bounded() {
        let bytes = sample().to_bytes(id(9)).unwrap();
        assert_eq!(bytes.len(), 4096);
        assert_eq!(Registry::parse(&bytes, id(9)), Ok(sample()));
        assert_eq!(Registry::parse(&bytes, id(8)).unwrap_err().field, "disk id");
        for byte in 0..HEADER_BYTES + 40 {
            let mut bad = bytes.clone();
            bad[byte] ^= 0x10;
            assert!(Registry::parse(&bad, id(9)).is_err(), "byte {byte}");
        }
        assert!(Registry::parse(&[0; 10], id(9)).is_err());
        let many = vec![Child { id: id(1), path: vec![b'x'; 1000] }; 97];
        assert_eq!(Registry { sequence: 1, children: many }.to_bytes(id(9)), None);
    }

    #[test]
    fn errors_name_the_field_and_its_place() {
        let bytes = sample().to_bytes(id(9)).unwrap();
        let with = |at: usize, with: &[u8], mend: bool| {
            let mut bad = bytes.clone();
            bad[at..at + with.len()].copy_from_slice(with);
            if mend {
                let end = HEADER_BYTES + u32::from_be_bytes(bad[36..40].try_into().unwrap()) as usize;
                let crc = registry_crc(&bad[..HEADER_BYTES], &bad[HEADER_BYTES..end]);
                bad[CRC_OFFSET..HEADER_BYTES].copy_from_slice(&crc.to_be_bytes());
            }
            let error = Registry::parse(&bad, id(9)).unwrap_err();
            (error.field, error.offset)
        };
        assert_eq!(with(0, b"COWvhdRG", true), ("magic", 0));
        assert_eq!(with(16, &[8; 16], true), ("disk id", 16));
        assert_eq!(with(36, &4033_u32.to_be_bytes(), false), ("bytes", 36));
        assert_eq!(with(36, &[0xff; 4], false), ("bytes", 36));
        assert_eq!(with(60, &[0; 4], false), ("CRC", 60));
        assert_eq!(with(32, &[0, 0, 0, 3], true), ("count", 32));
        // Each child is whole: its head, and its path.
        assert_eq!(with(36, &[0, 0, 0, 19], true), ("child", 64));
        assert_eq!(with(36, &[0, 0, 0, 25], true), ("child", 64));
        assert_eq!(with(36, &[0, 0, 0, 26 + 34], true), ("child", 64 + 26));
        assert_eq!(with(64 + 26 + 18, &[0, 16], true), ("child", 64 + 26));
        let short = |length| Registry::parse(&bytes[..length], id(9)).unwrap_err();
        assert_eq!((short(0).field, short(63).field, short(64).field), ("length", "length", "bytes"));
        let empty = Registry::default().to_bytes(id(9)).unwrap();
        assert_eq!(Registry::parse(&empty[..64], id(9)), Ok(Registry::default()));
    }

    #[test]
    fn a_copy_may_fill_its_room_to_the_last_byte() {
        let child = |bytes| Child { id: id(1), path: vec![b'x'; bytes] };
        let of = |children| Registry { sequence: 1, children };
        let full = of(vec![child(65_535), child(REGISTRY_BYTES - 64 - 20 - 65_535 - 20)]);
        let bytes = full.to_bytes(id(9)).unwrap();
        assert_eq!((bytes.len(), Registry::parse(&bytes, id(9))), (REGISTRY_BYTES, Ok(full)));
        assert_eq!(
            of(vec![child(65_535), child(REGISTRY_BYTES - 64 - 20 - 65_535 - 19)]).to_bytes(id(9)),
            None
        );
        assert_eq!(of(vec![child(65_536)]).to_bytes(id(9)), None);
    }

    #[test]
    fn the_copies_stand_in_front_of_the_ring() {
        assert_eq!(registry_offsets(RING_OFFSET), Some([65536, 163_840]));
        assert_eq!(registry_offsets(RING_OFFSET - 4096), None);
        assert_eq!(registry_offsets(16384), None);
    }

    /// The golden vector of FORMAT.md.
    #[test]
    fn golden_vector() {
        let bytes = sample().to_bytes(id(0x10)).unwrap();
        let hex: String = bytes[..125].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            concat!(
                "636f777668645247",
                "0000000000000003",
                "10101010101010101010101010101010",
                "00000002",
                "0000003d",
                "0000000000000000000000000000000000000000",
                "8c4b21c4",
                "0101010101010101010101010101010100000006",
                "766d2e766864",
                "020202020202020202020202020202020000000f",
                "2e2e2f636c6f6e65732f612e766864",
            )
        );
        assert!(bytes[125..].iter().all(|&b| b == 0));
    }
}
