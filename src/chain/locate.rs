//! Finding the parent that a differencing image names, and where a parent may lie at all.
//!
//! What a file says of its parent is a claim by whoever made the file. So a parent is opened only in an allowed folder (by
//! default that of the child, and below), by a path that cannot leave it, and it counts only with the unique id that the
//! child names. Candidates, in this order: the caller's own path, the locators `W2ru`, `W2ku`, `MacX`, and the parent name in
//! the child's folder.

use super::nearby::{self, Nearby};
use super::parent::ParentImage;
use crate::error::{Error, Result};
use crate::sync::Arc;
use crate::vfs::{Access, File, FileExt, Vfs};
use crate::vhd::locator::{ParentPath, decode_payload};
use crate::vhd::{DynamicHeader, PlatformCode, UniqueId};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Where parents may lie.
#[derive(Debug, Clone, Default)]
pub(crate) struct ParentPolicy {
    /// The caller's word for the leaf's own parent; it may lie anywhere.
    pub(crate) explicit: Option<PathBuf>,
    /// Folders besides the leaf's own.
    pub(crate) allowed: Vec<PathBuf>,
}

impl ParentPolicy {
    /// Opens the parent that the image at `child` names with its dynamic header; `leaf_folder` is that of the disk's top image.
    pub(crate) fn open_parent(
        &self,
        vfs: &dyn Vfs,
        leaf_folder: &Path,
        child: &Path,
        child_file: &dyn File,
        header: &DynamicHeader,
        explicit: bool,
    ) -> Result<ParentImage> {
        let mut open = |file: Arc<dyn File>, path: &Path| {
            let parent = ParentImage::open(file, path)?;
            Ok((parent.unique_id(), parent))
        };
        self.find_parent(vfs, leaf_folder, (child, child_file, header), explicit, &mut open)
    }

    /// The same for whoever makes something else of the file than an open parent: `open` says which disk it is.
    pub(crate) fn find_parent<T>(
        &self,
        vfs: &dyn Vfs,
        leaf_folder: &Path,
        (child, child_file, header): (&Path, &dyn File, &DynamicHeader),
        explicit: bool,
        open: &mut impl FnMut(Arc<dyn File>, &Path) -> Result<(UniqueId, T)>,
    ) -> Result<T> {
        let wanted = header.parent_unique_id;
        if let Some(path) = self.explicit.as_deref().filter(|_| explicit) {
            let file = vfs.open(path, Access::ReadOnly).map_err(|error| {
                Error::io(path, format!("opening the parent of {}", child.display()), error)
            })?;
            return match open(file, path)? {
                (found, parent) if found == wanted => Ok(parent),
                (found, _) => {
                    Err(missing(child, header, &[(path.display().to_string(), other_id(path, found))]))
                }
            };
        }
        let mut tried: Vec<(String, String)> = Vec::new();
        for (source, claim) in candidates(child_file, header) {
            let claim = match claim {
                Ok(claim) => claim,
                Err(why) => {
                    tried.push((source, why));
                    continue;
                }
            };
            let name = format!("{source} \"{claim}\"");
            match self.open_claim(vfs, leaf_folder, child, &claim) {
                Ok((file, path)) => match open(file, &path) {
                    Ok((found, parent)) if found == wanted => return Ok(parent),
                    Ok((found, _)) => tried.push((name, other_id(&path, found))),
                    // The right file in a state that forbids reading is worth more than another guess, and so is one that may be it.
                    Err(
                        error @ (Error::InUse { .. }
                        | Error::Damaged { .. }
                        | Error::NotClosed { .. }
                        | Error::Io { .. }),
                    ) => return Err(error),
                    Err(error) => tried.push((name, error.to_string())),
                },
                Err(why) => tried.push((name, why)),
            }
        }
        Err(missing(child, header, &tried))
    }

    /// Looks for the disk `wanted` in the folder of `child` and in all folders where parents may lie, and below them.
    pub(crate) fn look_nearby(
        &self,
        vfs: &dyn Vfs,
        leaf_folder: &Path,
        child: &Path,
        wanted: UniqueId,
    ) -> Nearby {
        let allowed = self.allowed.iter().map(PathBuf::as_path);
        let folders: Vec<&Path> = std::iter::once(leaf_folder).chain(allowed).collect();
        let inside = |folder: &Path| {
            let (Some(folder), folders) = (normal(folder), &folders) else { return false };
            folders.iter().filter_map(|allowed| normal(allowed)).any(|allowed| folder.starts_with(allowed))
        };
        let own = Some(folder(child)).filter(|folder| inside(folder));
        nearby::look(vfs, own.into_iter().chain(folders.iter().copied()), wanted)
    }

    /// Opens a child that the image at `parent` has registered by its path from the parent's folder, if it is where parents may lie, too.
    /// Else it says why not.
    pub(crate) fn open_child(
        &self,
        vfs: &dyn Vfs,
        leaf_folder: &Path,
        parent: &Path,
        path: &[u8],
    ) -> Result<(Arc<dyn File>, PathBuf), String> {
        self.open_claim(vfs, leaf_folder, parent, &ParentPath::Relative(path.to_vec()))
    }

