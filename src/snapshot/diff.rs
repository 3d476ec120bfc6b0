//! What changed between two points of a chain, from metadata alone.
//!
//! A range changed if a layer above the older point, up to the newer one, holds it: it is in such a layer's blocks and its
//! bits are set, or it lies behind the end of one of them. Block tables and bitmaps tell, and the file system tells where
//! their files have holes; no guest data is read. What was written with the same bytes counts as changed.
//!
//! The disk is looked at in windows, so that memory depends on a window's fragments and not on the disk.

use super::point::Lineage;
use crate::chain::{Found, ParentImage, Source};
use crate::disk::OpenOptions;
use crate::error::{Error, Result};
use crate::layer::{self, Image, Layer, Located};
use crate::vfs::{Access, File};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Bytes of the disk that are looked at together.
const WINDOW_BYTES: u64 = 1 << 30;

/// What a changed range holds at the newer point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// Data.
    Data,
    /// Zeros, whatever was there at the older point.
    Zero,
}

/// A range that may differ between two points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// Guest byte offset.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// What is there now.
    pub kind: ChangeKind,
}

/// Two points of a chain, and what changed from one to the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diff {
    /// Size of the disk at the older point, in bytes.
    pub size_before: u64,
    /// Size of the disk at the newer point, in bytes.
    pub size: u64,
    /// What may differ, in order. Everything else within the smaller of the two sizes is the same.
    pub changes: Vec<Change>,
}

/// What changed in the disk at `disk` from the point `from` to the point `to`, which is the disk as it is now if not given. A
/// point is the name of a snapshot of the disk, or the path of one of its layers.
///
/// Nothing is changed, and no guest data is read. Where `to` is a snapshot the disk itself may be in use; otherwise it must
/// not be open for writing. `options` say where parents may lie.
///
/// # Errors
///
/// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) where the chain has no such point, and
/// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) where `to` is older than `from`.
pub fn diff(options: &OpenOptions, disk: &Path, from: &Path, to: Option<&Path>) -> Result<Diff> {
    let lineage = Lineage::open(options, disk)?;
    let (from_depth, to_depth) = lineage.points(&*options.vfs, disk, from, to)?;
    diff_of(options, disk, &lineage, from_depth, to_depth)
}

/// The same between layers that lie so far below the top.
pub(super) fn diff_of(
    options: &OpenOptions,
    disk: &Path,
    lineage: &Lineage,
    from_depth: usize,
    to_depth: usize,
) -> Result<Diff> {
    let top = match (to_depth, from_depth) {
        (0, 1..) => Some(open_top(options, disk, lineage)?),
        _ => None,
    };
    let size_at = |depth: usize| match depth.checked_sub(1) {
        None => lineage.footer.current_size,
        Some(parent) => lineage.parents.get(parent).map_or(0, |parent| parent.footer().current_size),
    };
    let parents = lineage.parents.iter().skip(to_depth.saturating_sub(1));
    let count = from_depth - to_depth - usize::from(top.is_some());
    let layers: Vec<View<'_>> =
        top.iter().map(|layer| View::Top(layer)).chain(parents.take(count).map(View::Parent)).collect();
    let mut found = Diff { size_before: size_at(from_depth), size: size_at(to_depth), changes: Vec::new() };
    let mut start = 0;
    while start < found.size && !layers.is_empty() {
        let end = found.size.min(start + WINDOW_BYTES);
        changes_within(&layers, start..end, &mut found.changes)?;
        start = end;
    }
    Ok(found)
}

/// Opens the top layer, whose journal may have to be replayed in memory.
fn open_top(options: &OpenOptions, disk: &Path, lineage: &Lineage) -> Result<Box<Layer>> {
    let (image, _) = layer::open(Arc::clone(&options.vfs), disk, Access::ReadOnly, |_, _, _| Ok(()))?;
    match image {
        Image::Dynamic(layer) if layer.footer().unique_id == lineage.footer.unique_id => Ok(layer),
        // A snapshot or a revert came in between.
        _ => Err(Error::InUse { path: disk.to_path_buf(), holder: None }),
    }
}

/// A layer between the two points.
#[derive(Debug)]
pub(super) enum View<'a> {
    /// The disk itself.
    Top(&'a Layer),
    /// One of its parents.
    Parent(&'a ParentImage),
}

impl View<'_> {
    /// Calls `visit` with the parts of `range` that the layer decides, in order.
    fn decided(&self, range: Range<u64>, visit: &mut dyn FnMut(Range<u64>, ChangeKind)) -> Result<()> {
        // With their places in the file; without one they are zeros.
        let mut parts: Vec<(Range<u64>, Option<u64>)> = Vec::new();
        let (path, file) = match self {
            View::Top(layer) => {
                let block_bytes = u64::from(layer.place().block_bytes);
                for block in range.start / block_bytes..range.end.div_ceil(block_bytes) {
                    let start = block * block_bytes;
                    let inside = range.start.max(start) - start..range.end.min(start + block_bytes) - start;
                    layer.locate(block as u32, inside, &mut |part, located| {
                        if let Located::File(at) = located {
                            parts.push((start + part.start..start + part.end, Some(at)));
                        }
                        Ok(())
                    })?;
                }
                (layer.path(), layer.complete_file().map(|file| &**file))
            }
            View::Parent(parent) => {
                parent.resolve(range, &mut |part, found| match found {
                    Found::Below => {}
                    Found::Zero => parts.push((part, None)),
                    Found::File(at) => parts.push((part, Some(at))),
                })?;
                (parent.path(), Some(parent.file()))
            }
        };
        visit_data(file, parts, visit).map_err(|error| Error::io(path, "looking for holes", error))
    }
}

