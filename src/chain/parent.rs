//! One parent: a fixed, dynamic or differencing image that is only read.
//!
//! It is opened without reading its block table: entries and bitmaps are read when a block is touched, each checked against
//! the file. So opening costs a few reads, whatever the size, and a thousand parents take little memory.

use super::descriptors::{Permit, PooledFile};
use super::open::ChildClaims;
use super::source::{Found, Source};
use crate::error::{Error, Result};
use crate::ext::{Lineage, Placement, SealId};
use crate::layer::{self, Condition, Headers};
use crate::sync::Arc;
use crate::vfs::{Access, File, FileExt, Vfs};
use crate::vhd::{self, DiskType, DynamicHeader, Footer, UniqueId, bitmap};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// An open parent.
#[derive(Debug)]
pub(crate) struct ParentImage {
    path: PathBuf,
    file: Arc<dyn File>,
    /// The same, if it is opened when it is needed.
    pooled: Option<Arc<PooledFile>>,
    file_bytes: u64,
    footer: Footer,
    blocks: Option<Blocks>,
    /// To keep the file open, if it was asked for.
    _permit: Option<Permit>,
    /// Of an image with a superblock.
    lineage: Option<Lineage>,
    /// Another program has placed blocks in it since it was sealed.
    has_grown: bool,
    /// A fixed disk that nobody may write to.
    is_protected: bool,
    /// Why it may not be what its child was made over.
    doubt: Option<String>,
}

#[derive(Debug)]
struct Blocks {
    header: Box<DynamicHeader>,
    place: Placement,
}

impl ParentImage {
    /// Takes a file that is to be a parent. Fails where it was not closed: then it holds less than its journal says.
    pub(crate) fn open(file: Arc<dyn File>, path: &Path) -> Result<Self> {
        layer::lock(&*file, path, Access::ReadOnly)?;
        if let Some(footer) = layer::fixed_footer(&*file, path)? {
            let file_bytes = footer.current_size + Footer::SIZE as u64;
            return Ok(ParentImage {
                path: path.to_path_buf(),
                is_protected: layer::is_protected(&*file, path)?,
                file,
                pooled: None,
                file_bytes,
                footer,
                blocks: None,
                _permit: None,
                lineage: None,
                has_grown: false,
                doubt: None,
            });
        }
        let headers = Headers::read(&*file, path)?;
        let decision = headers.decide(path)?;
        if decision.condition != Condition::Clean || decision.unreplayed.is_some() {
            return Err(Error::NotClosed { path: path.to_path_buf() });
        }
        let place = decision.placement(path, headers.file_bytes)?;
        let has_grown = match &decision.superblock {
            Some((superblock, _)) if superblock.lineage.seal_id.is_some() => {
                layer::has_grown(&*file, path, &place, &superblock.fingerprint, headers.file_bytes)?
            }
            _ => false,
        };
        Ok(ParentImage {
            has_grown,
            path: path.to_path_buf(),
            file,
            pooled: None,
            file_bytes: headers.file_bytes,
            footer: decision.footer,
            lineage: decision.superblock.map(|(superblock, _)| superblock.lineage),
            blocks: Some(Blocks { header: Box::new(decision.header), place }),
            _permit: None,
            is_protected: false,
            doubt: None,
        })
    }

    /// Its file stays open.
    pub(super) fn kept_open(self, permit: Permit) -> Self {
        ParentImage { _permit: Some(permit), ..self }
    }

    /// Its file may be closed, and is opened again when it is needed.
    pub(super) fn in_pool(self, vfs: &Arc<dyn Vfs>) -> Result<Self> {
        let file = PooledFile::new(vfs, &self, Arc::clone(&self.file))
            .map_err(|error| Error::io(&self.path, "asking which file it is", error))?;
        let file = Arc::new(file);
        Ok(ParentImage { pooled: Some(Arc::clone(&file)), file, ..self })
    }

    /// The file's path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Its footer.
    pub(crate) fn footer(&self) -> &Footer {
        &self.footer
    }

    /// Its file.
    pub(crate) fn file(&self) -> &dyn File {
        &*self.file
    }

