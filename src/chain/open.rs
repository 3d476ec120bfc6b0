//! Opening the parents of an image, from the one it names down to the root.

use super::descriptors::bound;
use super::locate::{ParentPolicy, folder, relative_path};
use super::parent::ParentImage;
use super::source::Source;
use super::{MAX_DEPTH, Parents};
use crate::error::{Error, Result};
use crate::layer::ParentLink;
use crate::sync::Arc;
use crate::vfs::{Access, File, Vfs};
use crate::vhd::{DynamicHeader, Footer, Timestamp, UniqueId};
use std::collections::HashSet;
use std::path::Path;

/// Opens the parents of the differencing image at `path`, which is open as `file`. Fails where one is missing, is not the disk
/// that its child names, was not closed, or where the chain is a loop or too deep.
pub(crate) fn open_parents(
    vfs: &Arc<dyn Vfs>,
    path: &Path,
    file: &dyn File,
    (footer, header): (&Footer, &DynamicHeader),
    policy: &ParentPolicy,
) -> Result<Parents> {
    let images = open_images(vfs, path, file, (footer, header), policy)?;
    let sources = images.into_iter().rev().map(|image| Arc::new(image) as Arc<dyn Source>).collect();
    Ok(Parents::new(sources, header.block_size, footer.current_size))
}

/// The same as images, from the top down.
pub(crate) fn open_images(
    vfs: &Arc<dyn Vfs>,
    path: &Path,
    file: &dyn File,
    (footer, header): (&Footer, &DynamicHeader),
    policy: &ParentPolicy,
) -> Result<Vec<ParentImage>> {
    let leaf_folder = folder(path);
    let mut seen: HashSet<UniqueId> = HashSet::from([footer.unique_id]);
    let mut images: Vec<ParentImage> = Vec::new();
    loop {
        let (child, child_file, header) = match images.last() {
            None => (path, file, header),
            Some(child) => match child.differencing_header() {
                None => return Ok(images),
                Some(header) => (child.path(), child.file(), header),
            },
        };
        let broken = |what: String| Error::Damaged {
            path: path.to_path_buf(),
            what,
            hint: "run `cowvhd check` on its layers to see what is affected",
        };
        // Before it is looked for: one of the images that are open already would seem to be in use by somebody else.
        let wanted = header.parent_unique_id;
        if !seen.insert(wanted) {
            let what = format!(
                "its chain of parents is a loop: {} names the disk {wanted}, which is above it or itself",
                child.display()
            );
            return Err(broken(what));
        }
        if images.len() + 1 >= MAX_DEPTH {
            return Err(broken(format!("its chain has more than {MAX_DEPTH} layers")));
        }
        let parent = policy.open_parent(&**vfs, leaf_folder, child, child_file, header, images.is_empty())?;
        images.push(bound(vfs, parent)?);
    }
}

/// Opens the image at `parent` and its own parents, from the top down: what an image would be over that names it.
pub(crate) fn open_from(
    vfs: &Arc<dyn Vfs>,
    parent: &Path,
    policy: &ParentPolicy,
) -> Result<Vec<ParentImage>> {
    let file = vfs
        .open(parent, Access::ReadOnly)
        .map_err(|error| Error::io(parent, "opening the image that is to be the parent", error))?;
    let image = ParentImage::open(Arc::clone(&file), parent)?;
    let beneath = match image.differencing_header() {
        Some(header) => {
            let policy = ParentPolicy { explicit: None, ..policy.clone() };
            open_images(vfs, parent, &*file, (image.footer(), header), &policy)?
        }
        None => Vec::new(),
    };
    Ok(std::iter::once(bound(vfs, image)?).chain(beneath).collect())
}

/// What a child takes over from its parent.
#[derive(Debug)]
pub(crate) struct ParentShape {
    /// Size of the disk in bytes.
    pub(crate) size: u64,
    /// Data bytes of a block; a fixed disk has none.
    pub(crate) block_bytes: Option<u32>,
    /// How the child names it.
    pub(crate) link: ParentLink,
}

/// Looks at the image that is to be the parent of a new one at `child`: all of its own parents must be there.
pub(crate) fn parent_shape(
    vfs: &Arc<dyn Vfs>,
    child: &Path,
    parent: &Path,
    policy: &ParentPolicy,
) -> Result<ParentShape> {
    let images = open_from(vfs, parent, policy)?;
    let Some(image) = images.first().filter(|_| images.len() < MAX_DEPTH) else {
        let what = format!("{}: its chain has {MAX_DEPTH} layers already", parent.display());
        return Err(Error::Invalid { what });
    };
    Ok(ParentShape {
        size: image.footer().current_size,
        block_bytes: image.block_bytes(),
        link: link_to(child, image)?,
    })
}

/// How the image at `child` names `parent`.
pub(crate) fn link_to(child: &Path, parent: &ParentImage) -> Result<ParentLink> {
    let path = relative_path(folder(child), parent.path()).ok_or_else(|| Error::Invalid {
        what: format!("{}: an image cannot be its own parent", child.display()),
    })?;
    let modified = parent
        .file()
        .modified()
        .map_err(|error| Error::io(parent.path(), "asking for the modification time", error))?;
    Ok(ParentLink {
        unique_id: parent.unique_id(),
        modified: Timestamp::from_unix_seconds(modified.seconds),
        path,
    })
}
