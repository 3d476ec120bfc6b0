//! A new differencing image over a parent: the parent is sealed if it is not, and notes its child before the child has a name.

use super::commit;
use super::fixed_leaf::unfinished_over_fixed;
use super::leaf::Leaf;
use super::locate::{ParentPolicy, folder};
use super::open::{link_to, open_from, open_parents};
use super::parent::ParentImage;
use super::registry::{self, Children};
use super::{ChildClaims, MAX_DEPTH, too_deep};
use crate::error::{Error, Result};
use crate::ext::{Name, SealId};
use crate::layer::{self, CreateParameters, Image, NewImage, ParentLink, Seal, StateLink};
use crate::sync::Arc;
use crate::vfs::{Access, Vfs};
use crate::vhd::UniqueId;
use std::io;
use std::path::Path;

/// Creates the image at `path`, which must not exist, over the one at `parent`. `block_bytes` counts over a fixed disk alone. One that
/// is not to be registered leaves its parent as it is.
pub(crate) fn create_child(
    vfs: &Arc<dyn Vfs>,
    path: &Path,
    parent: &Path,
    policy: &ParentPolicy,
    (block_bytes, ring_bytes): (u32, u64),
    registered: bool,
) -> Result<()> {
    if vfs.identity(path).is_ok() {
        return Err(Error::Exists { path: path.to_path_buf() });
    }
    let mut shape = parent_shape(vfs, path, parent, policy)?;
    if registered && shape.needs_seal() {
        shape.seal(vfs, parent, policy)?;
        shape = parent_shape(vfs, path, parent, policy)?;
    }
    let (parent_id, parent_is_sealed) = (shape.link.unique_id, shape.link.seal_id.is_some());
    let parameters = CreateParameters {
        size: shape.size,
        block_bytes: shape.block_bytes.unwrap_or(block_bytes),
        ring_bytes,
        parent: Some(shape.link),
    };
    let image = NewImage::new(&**vfs, path, &parameters)?;
    if registered && parent_is_sealed {
        let child = registry::child(image.unique_id(), folder(parent), path);
        registry::add_child(&**vfs, parent, parent_id, child)?;
    }
    image.publish()
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
    /// It has a superblock, or is a fixed disk.
    can_be_sealed: bool,
    is_sealed: bool,
}

impl ParentShape {
    /// Whether it could be sealed and is not.
    fn needs_seal(&self) -> bool {
        self.can_be_sealed && !self.is_sealed
    }

    /// Seals the image, which is at `path`.
    fn seal(&self, vfs: &Arc<dyn Vfs>, path: &Path, policy: &ParentPolicy) -> Result<()> {
        match self.block_bytes {
            Some(_) => seal_in_place(vfs, path, policy, self.link.unique_id),
            None => protect_fixed(&**vfs, path, self.link.unique_id),
        }
    }
}

/// Looks at the image that is to be the parent of a new one at `child`: all of its own parents must be there.
fn parent_shape(
    vfs: &Arc<dyn Vfs>,
    child: &Path,
    parent: &Path,
    policy: &ParentPolicy,
) -> Result<ParentShape> {
    let images = open_from(vfs, parent, policy)?;
    let Some(image) = images.first().filter(|_| images.len() < MAX_DEPTH) else {
        return Err(too_deep(parent));
    };
    check_settled(&**vfs, parent, image)?;
    Ok(ParentShape {
        size: image.footer().current_size,
        block_bytes: image.block_bytes(),
        can_be_sealed: image.lineage().is_some() || image.is_fixed(),
        is_sealed: image.is_sealed(),
        link: link_to(child, image)?,
    })
}

/// Fails for a leaf that is sealed for a snapshot whose names are not exchanged yet: another file is about to get its name, or its
/// seal is taken away again.
fn check_settled(vfs: &dyn Vfs, path: &Path, image: &ParentImage) -> Result<()> {
    let lineage = image.lineage().unwrap_or_default();
    let leaf = || Leaf::resolve(vfs, path);
    let is_settled = match image.is_fixed() {
        true => unfinished_over_fixed(vfs, &leaf()?, image.unique_id())?.is_empty(),
        false => {
            !lineage.is_sealed()
                || lineage.child_id.is_zero()
                || lineage.leaf_name.as_bytes() != leaf()?.name().as_encoded_bytes()
        }
    };
    if is_settled {
        return Ok(());
    }
    let what =
        "a snapshot of it is being taken, or was never finished: try again, or open it for writing once"
            .into();
    Err(Error::Unsupported { path: path.to_path_buf(), what })
}

