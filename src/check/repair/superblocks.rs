//! Superblocks, and a journal that cannot be replayed; the mark of a failed sync; the open and close that ends a repair.

use super::{Work, seal};
use crate::check::code::{Code, Severity};
use crate::check::image::{Examined, Image};
use crate::check::report::Report;
use crate::check::slots;
use crate::error::{Error, Result};
use crate::ext::{
    BAT_ROOM_BYTES, DataCrcs, Fingerprint, HEADER_BACKUP_OFFSET, Lineage, PAGE_BYTES, Placement, RING_OFFSET,
    SUPERBLOCK_OFFSETS, SessionId, State, Superblock, Tail,
};
use crate::layer::{self, Condition, Foreign, Headers, MAX_RING_BYTES, MIN_RING_BYTES};
use crate::vfs::{File, FileExt};
use crate::vhd::{self, DiskType, DynamicHeader, Footer, HeaderCookie};
use std::path::Path;

/// What can be done about superblocks and the journal.
pub(super) fn works(examined: &Examined, file: &dyn File, path: &Path) -> Result<Vec<Work>> {
    let report = &examined.report;
    if report.count(Code::JournalLost) > 0 {
        let headers = Headers::read(file, path)?;
        let Ok((footer, header)) = &headers.front else { return Ok(Vec::new()) };
        let work = new_superblocks(file, path, footer, header)?;
        return Ok(work.into_iter().collect());
    }
    let Some(image) = &examined.image else { return Ok(Vec::new()) };
    let decision = &image.inspection.decision;
    if report.count(Code::SuperblocksLost) > 0 && image.bad_entries.is_empty() {
        let work = new_superblocks(file, path, &decision.footer, &decision.header)?;
        return Ok(work.into_iter().collect());
    }
    if report.count(Code::JournalDamaged) > 0 {
        return Ok(give_up_journal(image));
    }
    Ok(Vec::new())
}

/// Two superblocks for an image that has none, if it is laid out as those made here are.
fn new_superblocks(
    file: &dyn File,
    path: &Path,
    footer: &Footer,
    header: &DynamicHeader,
) -> Result<Option<Work>> {
    let table_offset = header.table_offset;
    let ring_bytes = table_offset.saturating_sub(RING_OFFSET).min(MAX_RING_BYTES) / PAGE_BYTES * PAGE_BYTES;
    // The usual ring, if the table stands where that would put it.
    let usual = Placement::new(header.max_table_entries, header.block_size, 2 << 20);
    let ring_bytes = if usual.table_offset == table_offset { usual.ring_bytes } else { ring_bytes };
    let place = Placement {
        ring_offset: RING_OFFSET,
        ring_bytes,
        table_offset,
        table_entries: header.max_table_entries,
        slot_origin: table_offset.saturating_add(BAT_ROOM_BYTES),
        block_bytes: header.block_size,
        temporary: None,
    };
    let table_bytes = vhd::bat_bytes(header.max_table_entries);
    let fits = footer.disk_type != DiskType::Fixed
        && footer.data_offset == layer::HEADER_OFFSET
        && layer::temporary_head(header).is_none()
        && ring_bytes >= MIN_RING_BYTES
        && table_bytes <= BAT_ROOM_BYTES
        && u64::from(header.block_size).is_multiple_of(PAGE_BYTES)
        && place.bitmap_bytes() <= PAGE_BYTES / 2;
    if !fits {
        return Ok(None);
    }
    let io = |error| Error::io(path, "reading the block table", error);
    let mut table = vec![0; header.max_table_entries as usize * 4];
    file.read_or_zero_at(&mut table, table_offset).map_err(io)?;
    let entries: Vec<u32> = vhd::bat::entries(&table).collect();
    let found = slots::scan(file, path, &place, footer.unique_id)?;
    // A block without its header, on the grid or off it, is another program's.
    let described = (0..).zip(&entries).all(|(block, &entry)| {
        entry == vhd::UNALLOCATED || found.get(block).is_some_and(|found| found.slot == entry)
    });
    let normal = DynamicHeader { cookie: HeaderCookie::Normal, ..header.clone() };
    let closed = header.cookie == HeaderCookie::Normal;
    let superblock = Superblock {
        sequence: 1,
        disk_id: footer.unique_id,
        incompatible: 0,
        read_only_compatible: 0,
        compatible: 0,
        state: State::Clean,
        sync_failed: false,
        // In one that was not closed what the table lacks is looked for by the headers.
        foreign_blocks: closed && !described,
        session: SessionId::default(),
        ring_offset: place.ring_offset,
        ring_bytes: place.ring_bytes,
        meta_tail: Tail::FIRST,
        data_tail: Tail::FIRST,
        next_allocation: found.last_allocation().saturating_add(1),
        slot_origin: place.slot_origin,
        fingerprint: Fingerprint {
            file_bytes: file.length().map_err(io)?,
            footer_crc: crc32fast::hash(&footer.to_bytes()),
            header_crc: crc32fast::hash(&normal.to_bytes()),
            bat_crc: layer::entries_crc(&entries),
            modified: file.modified().map_err(io)?,
        },
        // If there was a seal, its children tell: what comes next (`seal.rs`).
        lineage: Lineage::default(),
        data_crcs: DataCrcs::default(),
    };
    let second = Superblock { sequence: 2, ..superblock };
    let backup = layer::pair_bytes(footer, &normal);
    Ok(Some(Work {
        what: "make both superblocks again".into(),
        safe: false,
        // Torn or not, one of the three says all of it; the superblocks are what other repairs start from.
        writes: vec![
            (HEADER_BACKUP_OFFSET, backup.to_vec()),
            (SUPERBLOCK_OFFSETS[0], superblock.to_bytes().to_vec()),
            (SUPERBLOCK_OFFSETS[1], second.to_bytes().to_vec()),
        ],
        ..Work::default()
    }))
}

