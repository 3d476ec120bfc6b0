//! The data of one sealed layer against its CRCs (FORMAT.md, "Data CRCs").
//!
//! All blocks are read once, in the order of the BAT, some of them at a time by as many threads as the machine runs at once. Their
//! words are put together to pages, and each page compared with the one in the file. A page that is not there, or that counts for
//! nothing, proves nothing; it is written from what was read where that is asked for. Holes cost nothing.

use super::code::Code;
use super::image::Image;
use super::report::{Finding, Report};
use crate::chain;
use crate::error::{Error, Result};
use crate::ext::{CRC_WORDS, CrcPage, DataCrcs, PAGE_BYTES, Placement, SealId, unit_word, words_per_block};
use crate::layer::Condition;
use crate::sync::{Arc, AtomicUsize, Mutex, Ordering};
use crate::vfs::{File, FileExt, Vfs};
use crate::vhd::{self, DiskType, bitmap};
use std::io;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::thread;

const PAGE: usize = PAGE_BYTES as usize;
const SECTORS_PER_UNIT: u32 = (PAGE_BYTES / vhd::SECTOR) as u32;
/// So much data is between two looks at the progress.
const BATCH_BYTES: u64 = 64 << 20;
/// So much is read at once.
const CHUNK_UNITS: usize = 64;
/// So many units of damaged data are kept, and looked for in the parents.
const LOOKED_FOR: usize = 1 << 16;

/// How far the data of a layer was compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Coverage {
    /// Bytes of data that were compared with their CRCs.
    pub compared_bytes: u64,
    /// Bytes of data of which there are no CRCs.
    pub unproven_bytes: u64,
    /// Pages of CRCs that were written.
    pub written_pages: u64,
}

/// Data that is not what it was.
#[derive(Debug)]
pub(super) struct Damage {
    block: u32,
    file_offset: u64,
    /// Bytes of the disk, whole units.
    guest: Range<u64>,
    /// The words of its units; of very much damage not all.
    expected: Vec<u32>,
    unreadable: bool,
    /// A parent in which it is what it was.
    pub(super) intact_in: Option<PathBuf>,
}

impl Damage {
    /// What is said about it.
    pub(super) fn finding(&self, size: u64) -> Finding {
        let end = self.guest.end.min(size).max(self.guest.start);
        let how = if self.unreadable { "cannot be read" } else { "are not what was sealed" };
        let elsewhere = match &self.intact_in {
            Some(path) => format!("{} still has them", path.display()),
            None => "no parent has them".to_string(),
        };
        Finding {
            code: Code::DataDamaged,
            structure: "data",
            offset: Some(self.file_offset),
            block: Some(self.block),
            guest: Some(self.guest.start..end),
            what: format!(
                "{} bytes at offset {} of the disk {how}; {elsewhere}",
                end - self.guest.start,
                self.guest.start
            ),
        }
    }

    /// Whether a layer beneath holds the same at this place of the disk, whole; `image` is `None` of a fixed disk.
    pub(super) fn is_intact_in(&self, file: &dyn File, image: Option<&Image>) -> bool {
        let units = (self.guest.end - self.guest.start) / PAGE_BYTES;
        let mut unit = [0; PAGE];
        self.expected.len() as u64 == units
            && self.expected.iter().zip(self.guest.clone().step_by(PAGE)).all(|(&word, at)| {
                let place = match image {
                    None => Some(at),
                    Some(image) => unit_in(file, image, at),
                };
                place.is_some_and(|place| {
                    file.read_or_zero_at(&mut unit, place).is_ok() && unit_word(&unit) == word
                })
            })
    }
}

/// Where in its file a layer has a unit of the disk, if it has all of it.
fn unit_in(file: &dyn File, image: &Image, guest: u64) -> Option<u64> {
    let place = image.place();
    let block_bytes = u64::from(place.block_bytes);
    let block = u32::try_from(guest / block_bytes).ok()?;
    let &entry = image.entries.get(block as usize)?;
    if entry == vhd::UNALLOCATED || image.bad_entries.binary_search(&block).is_ok() {
        return None;
    }
    let mut bits = vec![0; place.bitmap_bytes() as usize];
    file.read_or_zero_at(&mut bits, place.bitmap_offset(entry)).ok()?;
    let within = guest % block_bytes;
    let first = u32::try_from(within / vhd::SECTOR).ok()?;
    let whole = bitmap::all_set(&bits, first..first + SECTORS_PER_UNIT);
    whole.then(|| place.data_offset(entry) + within)
}

