//! Opening the parents of an image, from the one it names down to the root.

use super::descriptors::bound;
use super::locate::{ParentPolicy, folder, relative_path};
use super::parent::ParentImage;
use super::source::Source;
use super::{MAX_DEPTH, Parents};
use crate::error::{Error, Result};
use crate::ext::{FixedParent, Lineage};
use crate::layer::ParentLink;
use crate::sync::Arc;
use crate::vfs::{Access, File, FileTime, Vfs};
use crate::vhd::{DynamicHeader, Footer, Timestamp, UniqueId};
use std::collections::HashSet;
use std::path::Path;

/// What an image says of its parent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChildClaims<'a> {
    /// Where it is.
    pub(crate) path: &'a Path,
    /// Its file.
    pub(crate) file: &'a dyn File,
    /// Its footer.
    pub(crate) footer: &'a Footer,
    /// Its dynamic header.
    pub(crate) header: &'a DynamicHeader,
    /// Its place in a chain, if it has a superblock.
    pub(crate) lineage: Lineage,
}

/// Opens the parents of a differencing image. Fails where one is missing, is not the disk that its child names or not in the
/// state in which the child was made over it, was not closed, or where the chain is a loop or too deep.
pub(crate) fn open_parents(
    vfs: &Arc<dyn Vfs>,
    child: &ChildClaims<'_>,
    policy: &ParentPolicy,
) -> Result<Parents> {
    let images = open_images(vfs, child, policy)?;
    let sources = images.into_iter().rev().map(|image| Arc::new(image) as Arc<dyn Source>).collect();
    Ok(Parents::new(sources, child.header.block_size, child.footer.current_size))
}

/// The same as images, from the top down.
pub(crate) fn open_images(
    vfs: &Arc<dyn Vfs>,
    leaf: &ChildClaims<'_>,
    policy: &ParentPolicy,
) -> Result<Vec<ParentImage>> {
    let leaf_folder = folder(leaf.path);
    let mut seen: HashSet<UniqueId> = HashSet::from([leaf.footer.unique_id]);
    let mut images: Vec<ParentImage> = Vec::new();
    loop {
        let claims = match images.last() {
            None => *leaf,
            Some(image) => match image.claims() {
                None => return Ok(images),
                Some(claims) => claims,
            },
        };
        let broken = |what: String| Error::Damaged {
            path: leaf.path.to_path_buf(),
            what,
            hint: "run `cowvhd check` on its layers to see what is affected",
        };
        // Before it is looked for: one of the images that are open already would seem to be in use by somebody else.
        let wanted = claims.header.parent_unique_id;
        if !seen.insert(wanted) {
            let what = format!(
                "its chain of parents is a loop: {} names the disk {wanted}, which is above it or itself",
                claims.path.display()
            );
            return Err(broken(what));
        }
        if images.len() + 1 >= MAX_DEPTH {
            return Err(broken(format!("its chain has more than {MAX_DEPTH} layers")));
        }
        let parent = open_parent(&**vfs, leaf_folder, &claims, policy, images.is_empty())?;
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
    let image = ParentImage::open(file, parent)?;
    let beneath = match image.claims() {
        Some(claims) => {
            let policy = ParentPolicy { explicit: None, ..policy.clone() };
            open_images(vfs, &claims, &policy)?
        }
        None => Vec::new(),
    };
    Ok(std::iter::once(bound(vfs, image)?).chain(beneath).collect())
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
    let fixed = match parent.block_bytes() {
        None => FixedParent { file_bytes: parent.file_length(), modified },
        Some(_) => FixedParent::default(),
    };
    Ok(ParentLink {
        unique_id: parent.unique_id(),
        modified: Timestamp::from_unix_seconds(modified.seconds),
        path,
        seal_id: parent.seal_id(),
        fixed,
    })
}

/// Opens the parent of one image and compares it with what the image says of its state.
fn open_parent(
    vfs: &dyn Vfs,
    leaf_folder: &Path,
    child: &ChildClaims<'_>,
    policy: &ParentPolicy,
    explicit: bool,
) -> Result<ParentImage> {
    let parent = policy.open_parent(vfs, leaf_folder, child.path, child.file, child.header, explicit)?;
    let lineage = &child.lineage;
    // Where another parent was named and a crash came before this was noted, nothing is known.
    if lineage.parent_id != child.header.parent_unique_id {
        return Ok(parent);
    }
    let is_other = parent.seal_id() != lineage.parent_seal;
    if lineage.parent_seal.is_some() && (is_other || parent.has_grown()) {
        let found = match parent.seal_id().is_some() {
            true if is_other => "it was sealed anew since",
            true => "another program has placed blocks in it since it was sealed",
            false => "it is not sealed any more",
        };
        return Err(Error::Damaged {
            path: child.path.to_path_buf(),
            what: format!(
                "its parent {} is not in the state that the image was made over: {found}, so that it may have been written to",
                parent.path().display()
            ),
            hint: "bring the file back that was the parent, or copy what the image shows with another tool",
        });
    }
    let noted = lineage.fixed_parent;
    if noted.file_bytes == 0 {
        return Ok(parent);
    }
    if parent.file_length() != noted.file_bytes {
        return Err(Error::Damaged {
            path: child.path.to_path_buf(),
            what: format!(
                "its parent {} has {} bytes, and had {} when the image was made over it",
                parent.path().display(),
                parent.file_length(),
                noted.file_bytes
            ),
            hint: "bring the file back that was the parent",
        });
    }
    let found = parent.file().modified();
    let found = found.map_err(|error| Error::io(parent.path(), "asking for the modification time", error))?;
    if noted.has_time(found) {
        return Ok(parent);
    }
    let time = |time: FileTime| Timestamp::from_unix_seconds(time.seconds);
    let doubt = format!(
        "its parent {} was copied or written to at {}: it had the time {} when {} was made over it, and a fixed disk has nothing else that \
         would tell; if it was written to, what this disk shows is wrong",
        parent.path().display(),
        time(found),
        time(noted.modified),
        child.path.display()
    );
    Ok(parent.doubted(doubt))
}
