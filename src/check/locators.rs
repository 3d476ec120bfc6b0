//! Where a differencing disk says that its parent is: text alone, no path is followed.

use super::code::Code;
use super::image::Image;
use super::report::Report;
use super::table::Extent;
use crate::error::{Error, Result};
use crate::vfs::{File, FileExt};
use crate::vhd::locator::{ParentPath, decode_payload};
use crate::vhd::{self, DiskType, DynamicHeader, PlatformCode};
use std::ops::Range;
use std::path::Path;

const STRUCTURE: &str = "parent locator";

/// Checks all locators in use.
pub(super) fn check(
    report: &mut Report,
    file: &dyn File,
    path: &Path,
    image: &Image,
    extents: &[Extent],
) -> Result<()> {
    let (decision, place) = (&image.inspection.decision, image.place());
    let (footer, header) = (&decision.footer, &decision.header);
    if footer.disk_type == DiskType::Differencing && header.parent_unique_id.is_zero() {
        report.add(Code::ParentId, "dynamic header", footer.data_offset + 40, "it is zero");
    }
    let mut names: Vec<Vec<u8>> = Vec::new();
    let mut taken: Vec<(Range<u64>, String)> = vec![
        (0..512, "the footer copy".into()),
        (footer.data_offset..footer.data_offset + DynamicHeader::SIZE as u64, "the dynamic header".into()),
        (image.vhd_table(), "the block table".into()),
    ];
    for (index, locator) in header.locators.iter().enumerate() {
        if locator.platform == PlatformCode::None {
            continue;
        }
        let at = footer.data_offset + DynamicHeader::locator_offset(index);
        let range = match locator.payload_range() {
            Ok(Some(range)) => range,
            Ok(None) => continue,
            Err(error) => {
                report.add(Code::Locator, STRUCTURE, at, format!("locator {index}: {error}"));
                continue;
            }
        };
        let over = taken.iter().find(|(other, _)| overlap(other, &range)).map(|(_, name)| name.clone());
        let over = over.or_else(|| {
            let block =
                first_over(&range, extents, |entry| place.bitmap_offset(entry)..place.block_end(entry))?;
            Some(format!("block {block}"))
        });
        if let Some(over) = over {
            let what = format!("locator {index}: its payload at offset {} lies over {over}", range.start);
            report.add(Code::Locator, STRUCTURE, at, what);
            continue;
        }
        taken.push((range.clone(), format!("locator {index}")));
        if range.end > image.inspection.headers.file_bytes {
            let what =
                format!("locator {index}: its payload ends at {}, past the end of the file", range.end);
            report.add(Code::Locator, STRUCTURE, at, what);
            continue;
        }
        // At most 64 KiB: `payload_range` sees to it.
        let mut payload = vec![0; (range.end - range.start) as usize];
        file.read_or_zero_at(&mut payload, range.start)
            .map_err(|error| Error::io(path, format!("reading the locator at {}", range.start), error))?;
        match decode_payload(locator.platform, &payload) {
            Ok(parent) => names.extend(name_of(&parent)),
            Err(error)
                if matches!(
                    locator.platform,
                    PlatformCode::W2ru | PlatformCode::W2ku | PlatformCode::MacX
                ) =>
            {
                report.add(Code::Locator, STRUCTURE, range.start, format!("locator {index}: {error}"));
            }
            // Notations that nobody reads any more.
            Err(_) => {}
        }
    }
    names.sort();
    names.dedup();
    if names.len() > 1 {
        let names: Vec<String> = names.iter().map(|name| format!("\"{}\"", name.escape_ascii())).collect();
        report.add(Code::LocatorsDisagree, STRUCTURE, footer.data_offset + 576, names.join(", "));
    }
    Ok(())
}

/// The last component of a path.
fn name_of(path: &ParentPath) -> Option<Vec<u8>> {
    path.file_name().map(<[u8]>::to_vec)
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// A block over `range`.
fn first_over(range: &Range<u64>, extents: &[Extent], place: impl Fn(u32) -> Range<u64>) -> Option<u32> {
    let behind = extents.partition_point(|extent| u64::from(extent.entry) * vhd::SECTOR < range.end);
    // Sound tables have at most one block that starts before and reaches in; of unsound ones the next before will do.
    let before = extents.get(..behind)?.last()?;
    overlap(range, &place(before.entry)).then_some(before.block)
}
