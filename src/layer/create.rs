//! Making a new image. It appears under its name only when it is complete and durable.

use super::headers::pair_bytes;
use super::new_file::NewFile;
use super::table::entries_crc;
use crate::error::{Error, Result};
use crate::ext::{
    BAT_ROOM_BYTES, Fingerprint, HEADER_BACKUP_OFFSET, PAGE_BYTES, Placement, SUPERBLOCK_OFFSETS, SessionId,
    State, Superblock, Tail,
};
use crate::vfs::{File, FileExt, Vfs};
use crate::vhd::{self, DiskType, DynamicHeader, Footer, Timestamp, UniqueId};
use std::io;
use std::path::Path;

/// What a new image is like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CreateParameters {
    /// Size of the disk in bytes, a multiple of 512.
    pub(crate) size: u64,
    /// Data bytes of a block.
    pub(crate) block_bytes: u32,
    /// Length of the journal ring in bytes.
    pub(crate) ring_bytes: u64,
}

/// Creates an empty dynamic image at `path`, which must not exist.
pub(crate) fn create(vfs: &dyn Vfs, path: &Path, parameters: &CreateParameters) -> Result<()> {
    let entries = table_entries(parameters)?;
    let place = Placement::new(entries, parameters.block_bytes, parameters.ring_bytes);
    let random = vfs.random_id().map_err(|error| Error::io(path, "asking for a random id", error))?;
    let disk_id = UniqueId::from_bytes(random);
    let new = NewFile::new(vfs, path)?;
    write_image(vfs, new.temporary(), place, parameters.size, disk_id)?;
    new.publish(false)
}

fn table_entries(parameters: &CreateParameters) -> Result<u32> {
    let size = parameters.size;
    if size == 0 || !size.is_multiple_of(vhd::SECTOR) {
        let what =
            format!("a disk of {size} bytes cannot be created: the size must be a multiple of 512, above 0");
        return Err(Error::Invalid { what });
    }
    if size > vhd::MAX_DYNAMIC_SIZE {
        let what = format!(
            "a disk of {size} bytes cannot be created: a dynamic VHD holds at most 2040 GiB ({} bytes), because its block \
             table counts 512-byte sectors in 32 bits",
            vhd::MAX_DYNAMIC_SIZE
        );
        return Err(Error::Invalid { what });
    }
    let blocks = size.div_ceil(parameters.block_bytes.into());
    u32::try_from(blocks)
        .ok()
        .filter(|&entries| vhd::bat_bytes(entries) <= BAT_ROOM_BYTES)
        .ok_or_else(|| Error::Invalid { what: format!("a disk of {size} bytes needs too many blocks") })
}

fn write_image(
    vfs: &dyn Vfs,
    temporary: &Path,
    place: Placement,
    size: u64,
    disk_id: UniqueId,
) -> Result<()> {
    let file =
        vfs.create_new(temporary).map_err(|error| Error::io(temporary, "creating the image", error))?;
    let now = vfs.now();
    let footer = Footer::new(DiskType::Dynamic, size, disk_id, Timestamp::from_unix_seconds(now.seconds));
    let header = DynamicHeader::new(place.table_offset, place.table_entries, place.block_bytes);
    let pair = pair_bytes(&footer, &header);
    let file_bytes = place.slot_origin + Footer::SIZE as u64;
    let superblock = Superblock {
        sequence: 1,
        disk_id,
        incompatible: 0,
        read_only_compatible: 0,
        compatible: 0,
        state: State::Clean,
        sync_failed: false,
        foreign_blocks: false,
        session: SessionId::default(),
        ring_offset: place.ring_offset,
        ring_bytes: place.ring_bytes,
        meta_tail: Tail::FIRST,
        data_tail: Tail::FIRST,
        next_allocation: 1,
        slot_origin: place.slot_origin,
        fingerprint: Fingerprint {
            file_bytes,
            footer_crc: crc32fast::hash(&footer.to_bytes()),
            header_crc: crc32fast::hash(&header.to_bytes()),
            bat_crc: entries_crc(&vec![vhd::UNALLOCATED; place.table_entries as usize]),
            modified: now,
        },
    };
    let second = Superblock { sequence: 2, ..superblock };
    let table = vec![0xff; vhd::bat_bytes(place.table_entries).next_multiple_of(PAGE_BYTES) as usize];
    let parts: [(&str, u64, &[u8]); 7] = [
        ("footer copy and dynamic header", 0, &pair),
        ("superblock", SUPERBLOCK_OFFSETS[0], &superblock.to_bytes()),
        ("superblock", SUPERBLOCK_OFFSETS[1], &second.to_bytes()),
        ("header backup", HEADER_BACKUP_OFFSET, &pair),
        // Written, not only reserved, so that a journal entry never has to allocate space or convert an extent.
        ("journal ring", place.ring_offset, &vec![0; place.ring_bytes as usize]),
        ("block table", place.table_offset, &table),
        ("footer", place.slot_origin, &footer.to_bytes()),
    ];
    for (what, offset, bytes) in parts {
        file.write_all_at(bytes, offset)
            .map_err(|error| Error::io(temporary, format!("writing the {what} at offset {offset}"), error))?;
    }
    finish(&*file, now).map_err(|error| Error::io(temporary, "making the new image durable", error))
}

fn finish(file: &dyn File, now: crate::vfs::FileTime) -> io::Result<()> {
    file.sync_data()?;
    file.set_modified(now)
}
