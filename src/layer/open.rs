//! Opening an image: lock, decide what its structures say, and bring it to a session or to a read-only view.
//!
//! The order in which a clean image becomes dirty (each step durable before the next):
//! header backup · superblock(dirty, session) · the other superblock · dirty cookie · end footer cut ·
//! free slots punched, if another program may have written into them.

use super::Layer;
use super::allocator::Allocator;
use super::copies::stand_ins;
use super::headers::{Condition, Decision, HEADER_OFFSET, Headers, pair_bytes};
use super::map::{BlockMap, Mapping};
use super::overlay::Overlay;
use super::owners::Owners;
use super::recover;
use super::seal;
use super::session::{Session, Superblocks};
use super::table::{self, Survey};
use super::temporary::kept_ranges;
use super::units::Units;
use super::upgrade;
use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::ext::{Lineage, Placement, Record, SessionId, feature};
use crate::journal::{BlockPage, Journal, Ring, write_zeros, zero_range};
use crate::sync::Arc;
use crate::vfs::{Access, File, Vfs};
use crate::vhd::{self, DynamicHeader, Footer, HeaderCookie};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// What opening an image found and did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OpenReport {
    /// How the image was left by whoever used it last.
    pub(crate) condition: Condition,
    /// What another program did to it since cowvhd closed it.
    pub(crate) foreign: Foreign,
    /// The start of the file was unreadable and was taken from its backup.
    pub(crate) front_lost: bool,
    /// Which structures were not valid, where another copy of them was.
    pub(crate) stand_ins: Vec<String>,
    /// A sync failed in this or an earlier session.
    pub(crate) sync_failed: bool,
    /// Its structures contradict each other: it can be read, not written.
    pub(crate) doubt: Option<String>,
}

/// What another program did to a clean image between close and open, by the fingerprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Foreign {
    /// Nothing.
    Untouched,
    /// Only the modification time differs: the file was copied, or data of present blocks was overwritten.
    TimeChanged,
    /// Its structure differs: blocks were added, or headers rewritten.
    StructureChanged,
}

/// What another program did to a file that is not open here; `Untouched` where nothing tells.
pub(crate) fn foreign_changes(vfs: Arc<dyn Vfs>, file: Arc<dyn File>, path: &Path) -> Result<Foreign> {
    let opening = Opening::new(vfs, file, path)?;
    if opening.decision.superblock.is_none() || opening.decision.condition != Condition::Clean {
        return Ok(Foreign::Untouched);
    }
    let bytes = table::read_table(&*opening.file, path, &opening.place)?;
    opening.foreign(&table::entries(&bytes, &opening.place))
}

/// An image between its lock and its layer.
#[derive(Debug)]
pub(super) struct Opening {
    pub(super) vfs: Arc<dyn Vfs>,
    pub(super) file: Arc<dyn File>,
    pub(super) path: PathBuf,
    pub(super) headers: Headers,
    pub(super) decision: Decision,
    pub(super) place: Placement,
    /// The record of a snapshot that was undone goes with the start of the session.
    pub(super) snapshot_undone: bool,
    /// A sealed image is opened, too: for what changes nothing that a guest sees.
    pub(super) maintenance: bool,
    /// The places that the image is to have when the session ends.
    pub(super) upgrade: Option<Placement>,
    /// A sync of this opening failed.
    sync_failed: Cell<bool>,
}

/// What has to be known to start a session on an image whose metadata is all in place.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) session: SessionId,
    pub(super) entries: Vec<u32>,
    /// Slots from this index on were never used.
    pub(super) fresh: u64,
    /// Unused slots below `fresh`, which read as zeros.
    pub(super) free: BTreeSet<u32>,
    pub(super) next_allocation: u64,
    /// What belongs to other structures than blocks.
    pub(super) kept: Vec<Range<u64>>,
    pub(super) foreign: Foreign,
}

impl Opening {
    pub(super) fn new(vfs: Arc<dyn Vfs>, file: Arc<dyn File>, path: &Path) -> Result<Self> {
        let headers = Headers::read(&*file, path)?;
        let decision = headers.decide(path)?;
        let place = decision.placement(path, headers.file_bytes)?;
        Opening::from_parts(vfs, file, path, headers, decision, place)
    }

