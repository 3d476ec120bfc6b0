//! Naming a point of a chain: by the name of a snapshot, or by the path of a layer.

use crate::chain::{self, ChildClaims, ParentImage, SnapshotName};
use crate::disk::OpenOptions;
use crate::error::{Error, Result};
use crate::layer::{self, Headers};
use crate::vfs::{Access, File, Vfs};
use crate::vhd::{DiskType, Footer, UniqueId};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Where the snapshot `name` of the disk at `disk` lies: `vm@NAME.vhd` beside `vm.vhd`. `None` for what is no name: names have
/// 1 to 64 bytes of `A-Z`, `a-z`, `0-9`, `.`, `_` and `-`.
pub fn snapshot_path(disk: &Path, name: &str) -> Option<PathBuf> {
    disk.file_stem()?;
    SnapshotName::new(name).ok().map(|name| chain::snapshot_path(disk, &name))
}

/// The layers of a disk, as far as their headers and the parents' files go. The top one is only looked at, without a lock: it
/// may be in use.
#[derive(Debug)]
pub(super) struct Lineage {
    /// The top layer's footer.
    pub(super) footer: Footer,
    /// The layers beneath, from the top down.
    pub(super) parents: Vec<ParentImage>,
}

impl Lineage {
    /// Looks at the image at `path` and opens its parents.
    pub(super) fn open(options: &OpenOptions, path: &Path) -> Result<Self> {
        let vfs = &*options.vfs;
        let file =
            vfs.open(path, Access::ReadOnly).map_err(|error| Error::io(path, "opening the image", error))?;
        if let Some(footer) = layer::fixed_footer(&*file, path)? {
            return Ok(Lineage { footer, parents: Vec::new() });
        }
        let decision = Headers::read(&*file, path)?.decide(path)?;
        let parents = match decision.footer.disk_type {
            DiskType::Differencing => {
                let claims = ChildClaims {
                    path,
                    file: &*file,
                    footer: &decision.footer,
                    header: &decision.header,
                    lineage: decision.lineage(),
                };
                chain::open_images(&options.vfs, &claims, &options.policy)?
            }
            _ => Vec::new(),
        };
        Ok(Lineage { footer: decision.footer, parents })
    }

    /// The file of the layer so far below the top, which is at `disk`.
    pub(super) fn path<'a>(&'a self, disk: &'a Path, depth: usize) -> &'a Path {
        depth.checked_sub(1).and_then(|parent| self.parents.get(parent)).map_or(disk, ParentImage::path)
    }

    /// How far below the top two points are, of which `to` must not be the older one; it is the top if not given.
    pub(super) fn points(
        &self,
        vfs: &dyn Vfs,
        disk: &Path,
        from: &Path,
        to: Option<&Path>,
    ) -> Result<(usize, usize)> {
        let parents = self.parents.iter().map(ParentImage::unique_id);
        let layers: Vec<UniqueId> = std::iter::once(self.footer.unique_id).chain(parents).collect();
        let from_depth = find(vfs, &layers, disk, from)?;
        let to_depth = to.map_or(Ok(0), |to| find(vfs, &layers, disk, to))?;
        if to_depth > from_depth {
            let to = to.unwrap_or(disk);
            let what = format!("{} is older than {}: name the older one first", to.display(), from.display());
            return Err(Error::Invalid { what });
        }
        Ok((from_depth, to_depth))
    }
}

/// Which of the layers with these ids, from the top of the disk at `disk` down, `point` names: a snapshot of the disk, or a path.
pub(super) fn find(vfs: &dyn Vfs, layers: &[UniqueId], disk: &Path, point: &Path) -> Result<usize> {
    let snapshot = point.to_str().and_then(|name| snapshot_path(disk, name));
    let mut why = None;
    for path in snapshot.iter().map(PathBuf::as_path).chain([point]) {
        let file = match vfs.open(path, Access::ReadOnly) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::io(path, "opening a layer", error)),
        };
        let id = unique_id(&*file, path)?;
        match layers.iter().position(|&layer| layer == id) {
            Some(depth) => return Ok(depth),
            None => why = Some(format!("{} is no layer of this disk", path.display())),
        }
    }
    let why = why.unwrap_or_else(|| match &snapshot {
        Some(snapshot) => format!("neither {} nor {} exists", snapshot.display(), point.display()),
        None => format!("{} does not exist", point.display()),
    });
    let point = String::from_utf8_lossy(point.as_os_str().as_bytes()).into_owned();
    let what = format!("its chain has no point \"{point}\": {why}");
    Err(Error::NotFound { path: disk.to_path_buf(), what })
}

fn unique_id(file: &dyn File, path: &Path) -> Result<UniqueId> {
    match layer::fixed_footer(file, path)? {
        Some(footer) => Ok(footer.unique_id),
        None => Ok(Headers::read(file, path)?.decide(path)?.footer.unique_id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_snapshots() {
        let path = |disk: &str, name: &str| snapshot_path(Path::new(disk), name);
        assert_eq!(path("/a/vm.vhd", "mon-1.2"), Some("/a/vm@mon-1.2.vhd".into()));
        assert_eq!(path("vm", "x"), Some("vm@x".into()));
        assert_eq!(path("vm.vhd", &"n".repeat(64)), Some(format!("vm@{}.vhd", "n".repeat(64)).into()));
        for name in ["", "a/b", "a b", "ä", "a@b", &"n".repeat(65)] {
            assert_eq!(path("vm.vhd", name), None, "{name}");
        }
    }
}
