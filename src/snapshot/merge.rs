//! Merging upwards: a disk takes over what layers beneath it hold, and then does without them.
//!
//! What the layers decide and the disk lacks is copied into it, as writes of what a guest sees there already; so no view changes,
//! and the work can be cut anywhere and done again. All layers are merged in one pass. Then the disk names the layer beneath them as its
//! parent, or becomes a disk of its own.

use super::diff::View;
use super::point;
use super::pull::{fill_alone, fill_range, pull};
use super::rebase::{closing, differencing};
use crate::chain::{self, ChildClaims, ParentImage, ParentPolicy, Parents, Source};
use crate::convert::{Phase, Progress};
use crate::disk::{Disk, OpenOptions};
use crate::error::{Error, Result};
use crate::layer::{Layer, LockedImage};
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
/// the next merge goes on from there.
pub fn merge(
    options: &OpenOptions,
    disk: &Path,
    until: Option<&Path>,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Merged> {
    let vfs = &options.vfs;
    let locked = chain::open_leaf(vfs, Arc::clone(vfs), disk, Access::ReadWrite)?;
    merge_image(vfs, locked, disk, &options.policy, progress, |images| {
        let ids: Vec<UniqueId> = images.iter().map(ParentImage::unique_id).collect();
        until.map_or(Ok(ids.len()), |until| point::find(&**vfs, &ids, disk, until))
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
    let result = merge_into(&**vfs, &layer, images, count, path, progress);
    closing(&layer, result)
}

/// The same for a disk that is open, beside whoever reads and writes: merges the layers between its leaf and `until`, which becomes
/// its parent. Requests wait for a piece of some 256 KiB that is being copied at most; `progress` may sleep to leave the medium to
/// them. What was merged is let go of, and locks of those files with it. A snapshot that is made meanwhile ends the merge with an
/// error.
pub fn merge_running(
    disk: &Disk,
    until: &Path,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Merged> {
    let path = disk.path();
    let merging = disk.merging()?;
    let images = merging.images()?;
    let ids: Vec<UniqueId> = images.iter().map(|image| image.unique_id()).collect();
    let count = point::find(merging.vfs(), &ids, path, until)?;
    let size = disk.size();
    let mut report = |phase, done| match progress(Progress { phase, done, total: size }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Stopped { path: path.to_path_buf() }),
    };
    let merged = images.get(..count).unwrap_or_default();
    let layers: Vec<PathBuf> = merged.iter().map(|image| image.path().to_path_buf()).collect();
    let Some(parent) = images.get(count).filter(|_| count > 0) else {
        return Ok(Merged { copied: 0, layers });
    };
    let views: Vec<View<'_>> = merged.iter().map(|image| View::Parent(image)).collect();
    let block_bytes = u64::from(merging.block_bytes());
    let mut fill = |block, range| merging.fill(block, range);
    let copied = pull(&views, size, block_bytes, true, &mut fill, &mut |done| report(Phase::Copy, done))?;
    report(Phase::Sync, size)?;
    let id = merging.leaf_id();
    chain::register(merging.vfs(), id, path, parent)?;
    merging.finish(count, &chain::link_to(path, parent)?)?;
    if let Some(former) = merged.first() {
        chain::unregister(merging.vfs(), id, former)?;
    }
    Ok(Merged { copied, layers })
}

fn merge_into(
    vfs: &dyn Vfs,
    layer: &Layer,
    images: Vec<ParentImage>,
    count: usize,
    disk: &Path,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Merged> {
    let size = layer.footer().current_size;
    let block_bytes = layer.place().block_bytes;
    let mut report = |phase, done| match progress(Progress { phase, done, total: size }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Stopped { path: disk.to_path_buf() }),
    };
    let images: Vec<Arc<ParentImage>> = images.into_iter().map(Arc::new).collect();
    let merged = images.get(..count).unwrap_or_default();
    let layers: Vec<PathBuf> = merged.iter().map(|image| image.path().to_path_buf()).collect();
    if merged.is_empty() {
        return Ok(Merged { copied: 0, layers });
    }
    let sources = images.iter().rev().map(|image| Arc::clone(image) as Arc<dyn Source>).collect();
    let below = Parents::new(sources, block_bytes, size);
    let views: Vec<View<'_>> = merged.iter().map(|image| View::Parent(image)).collect();
    let parent = images.get(count);
    let mut fill = fill_alone(layer, &below);
    let mut copy = |done| report(Phase::Copy, done);
    // Without a parent zeros need nothing to hide.
    let mut copied = pull(&views, size, block_bytes.into(), parent.is_some(), &mut fill, &mut copy)?;
    if parent.is_none() {
        // A disk of its own has whole blocks.
        for block in 0..layer.place().table_entries {
            if layer.is_partial(block)? {
                let start = layer.guest_offset(block);
                let range = start..start + u64::from(block_bytes);
                copied += fill_range(range, block_bytes.into(), &mut fill, &mut |_| copy(size))?;
            }
        }
    }
    report(Phase::Sync, size)?;
    let id = layer.footer().unique_id;
    if let Some(parent) = parent {
        chain::register(vfs, id, disk, parent)?;
    }
    let link = parent.map(|parent| chain::link_to(disk, parent)).transpose()?;
    layer.repoint(link.as_ref())?;
    if let Some(former) = merged.first() {
        chain::unregister(vfs, id, former)?;
    }
    Ok(Merged { copied, layers })
}