    /// An image whose structures were read and judged already.
    pub(super) fn from_parts(
        vfs: Arc<dyn Vfs>,
        file: Arc<dyn File>,
        path: &Path,
        headers: Headers,
        decision: Decision,
        place: Placement,
    ) -> Result<Self> {
        let (path, sync_failed) = (path.to_path_buf(), Cell::new(false));
        let mut opening = Opening {
            vfs,
            file,
            path,
            headers,
            decision,
            place,
            snapshot_undone: false,
            maintenance: false,
            upgrade: None,
            sync_failed,
        };
        opening.take_journaled_headers()?;
        Ok(opening)
    }

    /// Headers that a journal holds count, whatever state of a change of the parent the file is in. A damaged journal is left to
    /// whoever replays it; one that cannot be read now may be read then, and would not fit the headers of the file.
    fn take_journaled_headers(&mut self) -> Result<()> {
        if self.decision.condition != Condition::Dirty {
            return Ok(());
        }
        let scan = match recover::scan_ring(self) {
            Err(error @ Error::Io { .. }) => return Err(error),
            Err(_) => return Ok(()),
            Ok(scan) => scan,
        };
        let Ok(records) = scan.records() else { return Ok(()) };
        let journaled = records.iter().rev().find_map(|record| match record {
            Record::Image { offset: 0, bytes } => Some(*bytes),
            _ => None,
        });
        if let Some(Ok((footer, header))) = journaled.map(|page| self.decision.journaled_pair(page)) {
            self.decision.footer = footer;
            self.decision.header = header;
        }
        Ok(())
    }

    /// The headers that count.
    pub(super) fn headers(&self) -> (&Footer, &DynamicHeader) {
        (&self.decision.footer, &self.decision.header)
    }

    /// Its place in a chain, if it has a superblock.
    pub(super) fn lineage(&self) -> Option<Lineage> {
        self.decision.superblock.map(|(superblock, _)| superblock.lineage)
    }

    /// The file.
    pub(super) fn file(&self) -> &dyn File {
        &*self.file
    }

    /// Brings the image to a session or to a read-only view.
    pub(super) fn open(self, access: Access) -> Result<Layer> {
        match access {
            Access::ReadOnly => self.read_only(),
            Access::ReadWrite => self.read_write(),
        }
    }

