//! One image file from its headers to its unused space: everything that a check finds, and what a repair needs to know of it.

use super::code::Code;
use super::report::Report;
use super::unreadable::{self, Readable};
use super::{blocks, fixed, headers, locators, registry, slots, space, table};
use crate::chain::RegistryState;
use crate::error::{Error, Result};
use crate::ext::Placement;
use crate::layer::{self, Condition, Foreign, Headers, Inspection};
use crate::sync::Arc;
use crate::vfs::{File, Vfs};
use crate::vhd::{self, DiskType};
use std::ops::Range;
use std::path::Path;

/// What was found, and the image itself as far as it could be read.
#[derive(Debug)]
pub(super) struct Examined {
    pub(super) report: Report,
    /// `None` for a fixed disk, and where no footer and header can be used.
    pub(super) image: Option<Image>,
}

/// A dynamic or differencing image whose table can be found.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) inspection: Inspection,
    /// The table by which the blocks were judged: that of the file, after a replay, or the one made again from the block headers
    /// where these prove it.
    pub(super) entries: Vec<u32>,
    /// The table was made again from the block headers.
    pub(super) rebuilt: bool,
    /// Every block on the grid must have a block header.
    pub(super) described: bool,
    /// Blocks whose entries cannot be right.
    pub(super) bad_entries: Vec<u32>,
    /// Blocks whose pages are not those of the block.
    pub(super) bad_pages: Vec<u32>,
    /// Blocks with clear bits that must be set.
    pub(super) clear_bits: Vec<u32>,
    /// The highest allocation sequence in a header.
    pub(super) last_allocation: u64,
    /// Ranges of the file that belong to no block.
    pub(super) gaps: Vec<Range<u64>>,
    /// What the registry of its children says, if it has one.
    pub(super) registry: Option<RegistryState>,
}

impl Image {
    /// Where things lie.
    pub(super) fn place(&self) -> &Placement {
        &self.inspection.place
    }

    /// The BAT that the dynamic header names.
    pub(super) fn vhd_table(&self) -> Range<u64> {
        let header = &self.inspection.decision.header;
        header.table_offset..header.table_offset.saturating_add(vhd::bat_bytes(header.max_table_entries))
    }

    /// Whether the table is the one that the last close left.
    pub(super) fn has_table_of_last_close(&self) -> bool {
        let left = self.inspection.decision.superblock.map(|(superblock, _)| superblock.fingerprint.bat_crc);
        left == Some(layer::entries_crc(&self.entries))
    }

    /// Blocks that the disk has.
    pub(super) fn disk_blocks(&self) -> u64 {
        let decision = &self.inspection.decision;
        decision.footer.current_size.div_ceil(decision.header.block_size.max(1).into())
    }
}

/// Examines a locked file.
pub(super) fn examine(vfs: Arc<dyn Vfs>, file: Arc<dyn File>, path: &Path) -> Result<Examined> {
    let file_bytes = file.length().map_err(|error| Error::io(path, "asking for the length", error))?;
    let mut report = Report::new(path.to_path_buf(), file_bytes);
    if let Some(footer) = layer::fixed_footer(&*file, path)? {
        fixed::check(&mut report, &footer);
        return Ok(Examined { report, image: None });
    }
    let headers = Headers::read(&*file, path)?;
    let decision = match headers.decide(path) {
        Ok(decision) => decision,
        Err(error @ Error::Unsupported { .. }) => return Err(error),
        Err(error @ Error::Damaged { .. }) => {
            report.add(Code::JournalLost, "superblock", 4096, without_path(&error, path));
            return Ok(Examined { report, image: None });
        }
        Err(error) => {
            let offset = match &error {
                Error::Format { structure_offset, .. } => *structure_offset,
                _ => 0,
            };
            report.add(Code::HeadersLost, "footer and header", offset, without_path(&error, path));
            return Ok(Examined { report, image: None });
        }
    };
    headers::check(&mut report, &*file, &headers, &decision);
    let place = match decision.placement(path, file_bytes) {
        Ok(place) => place,
        Err(error @ Error::Format { .. }) => {
            report.add(Code::LayoutWrong, "layout", 0, without_path(&error, path));
            return Ok(Examined { report, image: None });
        }
        Err(error) => return Err(error),
    };
    let inspection = match Inspection::new(vfs, Arc::clone(&file), path, headers, decision, place) {
        Ok(inspection) => inspection,
        // Only a table that is a hole of the file is refused as a whole.
        Err(error @ Error::Damaged { .. }) => {
            report.add(Code::BatMetadata, "block table", place.table_offset, without_path(&error, path));
            return Ok(Examined { report, image: None });
        }
        Err(error) => return Err(error),
    };
    examine_blocks(report, &*file, path, inspection)
}

