//! One image file, whatever its kind.

use super::Layer;
use super::fixed::{Fixed, fixed_footer};
use super::open::Opening;
use crate::error::{Error, Result};
use crate::sync::Arc;
use crate::vfs::{Access, File, LockMode, Vfs};
use crate::vhd::{DiskType, DynamicHeader, Footer};
use std::io;
use std::path::Path;

/// An open image file.
#[derive(Debug)]
pub(crate) enum Image {
    /// All bytes in order.
    Fixed(Box<Fixed>),
    /// Blocks, found by a table.
    Dynamic(Box<Layer>),
}

/// Opens the image at `path`. Of a differencing image `find_parents` is called before anything in the file is changed.
pub(crate) fn open<P>(
    vfs: Arc<dyn Vfs>,
    path: &Path,
    access: Access,
    find_parents: impl FnOnce(&dyn File, &Footer, &DynamicHeader) -> Result<P>,
) -> Result<(Image, Option<P>)> {
    let file = vfs.open(path, access).map_err(|error| Error::io(path, "opening the image", error))?;
    lock(&*file, path, access)?;
    if let Some(footer) = fixed_footer(&*file, path)? {
        return Fixed::open(file, path, footer, access).map(|fixed| (Image::Fixed(Box::new(fixed)), None));
    }
    let opening = Opening::new(vfs, file, path)?;
    let (footer, header) = opening.headers();
    let parents = match footer.disk_type {
        DiskType::Differencing => Some(find_parents(opening.file(), footer, header)?),
        _ => None,
    };
    opening.open(access).map(|layer| (Image::Dynamic(Box::new(layer)), parents))
}

/// Takes the lock that `access` needs.
pub(crate) fn lock(file: &dyn File, path: &Path, access: Access) -> Result<()> {
    let mode = match access {
        Access::ReadOnly => LockMode::Shared,
        Access::ReadWrite => LockMode::Exclusive,
    };
    file.lock(mode).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => Error::InUse { path: path.to_path_buf(), holder: file.holder() },
        _ => Error::io(path, "locking the image", error),
    })
}
