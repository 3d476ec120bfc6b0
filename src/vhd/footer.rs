//! The footer: what the file is, how large, and which disk.
//!
//! Source: VHD specification, "Hard Disk Footer Format".
//!
//! The last 512 bytes of every file; dynamic and differencing files start with an identical copy. Products before
//! Virtual PC 2004 wrote 511 bytes, leaving out the last reserved one.

use std::fmt::Display;
use std::mem::offset_of;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{
    Chs, DiskType, DynamicHeader, MAX_DYNAMIC_SIZE, MAX_FILE_OFFSET, SECTOR, Timestamp, UniqueId, checksum,
    quoted,
};
use crate::FormatError;

const STRUCTURE: &str = "footer";

/// One n in the middle.
const COOKIE: [u8; 8] = *b"conectix";

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFooter {
    cookie: [u8; 8],
    features: U32,
    version: U32,
    data_offset: U64,
    timestamp: U32,
    creator_app: [u8; 4],
    creator_version: U32,
    creator_os: [u8; 4],
    original_size: U64,
    current_size: U64,
    cylinders: U16,
    heads: u8,
    sectors_per_track: u8,
    disk_type: U32,
    checksum: U32,
    unique_id: [u8; 16],
    saved_state: u8,
    reserved: [u8; 427],
}

assert_layout!(RawFooter: 512 {
    cookie @ 0,
    features @ 8,
    version @ 12,
    data_offset @ 16,
    timestamp @ 24,
    creator_app @ 28,
    creator_version @ 32,
    creator_os @ 36,
    original_size @ 40,
    current_size @ 48,
    cylinders @ 56,
    heads @ 58,
    sectors_per_track @ 59,
    disk_type @ 60,
    checksum @ 64,
    unique_id @ 68,
    saved_state @ 84,
    reserved @ 85,
});

/// The footer of a VHD file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footer {
    /// Feature bits: bit 1 is always set by the specification, bit 0 marks a temporary disk.
    pub features: u32,
    /// Version of the format: major in the upper 16 bits, minor in the lower.
    pub version: u32,
    /// Byte offset of the dynamic header in the file; all ones in a fixed disk.
    pub data_offset: u64,
    /// When the disk was created (some products rewrite it later).
    pub timestamp: Timestamp,
    /// The program that created the disk, four ASCII characters.
    pub creator_app: [u8; 4],
    /// Its version: major in the upper 16 bits, minor in the lower.
    pub creator_version: u32,
    /// The operating system it ran on, four ASCII characters.
    pub creator_os: [u8; 4],
    /// Guest size at creation, in bytes.
    pub original_size: u64,
    /// Guest size now, in bytes: the size of the disk.
    pub current_size: u64,
    /// The geometry the disk claims; often a little smaller than its size.
    pub geometry: Chs,
    /// Fixed, dynamic or differencing.
    pub disk_type: DiskType,
    /// The disk's identity.
    pub unique_id: UniqueId,
    /// 1 if the disk belongs to a virtual machine in saved state, else 0.
    pub saved_state: u8,
    /// Zero by the specification, but they count in the checksum: kept as found (blktap uses the first as "hidden").
    pub reserved: [u8; 427],
}

impl Footer {
    /// Bytes of a footer.
    pub const SIZE: usize = 512;

    /// A new footer for a disk of `size_bytes`, with the identity every release of QEMU, Hyper-V and others take at
    /// its word: creator `win ` 10.0 on `Wi2k`. The dynamic header follows the footer copy.
    pub fn new(disk_type: DiskType, size_bytes: u64, unique_id: UniqueId, timestamp: Timestamp) -> Self {
        Footer {
            features: 2,
            version: 0x0001_0000,
            data_offset: match disk_type {
                DiskType::Fixed => u64::MAX,
                DiskType::Dynamic | DiskType::Differencing => Footer::SIZE as u64,
            },
            timestamp,
            creator_app: *b"win ",
            creator_version: 0x000A_0000,
            creator_os: *b"Wi2k",
            original_size: size_bytes,
            current_size: size_bytes,
            geometry: Chs::for_size(size_bytes),
            disk_type,
            unique_id,
            saved_state: 0,
            reserved: [0; 427],
        }
    }

