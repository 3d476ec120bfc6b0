//! Images made elsewhere, open for writing: the temporary journal at the end of the file (FORMAT.md, "Temporary journal").
//!
//! ```text
//! headers, BAT, blocks … │ slots, free │ ring │ working BAT │ head: page 0, superblocks, backup, BAT's edges, footer │ end
//! ```
//!
//! A session works on a BAT of its own behind the ring, and never touches the one that other programs read: that is written at
//! the close, from what the temporary journal alone determines, as often as a crash asks for it. The file keeps its length from
//! the first step to the last, so the journal is found from the end of the file when the start is lost.
//!
//! Open: sync · the journal, all of it, with a footer that ends the file · sync · dirty cookie with its place · free space punched · sync.
//! Close: superblock clean · the BAT's pages and page 0, still dirty · sync · normal cookie · footer behind the last block · sync ·
//! the file is cut.

use super::Layer;
use super::headers::{
    Decision, HEADER_END, HEADER_OFFSET, HeaderPair, Headers, MAX_TABLE_ROOM_BYTES, MIN_RING_BYTES,
    pair_bytes, table_end, writable_blocks,
};
use super::open::{Foreign, Opening, Ready, write_header};
use super::overlay::Overlay;
use super::session::{SessionCore, Superblocks};
use super::table::{self, Survey};
use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::ext::{
    DataCrcs, FIRST_TABLE_PAGE_OFFSET, Fingerprint, LAST_TABLE_PAGE_OFFSET, Lineage, PAGE_BYTES, Placement,
    SUPERBLOCK_OFFSETS, SessionId, State, Superblock, TEMPORARY_HEAD_BYTES, Tail, Temporary, feature,
};
use crate::journal::{Failure, write_zeros};
use crate::vfs::{File, FileExt};
use crate::vhd::{self, DynamicHeader, Footer, HeaderCookie, PlatformCode};
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::path::Path;

const PAGE: usize = PAGE_BYTES as usize;
/// The longest ring of a temporary journal.
const RING_BYTES: u64 = 2 << 20;
/// Slots beyond those that the disk's blocks can fill, for those that wait to be used again.
const SPARE_SLOTS: u64 = 512;
/// Slots end below this: BAT entries count sectors in 32 bits.
const ADDRESSABLE: u64 = 2 << 40;

/// What belongs to other structures than blocks: the payloads of parent locators, and blktap's batmap.
pub(super) fn kept_ranges(
    file: &dyn File,
    path: &Path,
    decision: &Decision,
    file_bytes: u64,
) -> Result<Vec<Range<u64>>> {
    let header = &decision.header;
    let mut kept = Vec::new();
    for locator in header.locators.iter().filter(|locator| locator.platform != PlatformCode::None) {
        let (Ok(Some(payload)), Ok(space)) = (locator.payload_range(), locator.space_bytes()) else {
            continue;
        };
        kept.push(payload.start..payload.end.max(payload.start.saturating_add(space)));
    }
    if &decision.footer.creator_app == b"tap\0" {
        kept.extend(batmap(file, path, header)?);
    }
    // What is not in the file is nothing that could be kept.
    kept.retain(|range| range.start < range.end && range.end <= file_bytes);
    Ok(kept)
}

/// The header of blktap's batmap, at once behind the BAT, and the map that it names.
fn batmap(file: &dyn File, path: &Path, header: &DynamicHeader) -> Result<Vec<Range<u64>>> {
    let at = table_end(header);
    let mut sector = [0; vhd::SECTOR as usize];
    file.read_or_zero_at(&mut sector, at)
        .map_err(|error| Error::io(path, format!("reading the batmap at offset {at}"), error))?;
    let field = |range: Range<usize>| {
        sector.get(range).unwrap_or_default().iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
    };
    if !sector.starts_with(b"tdbatmap") {
        return Ok(Vec::new());
    }
    let (start, sectors) = (field(8..16), field(16..20));
    Ok(vec![at..at.saturating_add(vhd::SECTOR), start..start.saturating_add(sectors * vhd::SECTOR)])
}

