//! The superblock: one page, kept twice (FORMAT.md, "Superblock").
//!
//! It says whether the journal holds anything, which session wrote it, and what the file looked like at the last clean
//! close. The two copies are written in turn; the valid one with the higher sequence counts.

use super::data_crcs::DataCrcs;
use super::entry::{SessionId, Tail};
use super::lineage::{FixedParent, Lineage, Name, SealId};
use super::place::{MAX_COUNTER, PAGE_BYTES};
use crate::error::FormatError;
use crate::vfs::FileTime;
use crate::vhd::UniqueId;
use std::mem::{offset_of, size_of};
use zerocopy::big_endian::{I64, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 8] = *b"cowvhdSB";
const NAME: &str = "superblock";

/// Feature bits. A reader that does not know a bit of the first word must not open the image, one of the second must
/// not write to it; bits of the third may be ignored.
pub mod feature {
    /// The superblock is part of a temporary journal at the end of an image made elsewhere.
    pub const TEMPORARY: u64 = 1 << 0;
    /// Incompatible features this version knows.
    pub const KNOWN_INCOMPATIBLE: u64 = TEMPORARY;
    /// The image is sealed, is being sealed, or is the child of a sealed one: its lineage must be kept.
    pub const LINEAGE: u64 = 1 << 0;
    /// Read-only-compatible features this version knows.
    pub const KNOWN_READ_ONLY_COMPATIBLE: u64 = LINEAGE;
    /// The image has room for the CRCs of its data.
    pub const DATA_CRCS: u64 = 1 << 0;
    /// Compatible features this version knows. A writer clears all others: it writes the reserved bytes as zeros, so what they
    /// stand for is gone.
    pub const KNOWN_COMPATIBLE: u64 = DATA_CRCS;
}

/// Whether metadata may be behind the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Everything is in place; the journal is empty.
    Clean,
    /// A session is open, or ended without closing.
    Dirty,
}

/// What a clean close left behind; a difference means that another program wrote to the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fingerprint {
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// CRC-32 of the footer's 512 bytes.
    pub footer_crc: u32,
    /// CRC-32 of the dynamic header's 1024 bytes, with its normal cookie.
    pub header_crc: u32,
    /// CRC-32 of the BAT's entries.
    pub bat_crc: u32,
    /// The modification time the file was given.
    pub modified: FileTime,
}

/// Why there is no superblock, or none that may be acted on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SuperblockError {
    /// There is none, or it is damaged: the other copy counts.
    Invalid(FormatError),
    /// It is whole and says something that only a newer version understands: its disk must not be opened.
    Newer {
        /// The disk it belongs to.
        disk_id: UniqueId,
        /// The field.
        error: FormatError,
    },
}

