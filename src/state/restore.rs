//! A VM state that is given back: only if it is whole, unchanged as far as can be seen at once, and belongs to the disk.
//!
//! Opening checks the manifest by the digest in the disk's seal, that the manifest names this disk with this seal, and that each
//! blob is there in its length. What the blobs hold is checked by [`VmState::verify`], which reads them whole.

use super::{Digest, Manifest, ManifestBlob, ManifestDisk, PrivateMap, StateNames, digest};
use crate::error::{Error, Result};
use crate::ext::is_file_name;
use crate::sync::Arc;
use crate::vfs::{Access, File, FileExt, Vfs};
use crate::vhd::UniqueId;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const USE_BACKUP: &str = "put the file back from a backup, or start the VM from its disk, without the state";
const USE_OTHER: &str = "look for the state that was taken with this disk, or start the VM without it";

/// The state of a VM, ready to resume from.
#[derive(Debug)]
pub struct VmState {
    path: PathBuf,
    disks: Vec<ManifestDisk>,
    blobs: Vec<StateBlob>,
}

/// A part of a VM's state.
pub struct StateBlob {
    entry: ManifestBlob,
    path: PathBuf,
    file: Arc<dyn File>,
}

impl fmt::Debug for StateBlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StateBlob").field("entry", &self.entry).finish_non_exhaustive()
    }
}

impl VmState {
    /// Opens the state under these names, which the seal of a disk says to have a manifest of this digest; `disk_id` and
    /// `seal_id` are those of that sealed disk.
    pub fn open(
        vfs: &dyn Vfs,
        names: &StateNames,
        disk_id: UniqueId,
        seal_id: [u8; 16],
        digest: Digest,
    ) -> Result<Self> {
        let path = names.manifest();
        let manifest = read_manifest(vfs, &path, digest)?;
        if !manifest.disks.iter().any(|disk| disk.disk_id == disk_id && disk.seal_id == seal_id) {
            return Err(Error::StateMismatch {
                path,
                what: format!("this state does not belong to disk {disk_id} as it was sealed"),
                hint: USE_OTHER,
            });
        }
        let blobs = manifest.blobs.into_iter().map(|entry| StateBlob::open(vfs, names, entry));
        let blobs = blobs.collect::<Result<Vec<_>>>()?;
        Ok(VmState { path, disks: manifest.disks, blobs })
    }

    /// Where the manifest is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All disks of the VM, in the sealed states that the VM state goes with.
    pub fn disks(&self) -> &[ManifestDisk] {
        &self.disks
    }

    /// The parts of the state.
    pub fn blobs(&self) -> &[StateBlob] {
        &self.blobs
    }

    /// A part of the state by its name.
    pub fn blob(&self, name: &str) -> Result<&StateBlob> {
        self.blobs.iter().find(|blob| blob.name() == name).ok_or_else(|| {
            let names: Vec<&str> = self.blobs.iter().map(StateBlob::name).collect();
            let what =
                format!("{}: there is no \"{name}\" but only {}", self.path.display(), names.join(", "));
            Error::Invalid { what }
        })
    }

    /// Reads all blobs and compares them with their digests, each by as many threads as the machine runs at once. Holes cost
    /// nothing.
    pub fn verify(&self) -> Result<()> {
        self.blobs.iter().try_for_each(StateBlob::verify)
    }
}

