//! One image file at run time: open, slots, map, publish, close.
//!
//! Lock order: flush gate, then the session's journal, then the allocator. Reads and overwrites of mapped blocks take no
//! lock at all; they pin a slot of the block map.

mod allocator;
mod below;
mod close;
mod copies;
mod create;
mod dirty;
mod fill;
mod fixed;
mod flush;
mod headers;
mod holes;
mod image;
mod inspect;
mod map;
mod new_file;
mod open;
mod overlay;
mod owners;
mod recover;
mod relocate;
mod repoint;
mod reserve;
mod seal;
mod session;
mod table;
mod temporary;
mod units;
mod unreplayed;
mod upgrade;
mod write;

pub(crate) use below::{Below, Nothing, Stored};
pub(crate) use copies::ends_short;
pub(crate) use create::{CreateParameters, NewImage, ParentLink, create};
pub(crate) use fill::least_shared;
pub(crate) use fixed::{
    Fixed, FixedEnd, create_fixed, fixed_footer, fixed_refusal, is_protected, set_protected,
};
pub(crate) use headers::{
    Condition, Decision, HEADER_OFFSET, Headers, MAX_RING_BYTES, MIN_RING_BYTES, pair_bytes, temporary_head,
};
pub(crate) use image::{Image, LockedImage, lock, open, open_read_only_file};
pub(crate) use inspect::Inspection;
pub(crate) use map::Mapping;
pub(crate) use new_file::NewFile;
pub(crate) use open::{Foreign, OpenReport, foreign_changes};
pub(crate) use overlay::Overlay;
pub(crate) use seal::{Seal, StateLink, refusal};
pub(crate) use table::{entries_crc, has_grown};
pub(crate) use upgrade::upgrade;

use crate::error::{Error, Result};
use crate::ext::{BlockHeader, PAGE_BYTES, Placement};
use crate::sync::Arc;
use crate::vfs::{File, FileExt, Vfs};
use crate::vhd::{self, Footer, bitmap};
use map::BlockMap;
use session::Session;
use std::ops::Range;
use std::path::{Path, PathBuf};
use units::{PresentUnits, Units};

/// Where a part of a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Located {
    /// Not here: what is below shows.
    Absent,
    /// In the file from this byte on, but its bits say that it was never written: it reads as zeros.
    Hidden(u64),
    /// In the file from this byte on.
    File(u64),
}

/// An open image file.
#[derive(Debug)]
pub(crate) struct Layer {
    path: PathBuf,
    vfs: Arc<dyn Vfs>,
    file: Arc<dyn File>,
    footer: Footer,
    place: Placement,
    map: BlockMap,
    /// The partial blocks, in a differencing layer.
    units: Option<Units>,
    /// Every block on our grid must have a block header: no other program has allocated any.
    described: bool,
    /// Guest data that a journal holds and a read-only open must not write.
    overlay: Overlay,
    /// The places that the image is to have when the session ends.
    upgrade: Option<Placement>,
    /// In an image made elsewhere that is open for writing: what belongs to other structures than blocks.
    kept: Vec<Range<u64>>,
    /// Present where the image is open for writing.
    session: Option<Session>,
    report: OpenReport,
}

impl Layer {
    /// The file's path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The footer.
    pub(crate) fn footer(&self) -> &Footer {
        &self.footer
    }

    /// Where things lie.
    pub(crate) fn place(&self) -> &Placement {
        &self.place
    }

    /// The file.
    pub(crate) fn file(&self) -> &Arc<dyn File> {
        &self.file
    }

    /// What opening the image found and did.
    pub(crate) fn report(&self) -> &OpenReport {
        &self.report
    }

    /// Whether the image is open for reading alone.
    pub(crate) fn is_read_only(&self) -> bool {
        self.session().is_err()
    }

    /// Stops an image that is open for writing: every later change and flush fails with `cause`.
    pub(crate) fn poison(&self, cause: &str) {
        if let Some(session) = &self.session {
            session.poison(cause.to_string());
        }
    }