/// A superblock's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    /// Counts the writes of superblocks; the higher of the two is the current one.
    pub sequence: u64,
    /// The footer's unique id: a superblock of another disk is not ours.
    pub disk_id: UniqueId,
    /// Features a reader must know to open the image.
    pub incompatible: u64,
    /// Features a reader must know to write to the image.
    pub read_only_compatible: u64,
    /// Features a reader may ignore.
    pub compatible: u64,
    /// Clean or dirty.
    pub state: State,
    /// A sync failed in this or an earlier session: acknowledged data may be missing. Until `check` clears it.
    pub sync_failed: bool,
    /// Blocks may exist that another program allocated, which have no block header.
    pub foreign_blocks: bool,
    /// The session that writes, or wrote, the ring.
    pub session: SessionId,
    /// File offset of the ring in bytes.
    pub ring_offset: u64,
    /// Length of the ring in bytes.
    pub ring_bytes: u64,
    /// From where map records count when the ring holds no entry of the session.
    pub meta_tail: Tail,
    /// From where data and zero records count when the ring holds no entry of the session.
    pub data_tail: Tail,
    /// All allocation sequences used before this session are below this.
    pub next_allocation: u64,
    /// File offset of the first slot in bytes.
    pub slot_origin: u64,
    /// What the last clean close left.
    pub fingerprint: Fingerprint,
    /// Its place in a chain.
    pub lineage: Lineage,
    /// Of a sealed image: the room for the CRCs of its data.
    pub data_crcs: DataCrcs,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawTail {
    sequence: U64,
    place: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSuperblock {
    magic: [u8; 8],
    sequence: U64,
    disk_id: [u8; 16],
    incompatible: U64,
    read_only_compatible: U64,
    compatible: U64,
    state: U32,
    flags: U32,
    session: [u8; 16],
    ring_offset: U64,
    ring_bytes: U64,
    meta_tail: RawTail,
    data_tail: RawTail,
    next_allocation: U64,
    slot_origin: U64,
    file_bytes: U64,
    footer_crc: U32,
    header_crc: U32,
    bat_crc: U32,
    modified_nanoseconds: U32,
    modified_seconds: I64,
    seal_id: [u8; 16],
    child_id: [u8; 16],
    parent_seal: [u8; 16],
    state_digest: [u8; 32],
    snapshot: [u8; 64],
    leaf_name: [u8; 256],
    lineage_flags: U32,
    parent_modified_nanoseconds: U32,
    parent_file_bytes: U64,
    parent_modified_seconds: I64,
    parent_id: [u8; 16],
    manifest: [u8; 256],
    crcs_offset: U64,
    crcs_pages: U32,
    reserved: [u8; 3208],
    crc: U32,
}

const _: () = {
    assert!(size_of::<RawSuperblock>() == PAGE_BYTES as usize);
    assert!(offset_of!(RawSuperblock, sequence) == 8);
    assert!(offset_of!(RawSuperblock, disk_id) == 16);
    assert!(offset_of!(RawSuperblock, incompatible) == 32);
    assert!(offset_of!(RawSuperblock, read_only_compatible) == 40);
    assert!(offset_of!(RawSuperblock, compatible) == 48);
    assert!(offset_of!(RawSuperblock, state) == 56);
    assert!(offset_of!(RawSuperblock, flags) == 60);
    assert!(offset_of!(RawSuperblock, session) == 64);
    assert!(offset_of!(RawSuperblock, ring_offset) == 80);
    assert!(offset_of!(RawSuperblock, ring_bytes) == 88);
    assert!(offset_of!(RawSuperblock, meta_tail) == 96);
    assert!(offset_of!(RawSuperblock, data_tail) == 112);
    assert!(offset_of!(RawSuperblock, next_allocation) == 128);
    assert!(offset_of!(RawSuperblock, slot_origin) == 136);
    assert!(offset_of!(RawSuperblock, file_bytes) == 144);
    assert!(offset_of!(RawSuperblock, footer_crc) == 152);
    assert!(offset_of!(RawSuperblock, header_crc) == 156);
    assert!(offset_of!(RawSuperblock, bat_crc) == 160);
    assert!(offset_of!(RawSuperblock, modified_nanoseconds) == 164);
    assert!(offset_of!(RawSuperblock, modified_seconds) == 168);
    assert!(offset_of!(RawSuperblock, seal_id) == 176);
    assert!(offset_of!(RawSuperblock, child_id) == 192);
    assert!(offset_of!(RawSuperblock, parent_seal) == 208);
    assert!(offset_of!(RawSuperblock, state_digest) == 224);
    assert!(offset_of!(RawSuperblock, snapshot) == 256);
    assert!(offset_of!(RawSuperblock, leaf_name) == 320);
    assert!(offset_of!(RawSuperblock, lineage_flags) == 576);
    assert!(offset_of!(RawSuperblock, parent_modified_nanoseconds) == 580);
    assert!(offset_of!(RawSuperblock, parent_file_bytes) == 584);
    assert!(offset_of!(RawSuperblock, parent_modified_seconds) == 592);
    assert!(offset_of!(RawSuperblock, parent_id) == 600);
    assert!(offset_of!(RawSuperblock, manifest) == 616);
    assert!(offset_of!(RawSuperblock, crcs_offset) == 872);
    assert!(offset_of!(RawSuperblock, crcs_pages) == 880);
    assert!(offset_of!(RawSuperblock, reserved) == 884);
    assert!(offset_of!(RawSuperblock, crc) == CRC_OFFSET);
};

const CRC_OFFSET: usize = 4092;
const STATE_CLEAN: u32 = 1;
const STATE_DIRTY: u32 = 2;
const FLAG_SYNC_FAILED: u32 = 1 << 0;
const FLAG_FOREIGN_BLOCKS: u32 = 1 << 1;
const LINEAGE_FLAG_DELETING: u32 = 1 << 0;

impl Superblock {
    /// Size on disk, in bytes.
    pub const SIZE: usize = PAGE_BYTES as usize;

    /// Whether it is part of a temporary journal.
    pub fn is_temporary(&self) -> bool {
        self.incompatible & feature::TEMPORARY != 0
    }

    /// Reads a superblock. Checks magic, CRC and the fields a reader relies on; the caller compares disk id and features.
    pub fn parse(bytes: &[u8]) -> Result<Self, SuperblockError> {
        let wrong = |field, offset, found: String, expected: &str| {
            SuperblockError::Invalid(FormatError::new(NAME, field, offset as u64, found, expected))
        };
        let raw = RawSuperblock::ref_from_bytes(bytes)
            .map_err(|_| wrong("length", 0, bytes.len().to_string(), "4096 bytes"))?;
        if raw.magic != MAGIC {
            return Err(wrong("magic", 0, format!("{:02x?}", raw.magic), "cowvhdSB"));
        }
        let crc = crc32fast::hash(bytes.get(..CRC_OFFSET).unwrap_or_default());
        if raw.crc.get() != crc {
            return Err(wrong("CRC", CRC_OFFSET, format!("{:#010x}", raw.crc), &format!("{crc:#010x}")));
        }
        for (field, offset, counter) in
            [("sequence", 8, &raw.sequence), ("next allocation", 128, &raw.next_allocation)]
        {
            if counter.get() > MAX_COUNTER {
                return Err(wrong(field, offset, counter.to_string(), "at most 2^63 - 1"));
            }
        }
        let newer = |field, offset, found: String, expected: &str| SuperblockError::Newer {
            disk_id: UniqueId::from_bytes(raw.disk_id),
            error: FormatError::new(NAME, field, offset, found, expected),
        };
        let unknown = raw.incompatible.get() & !feature::KNOWN_INCOMPATIBLE;
        if unknown != 0 {
            return Err(newer("incompatible features", 32, format!("{unknown:#x}"), "none that are unknown"));
        }
        let state = match raw.state.get() {
            STATE_CLEAN => State::Clean,
            STATE_DIRTY => State::Dirty,
            other => return Err(newer("state", 56, other.to_string(), "1 (clean) or 2 (dirty)")),
        };
        let flags = raw.flags.get();
        if flags & !(FLAG_SYNC_FAILED | FLAG_FOREIGN_BLOCKS) != 0 {
            return Err(newer("flags", 60, format!("{flags:#x}"), "only bits 0 and 1"));
        }
        let lineage_flags = raw.lineage_flags.get();
        if lineage_flags & !LINEAGE_FLAG_DELETING != 0 {
            return Err(newer("lineage: flags", 576, format!("{lineage_flags:#x}"), "only bit 0"));
        }
        let lineage = Lineage {
            seal_id: SealId(raw.seal_id),
            child_id: UniqueId::from_bytes(raw.child_id),
            parent_seal: SealId(raw.parent_seal),
            parent_id: UniqueId::from_bytes(raw.parent_id),
            state_digest: raw.state_digest,
            manifest: Name(raw.manifest),
            snapshot: Name(raw.snapshot),
            leaf_name: Name(raw.leaf_name),
            deleting: lineage_flags & LINEAGE_FLAG_DELETING != 0,
            fixed_parent: FixedParent {
                file_bytes: raw.parent_file_bytes.get(),
                modified: FileTime {
                    seconds: raw.parent_modified_seconds.get(),
                    nanoseconds: raw.parent_modified_nanoseconds.get(),
                },
            },
        };
        if raw.incompatible.get() & feature::TEMPORARY != 0 && lineage != Lineage::default() {
            return Err(wrong("lineage", 176, "one that is set".into(), "zeros in a temporary journal"));
        }
        Ok(Superblock {
            sequence: raw.sequence.get(),
            disk_id: UniqueId::from_bytes(raw.disk_id),
            incompatible: raw.incompatible.get(),
            read_only_compatible: raw.read_only_compatible.get(),
            compatible: raw.compatible.get(),
            state,
            sync_failed: flags & FLAG_SYNC_FAILED != 0,
            foreign_blocks: flags & FLAG_FOREIGN_BLOCKS != 0,
            session: SessionId(raw.session),
            ring_offset: raw.ring_offset.get(),
            ring_bytes: raw.ring_bytes.get(),
            meta_tail: raw.meta_tail.into(),
            data_tail: raw.data_tail.into(),
            next_allocation: raw.next_allocation.get(),
            slot_origin: raw.slot_origin.get(),
            fingerprint: Fingerprint {
                file_bytes: raw.file_bytes.get(),
                footer_crc: raw.footer_crc.get(),
                header_crc: raw.header_crc.get(),
                bat_crc: raw.bat_crc.get(),
                modified: FileTime {
                    seconds: raw.modified_seconds.get(),
                    nanoseconds: raw.modified_nanoseconds.get(),
                },
            },
            lineage,
            data_crcs: match raw.compatible.get() & feature::DATA_CRCS {
                // Who does not know the feature has written since.
                0 => DataCrcs::default(),
                _ => DataCrcs { offset: raw.crcs_offset.get(), pages: raw.crcs_pages.get() },
            },
        })
    }

    /// The superblock as it is written.
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut flags = 0;
        if self.sync_failed {
            flags |= FLAG_SYNC_FAILED;
        }
        if self.foreign_blocks {
            flags |= FLAG_FOREIGN_BLOCKS;
        }
        let has_lineage = self.lineage != Lineage::default();
        let read_only_compatible =
            self.read_only_compatible & !feature::LINEAGE | if has_lineage { feature::LINEAGE } else { 0 };
        let compatible = self.compatible & !feature::DATA_CRCS
            | if self.data_crcs.is_some() { feature::DATA_CRCS } else { 0 };
        let mut raw = RawSuperblock {
            magic: MAGIC,
            sequence: self.sequence.into(),
            disk_id: *self.disk_id.as_bytes(),
            incompatible: self.incompatible.into(),
            read_only_compatible: read_only_compatible.into(),
            compatible: compatible.into(),
            state: match self.state {
                State::Clean => STATE_CLEAN.into(),
                State::Dirty => STATE_DIRTY.into(),
            },
            flags: flags.into(),
            session: self.session.0,
            ring_offset: self.ring_offset.into(),
            ring_bytes: self.ring_bytes.into(),
            meta_tail: self.meta_tail.into(),
            data_tail: self.data_tail.into(),
            next_allocation: self.next_allocation.into(),
            slot_origin: self.slot_origin.into(),
            file_bytes: self.fingerprint.file_bytes.into(),
            footer_crc: self.fingerprint.footer_crc.into(),
            header_crc: self.fingerprint.header_crc.into(),
            bat_crc: self.fingerprint.bat_crc.into(),
            modified_nanoseconds: self.fingerprint.modified.nanoseconds.into(),
            modified_seconds: self.fingerprint.modified.seconds.into(),
            seal_id: self.lineage.seal_id.0,
            child_id: *self.lineage.child_id.as_bytes(),
            parent_seal: self.lineage.parent_seal.0,
            state_digest: self.lineage.state_digest,
            manifest: self.lineage.manifest.0,
            snapshot: self.lineage.snapshot.0,
            leaf_name: self.lineage.leaf_name.0,
            lineage_flags: if self.lineage.deleting { LINEAGE_FLAG_DELETING.into() } else { 0.into() },
            parent_modified_nanoseconds: self.lineage.fixed_parent.modified.nanoseconds.into(),
            parent_file_bytes: self.lineage.fixed_parent.file_bytes.into(),
            parent_modified_seconds: self.lineage.fixed_parent.modified.seconds.into(),
            parent_id: *self.lineage.parent_id.as_bytes(),
            crcs_offset: self.data_crcs.offset.into(),
            crcs_pages: self.data_crcs.pages.into(),
            reserved: [0; 3208],
            crc: 0.into(),
        };
        raw.crc = crc32fast::hash(raw.as_bytes().get(..CRC_OFFSET).unwrap_or_default()).into();
        zerocopy::transmute!(raw)
    }
}

