//! Whether there is space for what is going to be copied: looked at before anything is, from metadata alone.
//!
//! What the file system says is not kept for us, and zeros in the data that take no space are counted. So a merge that begins may
//! still run out of space, which loses nothing.

use super::diff::{View, missing_data};
use super::pull::{PIECE_BYTES, UNIT_BYTES, WINDOW_BYTES};
use crate::chain::{Found, ParentImage, Source};
use crate::error::{Error, Result};
use crate::layer::{Layer, least_shared};
use std::collections::BTreeSet;
use std::ops::Range;

/// Fails with [`Error::NoSpace`] where the file system has no space for what `layer` lacks of `layers`.
pub(super) fn check_space(layer: &Layer, layers: &[&ParentImage], size: u64, block_bytes: u64) -> Result<()> {
    let path = layer.path();
    let available = layer.file().available_bytes();
    let available = available.map_err(|error| Error::io(path, "asking for the space that is left", error))?;
    let Some(available) = available else { return Ok(()) };
    let all = |_: usize, range: Range<u64>| Ok(in_units(range));
    if needed(layer, layers, size, block_bytes, &all)? <= available {
        return Ok(());
    }
    // What is shared takes none.
    let mut sharing: Vec<Option<&ParentImage>> = Vec::new();
    for &image in layers {
        sharing.push(layer.file().shares_with(&*image.open_file()?).then_some(image));
    }
    let copied = |number: usize, range: Range<u64>| match sharing.get(number) {
        Some(Some(image)) => not_shared(image, range, block_bytes),
        _ => Ok(in_units(range)),
    };
    let needed = needed(layer, layers, size, block_bytes, &copied)?;
    if needed <= available {
        return Ok(());
    }
    let what = format!(
        "up to {needed} bytes are to be copied into it, and its file system has {available} left; nothing was changed: free some space first"
    );
    Err(Error::NoSpace { path: path.to_path_buf(), what })
}

/// Bytes of space that `top` needs at most to take over what `layers` hold: what `copied` says of the data in each, and a page for each
/// block.
fn needed(
    top: &Layer,
    layers: &[&ParentImage],
    size: u64,
    block_bytes: u64,
    copied: &dyn Fn(usize, Range<u64>) -> Result<u64>,
) -> Result<u64> {
    let views: Vec<View<'_>> = layers.iter().map(|image| View::Parent(image)).collect();
    let mut bytes = 0;
    let mut blocks = BTreeSet::new();
    let mut start = 0;
    while start < size {
        let end = size.min(start + WINDOW_BYTES);
        missing_data(&View::Top(top), &views, start..end, &mut |number, range| {
            blocks.extend(range.start / block_bytes..range.end.div_ceil(block_bytes));
            bytes += copied(number, range)?;
            Ok(())
        })?;
        start = end;
    }
    Ok(bytes + blocks.len() as u64 * UNIT_BYTES)
}

/// Bytes of the units that a range touches.
fn in_units(range: Range<u64>) -> u64 {
    range.end.next_multiple_of(UNIT_BYTES) - range.start / UNIT_BYTES * UNIT_BYTES
}

/// Bytes of a range of an image that are copied where the file system shares what it can.
fn not_shared(image: &ParentImage, range: Range<u64>, block_bytes: u64) -> Result<u64> {
    let (least, piece_bytes) = (least_shared(block_bytes), PIECE_BYTES.min(block_bytes));
    let mut copied = 0;
    image.resolve(range, &mut |part, found| {
        let Found::File(at) = found else { return };
        let mut from = part.start;
        while from < part.end {
            let to = part.end.min((from / piece_bytes + 1) * piece_bytes);
            let whole = from.next_multiple_of(UNIT_BYTES)..to / UNIT_BYTES * UNIT_BYTES;
            let on_pages = (at + (whole.start - part.start)).is_multiple_of(UNIT_BYTES);
            let shared =
                if on_pages && whole.start + least <= whole.end { whole.end - whole.start } else { 0 };
            copied += in_units(from..to) - shared;
            from = to;
        }
    })?;
    Ok(copied)
}