/// The same, also where metadata cannot be read but for a copy of it, or for what it describes: it is among the findings then, and
/// is judged as if it were lost. Also gives the file as it was looked at.
pub(super) fn examine_readable(
    vfs: Arc<dyn Vfs>,
    file: Arc<dyn File>,
    path: &Path,
) -> Result<(Examined, Arc<dyn File>)> {
    let error = match examine(Arc::clone(&vfs), Arc::clone(&file), path) {
        Err(error @ Error::Io { .. }) => error,
        examined => return Ok((examined?, file)),
    };
    let Readable { file, left_out, .. } = Readable::new(file, path)?;
    let Examined { mut report, image: Some(image) } = examine(vfs, Arc::clone(&file), path)? else {
        return Err(error);
    };
    unreadable::report(&mut report, &left_out, &image);
    Ok((Examined { report, image: Some(image) }, file))
}

fn examine_blocks(
    mut report: Report,
    file: &dyn File,
    path: &Path,
    inspection: Inspection,
) -> Result<Examined> {
    if let Some(error) = &inspection.journal {
        let at = inspection.place.ring_offset;
        report.add(Code::JournalDamaged, "journal ring", at, without_path(error, path));
    }
    let entries =
        vhd::bat::entries(&inspection.table).take(inspection.place.table_entries as usize).collect();
    let mut image = Image {
        described: inspection.is_described(),
        inspection,
        entries,
        rebuilt: false,
        bad_entries: Vec::new(),
        bad_pages: Vec::new(),
        clear_bits: Vec::new(),
        last_allocation: 0,
        gaps: Vec::new(),
        registry: None,
    };
    prefer_proven_table(&mut report, file, path, &mut image)?;
    if image.inspection.foreign == Foreign::StructureChanged && !image.rebuilt {
        report.add(Code::ForeignChanges, "superblock", 4096, "it is not as the last close left it");
    }
    report.total_blocks = image.disk_blocks();
    let extents = table::check(&mut report, &mut image);
    blocks::check(&mut report, file, path, &mut image, &extents)?;
    if image.inspection.decision.footer.disk_type == DiskType::Differencing
        || image.inspection.decision.header.locators.iter().any(|l| l.platform != vhd::PlatformCode::None)
    {
        locators::check(&mut report, file, path, &image, &extents)?;
    }
    space::check(&mut report, file, path, &mut image, &extents)?;
    registry::check(&mut report, file, path, &mut image)?;
    Ok(Examined { report, image: Some(image) })
}

/// In a closed image whose table is not the one that the last close left, asks the block headers: if they give exactly that
/// table, it was damaged, and no other program changed it.
fn prefer_proven_table(report: &mut Report, file: &dyn File, path: &Path, image: &mut Image) -> Result<()> {
    let Some((superblock, _)) = image.inspection.decision.superblock else { return Ok(()) };
    let expected = superblock.fingerprint.bat_crc;
    let closed = matches!(image.inspection.decision.condition, Condition::Clean | Condition::HalfClosed);
    if !closed || layer::entries_crc(&image.entries) == expected {
        return Ok(());
    }
    let disk_id = image.inspection.decision.footer.unique_id;
    let found = slots::scan(file, path, image.place(), disk_id)?;
    let rebuilt = found.table(image.place());
    let file_bytes = image.inspection.headers.file_bytes;
    if layer::entries_crc(&rebuilt) != expected || !found.explain(&image.entries, image.place(), file_bytes) {
        return Ok(());
    }
    let wrong = rebuilt.iter().zip(&image.entries).filter(|(right, found)| right != found).count();
    let what = format!("{wrong} entries are not those that the last close left");
    report.add(Code::BatDamaged, "block table", image.place().table_offset, what);
    image.entries = rebuilt;
    image.rebuilt = true;
    image.described = !superblock.foreign_blocks;
    Ok(())
}

/// The text of an error without the file's name, which the report has.
fn without_path(error: &Error, path: &Path) -> String {
    let text = error.to_string();
    text.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&text).to_string()
}
