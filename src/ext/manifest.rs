//! The manifest of a VM state: which disks, in which sealed state, and which blobs belong together (FORMAT.md §18).
//!
//! It is written once and never changed. The seal of each of its disks holds the manifest's digest, so that nothing of it can
//! be exchanged without being noticed; the CRC only tells damage from another manifest.

use crate::error::FormatError;
use crate::vhd::UniqueId;
use std::mem::{offset_of, size_of};
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 8] = *b"cowvhdVM";
const NAME: &str = "VM state manifest";
const VERSION: u32 = 1;

/// A BLAKE3 digest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest(pub [u8; 32]);

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// A disk that a VM state belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestDisk {
    /// The unique id of the sealed layer.
    pub disk_id: UniqueId,
    /// Its seal.
    pub seal_id: [u8; 16],
    /// File name of the disk, in the manifest's folder: of its leaf, not of the sealed layer.
    pub file_name: Vec<u8>,
}

/// A blob of a VM state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestBlob {
    /// Its name.
    pub name: String,
    /// Its length in bytes.
    pub length: u64,
    /// What it holds: the digest of the digests of its chunks.
    pub digest: Digest,
}

/// A manifest's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// All disks of the VM, at least one, no two alike.
    pub disks: Vec<ManifestDisk>,
    /// The blobs, no two of one name.
    pub blobs: Vec<ManifestBlob>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    length: U32,
    disks: U32,
    blobs: U32,
    reserved: [u8; 40],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDisk {
    disk_id: [u8; 16],
    seal_id: [u8; 16],
    file_name: [u8; 256],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBlob {
    name: [u8; 64],
    length: U64,
    digest: [u8; 32],
    reserved: [u8; 24],
}

const _: () = {
    assert!(size_of::<RawHeader>() == 64);
    assert!(offset_of!(RawHeader, version) == 8);
    assert!(offset_of!(RawHeader, length) == 12);
    assert!(offset_of!(RawHeader, disks) == 16);
    assert!(offset_of!(RawHeader, blobs) == 20);
    assert!(offset_of!(RawHeader, reserved) == 24);
    assert!(size_of::<RawDisk>() == 288);
    assert!(offset_of!(RawDisk, seal_id) == 16);
    assert!(offset_of!(RawDisk, file_name) == 32);
    assert!(size_of::<RawBlob>() == 128);
    assert!(offset_of!(RawBlob, length) == 64);
    assert!(offset_of!(RawBlob, digest) == 72);
    assert!(offset_of!(RawBlob, reserved) == 104);
};

const CRC_BYTES: usize = 4;

impl Manifest {
    /// Disks of one VM.
    pub const MAX_DISKS: usize = 64;
    /// Blobs of one VM state.
    pub const MAX_BLOBS: usize = 64;
    /// Length of a blob in bytes: 16 TiB.
    pub const MAX_BLOB_BYTES: u64 = 16 << 40;
    /// Length of a blob's name in bytes.
    pub const MAX_NAME_BYTES: usize = 64;
    /// Length of the longest manifest in bytes.
    pub const MAX_BYTES: usize = size_of::<RawHeader>()
        + Self::MAX_DISKS * size_of::<RawDisk>()
        + Self::MAX_BLOBS * size_of::<RawBlob>()
        + CRC_BYTES;

    /// Reads a manifest; `bytes` is the whole file.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let wrong = |field, offset: usize, found: String, expected: &str| {
            FormatError::new(NAME, field, offset as u64, found, expected)
        };
        let (header, rest) = RawHeader::ref_from_prefix(bytes)
            .map_err(|_| wrong("length", 0, format!("{} bytes", bytes.len()), "at least 64 bytes"))?;
        if header.magic != MAGIC {
            return Err(wrong("magic", 0, format!("{:02x?}", header.magic), "cowvhdVM"));
        }
        if header.version.get() != VERSION {
            let expected = "1: it was written by a newer version of cowvhd";
            return Err(wrong("version", 8, header.version.to_string(), expected));
        }
        let (disks, blobs) = (header.disks.get() as usize, header.blobs.get() as usize);
        if disks == 0 || disks > Self::MAX_DISKS {
            return Err(wrong("disks", 16, disks.to_string(), "1 to 64"));
        }
        if blobs > Self::MAX_BLOBS {
            return Err(wrong("blobs", 20, blobs.to_string(), "at most 64"));
        }
        let length =
            size_of::<RawHeader>() + disks * size_of::<RawDisk>() + blobs * size_of::<RawBlob>() + CRC_BYTES;
        if header.length.get() as usize != length || bytes.len() != length {
            let found = format!("{} in a file of {} bytes", header.length, bytes.len());
            return Err(wrong("length", 12, found, &format!("{length} for both")));
        }
        let (covered, crc) = bytes.split_at(length - CRC_BYTES);
        let computed = crc32fast::hash(covered);
        if crc != computed.to_be_bytes() {
            return Err(wrong(
                "CRC",
                length - CRC_BYTES,
                format!("{crc:02x?}"),
                &format!("{computed:#010x}"),
            ));
        }
        let short = || wrong("length", 12, bytes.len().to_string(), "room for what it counts");
        let (raw_disks, rest) = <[RawDisk]>::ref_from_prefix_with_elems(rest, disks).map_err(|_| short())?;
        let (raw_blobs, _) = <[RawBlob]>::ref_from_prefix_with_elems(rest, blobs).map_err(|_| short())?;
        let mut manifest = Manifest { disks: Vec::with_capacity(disks), blobs: Vec::with_capacity(blobs) };
        for (index, raw) in raw_disks.iter().enumerate() {
            let at = size_of::<RawHeader>() + index * size_of::<RawDisk>();
            let name = padded(&raw.file_name).filter(|name| is_file_name(name)).ok_or_else(|| {
                let expected = "the name of a file, filled up with zeros";
                wrong("disk: file name", at + 32, format!("\"{}\"", raw.file_name.escape_ascii()), expected)
            })?;
            let disk = ManifestDisk {
                disk_id: UniqueId::from_bytes(raw.disk_id),
                seal_id: raw.seal_id,
                file_name: name.to_vec(),
            };
            if manifest.disks.iter().any(|other| other.is_like(&disk)) {
                let found = format!("one with id {} or name \"{}\" again", disk.disk_id, name.escape_ascii());
                return Err(wrong("disk", at, found, "different disks"));
            }
            manifest.disks.push(disk);
        }
        for (index, raw) in raw_blobs.iter().enumerate() {
            let at = size_of::<RawHeader>() + disks * size_of::<RawDisk>() + index * size_of::<RawBlob>();
            let text = padded(&raw.name).and_then(|name| std::str::from_utf8(name).ok());
            let name = text.filter(|name| is_name(name)).ok_or_else(|| {
                let expected = "1 to 64 of A-Z a-z 0-9 . _ -, filled up with zeros";
                wrong("blob: name", at, format!("\"{}\"", raw.name.escape_ascii()), expected)
            })?;
            if raw.length.get() > Self::MAX_BLOB_BYTES {
                return Err(wrong("blob: length", at + 64, raw.length.to_string(), "at most 16 TiB"));
            }
            if manifest.blobs.iter().any(|other| other.name == name) {
                return Err(wrong("blob: name", at, format!("\"{name}\" again"), "different names"));
            }
            let (length, digest) = (raw.length.get(), Digest(raw.digest));
            manifest.blobs.push(ManifestBlob { name: name.to_owned(), length, digest });
        }
        Ok(manifest)
    }

    /// The manifest as it is written; fails where [`Manifest::parse`] would refuse the result.
    pub fn to_bytes(&self) -> Result<Vec<u8>, FormatError> {
        let length = size_of::<RawHeader>()
            + self.disks.len() * size_of::<RawDisk>()
            + self.blobs.len() * size_of::<RawBlob>()
            + CRC_BYTES;
        let count = |count: usize| U32::new(u32::try_from(count).unwrap_or(u32::MAX));
        let header = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            length: count(length),
            disks: count(self.disks.len()),
            blobs: count(self.blobs.len()),
            reserved: [0; 40],
        };
        let mut bytes = header.as_bytes().to_vec();
        for disk in &self.disks {
            let raw = RawDisk {
                disk_id: *disk.disk_id.as_bytes(),
                seal_id: disk.seal_id,
                file_name: fill(&disk.file_name)?,
            };
            bytes.extend_from_slice(raw.as_bytes());
        }
        for blob in &self.blobs {
            let raw = RawBlob {
                name: fill(blob.name.as_bytes())?,
                length: blob.length.into(),
                digest: blob.digest.0,
                reserved: [0; 24],
            };
            bytes.extend_from_slice(raw.as_bytes());
        }
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_be_bytes());
        Self::parse(&bytes)?;
        Ok(bytes)
    }
}

