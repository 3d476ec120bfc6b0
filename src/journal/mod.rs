//! The journal at run time: map changes go into the ring, from there in place, and slots that were freed come back.
//!
//! One [`Journal`] belongs to one session of one image and is used by one thread at a time (its owner holds the lock from
//! a flush's cut to its durable entry). It keeps the BAT *as the appended records say it is*, apart from the map that
//! guests use: an image of a page holds exactly the records of lower sequence, never what is only in memory.
//!
//! Invariants kept here:
//! - **I2** A metadata page changes in place only after durable, live records determine it: an image for a page of the
//!   BAT, the `alloc` record for a block page.
//! - **I3** A freed slot is handed back only when its free is durable and in place, nobody holds a pin on it, it was then
//!   punched, a later sync returned, and no data or zero record that is older than the free is live.
//! - Pages that need an image number at most a quarter of the ring's pages, and that many and some more stay free for the
//!   images and for the entry that moves the tails; so a checkpoint always finds room, also in recovery.

mod block_page;
mod replay;
mod ring;
mod scan;

pub(crate) use block_page::BlockPage;
pub(crate) use replay::{Replay, ReplayError};
pub(crate) use ring::Ring;
pub(crate) use scan::Scan;

use crate::defect::{self, Defect};
use crate::error::is_no_space;
use crate::ext::{BlockHeader, PAGE_BYTES, Placement, Record};
use crate::vfs::{File, FileExt};
use crate::vhd::{self, UniqueId};
use std::collections::{BTreeMap, BTreeSet};
use std::io;

const PAGE: usize = PAGE_BYTES as usize;
const ENTRIES_PER_PAGE: u32 = PAGE as u32 / 4;

/// A change of the block map, published to guests and not yet journaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MapChange {
    /// `block` now lives in `slot`: all of it, or, in a differencing disk, as far as `Bits` say.
    Alloc { block: u32, slot: u32, allocation: u64, whole: bool },
    /// These sectors of a differencing disk's block are present in `slot` from now on.
    Bits { block: u32, slot: u32, first_sector: u32, sectors: u32 },
    /// `block` no longer lives in `slot`.
    Free { block: u32, slot: u32 },
}

impl MapChange {
    /// The block whose BAT entry changes.
    fn block(&self) -> Option<u32> {
        match *self {
            MapChange::Alloc { block, .. } | MapChange::Free { block, .. } => Some(block),
            MapChange::Bits { .. } => None,
        }
    }

    fn record<'a>(&self) -> Record<'a> {
        match *self {
            MapChange::Alloc { block, slot, allocation, whole } => {
                Record::Alloc { block, slot, allocation, bitmap_set: whole }
            }
            // As with data records, I3 keeps them apart from later allocations of their slot.
            MapChange::Bits { slot, first_sector, sectors, .. } => {
                Record::Bits { slot, allocation: 0, first_sector, sectors }
            }
            MapChange::Free { block, slot } => Record::Free { block, slot },
        }
    }
}

/// A piece of a block that holds data, or zeros, which no flush has covered yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DirtyExtent {
    /// Index in the BAT.
    pub(crate) block: u32,
    /// The slot, by its BAT entry.
    pub(crate) slot: u32,
    /// First sector within the block.
    pub(crate) first_sector: u32,
    /// Number of sectors.
    pub(crate) sectors: u32,
    /// The piece was made zero, not written.
    pub(crate) zero: bool,
}

impl DirtyExtent {
    /// The sector behind the last one.
    pub(crate) fn end_sector(&self) -> u32 {
        self.first_sector + self.sectors
    }

    /// Length in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.sectors) * vhd::SECTOR
    }
}

/// A piece with its data, ready to be journaled; no data for zeros.
pub(crate) type DirtyPiece = (DirtyExtent, Vec<u8>);

