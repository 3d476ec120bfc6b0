//! What the footer and the dynamic header must agree on before a disk can be read by them.
//!
//! Source: VHD specification, "Dynamic Disk Header Format: Max Table Entries" and "Table Offset"; limits as Hyper-V,
//! QEMU and blktap keep them. Nothing here knows the file's length: that the BAT and the payloads lie within the file
//! is for the caller to check, before it allocates by them.

use std::ops::Range;

use super::dynamic_header::{wrong_table_entries, wrong_table_offset};
use super::{DiskType, DynamicHeader, Footer};
use crate::FormatError;

/// Checks the header of a dynamic or differencing disk against its footer: the size can be a disk, the header has
/// its place behind the footer copy, the BAT has an entry for every block and lies over neither of the two.
///
/// More entries than blocks are accepted: some tools leave room to grow.
///
/// # Errors
///
/// Of the footer: `disk type` (a fixed disk has no header), `current size`, `data offset`. Of the header: `max table
/// entries`, `table offset`.
pub fn validate_geometry(footer: &Footer, header: &DynamicHeader) -> Result<(), FormatError> {
    if footer.disk_type == DiskType::Fixed {
        return Err(footer.no_header());
    }
    footer.validate_size()?;
    let header_end = footer.header_end()?;

    let blocks = footer.current_size.div_ceil(u64::from(header.block_size.max(1)));
    if u64::from(header.max_table_entries) < blocks {
        let expected = format!("at least {blocks}, one for each block of {} bytes", header.block_size);
        return Err(wrong_table_entries(header.max_table_entries, &expected));
    }

    let Some(table) = header.table_range() else {
        return Err(wrong_table_offset(header.table_offset, "a table that ends within what a file can hold"));
    };
    if overlap(&table, &(0..Footer::SIZE as u64)) {
        return Err(wrong_table_offset(header.table_offset, "a table behind the footer copy"));
    }
    if overlap(&table, &(footer.data_offset..header_end)) {
        let expected =
            format!("a table clear of the dynamic header (bytes {} to {header_end})", footer.data_offset);
        return Err(wrong_table_offset(header.table_offset, &expected));
    }
    Ok(())
}

/// Checks every parent locator in use: its payload is bounded, and lies clear of footer copy, dynamic header and BAT.
///
/// Apart from [`validate_geometry`], because a disk with a bad locator still has all its data: readers may warn, find
/// the parent by another locator, and go on.
///
/// # Errors
///
/// Names the field of the first wrong locator, at its offset in the dynamic header.
pub fn validate_locators(footer: &Footer, header: &DynamicHeader) -> Result<(), FormatError> {
    let header_end = footer.header_end()?;
    let taken =
        [0..Footer::SIZE as u64, footer.data_offset..header_end, header.table_range().unwrap_or(0..0)];
    for (index, locator) in header.locators.iter().enumerate() {
        let in_header = |error: FormatError| FormatError {
            structure: "dynamic header",
            offset: error.offset + DynamicHeader::locator_offset(index),
            ..error
        };
        let Some(payload) = locator.payload_range().map_err(in_header)? else { continue };
        if taken.iter().any(|range| overlap(range, &payload)) {
            return Err(in_header(locator.misplaced()));
        }
    }
    Ok(())
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}
