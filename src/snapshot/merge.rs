//! Merging upwards: a disk takes over what layers beneath it hold, and then does without them.
//!
//! What the layers decide and the disk lacks is copied into it, as writes of what a guest sees there already; so no view changes,
//! and the work can be cut anywhere and done again. All layers are merged in one pass. Then the disk names the layer beneath them as its
//! parent, or becomes a disk of its own.

use super::diff::View;
use super::point;
use super::pull::{Fill, fill_alone, fill_range, pull};
use super::rebase::{closing, differencing};
use super::space::check_space;
use crate::chain::{self, ChildClaims, ParentImage, ParentPolicy, Parents, Source};
use crate::convert::{Phase, Progress};
use crate::disk::{Disk, Merging, OpenOptions};
use crate::error::{Error, Result};
use crate::layer::{Below, Layer, LockedImage};
use crate::vfs::{Access, Vfs};
use crate::vhd::UniqueId;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a merge did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// Bytes that were copied into the disk.
    pub copied: u64,
    /// The layers that the disk does without now, from the top down. Their files are where they were.
    pub layers: Vec<PathBuf>,
}

/// Merges the layers between the disk at `disk` and its ancestor `until` into the disk; without `until` all of them, so that the
/// disk needs no parent any more. `until` is the name of a snapshot of the disk, or the path of a layer. What the disk shows stays
/// the same, and no other file is changed. The disk must not be open.
///
/// A crash, or a `progress` that breaks ([`Error::Stopped`]), leaves the disk over the layers that it had, with some more of its own;
/// the next merge goes on from there. Where the file system says that it has too little space, nothing is copied
/// ([`Error::NoSpace`]).
pub fn merge(
    options: &OpenOptions,
    disk: &Path,
    until: Option<&Path>,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Merged> {
    let vfs = &options.vfs;
    let locked = chain::open_leaf(vfs, Arc::clone(vfs), disk, Access::ReadWrite)?;
    merge_image(vfs, locked, disk, &options.policy, progress, |images| {
        count_above(&**vfs, disk, &images.iter().collect::<Vec<_>>(), until)
    })
}

/// Merges as many of the layers beneath an image that is locked as `count` says.
pub(super) fn merge_image(
    vfs: &Arc<dyn Vfs>,
    locked: LockedImage,
    path: &Path,
    policy: &ParentPolicy,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    count: impl FnOnce(&[ParentImage]) -> Result<usize>,
) -> Result<Merged> {
    let lineage = locked.lineage().unwrap_or_default();
    let (image, chain) = locked.open(|file, footer, header| {
        let images = chain::open_images(vfs, &ChildClaims { path, file, footer, header, lineage }, policy)?;
        let count = count(&images)?;
        Ok((images, count))
    })?;
    let (layer, (images, count)) = differencing(path, image, chain)?;
    let images: Vec<Arc<ParentImage>> = images.into_iter().map(Arc::new).collect();
    let sources = images.iter().rev().map(|image| Arc::clone(image) as Arc<dyn Source>).collect();
    let below = Parents::new(sources, layer.place().block_bytes, layer.footer().current_size);
    let images: Vec<&ParentImage> = images.iter().map(|image| &**image).collect();
    closing(&layer, merge_layer(&**vfs, &layer, &images, &below, count, progress))
}

/// The same as [`merge()`] for a disk that is open, beside whoever reads and writes: merges the layers between its leaf and `until`,
/// which becomes its parent; without `until` all of them. Requests wait for a piece of some 256 KiB that is being copied at most;
/// `progress` may sleep to leave the medium to them. Fails with [`ErrorKind::InUse`](crate::ErrorKind::InUse) while another merge of
/// the disk is under way; a snapshot that is taken ends it with [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported).
pub fn merge_running(
    disk: &Disk,
    until: Option<&Path>,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Merged> {
    let merging = disk.merging()?;
    let images = merging.images();
    if images.is_empty() {
        let what = format!("{}: it is no differencing disk: it has no parent", disk.path().display());
        return Err(Error::Invalid { what });
    }
    let count = count_above(&**merging.vfs(), disk.path(), &images, until)?;
    merge_into_leaf(disk, merging, count, progress)
}

/// The files of the layers that [`merge_running`] would merge now, from the top down.
pub fn layers_to_merge(disk: &Disk, until: Option<&Path>) -> Result<Vec<PathBuf>> {
    let layers = disk.layers_beneath()?;
    let images: Vec<&ParentImage> = layers.iter().filter_map(|layer| layer.as_parent()).collect();
    let count = count_above(&*disk.origin().options.vfs, disk.path(), &images, until)?;
    Ok(paths(images.get(..count).unwrap_or_default()))
}

/// How many of these layers, from the top of a disk down, are above `until`; all of them without it.
fn count_above(vfs: &dyn Vfs, disk: &Path, images: &[&ParentImage], until: Option<&Path>) -> Result<usize> {
    let ids: Vec<UniqueId> = images.iter().map(|image| image.unique_id()).collect();
    until.map_or(Ok(ids.len()), |until| point::find(vfs, &ids, disk, until))
}

/// Merges the topmost `count` layers beneath the leaf of a running disk into it.
pub(super) fn merge_into_leaf(
    disk: &Disk,
    merging: Merging<'_>,
    count: usize,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Merged> {
    let (path, size) = (disk.path(), disk.size());
    let images = merging.images();
    let merged = images.get(..count).unwrap_or_default();
    let layers = paths(merged);
    if merged.is_empty() {
        return Ok(Merged { copied: 0, layers });
    }
    let mut report = reporting(path, size, progress);
    let parent = images.get(count).copied();
    let views: Vec<View<'_>> = merged.iter().map(|image| View::Parent(image)).collect();
    let block_bytes = u64::from(merging.block_bytes());
    check_space(merging.leaf(), merged, size, block_bytes)?;
    let mut fill = |block, range| merging.fill(block, range);
    let mut copy = |done, copied| report(Phase::Copy, done, copied);
    // Without a parent zeros need nothing to hide.
    let mut copied = pull(&views, size, block_bytes, parent.is_some(), &mut fill, &mut copy)?;
    if parent.is_none() {
        // A disk of its own has whole blocks, and gets no others from here on.
        merging.take_whole_blocks()?;
        let is_partial = |block| merging.is_partial(block);
        copied += complete(merging.blocks(), block_bytes, &is_partial, &mut fill, &mut |more| {
            copy(size, copied + more)
        })?;
    }
    report(Phase::Sync, size, copied)?;
    let (vfs, id) = (Arc::clone(merging.vfs()), merging.leaf_id());
    if let Some(parent) = parent {
        chain::register(&*vfs, id, path, parent)?;
    }
    let link = parent.map(|parent| chain::link_to(path, parent)).transpose()?;
    merging.finish(count, link.as_ref())?;
    if let Some(former) = merged.first() {
        chain::unregister(&*vfs, id, former)?;
    }
    Ok(Merged { copied, layers })
}

/// Merges the topmost `count` of `images`, which are what is `below` a layer, into that; nobody else writes to it.
pub(super) fn merge_layer(
    vfs: &dyn Vfs,
    layer: &Layer,
    images: &[&ParentImage],
    below: &dyn Below,
    count: usize,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Merged> {
    let (path, size) = (layer.path(), layer.footer().current_size);
    let block_bytes = u64::from(layer.place().block_bytes);
    let merged = images.get(..count).unwrap_or_default();
    let layers = paths(merged);
    if merged.is_empty() {
        return Ok(Merged { copied: 0, layers });
    }
    let mut report = reporting(path, size, progress);
    let parent = images.get(count).copied();
    let views: Vec<View<'_>> = merged.iter().map(|image| View::Parent(image)).collect();
    check_space(layer, merged, size, block_bytes)?;
    let mut fill = fill_alone(layer, below);
    let mut copy = |done, copied| report(Phase::Copy, done, copied);
    // Without a parent zeros need nothing to hide.
    let mut copied = pull(&views, size, block_bytes, parent.is_some(), &mut fill, &mut copy)?;
    if parent.is_none() {
        // A disk of its own has whole blocks.
        let (blocks, is_partial) = (layer.place().table_entries, |block| layer.is_partial(block));
        copied +=
            complete(blocks, block_bytes, &is_partial, &mut fill, &mut |more| copy(size, copied + more))?;
    }
    report(Phase::Sync, size, copied)?;
    let id = layer.footer().unique_id;
    if let Some(parent) = parent {
        chain::register(vfs, id, path, parent)?;
    }
    let link = parent.map(|parent| chain::link_to(path, parent)).transpose()?;
    layer.repoint(link.as_ref())?;
    if let Some(former) = merged.first() {
        chain::unregister(vfs, id, former)?;
    }
    Ok(Merged { copied, layers })
}

/// Makes partial blocks whole.
fn complete(
    blocks: u32,
    block_bytes: u64,
    is_partial: &dyn Fn(u32) -> Result<bool>,
    fill: &mut Fill<'_>,
    report: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<u64> {
    let mut copied = 0;
    for block in 0..blocks {
        if is_partial(block)? {
            let start = u64::from(block) * block_bytes;
            let range = start..start + block_bytes;
            copied += fill_range(range, block_bytes, fill, &mut |_, more| report(copied + more))?;
        }
    }
    Ok(copied)
}

/// Tells `progress` how far the work on the disk at `path` has come, until that breaks.
fn reporting<'a>(
    path: &'a Path,
    total: u64,
    progress: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> impl FnMut(Phase, u64, u64) -> Result<()> + 'a {
    move |phase, done, copied| match progress(Progress { phase, done, total, copied }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Stopped { path: path.to_path_buf() }),
    }
}

fn paths(images: &[&ParentImage]) -> Vec<PathBuf> {
    images.iter().map(|image| image.path().to_path_buf()).collect()
}