    fn session(&self) -> Result<&Session> {
        match &self.session {
            Some(session) if !session.is_sealed() => Ok(session),
            _ => Err(Error::ReadOnly { path: self.path.clone() }),
        }
    }

    /// Fails after a close. Asked after a slot was pinned, so that a close waits for whoever was told that it is open.
    pub(crate) fn check_open(&self) -> Result<()> {
        if self.map.is_closed() {
            return Err(Error::Invalid { what: format!("{}: the disk is closed", self.path.display()) });
        }
        Ok(())
    }

    fn io_error(&self, operation: &str, offset: u64, length: usize, error: std::io::Error) -> Error {
        Error::io(&self.path, format!("{operation} {length} bytes at file offset {offset}"), error)
    }

    /// Reads within one block: `offset` counts bytes from the block's start. What is not here is read from `below`.
    pub(crate) fn read_block(
        &self,
        block: u32,
        offset: u64,
        buf: &mut [u8],
        below: &dyn Below,
    ) -> Result<()> {
        let range = offset..offset + buf.len() as u64;
        let mut rest = buf;
        self.locate(block, range, &mut |part, located| {
            self.check_open()?;
            let (now, later) = std::mem::take(&mut rest).split_at_mut((part.end - part.start) as usize);
            rest = later;
            match located {
                Located::Absent => below.read(self.guest_offset(block) + part.start, now),
                Located::Hidden(_) => {
                    now.fill(0);
                    Ok(())
                }
                Located::File(at) => self.read_file(at, now),
            }
        })
    }

    /// The guest byte at which a block starts.
    pub(crate) fn guest_offset(&self, block: u32) -> u64 {
        u64::from(block) * u64::from(self.place.block_bytes)
    }

    /// Reads at a byte of the file that [`Layer::locate`] named, while it is there.
    pub(crate) fn read_file(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_or_zero_at(buf, at).map_err(|error| self.io_error("reading", at, buf.len(), error))?;
        self.overlay.apply(at, buf);
        Ok(())
    }

    fn read_bitmap(&self, slot: u32) -> Result<Vec<u8>> {
        let offset = self.place.bitmap_offset(slot);
        let mut bits = vec![0; self.place.bitmap_bytes() as usize];
        self.read_file(offset, &mut bits)?;
        Ok(bits)
    }

    /// On the first touch of a block since the open, looks at its block page: that the slot says it holds this block, and
    /// which sectors are present.
    fn verify(&self, block: u32, mapping: Mapping) -> Result<Mapping> {
        let Mapping::Unverified(slot) = mapping else { return Ok(mapping) };
        let bits = match self.place.slot_index(slot).is_some() && self.described {
            true => self.verify_header(block, slot)?,
            false => self.read_bitmap(slot)?,
        };
        let sectors = u32::try_from(u64::from(self.place.block_bytes) / vhd::SECTOR).unwrap_or(u32::MAX);
        let found = if bitmap::all_set(&bits, 0..sectors) {
            Mapping::Whole(slot)
        } else {
            if self.units.is_none() && self.described && self.place.slot_index(slot).is_some() {
                let offset = self.place.bitmap_offset(slot);
                return Err(Error::Damaged {
                    path: self.path.clone(),
                    what: format!(
                        "the sector bitmap of block {block} at offset {offset} has bits that are clear, in a block that was \
                         allocated with all of them set"
                    ),
                    hint: "run `cowvhd check` to see what is affected",
                });
            }
            if let Some(units) = &self.units {
                units.found(slot, PresentUnits::from_bitmap(&bits, self.place.block_bytes));
            }
            Mapping::Partial(slot)
        };
        self.map.verified(block, found);
        Ok(found)
    }

