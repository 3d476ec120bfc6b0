//! Block pages: the header that says which block a slot holds, and the bitmap.
//!
//! In the order of the file, one read of a page for each block, by as many threads as the machine runs at once. Data is read only
//! beneath clear bits of a dynamic disk, and there only where the file is no hole.

use super::code::Code;
use super::image::Image;
use super::report::{Finding, Report};
use super::table::Extent;
use crate::error::{Error, Result};
use crate::ext::{BlockHeader, PAGE_BYTES};
use crate::vfs::{File, FileExt};
use crate::vhd::{self, DiskType, bitmap};
use std::path::Path;
use std::thread;

const PAGE: usize = PAGE_BYTES as usize;
/// So much data is read at once.
const CHUNK_BYTES: u64 = 64 << 10;

/// So many blocks are checked between two looks at what was found.
const BATCH_BLOCKS: usize = 32 << 10;
/// For fewer a thread is not worth while.
const LEAST_BLOCKS: usize = 512;

/// What was found in some blocks.
#[derive(Debug, Default)]
struct Part {
    findings: Vec<Finding>,
    bad_pages: Vec<u32>,
    clear: Vec<u32>,
    /// Blocks with all bits set.
    whole: usize,
    last_allocation: u64,
}

/// Checks the pages of all `extents`.
pub(super) fn check(
    report: &mut Report,
    file: &dyn File,
    path: &Path,
    image: &mut Image,
    extents: &[Extent],
) -> Result<()> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let mut all = Part::default();
    for batch in extents.chunks(BATCH_BLOCKS) {
        for part in check_batch(file, path, image, batch, threads) {
            let part = part?;
            part.findings.into_iter().for_each(|finding| report.push(finding));
            all.bad_pages.extend(part.bad_pages);
            all.clear.extend(part.clear);
            all.whole += part.whole;
            all.last_allocation = all.last_allocation.max(part.last_allocation);
        }
    }
    let differencing = image.inspection.decision.footer.disk_type == DiskType::Differencing;
    if differencing && all.whole > 0 && all.whole == extents.len() {
        let what = format!("all bits of all {} blocks are set", all.whole);
        report.add(Code::BitmapsAllSet, "bitmap", image.place().table_end(), what);
    }
    (image.bad_pages, image.clear_bits, image.last_allocation) =
        (all.bad_pages, all.clear, all.last_allocation);
    Ok(())
}

/// Checks some blocks, each thread a run of them; what they found is in the order of the file.
fn check_batch(
    file: &dyn File,
    path: &Path,
    image: &Image,
    batch: &[Extent],
    threads: usize,
) -> Vec<Result<Part>> {
    let each = batch.len().div_ceil(threads.max(1)).max(LEAST_BLOCKS);
    let run = |extents| check_blocks(file, path, image, extents);
    if batch.len() <= each {
        return vec![run(batch)];
    }
    thread::scope(|scope| {
        let workers: Vec<_> = batch.chunks(each).map(|extents| scope.spawn(move || run(extents))).collect();
        let join = |worker: thread::ScopedJoinHandle<'_, _>| match worker.join() {
            Ok(part) => part,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        workers.into_iter().map(join).collect()
    })
}

fn check_blocks(file: &dyn File, path: &Path, image: &Image, extents: &[Extent]) -> Result<Part> {
    let mut part = Part::default();
    let mut bits = vec![0; image.place().bitmap_bytes() as usize];
    for extent in extents {
        let checker = BlockCheck { file, path, image, extent: *extent };
        let has_header = image.described && image.place().slot_index(extent.entry).is_some();
        if !has_header && image.bad_entries.binary_search(&extent.block).is_ok() {
            // What stands there is another block's.
            continue;
        }
        let readable = match has_header {
            true => checker.page(&mut part, &mut bits),
            false => checker.bitmap(&mut part, &mut bits),
        };
        if !readable {
            continue;
        }
        match bitmap::all_set(&bits, 0..sectors(image)) {
            true => part.whole += 1,
            false => checker.clear_bits(&mut part, &bits, has_header)?,
        }
    }
    Ok(part)
}

/// Sectors of a block.
fn sectors(image: &Image) -> u32 {
    u32::try_from(u64::from(image.place().block_bytes) / vhd::SECTOR).unwrap_or(u32::MAX)
}

struct BlockCheck<'a> {
    file: &'a dyn File,
    path: &'a Path,
    image: &'a Image,
    extent: Extent,
}