impl ManifestDisk {
    fn is_like(&self, other: &ManifestDisk) -> bool {
        self.disk_id == other.disk_id || self.file_name == other.file_name
    }
}

/// Whether `name` can be the name of a snapshot or of a blob.
pub fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    !name.is_empty() && name.len() <= Manifest::MAX_NAME_BYTES && name.bytes().all(allowed)
}

/// Whether `name` is one component of a path that names a file.
pub fn is_file_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..") && name.len() <= 255 && !name.contains(&b'/') && !name.contains(&0)
}

/// What stands in front of the zeros at the end of a field.
fn padded(field: &[u8]) -> Option<&[u8]> {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    let (text, padding) = field.split_at(end);
    padding.iter().all(|&byte| byte == 0).then_some(text)
}

fn fill<const N: usize>(text: &[u8]) -> Result<[u8; N], FormatError> {
    let mut field = [0; N];
    match field.get_mut(..text.len()) {
        Some(start) => start.copy_from_slice(text),
        None => {
            let found = format!("\"{}\"", text.escape_ascii());
            return Err(FormatError::new(NAME, "name", 0, found, format_args!("at most {N} bytes")));
        }
    }
    Ok(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Manifest {
        Manifest {
            disks: vec![
                ManifestDisk {
                    disk_id: UniqueId::from_bytes([0x10; 16]),
                    seal_id: [0x5e; 16],
                    file_name: b"vm.vhd".to_vec(),
                },
                ManifestDisk {
                    disk_id: UniqueId::from_bytes([0x11; 16]),
                    seal_id: [0x5f; 16],
                    file_name: b"data.vhd".to_vec(),
                },
            ],
            blobs: vec![ManifestBlob { name: "ram".into(), length: 0x1000_0000, digest: Digest([0xd1; 32]) }],
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let bytes = sample().to_bytes().unwrap();
        assert_eq!(Manifest::parse(&bytes), Ok(sample()));
        let many = Manifest {
            disks: (0..64)
                .map(|n| ManifestDisk {
                    disk_id: UniqueId::from_bytes([n; 16]),
                    seal_id: [n; 16],
                    file_name: vec![b'a' + n % 26; 200 + n as usize / 2],
                })
                .collect(),
            blobs: (0..64)
                .map(|n| ManifestBlob { name: format!("{n:064}"), length: n, digest: Digest([n as u8; 32]) })
                .collect(),
        };
        let bytes = many.to_bytes().unwrap();
        assert_eq!(bytes.len(), Manifest::MAX_BYTES);
        assert_eq!(Manifest::parse(&bytes), Ok(many));
    }

    #[test]
    fn any_flipped_bit_and_any_other_length_is_noticed() {
        let bytes = sample().to_bytes().unwrap();
        for byte in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[byte] ^= 0x40;
            assert!(Manifest::parse(&bad).is_err(), "byte {byte}");
            assert!(Manifest::parse(&bytes[..byte]).is_err(), "{byte} bytes");
        }
        assert!(Manifest::parse(&[&bytes[..], &[0]].concat()).is_err());
    }

    /// Bytes with a right CRC that nobody would write.
    #[test]
    fn what_breaks_a_bound_is_refused_with_its_place() {
        let mut sample = sample();
        sample.blobs.push(ManifestBlob { name: "cpu".into(), length: 1, digest: Digest([1; 32]) });
        let bytes = sample.to_bytes().unwrap();
        let mended = |at: usize, with: &[u8]| {
            let mut bad = bytes.clone();
            bad[at..at + with.len()].copy_from_slice(with);
            let end = bad.len() - 4;
            let crc = crc32fast::hash(&bad[..end]).to_be_bytes();
            bad[end..].copy_from_slice(&crc);
            Manifest::parse(&bad)
        };
        let (second, blob) = (64 + 288, 64 + 2 * 288);
        let second_blob = blob + (bytes.len() - 4 - blob) / 2;
        for (at, with, says, place) in [
            (8, &[0, 0, 0, 2][..], "newer version", 8),
            (12, &[0, 0, 0, 0], "length", 12),
            (16, &[0, 0, 0, 0], "disks", 16),
            (16, &[0, 0, 0, 65], "disks", 16),
            (16, &[0xff; 4], "disks", 16),
            (20, &[0, 0, 0, 65], "blobs", 20),
            (20, &[0xff; 4], "blobs", 20),
            (20, &[0; 4], "length", 12),
            (64 + 32, b"a/b", "file name", 64 + 32),
            (64 + 32, b"\0", "file name", 64 + 32),
            (64 + 32, b"..\0\0\0\0", "file name", 64 + 32),
            (64 + 32, &[b'x'; 256], "file name", 64 + 32),
            (second + 32, b"\0", "file name", second + 32),
            (second, &[0x10; 16], "again", second),
            (second + 32, b"vm.vhd\0\0", "again", second),
            (blob, b"r+m", "name", blob),
            (blob, b"\xffam", "name", blob),
            (blob + 63, b"x", "name", blob),
            (blob + 64, &[0xff; 8], "16 TiB", blob + 64),
            (blob + 64, &(Manifest::MAX_BLOB_BYTES + 1).to_be_bytes(), "16 TiB", blob + 64),
            (second_blob, b"ram", "again", second_blob),
            (second_blob, b"/", "name", second_blob),
            (second_blob + 64, &[0xff; 8], "16 TiB", second_blob + 64),
        ] {
            let error = mended(at, with).unwrap_err();
            assert!(error.to_string().contains(says), "{at}: {error}");
            assert_eq!(error.offset, place as u64, "{error}");
        }
        let largest = mended(blob + 64, &Manifest::MAX_BLOB_BYTES.to_be_bytes()).unwrap();
        assert_eq!(largest.blobs[0].length, 16 << 40);
        let mut bad = bytes.clone();
        bad[100] ^= 1;
        let error = Manifest::parse(&bad).unwrap_err();
        assert_eq!((error.field, error.offset), ("CRC", bytes.len() as u64 - 4));
    }

    #[test]
    fn digests_are_printed_in_hexadecimal() {
        let digest = Digest(std::array::from_fn(|n| n as u8));
        let text = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
        assert_eq!((digest.to_string(), format!("{digest:?}")), (text.into(), text.into()));
    }

    #[test]
    fn names_are_what_file_names_can_hold_without_a_plus() {
        assert!(["a", "ram", "x.y_z-1", &"n".repeat(64)].iter().all(|name| is_name(name)));
        assert!(!["", "a+b", "a/b", "a b", "\u{e4}", &"n".repeat(65)].iter().any(|name| is_name(name)));
    }

    /// The golden vector of FORMAT.md.
    #[test]
    fn golden_vector() {
        let bytes = sample().to_bytes().unwrap();
        let hex = |at: usize, count: usize| -> String {
            bytes[at..at + count].iter().map(|b| format!("{b:02x}")).collect()
        };
        assert_eq!(bytes.len(), 772);
        assert_eq!(hex(0, 24), "636f77766864564d00000001000003040000000200000001");
        assert_eq!(
            hex(64, 40),
            concat!(
                "10101010101010101010101010101010",
                "5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e",
                "766d2e7668640000",
            )
        );
        assert_eq!(
            hex(352, 40),
            concat!(
                "11111111111111111111111111111111",
                "5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f",
                "646174612e766864",
            )
        );
        assert_eq!(hex(640, 8), "72616d0000000000");
        assert_eq!(hex(704, 40), "0000000010000000".to_owned() + &"d1".repeat(32));
        assert_eq!(hex(768, 4), "4311ebcd");
    }
}