    /// Its file, which stays open as long as the value lives.
    pub(crate) fn open_file(&self) -> Result<Arc<dyn File>> {
        match &self.pooled {
            None => Ok(Arc::clone(&self.file)),
            Some(file) => file.open().map_err(|error| Error::io(&self.path, "opening the layer", error)),
        }
    }

    /// Length of its file in bytes.
    pub(crate) fn file_length(&self) -> u64 {
        self.file_bytes
    }

    /// Data bytes of a block; a fixed disk has none.
    pub(crate) fn block_bytes(&self) -> Option<u32> {
        self.blocks.as_ref().map(|blocks| blocks.place.block_bytes)
    }

    /// The disk's unique id.
    pub(crate) fn unique_id(&self) -> UniqueId {
        self.footer.unique_id
    }

    /// Its seal, if it has one.
    pub(crate) fn seal_id(&self) -> SealId {
        self.lineage.map(|lineage| lineage.seal_id).unwrap_or_default()
    }

    /// Whether another program has placed blocks in it since it was sealed, as far as the length of its file tells.
    pub(crate) fn has_grown(&self) -> bool {
        self.has_grown
    }

    /// Whether it never changes: by its seal, or as a fixed disk that nobody may write to.
    pub(crate) fn is_sealed(&self) -> bool {
        self.seal_id().is_some() || self.is_protected
    }

    /// The same with a doubt whether it is what its child was made over.
    pub(super) fn doubted(self, doubt: String) -> Self {
        ParentImage { doubt: Some(doubt), ..self }
    }

    /// Why it may not be what its child was made over, in words for a person.
    pub(crate) fn doubt(&self) -> Option<&str> {
        self.doubt.as_deref()
    }

    /// Whether it is a fixed disk.
    pub(crate) fn is_fixed(&self) -> bool {
        self.blocks.is_none()
    }

    /// Its place in a chain, if it has a superblock.
    pub(crate) fn lineage(&self) -> Option<Lineage> {
        self.lineage
    }

    /// What it says of its own parent, where it is a differencing image.
    pub(crate) fn claims(&self) -> Option<ChildClaims<'_>> {
        let is_child = self.footer.disk_type == DiskType::Differencing;
        let blocks = self.blocks.as_ref().filter(|_| is_child)?;
        Some(ChildClaims {
            path: &self.path,
            file: &*self.file,
            footer: &self.footer,
            header: &blocks.header,
            lineage: self.lineage.unwrap_or_default(),
        })
    }

    fn read(&self, what: &str, at: u64, buf: &mut [u8]) -> Result<()> {
        self.file
            .read_or_zero_at(buf, at)
            .map_err(|error| Error::io(&self.path, format!("reading {what} at file offset {at}"), error))
    }

    fn damaged(&self, what: String) -> Error {
        let hint = "run `cowvhd check` on it to see what is affected";
        Error::Damaged { path: self.path.clone(), what, hint }
    }

    /// The entries of some blocks in the BAT, read at once; blocks that it does not have are absent.
    fn entries(&self, blocks: &Blocks, range: Range<u64>) -> Result<Vec<u32>> {
        let end = range.end.min(blocks.place.table_entries.into());
        let mut bytes = vec![0; end.saturating_sub(range.start) as usize * 4];
        self.read("the block table", blocks.place.table_offset + range.start * 4, &mut bytes)?;
        let mut entries: Vec<u32> = vhd::bat::entries(&bytes).collect();
        entries.resize((range.end - range.start) as usize, vhd::UNALLOCATED);
        Ok(entries)
    }

    /// Checks an entry of the BAT against the file.
    fn check_entry(&self, place: &Placement, block: u64, entry: u32) -> Result<()> {
        let (start, end) = (place.bitmap_offset(entry), place.block_end(entry));
        let in_table = start < place.table_end() && place.table_offset < end;
        if start < Footer::SIZE as u64 + DynamicHeader::SIZE as u64 || in_table || end > self.file_bytes {
            return Err(self.damaged(format!(
                "block table entry {block} is sector {entry}: the block would be at offset {start} to {end}, over metadata or \
                 past the file's {} bytes",
                self.file_bytes
            )));
        }
        Ok(())
    }

    /// The same as [`Source::resolve`] within one block, whose entry of the BAT is known.
    fn resolve_entry(
        &self,
        blocks: &Blocks,
        entry: u32,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, Found),
    ) -> Result<()> {
        let absent = match self.footer.disk_type {
            DiskType::Differencing => Found::Below,
            _ => Found::Zero,
        };
        if entry == vhd::UNALLOCATED {
            visit(range, absent);
            return Ok(());
        }
        let block_bytes = u64::from(blocks.place.block_bytes);
        let block = range.start / block_bytes;
        let start = block * block_bytes;
        self.check_entry(&blocks.place, block, entry)?;
        let mut bits = vec![0; blocks.place.bitmap_bytes() as usize];
        self.read("a sector bitmap", blocks.place.bitmap_offset(entry), &mut bits)?;
        let sectors =
            ((range.start - start) / vhd::SECTOR) as u32..((range.end - start) / vhd::SECTOR) as u32;
        for run in bitmap::runs(&bits, sectors) {
            let from = u64::from(run.sectors.start) * vhd::SECTOR;
            let to = u64::from(run.sectors.end) * vhd::SECTOR;
            let found = if run.set { Found::File(blocks.place.data_offset(entry) + from) } else { absent };
            visit(start + from..start + to, found);
        }
        Ok(())
    }

    fn with_blocks_of(&self, block_bytes: u64) -> Option<&Blocks> {
        self.blocks.as_ref().filter(|blocks| u64::from(blocks.place.block_bytes) == block_bytes)
    }

    /// Splits a range in what lies within the disk and what lies past its end: that is zeros, whatever its own parent has there.
    fn split_at_end(&self, range: Range<u64>) -> (Range<u64>, Range<u64>) {
        let end = range.end.min(self.footer.current_size.max(range.start));
        (range.start..end, end..range.end)
    }
}