    /// Reads a footer of 512 bytes, or of 511 with the missing last byte taken as zero.
    ///
    /// # Errors
    ///
    /// Names the first field that is wrong: `cookie` if this is no footer at all, then `checksum`, `version` (major
    /// other than 1), `disk type`. Sizes and places are not judged here: see [`Footer::validate_size`] and
    /// [`validate_geometry`](super::validate_geometry).
    pub fn parse(bytes: &[u8]) -> Result<Footer, FormatError> {
        let mut whole = [0; Footer::SIZE];
        match bytes.len() {
            511 | 512 => whole[..bytes.len()].copy_from_slice(bytes),
            other => return Err(FormatError::new(STRUCTURE, "length", 0, other, "512 bytes (or 511)")),
        }
        let raw: RawFooter = zerocopy::transmute!(whole);

        if raw.cookie != COOKIE {
            return Err(wrong("cookie", offset_of!(RawFooter, cookie), quoted(&raw.cookie), quoted(&COOKIE)));
        }
        let checksum = checksum(&whole, offset_of!(RawFooter, checksum));
        if raw.checksum != checksum {
            let (found, expected) = (format!("{:#010x}", raw.checksum), format!("{checksum:#010x}"));
            return Err(wrong("checksum", offset_of!(RawFooter, checksum), found, expected));
        }
        if raw.version.get() >> 16 != 1 {
            let found = format!("{:#010x}", raw.version);
            return Err(wrong("version", offset_of!(RawFooter, version), found, "0x00010000"));
        }
        let Some(disk_type) = DiskType::from_u32(raw.disk_type.get()) else {
            let expected = "2 (fixed), 3 (dynamic) or 4 (differencing)";
            return Err(wrong("disk type", offset_of!(RawFooter, disk_type), raw.disk_type, expected));
        };

        Ok(Footer {
            features: raw.features.get(),
            version: raw.version.get(),
            data_offset: raw.data_offset.get(),
            timestamp: Timestamp(raw.timestamp.get()),
            creator_app: raw.creator_app,
            creator_version: raw.creator_version.get(),
            creator_os: raw.creator_os,
            original_size: raw.original_size.get(),
            current_size: raw.current_size.get(),
            geometry: Chs {
                cylinders: raw.cylinders.get(),
                heads: raw.heads,
                sectors_per_track: raw.sectors_per_track,
            },
            disk_type,
            unique_id: UniqueId(raw.unique_id),
            saved_state: raw.saved_state,
            reserved: raw.reserved,
        })
    }

    /// The footer as it stands in the file, with its checksum.
    pub fn to_bytes(&self) -> [u8; Footer::SIZE] {
        let mut raw = RawFooter {
            cookie: COOKIE,
            features: self.features.into(),
            version: self.version.into(),
            data_offset: self.data_offset.into(),
            timestamp: self.timestamp.0.into(),
            creator_app: self.creator_app,
            creator_version: self.creator_version.into(),
            creator_os: self.creator_os,
            original_size: self.original_size.into(),
            current_size: self.current_size.into(),
            cylinders: self.geometry.cylinders.into(),
            heads: self.geometry.heads,
            sectors_per_track: self.geometry.sectors_per_track,
            disk_type: self.disk_type.as_u32().into(),
            checksum: U32::ZERO,
            unique_id: self.unique_id.0,
            saved_state: self.saved_state,
            reserved: self.reserved,
        };
        raw.checksum = checksum(raw.as_bytes(), offset_of!(RawFooter, checksum)).into();
        zerocopy::transmute!(raw)
    }

    /// Checks that the current size can be a disk: whole sectors, not zero, and within the limit of its type.
    ///
    /// # Errors
    ///
    /// Field `current size`.
    pub fn validate_size(&self) -> Result<(), FormatError> {
        let size = self.current_size;
        let (limit, limit_text) = match self.disk_type {
            DiskType::Fixed => (MAX_FILE_OFFSET - Footer::SIZE as u64, "what a file can hold"),
            DiskType::Dynamic | DiskType::Differencing => (MAX_DYNAMIC_SIZE, "2040 GiB"),
        };
        let refuse = |expected: String| {
            Err(wrong("current size", offset_of!(RawFooter, current_size), format!("{size} bytes"), expected))
        };
        if size == 0 {
            refuse("at least one sector".into())
        } else if !size.is_multiple_of(SECTOR) {
            refuse("a multiple of 512".into())
        } else if size > limit {
            refuse(format!("at most {limit} bytes ({limit_text})"))
        } else {
            Ok(())
        }
    }

    /// Checks that the data offset of a dynamic or differencing disk can be the place of its header: on a sector,
    /// behind the footer copy. Returns where the header ends, in bytes from the start of the file.
    pub(super) fn header_end(&self) -> Result<u64, FormatError> {
        self.data_offset
            .checked_add(DynamicHeader::SIZE as u64)
            .filter(|&end| {
                self.data_offset >= Footer::SIZE as u64
                    && self.data_offset.is_multiple_of(SECTOR)
                    && end <= MAX_FILE_OFFSET
            })
            .ok_or_else(|| {
                let expected = "a multiple of 512 behind the footer copy, usually 512";
                wrong("data offset", offset_of!(RawFooter, data_offset), self.data_offset, expected)
            })
    }

    /// An error for a disk type that has no dynamic header.
    pub(super) fn no_header(&self) -> FormatError {
        let found = format!("{} ({})", self.disk_type.as_u32(), self.disk_type);
        wrong("disk type", offset_of!(RawFooter, disk_type), found, "3 (dynamic) or 4 (differencing)")
    }
}

fn wrong(field: &'static str, offset: usize, found: impl Display, expected: impl Display) -> FormatError {
    FormatError::new(STRUCTURE, field, offset as u64, found, expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_fixed_disk_leaves_room_for_its_footer() {
        let largest = i64::MAX as u64 - 1023;
        for (size, fits) in [(largest, true), (largest + 512, false)] {
            let footer = Footer::new(DiskType::Fixed, size, UniqueId::from_bytes([1; 16]), Timestamp(0));
            assert_eq!(footer.validate_size().is_ok(), fits, "{size}");
        }
    }
}
