//! The names around a disk: `vm.vhd` is its leaf and keeps its path; `vm@NAME.vhd` are its snapshots.

use crate::error::{Error, Result};
use crate::ext::is_name;
use crate::vfs::Vfs;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};

/// The name of a snapshot: 1 to 64 of the characters `A-Z a-z 0-9 . _ -`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotName(String);

impl SnapshotName {
    /// Takes a name.
    pub fn new(name: &str) -> Result<Self> {
        match is_name(name) {
            true => Ok(SnapshotName(name.into())),
            false => Err(Error::Invalid {
                what: format!(
                    "\"{}\" cannot be the name of a snapshot: 1 to 64 of the characters A-Z a-z 0-9 . _ -",
                    name.escape_debug()
                ),
            }),
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where the snapshot of this name of the disk at `disk` is: `vm@NAME.vhd` beside `vm.vhd`.
pub(crate) fn snapshot_path(disk: &Path, name: &SnapshotName) -> PathBuf {
    let mut file = disk.file_stem().unwrap_or_default().to_os_string();
    file.push("@");
    file.push(name.as_str());
    if let Some(extension) = disk.extension() {
        file.push(".");
        file.push(extension);
    }
    disk.with_file_name(file)
}

/// The name of the snapshot of the disk at `disk` that a file of this name in the same folder is, if it is one.
pub(crate) fn snapshot_of(disk: &Path, file: &OsStr) -> Option<SnapshotName> {
    let (_, name) = Path::new(file).to_str()?.rsplit_once('@')?;
    let extension = disk.extension().map(|extension| format!(".{}", extension.to_string_lossy()));
    let name = SnapshotName::new(name.strip_suffix(extension.as_deref().unwrap_or(""))?).ok()?;
    (snapshot_path(disk, &name).file_name() == Some(file)).then_some(name)
}

/// A disk's leaf: where its file is, and with it its snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Leaf {
    folder: PathBuf,
    name: OsString,
}

impl Leaf {
    /// Finds the file at `path`, through links: its real name is what snapshots exchange.
    pub(crate) fn resolve(vfs: &dyn Vfs, path: &Path) -> Result<Self> {
        let resolved = vfs.resolve(path).map_err(|error| Error::io(path, "finding the image", error))?;
        match (resolved.parent(), resolved.file_name()) {
            (Some(folder), Some(name)) => Ok(Leaf { folder: folder.into(), name: name.into() }),
            _ => Err(Error::Invalid { what: format!("{}: it names no file", path.display()) }),
        }
    }

    /// The file called `name` in `folder`, which is a real place already.
    pub(crate) fn in_folder(folder: &Path, name: &OsStr) -> Self {
        Leaf { folder: folder.into(), name: name.into() }
    }

    /// The folder.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The file's name.
    pub(crate) fn name(&self) -> &OsStr {
        &self.name
    }

    /// The file's path.
    pub(crate) fn path(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    /// Where the snapshot of this name is.
    pub(crate) fn snapshot(&self, name: &SnapshotName) -> PathBuf {
        snapshot_path(&self.path(), name)
    }

    /// Where the new leaf of a revert waits.
    pub(crate) fn next(&self) -> PathBuf {
        let mut path = self.path().into_os_string();
        path.push("~new");
        path.into()
    }

    /// Where the child of a snapshot under way waits on file systems that cannot exchange names.
    pub(crate) fn waiting_child(&self, name: &SnapshotName) -> PathBuf {
        let mut path = self.snapshot(name).into_os_string();
        path.push("~new");
        path.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_snapshots() {
        let leaf = |name: &str| Leaf { folder: "/d".into(), name: name.into() };
        let name = SnapshotName::new("before-2.0_x").unwrap();
        assert_eq!(leaf("vm.vhd").snapshot(&name), Path::new("/d/vm@before-2.0_x.vhd"));
        assert_eq!(leaf("vm").snapshot(&name), Path::new("/d/vm@before-2.0_x"));
        assert_eq!(leaf("a.b.avhd").waiting_child(&name), Path::new("/d/a.b@before-2.0_x.avhd~new"));
        let of = |disk: &str, file: &str| {
            snapshot_of(Path::new(disk), OsStr::new(file)).map(|name| name.as_str().to_string())
        };
        assert_eq!(of("/d/vm.vhd", "vm@s1.vhd").as_deref(), Some("s1"));
        assert_eq!(of("a@b.vhd", "a@b@c.vhd.vhd").as_deref(), Some("c.vhd"));
        assert_eq!(of("vm", "vm@x").as_deref(), Some("x"));
        for other in ["vm@s1.vhd~new", "wm@s1.vhd", "vm@.vhd", "vm.vhd", "vm@s1", "@s1.vhd"] {
            assert_eq!(of("vm.vhd", other), None, "{other}");
        }
        for bad in ["", "a/b", "a b", "é", "a@b", "a\0", &"x".repeat(65)] {
            assert!(SnapshotName::new(bad).is_err(), "{bad}");
        }
    }
}
