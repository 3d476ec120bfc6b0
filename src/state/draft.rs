//! A VM state that is being made: blobs first, then the manifest.
//!
//! The files have the state's names from the start, so that other programs can be told to write into them. What makes them a
//! state is the manifest under its own name. A draft that is dropped without it takes its files away; after a crash whoever
//! knows that the state was never committed does that ([`StateNames::remove_all`]).

use super::{Digest, Manifest, ManifestBlob, ManifestDisk, StateNames, digest};
use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::sync::{Arc, Mutex};
use crate::vfs::{Access, File, FileExt, Vfs, runs_of_data};
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// Bytes that are copied at once.
const COPY_BYTES: u64 = 1 << 20;

/// A part of a VM's state that is being written: a sparse file of its own. Clones are the same one.
#[derive(Clone)]
pub struct Blob {
    name: String,
    path: PathBuf,
    file: Arc<dyn File>,
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blob").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Blob {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is, for programs that open it themselves.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes.
    pub fn length(&self) -> Result<u64> {
        self.file.length().map_err(|error| self.failed("asking for the length", error))
    }

    /// Writes all of `bytes`, extending the blob where needed. Any number of threads may write at once. Nothing is durable
    /// before the commit.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.check(offset, bytes.len() as u64)?;
        self.file
            .write_all_at(bytes, offset)
            .map_err(|error| self.failed(&format!("writing {} bytes at offset {offset}", bytes.len()), error))
    }

    /// Makes a range read as zeros and gives its space back, or writes zeros where the file system cannot. The length stays.
    pub fn punch_hole(&self, offset: u64, length: u64) -> Result<()> {
        self.check(offset, length)?;
        let zeroing = |error| self.failed(&format!("zeroing {length} bytes at offset {offset}"), error);
        match self.file.punch_hole(offset, length) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let end = self.length()?.min(offset + length);
                let zeros = [0; 64 << 10];
                let mut at = offset;
                while at < end {
                    let count = (end - at).min(zeros.len() as u64);
                    self.file
                        .write_all_at(zeros.get(..count as usize).unwrap_or_default(), at)
                        .map_err(zeroing)?;
                    at += count;
                }
                Ok(())
            }
            done => done.map_err(zeroing),
        }
    }

    /// Cuts the blob, or extends it with zeros, which take no space.
    pub fn set_len(&self, length: u64) -> Result<()> {
        self.check(0, length)?;
        self.file
            .set_len(length)
            .map_err(|error| self.failed(&format!("setting the length to {length} bytes"), error))
    }

    /// The descriptor: for a hypervisor to migrate into, or to map. `None` where the file has none (a simulated one).
    pub fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_fd()
    }

    fn check(&self, offset: u64, length: u64) -> Result<()> {
        let size = Manifest::MAX_BLOB_BYTES;
        match offset.checked_add(length) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::OutOfRange {
                offset,
                length,
                size,
                why: "a part of a VM's state is at most 16 TiB",
            }),
        }
    }

    fn failed(&self, operation: &str, error: io::Error) -> Error {
        Error::io(&self.path, operation, error)
    }

    /// Makes the blob durable and tells what it holds.
    fn finish(&self) -> Result<ManifestBlob> {
        let length = self.length()?;
        self.check(0, length)?;
        // Whatever a descriptor of another program wrote is in the same cache.
        if !defect::active(Defect::BlobNotSynced) {
            self.file.sync_data().map_err(|error| self.failed("syncing", error))?;
        }
        let digest = digest::of_file(&*self.file, &self.path, length)?;
        Ok(ManifestBlob { name: self.name.clone(), length, digest })
    }
}

/// A VM state that is being made.
#[derive(Debug)]
pub struct Draft {
    vfs: Arc<dyn Vfs>,
    names: StateNames,
    blobs: Mutex<Vec<Blob>>,
    published: bool,
}

impl Draft {
    /// An empty state under these names; fails where one exists.
    pub fn new(vfs: Arc<dyn Vfs>, names: StateNames) -> Result<Self> {
        if let Some(path) = names.existing(&*vfs)?.into_iter().next() {
            return Err(Error::Exists { path });
        }
        Ok(Draft { vfs, names, blobs: Mutex::default(), published: false })
    }