    fn open_claim(
        &self,
        vfs: &dyn Vfs,
        leaf_folder: &Path,
        child: &Path,
        claim: &ParentPath,
    ) -> Result<(Arc<dyn File>, PathBuf), String> {
        let path = match claim {
            ParentPath::Relative(path) => folder(child).join(OsStr::from_bytes(path)),
            ParentPath::Absolute(path) => PathBuf::from(OsStr::from_bytes(path)),
            ParentPath::Windows(_) => {
                return Err("it is a path of Windows, whose folders mean nothing here".into());
            }
        };
        let path = normal(&path).ok_or("it has no place in the file system")?;
        let mut refused = true;
        for allowed in std::iter::once(leaf_folder).chain(self.allowed.iter().map(PathBuf::as_path)) {
            let Some(allowed) = normal(allowed) else { continue };
            let Ok(inside) = path.strip_prefix(&allowed) else { continue };
            refused = false;
            match vfs.open_beneath(&allowed, inside) {
                Ok(file) => return Ok((file, path)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        match refused {
            true => Err(format!(
                "{} is outside the folders allowed for layers; allow its folder if you trust the image",
                path.display()
            )),
            false => Err(format!("{} does not exist", path.display())),
        }
    }
}

/// The folder that a file lies in.
pub(crate) fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// What a child says of its parent, best first.
fn candidates(file: &dyn File, header: &DynamicHeader) -> Vec<(String, Result<ParentPath, String>)> {
    let mut found = Vec::new();
    for platform in [PlatformCode::W2ru, PlatformCode::W2ku, PlatformCode::MacX] {
        for locator in header.locators.iter().filter(|locator| locator.platform == platform) {
            let name = String::from_utf8_lossy(&platform.as_u32().to_be_bytes()).into_owned();
            let read = || -> Result<ParentPath, String> {
                let range = locator.payload_range().map_err(|error| error.to_string())?;
                let range = range.ok_or("it is empty")?;
                let mut payload = vec![0; (range.end - range.start) as usize];
                file.read_or_zero_at(&mut payload, range.start).map_err(|error| error.to_string())?;
                decode_payload(platform, &payload).map_err(|error| error.to_string())
            };
            found.push((format!("locator {name}"), read()));
        }
    }
    let name = match header.parent_name_units() {
        [] => Err("it is empty".to_string()),
        units => ParentPath::from_units(units).map_err(|error| error.to_string()),
    };
    let name = name.and_then(|path| match path.file_name() {
        Some(name) => Ok(ParentPath::Relative(name.to_vec())),
        None => Err("it names no file".into()),
    });
    found.push(("parent name".into(), name));
    found
}

/// The path by which a child's parent is looked for first; `None` where it names none that can be read.
pub(crate) fn claimed_path(file: &dyn File, header: &DynamicHeader) -> Option<String> {
    candidates(file, header).into_iter().find_map(|(_, claim)| claim.ok()).map(|claim| claim.to_string())
}

fn other_id(path: &Path, found: UniqueId) -> String {
    format!("{} is another disk (id {found})", path.display())
}

fn missing(child: &Path, header: &DynamicHeader, tried: &[(String, String)]) -> Error {
    let mut what = format!("its parent (id {}) was not found", header.parent_unique_id);
    for (name, why) in tried {
        what.push_str(&format!("; {name}: {why}"));
    }
    let hint = "name the parent's path yourself (--parent), or allow its folder (--allow-parents-in)";
    Error::ParentMissing { path: child.to_path_buf(), what, hint }
}

/// A path from the root without `.` and `..`, by its text alone.
fn normal(path: &Path) -> Option<PathBuf> {
    let absolute = std::path::absolute(path).ok()?;
    let mut normal = PathBuf::new();
    for component in absolute.components() {
        match component {
            Component::ParentDir => {
                normal.pop();
            }
            Component::CurDir => {}
            other => normal.push(other),
        }
    }
    Some(normal)
}

/// The path that leads from a folder to a file, by their texts alone.
pub(super) fn relative_path(from: &Path, to: &Path) -> Option<PathBuf> {
    let (from, to) = (normal(from)?, normal(to)?);
    let shared = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(shared).map(|_| Component::ParentDir);
    let path: PathBuf = up.chain(to.components().skip(shared)).collect();
    (!path.as_os_str().is_empty()).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_between_folders() {
        let relative = |from, to| relative_path(Path::new(from), Path::new(to)).unwrap();
        assert_eq!(relative("/a/b", "/a/b/p.vhd"), Path::new("p.vhd"));
        assert_eq!(relative("/a/b/c", "/a/x/p.vhd"), Path::new("../../x/p.vhd"));
        assert_eq!(relative("/a/../b", "/b/./p.vhd"), Path::new("p.vhd"));
        assert_eq!(normal(Path::new("/../../etc/x")).unwrap(), Path::new("/etc/x"));
    }
}