fn data_record((extent, data): &DirtyPiece) -> Record<'_> {
    let DirtyExtent { slot, first_sector, sectors, zero, .. } = *extent;
    // I3 keeps data records apart from later allocations of their slot, so that none needs to be named.
    match zero {
        true => Record::Zero { slot, allocation: 0, first_sector, sectors },
        false => Record::Data { slot, allocation: 0, first_sector, bytes: data },
    }
}

/// An I/O error inside the journal.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What was tried.
    pub(crate) operation: &'static str,
    /// The system's answer.
    pub(crate) error: io::Error,
    /// It is unknown what reached the medium: nothing more may be written in this session.
    pub(crate) fatal: bool,
}

impl Failure {
    /// Whether the system lacks space, and nothing is unknown.
    pub(crate) fn is_no_space(&self) -> bool {
        !self.fatal && is_no_space(&self.error)
    }

    fn fatal(operation: &'static str) -> impl FnOnce(io::Error) -> Failure {
        move |error| Failure { operation, error, fatal: true }
    }

    fn transient(operation: &'static str) -> impl FnOnce(io::Error) -> Failure {
        move |error| Failure { operation, error, fatal: false }
    }
}

/// Where a freed slot stands on its way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Not punched yet.
    Freed,
    /// Punched, not synced since.
    Punched,
    /// Durably zero.
    Clean,
}

#[derive(Debug, Clone, Copy)]
struct Quarantined {
    slot: u32,
    /// Sequence of the entry with the free record; 0 for a slot that no record ever named.
    freed_at: u64,
    stage: Stage,
}

/// The journal of an open session.
#[derive(Debug)]
pub(crate) struct Journal {
    ring: Ring,
    place: Placement,
    disk_id: UniqueId,
    /// The BAT as the appended records say.
    table: Vec<u32>,
    /// Pages of the BAT that are not in place.
    table_pages: BTreeSet<u32>,
    /// Those of them that have an image in the live ring.
    imaged_pages: BTreeSet<u32>,
    /// Block pages that are not in place, by slot.
    block_pages: BTreeMap<u32, BlockPage>,
    /// Those of them that have an image in the live ring.
    imaged_slots: BTreeSet<u32>,
    quarantine: Vec<Quarantined>,
}

impl Journal {
    /// The journal of a new session over a BAT that is in place.
    pub(crate) fn new(ring: Ring, place: Placement, disk_id: UniqueId, table: Vec<u32>) -> Self {
        Journal {
            ring,
            place,
            disk_id,
            table,
            table_pages: BTreeSet::new(),
            imaged_pages: BTreeSet::new(),
            block_pages: BTreeMap::new(),
            imaged_slots: BTreeSet::new(),
            quarantine: Vec::new(),
        }
    }

    /// The BAT as the appended records say.
    pub(crate) fn table(&self) -> &[u32] {
        &self.table
    }

    /// Replaces the journaled BAT by another one: the defect of that name.
    pub(crate) fn take_table_from(&mut self, entries: impl Iterator<Item = Option<u32>>) {
        for (target, entry) in self.table.iter_mut().zip(entries) {
            *target = entry.unwrap_or(vhd::UNALLOCATED);
        }
    }

    /// How many freed slots wait to come back.
    pub(crate) fn waiting_slots(&self) -> usize {
        self.quarantine.len()
    }

    fn max_image_pages(&self) -> usize {
        (self.place.ring_bytes / PAGE_BYTES / 4) as usize
    }

    fn reserve_bytes(&self) -> u64 {
        if defect::active(Defect::SpaceByMemoryTails) {
            return 0;
        }
        (self.max_image_pages() as u64 + 16) * PAGE_BYTES
    }

    /// Syncs all data and metadata written so far.
    pub(crate) fn sync(&mut self, file: &dyn File) -> Result<(), Failure> {
        file.sync_data().map_err(Failure::fatal("syncing the image"))?;
        for waiting in self.quarantine.iter_mut().filter(|waiting| waiting.stage == Stage::Punched) {
            waiting.stage = Stage::Clean;
        }
        Ok(())
    }