impl Opening {
    /// Starts a session on a closed image made elsewhere.
    pub(super) fn start_elsewhere(mut self) -> Result<(Self, Superblocks, Ready)> {
        let path = self.path.clone();
        let unsupported = |what: String| Err(Error::Unsupported { path: path.clone(), what });
        self.check_contradictions()?;
        if vhd::bat_bytes(self.place.table_entries) > MAX_TABLE_ROOM_BYTES {
            return unsupported("its block table is too long to be written to: open it read-only".into());
        }
        writable_blocks(&self.place, &self.path, self.decision.footer.data_offset)?;
        let file_bytes = self.headers.file_bytes;
        let table = table::read_table(&*self.file, &self.path, &self.place)?;
        let entries = table::entries(&table, &self.place);
        table::check_foreign(&self.path, &self.decision, &entries, file_bytes)?;
        let unmoved = self.decision.header.clone();
        let locators = self.move_locators()?;
        let kept_end = locators.last().map_or(file_bytes, |(at, _)| at + PAGE_BYTES);
        let kept = kept_ranges(&*self.file, &self.path, &self.decision, kept_end)?;

        let place = self.temporary_place(&entries, &kept)?;
        let Some(temporary) = place.temporary else {
            return unsupported("it has no place for a journal".into());
        };
        let survey = Survey::new(&self.path, &place, &entries, |_| file_bytes)?;
        let session = SessionId(self.vfs.random_id().map_err(self.io("asking for a random id"))?);
        // Later sessions count on from here, so that of two headers that name a block the newer one can be told.
        let next_allocation =
            u64::try_from(self.vfs.now().seconds).unwrap_or(0).saturating_mul(1 << 20).max(1);
        let superblock = Superblock {
            sequence: 2,
            disk_id: self.decision.footer.unique_id,
            incompatible: feature::TEMPORARY,
            read_only_compatible: 0,
            compatible: 0,
            state: State::Dirty,
            sync_failed: false,
            foreign_blocks: true,
            session,
            ring_offset: place.ring_offset,
            ring_bytes: place.ring_bytes,
            meta_tail: Tail::FIRST,
            data_tail: Tail::FIRST,
            next_allocation: next_allocation.saturating_add(1 << 40),
            slot_origin: place.slot_origin,
            fingerprint: Fingerprint::default(),
            lineage: Lineage::default(),
            data_crcs: DataCrcs::default(),
        };
        // The cut that ended the last session may wait for a sync yet: without it the old journal would come back where parts of the
        // new one are lost.
        if !defect::active(Defect::JournalOverLeftover) {
            self.sync()?;
        }
        let written = self.write_journal(&place, &temporary, &superblock, &table, &locators);
        let written = written.and_then(|()| match defect::active(Defect::MarkBeforeJournal) {
            true => Ok(()),
            false => self.sync(),
        });
        if let Err(error) = written {
            // Its footer is where it was, so the file is what it was.
            let _ = self.file.set_len(file_bytes);
            return Err(error);
        }
        let offsets = SUPERBLOCK_OFFSETS.map(|offset| temporary.head + offset);
        let superblocks = Superblocks::new(superblock, 1, true, offsets);
        let headers = Headers { base: temporary.head, file_bytes: place.file_bytes(0), ..self.headers };
        let decision = Decision { base: temporary.head, superblock: Some((superblock, 1)), ..self.decision };
        let upgrade = self.upgrade;
        let mut opening = Opening::from_parts(self.vfs, self.file, &self.path, headers, decision, place)?;
        opening.upgrade = upgrade;
        if !locators.is_empty() {
            // The cookie alone first: it is in another sector than the locators, and a torn header must not look clean.
            write_header(&*opening.file, &opening.place, &unmoved, HeaderCookie::Dirty)
                .map_err(opening.io("writing the dynamic header at offset 512"))?;
        }
        opening.write_header(HeaderCookie::Dirty)?;
        let free: BTreeSet<u32> = survey.free_slots(&place).collect();
        // The old footer, and whatever else another program has left.
        opening.punch_slots(&free)?;
        opening.cut_behind(survey.fresh)?;
        opening.sync()?;
        let (fresh, foreign) = (survey.fresh, Foreign::Untouched);
        Ok((opening, superblocks, Ready { session, entries, fresh, free, next_allocation, kept, foreign }))
    }

