//! A parent that has moved: its child names the new place, after what is replaced was saved.

use super::guarded::GuardedFile;
use super::lock;
use super::one_file::OneFile;
use crate::check::chain::{identify, moved_parent};
use crate::disk::OpenOptions;
use crate::error::{Error, Result};
use crate::layer::Headers;
use crate::snapshot;
use crate::sync::Arc;
use crate::vfs::{Access, File, Vfs};
use crate::vhd::UniqueId;
use std::path::{Path, PathBuf};

/// Where the parent of the differencing image at `path` is now, if it is not where the image says; the image then names that place.
///
/// Without a `parent` it is looked for by its unique id, in the image's folder and in those that `options` allow, and below
/// them: it must be found, and only once. A `parent` of the caller may lie anywhere. What is replaced is saved in the new file
/// `undo` first, durably (not the note that the parent keeps of its children); without one nothing is changed, and the answer is what would be done. A crash leaves the old name or
/// the new one.
pub fn relink(
    options: &OpenOptions,
    path: &Path,
    parent: Option<&Path>,
    undo: Option<&Path>,
) -> Result<Option<PathBuf>> {
    let vfs = Arc::clone(&options.vfs);
    let file = lock(&*vfs, path)?;
    let decision = Headers::read(&*file, path)?.decide(path)?;
    let pair = (&decision.footer, &decision.header);
    let Some(found) = moved_parent(&*vfs, &options.policy, path, &*file, pair)? else { return Ok(None) };
    if let Some(parent) = parent {
        check_id(&*vfs, path, parent, decision.header.parent_unique_id)?;
    }
    let parent = match (parent, found.as_slice()) {
        (Some(parent), _) => parent.to_path_buf(),
        (None, [only]) => only.clone(),
        (None, []) => {
            return Err(Error::ParentMissing {
                path: path.to_path_buf(),
                what: format!(
                    "no file nearby is its parent (id {}): name it yourself",
                    decision.header.parent_unique_id
                ),
                hint: "name the parent's path (--parent), or allow its folder (--allow-parents-in)",
            });
        }
        (None, many) => {
            let names: Vec<String> = many.iter().map(|path| path.display().to_string()).collect();
            return Err(Error::ParentMissing {
                path: path.to_path_buf(),
                what: format!("several files nearby are its parent: {}", names.join(", ")),
                hint: "name the right one (--parent)",
            });
        }
    };
    let Some(undo) = undo else { return Ok(Some(parent)) };
    let guarded = GuardedFile::new(&*vfs, undo, (file, path), decision.footer.unique_id)?;
    let one = OneFile {
        inner: Arc::clone(&vfs),
        path: path.to_path_buf(),
        file: Arc::clone(&guarded) as Arc<dyn File>,
        // The parent notes its children.
        others: Access::ReadWrite,
    };
    snapshot::relink(&options.clone().vfs(Arc::new(one)), path, &parent)?;
    guarded.finish()?;
    Ok(Some(parent))
}

/// The caller's own path is that of the right disk.
fn check_id(vfs: &dyn Vfs, path: &Path, parent: &Path, wanted: UniqueId) -> Result<()> {
    let file = vfs
        .open(parent, Access::ReadOnly)
        .map_err(|error| Error::io(parent, "opening the file that is to be the parent", error))?;
    match identify(&*file, parent)? {
        found if found == wanted => Ok(()),
        found => Err(Error::ParentMissing {
            path: path.to_path_buf(),
            what: format!("{} is another disk (id {found}) than its parent (id {wanted})", parent.display()),
            hint: "name the right one, or let it be looked for",
        }),
    }
}
