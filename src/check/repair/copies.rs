//! Footers, their copy, the dynamic header and its backup: what one copy has lost, another one has.

use super::Work;
use crate::check::code::Code;
use crate::check::image::Examined;
use crate::error::{Error, Result};
use crate::ext::{HEADER_BACKUP_OFFSET, State};
use crate::layer::{self, Condition, Headers};
use crate::vfs::{File, FileExt};
use crate::vhd::{self, DiskType, DynamicHeader, Footer, HeaderCookie, validate_geometry};
use std::path::Path;

/// What can be done about the copies.
pub(super) fn works(examined: &Examined, file: &dyn File, path: &Path) -> Result<Vec<Work>> {
    let report = &examined.report;
    if report.count(Code::HeadersLost) > 0 {
        return Ok(lost_headers(file, path)?.into_iter().collect());
    }
    let Some(image) = &examined.image else { return Ok(Vec::new()) };
    let (headers, decision) = (&image.inspection.headers, &image.inspection.decision);
    let footer = decision.footer.to_bytes().to_vec();
    let mut works = Vec::new();
    if report.count(Code::FrontDamaged) > 0 {
        // With nothing against the backup an open does it.
        if decision.front_lost && decision.doubt.is_some() {
            works.push(Work {
                what: "write the start of the file again from the backup, which may be out of date".into(),
                writes: vec![(0, layer::pair_bytes(&decision.footer, &decision.header).to_vec())],
                ..Work::default()
            });
        } else if !decision.front_lost {
            works.push(Work {
                what: "write the footer copy at the start again from the footer at the end".into(),
                safe: true,
                writes: vec![(0, footer.clone())],
                ..Work::default()
            });
        }
    }
    let end_at = footer_place(examined);
    if report.count(Code::FootersDiffer) > 0 {
        let front_counts = headers.front.as_ref().is_ok_and(|front| front.0.to_bytes()[..] == footer[..]);
        let (what, at) = match front_counts {
            true => ("write the copy at the start over the footer at the end, which differs", end_at),
            false => ("write the footer at the end over the copy at the start, which differs", Some(0)),
        };
        works.extend(at.map(|at| Work {
            what: what.into(),
            writes: vec![(at, footer.clone())],
            ..Work::default()
        }));
    }
    if report.count(Code::FooterDamaged) > 0
        // Where entries are wrong the last sector may be a block's.
        && image.bad_entries.is_empty()
        && let Some(at) = end_at
    {
        works.push(Work {
            what: format!("write the footer again at offset {at} from the copy at the start"),
            safe: true,
            writes: vec![(at, footer)],
            ..Work::default()
        });
    }
    Ok(works)
}

/// Where the footer belongs: the last sector, unless that is a block's; then behind the last block.
pub(super) fn footer_place(examined: &Examined) -> Option<u64> {
    let image = examined.image.as_ref()?;
    let place = image.place();
    let bad = |block: u32| image.bad_entries.binary_search(&block).is_ok();
    let last = (0..)
        .zip(&image.entries)
        .filter(|&(block, &entry)| entry != vhd::UNALLOCATED && !bad(block))
        .map(|(_, &entry)| place.block_end(entry))
        .max()
        .unwrap_or_else(|| place.table_end());
    let sector = image.inspection.headers.file_bytes.checked_sub(Footer::SIZE as u64)?;
    let sector = sector.next_multiple_of(vhd::SECTOR);
    (image.inspection.decision.condition == Condition::Clean).then_some(sector.max(last))
}

/// Footer and header from whatever copies are left, each by itself; a header that is nowhere can be made again if the CRC in
/// a superblock proves it.
fn lost_headers(file: &dyn File, path: &Path) -> Result<Option<Work>> {
    let headers = Headers::read(file, path)?;
    let read = |at: u64, length: usize| -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        file.read_or_zero_at(&mut bytes, at)
            .map_err(|error| Error::io(path, format!("reading what is left at offset {at}"), error))?;
        Ok(bytes)
    };
    let superblocks: Vec<_> = headers.superblocks.iter().flatten().copied().collect();
    let current = superblocks.iter().max_by_key(|superblock| superblock.sequence).copied();
    let mut footers = Vec::new();
    for at in [
        0,
        HEADER_BACKUP_OFFSET,
        headers.file_bytes.saturating_sub(Footer::SIZE as u64),
        headers.file_bytes.saturating_sub(Footer::SIZE as u64 - 1),
    ] {
        footers.extend(Footer::parse(&read(at, Footer::SIZE)?).ok());
    }
    let is_block_disk = |footer: &&Footer| footer.disk_type != DiskType::Fixed;
    let footer = footers
        .iter()
        .filter(is_block_disk)
        .find(|footer| current.is_some_and(|superblock| superblock.disk_id == footer.unique_id))
        .or_else(|| footers.iter().find(is_block_disk));
    let Some(footer) = footer else { return Ok(None) };
    let current = current.filter(|superblock| superblock.disk_id == footer.unique_id);
    let header_at = layer::HEADER_OFFSET;
    let mut candidates = Vec::new();
    for at in [footer.data_offset, header_at, HEADER_BACKUP_OFFSET + Footer::SIZE as u64] {
        if at < headers.file_bytes {
            candidates.extend(DynamicHeader::parse(&read(at, DynamicHeader::SIZE)?).ok());
        }
    }
    if let Some(superblock) = current {
        // As an image of ours has it, if the superblock confirms that.
        for block_bytes in [vhd::BLOCK_SIZE, 4 << 10, 8 << 10, 16 << 10, 64 << 10] {
            let table = superblock.slot_origin.saturating_sub(crate::ext::BAT_ROOM_BYTES);
            let entries = u32::try_from(footer.current_size.div_ceil(block_bytes.into())).unwrap_or(0);
            let header = DynamicHeader::new(table, entries, block_bytes);
            if crc32fast::hash(&header.to_bytes()) == superblock.fingerprint.header_crc {
                candidates.push(header);
            }
        }
    }
    let footer = Footer { data_offset: header_at, ..footer.clone() };
    let Some(header) = candidates.into_iter().find(|header| validate_geometry(&footer, header).is_ok())
    else {
        return Ok(None);
    };
    let dirty = current.is_some_and(|superblock| superblock.state == State::Dirty);
    let cookie = if dirty { HeaderCookie::Dirty } else { HeaderCookie::Normal };
    let header = DynamicHeader { cookie, ..header };
    Ok(Some(Work {
        what: "write footer and dynamic header at the start of the file from the copies that are left".into(),
        writes: vec![(0, layer::pair_bytes(&footer, &header).to_vec())],
        ..Work::default()
    }))
}
