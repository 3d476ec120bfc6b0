//! Saving what can be read of an image into a new one: a repair of a view in memory, which is then copied.
//!
//! The damaged file is only read. What cannot be read, and blocks whose place is known no more, read as zeros in the new disk and
//! are listed.

use super::one_file::OneFile;
use super::{Consent, Step, Target, table};
use crate::check::image::Image;
use crate::check::report::Report;
use crate::check::unreadable::{self, Readable};
use crate::disk::{CreateOptions, Disk, OpenOptions};
use crate::error::{Error, Result};
use crate::layer::{self, Condition, NewFile};
use crate::sync::Arc;
use crate::vfs::{Access, FileExt, Vfs};
use crate::vhd;
use std::ops::Range;
use std::path::Path;

/// So much is read at once, until a part of it cannot be read.
const PIECE_BYTES: u64 = vhd::BLOCK_SIZE as u64;
/// What is lost at least where the medium refuses to read.
const UNIT_BYTES: u64 = 4096;

/// What a salvage found and saved.
#[derive(Debug, Clone)]
pub struct Salvaged {
    /// What was wrong with the image.
    pub before: Report,
    /// What was mended in memory.
    pub steps: Vec<Step>,
    /// Ranges of the disk, in bytes, that are lost and read as zeros in the new one.
    pub lost: Vec<Range<u64>>,
    /// The image was not closed, and a part of its journal is damaged or cannot be read: writes may be missing that the guest had
    /// flushed, and nothing tells which.
    pub journal_lost: bool,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes that were written as data.
    pub written: u64,
}

/// Writes what can be read of the image at `path` to a new dynamic image `out`, which must not exist and appears complete or not
/// at all. The file at `path` is not changed. Fails where no footer and header can be found or made.
pub fn salvage(vfs: Arc<dyn Vfs>, path: &Path, out: &Path) -> Result<Salvaged> {
    let file =
        vfs.open(path, Access::ReadOnly).map_err(|error| Error::io(path, "opening the image", error))?;
    layer::lock(&*file, path, Access::ReadOnly)?;
    let Readable { file: shadow, left_out, .. } = Readable::new(file, path)?.without_block_pages()?;
    let target = Target { vfs: Arc::clone(&vfs), path, file: Arc::clone(&shadow), guard: None };
    let first = target.examine()?.image;
    let mut repaired = target.run(Consent::All)?;
    let (mut lost, mut journal_lost) = (Vec::new(), false);
    if let Some(first) = &first {
        unreadable::report(&mut repaired.before, &left_out, first);
        lost.extend(unreadable::lost_data(first, &left_out));
        journal_lost = unreadable::live_ring(first).is_some_and(|ring| {
            first.inspection.journal.is_some() || left_out.iter().any(|page| ring.contains(page))
        });
    }
    give_up_bad_entries(&target)?;
    let last = target.examine()?.image;

    let view =
        OneFile { inner: Arc::clone(&vfs), path: path.to_path_buf(), file: shadow, others: Access::ReadOnly };
    let disk = OpenOptions::new().vfs(Arc::new(view)).read_only(true).open(path)?;
    if let (Some(first), Some(last)) = (&first, &last) {
        let block_bytes = u64::from(last.place().block_bytes);
        let gone = (0..)
            .zip(first.entries.iter().zip(&last.entries))
            .filter(|&(_, (&before, &after))| before != vhd::UNALLOCATED && after == vhd::UNALLOCATED);
        lost.extend(gone.map(|(block, _): (u64, _)| block * block_bytes..(block + 1) * block_bytes));
        lost.extend(cut_off(first));
    }
    let new = NewFile::new(&*vfs, out)?;
    CreateOptions::new(disk.size()).vfs(Arc::clone(&vfs)).create(new.temporary())?;
    let saved = OpenOptions::new().vfs(Arc::clone(&vfs)).open(new.temporary())?;
    let written = copy(&disk, &saved, &mut lost)?;
    saved.close()?;
    drop(saved);
    new.publish(false)?;
    let size = disk.size();
    Ok(Salvaged {
        before: repaired.before,
        steps: repaired.steps,
        lost: merged(lost, size),
        journal_lost,
        size,
        written,
    })
}

/// What the blocks lack that the end of a closed file cuts off.
fn cut_off(image: &Image) -> impl Iterator<Item = Range<u64>> + '_ {
    let (place, file_bytes) = (image.place(), image.inspection.headers.file_bytes);
    let block_bytes = u64::from(place.block_bytes);
    let closed = image.inspection.decision.condition == Condition::Clean;
    (0..).zip(&image.entries).filter_map(move |(block, &entry): (u64, &u32)| {
        let data = place.data_offset(entry);
        let is_cut = closed && entry != vhd::UNALLOCATED && place.block_end(entry) > file_bytes;
        let start = block * block_bytes + file_bytes.saturating_sub(data);
        is_cut.then_some(start..(block + 1) * block_bytes)
    })
}

/// Entries that no repair could mend would keep the view from being opened.
fn give_up_bad_entries(target: &Target<'_>) -> Result<()> {
    let Some(image) = target.examine()?.image else { return Ok(()) };
    let io = |error| Error::io(target.path, "looking at the image", error);
    for (at, bytes) in table::without(&image, &image.bad_entries) {
        target.file.write_all_at(&bytes, at).map_err(io)?;
    }
    Ok(())
}

fn copy(from: &Disk, to: &Disk, lost: &mut Vec<Range<u64>>) -> Result<u64> {
    let mut buf = vec![0; PIECE_BYTES as usize];
    let mut written = 0;
    let mut at = 0;
    while at < from.size() {
        let end = (at + PIECE_BYTES).min(from.size());
        let piece = buf.get_mut(..(end - at) as usize).unwrap_or_default();
        if from.read_at(piece, at).is_err() {
            for unit in (at..end).step_by(UNIT_BYTES as usize) {
                let unit_end = (unit + UNIT_BYTES).min(end);
                let part = piece.get_mut((unit - at) as usize..(unit_end - at) as usize).unwrap_or_default();
                if from.read_at(part, unit).is_err() {
                    part.fill(0);
                    lost.push(unit..unit_end);
                }
            }
        }
        for run in crate::vfs::runs_of_data(piece, at) {
            written += (run.end - run.start) as u64;
            let offset = at + run.start as u64;
            to.write_at(piece.get(run).unwrap_or_default(), offset)?;
        }
        at = end;
    }
    Ok(written)
}

/// Sorted, neighbours joined, within the disk.
fn merged(mut ranges: Vec<Range<u64>>, size: u64) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| (range.start, range.end));
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges.into_iter().map(|range| range.start..range.end.min(size)).filter(|r| !r.is_empty()) {
        match merged.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}
