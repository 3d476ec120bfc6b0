//! Beside the image: what a snapshot, a checkpoint or a revert left that was cut before its end.
//!
//! Only the disk itself is asked for it, not its parents: a folder is listed once. Names that cannot be listed say nothing.

use super::code::Code;
use super::image::Image;
use super::report::Report;
use crate::chain::{self, Leaf, SnapshotName};
use crate::layer;
use crate::state::StateNames;
use crate::vfs::{File, Vfs};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// Looks at the names around the image at `path`.
pub(super) fn check(report: &mut Report, vfs: &dyn Vfs, file: &dyn File, path: &Path, image: Option<&Image>) {
    let Ok(leaf) = Leaf::resolve(vfs, path) else { return };
    let under_way = match image {
        Some(image) => under_way(image, &leaf).map(|name| {
            let mut left: Vec<PathBuf> = vec![leaf.snapshot(&name), leaf.waiting_child(&name)];
            left.retain(|path| vfs.identity(path).is_ok());
            (name, left, "superblock", Some(image.inspection.headers.superblock_offsets()[0]))
        }),
        None => {
            under_way_over_fixed(vfs, file, &leaf).map(|(name, child)| (name, vec![child], "folder", None))
        }
    };
    if let Some((name, left, structure, offset)) = &under_way {
        let mut left = left.clone();
        if let Ok(names) = StateNames::new(&leaf.path(), name.as_str()) {
            left.extend(names.existing(vfs).unwrap_or_default());
        }
        let left = match left.is_empty() {
            true => "nothing but this note is left of it".to_string(),
            false => format!("beside the disk: {}", listed(&left)),
        };
        let what = format!("the snapshot \"{name}\"; {left}");
        match offset {
            Some(offset) => report.add(Code::SnapshotUnfinished, structure, *offset, what),
            None => report.note(Code::SnapshotUnfinished, structure, what),
        }
    }
    let next = leaf.next();
    if vfs.identity(&next).is_ok() {
        report.note(Code::RevertUnfinished, "folder", format!("{} is there", listed(&[next])));
    }
    for (state, parts) in parts_without_manifest(vfs, &leaf) {
        if under_way.as_ref().is_none_or(|(name, ..)| name.as_str() != state) {
            let what = format!("the manifest of the state \"{state}\" is missing: {}", listed(&parts));
            report.note(Code::StateIncomplete, "folder", what);
        }
    }
}

/// The snapshot that an image says is under way.
fn under_way(image: &Image, leaf: &Leaf) -> Option<SnapshotName> {
    let decision = &image.inspection.decision;
    let lineage = decision.lineage();
    let is_sealed_here =
        lineage.is_sealed() && lineage.leaf_name.as_bytes() == leaf.name().as_encoded_bytes();
    // Of a child over a fixed disk that has its place the note need only go.
    let is_begun =
        lineage.has_snapshot_under_way() && !chain::is_noted_in_child(&lineage, decision.footer.unique_id);
    chain::snapshot_name(&lineage).filter(|_| is_sealed_here || is_begun)
}

/// The same of a fixed disk, and its child, which says so.
fn under_way_over_fixed(vfs: &dyn Vfs, file: &dyn File, leaf: &Leaf) -> Option<(SnapshotName, PathBuf)> {
    let footer = layer::fixed_footer(file, &leaf.path()).ok()??;
    let (name, _) = chain::unfinished_over_fixed(vfs, leaf, footer.unique_id).ok()?.into_iter().next()?;
    let places = [leaf.waiting_child(&name), leaf.snapshot(&name)];
    let child = places.into_iter().find(|path| vfs.identity(path).is_ok())?;
    Some((name, child))
}

fn listed(paths: &[PathBuf]) -> String {
    let names = paths.iter().map(|path| path.file_name().unwrap_or_default().to_string_lossy().into_owned());
    names.collect::<Vec<_>>().join(", ")
}

/// The blobs of the disk's states that have no manifest, by the state's name.
fn parts_without_manifest(vfs: &dyn Vfs, leaf: &Leaf) -> BTreeMap<String, Vec<PathBuf>> {
    let mut found: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    let path = Path::new(leaf.name());
    let Some(stem) = path.file_stem().filter(|_| path.extension() == Some(OsStr::new("vhd"))) else {
        return found;
    };
    let mut prefix = stem.to_os_string();
    prefix.push("@");
    for file in vfs.files(leaf.folder(), &prefix).unwrap_or_default() {
        let rest =
            file.to_str().and_then(|name| name.strip_prefix(prefix.to_str()?)?.strip_suffix(".vmstate"));
        if let Some((state, _)) = rest.and_then(|rest| rest.split_once('+')) {
            found.entry(state.into()).or_default().push(leaf.folder().join(&file));
        }
    }
    found.retain(|state, parts| {
        parts.sort();
        StateNames::new(&leaf.path(), state).is_ok_and(|names| vfs.identity(&names.manifest()).is_err())
    });
    found
}
