//! `upgrade`: an image made elsewhere gets a private area of its own, in place.
//!
//! It is a session with a temporary journal that ends in another way. When it starts, every block that lies where the private area
//! and the room for the BAT will be moves to a slot of the grid that the upgraded image has; so do blocks that stand on this grid
//! by coincidence, with another block in what would be their page. The close then writes, where nothing counts any more, all that a
//! new image has, syncs, and replaces the first page: headers with a normal cookie and the new BAT's place.
//!
//! Until that page is durable the temporary journal counts, and the next open goes on as if nothing of it had happened; what was
//! written of the private area is wiped then. From that page on the image is one of ours.

use super::headers::{Condition, MAX_TABLE_ROOM_BYTES, pair_bytes};
use super::map::BlockMap;
use super::open::Opening;
use super::session::SessionCore;
use super::table::entries_crc;
use super::temporary::ring_bytes;
use super::{Layer, lock};
use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::ext::{
    BAT_ROOM_BYTES, Fingerprint, PAGE_BYTES, Placement, SUPERBLOCK_OFFSETS, SessionId, State, Superblock,
    Tail,
};
use crate::journal::{Failure, write_zeros, zero_range};
use crate::sync::Arc;
use crate::vfs::{Access, FileExt, Vfs};
use crate::vhd::{self, DiskType, DynamicHeader, HeaderCookie, PlatformCode};
use std::path::Path;

/// Upgrades the image at `path`; false where there is nothing to do, since it has a private area.
pub(crate) fn upgrade(vfs: Arc<dyn Vfs>, path: &Path) -> Result<bool> {
    // What is left of an upgrade that was cut, or of a session.
    let open = || {
        let file =
            vfs.open(path, Access::ReadWrite).map_err(|error| Error::io(path, "opening the image", error))?;
        lock(&*file, path, Access::ReadWrite)?;
        if super::fixed_footer(&*file, path)?.is_some() {
            let what =
                "it is a fixed disk, which has no block table: convert it (`cowvhd convert`)".to_string();
            return Err(Error::Unsupported { path: path.to_path_buf(), what });
        }
        Opening::new(Arc::clone(&vfs), file, path)
    };
    let mut opening = open()?;
    if opening.place.temporary.is_some() {
        opening.open(Access::ReadWrite)?.close()?;
        opening = open()?;
    }
    if opening.decision.superblock.is_some() {
        return Ok(false);
    }
    opening.upgrade = Some(opening.upgraded_place()?);
    opening.open(Access::ReadWrite)?.close().map(|()| true)
}

impl Opening {
    /// The places that the image will have.
    fn upgraded_place(&self) -> Result<Placement> {
        let unsupported = |what: &str| {
            let what = format!("{what}: convert it (`cowvhd convert`)");
            Err(Error::Unsupported { path: self.path.clone(), what })
        };
        let (footer, header) = (&self.decision.footer, &self.decision.header);
        let blocks = footer.current_size.div_ceil(header.block_size.max(1).into());
        if self.decision.condition != Condition::Clean {
            return unsupported("it was not closed");
        }
        if footer.disk_type != DiskType::Dynamic
            || header.locators.iter().any(|locator| locator.platform != PlatformCode::None)
        {
            return unsupported(
                "it is a differencing disk, whose parent locators this version does not move",
            );
        }
        if u64::from(self.place.table_entries) != blocks
            || vhd::bat_bytes(self.place.table_entries) > BAT_ROOM_BYTES.min(MAX_TABLE_ROOM_BYTES)
        {
            return unsupported("its block table does not fit the room that one made here has");
        }
        Ok(Placement::new(self.place.table_entries, header.block_size, ring_bytes(footer)))
    }

    /// After an upgrade that was cut before it counted: the superblocks that it wrote must not come to count when the image is
    /// closed. Not durable on return.
    pub(super) fn wipe_cut_upgrade(&self, entries: &[u32]) -> Result<()> {
        let Some(temporary) = self.place.temporary else { return Ok(()) };
        for at in SUPERBLOCK_OFFSETS {
            let mut page = [0; PAGE_BYTES as usize];
            self.file.read_or_zero_at(&mut page, at).map_err(self.io("reading what an upgrade has left"))?;
            let is_ours = Superblock::parse(&page)
                .is_ok_and(|superblock| superblock.disk_id == self.decision.footer.unique_id);
            let end = at + PAGE_BYTES;
            let in_table = temporary.table_offset < end && at < temporary.table_end;
            let in_block = || {
                let mut blocks = entries.iter().filter(|&&entry| entry != vhd::UNALLOCATED);
                blocks.any(|&entry| self.place.bitmap_offset(entry) < end && at < self.place.block_end(entry))
            };
            if is_ours && !in_table && !in_block() {
                write_zeros(&*self.file, at, PAGE_BYTES)
                    .map_err(self.io("wiping what an upgrade has left"))?;
            }
        }
        Ok(())
    }
}

