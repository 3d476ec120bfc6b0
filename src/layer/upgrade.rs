//! `upgrade`: an image made elsewhere gets a private area of its own, in place.
//!
//! It is a session with a temporary journal that ends in another way. When it starts, every block that lies where the private area
//! and the room for the BAT will be moves to a slot of the grid that the upgraded image has; so do blocks that stand on this grid
//! by coincidence, with another block in what would be their page. The payloads of parent locators are copied behind all that the file
//! holds, and the headers of the session name these copies: the old ones are gone before the new ones count. The close then writes, where nothing counts any more, all that a
//! new image has, syncs, and replaces the first page: headers with a normal cookie and the new BAT's place.
//!
//! Until that page is durable the temporary journal counts, and the next open goes on as if nothing of it had happened; what was
//! written of the private area is wiped then. From that page on the image is one of ours.

use super::headers::{Condition, HEADER_OFFSET, MAX_TABLE_ROOM_BYTES, pair_bytes};
use super::map::BlockMap;
use super::open::{Opening, write_header};
use super::session::SessionCore;
use super::table::entries_crc;
use super::temporary::ring_bytes;
use super::{Layer, lock};
use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::ext::{
    BAT_ROOM_BYTES, Fingerprint, LOCATORS_OFFSET, PAGE_BYTES, Placement, SUPERBLOCK_OFFSETS, SessionId,
    State, Superblock, Tail,
};
use crate::journal::{Failure, write_zeros, zero_range};
use crate::sync::Arc;
use crate::vfs::{Access, File, FileExt, Vfs};
use crate::vhd::{self, DynamicHeader, HeaderCookie, ParentLocator};
use std::io;
use std::path::Path;

