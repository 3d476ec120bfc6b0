//! The tree that a disk is part of: its own layers, and all disks and snapshots over any of them.
//!
//! From the disk down to the root its layers name their parents; from each layer up its registry names its children. Images of the disk's
//! folder that name a layer as their parent are children, too, registered or not. Nothing is opened outside of the folders in which layers
//! may lie, nothing is locked, and nothing changed.

use crate::chain::{Children, MAX_DEPTH, folder, snapshot_of};
use crate::disk::OpenOptions;
use crate::error::{Error, Result};
use crate::ext::Lineage;
use crate::layer::{self, Headers};
use crate::sync::Arc;
use crate::vfs::{Access, File, FileIdentity, FileTime};
use crate::vhd::{DiskType, DynamicHeader, Footer, UniqueId};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// No more files of the disk's folder are looked at, and no more layers are told of.
const MAX_FILES: usize = 8192;

/// A layer of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeLayer {
    /// Its file; of one that is missing, where it should be, if that is known.
    pub path: PathBuf,
    /// The unique id of the image.
    pub unique_id: UniqueId,
    /// The layer that it is made over, by its place in the tree; it comes before this one. `None` of the first, which is beneath all.
    pub parent: Option<usize>,
    /// Whether the parent has noted it. A root has nobody to note it.
    pub registered: bool,
    /// It is the disk that was asked for.
    pub is_disk: bool,
    /// What its file says; or why it is not there.
    pub state: Result<LayerState, String>,
}

/// What the file of a layer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerState {
    /// Fixed, dynamic or differencing.
    pub disk_type: DiskType,
    /// It is sealed: nobody writes to it.
    pub sealed: bool,
    /// The name of the snapshot that it is, if it is one.
    pub snapshot: Option<String>,
    /// Size of its disk in bytes.
    pub virtual_size: u64,
    /// Bytes of the medium that the file occupies.
    pub allocated_bytes: u64,
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// When it was sealed, or else changed.
    pub changed: FileTime,
}

/// The tree that the disk at `disk` is part of, the layer beneath all first and each layer behind its parent. Also while layers are in use.
/// `options` say where layers may lie besides the disk's folder.
pub fn tree(options: &OpenOptions, disk: &Path) -> Result<Vec<TreeLayer>> {
    let mut search = Search { options, folder: folder(disk), found: Vec::new(), by_file: HashMap::new() };
    let file = options.vfs.open(disk, Access::ReadOnly);
    let file = file.map_err(|error| Error::io(disk, "opening the image", error))?;
    search.add(Found::Image(Box::new(Look::new(file, disk)?)), None)?;
    search.go_down()?;
    search.go_up()?;
    search.in_order()
}

/// An image that was looked at.
#[derive(Debug, Clone)]
struct Look {
    path: PathBuf,
    file: Arc<dyn File>,
    footer: Footer,
    header: Option<DynamicHeader>,
    lineage: Lineage,
    sealed_at: Option<FileTime>,
    /// By its seal, or as a fixed disk that nobody may write to.
    is_sealed: bool,
}

impl Look {
    fn new(file: Arc<dyn File>, path: &Path) -> Result<Self> {
        let path = path.to_path_buf();
        if let Some(footer) = layer::fixed_footer(&*file, &path)? {
            let is_sealed = layer::is_protected(&*file, &path)?;
            let (header, lineage, sealed_at) = (None, Lineage::default(), None);
            return Ok(Look { path, file, footer, header, lineage, sealed_at, is_sealed });
        }
        let decision = Headers::read(&*file, &path)?.decide(&path)?;
        let lineage = decision.lineage();
        let is_sealed = lineage.is_sealed();
        let sealed_at = decision.superblock.filter(|_| is_sealed).map(|(s, _)| s.fingerprint.modified);
        let (footer, header) = (decision.footer, Some(decision.header));
        Ok(Look { path, file, footer, header, lineage, sealed_at, is_sealed })
    }

    /// The header of a differencing image.
    fn claims(&self) -> Option<&DynamicHeader> {
        self.header.as_ref().filter(|_| self.footer.disk_type == DiskType::Differencing)
    }