    /// Starts another blob; its file is there, and empty, when this returns. Fails where the state has one of this name.
    pub fn blob(&self, name: &str) -> Result<Blob> {
        let path = self.names.blob(name)?;
        let mut blobs = self.blobs.lock();
        if blobs.len() >= Manifest::MAX_BLOBS {
            let what = format!("the state of a VM has at most {} parts", Manifest::MAX_BLOBS);
            return Err(Error::Invalid { what });
        }
        let file = self.vfs.create_new(&path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Error::Exists { path: path.clone() },
            _ => Error::io(&path, "creating a part of a VM's state", error),
        })?;
        let blob = Blob { name: name.to_owned(), path, file };
        blobs.push(blob.clone());
        Ok(blob)
    }

    /// Starts another blob with all that the file at `source` holds. Holes and zeros take no space; where the file system can
    /// share space between files, nothing is copied.
    pub fn blob_from(&self, name: &str, source: &Path) -> Result<Blob> {
        let failed = |operation: &'static str| move |error| Error::io(source, operation, error);
        let file = self.vfs.open(source, Access::ReadOnly).map_err(failed("opening the VM's state"))?;
        let length = file.length().map_err(failed("asking for the length"))?;
        let blob = self.blob(name)?;
        blob.set_len(length)?;
        if let (Some(from), Some(to)) = (file.as_fd(), blob.as_fd())
            && rustix::fs::ioctl_ficlone(to, from).is_ok()
        {
            return Ok(blob);
        }
        let mut buffer = vec![0; COPY_BYTES.min(length) as usize];
        let mut at = 0;
        while let Some(data) = file.next_data(at).map_err(failed("looking for data"))? {
            at = data.start;
            let end = data.end.min(length);
            while at < end {
                let count = (end - at).min(COPY_BYTES);
                let piece = buffer.get_mut(..count as usize).unwrap_or_default();
                file.read_or_zero_at(piece, at).map_err(failed("reading the VM's state"))?;
                for run in runs_of_data(piece, at) {
                    let start = run.start as u64;
                    blob.write_at(piece.get(run).unwrap_or_default(), at + start)?;
                }
                at += count;
            }
            if at >= length {
                break;
            }
        }
        Ok(blob)
    }

    /// Makes all blobs durable, then a manifest of them and of `disks`, still without its name, and returns the manifest's
    /// digest. Nobody may write to a blob any more.
    pub fn write_manifest(&self, disks: Vec<ManifestDisk>) -> Result<Digest> {
        let blobs = self.blobs.lock().clone();
        let blobs = blobs.iter().map(Blob::finish).collect::<Result<Vec<_>>>()?;
        let path = self.names.new_manifest();
        let bytes = Manifest { disks, blobs }.to_bytes().map_err(|error| error.at(&path, 0))?;
        let failed = |operation: &'static str| {
            let path = path.clone();
            move |error| Error::io(&path, operation, error)
        };
        let file = self.vfs.create_new(&path).map_err(failed("creating the manifest"))?;
        file.write_all_at(&bytes, 0).map_err(failed("writing the manifest"))?;
        if !defect::active(Defect::ManifestNotSynced) {
            file.sync_data().map_err(failed("syncing the manifest"))?;
        }
        // The manifest must not have its name while a blob has none.
        self.vfs
            .sync_dir(self.names.folder())
            .map_err(|error| Error::io(self.names.folder(), "syncing the folder", error))?;
        Ok(digest::of_bytes(&bytes))
    }

    /// Takes the files away; their names are gone durably when this returns.
    pub fn discard(mut self) -> Result<()> {
        self.published = true;
        self.names.remove_all(&*self.vfs).map(drop)
    }

    /// Gives the manifest its name, durably, and with it the blobs theirs: from here on this is a VM state.
    pub fn publish(mut self) -> Result<()> {
        // As far as the file system knows permissions: against a machine that is told to share what it should map privately.
        for blob in self.blobs.get_mut() {
            let _ = blob.file.set_read_only(true);
        }
        // From here on it is unknown what the medium holds until the sync returns; so nothing is taken away any more.
        self.published = true;
        self.names.publish(&*self.vfs)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published {
            // What is left after a failure, the next open removes.
            for blob in self.blobs.get_mut() {
                let _ = self.vfs.remove(&blob.path);
            }
            let _ = self.vfs.remove(&self.names.new_manifest());
        }
    }
}

impl StateNames {
    /// The state's files that exist: the manifest first, then blobs and what an unfinished draft left.
    pub fn existing(&self, vfs: &dyn Vfs) -> Result<Vec<PathBuf>> {
        let failed = |error| Error::io(self.folder(), "listing the folder", error);
        let manifest = self.manifest();
        let mut found = Vec::new();
        if let Some(name) = manifest.file_name() {
            let same = vfs.files(self.folder(), name).map_err(failed)?;
            found.extend(same.iter().any(|other| other == name).then(|| manifest.clone()));
        }
        let mut parts = vfs.files(self.folder(), &self.blob_prefix()).map_err(failed)?;
        parts.retain(|name| Self::is_part(name));
        parts.sort();
        found.extend(parts.iter().map(|name| self.folder().join(name)));
        Ok(found)
    }

    /// Gives the manifest its name, durably. Fails where it has been taken away, which is how others say that it is too late.
    pub(crate) fn publish(&self, vfs: &dyn Vfs) -> Result<()> {
        let path = self.manifest();
        vfs.rename(&self.new_manifest(), &path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::NotFound {
                path: self.new_manifest(),
                what: "the checkpoint was ended by somebody who has one of its disks open".into(),
            },
            _ => Error::io(&path, "giving the manifest its name", error),
        })?;
        if defect::active(Defect::ManifestNameNotDurable) {
            return Ok(());
        }
        vfs.sync_dir(self.folder())
            .map_err(|error| Error::io(&path, "making the manifest's name durable", error))
    }

    /// Removes the state's files, the manifest first, and returns how many there were; the names are gone durably when this
    /// returns, whoever has removed them. Other files, links and folders stay, whatever they are called.
    pub fn remove_all(&self, vfs: &dyn Vfs) -> Result<usize> {
        let existing = self.existing(vfs)?;
        for path in &existing {
            match vfs.remove(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io(path, "removing a file of a VM's state", error));
                }
                _ => {}
            }
        }
        // Also if there was none: whoever made them may have removed them a moment ago.
        vfs.sync_dir(self.folder()).map_err(|error| Error::io(self.folder(), "syncing the folder", error))?;
        Ok(existing.len())
    }
}
