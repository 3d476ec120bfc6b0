//! One image file at run time: open, slots, map, publish, close.
//!
//! Lock order: flush gate, then the session's journal, then the allocator. Reads and overwrites of mapped blocks take no
//! lock at all; they pin a slot of the block map.

mod allocator;
mod close;
mod create;
mod dirty;
mod fixed;
mod flush;
mod headers;
mod image;
mod map;
mod new_file;
mod open;
mod overlay;
mod recover;
mod relocate;
mod session;
mod table;
mod write;

pub(crate) use create::{CreateParameters, create};
pub(crate) use fixed::{Fixed, FixedEnd, create_fixed, fixed_footer};
pub(crate) use headers::{Condition, Headers};
pub(crate) use image::{Image, lock, open};
pub(crate) use map::Mapping;
pub(crate) use new_file::NewFile;
pub(crate) use open::{Foreign, OpenReport, foreign_changes};

use crate::error::{Error, Result};
use crate::ext::{BlockHeader, PAGE_BYTES, Placement};
use crate::sync::Arc;
use crate::vfs::{File, FileExt, Vfs};
use crate::vhd::{self, DynamicHeader, Footer, bitmap};
use map::BlockMap;
use overlay::Overlay;
use session::Session;
use std::path::{Path, PathBuf};

/// An open image file.
#[derive(Debug)]
pub(crate) struct Layer {
    path: PathBuf,
    vfs: Arc<dyn Vfs>,
    file: Arc<dyn File>,
    footer: Footer,
    header: DynamicHeader,
    place: Placement,
    map: BlockMap,
    /// Every block on our grid must have a block header: no other program has allocated any.
    described: bool,
    /// Guest data that a journal holds and a read-only open must not write.
    overlay: Overlay,
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

    /// What opening the image found and did.
    pub(crate) fn report(&self) -> &OpenReport {
        &self.report
    }

    /// Whether the image is open for reading alone.
    pub(crate) fn is_read_only(&self) -> bool {
        self.session.is_none()
    }

    fn session(&self) -> Result<&Session> {
        self.session.as_ref().ok_or_else(|| Error::ReadOnly { path: self.path.clone() })
    }

    /// Fails after a close. Asked after a slot was pinned, so that a close waits for whoever was told that it is open.
    fn check_open(&self) -> Result<()> {
        if self.map.is_closed() {
            return Err(Error::Invalid { what: format!("{}: the disk is closed", self.path.display()) });
        }
        Ok(())
    }

    fn io_error(&self, operation: &str, offset: u64, length: usize, error: std::io::Error) -> Error {
        Error::io(&self.path, format!("{operation} {length} bytes at file offset {offset}"), error)
    }

    /// Reads within one block: `offset` counts bytes from the block's start.
    pub(crate) fn read_block(&self, block: u32, offset: u64, buf: &mut [u8]) -> Result<()> {
        let (mapping, _pin) = self.map.get_pinned(block);
        self.check_open()?;
        match self.verify(block, mapping)? {
            Mapping::Absent | Mapping::Unverified(_) => {
                buf.fill(0);
                Ok(())
            }
            Mapping::Whole(slot) => self.read_slot(slot, offset, buf),
            Mapping::Partial(slot) => self.read_partial(slot, offset, buf),
        }
    }

    fn read_slot(&self, slot: u32, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read_file(self.place.data_offset(slot) + offset, buf)
    }

    fn read_file(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_or_zero_at(buf, at).map_err(|error| self.io_error("reading", at, buf.len(), error))?;
        self.overlay.apply(at, buf);
        Ok(())
    }

    /// Reads a block of a dynamic disk whose bitmap is not full: sectors under 0 bits read as zeros.
    fn read_partial(&self, slot: u32, offset: u64, buf: &mut [u8]) -> Result<()> {
        let bits = self.read_bitmap(slot)?;
        self.read_slot(slot, offset, buf)?;
        let end = offset + buf.len() as u64;
        let (first, last) = ((offset / vhd::SECTOR) as u32, end.div_ceil(vhd::SECTOR) as u32);
        for sector in (first..last).filter(|&sector| !bitmap::get(&bits, sector)) {
            let from = (u64::from(sector) * vhd::SECTOR).max(offset) - offset;
            let to = ((u64::from(sector) + 1) * vhd::SECTOR).min(end) - offset;
            if let Some(hidden) = buf.get_mut(from as usize..to as usize) {
                hidden.fill(0);
            }
        }
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
        if self.place.slot_index(slot).is_some() && self.described {
            self.verify_header(block, slot)?;
        }
        let bits = self.read_bitmap(slot)?;
        let sectors = u32::try_from(u64::from(self.place.block_bytes) / vhd::SECTOR).unwrap_or(u32::MAX);
        let found =
            if bitmap::all_set(&bits, 0..sectors) { Mapping::Whole(slot) } else { Mapping::Partial(slot) };
        self.map.verified(block, found);
        Ok(found)
    }

    fn verify_header(&self, block: u32, slot: u32) -> Result<()> {
        let offset = self.place.block_page_offset(slot);
        let mut page = [0; PAGE_BYTES as usize];
        self.read_file(offset, &mut page)?;
        let found = match BlockHeader::parse(&page).map_err(|error| error.at(&self.path, offset))? {
            Some(h) if (h.page_offset, h.disk_id, h.block) == (offset, self.footer.unique_id, block) => {
                return Ok(());
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

    /// Where `block` is, looking at its block page if that was not done yet.
    pub(crate) fn mapping(&self, block: u32) -> Result<Mapping> {
        let (mapping, _pin) = self.map.get_pinned(block);
        self.verify(block, mapping)
    }

    /// The bits of a partial block.
    pub(crate) fn bitmap(&self, slot: u32) -> Result<Vec<u8>> {
        self.read_bitmap(slot)
    }
}