/// Of the second superblock of an upgraded image.
const UPGRADED_SEQUENCE: u64 = 2;

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
        self.check_locators()?;
        if u64::from(self.place.table_entries) != blocks
            || vhd::bat_bytes(self.place.table_entries) > BAT_ROOM_BYTES.min(MAX_TABLE_ROOM_BYTES)
        {
            return unsupported("its block table does not fit the room that one made here has");
        }
        Ok(Placement::new(self.place.table_entries, header.block_size, ring_bytes(footer)))
    }

    /// Fails where a parent locator is not one, or takes more than the page that it is to have.
    fn check_locators(&self) -> Result<()> {
        for (number, locator) in self.decision.header.locators.iter().enumerate() {
            let range = locator.payload_range().map_err(|error| {
                error.at(&self.path, HEADER_OFFSET + DynamicHeader::locator_offset(number))
            })?;
            let Some(range) = range else { continue };
            let length = range.end - range.start;
            if range.end > self.headers.file_bytes || length > PAGE_BYTES {
                let what = format!(
                    "its parent locator {number} has {length} bytes at offset {}, expected at most {PAGE_BYTES} that end \
                     inside the file: convert it (`cowvhd convert`)",
                    range.start
                );
                return Err(Error::Unsupported { path: self.path.clone(), what });
            }
        }
        Ok(())
    }

    /// Before an upgrade: the headers name copies of the locators' payloads from now on, behind all that the file holds and clear of what
    /// the upgraded image has in front of its blocks. Returns the copies with their places, for the temporary journal to be written
    /// with.
    pub(super) fn move_locators(&mut self) -> Result<Vec<(u64, Vec<u8>)>> {
        let Some(target) = self.upgrade.filter(|_| !defect::active(Defect::UpgradeKeepsLocators)) else {
            return Ok(Vec::new());
        };
        let payloads =
            read_locators(&*self.file, &self.decision.header).map_err(self.io("reading a parent locator"))?;
        let start = self.headers.file_bytes.next_multiple_of(PAGE_BYTES).max(target.slot_origin);
        Ok(put_locators(&mut self.decision.header, payloads, start))
    }

    /// Does again what comes last in an upgrade. It may have been cut there, or be in the cache alone: then the temporary journal
    /// still ends the file, and would count again if the first page were spoiled. `fresh` is the first slot behind the last block.
    /// Durable on return.
    pub(super) fn end_upgrade(&self, fresh: u64) -> Result<()> {
        let footer = self.decision.footer.to_bytes();
        self.file
            .write_all_at(&footer, self.place.slot_offset(fresh))
            .map_err(self.io("writing the footer"))?;
        self.sync()?;
        self.file
            .set_len(self.place.file_bytes(fresh))
            .map_err(self.io("cutting the file behind its last block"))?;
        self.sync()
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

/// Whether a superblock is what an upgrade has written: no session has been since.
pub(super) fn is_fresh(superblock: &Superblock) -> bool {
    superblock.sequence <= UPGRADED_SEQUENCE && superblock.foreign_blocks
}

/// The payload of each parent locator that is in use, by its number, padded to a page.
fn read_locators(file: &dyn File, header: &DynamicHeader) -> io::Result<Vec<(usize, Vec<u8>)>> {
    let mut payloads = Vec::new();
    for (number, locator) in header.locators.iter().enumerate() {
        let Some(range) = locator.payload_range().ok().flatten() else { continue };
        let mut page = vec![0; PAGE_BYTES as usize];
        let payload = page.get_mut(..(range.end - range.start) as usize).unwrap_or_default();
        file.read_or_zero_at(payload, range.start)?;
        payloads.push((number, page));
    }
    Ok(payloads)
}

/// Gives each locator of `payloads` a page from `start` on; the pages with their places.
fn put_locators(
    header: &mut DynamicHeader,
    payloads: Vec<(usize, Vec<u8>)>,
    start: u64,
) -> Vec<(u64, Vec<u8>)> {
    let mut pages = Vec::new();
    for (at, (number, page)) in (start..).step_by(PAGE_BYTES as usize).zip(payloads) {
        if let Some(locator) = header.locators.get_mut(number) {
            *locator = ParentLocator { data_space: PAGE_BYTES as u32, data_offset: at, ..*locator };
            pages.push((at, page));
        }
    }
    pages
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
        let (footer, mut header) = core.headers.clone();
        let payloads = read_locators(file, &header).map_err(failed("reading a parent locator"))?;
        let copies: Vec<u64> = payloads
            .iter()
            .filter_map(|(number, _)| Some(header.locators.get(*number)?.data_offset))
            .filter(|&at| at >= place.slot_origin)
            .collect();
        let locators = put_locators(&mut header, payloads, LOCATORS_OFFSET);
        let under_way = header.clone();
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
            sequence: UPGRADED_SEQUENCE,
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
        let first = Superblock { sequence: UPGRADED_SEQUENCE - 1, ..superblock };
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
            .and_then(|()| {
                parts.iter().chain(&locators).try_for_each(|(at, bytes)| file.write_all_at(bytes, *at))
            })
            .map_err(failed("writing the private area"))?;
        if !defect::active(Defect::UpgradeWithoutSync) {
            core.journal.sync(file)?;
        }
        if !locators.is_empty() {
            // Under the dirty cookie: it is in another sector than the locators, and a torn header must not look clean.
            write_header(file, &self.place, &under_way, HeaderCookie::Dirty)
                .map_err(failed("writing the dynamic header"))?;
        }
        file.write_durable_at(&front, 0).map_err(failed("writing the start of the file"))?;
        // The copies of the payloads have been of use; the footer may come to stand there.
        for at in copies {
            zero_range(file, at, PAGE_BYTES).map_err(failed("punching copies of parent locators"))?;
        }
        file.write_all_at(&footer.to_bytes(), place.slot_offset(fresh))
            .map_err(failed("writing the footer"))?;
        core.journal.sync(file)?;
        file.set_len(place.file_bytes(fresh)).map_err(failed("cutting the file behind its last block"))?;
        if !defect::active(Defect::JournalOutlivesUpgrade) {
            core.journal.sync(file)?;
        }
        file.set_modified(modified).map_err(failed("setting the modification time"))
    }
}