/// A sealed layer that is compared.
pub(super) struct Sealed<'a> {
    vfs: &'a Arc<dyn Vfs>,
    file: &'a dyn File,
    path: &'a Path,
    image: &'a Image,
    seal_id: SealId,
    crcs: DataCrcs,
    /// Allocated blocks and their entries, in the order of the BAT.
    blocks: Vec<(u32, u32)>,
    /// The file for writing, where pages that are missing are to be written.
    writable: Option<Arc<dyn File>>,
    threads: usize,
}

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Compared {
    pub(super) coverage: Coverage,
    /// Damaged data; of very much the first.
    pub(super) damages: Vec<Damage>,
    /// More of it that is only counted.
    pub(super) uncounted: u64,
    units: usize,
}

impl<'a> Sealed<'a> {
    /// The layer, if it is sealed and closed, and its table is that of the seal; `None` else.
    pub(super) fn new(
        vfs: &'a Arc<dyn Vfs>,
        file: &'a dyn File,
        path: &'a Path,
        image: &'a Image,
    ) -> Option<Self> {
        let (superblock, _) = image.inspection.decision.superblock?;
        let seal_id = superblock.lineage.seal_id;
        let crcs = room(image)?;
        let blocks = (0..).zip(image.entries.iter().copied()).filter(|&(_, entry)| entry != vhd::UNALLOCATED);
        let blocks: Vec<(u32, u32)> = blocks.collect();
        let needed = DataCrcs::new(image.place(), blocks.len() as u64, crcs.offset);
        let threads = thread::available_parallelism().map_or(1, usize::from);
        (needed == crcs).then_some(Sealed {
            vfs,
            file,
            path,
            image,
            seal_id,
            crcs,
            blocks,
            writable: None,
            threads,
        })
    }

    /// From now on pages that are missing are written.
    pub(super) fn write_missing(self) -> Result<Self> {
        let disk_id = self.image.inspection.decision.footer.unique_id;
        let file = chain::open_for_registry(&**self.vfs, self.path, disk_id)?;
        let io = |error| Error::io(self.path, "looking at the image", error);
        if file.identity().map_err(io)? != self.file.identity().map_err(io)? {
            let what = "another file took its name".to_string();
            return Err(Error::Unsupported { path: self.path.to_path_buf(), what });
        }
        Ok(Sealed { writable: Some(file), ..self })
    }

    /// No more threads than one read.
    pub(super) fn with_one_thread(self) -> Self {
        Sealed { threads: 1, ..self }
    }

    /// Bytes of data in its blocks.
    fn data_bytes(&self) -> u64 {
        self.blocks.len() as u64 * u64::from(self.image.place().block_bytes)
    }

