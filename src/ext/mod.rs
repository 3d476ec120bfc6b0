//! Our private area, as bytes: superblock, journal entries and their records, block headers, CRCs of data, where each
//! lies; and the manifest of a VM state, a file of its own.
//! Pure: bytes in, typed structures out, and back. FORMAT.md describes every field; all integers are big-endian.

mod block_header;
mod data_crcs;
mod entry;
mod lineage;
mod manifest;
mod place;
mod registry;
mod superblock;

pub use block_header::BlockHeader;
pub use data_crcs::{CRC_WORDS, CrcPage, DataCrcs, unit_word, words_per_block};
pub use entry::{
    ENTRY_HEADER_BYTES, EntryHeader, EntryKind, Record, SessionId, Tail, parse_entry_header, parse_records,
    session_crc, write_entry, write_filler,
};
pub use lineage::{FixedParent, Lineage, Name, SealId};
pub use manifest::{Digest, Manifest, ManifestBlob, ManifestDisk, is_file_name, is_name};
pub use place::{
    BAT_ROOM_BYTES, FIRST_TABLE_PAGE_OFFSET, HEADER_BACKUP_OFFSET, LAST_TABLE_PAGE_OFFSET, LOCATORS_END,
    LOCATORS_OFFSET, MAX_COUNTER, PAGE_BYTES, Placement, RING_OFFSET, SUPERBLOCK_OFFSETS,
    TEMPORARY_HEAD_BYTES, Temporary,
};
pub use registry::{Child, REGISTRY_BYTES, Registry, registry_offsets};
pub use superblock::{Fingerprint, State, Superblock, SuperblockError, feature};
