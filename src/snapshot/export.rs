//! The changes between two points of a chain as an ordinary differencing disk over the older one.

use super::diff::{ChangeKind, diff_of};
use super::point::Lineage;
use crate::convert::{Phase, Progress};
use crate::disk::{CreateOptions, Disk, OpenOptions, ZeroMode};
use crate::error::{Error, Result};
use crate::layer::NewFile;
use std::ops::ControlFlow;
use std::path::Path;

/// Bytes that are copied at once.
const PIECE_BYTES: u64 = 1 << 20;

/// Writes what changed in the disk at `disk` from the point `from` to the point `to` (the disk as it is now if not given) into
/// the new image `out`: a differencing disk whose parent is the layer `from` and which shows what the disk held at `to`. It
/// appears under its name complete and durable, or not at all. Points are named as in [`diff()`](super::diff()).
///
/// The parent is named by its path from the folder of `out`. A copy of it elsewhere serves as well:
/// [`OpenOptions::parent`] takes it.
///
/// `progress` is called now and then; when it breaks, the export ends with [`Error::Cancelled`].
pub fn export_delta(
    options: &OpenOptions,
    disk: &Path,
    from: &Path,
    to: Option<&Path>,
    out: &Path,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<()> {
    let lineage = Lineage::open(options, disk)?;
    let (from_depth, to_depth) = lineage.points(&*options.vfs, disk, from, to)?;
    if from_depth == to_depth {
        let what = format!("{} and the newer point are the same: there is nothing to export", from.display());
        return Err(Error::Invalid { what });
    }
    let changes = diff_of(options, disk, &lineage, from_depth, to_depth)?;
    let base = lineage.path(disk, from_depth);
    if changes.size != changes.size_before {
        let what = format!(
            "the disk had {} bytes at the older point and {} at the newer one; a differencing disk has its parent's size: \
             convert the newer point instead",
            changes.size_before, changes.size
        );
        return Err(Error::Unsupported { path: base.to_path_buf(), what });
    }
    let source = match to_depth {
        0 => options.clone(),
        _ => options.for_a_parent(),
    };
    let source = source.read_only(true).open(lineage.path(disk, to_depth))?;

    let new = NewFile::new(&*options.vfs, out)?;
    // It is made to be sent elsewhere, and keeps nothing from being deleted.
    let create = CreateOptions::child_of(base).unregistered().vfs(options.vfs.clone());
    options
        .policy
        .allowed
        .iter()
        .fold(create, |create, folder| create.allow_parents_in(folder))
        .create(new.temporary())?;
    let target = options.clone().read_only(false).parent(base).open(new.temporary())?;
    let total = changes.changes.iter().map(|change| change.length).sum();
    let (mut done, mut copied) = (0, 0);
    let mut report = |phase, done, copied| match progress(Progress { phase, done, total, copied }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Cancelled { path: out.to_path_buf() }),
    };
    report(Phase::Copy, 0, 0)?;
    for change in &changes.changes {
        match change.kind {
            ChangeKind::Zero => target.write_zeroes(change.offset, change.length, ZeroMode::MayPunch)?,
            ChangeKind::Data => {
                copy(&source, &target, change.offset, change.length, &mut |more| {
                    report(Phase::Copy, done + more, copied + more)
                })?;
                copied += change.length;
            }
        }
        done += change.length;
        report(Phase::Copy, done, copied)?;
    }
    report(Phase::Sync, total, copied)?;
    target.close()?;
    report(Phase::Sync, total, copied)?;
    new.publish(false)
}

/// Copies a range; `report` is told how much is done.
fn copy(
    source: &Disk,
    target: &Disk,
    start: u64,
    length: u64,
    report: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<()> {
    let mut buf = vec![0; length.min(PIECE_BYTES) as usize];
    let mut done = 0;
    while done < length {
        // To a multiple of the piece, so that units are not cut apart.
        let at = start + done;
        let end = ((at / PIECE_BYTES + 1) * PIECE_BYTES).min(start + length);
        let piece = buf.get_mut(..(end - at) as usize).unwrap_or_default();
        source.read_at(piece, at)?;
        target.write_at(piece, at)?;
        done += end - at;
        report(done)?;
    }
    Ok(())
}