    pub(super) fn io<'a>(&'a self, operation: &'a str) -> impl FnOnce(std::io::Error) -> Error + 'a {
        move |error| Error::io(&self.path, operation, error)
    }

    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|error| {
            self.sync_failed.set(true);
            self.io("syncing the image")(error)
        })
    }

    fn report(&self, foreign: Foreign) -> OpenReport {
        OpenReport {
            condition: self.decision.condition,
            foreign,
            front_lost: self.decision.front_lost,
            stand_ins: stand_ins(&*self.file, &self.headers, &self.decision),
            sync_failed: self.decision.superblock.is_some_and(|(superblock, _)| superblock.sync_failed),
            doubt: self.decision.doubt.clone(),
        }
    }

    /// Compares the file with what the last clean close left.
    pub(super) fn foreign(&self, entries: &[u32]) -> Result<Foreign> {
        let Some((superblock, _)) = &self.decision.superblock else { return Ok(Foreign::StructureChanged) };
        let left = superblock.fingerprint;
        let same = left.file_bytes == self.headers.file_bytes
            && left.footer_crc == crc32fast::hash(&self.decision.footer.to_bytes())
            && self.headers.end.as_ref().is_ok_and(|end| end.to_bytes() == self.decision.footer.to_bytes())
            && left.header_crc == crc32fast::hash(&self.decision.header.to_bytes())
            && left.bat_crc == table::entries_crc(entries);
        let modified = self.file.modified().map_err(self.io("asking for the modification time"))?;
        Ok(match (same, left.modified == modified) {
            (true, true) => Foreign::Untouched,
            (true, false) => Foreign::TimeChanged,
            (false, _) => Foreign::StructureChanged,
        })
    }

    /// The same where the start of a closed file is lost, and the rest of the fingerprint proves nothing.
    pub(super) fn foreign_blocks(&self, entries: &[u32]) -> Foreign {
        match &self.decision.superblock {
            Some((superblock, _))
                if self.decision.front_lost
                    && self.decision.condition == Condition::HalfClosed
                    && superblock.fingerprint.bat_crc != table::entries_crc(entries) =>
            {
                Foreign::StructureChanged
            }
            _ => Foreign::Untouched,
        }
    }

    fn read_only(self) -> Result<Layer> {
        if self.decision.condition == Condition::Dirty {
            return self.read_only_dirty();
        }
        let bytes = table::read_table(&*self.file, &self.path, &self.place)?;
        let entries = table::entries(&bytes, &self.place);
        match self.decision.superblock {
            Some(_) => drop(Survey::new(&self.path, &self.place, &entries, |_| self.headers.file_bytes)?),
            None => table::check_foreign(&self.path, &self.decision, &entries, self.headers.file_bytes)?,
        }
        let foreign = match self.decision.condition {
            Condition::Clean => self.foreign(&entries)?,
            _ => self.foreign_blocks(&entries),
        };
        let map = BlockMap::new(entries.into_iter());
        let mut overlay = Overlay::default();
        self.put_first_page(&mut overlay)?;
        Ok(self.into_layer(map, overlay, None, Vec::new(), foreign))
    }

    /// Replays the journal in memory; the file is not touched.
    fn read_only_dirty(self) -> Result<Layer> {
        let scan = recover::scan_ring(&self)?;
        let replay = recover::replay(&self, &scan)?;
        let entries: Vec<u32> = replay.entries().collect();
        Survey::new(&self.path, &self.place, &entries, recover::limit(&self, &replay))?;
        let map = BlockMap::new(entries.iter().copied());
        for (offset, page) in replay.block_pages() {
            if let BlockPage::Fresh { header, bitmap_set: true } = page
                && let Some(slot) = entries.get(header.block as usize).copied()
                && self.place.block_page_offset(slot) == offset
            {
                map.set(header.block, Mapping::Whole(slot));
            }
        }
        let mut overlay = Overlay::new(&self.place, &replay);
        self.put_first_page(&mut overlay)?;
        drop(replay);
        Ok(self.into_layer(map, overlay, None, Vec::new(), Foreign::Untouched))
    }

    fn read_write(self) -> Result<Layer> {
        if self.decision.superblock.is_none() {
            let (opening, superblocks, ready) = self.start_elsewhere()?;
            return opening.into_session(superblocks, ready);
        }
        let mut superblocks = self.writable()?;
        let opening = match self.decision.condition {
            Condition::Clean => self,
            Condition::Dirty | Condition::HalfClosed => self.settle(&mut superblocks)?,
        };
        let mut superblocks = opening.writable()?;
        if opening.snapshot_undone {
            superblocks.current.lineage.forget_snapshot();
        }
        let ready = match opening.decision.condition {
            Condition::Clean => opening.start_from_clean(&mut superblocks),
            Condition::Dirty | Condition::HalfClosed => recover::recover(&opening, &mut superblocks),
        };
        let ready = opening.marked(&mut superblocks, ready)?;
        opening.into_session(superblocks, ready)
    }

    /// Before an image that was not closed is recovered: what a killed process left in the page cache goes to the medium, and
    /// what the medium holds is read again. After a failed sync the cache may show metadata that the medium does not have.
    pub(super) fn settle(self, superblocks: &mut Superblocks) -> Result<Self> {
        self.marked(superblocks, self.sync())?;
        let metadata_end = match self.place.temporary {
            None => self.place.slot_origin,
            Some(_) => self.headers.file_bytes,
        };
        self.file.forget_cached(metadata_end).map_err(self.io("dropping cached metadata"))?;
        let Opening { snapshot_undone, maintenance, .. } = self;
        Ok(Opening { snapshot_undone, maintenance, ..Opening::new(self.vfs, self.file, &self.path)? })
    }

    /// A sync that failed leaves a mark for the next open.
    fn marked<T>(&self, superblocks: &mut Superblocks, result: Result<T>) -> Result<T> {
        if result.is_err() && self.sync_failed.get() {
            superblocks.mark_failed_sync(&*self.file);
        }
        result
    }

    /// The superblocks of an image that may be written to.
    fn writable(&self) -> Result<Superblocks> {
        match self.decision.superblock {
            Some((superblock, _)) if superblock.lineage.is_sealed() && !self.maintenance => {
                Err(seal::refusal(&self.path, &superblock.lineage))
            }
            _ => self.superblocks(),
        }
    }

    /// The superblocks of an image of which at least the metadata may be written to.
    pub(super) fn superblocks(&self) -> Result<Superblocks> {
        let unsupported = |what: String| Err(Error::Unsupported { path: self.path.clone(), what });
        let Some((superblock, index)) = self.decision.superblock else {
            return unsupported("it has no superblock: open it read-only".into());
        };
        let unknown = superblock.read_only_compatible & !feature::KNOWN_READ_ONLY_COMPATIBLE;
        if unknown != 0 {
            return unsupported(format!(
                "the image uses features this version cannot write (bits {unknown:#x}): open it read-only"
            ));
        }
        self.check_contradictions()?;
        let other = self.headers.superblocks.get(1 - index.min(1));
        let other_is_valid = other.is_some_and(|s| s.as_ref().is_ok_and(|s| s.disk_id == superblock.disk_id));
        Ok(Superblocks::new(superblock, index, other_is_valid, self.headers.superblock_offsets()))
    }

    /// Fails where the file's structures do not allow any writing.
    pub(super) fn check_contradictions(&self) -> Result<()> {
        if let Some(what) = self.decision.doubt.clone() {
            let hint = "open it read-only and copy what it holds, or run `cowvhd repair` on a copy";
            return Err(Error::Damaged { path: self.path.clone(), what, hint });
        }
        let header_at = self.decision.footer.data_offset;
        if header_at != HEADER_OFFSET {
            let what = format!(
                "its dynamic header is at offset {header_at}; this version writes only to images that have it at 512: \
                 open it read-only, or write to a copy (`cowvhd convert`)"
            );
            return Err(Error::Unsupported { path: self.path.clone(), what });
        }
        Ok(())
    }

    /// What belongs to other structures than blocks, in an image made elsewhere.
    pub(super) fn kept(&self) -> Result<Vec<Range<u64>>> {
        match self.place.temporary {
            None => Ok(Vec::new()),
            Some(_) => kept_ranges(&*self.file, &self.path, &self.decision, self.headers.file_bytes),
        }
    }

    /// Takes space for the ring, which a seal has punched: an entry that finds none would end the session.
    fn fill_ring(&self) -> Result<()> {
        let ring = self.place.ring_offset..self.place.ring_offset + self.place.ring_bytes;
        let mut at = ring.start;
        while at < ring.end {
            let data = self.file.next_data(at).map_err(self.io("looking for holes in the journal"))?;
            let data =
                data.map_or(ring.end..ring.end, |data| data.start.min(ring.end)..data.end.min(ring.end));
            if at < data.start {
                write_zeros(&*self.file, at, data.start - at)
                    .map_err(self.io("taking space for the journal"))?;
            }
            at = data.end;
        }
        Ok(())
    }

    fn start_from_clean(&self, superblocks: &mut Superblocks) -> Result<Ready> {
        let bytes = table::read_table(&*self.file, &self.path, &self.place)?;
        let entries = table::entries(&bytes, &self.place);
        let survey = Survey::new(&self.path, &self.place, &entries, |_| self.headers.file_bytes)?;
        let foreign = self.foreign(&entries)?;
        if upgrade::is_fresh(&superblocks.current) && !defect::active(Defect::JournalOutlivesUpgrade) {
            self.end_upgrade(survey.fresh)?;
        }
        superblocks.current.foreign_blocks |= foreign == Foreign::StructureChanged;

        if superblocks.current.lineage.is_sealed() {
            self.fill_ring()?;
        }
        // Also where it reads right: an earlier attempt may have left it in the cache and not on the medium.
        self.write_backup()?;
        let next_allocation = superblocks.current.next_allocation;
        let session = self.start_session(superblocks, next_allocation)?;
        self.write_header(HeaderCookie::Dirty)?;
        self.cut_behind(survey.fresh)?;
        self.sync()?;
        let free: BTreeSet<u32> = survey.free_slots(&self.place).collect();
        // Around another program's block, freed later or not, its old footer or anything else may stand.
        let foreign_bytes = foreign != Foreign::Untouched || superblocks.current.foreign_blocks;
        if foreign_bytes && !free.is_empty() {
            self.punch_slots(&free)?;
            self.sync()?;
        }
        Ok(Ready { session, entries, fresh: survey.fresh, free, next_allocation, kept: Vec::new(), foreign })
    }

    /// Writes footer and header with its normal cookie to their backup place; durable on return.
    pub(super) fn write_backup(&self) -> Result<()> {
        let pair = pair_bytes(&self.decision.footer, &self.decision.header);
        self.file
            .write_durable_at(&pair, self.place.backup_offset())
            .map_err(self.io("writing the header backup"))
    }

    /// Writes the dynamic header with the given cookie; durable on return.
    pub(super) fn write_header(&self, cookie: HeaderCookie) -> Result<()> {
        write_header(&*self.file, &self.place, &self.decision.header, cookie)
            .map_err(self.io("writing the dynamic header at offset 512"))
    }

    /// Names a new session in both superblocks.
    pub(super) fn start_session(
        &self,
        superblocks: &mut Superblocks,
        next_allocation: u64,
    ) -> Result<SessionId> {
        let session = SessionId(match defect::active(Defect::SameSession) {
            true => [7; 16],
            false => self.vfs.random_id().map_err(self.io("asking for a random id"))?,
        });
        let closed_cleanly = self.decision.condition == Condition::Clean;
        superblocks
            .start_session(&*self.file, &self.place, session, next_allocation, closed_cleanly)
            .map_err(self.io("writing a superblock"))?;
        Ok(session)
    }

    /// The file ends with the last slot below `fresh` and a sector of zeros; or, up to a temporary journal, all is zeros. Not
    /// durable on return.
    pub(super) fn cut_behind(&self, fresh: u64) -> Result<()> {
        if self.place.temporary.is_some() {
            let (start, end) = (self.place.slot_offset(fresh), self.place.slots_end());
            return match end.saturating_sub(start) {
                0 => Ok(()),
                length => zero_range(&*self.file, start, length).map_err(self.io("punching unused space")),
            };
        }
        self.file.set_len(self.place.file_bytes(fresh)).map_err(self.io("cutting the file"))?;
        write_zeros(&*self.file, self.place.slot_offset(fresh), vhd::SECTOR)
            .map_err(self.io("clearing the end of the file"))
    }

    /// Makes slots of the grid read as zeros, after the next sync durably: neighbours at once, since there may be a million.
    pub(super) fn punch_slots(&self, slots: &BTreeSet<u32>) -> Result<()> {
        let mut run = 0..0;
        let last = std::iter::once(None);
        for index in slots.iter().map(|&slot| self.place.slot_index(slot)).chain(last) {
            if index.is_some_and(|index| index == run.end && !run.is_empty()) {
                run.end += 1;
                continue;
            }
            if !run.is_empty() {
                let (start, end) = (self.place.slot_offset(run.start), self.place.slot_offset(run.end));
                zero_range(&*self.file, start, end - start).map_err(self.io("punching free blocks"))?;
            }
            run = index.map_or(0..0, |index| index..index + 1);
        }
        Ok(())
    }

    /// The layer of a session whose metadata is all in place.
    fn into_session(self, superblocks: Superblocks, ready: Ready) -> Result<Layer> {
        let Ready { session, entries, fresh, free, next_allocation, kept, foreign } = ready;
        let ring = Ring::new(self.place.ring_offset, self.place.ring_bytes, session);
        let map = BlockMap::new(entries.iter().copied());
        let owners = Owners::new(&self.place, &entries);
        let journal = Journal::new(ring, self.place, self.decision.footer.unique_id, entries);
        let file_bytes = self.place.file_bytes(fresh);
        let allocator = Allocator::new(self.place, free, fresh, file_bytes, next_allocation, owners);
        let headers = (self.decision.footer.clone(), self.decision.header.clone());
        let session = Session::new(journal, allocator, superblocks, headers);
        let layer = self.into_layer(map, Overlay::default(), Some(session), kept, foreign);
        layer.clear_table_pages()?;
        Ok(layer)
    }

    fn into_layer(
        self,
        map: BlockMap,
        overlay: Overlay,
        session: Option<Session>,
        kept: Vec<Range<u64>>,
        foreign: Foreign,
    ) -> Layer {
        let report = self.report(foreign);
        let described = self.decision.superblock.is_some_and(|(superblock, _)| !superblock.foreign_blocks)
            && foreign != Foreign::StructureChanged;
        let units = (self.decision.footer.disk_type == vhd::DiskType::Differencing).then(Units::default);
        Layer {
            path: self.path,
            vfs: self.vfs,
            file: self.file,
            footer: self.decision.footer,
            place: self.place,
            map,
            units,
            described,
            overlay,
            upgrade: self.upgrade,
            kept,
            session,
            report,
        }
    }
}

/// Writes the dynamic header with the given cookie; durable on return.
pub(super) fn write_header(
    file: &dyn File,
    place: &Placement,
    header: &DynamicHeader,
    cookie: HeaderCookie,
) -> std::io::Result<()> {
    file.write_durable_at(&place.marked(header, cookie).to_bytes(), HEADER_OFFSET)
}