    /// Reads all data and compares it. `progress` gets bytes done and all bytes.
    pub(super) fn compare(
        &self,
        report: &mut Report,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<Compared> {
        let place = self.image.place();
        let (block_bytes, per_block) = (u64::from(place.block_bytes), words_per_block(place));
        let batch = (BATCH_BYTES / block_bytes).max(1) as usize;
        let mut compared = Compared::default();
        let mut words: Vec<Word> = Vec::new();
        let mut index = 0;
        let mut done = 0;
        let mut batches = self.blocks.chunks(batch).peekable();
        while let Some(blocks) = batches.next() {
            words.extend(self.read_blocks(blocks)?);
            let mut pages = Vec::new();
            let is_last = batches.peek().is_none();
            while words.len() >= CRC_WORDS || (is_last && !words.is_empty()) {
                let rest = words.split_off(words.len().min(CRC_WORDS));
                let first = u64::from(index) * CRC_WORDS as u64;
                pages.extend(self.compare_page(report, &mut compared, index, &words, |word: usize| {
                    let word = first + word as u64;
                    let block = self.blocks.get((word / per_block) as usize).copied().unwrap_or_default();
                    (block, (word % per_block).checked_sub(1))
                }));
                words = rest;
                index += 1;
            }
            compared.coverage.written_pages += self.write_pages(&pages)?;
            done += blocks.len() as u64 * block_bytes;
            if progress(done, self.data_bytes()).is_break() {
                return Err(Error::Cancelled { path: self.path.to_path_buf() });
            }
        }
        if let Some(file) = self.writable.as_deref().filter(|_| compared.coverage.written_pages > 0) {
            file.sync_data().map_err(|error| Error::io(self.path, "syncing the CRCs of its data", error))?;
        }
        Ok(compared)
    }

    /// Compares a page; returns it as it should be, if it is not there and all it speaks of can be read.
    fn compare_page(
        &self,
        report: &mut Report,
        compared: &mut Compared,
        index: u32,
        words: &[Word],
        of: impl Fn(usize) -> ((u32, u32), Option<u64>),
    ) -> Option<CrcPage> {
        let at = self.crcs.page_offset(index);
        let mut bytes = [0; PAGE];
        let stored = match self.file.read_or_zero_at(&mut bytes, at) {
            Ok(()) => match CrcPage::parse(&bytes) {
                Ok(Some(page)) if (page.seal_id, page.index) == (self.seal_id, index) => Ok(Some(page)),
                Ok(Some(page)) => Err(format!("it is page {} of seal {}", page.index, page.seal_id)),
                Ok(None) => Ok(None),
                Err(error) => Err(error.to_string()),
            },
            Err(error) => Err(error.to_string()),
        };
        let coverage = &mut compared.coverage;
        let page = match stored {
            Ok(Some(page)) => page,
            other => {
                let units = words.iter().filter(|word| word.is_unit && word.is_present).count() as u64;
                let can_be_written = words.iter().all(|word| word.value.is_some());
                if let Err(what) = other {
                    report.add(Code::CrcsDamaged, "data CRCs", at, what);
                }
                if self.writable.is_none() || !can_be_written {
                    coverage.unproven_bytes += units * PAGE_BYTES;
                    return None;
                }
                coverage.compared_bytes += units * PAGE_BYTES;
                let mut page = CrcPage { seal_id: self.seal_id, index, words: [0; CRC_WORDS] };
                for (slot, word) in page.words.iter_mut().zip(words) {
                    *slot = word.value.filter(|_| word.is_present || !word.is_unit).unwrap_or(0);
                }
                return Some(page);
            }
        };
        for (number, (&expected, word)) in page.words.iter().zip(words).enumerate() {
            let ((block, entry), unit) = of(number);
            match unit {
                None if word.value == Some(expected) => {}
                None => report.push(Finding {
                    code: Code::BitmapDamaged,
                    structure: "bitmap",
                    offset: Some(self.image.place().bitmap_offset(entry)),
                    block: Some(block),
                    guest: None,
                    what: format!("the bitmap of block {block} is not what was sealed"),
                }),
                Some(_) if expected == 0 => {}
                Some(unit) => {
                    compared.coverage.compared_bytes += PAGE_BYTES;
                    if word.value != Some(expected) {
                        compared.add_damage(self.image.place(), block, entry, unit, expected, word);
                    }
                }
            }
        }
        None
    }

    /// Writes pages; the file keeps its time, as with any maintenance of a sealed image.
    fn write_pages(&self, pages: &[CrcPage]) -> Result<u64> {
        let Some(file) = self.writable.as_deref().filter(|_| !pages.is_empty()) else { return Ok(0) };
        let io = |error| Error::io(self.path, "writing the CRCs of its data", error);
        file.lock_registry().map_err(io)?;
        let result = file.modified().and_then(|modified| {
            for page in pages {
                file.write_all_at(&page.to_bytes(), self.crcs.page_offset(page.index))?;
            }
            file.set_modified(modified)
        });
        // Dropping the handle gives it back, too.
        let _ = file.unlock_registry();
        result.map_err(io)?;
        Ok(pages.len() as u64)
    }

    /// The words of some blocks, in order.
    fn read_blocks(&self, blocks: &[(u32, u32)]) -> Result<Vec<Word>> {
        let next = AtomicUsize::new(0);
        let results: Vec<Mutex<Vec<Word>>> = blocks.iter().map(|_| Mutex::new(Vec::new())).collect();
        let run = || {
            let mut buffer = vec![0; CHUNK_UNITS * PAGE];
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let (Some(&block), Some(result)) = (blocks.get(number), results.get(number)) else { return };
                *result.lock() = self.read_block(block, &mut buffer);
            }
        };
        let threads = self.threads.min(blocks.len());
        if threads <= 1 {
            run();
        } else {
            thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(run);
                }
            });
        }
        Ok(results.iter().flat_map(|words| std::mem::take(&mut *words.lock())).collect())
    }

    fn read_block(&self, (block, entry): (u32, u32), buffer: &mut [u8]) -> Vec<Word> {
        let place = self.image.place();
        let units = (words_per_block(place) - 1) as usize;
        let unknown = |is_unit| Word { value: None, is_present: false, is_unit };
        let mut words = Vec::with_capacity(units + 1);
        if self.image.bad_entries.binary_search(&block).is_ok() {
            words.push(unknown(false));
            words.extend((0..units).map(|_| unknown(true)));
            return words;
        }
        let mut bits = vec![0; place.bitmap_bytes() as usize];
        let read = self.file.read_or_zero_at(&mut bits, place.bitmap_offset(entry));
        words.push(Word {
            value: read.ok().map(|()| crc32fast::hash(&bits)),
            is_present: true,
            is_unit: false,
        });
        let root = self.image.inspection.decision.footer.disk_type == DiskType::Dynamic;
        let data = place.data_offset(entry);
        for first in (0..units).step_by(CHUNK_UNITS) {
            let count = CHUNK_UNITS.min(units - first);
            let at = data + first as u64 * PAGE_BYTES;
            let chunk = buffer.get_mut(..count * PAGE).unwrap_or_default();
            let values = self.read_chunk(at, chunk);
            words.extend((first..).zip(values).map(|(unit, value)| {
                let sector = unit as u32 * SECTORS_PER_UNIT;
                let is_present = root || (0..SECTORS_PER_UNIT).any(|i| bitmap::get(&bits, sector + i));
                Word { value, is_present, is_unit: true }
            }));
        }
        words
    }

    /// The words of the units at a place of the file; `None` for those that cannot be read.
    fn read_chunk(&self, at: u64, chunk: &mut [u8]) -> Vec<Option<u32>> {
        let end = at + chunk.len() as u64;
        let is_hole = self.file.next_data(at).is_ok_and(|data| data.is_none_or(|data| data.start >= end));
        if is_hole {
            chunk.fill(0);
        } else if self.file.read_or_zero_at(chunk, at).is_err() {
            let read = |(unit, offset): (&mut [u8], u64)| -> io::Result<u32> {
                self.file.read_or_zero_at(unit, offset)?;
                Ok(unit_word(unit))
            };
            let offsets = (at..end).step_by(PAGE);
            return chunk.chunks_mut(PAGE).zip(offsets).map(|unit| read(unit).ok()).collect();
        }
        chunk.chunks(PAGE).map(|unit| Some(unit_word(unit))).collect()
    }
}