    /// What it is like; `disk` is the one whose tree it is in.
    fn state(&self, disk: &Path) -> Result<LayerState> {
        let io = |operation| move |error| Error::io(&self.path, operation, error);
        let name = match &self.header {
            Some(_) => String::from_utf8_lossy(self.lineage.snapshot.as_bytes()).into_owned(),
            None => self
                .path
                .file_name()
                .and_then(|file| snapshot_of(disk, file))
                .map_or(String::new(), |name| name.as_str().to_string()),
        };
        let changed = match self.sealed_at {
            Some(time) => time,
            None => self.file.modified().map_err(io("asking for the modification time"))?,
        };
        Ok(LayerState {
            disk_type: self.footer.disk_type,
            sealed: self.is_sealed,
            snapshot: Some(name).filter(|name| self.is_sealed && !name.is_empty()),
            virtual_size: self.footer.current_size,
            allocated_bytes: self.file.allocated_bytes().map_err(io("asking for the space it occupies"))?,
            file_bytes: self.file.length().map_err(io("asking for the length"))?,
            changed,
        })
    }
}

#[derive(Debug)]
enum Found {
    Image(Box<Look>),
    Missing { path: PathBuf, unique_id: UniqueId, why: String },
}

#[derive(Debug)]
struct Node {
    found: Found,
    parent: Option<usize>,
    registered: bool,
}

struct Search<'a> {
    options: &'a OpenOptions,
    folder: &'a Path,
    /// The disk first.
    found: Vec<Node>,
    by_file: HashMap<FileIdentity, usize>,
}