    /// Makes `changes` durable, in order, in one or more entries; everything they expose has been synced. Takes those that
    /// became durable off the front of `changes`, also when it fails.
    pub(crate) fn append(&mut self, file: &dyn File, changes: &mut Vec<MapChange>) -> Result<(), Failure> {
        let mut done = 0;
        let result = self.append_all(file, changes, &mut done);
        changes.drain(..done);
        result
    }

    fn append_all(
        &mut self,
        file: &dyn File,
        changes: &[MapChange],
        done: &mut usize,
    ) -> Result<(), Failure> {
        while let Some(rest) = changes.get(*done..).filter(|rest| !rest.is_empty()) {
            let count = self.changes_within_image_limit(rest);
            if count == 0 {
                self.checkpoint(file)?;
                continue;
            }
            let rest = rest.get(..count).unwrap_or_default();
            self.load_pages(file, rest)?;
            let records: Vec<Record<'_>> = rest.iter().map(MapChange::record).collect();
            match self.try_append(file, &records, true, self.reserve_bytes())? {
                Some(appended) => {
                    *done += appended.records;
                    for change in rest.iter().take(appended.records) {
                        self.apply(change, appended.sequence);
                    }
                }
                None => self.make_room(file)?,
            }
        }
        Ok(())
    }

    /// Whether `changes` and the data of `extents` fit into one entry without a checkpoint.
    pub(crate) fn has_room_for(&self, changes: &[MapChange], extents: &[DirtyExtent]) -> bool {
        let data: u64 = extents.iter().filter(|extent| !extent.zero).map(DirtyExtent::bytes).sum();
        let bytes = ring::entry_bytes((changes.len() + extents.len()) * Record::HEADER_BYTES + data as usize);
        // An entry that the end of the lap splits takes two pages more, and a filler one.
        bytes <= self.ring.max_entry_bytes()
            && bytes + 3 * PAGE_BYTES + self.reserve_bytes() <= self.ring.free_bytes()
            && self.changes_within_image_limit(changes) == changes.len()
    }

    /// Makes `changes` and the data in `pieces` durable with one entry (two at the end of a lap), without syncing anything:
    /// the data counts as live until a later sync and entry cover it. The caller has seen that there is room.
    pub(crate) fn append_with_data(
        &mut self,
        file: &dyn File,
        changes: &mut Vec<MapChange>,
        pieces: &[DirtyPiece],
    ) -> Result<(), Failure> {
        self.load_pages(file, changes)?;
        let mut records: Vec<Record<'_>> = pieces.iter().map(data_record).collect();
        records.splice(0..0, changes.iter().map(|change| change.record()));
        let mut done = 0;
        while let Some(rest) = records.get(done..).filter(|rest| !rest.is_empty()) {
            match self.try_append(file, rest, false, 0)? {
                Some(appended) => {
                    for change in changes.iter().skip(done).take(appended.records) {
                        self.apply(change, appended.sequence);
                    }
                    done += appended.records;
                }
                None => return Err(ring_full()),
            }
        }
        changes.clear();
        Ok(())
    }

    /// Whether a data or zero record counts that a sync has made superfluous: then a full flush must write an entry even if
    /// it has nothing to say, or a crash would replay the old data over newer.
    pub(crate) fn has_live_data(&self) -> bool {
        self.ring.has_live_data()
    }

    /// An entry without records, whose data tail is itself; the caller has just synced. If nothing waits for a checkpoint,
    /// its meta tail is itself as well, and the ring is empty but for it; and if the ring is short, there is one now.
    pub(crate) fn retire_data(&mut self, file: &dyn File) -> Result<(), Failure> {
        let is_short = self.ring.free_bytes() < self.reserve_bytes() + self.ring.max_entry_bytes();
        if self.table_pages.is_empty() && self.block_pages.is_empty() {
            self.ring.all_in_place();
        } else if is_short {
            self.checkpoint(file)?;
        }
        match self.try_append(file, &[], true, 0)? {
            Some(_) => Ok(()),
            None => Err(ring_full()),
        }
    }

