//! The registry of an image's children at run time: read, and changed under its lock.
//!
//! A change is durable before the child gets its name. It leaves the file's time as it was, so that a sealed parent still reads
//! as untouched. A child that is registered counts as existing, found or not.

use crate::error::{Error, Result};
use crate::ext::{Child, REGISTRY_BYTES, Registry, registry_offsets};
use crate::layer::{self, Headers, Layer};
use crate::sync::Arc;
use crate::vfs::{Access, File, FileExt, Vfs};
use crate::vhd::UniqueId;
use std::io;
use std::path::{Path, PathBuf};

const CROWDED: &str =
    "it has no room to note its children in: convert it (`cowvhd convert`) and use the copy";
const FOREIGN: &str = "it was made by another program and has no room to note its children in: run `cowvhd upgrade` on it first";

/// The place of an image's registry.
#[derive(Debug)]
pub(crate) struct Children<'a> {
    file: &'a dyn File,
    path: &'a Path,
    disk_id: UniqueId,
    offsets: [u64; 2],
}

/// What the two copies of a registry say together.
#[derive(Debug)]
pub(crate) enum RegistryState {
    /// These children; nothing is missing.
    Sound(Vec<Child>),
    /// The copy at this offset does not count; the other one says this.
    Damaged(u64, Registry),
    /// Neither of those at these offsets counts, and there were some.
    Lost([u64; 2]),
}

/// What stands in one of the two places.
#[derive(Debug)]
enum Copy {
    Valid(Registry),
    /// Nothing was ever written there.
    Empty,
    Damaged,
}

impl<'a> Children<'a> {
    /// The registry of the image in `file`. Fails where the image has no place for one.
    pub(crate) fn of(file: &'a dyn File, path: &'a Path) -> Result<Self> {
        let decision = Headers::read(file, path)?.decide(path)?;
        let offsets = decision.superblock.filter(|(superblock, _)| !superblock.is_temporary());
        let offsets = offsets.and_then(|(superblock, _)| registry_offsets(superblock.ring_offset));
        let offsets = offsets.ok_or_else(|| no_room(path, CROWDED))?;
        Ok(Children { file, path, disk_id: decision.footer.unique_id, offsets })
    }

    /// The registry of an image that is open for writing.
    pub(crate) fn of_layer(layer: &'a Layer) -> Result<Self> {
        // One made elsewhere has its ring, and nothing else of ours, at its end.
        if layer.place().temporary.is_some() {
            return Err(no_room(layer.path(), FOREIGN));
        }
        let offsets =
            registry_offsets(layer.place().ring_offset).ok_or_else(|| no_room(layer.path(), CROWDED))?;
        let disk_id = layer.footer().unique_id;
        Ok(Children { file: &**layer.file(), path: layer.path(), disk_id, offsets })
    }

    /// What the two copies say, for a check.
    pub(crate) fn state(&self) -> Result<RegistryState> {
        let [first, second] = self.offsets;
        Ok(match (self.copy(first)?, self.copy(second)?) {
            (Copy::Damaged, Copy::Damaged) => RegistryState::Lost(self.offsets),
            // A change that was cut leaves two that differ.
            (Copy::Valid(one), Copy::Valid(other)) => {
                let newer = if other.sequence > one.sequence { other } else { one };
                RegistryState::Sound(newer.children)
            }
            (Copy::Valid(registry), _) => RegistryState::Damaged(second, registry),
            (_, Copy::Valid(registry)) => RegistryState::Damaged(first, registry),
            // The very first one, in pieces, or none at all.
            (Copy::Empty, _) | (_, Copy::Empty) => RegistryState::Sound(Vec::new()),
        })
    }

    /// The children that are registered.
    pub(crate) fn read(&self) -> Result<Vec<Child>> {
        Ok(self.current()?.0.children)
    }

    /// The registry that counts, and which of the two places it does not stand in.
    fn current(&self) -> Result<(Registry, usize)> {
        let [first, second] = [self.copy(self.offsets[0])?, self.copy(self.offsets[1])?];
        Ok(match (first, second) {
            (Copy::Valid(first), Copy::Valid(second)) if second.sequence > first.sequence => (second, 0),
            (Copy::Valid(first), _) => (first, 1),
            (_, Copy::Valid(second)) => (second, 0),
            // A crash spoils one of them at most: the one that was written first, and there was nothing before.
            (Copy::Damaged, Copy::Damaged) => {
                let [first, second] = self.offsets;
                return Err(Error::Damaged {
                    path: self.path.to_path_buf(),
                    what: format!(
                        "neither copy of the registry of its children, at offsets {first} and {second}, can be read"
                    ),
                    hint: "run `cowvhd repair` on it",
                });
            }
            (Copy::Damaged, Copy::Empty) | (Copy::Empty, _) => (Registry::default(), 0),
        })
    }

