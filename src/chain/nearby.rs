//! Looking for a parent that is not where its child says: which files in some folders are that disk, by their footers.
//!
//! Nothing is opened but regular files beneath those folders, no link is followed, and no more than [`MAX_FILES`] are
//! looked at.

use crate::ext::Lineage;
use crate::layer::Headers;
use crate::vfs::{File, FileExt, Vfs};
use crate::vhd::{DiskType, Footer, UniqueId};
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

/// No more files than these are looked at.
const MAX_FILES: usize = 4096;

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Nearby {
    /// The files that are the disk, those in the first folders first.
    pub(crate) found: Vec<PathBuf>,
    /// There were more files than are looked at.
    pub(crate) cut_short: bool,
}

/// Looks in each folder and below it. What cannot be read is passed over.
pub(super) fn look<'a>(vfs: &dyn Vfs, folders: impl Iterator<Item = &'a Path>, wanted: UniqueId) -> Nearby {
    let mut nearby = Nearby::default();
    let mut seen = BTreeSet::new();
    for folder in folders {
        let Ok(files) = vfs.files_below(folder, MAX_FILES) else { continue };
        for inside in files {
            let path = folder.join(&inside);
            if seen.contains(&path) {
                continue;
            }
            if seen.len() >= MAX_FILES {
                nearby.cut_short = true;
                return nearby;
            }
            let id = vfs.open_beneath(folder, &inside).and_then(|file| footer_id(&*file));
            if matches!(id, Ok(Some(id)) if id == wanted) {
                nearby.found.push(path.clone());
            }
            seen.insert(path);
        }
    }
    nearby.cut_short = seen.len() >= MAX_FILES;
    nearby
}

/// An image that names another one as its parent.
#[derive(Debug)]
pub(crate) struct NearbyChild {
    /// Its unique id.
    pub(crate) id: UniqueId,
    /// Its path from the folder that was looked in.
    pub(crate) path: PathBuf,
    /// Its place in a chain, if it has a superblock.
    pub(crate) lineage: Lineage,
}

/// The images in a folder and below it that name the disk `parent` as their parent. What cannot be read is passed over.
pub(crate) fn children_of(vfs: &dyn Vfs, folder: &Path, parent: UniqueId) -> Vec<NearbyChild> {
    let files = vfs.files_below(folder, MAX_FILES).unwrap_or_default();
    let child = |path: PathBuf| -> Option<NearbyChild> {
        let file = vfs.open_beneath(folder, &path).ok()?;
        let decision = Headers::read(&*file, &path).ok()?.decide(&path).ok()?;
        let is_child = decision.footer.disk_type == DiskType::Differencing;
        (is_child && decision.header.parent_unique_id == parent).then(|| NearbyChild {
            id: decision.footer.unique_id,
            path,
            lineage: decision.lineage(),
        })
    };
    files.into_iter().filter_map(child).collect()
}

/// The id in a file's footer, or in the copy at its start.
fn footer_id(file: &dyn File) -> io::Result<Option<UniqueId>> {
    let mut sector = [0; Footer::SIZE];
    for at in [file.length()?.saturating_sub(Footer::SIZE as u64), 0] {
        file.read_or_zero_at(&mut sector, at)?;
        if let Ok(footer) = Footer::parse(&sector) {
            return Ok(Some(footer.unique_id));
        }
    }
    Ok(None)
}