/// Splits parts that are in a file into what it holds and its holes.
fn visit_data(
    file: Option<&dyn File>,
    parts: Vec<(Range<u64>, Option<u64>)>,
    visit: &mut dyn FnMut(Range<u64>, ChangeKind),
) -> std::io::Result<()> {
    for (part, start) in parts {
        let (Some(file), Some(start)) = (file, start) else {
            visit(part, if start.is_some() { ChangeKind::Data } else { ChangeKind::Zero });
            continue;
        };
        let end = start + (part.end - part.start);
        let mut at = start;
        while at < end {
            let data = match file.next_data(at)? {
                Some(data) => data.start.clamp(at, end)..data.end.clamp(at, end),
                None => end..end,
            };
            for (from, to, kind) in
                [(at, data.start, ChangeKind::Zero), (data.start, data.end, ChangeKind::Data)]
            {
                if from < to {
                    visit(part.start + (from - start)..part.start + (to - start), kind);
                }
            }
            at = data.end;
        }
    }
    Ok(())
}

/// Adds what changed within `window`; `layers` go from the newest down.
pub(super) fn changes_within(
    layers: &[View<'_>],
    window: Range<u64>,
    changes: &mut Vec<Change>,
) -> Result<()> {
    let mut found = Vec::new();
    decide(layers, window.clone(), vec![window], &mut found)?;
    found.sort_unstable_by_key(|(range, _)| range.start);
    for (range, kind) in found {
        match changes.last_mut() {
            Some(last) if last.kind == kind && last.offset + last.length == range.start => {
                last.length += range.end - range.start;
            }
            _ => changes.push(Change { offset: range.start, length: range.end - range.start, kind }),
        }
    }
    Ok(())
}

/// Adds what `layers`, from the newest down, hold of the `undecided` parts of `window` to `found`; returns what none of them decides.
fn decide(
    layers: &[View<'_>],
    window: Range<u64>,
    mut undecided: Vec<Range<u64>>,
    found: &mut Vec<(Range<u64>, ChangeKind)>,
) -> Result<Vec<Range<u64>>> {
    for layer in layers {
        if undecided.is_empty() {
            break;
        }
        let mut decided: Vec<(Range<u64>, ChangeKind)> = Vec::new();
        layer.decided(window.clone(), &mut |part, kind| match decided.last_mut() {
            Some((last, last_kind)) if last.end == part.start && *last_kind == kind => last.end = part.end,
            _ => decided.push((part, kind)),
        })?;
        undecided = take(undecided, &decided, found);
    }
    Ok(undecided)
}

/// Calls `visit` with the ranges of a window in which `layers`, from the newest down, hold data where `top` holds nothing, and
/// with the number of the layer.
pub(super) fn missing_data(
    top: &View<'_>,
    layers: &[View<'_>],
    window: Range<u64>,
    visit: &mut dyn FnMut(usize, Range<u64>) -> Result<()>,
) -> Result<()> {
    let mut own = Vec::new();
    let mut absent = decide(std::slice::from_ref(top), window.clone(), vec![window.clone()], &mut own)?;
    for (number, layer) in layers.iter().enumerate() {
        let mut found = Vec::new();
        absent = decide(std::slice::from_ref(layer), window.clone(), absent, &mut found)?;
        for (range, _) in found.into_iter().filter(|(_, kind)| *kind == ChangeKind::Data) {
            visit(number, range)?;
        }
    }
    Ok(())
}

/// Moves what of `undecided` is in `decided` to `found`; returns the rest. All in order.
fn take(
    undecided: Vec<Range<u64>>,
    decided: &[(Range<u64>, ChangeKind)],
    found: &mut Vec<(Range<u64>, ChangeKind)>,
) -> Vec<Range<u64>> {
    let mut rest = Vec::new();
    let mut next = 0;
    for range in undecided {
        let mut at = range.start;
        next += decided.get(next..).unwrap_or_default().partition_point(|(part, _)| part.end <= at);
        for (part, kind) in decided.get(next..).unwrap_or_default() {
            if part.start >= range.end {
                break;
            }
            let (from, to) = (part.start.max(at), part.end.min(range.end));
            if at < from {
                rest.push(at..from);
            }
            found.push((from..to, *kind));
            at = to;
        }
        if at < range.end {
            rest.push(at..range.end);
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_decided_is_taken_once() {
        use ChangeKind::{Data, Zero};
        let mut found = Vec::new();
        let rest = take(vec![0..10, 20..30], &[(2..4, Data), (8..22, Zero), (25..26, Data)], &mut found);
        assert_eq!(rest, [0..2, 4..8, 22..25, 26..30]);
        assert_eq!(found, [(2..4, Data), (8..10, Zero), (20..22, Zero), (25..26, Data)]);
        let rest = take(rest, &[(0..30, Data)], &mut found);
        assert_eq!((rest, found.len()), (Vec::new(), 8));
    }
}
