//! One image file, whatever its kind.

use super::Layer;
use super::fixed::{Fixed, fixed_footer, fixed_refusal};
use super::headers::Headers;
use super::open::Opening;
use super::seal;
use crate::error::{Error, Result};
use crate::ext::Lineage;
use crate::sync::Arc;
use crate::vfs::{Access, File, LockMode, Vfs};
use crate::vhd::{DiskType, DynamicHeader, Footer};
use std::io;
use std::path::{Path, PathBuf};

/// An open image file.
#[derive(Debug)]
pub(crate) enum Image {
    /// All bytes in order.
    Fixed(Box<Fixed>),
    /// Blocks, found by a table.
    Dynamic(Box<Layer>),
}

/// An image that is open as a file and locked, and of which nothing was changed yet.
#[derive(Debug)]
pub(crate) struct LockedImage {
    vfs: Arc<dyn Vfs>,
    path: PathBuf,
    access: Access,
    file: Arc<dyn File>,
    structures: Structures,
}

#[derive(Debug)]
enum Structures {
    Fixed(Box<Footer>),
    Dynamic(Box<Opening>),
}

/// So often another file may take the name while it is being opened.
const MAX_ATTEMPTS: u32 = 16;

impl LockedImage {
    /// Opens and locks the file at `path`, and reads what it says about itself.
    pub(crate) fn new(vfs: Arc<dyn Vfs>, path: &Path, access: Access) -> Result<Self> {
        let opening = |error| Error::io(path, "opening the image", error);
        let mut attempts = 0;
        let file = loop {
            let file = open_file(&*vfs, path, access)?;
            lock(&*file, path, access)?;
            // Who waited for the lock may have been overtaken by a snapshot: the file that got the lock is another one now.
            let (at_path, locked) = (vfs.identity(path).map_err(opening)?, file.identity().map_err(opening)?);
            if at_path == locked {
                break file;
            }
            attempts += 1;
            if attempts == MAX_ATTEMPTS {
                let what = "another file takes its name again and again: try later".to_string();
                return Err(Error::Unsupported { path: path.to_path_buf(), what });
            }
        };
        let structures = match fixed_footer(&*file, path)? {
            Some(footer) => Structures::Fixed(Box::new(footer)),
            None => Structures::Dynamic(Box::new(Opening::new(Arc::clone(&vfs), Arc::clone(&file), path)?)),
        };
        Ok(LockedImage { vfs, path: path.to_path_buf(), access, file, structures })
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file.
    pub(crate) fn file(&self) -> &Arc<dyn File> {
        &self.file
    }

    /// The footer that counts.
    pub(crate) fn footer(&self) -> &Footer {
        match &self.structures {
            Structures::Fixed(footer) => footer,
            Structures::Dynamic(opening) => opening.headers().0,
        }
    }

    /// The dynamic header that counts; a fixed disk has none.
    pub(crate) fn header(&self) -> Option<&DynamicHeader> {
        match &self.structures {
            Structures::Fixed(_) => None,
            Structures::Dynamic(opening) => Some(opening.headers().1),
        }
    }

    /// Its place in a chain, if it has a superblock.
    pub(crate) fn lineage(&self) -> Option<Lineage> {
        match &self.structures {
            Structures::Fixed(_) => None,
            Structures::Dynamic(opening) => opening.lineage(),
        }
    }

    /// Opens the image. Of a differencing one `find_parents` is called before anything in the file is changed.
    pub(crate) fn open<P>(
        self,
        find_parents: impl FnOnce(&dyn File, &Footer, &DynamicHeader) -> Result<P>,
    ) -> Result<(Image, Option<P>)> {
        let opening = match self.structures {
            Structures::Fixed(footer) => {
                let fixed = Fixed::open(self.file, &self.path, *footer, self.access)?;
                return Ok((Image::Fixed(Box::new(fixed)), None));
            }
            Structures::Dynamic(opening) => opening,
        };
        let (footer, header) = opening.headers();
        let parents = match footer.disk_type {
            DiskType::Differencing => Some(find_parents(opening.file(), footer, header)?),
            _ => None,
        };
        opening.open(self.access).map(|layer| (Image::Dynamic(Box::new(layer)), parents))
    }

    /// A sealed image may be opened, too: for what changes nothing that a guest sees. It has to be closed.
    pub(crate) fn maintain(&mut self) {
        if let Structures::Dynamic(opening) = &mut self.structures {
            opening.maintenance = true;
        }
    }

    /// The snapshot that was under way was undone: its record goes when a session starts.
    pub(crate) fn forget_snapshot(&mut self) {
        if let Structures::Dynamic(opening) = &mut self.structures {
            opening.snapshot_undone = true;
        }
    }

    /// Takes the seal away, of which [`LockedImage::finish_seal`] said that it is whole; durable on return.
    pub(crate) fn unseal(&self) -> Result<()> {
        seal::unseal(Arc::clone(&self.vfs), Arc::clone(&self.file), &self.path)
    }

    /// Does the rest of a sealing that was cut; false where the image turns out not to be sealed.
    pub(crate) fn finish_seal(&self) -> Result<bool> {
        seal::finish_interrupted(Arc::clone(&self.vfs), Arc::clone(&self.file), &self.path)
    }
}

/// Opens the image at `path`. Of a differencing one `find_parents` is called before anything in the file is changed.
pub(crate) fn open<P>(
    vfs: Arc<dyn Vfs>,
    path: &Path,
    access: Access,
    find_parents: impl FnOnce(&dyn File, &Footer, &DynamicHeader) -> Result<P>,
) -> Result<(Image, Option<P>)> {
    LockedImage::new(vfs, path, access)?.open(find_parents)
}

/// Opens the file. One that is sealed has lost its permission to be written, and gets past that: what is allowed is decided by what it
/// says.
fn open_file(vfs: &dyn Vfs, path: &Path, access: Access) -> Result<Arc<dyn File>> {
    let opening = |error| Error::io(path, "opening the image", error);
    let denied = match vfs.open(path, access) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && access == Access::ReadWrite => error,
        result => return result.map_err(opening),
    };
    let Ok(readable) = vfs.open(path, Access::ReadOnly) else { return Err(opening(denied)) };
    if readable.is_read_only().unwrap_or(false) && fixed_footer(&*readable, path)?.is_some() {
        return open_read_only_file(vfs, path, &*readable).map_err(|_| fixed_refusal(path));
    }
    let decision = Headers::read(&*readable, path).and_then(|headers| headers.decide(path));
    let superblock = decision.ok().and_then(|decision| decision.superblock);
    match superblock {
        Some((superblock, _)) if superblock.lineage.is_sealed() => {
            open_read_only_file(vfs, path, &*readable).map_err(|_| seal::refusal(path, &superblock.lineage))
        }
        _ => Err(opening(denied)),
    }
}

/// Opens a file for writing whose mode forbids it; its mode stays. `readable` is a handle of it.
pub(crate) fn open_read_only_file(
    vfs: &dyn Vfs,
    path: &Path,
    readable: &dyn File,
) -> io::Result<Arc<dyn File>> {
    readable.set_read_only(false)?;
    let writable = vfs.open(path, Access::ReadWrite);
    // The handle keeps its right.
    readable.set_read_only(true)?;
    writable
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