    /// How many leading changes keep the pages that need an image within their limit.
    fn changes_within_image_limit(&self, changes: &[MapChange]) -> usize {
        let mut new_pages = BTreeSet::new();
        let mut new_slots = BTreeSet::new();
        let images = self.table_pages.len() + self.undetermined_block_pages();
        changes
            .iter()
            .zip(self.pages_to_load(changes))
            .take_while(|(change, slot)| {
                let page = change.block().map(|block| block / ENTRIES_PER_PAGE);
                new_pages.extend(page.filter(|page| !self.table_pages.contains(page)));
                new_slots.extend(*slot);
                images + new_pages.len() + new_slots.len() <= self.max_image_pages()
            })
            .count()
    }

    /// Block pages that the live records alone do not determine: they were in place before a record changed them.
    fn undetermined_block_pages(&self) -> usize {
        self.block_pages.values().filter(|page| !page.is_determined()).count()
    }

    /// For each change the slot of the block page that it changes and that is in place, not here; a slot may come more than
    /// once.
    fn pages_to_load(&self, changes: &[MapChange]) -> impl Iterator<Item = Option<u32>> {
        let mut fresh = BTreeSet::new();
        changes.iter().map(move |change| match *change {
            MapChange::Alloc { slot, .. } => {
                fresh.insert(slot);
                None
            }
            MapChange::Bits { slot, .. } => {
                (!self.block_pages.contains_key(&slot) && !fresh.contains(&slot)).then_some(slot)
            }
            MapChange::Free { .. } => None,
        })
    }

    /// Reads the block pages that `changes` are about to change and that are in place.
    fn load_pages(&mut self, file: &dyn File, changes: &[MapChange]) -> Result<(), Failure> {
        let slots: BTreeSet<u32> = self.pages_to_load(changes).flatten().collect();
        for slot in slots {
            let mut bytes = Box::new([0; PAGE]);
            let offset = self.place.block_page_offset(slot);
            file.read_or_zero_at(bytes.as_mut_slice(), offset)
                .map_err(Failure::transient("reading a block page"))?;
            self.block_pages.insert(slot, BlockPage::Bytes { bytes, determined: false });
        }
        Ok(())
    }

