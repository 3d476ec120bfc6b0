//! Recovery: from a file that a session left without closing to one whose metadata is all in place.
//!
//! Every step is durable before the next and may be repeated from the start after another crash:
//! sync, and metadata is read from the medium · the ring is scanned and replayed in memory · start of the file from its
//! backup, if it was lost, or else both again · images of pages that change and have none, in the old session · pages and
//! guest data in place, the file ends behind the last slot, free slots are punched · a new session in both
//! superblocks. Only then does anything new enter the ring, and nothing of the old session is read again.

use super::headers::{Condition, pair_bytes};
use super::open::{Foreign, Opening, Ready};
use super::session::Superblocks;
use super::table::{self, Survey};
use crate::defect::{self, Defect};
use crate::error::{Error, FormatError, Result};
use crate::ext::{PAGE_BYTES, Record, Superblock};
use crate::journal::{BlockPage, Replay, ReplayError, Ring, Scan, write_zeros};
use crate::vfs::FileExt;
use crate::vhd::HeaderCookie;
use std::collections::BTreeSet;

/// Recovers the image and names a session in it.
pub(super) fn recover(opening: &Opening, superblocks: &mut Superblocks) -> Result<Ready> {
    // Nothing is written before all of it is known to be sound.
    let scan = scan_ring(opening)?;
    let replay = replay(opening, &scan)?;
    let entries: Vec<u32> = replay.entries().collect();
    let kept = opening.kept()?;
    let survey = Survey::new(&opening.path, &opening.place, &entries, limit(opening, &replay))?;
    restore_lost_headers(opening)?;
    let foreign = opening.foreign_blocks(&entries);
    superblocks.current.foreign_blocks |= foreign == Foreign::StructureChanged;
    if !defect::active(Defect::RecoveryWithoutImages) {
        make_images(opening, &scan, &replay)?;
    }
    let end = opening.place.file_bytes(survey.fresh);
    if opening.headers.file_bytes < end {
        // First, so that the file never ends with a guest's bytes.
        opening.file.set_len(end).map_err(opening.io("extending the file over its last block"))?;
    }
    write_in_place(opening, &replay)?;
    opening.wipe_cut_upgrade(&entries)?;
    if !defect::active(Defect::RecoveryKeepsTail) {
        opening.cut_behind(survey.fresh)?;
    }
    let free: BTreeSet<u32> = survey.free_slots(&opening.place).collect();
    if !defect::active(Defect::RecoveryKeepsFreeSlots) {
        opening.punch_slots(&free)?;
    }
    if !defect::active(Defect::RecoveryWithoutSync) {
        opening.sync()?;
    }
    let next_allocation = superblocks.current.next_allocation.max(replay.next_allocation());
    drop(replay);
    let session = opening.start_session(superblocks, next_allocation)?;
    Ok(Ready { session, entries, fresh: survey.fresh, free, next_allocation, kept, foreign })
}

/// Where the block of an entry must end. A crash may have lost that the file grew over a block only as long as the block's alloc
/// record is live: what made the record's effect durable in place made the length durable, too.
pub(super) fn limit<'a>(opening: &Opening, replay: &'a Replay<'_>) -> impl Fn(u32) -> u64 + 'a {
    let file_bytes = opening.headers.file_bytes;
    move |entry| if replay.allocates(entry) { u64::MAX } else { file_bytes }
}

/// Writes the start of the file and the backup, one after the other, the one first that does not count: an earlier attempt may have
/// left either of them in the cache and not on the medium, or in the middle of naming another parent.
fn restore_lost_headers(opening: &Opening) -> Result<()> {
    let (footer, header) = (&opening.decision.footer, &opening.decision.header);
    let dirty = opening.place.marked(header, HeaderCookie::Dirty);
    let front = pair_bytes(footer, &dirty);
    let write_front = || {
        let written = opening.file.write_durable_at(&front, 0);
        written.map_err(opening.io("writing the start of the file"))
    };
    if opening.decision.front_lost {
        // Before the headers: once they are sound, nobody looks at the copy of the first page any more.
        if !defect::active(Defect::HeadersBeforeFirstPage) {
            opening.restore_first_page()?;
        }
        write_front()?;
        if defect::active(Defect::HeadersBeforeFirstPage) {
            opening.restore_first_page()?;
        }
        return opening.write_backup();
    }
    opening.write_backup()?;
    write_front()
}

