//! Bringing into a layer what some of the layers beneath it hold, so that it does without them.

use super::diff::{Change, ChangeKind, View, changes_within};
use crate::defect::{self, Defect};
use crate::error::{ErrorKind, Result};
use crate::layer::{Below, Layer};
use std::ops::Range;

/// Bytes of the disk that are looked at together.
pub(super) const WINDOW_BYTES: u64 = 1 << 30;
/// A unit that a layer has or has not, in bytes.
pub(super) const UNIT_BYTES: u64 = 4096;
/// Bytes that are copied at once: writes of a guest wait for no more than that.
pub(super) const PIECE_BYTES: u64 = 256 << 10;

/// Fills a part of one block.
pub(super) type Fill<'a> = dyn FnMut(u32, Range<u64>) -> Result<u64> + 'a;

/// Is told how far the work has come, and how many bytes it has copied.
pub(super) type Report<'a> = dyn FnMut(u64, u64) -> Result<()> + 'a;

/// Fills from `below`, on a disk that nobody else uses.
pub(super) fn fill_alone<'a>(
    leaf: &'a Layer,
    below: &'a dyn Below,
) -> impl FnMut(u32, Range<u64>) -> Result<u64> + 'a {
    move |block, range| match leaf.fill(block, range.clone(), below) {
        Err(error) if error.kind() == ErrorKind::NoSpace => {
            leaf.reclaim()?;
            leaf.fill(block, range, below)
        }
        result => result,
    }
}

/// Fills what `layers`, from the newest down, decide of a disk of `size` bytes. With `zeros` also where they hide what is
/// beneath them with zeros. Returns the bytes that were copied.
pub(super) fn pull(
    layers: &[View<'_>],
    size: u64,
    block_bytes: u64,
    zeros: bool,
    fill: &mut Fill<'_>,
    report: &mut Report<'_>,
) -> Result<u64> {
    let zeros = zeros && !defect::active(Defect::MergeForgetsShortLayers);
    let mut copied = 0;
    let mut start = 0;
    while start < size {
        let end = size.min(start + WINDOW_BYTES);
        report(start, copied)?;
        let mut changes: Vec<Change> = Vec::new();
        changes_within(layers, start..end, &mut changes)?;
        for change in changes.iter().filter(|change| zeros || change.kind == ChangeKind::Data) {
            let range = change.offset..change.offset + change.length;
            copied += fill_range(range, block_bytes, fill, &mut |done, more| report(done, copied + more))?;
        }
        start = end;
    }
    report(size, copied)?;
    Ok(copied)
}

/// Fills a range of the disk, rounded to whole units, in pieces.
pub(super) fn fill_range(
    range: Range<u64>,
    block_bytes: u64,
    fill: &mut Fill<'_>,
    report: &mut Report<'_>,
) -> Result<u64> {
    let mut copied = 0;
    let mut at = range.start / UNIT_BYTES * UNIT_BYTES;
    // A block may reach past the end of the disk, and its units do.
    let end = range.end.next_multiple_of(UNIT_BYTES);
    while at < end {
        let block = at / block_bytes;
        let start = block * block_bytes;
        let to = end.min(start + block_bytes).min((at / PIECE_BYTES + 1) * PIECE_BYTES);
        copied += fill(block as u32, at - start..to - start)?;
        report(at, copied)?;
        at = to;
    }
    Ok(copied)
}