    fn try_append(
        &mut self,
        file: &dyn File,
        records: &[Record<'_>],
        data_synced: bool,
        keep_free: u64,
    ) -> Result<Option<ring::Appended>, Failure> {
        self.ring
            .append(file, records, data_synced, keep_free)
            .map_err(Failure::fatal("writing a journal entry"))
    }

    fn apply(&mut self, change: &MapChange, sequence: u64) {
        let (block, entry) = match *change {
            MapChange::Alloc { block, slot, allocation, whole } => {
                let page_offset = self.place.block_page_offset(slot);
                let header = BlockHeader { page_offset, disk_id: self.disk_id, block, allocation };
                self.block_pages.insert(slot, BlockPage::Fresh { header, bitmap_set: whole });
                (block, slot)
            }
            MapChange::Bits { slot, first_sector, sectors, .. } => {
                // Loaded before its record was written, or made by an `Alloc` before it.
                if let Some(page) = self.block_pages.get_mut(&slot) {
                    page.set_bits(&self.place, first_sector..first_sector + sectors);
                }
                return;
            }
            MapChange::Free { block, slot } => {
                self.block_pages.remove(&slot);
                self.imaged_slots.remove(&slot);
                self.quarantine.push(Quarantined { slot, freed_at: sequence, stage: Stage::Freed });
                (block, vhd::UNALLOCATED)
            }
        };
        if let Some(target) = self.table.get_mut(block as usize) {
            *target = entry;
        }
        self.table_pages.insert(block / ENTRIES_PER_PAGE);
    }

    /// Brings everything in place and moves the durable tails.
    fn make_room(&mut self, file: &dyn File) -> Result<(), Failure> {
        self.checkpoint(file)?;
        self.append_tails(file)
    }

    /// An entry without records that carries the tails, if they moved since the last one. The caller has just synced.
    pub(crate) fn append_tails(&mut self, file: &dyn File) -> Result<(), Failure> {
        if self.ring.tails_pending() { self.retire_data(file) } else { Ok(()) }
    }

    /// Brings all journaled metadata in place: images durable, pages written, synced; then the tails move (in memory,
    /// until the next entry carries them).
    pub(crate) fn checkpoint(&mut self, file: &dyn File) -> Result<(), Failure> {
        if !self.table_pages.is_empty() || !self.block_pages.is_empty() {
            if !defect::active(Defect::CheckpointWithoutImages) {
                self.append_images(file)?;
            }
            for &page in &self.table_pages {
                let (offset, bytes) = self.table_page(page);
                file.write_all_at(&bytes, offset)
                    .map_err(Failure::transient("writing a page of the block table"))?;
            }
            for (&slot, page) in &self.block_pages {
                let offset = self.place.block_page_offset(slot);
                file.write_all_at(page.bytes(&self.place).as_slice(), offset)
                    .map_err(Failure::transient("writing a block page"))?;
            }
        }
        if !defect::active(Defect::CheckpointWithoutSync) {
            self.sync(file)?;
        }
        self.ring.all_in_place();
        self.table_pages.clear();
        self.imaged_pages.clear();
        self.block_pages.clear();
        self.imaged_slots.clear();
        Ok(())
    }

    /// Makes an image durable of every page that is about to change in place, that live records do not determine and that
    /// has none in the live ring. An older image serves as well: the records behind it are live, too.
    fn append_images(&mut self, file: &dyn File) -> Result<(), Failure> {
        let pages: Vec<u32> = self.table_pages.difference(&self.imaged_pages).copied().collect();
        let slots: Vec<u32> = self
            .block_pages
            .iter()
            .filter(|(slot, page)| !page.is_determined() && !self.imaged_slots.contains(slot))
            .filter(|_| !defect::active(Defect::BitmapWithoutImage))
            .map(|(&slot, _)| slot)
            .collect();
        let table_images = pages.iter().map(|&page| self.table_page(page));
        let block_images = slots.iter().filter_map(|slot| {
            let page = self.block_pages.get(slot)?;
            Some((self.place.block_page_offset(*slot), page.bytes(&self.place).to_vec()))
        });
        let images: Vec<(u64, Vec<u8>)> = table_images.chain(block_images).collect();
        let records: Vec<Record<'_>> =
            images.iter().map(|(offset, bytes)| Record::Image { offset: *offset, bytes }).collect();
        self.append_images_of_all(file, &records)?;
        self.imaged_pages.extend(pages);
        self.imaged_slots.extend(slots);
        Ok(())
    }

    /// Makes images of pages durable that are neither the BAT's nor a block's. The caller brings them in place before anything else
    /// is journaled, or stops the session.
    pub(crate) fn append_images_of(
        &mut self,
        file: &dyn File,
        pages: &[(u64, &[u8])],
    ) -> Result<(), Failure> {
        let records: Vec<Record<'_>> =
            pages.iter().map(|&(offset, bytes)| Record::Image { offset, bytes }).collect();
        self.append_images_of_all(file, &records)
    }

    fn append_images_of_all(&mut self, file: &dyn File, images: &[Record<'_>]) -> Result<(), Failure> {
        let mut rest = images;
        while !rest.is_empty() {
            match self.try_append(file, rest, false, 0)? {
                Some(appended) => rest = rest.get(appended.records..).unwrap_or_default(),
                None => return Err(ring_full()),
            }
        }
        Ok(())
    }

    /// The bytes of one page of the BAT, padded with ones, and its file offset.
    fn table_page(&self, page: u32) -> (u64, Vec<u8>) {
        let first = page as usize * ENTRIES_PER_PAGE as usize;
        let entries = self.table.iter().skip(first).take(ENTRIES_PER_PAGE as usize);
        let mut bytes: Vec<u8> = entries.flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize(PAGE, 0xff);
        (self.place.table_offset + u64::from(page) * PAGE_BYTES, bytes)
    }

    /// Takes in a slot that was written to but that no record ever named.
    pub(crate) fn quarantine_unnamed(&mut self, slot: u32) {
        self.quarantine.push(Quarantined { slot, freed_at: 0, stage: Stage::Freed });
    }

    /// Punches the slots whose free is in place, unless `pinned` says that somebody still uses them.
    pub(crate) fn punch(&mut self, file: &dyn File, pinned: impl Fn(u32) -> bool) -> Result<(), Failure> {
        let in_place_before = self.ring.in_place_before();
        for waiting in &mut self.quarantine {
            if waiting.stage == Stage::Freed && waiting.freed_at < in_place_before && !pinned(waiting.slot) {
                if !defect::active(Defect::ReuseWithoutPunch) {
                    punch_slot(file, &self.place, waiting.slot)
                        .map_err(Failure::transient("punching a freed block"))?;
                }
                waiting.stage = Stage::Punched;
            }
        }
        Ok(())
    }

    /// Gives the space of freed slots back before their turn, as far as that works. Their free records are durable, so no
    /// crash brings them back; they are still to be punched when the free is in place.
    pub(crate) fn empty_freed(&self, file: &dyn File, pinned: impl Fn(u32) -> bool) {
        for waiting in self.quarantine.iter().filter(|waiting| waiting.stage == Stage::Freed) {
            if !pinned(waiting.slot) {
                let _ = punch_slot(file, &self.place, waiting.slot);
            }
        }
    }

    /// Hands back the slots that may be used again (I3).
    pub(crate) fn release(&mut self) -> Vec<u32> {
        let data_dead_before = self.ring.data_dead_before();
        let clean = |waiting: &Quarantined| match waiting.stage {
            Stage::Clean => true,
            Stage::Punched => defect::active(Defect::ReuseBeforePunchIsDurable),
            Stage::Freed => false,
        };
        let ready = |waiting: &Quarantined| clean(waiting) && waiting.freed_at < data_dead_before;
        let slots =
            self.quarantine.iter().filter(|waiting| ready(waiting)).map(|waiting| waiting.slot).collect();
        self.quarantine.retain(|waiting| !ready(waiting));
        slots
    }
}

/// Makes a slot (its page and its data) read as zeros. Of a block off our grid only the pages that are all its own: others
/// may hold another block's data or the BAT, and nothing is placed there before it was punched as a slot of ours.
pub(crate) fn punch_slot(file: &dyn File, place: &Placement, slot: u32) -> io::Result<()> {
    let end = place.block_end(slot);
    let (start, end) = match place.slot_index(slot) {
        Some(index) => (place.slot_offset(index), end),
        None => (place.bitmap_offset(slot).next_multiple_of(PAGE_BYTES), end / PAGE_BYTES * PAGE_BYTES),
    };
    match end.saturating_sub(start) {
        0 => Ok(()),
        length => zero_range(file, start, length),
    }
}

/// Makes a range of the file read as zeros, by a hole where the file system has them.
pub(crate) fn zero_range(file: &dyn File, offset: u64, length: u64) -> io::Result<()> {
    match file.punch_hole(offset, length) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => write_zeros(file, offset, length),
        result => result,
    }
}

/// Writes zeros, keeping the range allocated.
pub(crate) fn write_zeros(file: &dyn File, offset: u64, length: u64) -> io::Result<()> {
    const CHUNK: u64 = 256 * 1024;
    let zeros = vec![0; length.min(CHUNK) as usize];
    let mut at = offset;
    while at < offset + length {
        let count = (offset + length - at).min(CHUNK);
        file.write_all_at(zeros.get(..count as usize).unwrap_or_default(), at)?;
        at += count;
    }
    Ok(())
}

fn ring_full() -> Failure {
    let error = io::Error::other("the reserve of the journal ring is used up; this is a defect");
    Failure { operation: "writing a journal entry", error, fatal: true }
}