    /// Checks the header of a block on our grid; the bitmap from the same page, of which it is the end.
    fn verify_header(&self, block: u32, slot: u32) -> Result<Vec<u8>> {
        let offset = self.place.block_page_offset(slot);
        let mut page = [0; PAGE_BYTES as usize];
        self.read_file(offset, &mut page)?;
        let found = match BlockHeader::parse(&page).map_err(|error| error.at(&self.path, offset))? {
            Some(h) if (h.page_offset, h.disk_id, h.block) == (offset, self.footer.unique_id, block) => {
                let start = page.len().saturating_sub(self.place.bitmap_bytes() as usize);
                return Ok(page.get(start..).unwrap_or_default().to_vec());
            }
            Some(header) => format!("names block {} of disk {}", header.block, header.disk_id),
            None => "is missing".to_string(),
        };
        Err(Error::Damaged {
            path: self.path.clone(),
            what: format!("the header of block {block} in the page at offset {offset} {found}"),
            hint: "run `cowvhd check` to see what is affected",
        })
    }

    /// Calls `visit` with the parts that make up bytes `range` of `block`, in order, and where each is. Until it returns the
    /// places stay what they are.
    pub(crate) fn locate(
        &self,
        block: u32,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, Located) -> Result<()>,
    ) -> Result<()> {
        loop {
            let (mapping, _pin) = self.map.get_pinned(block);
            let slot = match self.verify(block, mapping)? {
                Mapping::Absent | Mapping::Unverified(_) => return visit(range, Located::Absent),
                Mapping::Whole(slot) => {
                    let at = self.place.data_offset(slot) + range.start;
                    return visit(range, Located::File(at));
                }
                Mapping::Partial(slot) => slot,
            };
            let Some(units) = &self.units else { return self.locate_sectors(slot, None, range, visit) };
            // Without: the block is whole by now, or somewhere else.
            let Some(present) = units.get(slot) else { continue };
            for (run, is_present) in present.runs(range) {
                match is_present {
                    true => {
                        let at = self.place.data_offset(slot) + run.start;
                        visit(run, Located::File(at))?;
                    }
                    false if present.is_mixed() => self.locate_sectors(slot, present.bits(), run, visit)?,
                    false => visit(run, Located::Absent)?,
                }
            }
            return Ok(());
        }
    }

    /// The same in a part of a block of which nothing but the bitmap says what is present.
    fn locate_sectors(
        &self,
        slot: u32,
        bits: Option<&[u8]>,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, Located) -> Result<()>,
    ) -> Result<()> {
        let data = self.place.data_offset(slot);
        let bits = match bits {
            Some(bits) => bits.to_vec(),
            None => self.read_bitmap(slot)?,
        };
        let sectors = (range.start / vhd::SECTOR) as u32..range.end.div_ceil(vhd::SECTOR) as u32;
        for run in bitmap::runs(&bits, sectors) {
            let from = (u64::from(run.sectors.start) * vhd::SECTOR).max(range.start);
            let to = (u64::from(run.sectors.end) * vhd::SECTOR).min(range.end);
            let located = match (run.set, self.units.is_some()) {
                (true, _) => Located::File(data + from),
                (false, true) => Located::Absent,
                (false, false) => Located::Hidden(data + from),
            };
            visit(from..to, located)?;
        }
        Ok(())
    }

    /// The file, where it holds all that a guest sees: not where a journal that was replayed in memory holds data that it lacks.
    pub(crate) fn complete_file(&self) -> Option<&Arc<dyn File>> {
        self.overlay.is_empty().then_some(&self.file)
    }

    /// Where `block` is, looking at its block page if that was not done yet.
    pub(crate) fn mapping(&self, block: u32) -> Result<Mapping> {
        let (mapping, _pin) = self.map.get_pinned(block);
        self.verify(block, mapping)
    }

    /// Where `block` is, as far as that is known without looking at its block page.
    pub(crate) fn known_mapping(&self, block: u32) -> Mapping {
        self.map.get(block)
    }

    /// The bits of a partial block.
    pub(crate) fn bitmap(&self, slot: u32) -> Result<Vec<u8>> {
        self.read_bitmap(slot)
    }
}
