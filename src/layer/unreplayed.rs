//! A cookie that somebody turned back by hand: the header says that the image was closed, and its journal holds what never came in
//! place.
//!
//! No order of ours leaves that. An opening writes the dirty cookie before the first entry of its session, and a close moves the
//! tails behind the last record before it writes the normal one; so under a normal cookie no record of the superblock's session
//! is live, whichever superblock is lost. (Of an image made elsewhere what was brought in place counts as well, as long as it is in
//! the working table alone.) Where one is, nobody knows what counts: the journal may hold flushed data that the file lacks,
//! and another program may have written to the file since. So nothing is replayed, and nothing is written.

use super::headers::{Headers, MAX_RING_BYTES, MAX_TABLE_ROOM_BYTES, MIN_RING_BYTES};
use crate::defect::{self, Defect};
use crate::ext::{PAGE_BYTES, State, Superblock};
use crate::journal::Scan;
use crate::vfs::{File, FileExt};
use crate::vhd::{self, DynamicHeader, Footer, HeaderCookie, UniqueId};

/// A journal that does not count, as the cookie is normal, and that was not brought in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unreplayed {
    /// The head of the temporary journal that it is; 0 in an image made here.
    pub(crate) base: u64,
    /// Where its ring starts.
    pub(crate) ring_offset: u64,
    /// What it holds.
    pub(crate) what: String,
}

impl Unreplayed {
    /// Why the image is not written to.
    pub(super) fn doubt(&self) -> String {
        format!(
            "the dynamic header says that the image was closed, but its journal was never brought in place ({}), so what was \
             flushed last may be missing: somebody turned the cookie back",
            self.what
        )
    }
}

/// Looks for one beside a front that is sound. `temporary` holds the head of a temporary journal that would end the file, and its
/// superblocks.
pub(super) fn find(
    file: &dyn File,
    headers: &Headers,
    temporary: Option<(u64, [Option<Superblock>; 2])>,
) -> Option<Unreplayed> {
    let (footer, header) = headers.front.as_ref().ok()?;
    if header.cookie != HeaderCookie::Normal {
        return None;
    }
    let found = beside(file, headers, (footer, header), temporary)?;
    // Who asks without a lock may have seen the header of one moment and the journal of another.
    let mut still = [0; DynamicHeader::SIZE];
    let read = file.read_or_zero_at(&mut still, footer.data_offset);
    (read.is_err() || still == header.to_bytes()).then_some(found)
}

fn beside(
    file: &dyn File,
    headers: &Headers,
    (footer, header): (&Footer, &DynamicHeader),
    temporary: Option<(u64, [Option<Superblock>; 2])>,
) -> Option<Unreplayed> {
    let ours = headers.superblocks.each_ref().map(|superblock| superblock.as_ref().ok().copied());
    match newest(&ours, footer.unique_id, false) {
        Some(superblock) => unreplayed(file, headers, header, 0, &superblock),
        None => {
            let (head, superblocks) = temporary?;
            let superblock = newest(&superblocks, footer.unique_id, true)?;
            unreplayed(file, headers, header, head, &superblock)
        }
    }
}

fn newest(superblocks: &[Option<Superblock>; 2], disk_id: UniqueId, temporary: bool) -> Option<Superblock> {
    let of_this_disk = superblocks.iter().flatten();
    let of_this_disk = of_this_disk.filter(|s| s.disk_id == disk_id && s.is_temporary() == temporary);
    of_this_disk.max_by_key(|superblock| superblock.sequence).copied()
}

fn unreplayed(
    file: &dyn File,
    headers: &Headers,
    header: &DynamicHeader,
    base: u64,
    superblock: &Superblock,
) -> Option<Unreplayed> {
    let (ring_offset, ring_bytes) = (superblock.ring_offset, superblock.ring_bytes);
    // A ring that cannot be has no records; whoever goes by this superblock says what is wrong with it.
    let possible = superblock.state == State::Dirty
        && ring_bytes.is_multiple_of(PAGE_BYTES)
        && (MIN_RING_BYTES..=MAX_RING_BYTES).contains(&ring_bytes)
        && ring_offset.checked_add(ring_bytes).is_some_and(|end| end <= headers.file_bytes);
    if !possible || defect::active(Defect::TurnedBackCookieCounts) {
        return None;
    }
    let mut ring = vec![0; ring_bytes as usize];
    let what = match file.read_or_zero_at(&mut ring, ring_offset) {
        Err(error) => format!("it cannot be read: {error}"),
        Ok(()) => match Scan::new(ring, superblock).and_then(|scan| Ok((scan.records()?.len(), scan))) {
            // What an opening leaves that was cut before its cookie.
            Ok((_, scan)) if scan.newest().is_none() => return None,
            Ok((0, _)) if base == 0 || same_tables(file, header, ring_offset + ring_bytes, base) => {
                return None;
            }
            Ok((records, _)) => format!("{records} records"),
            Err(error) => error.to_string(),
        },
    };
    Some(Unreplayed { base, ring_offset, what })
}

/// Whether a session on an image made elsewhere has left the table that other programs read as its own is: what the session brought
/// in place is in its own alone.
fn same_tables(file: &dyn File, header: &DynamicHeader, working: u64, working_end: u64) -> bool {
    let length = vhd::bat_bytes(header.max_table_entries).min(working_end.saturating_sub(working));
    if length > MAX_TABLE_ROOM_BYTES {
        return false;
    }
    let mut tables = [vec![0; length as usize], vec![0; length as usize]];
    let offsets = [header.table_offset, working];
    let read = tables.iter_mut().zip(offsets).all(|(table, at)| file.read_or_zero_at(table, at).is_ok());
    let [published, working] = &tables;
    // Pages may be padded otherwise behind the entries of the disk.
    read && vhd::bat::entries(published).zip(vhd::bat::entries(working)).all(|(a, b)| a == b)
}
