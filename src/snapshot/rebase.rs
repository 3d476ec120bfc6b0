//! Naming another parent.

use crate::chain::{self, ParentPolicy};
use crate::disk::OpenOptions;
use crate::error::{Error, Result};
use crate::layer::{self, Image, Layer, ParentLink};
use crate::vfs::Access;
use std::path::Path;
use std::sync::Arc;

/// The parent of the disk at `disk` has moved to `parent`: the disk names it there from now on. Nothing else is changed. The file at
/// `parent` has to be the disk that the image names, by its unique id, and its own parents have to be found; `options` say where
/// those may lie.
///
/// A crash leaves the old name or the new one.
///
/// # Errors
///
/// [`ErrorKind::ParentMissing`](crate::ErrorKind::ParentMissing) where `parent` is another disk, and
/// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) where the disk has no parent.
pub fn relink(options: &OpenOptions, disk: &Path, parent: &Path) -> Result<()> {
    let policy = ParentPolicy { explicit: Some(parent.to_path_buf()), ..options.policy.clone() };
    let (image, link) =
        layer::open(Arc::clone(&options.vfs), disk, Access::ReadWrite, |file, footer, header| {
            // Finds out whether it is the right one, with all that is beneath.
            chain::open_images(&options.vfs, disk, file, (footer, header), &policy)?;
            Ok(chain::parent_shape(&options.vfs, disk, parent, &policy)?.link)
        })?;
    match (image, link) {
        (Image::Dynamic(layer), Some(link)) => name_parent(&layer, Some(&link)),
        (image, _) => {
            match image {
                Image::Dynamic(layer) => layer.close()?,
                Image::Fixed(fixed) => fixed.close()?,
            }
            Err(Error::Invalid {
                what: format!("{}: it is no differencing disk: it has no parent", disk.display()),
            })
        }
    }
}

/// Names another parent, and closes the layer.
fn name_parent(layer: &Layer, link: Option<&ParentLink>) -> Result<()> {
    let named = layer.repoint(link);
    let closed = layer.close();
    named.and(closed)
}
