//! Reading the BAT and checking it against the file: every entry in bounds, no two blocks over each other.
//!
//! Cost is linear in the table; only blocks off our grid (another program placed them) are sorted.

use super::headers::Decision;
use crate::error::{Error, Result};
use crate::ext::{Fingerprint, PAGE_BYTES, Placement};
use crate::vfs::{File, FileExt};
use crate::vhd::{self, DynamicHeader, Footer};
use std::path::Path;

/// A session needs no more free slots than the disk has blocks, and some while others wait in the quarantine. What is beyond
/// waits for a later session: one entry near 2 TiB leaves hundreds of millions of small slots below it.
const SPARE_FREE_SLOTS: usize = 4096;
/// So much of a table is read at once.
const CHUNK_BYTES: usize = 1 << 20;

/// Reads the pages of the BAT, rounded up to whole pages.
///
/// The table of an image of ours is small ([`Decision::placement`] sees to it). One made elsewhere can claim 16 GiB in a sparse
/// file: a hole in it reads as entries of 0, which are refused at once, so that memory grows with what the file holds.
pub(crate) fn read_table(file: &dyn File, path: &Path, place: &Placement) -> Result<Vec<u8>> {
    let length = vhd::bat_bytes(place.table_entries).next_multiple_of(PAGE_BYTES) as usize;
    let made_elsewhere = place.ring_bytes == 0;
    let mut table = Vec::new();
    while table.len() < length {
        let start = table.len();
        table.resize(length.min(start + CHUNK_BYTES), 0);
        let chunk = table.get_mut(start..).unwrap_or_default();
        file.read_or_zero_at(chunk, place.table_offset + start as u64).map_err(|error| {
            Error::io(path, format!("reading the block table at offset {}", place.table_offset), error)
        })?;
        let rest = (place.table_entries as usize).saturating_sub(start / 4);
        if made_elsewhere && let Some(hole) = vhd::bat::entries(chunk).take(rest).position(|entry| entry == 0)
        {
            let block = start / 4 + hole;
            let what = format!("block {block} is at offset 0, over the footer copy");
            let hint = "run `cowvhd check` to see what is affected";
            return Err(Error::Damaged { path: path.to_path_buf(), what, hint });
        }
    }
    Ok(table)
}

/// The entries in the bytes of a BAT.
pub(crate) fn entries(table: &[u8], place: &Placement) -> Vec<u32> {
    vhd::bat::entries(table).take(place.table_entries as usize).collect()
}

/// The CRC-32 of the BAT's entries, as the fingerprint holds it.
pub(crate) fn entries_crc(entries: &[u32]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    // A disk of 2040 GiB has a million, at each open and close: swapped many at a time.
    let mut bytes = [0; 4096];
    for chunk in entries.chunks(bytes.len() / 4) {
        for (place, entry) in bytes.chunks_exact_mut(4).zip(chunk) {
            place.copy_from_slice(&entry.to_be_bytes());
        }
        hasher.update(bytes.get(..4 * chunk.len()).unwrap_or_default());
    }
    hasher.finalize()
}

/// Whether another program has placed blocks since the close that the fingerprint is of. Only a file of another length is looked at:
/// that is what a new block makes of it, and the table of a parent is not read for nothing.
pub(crate) fn has_grown(
    file: &dyn File,
    path: &Path,
    place: &Placement,
    left: &Fingerprint,
    file_bytes: u64,
) -> Result<bool> {
    if left.file_bytes == file_bytes {
        return Ok(false);
    }
    let table = read_table(file, path, place)?;
    Ok(entries_crc(&entries(&table, place)) != left.bat_crc)
}

/// Checks the BAT of an image made elsewhere, where blocks may lie anywhere: every one in the file, clear of the headers, the
/// table and every other.
pub(crate) fn check_foreign(
    path: &Path,
    decision: &Decision,
    entries: &[u32],
    file_bytes: u64,
) -> Result<()> {
    let header = &decision.header;
    let header_at = decision.footer.data_offset;
    let stride = vhd::bat::block_stride(header.block_size);
    let blocks = decision.footer.current_size.div_ceil(header.block_size.into());
    let table_end = header.table_offset + vhd::bat_bytes(header.max_table_entries);
    let areas = [
        (0, Footer::SIZE as u64, "the footer copy"),
        (header_at, header_at + DynamicHeader::SIZE as u64, "the dynamic header"),
        (header.table_offset, table_end, "the block table"),
    ];
    let damaged = |what: String| Error::Damaged {
        path: path.to_path_buf(),
        what,
        hint: "run `cowvhd check` to see what is affected",
    };
    // Entries for blocks behind the disk's end mean nothing.
    let mut starts: Vec<(u64, usize)> = entries
        .iter()
        .enumerate()
        .take(usize::try_from(blocks).unwrap_or(usize::MAX))
        .filter(|&(_, &entry)| entry != vhd::UNALLOCATED)
        .map(|(block, &entry)| (u64::from(entry) * vhd::SECTOR, block))
        .collect();
    starts.sort_unstable();
    for &(start, block) in &starts {
        let end = start + stride;
        if end > file_bytes {
            return Err(damaged(format!(
                "block {block} is at offset {start} and ends at {end}, past the file's {file_bytes} bytes"
            )));
        }
        if let Some((_, _, area)) = areas.iter().find(|(from, to, _)| start < *to && *from < end) {
            return Err(damaged(format!("block {block} is at offset {start}, over {area}")));
        }
    }
    for pair in starts.windows(2) {
        if let [(before, former), (start, block)] = pair
            && before + stride > *start
        {
            return Err(damaged(format!("block {block} at offset {start} overlaps block {former}")));
        }
    }
    Ok(())
}