impl Search<'_> {
    /// Adds a layer, unless its file is there already; its number.
    fn add(&mut self, found: Found, parent: Option<usize>) -> Result<usize> {
        let number = self.found.len();
        if let Found::Image(look) = &found {
            let identity = look.file.identity();
            let identity =
                identity.map_err(|error| Error::io(&look.path, "asking which file it is", error))?;
            match self.by_file.get(&identity) {
                Some(&known) => return Ok(known),
                None => self.by_file.insert(identity, number),
            };
        }
        self.found.push(Node { found, parent, registered: false });
        Ok(number)
    }

    fn image(&self, number: usize) -> Option<&Look> {
        match &self.found.get(number)?.found {
            Found::Image(look) => Some(look),
            Found::Missing { .. } => None,
        }
    }

    /// From the disk to the root.
    fn go_down(&mut self) -> Result<()> {
        let mut number = 0;
        while number < MAX_DEPTH {
            let Some(child) = self.image(number) else { return Ok(()) };
            let Some(header) = child.claims() else { return Ok(()) };
            let mut open =
                |file, path: &Path| Look::new(file, path).map(|look| (look.footer.unique_id, look));
            let claims = (&*child.path, &*child.file, header);
            let vfs = &*self.options.vfs;
            let parent = self.options.policy.find_parent(vfs, self.folder, claims, number == 0, &mut open);
            let parent = match parent {
                Ok(look) => Found::Image(Box::new(look)),
                Err(error) => {
                    let (path, unique_id) = (PathBuf::new(), header.parent_unique_id);
                    Found::Missing { path, unique_id, why: error.to_string() }
                }
            };
            let next = self.add(parent, None)?;
            if next <= number {
                let what = "its chain of parents is a loop".into();
                let hint = "run `cowvhd check` on its layers to see what is affected";
                let path = self.image(number).map(|look| look.path.clone()).unwrap_or_default();
                return Err(Error::Damaged { path, what, hint });
            }
            if let Some(node) = self.found.get_mut(number) {
                node.parent = Some(next);
            }
            number = next;
        }
        Ok(())
    }

    /// From each layer to its children.
    fn go_up(&mut self) -> Result<()> {
        let mut others = self.others_in_folder()?;
        let mut number = 0;
        while number < self.found.len().min(MAX_FILES) {
            for (found, registered) in self.children(number, &mut others) {
                let child = self.add(found, Some(number))?;
                if let Some(node) = self.found.get_mut(child) {
                    node.registered |= registered;
                }
            }
            number += 1;
        }
        Ok(())
    }

    /// The differencing images of the disk's folder, by the ids of their parents.
    fn others_in_folder(&self) -> Result<HashMap<UniqueId, Vec<Look>>> {
        let vfs = &*self.options.vfs;
        let names = vfs.files(self.folder, OsStr::new(""));
        let mut names = names.map_err(|error| Error::io(self.folder, "listing the folder", error))?;
        names.sort();
        let mut others: HashMap<UniqueId, Vec<Look>> = HashMap::new();
        for name in names.into_iter().take(MAX_FILES) {
            let path = self.folder.join(name);
            // What is no image is none of ours.
            let Ok(file) = vfs.open(&path, Access::ReadOnly) else { continue };
            let Ok(look) = Look::new(file, &path) else { continue };
            if let Some(parent) = look.claims().map(|header| header.parent_unique_id) {
                others.entry(parent).or_default().push(look);
            }
        }
        Ok(others)
    }

    /// The children of a layer, and whether each is registered.
    fn children(&self, number: usize, others: &mut HashMap<UniqueId, Vec<Look>>) -> Vec<(Found, bool)> {
        let Some(parent) = self.image(number) else { return Vec::new() };
        let id = parent.footer.unique_id;
        let registered = Children::of(&*parent.file, &parent.path).and_then(|children| children.read());
        let mut found = Vec::new();
        let mut known = others.remove(&id).unwrap_or_default();
        // Layers of the disk's own chain.
        for node in self.found.iter().filter(|node| node.parent == Some(number)) {
            if let Found::Image(look) = &node.found {
                known.push((**look).clone());
            }
        }
        // An image without a registry has none.
        for child in registered.unwrap_or_default() {
            // It may have another name by now: a leaf that became a snapshot has.
            if let Some(place) = known.iter().position(|look| look.footer.unique_id == child.id) {
                found.push((Found::Image(Box::new(known.swap_remove(place))), true));
                continue;
            }
            let (vfs, policy) = (&*self.options.vfs, &self.options.policy);
            let place = folder(&parent.path).join(OsStr::from_bytes(&child.path));
            let look = policy
                .open_child(vfs, self.folder, &parent.path, &child.path)
                .and_then(|(file, path)| Look::new(file, &path).map_err(|error| error.to_string()));
            let why = match look {
                Ok(look) if look.footer.unique_id == child.id => {
                    // One that names another parent by now is not a child any more.
                    if look.claims().is_some_and(|header| header.parent_unique_id == id) {
                        found.push((Found::Image(Box::new(look)), true));
                    }
                    continue;
                }
                Ok(_) => "another disk has its name".to_string(),
                Err(why) => why,
            };
            found.push((Found::Missing { path: place, unique_id: child.id, why }, true));
        }
        known.sort_by(|one, other| one.path.cmp(&other.path));
        found.extend(known.into_iter().map(|look| (Found::Image(Box::new(look)), false)));
        found
    }

    /// The layers with each behind its parent.
    fn in_order(self) -> Result<Vec<TreeLayer>> {
        let mut children: Vec<Vec<usize>> = self.found.iter().map(|_| Vec::new()).collect();
        let mut order = Vec::new();
        for (number, node) in self.found.iter().enumerate() {
            match node.parent.and_then(|parent| children.get_mut(parent)) {
                Some(siblings) => siblings.push(number),
                None => order.push(number),
            }
        }
        let mut places: HashMap<usize, usize> = HashMap::new();
        let mut next = 0;
        while let Some(&number) = order.get(next) {
            places.insert(number, next);
            order.extend(children.get(number).into_iter().flatten());
            next += 1;
        }
        let disk = self.image(0).map(|disk| disk.path.clone()).unwrap_or_default();
        let layer = |&number: &usize| {
            let node = self.found.get(number)?;
            let (path, unique_id, state) = match &node.found {
                Found::Image(look) => (look.path.clone(), look.footer.unique_id, look.state(&disk).map(Ok)),
                Found::Missing { path, unique_id, why } => (path.clone(), *unique_id, Ok(Err(why.clone()))),
            };
            let parent = node.parent.and_then(|parent| places.get(&parent).copied());
            let (registered, is_disk) = (node.registered, number == 0);
            let path = self.shown(&path);
            Some(state.map(|state| TreeLayer { path, unique_id, parent, registered, is_disk, state }))
        };
        order.iter().filter_map(layer).collect()
    }

    /// A path in the caller's words, where it is in the disk's folder or below.
    fn shown(&self, path: &Path) -> PathBuf {
        let inside = std::path::absolute(self.folder)
            .ok()
            .and_then(|folder| path.strip_prefix(folder).ok().map(Path::to_path_buf));
        let path = inside.map_or_else(|| path.to_path_buf(), |inside| self.folder.join(inside));
        path.strip_prefix(".").map(Path::to_path_buf).unwrap_or(path)
    }
}