/// The bitmap that a block of a sealed layer had, as its CRCs tell it: each unit that the layer holds has a word, and the bitmap a
/// CRC of its own. `None` where they do not tell it, or not for sure.
pub(super) fn sealed_bitmap(file: &dyn File, image: &Image, block: u32) -> Option<Vec<u8>> {
    let (crcs, place) = (room(image)?, image.place());
    let seal_id = image.inspection.decision.superblock?.0.lineage.seal_id;
    let count = |entries: &[u32]| entries.iter().filter(|&&entry| entry != vhd::UNALLOCATED).count() as u64;
    if DataCrcs::new(place, count(&image.entries), crcs.offset) != crcs {
        return None;
    }
    let first = count(image.entries.get(..block as usize)?) * words_per_block(place);
    let last = first + words_per_block(place) - 1;
    let pages = first / CRC_WORDS as u64..last / CRC_WORDS as u64 + 1;
    let mut words = Vec::new();
    for index in pages.clone() {
        let index = u32::try_from(index).ok()?;
        let mut bytes = [0; PAGE];
        file.read_or_zero_at(&mut bytes, crcs.page_offset(index)).ok()?;
        let page = CrcPage::parse(&bytes).ok().flatten()?;
        ((page.seal_id, page.index) == (seal_id, index)).then(|| words.extend(page.words))?;
    }
    let start = (first - pages.start * CRC_WORDS as u64) as usize;
    let (&expected, units) = words.get(start..)?.split_first()?;
    let mut bits = vec![0; place.bitmap_bytes() as usize];
    for (sector, _) in (0..)
        .step_by(SECTORS_PER_UNIT as usize)
        .zip(units.get(..(words_per_block(place) - 1) as usize)?)
        .filter(|&(_, &word)| word != 0)
    {
        bitmap::set_range(&mut bits, sector..sector + SECTORS_PER_UNIT, true);
    }
    (crc32fast::hash(&bits) == expected).then_some(bits)
}

