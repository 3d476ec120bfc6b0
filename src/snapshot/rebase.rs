//! Naming another parent.

use super::pull::{PIECE_BYTES, UNIT_BYTES, fill_alone};
use crate::chain::{self, ChildClaims, MAX_DEPTH, ParentImage, ParentPolicy, Parents, Source};
use crate::convert::{Phase, Progress};
use crate::disk::OpenOptions;
use crate::error::{Error, Result};
use crate::layer::{Below, Image, Layer};
use crate::vfs::Access;
use crate::vhd::UniqueId;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::Arc;

/// The parent of the disk at `disk` has moved to `parent`: the disk names it there from now on. Nothing else is changed. The file at
/// `parent` has to be the disk that the image names, by its unique id, and its own parents have to be found; `options` say where
/// those may lie.
///
/// A crash leaves the old name or the new one.
///
/// # Errors
///
/// [`ErrorKind::ParentMissing`](crate::ErrorKind::ParentMissing) where `parent` is another disk, and
/// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) where the disk has no parent.
pub fn relink(options: &OpenOptions, disk: &Path, parent: &Path) -> Result<()> {
    let vfs = &options.vfs;
    let policy = ParentPolicy { explicit: Some(parent.to_path_buf()), ..options.policy.clone() };
    let locked = chain::open_for_maintenance(vfs, disk)?;
    let (lineage, id) = (locked.lineage().unwrap_or_default(), locked.footer().unique_id);
    let (image, link) = locked.open(|file, footer, header| {
        // Finds out whether it is the right one, with all that is beneath.
        let images =
            chain::open_images(vfs, &ChildClaims { path: disk, file, footer, header, lineage }, &policy)?;
        let Some(parent) = images.first() else { return Ok(None) };
        chain::register(&**vfs, id, disk, parent)?;
        chain::link_to(disk, parent).map(Some)
    })?;
    let (layer, link) = differencing(disk, image, link.flatten())?;
    closing(&layer, layer.repoint(Some(&link)))
}

/// Gives the disk at `disk` another parent and keeps what it shows: what the new parent shows otherwise is copied into it first.
/// `options` say where the parents of both may lie. Returns the bytes that were copied.
///
/// A crash, or a `progress` that breaks ([`Error::Stopped`]), leaves the disk with its old parent and some more of its own.
pub fn rebase(
    options: &OpenOptions,
    disk: &Path,
    parent: &Path,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<u64> {
    let vfs = &options.vfs;
    chain::seal_parent(vfs, disk, parent, &options.policy)?;
    let locked = chain::open_leaf(vfs, Arc::clone(vfs), disk, Access::ReadWrite)?;
    let (lineage, id) = (locked.lineage().unwrap_or_default(), locked.footer().unique_id);
    let (image, chains) = locked.open(|file, footer, header| {
        let claims = ChildClaims { path: disk, file, footer, header, lineage };
        let old = chain::open_images(vfs, &claims, &options.policy)?;
        let new = chain::open_from(vfs, parent, &options.policy)?;
        let refuse = |why: &str| Err(Error::Invalid { what: format!("{}: {why}", parent.display()) });
        if new.iter().any(|image| image.unique_id() == footer.unique_id) {
            return refuse("it cannot be the parent of a disk that it is made over itself, or is");
        }
        if new.len() >= MAX_DEPTH {
            return refuse("its chain has too many layers already");
        }
        Ok((old, new))
    })?;
    let (layer, (old, new)) = differencing(disk, image, chains)?;
    let result = (|| {
        let link = match new.first() {
            Some(image) => {
                chain::register(&**vfs, id, disk, image)?;
                Some(chain::link_to(disk, image)?)
            }
            None => None,
        };
        let size = layer.footer().current_size;
        let old = Beneath::new(old, &layer);
        let new = Beneath::new(new, &layer);
        let mut report = |phase, done, copied| match progress(Progress { phase, done, total: size, copied }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Stopped { path: disk.to_path_buf() }),
        };
        let copied = copy_differences(&layer, &old, &new, size, &mut |done, copied| {
            report(Phase::Copy, done, copied)
        })?;
        report(Phase::Sync, size, copied)?;
        layer.repoint(link.as_ref())?;
        Ok(copied)
    })();
    closing(&layer, result)
}