impl Source for ParentImage {
    fn resolve(&self, range: Range<u64>, visit: &mut dyn FnMut(Range<u64>, Found)) -> Result<()> {
        let (inside, past) = self.split_at_end(range);
        if !inside.is_empty() {
            match &self.blocks {
                None => visit(inside.clone(), Found::File(inside.start)),
                Some(blocks) => {
                    let block_bytes = u64::from(blocks.place.block_bytes);
                    let touched = inside.start / block_bytes..inside.end.div_ceil(block_bytes);
                    let mut at = inside.start;
                    for (block, entry) in touched.clone().zip(self.entries(blocks, touched)?) {
                        let end = inside.end.min((block + 1) * block_bytes);
                        self.resolve_entry(blocks, entry, at..end, visit)?;
                        at = end;
                    }
                }
            }
        }
        if !past.is_empty() {
            visit(past, Found::Zero);
        }
        Ok(())
    }

    fn blocks(&self, wanted: Range<u64>, block_bytes: u64, visit: &mut dyn FnMut(u64, u32)) -> Result<()> {
        let entries = match self.with_blocks_of(block_bytes) {
            Some(own) => self.entries(own, wanted.clone())?,
            // It has no such blocks: each may hold anything.
            None => vec![0; (wanted.end - wanted.start) as usize],
        };
        for (block, entry) in wanted.zip(entries) {
            let ends_inside = (block + 1).saturating_mul(block_bytes) > self.footer.current_size;
            if entry != vhd::UNALLOCATED || ends_inside {
                visit(block, entry);
            }
        }
        Ok(())
    }

    fn resolve_block(
        &self,
        range: Range<u64>,
        block_bytes: u64,
        entry: u32,
        visit: &mut dyn FnMut(Range<u64>, Found),
    ) -> Result<()> {
        let Some(own) = self.with_blocks_of(block_bytes) else { return self.resolve(range, visit) };
        let (inside, past) = self.split_at_end(range);
        if !inside.is_empty() {
            self.resolve_entry(own, entry, inside, visit)?;
        }
        if !past.is_empty() {
            visit(past, Found::Zero);
        }
        Ok(())
    }

    fn as_parent(&self) -> Option<&ParentImage> {
        Some(self)
    }

    fn read_file(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.read("guest data", at, buf)
    }
}