    /// Where slots and the temporary journal are: room for every block of the disk behind the last one, then the journal.
    fn temporary_place(&self, entries: &[u32], kept: &[Range<u64>]) -> Result<Placement> {
        let header = &self.decision.header;
        let file_end = self.headers.file_bytes.next_multiple_of(PAGE_BYTES);
        let ring_bytes = ring_bytes(&self.decision.footer);
        let temporary =
            Temporary { head: u64::MAX, table_offset: header.table_offset, table_end: table_end(header) };
        // Places that leave all the room there is, to see where the last block is.
        let wide = Placement {
            ring_offset: ADDRESSABLE.max(file_end),
            ring_bytes,
            temporary: Some(temporary),
            ..self.place
        };
        let origin = slot_origin(&wide, &temporary, entries, kept);
        // For an upgrade, on the grid that the image will have.
        let origin = self.upgrade.map_or(origin, |target| {
            let slots = origin.saturating_sub(target.slot_origin).div_ceil(target.slot_stride());
            target.slot_offset(slots)
        });
        let wide = Placement { slot_origin: origin, ..wide };
        let survey = Survey::new(&self.path, &wide, entries, |_| self.headers.file_bytes)?;
        let blocks = u64::from(wide.table_entries);
        let room = blocks + blocks.min(SPARE_SLOTS) + 8;
        let used = wide.slot_offset(survey.fresh).max(file_end);
        let ring_offset = wide.slot_offset(survey.fresh + room).min(ADDRESSABLE).max(used);
        let table_offset = ring_offset + ring_bytes;
        let head = table_offset + vhd::bat_bytes(wide.table_entries).next_multiple_of(PAGE_BYTES);
        Ok(Placement { ring_offset, table_offset, temporary: Some(Temporary { head, ..temporary }), ..wide })
    }

    /// Writes all of a new temporary journal, and `others` with it, by their places. Nothing is durable on return.
    fn write_journal(
        &self,
        place: &Placement,
        temporary: &Temporary,
        superblock: &Superblock,
        table: &[u8],
        others: &[(u64, Vec<u8>)],
    ) -> Result<()> {
        let file = &*self.file;
        let head = temporary.head;
        let read = |at: u64| {
            let mut page = vec![0; PAGE];
            let read = file.read_or_zero_at(&mut page, at).map(|()| page);
            read.map_err(self.io("reading a page that is to be copied"))
        };
        let mut pages = temporary.table_pages(place.table_entries);
        let first = pages.next().unwrap_or(0);
        let last = pages.last().unwrap_or(first);
        let mut end = vec![0; PAGE - Footer::SIZE];
        end.extend(self.decision.footer.to_bytes());
        let before = Superblock { sequence: 1, ..*superblock };
        // The bytes behind the table in its last page are no entries.
        let mut working: Vec<u8> = table.iter().copied().take(place.table_entries as usize * 4).collect();
        working.resize(working.len().next_multiple_of(PAGE), 0xff);
        let [a, b] = SUPERBLOCK_OFFSETS;
        let parts = [
            (place.table_offset, working),
            (head, read(0)?),
            (head + a, before.to_bytes().to_vec()),
            (head + b, superblock.to_bytes().to_vec()),
            (place.backup_offset(), pair_bytes(&self.decision.footer, &self.decision.header).to_vec()),
            (head + FIRST_TABLE_PAGE_OFFSET, read(first)?),
            (head + LAST_TABLE_PAGE_OFFSET, read(last)?),
            (head + TEMPORARY_HEAD_BYTES - PAGE_BYTES, end),
        ];
        let io = || self.io("writing a temporary journal behind the last block");
        file.set_len(place.file_bytes(0)).map_err(io())?;
        // Written, not only reserved, so that a journal entry needs no new space later.
        write_zeros(file, place.ring_offset, place.ring_bytes).map_err(io())?;
        parts.iter().chain(others).try_for_each(|(at, bytes)| file.write_all_at(bytes, *at)).map_err(io())
    }