/// The room for CRCs, if it is where it can be: behind the last block, in front of the footer.
pub(super) fn room(image: &Image) -> Option<DataCrcs> {
    let (superblock, _) = image.inspection.decision.superblock?;
    let crcs = superblock.data_crcs;
    let footer = image.inspection.headers.file_bytes.checked_sub(vhd::Footer::SIZE as u64)?;
    let sealed = superblock.lineage.is_sealed() && image.inspection.decision.condition == Condition::Clean;
    (sealed && crcs.is_some() && crcs.end() == footer && crcs.offset.is_multiple_of(PAGE_BYTES))
        .then_some(crcs)
}

/// One word as it is now.
#[derive(Debug, Clone, Copy)]
struct Word {
    /// `None` where it cannot be read.
    value: Option<u32>,
    /// Whether the layer holds the unit.
    is_present: bool,
    /// Of a unit of data, not of a bitmap.
    is_unit: bool,
}

impl Compared {
    fn add_damage(
        &mut self,
        place: &Placement,
        block: u32,
        entry: u32,
        unit: u64,
        expected: u32,
        word: &Word,
    ) {
        let file_offset = place.data_offset(entry) + unit * PAGE_BYTES;
        let start = u64::from(block) * u64::from(place.block_bytes) + unit * PAGE_BYTES;
        let unreadable = word.value.is_none();
        let is_looked_for = self.units < LOOKED_FOR;
        self.units += 1;
        if let Some(last) = self.damages.last_mut()
            && (last.block, last.guest.end, last.unreadable) == (block, start, unreadable)
        {
            last.guest.end += PAGE_BYTES;
            last.expected.extend(is_looked_for.then_some(expected));
            return;
        }
        if !is_looked_for {
            self.uncounted += 1;
            return;
        }
        self.damages.push(Damage {
            block,
            file_offset,
            guest: start..start + PAGE_BYTES,
            expected: vec![expected],
            unreadable,
            intact_in: None,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of very much damage the places of the first are kept; more of it is counted, and costs no memory.
    #[test]
    fn damage_is_kept_to_a_bound_and_counted() {
        let place = Placement::new(16, 2 << 20, PAGE_BYTES);
        let word = Word { value: Some(1), is_present: true, is_unit: true };
        let mut compared = Compared::default();
        for unit in 0..LOOKED_FOR as u64 + 3 {
            compared.add_damage(&place, 0, 8, unit, 7, &word);
        }
        let [damage] = compared.damages.as_slice() else { panic!("{}", compared.damages.len()) };
        // What follows on the last place belongs to it, though its words are not kept: no parent is asked for a part of it.
        assert_eq!(damage.guest, 0..(LOOKED_FOR as u64 + 3) * PAGE_BYTES);
        assert_eq!((damage.expected.len(), compared.uncounted), (LOOKED_FOR, 0));
        for unit in [LOOKED_FOR as u64 + 4, LOOKED_FOR as u64 + 6] {
            compared.add_damage(&place, 0, 8, unit, 7, &word);
        }
        assert_eq!((compared.damages.len(), compared.uncounted), (1, 2));
    }
}