impl From<RawTail> for Tail {
    fn from(raw: RawTail) -> Self {
        Tail { sequence: raw.sequence.get(), place: raw.place.get() }
    }
}

impl From<Tail> for RawTail {
    fn from(tail: Tail) -> Self {
        RawTail { sequence: tail.sequence.into(), place: tail.place.into() }
    }
}

#[cfg(test)]
#[allow(clippy::panic, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn sample() -> Superblock {
        Superblock {
            sequence: 7,
            disk_id: UniqueId::from_bytes([0x10; 16]),
            incompatible: 0,
            read_only_compatible: 0,
            compatible: 0,
            state: State::Dirty,
            sync_failed: true,
            foreign_blocks: false,
            session: SessionId([0x5e; 16]),
            ring_offset: 0x40000,
            ring_bytes: 0x200000,
            meta_tail: Tail { sequence: 3, place: 0x1000 },
            data_tail: Tail { sequence: 4, place: 0x2000 },
            next_allocation: 99,
            slot_origin: 0x700000,
            fingerprint: Fingerprint {
                file_bytes: 0x700200,
                footer_crc: 1,
                header_crc: 2,
                bat_crc: 3,
                modified: FileTime { seconds: 1_700_000_000, nanoseconds: 5 },
            },
            lineage: Lineage::default(),
            data_crcs: DataCrcs::default(),
        }
    }

    fn sealed() -> Superblock {
        Superblock {
            read_only_compatible: feature::LINEAGE,
            lineage: Lineage {
                seal_id: SealId([0xa1; 16]),
                child_id: UniqueId::from_bytes([0xa2; 16]),
                parent_seal: SealId([0xa3; 16]),
                parent_id: UniqueId::from_bytes([0xa5; 16]),
                state_digest: [0xa4; 32],
                snapshot: Name::new(b"before-upgrade").unwrap(),
                leaf_name: Name::new(b"vm.vhd").unwrap(),
                manifest: Name::new(b"vm@before-upgrade.vmstate").unwrap(),
                deleting: true,
                fixed_parent: FixedParent {
                    file_bytes: 0x0400_0200,
                    modified: FileTime { seconds: 1_700_000_001, nanoseconds: 6 },
                },
            },
            ..sample()
        }
    }

    fn with_crcs() -> Superblock {
        let data_crcs = DataCrcs { offset: 0x90_0000, pages: 2 };
        Superblock { compatible: feature::DATA_CRCS, data_crcs, ..sealed() }
    }

    #[test]
    fn what_is_written_is_read_back() {
        assert_eq!(Superblock::parse(&sample().to_bytes()), Ok(sample()));
        assert_eq!(Superblock::parse(&sealed().to_bytes()), Ok(sealed()));
        assert_eq!(Superblock::parse(&with_crcs().to_bytes()), Ok(with_crcs()));
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        for byte in 0..Superblock::SIZE {
            let mut bytes = sample().to_bytes();
            bytes[byte] ^= 0x40;
            assert!(Superblock::parse(&bytes).is_err(), "byte {byte}");
        }
    }

    /// Bytes with a right CRC that differ from the sample's in one field.
    fn mended(at: usize, field: &[u8]) -> Result<Superblock, SuperblockError> {
        let mut bytes = sample().to_bytes();
        bytes[at..at + field.len()].copy_from_slice(field);
        let crc = crc32fast::hash(&bytes[..CRC_OFFSET]);
        bytes[CRC_OFFSET..].copy_from_slice(&crc.to_be_bytes());
        Superblock::parse(&bytes)
    }

    #[test]
    fn damage_and_what_is_newer_are_told_apart_with_the_field() {
        let counter = |n: u64| n.to_be_bytes();
        for (at, bytes, field) in [
            (0, &b"cowvhdSX"[..], "magic"),
            (8, &counter(MAX_COUNTER + 1), "sequence"),
            (128, &counter(u64::MAX), "next allocation"),
        ] {
            match mended(at, bytes) {
                Err(SuperblockError::Invalid(error)) => {
                    assert_eq!((error.field, error.offset), (field, at as u64), "{error}");
                }
                other => panic!("{field}: {other:?}"),
            }
        }
        for (at, bytes, field) in [
            (32, &counter(1 << 63)[..], "incompatible features"),
            (56, &[0; 4], "state"),
            (56, &[0, 0, 0, 3], "state"),
            (60, &[0, 0, 0, 4], "flags"),
            (60, &[0x80, 0, 0, 1], "flags"),
        ] {
            match mended(at, bytes) {
                Err(SuperblockError::Newer { disk_id, error }) => {
                    assert_eq!(disk_id, sample().disk_id);
                    assert_eq!((error.field, error.offset), (field, at as u64), "{error}");
                }
                other => panic!("{field}: {other:?}"),
            }
        }
        for length in [0, 1, CRC_OFFSET, Superblock::SIZE - 1] {
            let short = Superblock::parse(&sample().to_bytes()[..length]);
            assert!(matches!(short, Err(SuperblockError::Invalid(error)) if error.field == "length"));
        }
    }

    #[test]
    fn every_legal_value_is_kept() {
        assert_eq!(mended(8, &MAX_COUNTER.to_be_bytes()).unwrap().sequence, MAX_COUNTER);
        assert_eq!(mended(128, &MAX_COUNTER.to_be_bytes()).unwrap().next_allocation, MAX_COUNTER);
        assert_eq!(mended(56, &[0, 0, 0, 1]).unwrap().state, State::Clean);
        assert_eq!(mended(40, &[0xff; 8]).unwrap().read_only_compatible, u64::MAX);
        assert_eq!(mended(48, &[0xff; 8]).unwrap().compatible, u64::MAX);
        for (flags, sync_failed, foreign_blocks) in
            [(0, false, false), (1, true, false), (2, false, true), (3, true, true)]
        {
            let read = mended(60, &[0, 0, 0, flags]).unwrap();
            assert_eq!((read.sync_failed, read.foreign_blocks), (sync_failed, foreign_blocks));
            let sample = Superblock { sync_failed, foreign_blocks, ..sample() };
            assert_eq!(Superblock::parse(&sample.to_bytes()), Ok(read));
            assert_eq!(read, sample);
        }
    }

    /// Whatever was read: the bits of what is there, and no others of ours.
    #[test]
    fn feature_bits_say_what_is_there() {
        let bits = |superblock: Superblock| {
            let bytes = superblock.to_bytes();
            [40, 48].map(|at| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()))
        };
        let all =
            |superblock| Superblock { read_only_compatible: u64::MAX, compatible: u64::MAX, ..superblock };
        assert_eq!(bits(all(sample())), [u64::MAX - 1; 2]);
        assert_eq!(bits(all(with_crcs())), [u64::MAX; 2]);
        let none = |superblock| Superblock { read_only_compatible: 0, compatible: 0, ..superblock };
        assert_eq!(bits(none(sealed())), [1, 0]);
        assert_eq!(bits(none(with_crcs())), [1, 1]);
    }

    #[test]
    fn a_temporary_journal_has_no_lineage() {
        let temporary = Superblock { incompatible: feature::TEMPORARY, ..sample() };
        assert_eq!(Superblock::parse(&temporary.to_bytes()), Ok(temporary));
        let others = Superblock { incompatible: !feature::TEMPORARY, ..sample() };
        assert_eq!([temporary, sample(), others].map(|it| it.is_temporary()), [true, false, false]);
        let bytes = Superblock { incompatible: feature::TEMPORARY, ..sealed() }.to_bytes();
        let Err(SuperblockError::Invalid(error)) = Superblock::parse(&bytes) else { panic!("it is read") };
        assert_eq!((error.field, error.offset), ("lineage", 176));
    }

    /// The golden vector of FORMAT.md.
    #[test]
    fn golden_vector() {
        let bytes = sample().to_bytes();
        let hex: String = bytes[..176].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            concat!(
                "636f777668645342",
                "0000000000000007",
                "10101010101010101010101010101010",
                "0000000000000000",
                "0000000000000000",
                "0000000000000000",
                "00000002",
                "00000001",
                "5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e",
                "0000000000040000",
                "0000000000200000",
                "0000000000000003",
                "0000000000001000",
                "0000000000000004",
                "0000000000002000",
                "0000000000000063",
                "0000000000700000",
                "0000000000700200",
                "00000001",
                "00000002",
                "00000003",
                "00000005",
                "000000006553f100",
            )
        );
        assert!(bytes[176..CRC_OFFSET].iter().all(|&b| b == 0));
        assert_eq!(bytes[CRC_OFFSET..], [0x90, 0x05, 0x74, 0xb9]);
    }

    /// The golden vector of FORMAT.md of an image with a lineage.
    #[test]
    fn golden_vector_of_a_lineage() {
        let bytes = sealed().to_bytes();
        assert_eq!(bytes[40..48], [0, 0, 0, 0, 0, 0, 0, 1]);
        assert!(bytes[176..192].iter().all(|&b| b == 0xa1) && bytes[192..208].iter().all(|&b| b == 0xa2));
        assert!(bytes[208..224].iter().all(|&b| b == 0xa3) && bytes[224..256].iter().all(|&b| b == 0xa4));
        assert!(bytes[256..].starts_with(b"before-upgrade\0") && bytes[320..].starts_with(b"vm.vhd\0"));
        assert_eq!(bytes[576..584], [0, 0, 0, 1, 0, 0, 0, 6]);
        assert_eq!(bytes[584..600], [0, 0, 0, 0, 4, 0, 2, 0, 0, 0, 0, 0, 0x65, 0x53, 0xf1, 1]);
        assert_eq!(bytes[600..616], [0xa5; 16]);
        assert!(bytes[616..].starts_with(b"vm@before-upgrade.vmstate\0"));
        assert!(bytes[872..CRC_OFFSET].iter().all(|&b| b == 0));
        assert_eq!(bytes[CRC_OFFSET..], [0xe4, 0x8a, 0x2d, 0x13]);
    }

    /// The golden vector of FORMAT.md of an image with room for CRCs.
    #[test]
    fn golden_vector_of_data_crcs() {
        let bytes = with_crcs().to_bytes();
        assert_eq!(bytes[48..56], [0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(bytes[872..884], [0, 0, 0, 0, 0, 0x90, 0, 0, 0, 0, 0, 2]);
        assert!(bytes[884..CRC_OFFSET].iter().all(|&b| b == 0));
        assert_eq!(bytes[CRC_OFFSET..], [0x85, 0x5c, 0x42, 0xb0]);
    }

    /// A writer that does not know the feature clears its bit: what the fields say then is not so.
    #[test]
    fn without_their_bit_the_crcs_are_not_there() {
        let mut bytes = with_crcs().to_bytes();
        bytes[48..56].fill(0);
        let crc = crc32fast::hash(&bytes[..CRC_OFFSET]);
        bytes[CRC_OFFSET..].copy_from_slice(&crc.to_be_bytes());
        assert_eq!(Superblock::parse(&bytes).unwrap().data_crcs, DataCrcs::default());
    }
}