/// What the whole entries of the journal hold goes in place; then the journal is given up.
pub(super) fn give_up_journal(image: &Image) -> Vec<Work> {
    let inspection = &image.inspection;
    let place = image.place();
    let mut in_place: Vec<(u64, Vec<u8>)> = vec![(place.table_offset, inspection.table.clone())];
    let pages = inspection.pages.iter();
    in_place.extend(pages.map(|(&at, page)| (at, page.bytes(place).to_vec())));
    in_place.extend(inspection.overlay.sectors().map(|(at, sector)| (at, sector.to_vec())));
    let crc = layer::entries_crc(&image.entries);
    vec![
        Work {
            what: "write what the whole entries of the journal hold in place".into(),
            writes: in_place,
            ..Work::default()
        },
        Work {
            what: "give up the journal".into(),
            writes: next_superblock(image, |superblock| {
                superblock.state = State::Clean;
                superblock.session = SessionId::default();
                superblock.fingerprint.bat_crc = crc;
            }),
            ..Work::default()
        },
    ]
}

/// The current superblock, changed, with the next sequence, in the other place; nothing for an image without one.
pub(super) fn next_superblock(image: &Image, change: impl FnOnce(&mut Superblock)) -> Vec<(u64, Vec<u8>)> {
    let Some((mut superblock, index)) = image.inspection.decision.superblock else { return Vec::new() };
    superblock.sequence = superblock.sequence.saturating_add(1);
    change(&mut superblock);
    let at = SUPERBLOCK_OFFSETS.get(1 - index.min(1)).copied().unwrap_or(SUPERBLOCK_OFFSETS[0]);
    vec![(at, superblock.to_bytes().to_vec())]
}

/// What comes last in an image that is in order otherwise.
pub(super) fn finish(image: &Image, report: &Report, _file: &dyn File, _path: &Path) -> Result<Vec<Work>> {
    let closed = image.inspection.decision.condition == Condition::Clean;
    if report.count(Code::SyncFailed) == 0 || !closed || report.count_severity(Severity::Corruption) > 0 {
        return Ok(Vec::new());
    }
    Ok(vec![Work {
        what: "take away the mark of a failed sync".into(),
        writes: next_superblock(image, |superblock| superblock.sync_failed = false),
        ..Work::default()
    }])
}

/// An open and a close, which recover the image, write all copies of everything again and cut the file, where one of that is
/// needed.
pub(super) fn reopen(
    image: &Image,
    report: &Report,
    file: &dyn File,
    path: &Path,
    touched: bool,
) -> Result<Vec<Work>> {
    let decision = &image.inspection.decision;
    let mends = [
        Code::NotClosed,
        Code::FrontDamaged,
        Code::FooterDamaged,
        Code::BackupDamaged,
        Code::SuperblockDamaged,
        Code::SuperblockSequence,
    ];
    let possible = decision.superblock.is_some()
        && decision.doubt.is_none()
        && decision.footer.data_offset == layer::HEADER_OFFSET
        && image.bad_entries.is_empty()
        && image.bad_pages.is_empty()
        && image.inspection.journal.is_none();
    let sealed = decision.superblock.is_some_and(|(superblock, _)| superblock.lineage.is_sealed());
    if possible && sealed && decision.condition == Condition::Clean {
        return Ok(seal::copies(image, report));
    }
    if !possible || !(touched || mends.iter().any(|&code| report.count(code) > 0)) {
        return Ok(Vec::new());
    }
    let closed = decision.condition == Condition::Clean;
    let mut works = Vec::new();
    if touched && closed && image.inspection.foreign == Foreign::StructureChanged {
        works.extend(vouch(image, file, path)?);
    }
    let what = match closed {
        true => "open and close the image, which writes all copies again",
        false => "recover the image and close it",
    };
    works.push(Work { what: what.into(), safe: true, reopen: true, ..Work::default() });
    Ok(works)
}

/// After a repair of the table: if every block has its header, the superblock may say that this is what was left, so that
/// headers go on to count.
fn vouch(image: &Image, file: &dyn File, path: &Path) -> Result<Option<Work>> {
    let (decision, place) = (&image.inspection.decision, image.place());
    let found = slots::scan(file, path, place, decision.footer.unique_id)?;
    let foreign = decision.superblock.is_none_or(|(superblock, _)| superblock.foreign_blocks);
    if foreign || found.table(place) != image.entries {
        return Ok(None);
    }
    let bat_crc = layer::entries_crc(&image.entries);
    let file_bytes = file.length().map_err(|error| Error::io(path, "asking for the length", error))?;
    Ok(Some(Work {
        what: "note in the superblock that every block has its header".into(),
        safe: true,
        writes: next_superblock(image, |superblock| {
            superblock.fingerprint = Fingerprint {
                file_bytes,
                footer_crc: crc32fast::hash(&decision.footer.to_bytes()),
                header_crc: crc32fast::hash(&decision.header.to_bytes()),
                bat_crc,
                ..superblock.fingerprint
            };
        }),
        ..Work::default()
    }))
}