    fn copy(&self, offset: u64) -> Result<Copy> {
        let mut bytes = vec![0; REGISTRY_BYTES];
        self.file.read_or_zero_at(&mut bytes, offset).map_err(|error| {
            Error::io(self.path, format!("reading the registry of children at offset {offset}"), error)
        })?;
        Ok(match Registry::parse(&bytes, self.disk_id) {
            Ok(registry) => Copy::Valid(registry),
            Err(_) if bytes.iter().all(|&byte| byte == 0) => Copy::Empty,
            Err(_) => Copy::Damaged,
        })
    }

    /// Adds a child; durable on return. One with the same id is replaced.
    pub(crate) fn add(&self, child: Child) -> Result<()> {
        self.change(|children| {
            children.retain(|known| known.id != child.id);
            children.push(child);
        })
    }

    /// Takes a child out, if it is there; durable on return.
    pub(crate) fn remove(&self, id: UniqueId) -> Result<()> {
        self.change(|children| children.retain(|known| known.id != id))
    }

    /// Changes the registry under its lock. The file is open for writing.
    fn change(&self, change: impl FnOnce(&mut Vec<Child>)) -> Result<()> {
        let io = |operation: &'static str| move |error| Error::io(self.path, operation, error);
        self.file.lock_registry().map_err(io("locking the registry of children"))?;
        let result = self.current().and_then(|(mut registry, place)| {
            let before = registry.children.clone();
            change(&mut registry.children);
            // A change that was cut, or the medium, may have spoiled one copy: it is made whole on the way.
            if registry.children == before && matches!(self.state()?, RegistryState::Sound(_)) {
                return Ok(());
            }
            registry.sequence = registry.sequence.saturating_add(1);
            let bytes = registry.to_bytes(self.disk_id).ok_or_else(|| Error::NoSpace {
                path: self.path.to_path_buf(),
                what:
                    "its registry of children is full: remove clones that nobody needs, or clone from a copy"
                        .into(),
            })?;
            let modified = self.file.modified().map_err(io("asking for the modification time"))?;
            // The one that does not count first: until it is durable the other one says what was.
            let [first, second] = if place == 0 { self.offsets } else { [self.offsets[1], self.offsets[0]] };
            self.file
                .write_durable_at(&bytes, first)
                .and_then(|()| self.file.write_durable_at(&bytes, second))
                .and_then(|()| self.file.set_modified(modified))
                .map_err(io("writing the registry of children"))
        });
        // Dropping the handle gives it back, too.
        let _ = self.file.unlock_registry();
        result
    }
}

fn no_room(path: &Path, what: &str) -> Error {
    Error::Unsupported { path: path.to_path_buf(), what: what.into() }
}

/// Opens a sealed image for a change of its registry, also where its mode forbids writing.
pub(crate) fn open_for_registry(vfs: &dyn Vfs, path: &Path, disk_id: UniqueId) -> Result<Arc<dyn File>> {
    let opening = |error| Error::io(path, "opening the image to note a child in it", error);
    let file = match vfs.open(path, Access::ReadWrite) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let readable = vfs.open(path, Access::ReadOnly).map_err(opening)?;
            layer::open_read_only_file(vfs, path, &*readable).map_err(opening)?
        }
        result => result.map_err(opening)?,
    };
    let decision = Headers::read(&*file, path)?.decide(path)?;
    if decision.footer.unique_id != disk_id {
        let what = format!("it became another disk meanwhile (id {})", decision.footer.unique_id);
        return Err(Error::Unsupported { path: path.to_path_buf(), what });
    }
    Ok(file)
}

/// Notes a child in the sealed image `disk_id` at `path`; durable on return. Whoever takes an image away holds it alone, so that it
/// is there and has the child, or is gone and has got none.
pub(crate) fn add_child(vfs: &dyn Vfs, path: &Path, disk_id: UniqueId, child: Child) -> Result<()> {
    let file = open_for_registry(vfs, path, disk_id)?;
    layer::lock(&*file, path, Access::ReadOnly)?;
    let io = |error| Error::io(path, "opening the image to note a child in it", error);
    if vfs.identity(path).map_err(io)? != file.identity().map_err(io)? {
        let what = "another file took its name meanwhile: try again".into();
        return Err(Error::Unsupported { path: path.to_path_buf(), what });
    }
    Children::of(&*file, path)?.add(child)
}

/// What is registered of a child: its id, and its path from its parent's folder.
pub(crate) fn child(id: UniqueId, parent_folder: &Path, path: &Path) -> Child {
    let relative = super::locate::relative_path(parent_folder, path).unwrap_or_else(|| PathBuf::from(path));
    Child { id, path: relative.into_os_string().into_encoded_bytes() }
}