    /// Of an image made elsewhere whose start is lost: lays the copy of its first page beneath what is read instead of the file. A
    /// block may begin there that has not moved yet.
    pub(super) fn put_first_page(&self, overlay: &mut Overlay) -> Result<()> {
        if let Some(temporary) = self.place.temporary.filter(|_| self.decision.front_lost) {
            overlay.put_beneath(0, &self.copied_first_page(&temporary)?);
        }
        Ok(())
    }

    fn copied_first_page(&self, temporary: &Temporary) -> Result<Vec<u8>> {
        let mut page = vec![0; PAGE];
        if defect::active(Defect::FirstPageNotKept) {
            return Ok(page);
        }
        let read = self.file.read_or_zero_at(&mut page, temporary.head);
        read.map(|()| page).map_err(self.io("reading the copy of the first page"))
    }

    /// Of an image made elsewhere: writes what is behind the headers in the first page from its copy. Durable on return.
    pub(super) fn restore_first_page(&self) -> Result<()> {
        let Some(temporary) = self.place.temporary else { return Ok(()) };
        let page = self.copied_first_page(&temporary)?;
        let behind = page.get(HEADER_END..).unwrap_or_default();
        let written = self.file.write_durable_at(behind, HEADER_END as u64);
        written.map_err(self.io("writing the first page from its copy"))
    }
}

/// The length of a ring for a disk, in bytes: shorter for small ones.
pub(super) fn ring_bytes(footer: &Footer) -> u64 {
    (footer.current_size / 512).clamp(MIN_RING_BYTES, RING_BYTES).next_multiple_of(PAGE_BYTES)
}

/// The lowest place from which on every block stands on one grid, with the page in front of its data to itself. Blocks that an
/// earlier session placed do, so what they leave free is used again. Those of other programs do not, but for a coincidence: some
/// of them come to stand where one of ours would, with another one's data in front of them.
fn slot_origin(place: &Placement, temporary: &Temporary, entries: &[u32], kept: &[Range<u64>]) -> u64 {
    let floor = kept.iter().map(|range| range.end).fold(temporary.table_end, u64::max);
    let floor = floor.max(HEADER_OFFSET + DynamicHeader::SIZE as u64).next_multiple_of(PAGE_BYTES);
    let mut blocks: Vec<u32> = entries.iter().copied().filter(|&entry| entry != vhd::UNALLOCATED).collect();
    blocks.sort_unstable();
    let Some(&last) = blocks.last() else { return floor };
    let (stride, anchor) = (place.slot_stride(), place.block_page_offset(last));
    // The first place of the grid at or behind `at`.
    let on_grid = |at: u64| match anchor.checked_sub(at) {
        Some(distance) => anchor - distance / stride * stride,
        None => anchor + (at - anchor).div_ceil(stride) * stride,
    };
    if !anchor.is_multiple_of(PAGE_BYTES) {
        return place.block_end(last).next_multiple_of(PAGE_BYTES).max(floor);
    }
    for (number, &entry) in blocks.iter().enumerate().rev() {
        let page = place.block_page_offset(entry);
        let before = number.checked_sub(1).and_then(|number| blocks.get(number));
        let before = before.map_or(floor, |&entry| place.block_end(entry).max(floor));
        let is_ours = place.data_offset(entry) >= PAGE_BYTES
            && page.abs_diff(anchor).is_multiple_of(stride)
            && before <= page;
        if !is_ours {
            return on_grid(place.block_end(entry).max(floor));
        }
    }
    on_grid(floor)
}

impl Placement {
    /// A dynamic header as it stands in the file with this cookie.
    pub(super) fn marked(&self, header: &DynamicHeader, cookie: HeaderCookie) -> DynamicHeader {
        let data_offset = match (self.temporary, cookie) {
            (Some(temporary), HeaderCookie::Dirty) => temporary.head,
            _ => header.data_offset,
        };
        DynamicHeader { cookie, data_offset, ..header.clone() }
    }
}

fn put_headers(page: &mut [u8], footer: &Footer, header: &DynamicHeader) {
    let pair = pair_bytes(footer, header);
    if let Some(start) = page.get_mut(..pair.len()) {
        start.copy_from_slice(&pair);
    }
}