/// The blocks that have to move before an image can have the places of `target`.
pub(super) fn blocks_in_the_way(map: &BlockMap, target: &Placement) -> Vec<u32> {
    let mut blocks: Vec<(u32, u32)> =
        (0..target.table_entries).filter_map(|block| Some((map.get(block).slot()?, block))).collect();
    blocks.sort_unstable();
    let mut in_the_way = Vec::new();
    let mut before = 0;
    for (entry, block) in blocks {
        let shared_page = target.slot_index(entry).is_some() && before > target.block_page_offset(entry);
        if target.bitmap_offset(entry) < target.slot_origin || shared_page {
            in_the_way.push(block);
        }
        before = target.block_end(entry);
    }
    in_the_way
}

impl Layer {
    /// Ends the session of an upgrade: everything is in place in the working BAT and the blocks, and the temporary journal's
    /// superblock says so.
    pub(super) fn become_ours(
        &self,
        core: &mut SessionCore,
        place: &Placement,
        fresh: u64,
        next_allocation: u64,
    ) -> Result<(), Failure> {
        let file = &*self.file;
        let failed = |operation| move |error| Failure { operation, error, fatal: false };
        let (footer, header) = core.headers.clone();
        let header = DynamicHeader {
            cookie: HeaderCookie::Normal,
            data_offset: u64::MAX,
            table_offset: place.table_offset,
            max_table_entries: place.table_entries,
            ..header
        };
        let entries = core.journal.table();
        let modified = self.vfs.now();
        let superblock = Superblock {
            sequence: 2,
            incompatible: 0,
            state: State::Clean,
            sync_failed: core.superblocks.current.sync_failed,
            foreign_blocks: true,
            session: SessionId::default(),
            ring_offset: place.ring_offset,
            ring_bytes: place.ring_bytes,
            meta_tail: Tail::FIRST,
            data_tail: Tail::FIRST,
            next_allocation,
            slot_origin: place.slot_origin,
            fingerprint: Fingerprint {
                file_bytes: place.file_bytes(fresh),
                footer_crc: crc32fast::hash(&footer.to_bytes()),
                header_crc: crc32fast::hash(&header.to_bytes()),
                bat_crc: entries_crc(entries),
                modified,
            },
            ..core.superblocks.current
        };
        let first = Superblock { sequence: 1, ..superblock };
        let mut table: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        table.resize(table.len().next_multiple_of(PAGE_BYTES as usize), 0xff);
        let mut front = pair_bytes(&footer, &header).to_vec();
        front.resize(PAGE_BYTES as usize, 0);
        let parts = [
            (SUPERBLOCK_OFFSETS[0], first.to_bytes().to_vec()),
            (SUPERBLOCK_OFFSETS[1], superblock.to_bytes().to_vec()),
            (place.backup_offset(), pair_bytes(&footer, &header).to_vec()),
            (place.table_offset, table),
        ];
        // No block lies here any more; the old BAT, which nobody reads under a dirty cookie, can be made again.
        zero_range(file, PAGE_BYTES, place.slot_origin - PAGE_BYTES)
            .and_then(|()| write_zeros(file, place.ring_offset, place.ring_bytes))
            .and_then(|()| parts.iter().try_for_each(|(at, bytes)| file.write_all_at(bytes, *at)))
            .map_err(failed("writing the private area"))?;
        if !defect::active(Defect::UpgradeWithoutSync) {
            core.journal.sync(file)?;
        }
        file.write_durable_at(&front, 0).map_err(failed("writing the start of the file"))?;
        file.write_all_at(&footer.to_bytes(), place.slot_offset(fresh))
            .map_err(failed("writing the footer"))?;
        core.journal.sync(file)?;
        file.set_len(place.file_bytes(fresh)).map_err(failed("cutting the file behind its last block"))?;
        file.set_modified(modified).map_err(failed("setting the modification time"))
    }
}
