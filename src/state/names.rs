//! The names of a VM state's files, all in the folder of its disk.
//!
//! `+` stands in no name of a snapshot, and `~` in no name of a blob: so no two files of different kinds, states or blobs ever
//! want the same name, and a state's files can be told from all others by their names alone.

use crate::error::{Error, Result};
use crate::ext::{is_file_name, is_name};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const SUFFIX: &str = ".vmstate";

/// What the files of one VM state are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateNames {
    folder: PathBuf,
    /// `vm@NAME`.
    stem: OsString,
}

impl StateNames {
    /// The names for snapshot `name` of the disk at `path`. Fails for what cannot be the name of a snapshot.
    pub fn new(path: &Path, name: &str) -> Result<Self> {
        if !is_name(name) {
            let what = format!("\"{name}\" cannot name a snapshot: 1 to 64 of A-Z a-z 0-9 . _ -");
            return Err(Error::Invalid { what });
        }
        // Or two disks in a folder could want the same names.
        let Some(stem) = path.file_stem().filter(|_| path.extension().is_some_and(|end| end == "vhd")) else {
            let what = format!("{}: only a disk whose name ends in .vhd can have VM states", path.display());
            return Err(Error::Invalid { what });
        };
        let mut stem = OsString::from(stem);
        stem.push("@");
        stem.push(name);
        Ok(StateNames { folder: path.parent().unwrap_or(Path::new("")).to_path_buf(), stem })
    }

    /// The names that go with that of a manifest in `folder`.
    pub(crate) fn of_manifest(folder: &Path, manifest: &OsStr) -> Result<Self> {
        let stem = manifest.as_bytes().strip_suffix(SUFFIX.as_bytes());
        match stem.filter(|_| is_file_name(manifest.as_bytes())) {
            Some(stem) => Ok(StateNames { folder: folder.into(), stem: OsStr::from_bytes(stem).into() }),
            None => {
                let what = format!("a seal names {manifest:?} as the manifest of its VM state");
                Err(Error::Damaged { path: folder.into(), what, hint: "check the images in it" })
            }
        }
    }

    /// The folder of all of them.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// `vm@NAME.vmstate`.
    pub fn manifest(&self) -> PathBuf {
        self.path(SUFFIX)
    }

    /// Where the manifest is written before it gets its name.
    pub(crate) fn new_manifest(&self) -> PathBuf {
        self.path(&format!("+~manifest{SUFFIX}"))
    }

    /// `vm@NAME+BLOB.vmstate`. Fails for what cannot be the name of a blob.
    pub fn blob(&self, blob: &str) -> Result<PathBuf> {
        if !is_name(blob) {
            let what = format!("\"{blob}\" cannot name a part of a VM's state: 1 to 64 of A-Z a-z 0-9 . _ -");
            return Err(Error::Invalid { what });
        }
        Ok(self.path(&format!("+{blob}{SUFFIX}")))
    }

    /// What the names of blobs start with.
    pub(super) fn blob_prefix(&self) -> OsString {
        let mut prefix = self.stem.clone();
        prefix.push("+");
        prefix
    }

    /// Whether a name with [`StateNames::blob_prefix`] is that of a blob, or of a manifest that has no name yet.
    pub(super) fn is_part(name: &OsStr) -> bool {
        name.as_encoded_bytes().ends_with(SUFFIX.as_bytes())
    }

    fn path(&self, rest: &str) -> PathBuf {
        let mut name = self.stem.clone();
        name.push(rest);
        self.folder.join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_beside_the_disk() {
        let names = StateNames::new(Path::new("/vms/vm.vhd"), "monday").unwrap();
        assert_eq!(names.manifest(), Path::new("/vms/vm@monday.vmstate"));
        assert_eq!(names.blob("ram").unwrap(), Path::new("/vms/vm@monday+ram.vmstate"));
        assert!(names.blob("a+b").is_err() && names.blob("~manifest").is_err());
        for (path, name) in [("vm.vhd", "a/b"), ("vm", "a"), ("vm.avhd", "a"), (".vhd", "a")] {
            assert!(StateNames::new(Path::new(path), name).is_err(), "{path} {name}");
        }
        assert_eq!(StateNames::new(Path::new("vm.vhd"), "a").unwrap().manifest(), Path::new("vm@a.vmstate"));
    }
}