impl Layer {
    /// Ends a session on an image made elsewhere, when all is in place in the working BAT and the blocks.
    pub(super) fn leave_clean(
        &self,
        core: &mut SessionCore,
        temporary: &Temporary,
        fresh: u64,
        next_allocation: u64,
    ) -> Result<(), Failure> {
        let file = &*self.file;
        let failed = |operation| move |error| Failure { operation, error, fatal: false };
        if !defect::active(Defect::CloseWithoutSync) {
            core.journal.sync(file)?;
        }
        let dirty = core.superblocks.current;
        core.superblocks.current =
            Superblock { state: State::Clean, session: SessionId::default(), next_allocation, ..dirty };
        if let Err(error) = core.superblocks.write_next(file) {
            let sequence = core.superblocks.current.sequence;
            core.superblocks.current = Superblock { sequence, ..dirty };
            return Err(failed("writing a superblock")(error));
        }
        if let Some(place) = &self.upgrade {
            return self.become_ours(core, place, fresh, next_allocation);
        }
        let pair = core.headers.clone();
        for (at, page) in self
            .published_pages(core.journal.table(), temporary, &pair)
            .map_err(failed("reading copied pages"))?
        {
            let mut there = vec![0; PAGE];
            let same = file.read_or_zero_at(&mut there, at).is_ok() && there == page;
            if !same {
                file.write_all_at(&page, at).map_err(failed("writing the block table in place"))?;
            }
        }
        if !defect::active(Defect::LeaveBeforeTable) {
            core.journal.sync(file)?;
        }
        write_header(file, &self.place, &pair.1, HeaderCookie::Normal)
            .map_err(failed("writing the dynamic header"))?;
        // From here on the image is closed, with some space in front of the footer that ends it.
        let end = self.content_end(core.journal.table(), &pair.1);
        file.write_all_at(&pair.0.to_bytes(), end).map_err(failed("writing the footer"))?;
        core.journal.sync(file)?;
        file.set_len(end + Footer::SIZE as u64).map_err(failed("cutting the file behind its last block"))
    }

    /// The pages that other programs' BAT takes a part of, and page 0 with the dirty cookie: from the temporary journal alone.
    fn published_pages(
        &self,
        entries: &[u32],
        temporary: &Temporary,
        (footer, header): &HeaderPair,
    ) -> io::Result<Vec<(u64, Vec<u8>)>> {
        let copy = |at: u64| -> io::Result<Vec<u8>> {
            let mut page = vec![0; PAGE];
            self.file.read_or_zero_at(&mut page, temporary.head + at).map(|()| page)
        };
        let table: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let mut offsets: Vec<u64> = temporary.table_pages(self.place.table_entries).collect();
        let (first, last) = (offsets.first().copied(), offsets.last().copied());
        if first != Some(0) {
            offsets.insert(0, 0);
        }
        let mut pages = Vec::with_capacity(offsets.len());
        for at in offsets {
            let mut page = match at {
                0 => copy(0)?,
                _ if Some(at) == first => copy(FIRST_TABLE_PAGE_OFFSET)?,
                _ if Some(at) == last => copy(LAST_TABLE_PAGE_OFFSET)?,
                _ => vec![0; PAGE],
            };
            for (index, byte) in page.iter_mut().enumerate() {
                let in_table = (at + index as u64).checked_sub(temporary.table_offset);
                if let Some(entry) = in_table.and_then(|from| table.get(from as usize)) {
                    *byte = *entry;
                }
            }
            if at == 0 {
                put_headers(&mut page, footer, &self.place.marked(header, HeaderCookie::Dirty));
            }
            pages.push((at, page));
        }
        Ok(pages)
    }

    /// Where the footer goes: on a page of its own behind everything, so that writing it touches no guest's data.
    fn content_end(&self, entries: &[u32], header: &DynamicHeader) -> u64 {
        let blocks = entries.iter().filter(|&&entry| entry != vhd::UNALLOCATED);
        let blocks = blocks.map(|&entry| self.place.block_end(entry));
        let kept = self.kept.iter().map(|range| range.end);
        let headers = HEADER_OFFSET + DynamicHeader::SIZE as u64;
        let end = blocks.chain(kept).max().unwrap_or(0).max(headers).max(table_end(header));
        end.next_multiple_of(PAGE_BYTES)
    }
}