/// Which slots the BAT uses.
#[derive(Debug)]
pub(crate) struct Survey {
    used: SlotSet,
    /// Slots from this index on were never used.
    pub(crate) fresh: u64,
}

impl Survey {
    /// Surveys `entries`. No block may end behind what `limit` says of its entry.
    pub(crate) fn new(
        path: &Path,
        place: &Placement,
        entries: &[u32],
        limit: impl Fn(u32) -> u64,
    ) -> Result<Self> {
        let damaged = |what: String| Error::Damaged {
            path: path.to_path_buf(),
            what,
            hint: "run `cowvhd check` to see what is affected",
        };
        let mut used = SlotSet::default();
        let mut off_grid = Vec::new();
        for (block, &entry) in entries.iter().enumerate().filter(|&(_, &entry)| entry != vhd::UNALLOCATED) {
            let start = place.bitmap_offset(entry);
            if !place.is_clear(entry) {
                let what = match place.temporary {
                    None => format!("inside the metadata below {}", place.table_end()),
                    Some(_) => "over the headers, the block table or the temporary journal".into(),
                };
                return Err(damaged(format!(
                    "block table entry {block} is sector {entry} (offset {start}), {what}"
                )));
            }
            let (end, length) = (place.block_end(entry), limit(entry));
            if end > length {
                return Err(damaged(format!(
                    "block table entry {block} is sector {entry}: the block ends at {end}, past the file's {length} bytes"
                )));
            }
            match place.slot_index(entry) {
                Some(index) if !used.insert(index) => {
                    return Err(damaged(format!(
                        "block table entry {block} is sector {entry}, as is another entry"
                    )));
                }
                Some(_) => {}
                None => off_grid.push((start, place.block_end(entry), block)),
            }
        }
        off_grid.sort_unstable();
        let overlap = |block: usize| damaged(format!("block {block} overlaps another block of the table"));
        for pair in off_grid.windows(2) {
            if let [(_, end, _), (start, _, block)] = pair
                && end > start
            {
                return Err(overlap(*block));
            }
        }
        let mut covered = Vec::new();
        for &(start, end, block) in &off_grid {
            // Blocks below the first slot touch none.
            let Some(last) = (end - 1).checked_sub(place.slot_origin) else { continue };
            let first = start.saturating_sub(place.slot_origin) / place.slot_stride();
            for index in first..=last / place.slot_stride() {
                if used.contains(index) {
                    return Err(overlap(block));
                }
                covered.push(index);
            }
        }
        covered.into_iter().for_each(|index| {
            used.insert(index);
        });
        let fresh = used.end();
        Ok(Survey { used, fresh })
    }

    /// The unused slots below `fresh`, as BAT entries; of very many the first.
    pub(crate) fn free_slots(&self, place: &Placement) -> impl Iterator<Item = u32> + '_ {
        let place = *place;
        (0..self.fresh)
            .filter(|&index| !self.used.contains(index))
            .filter_map(move |index| place.slot_entry(index))
            .take(place.table_entries as usize + SPARE_FREE_SLOTS)
    }
}

/// A growing set of slot indexes.
#[derive(Debug, Default)]
struct SlotSet {
    words: Vec<u64>,
    end: u64,
}

impl SlotSet {
    /// Adds an index; false if it was there.
    fn insert(&mut self, index: u64) -> bool {
        let (word, bit) = ((index / 64) as usize, 1 << (index % 64));
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        self.end = self.end.max(index + 1);
        match self.words.get_mut(word) {
            Some(word) if *word & bit == 0 => {
                *word |= bit;
                true
            }
            _ => false,
        }
    }

    fn contains(&self, index: u64) -> bool {
        self.words.get((index / 64) as usize).is_some_and(|word| word & (1 << (index % 64)) != 0)
    }

    /// One more than the highest index.
    fn end(&self) -> u64 {
        self.end
    }
}