/// A part of a range, by its start, and the disk and the byte of its file where it is; `None` is zeros.
type Located = (u64, Option<(UniqueId, u64)>);

/// What is below a layer, and which disk each of the parents is.
struct Beneath {
    parents: Parents,
    /// From the bottom up.
    ids: Vec<UniqueId>,
}

impl Beneath {
    /// `images` go from the top down.
    fn new(images: Vec<ParentImage>, layer: &Layer) -> Self {
        let ids = images.iter().rev().map(ParentImage::unique_id).collect();
        let sources = images.into_iter().rev().map(|image| Arc::new(image) as Arc<dyn Source>).collect();
        Beneath {
            parents: Parents::new(sources, layer.place().block_bytes, layer.footer().current_size),
            ids,
        }
    }

    /// Where a range is, in a form that says the same of the same places in the same disks.
    fn places(&self, range: Range<u64>) -> Result<Vec<Located>> {
        let mut places = Vec::new();
        self.parents.parts(range, &mut |(part, place)| {
            let place =
                place.and_then(|place| Some((*self.ids.get(place.source as usize)?, place.file_offset)));
            places.push((part.start, place));
            Ok(())
        })?;
        Ok(places)
    }
}

/// Copies into the layer what it lacks and `new` shows otherwise than `old`.
fn copy_differences(
    layer: &Layer,
    old: &Beneath,
    new: &Beneath,
    size: u64,
    report: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<u64> {
    let block_bytes = u64::from(layer.place().block_bytes);
    let mut fill = fill_alone(layer, &old.parents);
    let mut copied = 0;
    for block in 0..size.div_ceil(block_bytes) {
        let start = block * block_bytes;
        let end = size.min(start + block_bytes);
        report(start, copied)?;
        if old.places(start..end)? == new.places(start..end)? {
            continue;
        }
        let mut at = start;
        while at < end {
            let to = end.min(at + PIECE_BYTES).next_multiple_of(UNIT_BYTES).min(start + block_bytes);
            for run in layer.absent_units(block as u32, at - start..to - start)? {
                for differing in differing_units(old, new, start + run.start..start + run.end)? {
                    copied += fill(block as u32, differing.start - start..differing.end - start)?;
                }
            }
            report(at, copied)?;
            at = to;
        }
    }
    Ok(copied)
}

/// The runs of units in `range` in which two disks differ.
fn differing_units(old: &Beneath, new: &Beneath, range: Range<u64>) -> Result<Vec<Range<u64>>> {
    let length = (range.end - range.start) as usize;
    let (mut before, mut after) = (vec![0; length], vec![0; length]);
    old.parents.read(range.start, &mut before)?;
    new.parents.read(range.start, &mut after)?;
    let mut runs: Vec<Range<u64>> = Vec::new();
    let units = before.chunks(UNIT_BYTES as usize).zip(after.chunks(UNIT_BYTES as usize)).enumerate();
    for (number, _) in units.filter(|(_, (before, after))| before != after) {
        let start = range.start + number as u64 * UNIT_BYTES;
        match runs.last_mut() {
            Some(last) if last.end == start => last.end += UNIT_BYTES,
            _ => runs.push(start..start + UNIT_BYTES),
        }
    }
    Ok(runs)
}

/// The layer of a differencing disk and what was found of its parents; any other disk is closed again.
pub(super) fn differencing<P>(disk: &Path, image: Image, parents: Option<P>) -> Result<(Box<Layer>, P)> {
    match (image, parents) {
        (Image::Dynamic(layer), Some(parents)) => Ok((layer, parents)),
        (image, _) => {
            match image {
                Image::Dynamic(layer) => layer.close()?,
                Image::Fixed(fixed) => fixed.close()?,
            }
            Err(Error::Invalid {
                what: format!("{}: it is no differencing disk: it has no parent", disk.display()),
            })
        }
    }
}

/// Closes a layer after the work on it, which may have failed.
pub(super) fn closing<T>(layer: &Layer, result: Result<T>) -> Result<T> {
    let closed = layer.close();
    let value = result?;
    closed.map(|()| value)
}