impl StateBlob {
    fn open(vfs: &dyn Vfs, names: &StateNames, entry: ManifestBlob) -> Result<Self> {
        let path = names.blob(&entry.name)?;
        let file = vfs.open(&path, Access::ReadOnly).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::StateMismatch {
                path: path.clone(),
                what: "this part of the VM's state is missing".into(),
                hint: USE_BACKUP,
            },
            _ => Error::io(&path, "opening a part of a VM's state", error),
        })?;
        let length = file.length().map_err(|error| Error::io(&path, "asking for the length", error))?;
        if length != entry.length {
            let what = format!("it has {length} bytes, and had {} when the state was taken", entry.length);
            return Err(Error::StateMismatch { path, what, hint: USE_BACKUP });
        }
        Ok(StateBlob { entry, path, file })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.entry.name
    }

    /// Length in bytes.
    pub fn length(&self) -> u64 {
        self.entry.length
    }

    /// What it held when the state was taken.
    pub fn digest(&self) -> Digest {
        self.entry.digest
    }

    /// Where it is, for programs that open it themselves. They must not write to it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the medium that it occupies.
    pub fn allocated_bytes(&self) -> Result<u64> {
        self.file.allocated_bytes().map_err(|error| Error::io(&self.path, "asking for the space", error))
    }

    /// Reads a range, which must lie within the blob.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let length = buf.len() as u64;
        if offset.checked_add(length).is_none_or(|end| end > self.length()) {
            let why = "it ends past this part of the VM's state";
            return Err(Error::OutOfRange { offset, length, size: self.length(), why });
        }
        self.file.read_or_zero_at(buf, offset).map_err(|error| {
            Error::io(&self.path, format!("reading {length} bytes at offset {offset}"), error)
        })
    }

    /// The next range at or behind `offset` that may hold data; all else reads as zeros. `None` behind the last one.
    pub fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let data = self.file.next_data(offset);
        let data = data.map_err(|error| Error::io(&self.path, "looking for data", error))?;
        Ok(data.map(|data| data.start..data.end.min(self.length())).filter(|data| !data.is_empty()))
    }

    /// The descriptor, for reading. `None` where the file has none (a simulated one).
    pub fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_fd()
    }

    /// Maps the blob privately: at once, whatever its size, and in memory only once for all that map it and only read.
    pub fn map_private(&self) -> Result<PrivateMap> {
        let unsupported = |what: &str| Error::Unsupported { path: self.path.clone(), what: what.into() };
        let file = self.as_fd().ok_or_else(|| unsupported("the file has no descriptor to map"))?;
        let length = usize::try_from(self.length())
            .map_err(|_| unsupported("it is larger than the address space of this machine"))?;
        if length == 0 {
            return Err(unsupported("it is empty: there is nothing to map"));
        }
        PrivateMap::new(file, length)
            .map_err(|error| Error::io(&self.path, format!("mapping {length} bytes"), error))
    }

    /// Reads the blob and compares it with its digest.
    pub fn verify(&self) -> Result<()> {
        let found = digest::of_file(&*self.file, &self.path, self.length())?;
        if found == self.digest() {
            return Ok(());
        }
        Err(Error::StateMismatch {
            path: self.path.clone(),
            what: format!(
                "it was changed, or exchanged for another, since the state was taken: its digest is {found}, and was {}",
                self.digest()
            ),
            hint: USE_BACKUP,
        })
    }
}

/// Whether the manifest of this file name and digest is in the folder. Another whole one is not it; a damaged one is an error.
pub(crate) fn is_published(vfs: &dyn Vfs, folder: &Path, name: &[u8], digest: [u8; 32]) -> Result<bool> {
    let path = folder.join(OsStr::from_bytes(name));
    if !is_file_name(name) {
        let what = format!("the seal names \"{}\" as the manifest of its VM state", name.escape_ascii());
        return Err(Error::Damaged { path: folder.to_path_buf(), what, hint: "check the images in it" });
    }
    let Some(bytes) = read_file(vfs, &path)? else { return Ok(false) };
    if digest::of_bytes(&bytes) == Digest(digest) {
        return Ok(true);
    }
    Manifest::parse(&bytes).map(|_| false).map_err(|error| error.at(&path, 0))
}

/// The content of a manifest, bounded; `None` where there is no such file.
fn read_file(vfs: &dyn Vfs, path: &Path) -> Result<Option<Vec<u8>>> {
    let io = |operation| move |error| Error::io(path, operation, error);
    let file = match vfs.open(path, Access::ReadOnly) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(io("opening the manifest of a VM's state"))?,
    };
    let length = file.length().map_err(io("asking for the length"))?;
    // One byte more than the longest has is enough to be none.
    let mut bytes = vec![0; length.min(Manifest::MAX_BYTES as u64 + 1) as usize];
    file.read_or_zero_at(&mut bytes, 0).map_err(io("reading the manifest of a VM's state"))?;
    Ok(Some(bytes))
}

/// A whole manifest, whatever its digest, and that; `None` where there is none.
pub(crate) fn any_manifest(vfs: &dyn Vfs, path: &Path) -> Option<(Digest, Manifest)> {
    let bytes = read_file(vfs, path).ok().flatten()?;
    Some((digest::of_bytes(&bytes), Manifest::parse(&bytes).ok()?))
}

/// Reads a manifest that must have this digest.
pub(crate) fn read_manifest(vfs: &dyn Vfs, path: &Path, digest: Digest) -> Result<Manifest> {
    let mismatch = |what: String, hint| Error::StateMismatch { path: path.to_path_buf(), what, hint };
    let bytes = read_file(vfs, path)?
        .ok_or_else(|| mismatch("the manifest of the VM's state is missing".into(), USE_BACKUP))?;
    let found = digest::of_bytes(&bytes);
    if found != digest {
        // Damage says more than another digest.
        Manifest::parse(&bytes).map_err(|error| error.at(path, 0))?;
        let what = format!(
            "this manifest is not the one that the disk was sealed with: its digest is {found}, expected {digest}"
        );
        return Err(mismatch(what, USE_OTHER));
    }
    Manifest::parse(&bytes).map_err(|error| error.at(path, 0))
}