impl BlockCheck<'_> {
    fn find(&self, part: &mut Part, code: Code, structure: &'static str, offset: u64, what: String) {
        let block = Some(self.extent.block);
        part.findings.push(Finding { code, structure, offset: Some(offset), block, guest: None, what });
    }

    /// Reads and judges the page of a block of ours; its bitmap goes into `bits`.
    fn page(&self, part: &mut Part, bits: &mut [u8]) -> bool {
        let (place, block) = (self.image.place(), self.extent.block);
        let at = place.block_page_offset(self.extent.entry);
        let mut page = [0; PAGE];
        if let Some(replayed) = self.image.inspection.pages.get(&at) {
            page = *replayed.bytes(place);
        } else if let Err(error) = self.file.read_or_zero_at(&mut page, at) {
            self.find(part, Code::Unreadable, "block page", at, format!("block {block}: {error}"));
            part.bad_pages.push(block);
            return false;
        }
        let what = match BlockHeader::parse(&page) {
            Ok(Some(header)) => {
                let disk_id = self.image.inspection.decision.footer.unique_id;
                if (header.page_offset, header.disk_id, header.block) == (at, disk_id, block) {
                    self.allocation(part, &header, at);
                    part.last_allocation = header.allocation.max(part.last_allocation);
                    bits.copy_from_slice(page.get(PAGE - bits.len()..).unwrap_or_default());
                    return true;
                }
                format!(
                    "the header names block {} of disk {} at offset {}, and not block {block}",
                    header.block, header.disk_id, header.page_offset
                )
            }
            Ok(None) => format!("the header of block {block} is missing"),
            Err(error) => format!("block {block}: {error}"),
        };
        self.find(part, Code::BlockHeader, "block header", at, what);
        part.bad_pages.push(block);
        false
    }

    fn allocation(&self, part: &mut Part, header: &BlockHeader, at: u64) {
        let next = self.image.inspection.decision.superblock.map_or(u64::MAX, |(s, _)| s.next_allocation);
        let replayed = self.image.inspection.pages.contains_key(&at);
        if header.allocation >= next && !replayed {
            let what = format!("it is {}, and the superblock counts on from {next}", header.allocation);
            self.find(part, Code::AllocationSequence, "block header", at + 40, what);
        }
    }

    /// Reads the bitmap of a block that may have no header.
    fn bitmap(&self, part: &mut Part, bits: &mut [u8]) -> bool {
        let at = self.image.place().bitmap_offset(self.extent.entry);
        if let Err(error) = self.file.read_or_zero_at(bits, at) {
            let what = format!("block {}: {error}", self.extent.block);
            self.find(part, Code::Unreadable, "bitmap", at, what);
            part.bad_pages.push(self.extent.block);
            return false;
        }
        self.image.inspection.overlay.apply(at, bits);
        true
    }

    /// Judges a bitmap that is not full.
    fn clear_bits(&self, part: &mut Part, bits: &[u8], has_header: bool) -> Result<()> {
        let (place, block) = (self.image.place(), self.extent.block);
        let at = place.bitmap_offset(self.extent.entry);
        let dynamic = self.image.inspection.decision.footer.disk_type == DiskType::Dynamic;
        let sectors = sectors(self.image);
        if has_header && dynamic {
            let count = (0..sectors).filter(|&sector| !bitmap::get(bits, sector)).count();
            let what = format!("block {block}: {count} of {sectors} bits are clear");
            self.find(part, Code::BitmapClear, "bitmap", at, what);
            part.clear.push(block);
            return Ok(());
        }
        let start = u64::from(block) * u64::from(place.block_bytes);
        let size = self.image.inspection.decision.footer.current_size;
        let on_disk = (size.saturating_sub(start) / vhd::SECTOR).min(sectors.into()) as u32;
        let behind = (on_disk..(bits.len() * 8) as u32).filter(|&sector| bitmap::get(bits, sector)).count();
        if behind > 0 {
            let what = format!("block {block}: {behind} bits behind sector {on_disk}");
            self.find(part, Code::BitmapPastEnd, "bitmap", at, what);
        }
        if dynamic && let Some(sector) = self.hidden_data(bits, on_disk)? {
            let what = format!("block {block}: sector {sector} of it is not zero");
            self.find(part, Code::BitmapHidden, "bitmap", at, what);
        }
        Ok(())
    }

    /// The first sector that is not zero although its bit is clear.
    fn hidden_data(&self, bits: &[u8], on_disk: u32) -> Result<Option<u32>> {
        let data = self.image.place().data_offset(self.extent.entry);
        let mut buf = vec![0; CHUNK_BYTES as usize];
        for run in bitmap::runs(bits, 0..on_disk).filter(|run| !run.set) {
            let mut at = data + u64::from(run.sectors.start) * vhd::SECTOR;
            let end = data + u64::from(run.sectors.end) * vhd::SECTOR;
            while at < end {
                let io = |error| {
                    Error::io(self.path, format!("reading the data of block {}", self.extent.block), error)
                };
                let Some(next) = self.file.next_data(at).map_err(io)? else { break };
                at = at.max(next.start);
                if at >= end {
                    break;
                }
                let length = CHUNK_BYTES.min(end - at);
                let chunk = buf.get_mut(..length as usize).unwrap_or_default();
                self.file.read_or_zero_at(chunk, at).map_err(io)?;
                if let Some(byte) = chunk.iter().position(|&byte| byte != 0) {
                    return Ok(u32::try_from((at + byte as u64 - data) / vhd::SECTOR).ok());
                }
                at += length;
            }
        }
        Ok(None)
    }
}