/// Reads the ring and finds its live part. A half-closed image has none.
pub(super) fn scan_ring(opening: &Opening) -> Result<Scan> {
    let superblock = match opening.decision.superblock {
        Some((superblock, _)) if opening.decision.condition == Condition::Dirty => superblock,
        _ => return Ok(Scan::empty()),
    };
    let mut ring = vec![0; superblock.ring_bytes as usize];
    opening
        .file
        .read_or_zero_at(&mut ring, superblock.ring_offset)
        .map_err(opening.io("reading the journal ring"))?;
    Scan::new(ring, &superblock).map_err(|error| damaged(opening, &superblock, error))
}

fn damaged(opening: &Opening, superblock: &Superblock, error: FormatError) -> Error {
    Error::Damaged {
        path: opening.path.clone(),
        what: format!("the journal at offset {} cannot be replayed: {error}", superblock.ring_offset),
        hint: "run `cowvhd repair` on a copy",
    }
}

/// Replays the live records over the metadata in the file.
pub(super) fn replay<'a>(opening: &Opening, scan: &'a Scan) -> Result<Replay<'a>> {
    let superblock = opening.decision.superblock.map(|(superblock, _)| superblock);
    let as_damage = |error| match superblock {
        Some(superblock) => damaged(opening, &superblock, error),
        None => error.at(&opening.path, 0),
    };
    let records = scan.records().map_err(as_damage)?;
    let table = table::read_table(&*opening.file, &opening.path, &opening.place)?;
    let read_page = |offset| {
        let mut page = [0; PAGE_BYTES as usize];
        opening.file.read_or_zero_at(&mut page, offset).map(|()| page)
    };
    let disk_id = opening.decision.footer.unique_id;
    let replay =
        Replay::new(opening.place, disk_id, table, &records, read_page).map_err(|error| match error {
            ReplayError::Format(error) => as_damage(error),
            ReplayError::Io(error) => Error::io(&opening.path, "reading a block page", error),
        })?;
    // What they say counts since the file was opened.
    if let Some(front) = replay.front() {
        opening.decision.journaled_pair(front).map_err(as_damage)?;
    }
    Ok(replay)
}

/// Makes durable, in the old session, an image of every page that is about to change and has none in the live ring: if
/// writing it in place is cut, the next recovery needs it.
fn make_images(opening: &Opening, scan: &Scan, replay: &Replay<'_>) -> Result<()> {
    let Some((superblock, _)) = opening.decision.superblock else { return Ok(()) };
    let pages: Vec<(u64, Box<[u8; PAGE_BYTES as usize]>)> = replay
        .block_pages()
        .filter(|(_, page)| matches!(page, BlockPage::Bytes { determined: false, .. }))
        .map(|(offset, page)| (offset, page.bytes(&opening.place)))
        .collect();
    let table_images = replay
        .table_pages()
        .filter(|&(_, _, imaged)| !imaged)
        .map(|(offset, bytes, _)| Record::Image { offset, bytes });
    let page_images =
        pages.iter().map(|(offset, bytes)| Record::Image { offset: *offset, bytes: bytes.as_slice() });
    let images: Vec<Record<'_>> = table_images.chain(page_images).collect();
    let mut ring = Ring::resume(superblock.ring_offset, superblock.ring_bytes, superblock.session, scan);
    let mut rest = images.as_slice();
    while !rest.is_empty() {
        let appended = ring
            .append(&*opening.file, rest, false, 0)
            .map_err(opening.io("writing images into the journal"))?;
        let Some(appended) = appended else {
            let error = FormatError::new(
                "journal ring",
                "space",
                0,
                "too little",
                "room for images of changed pages",
            );
            return Err(damaged(opening, &superblock, error));
        };
        rest = rest.get(appended.records..).unwrap_or_default();
    }
    Ok(())
}

fn write_in_place(opening: &Opening, replay: &Replay<'_>) -> Result<()> {
    let file = &*opening.file;
    for (offset, bytes, _) in replay.table_pages() {
        file.write_all_at(bytes, offset).map_err(opening.io("writing a page of the block table"))?;
    }
    for (offset, page) in replay.block_pages() {
        let bytes = page.bytes(&opening.place);
        file.write_all_at(bytes.as_slice(), offset).map_err(opening.io("writing a block page"))?;
    }
    for data in replay.data() {
        match data.bytes {
            Some(bytes) => file.write_all_at(bytes, data.offset),
            None => write_zeros(file, data.offset, data.length),
        }
        .map_err(opening.io("writing journaled data in place"))?;
    }
    Ok(())
}