/// Sees to it that the image at `parent`, which is to be the parent of the one at `child`, is sealed, if it can be.
pub(crate) fn seal_parent(
    vfs: &Arc<dyn Vfs>,
    child: &Path,
    parent: &Path,
    policy: &ParentPolicy,
) -> Result<()> {
    let below = open_from(vfs, parent, policy)?;
    let itself = vfs.identity(child).ok();
    if below.iter().any(|image| itself.is_some() && image.file().identity().ok() == itself) {
        let what = format!(
            "{}: it cannot be the parent of a disk that it is made over itself, or is",
            parent.display()
        );
        return Err(Error::Invalid { what });
    }
    drop(below);
    let shape = parent_shape(vfs, child, parent, policy)?;
    match shape.needs_seal() {
        true => shape.seal(vfs, parent, policy),
        false => Ok(()),
    }
}

/// Notes the image `child_id` at `child` in its parent, if that is sealed; durable on return. It comes before the parent is named.
pub(crate) fn register(vfs: &dyn Vfs, child_id: UniqueId, child: &Path, parent: &ParentImage) -> Result<()> {
    if !parent.seal_id().is_some() {
        return Ok(());
    }
    let child = registry::child(child_id, folder(parent.path()), child);
    registry::add_child(vfs, parent.path(), parent.unique_id(), child)
}

/// Fails where [`unregister`] would because nothing tells which children the parent has: for whoever cannot turn back any more then.
pub(crate) fn check_registry(parent: &ParentImage) -> Result<()> {
    match parent.seal_id().is_some() {
        true => Children::of(parent.file(), parent.path())?.read().map(drop),
        false => Ok(()),
    }
}

/// Takes the image `child_id` out of the registry of a former parent.
pub(crate) fn unregister(vfs: &dyn Vfs, child_id: UniqueId, parent: &ParentImage) -> Result<()> {
    if !parent.seal_id().is_some() {
        return Ok(());
    }
    let file = registry::open_for_registry(vfs, parent.path(), parent.unique_id())?;
    Children::of(&*file, parent.path())?.remove(child_id)
}

/// Keeps everybody from writing to the fixed disk at `path`. Of one that this process may not write to either that is nobody's to do
/// but its owner's.
fn protect_fixed(vfs: &dyn Vfs, path: &Path, id: UniqueId) -> Result<()> {
    let io = |error| Error::io(path, "opening the image that is to be the parent", error);
    let file = vfs.open(path, Access::ReadOnly).map_err(io)?;
    // Nobody writes to it now.
    layer::lock(&*file, path, Access::ReadOnly)?;
    if layer::fixed_footer(&*file, path)?.is_none_or(|footer| footer.unique_id != id) {
        let what = "another file took its name meanwhile: try again".into();
        return Err(Error::Unsupported { path: path.to_path_buf(), what });
    }
    match layer::set_protected(&*file, path, true) {
        Err(Error::Io { source, .. })
            if matches!(
                source.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}

/// Seals the image at `path`, which keeps its name and cannot be written to from then on.
fn seal_in_place(vfs: &Arc<dyn Vfs>, path: &Path, policy: &ParentPolicy, id: UniqueId) -> Result<()> {
    let policy = ParentPolicy { explicit: None, ..policy.clone() };
    let locked = commit::open_leaf(vfs, Arc::clone(vfs), path, Access::ReadWrite)?;
    if locked.footer().unique_id != id {
        let what = "another file took its name meanwhile: try again".into();
        return Err(Error::Unsupported { path: path.to_path_buf(), what });
    }
    let file = Arc::clone(locked.file());
    // Where there is no room for a registry nothing is sealed.
    Children::of(&*file, path)?;
    let lineage = locked.lineage().unwrap_or_default();
    let (image, _parents) = locked.open(|file, footer, header| {
        open_parents(vfs, &ChildClaims { path, file, footer, header, lineage }, &policy)
    })?;
    let Image::Dynamic(layer) = image else { return Ok(()) };
    let random = vfs.random_id().map_err(|error| Error::io(path, "asking for a random id", error))?;
    layer.seal(&Seal {
        id: SealId(random),
        child_id: UniqueId::default(),
        snapshot: Name::default(),
        leaf_name: Name::default(),
        state: StateLink::default(),
        modified: vfs.now(),
    })
}
