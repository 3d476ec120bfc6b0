//! Seals: an image that is a snapshot, or that others were made over, never changes again.
//!
//! Order, each step durable before the next: everything in place and the end footer · superblock(clean, fingerprint, seal) ·
//! the other superblock · ring punched (need not be durable) · normal cookie; last the modification time and the file's mode. The
//! first superblock is the seal: a crash before it leaves an image that was not closed, one after it a half-closed, sealed one, of
//! which [`finish_interrupted`] does the rest.

use super::Layer;
use super::headers::{Condition, pair_bytes};
use super::open::{Opening, write_header};
use super::session::Superblocks;
use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::ext::{DataCrcs, Lineage, Name, Placement, SealId};
use crate::journal::zero_range;
use crate::sync::Arc;
use crate::vfs::{Access, File, FileExt, FileTime, Vfs};
use crate::vhd::{DynamicHeader, HeaderCookie, UniqueId};
use std::io;
use std::path::Path;

/// How a seal names the VM state that belongs to it; all zeros where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct StateLink {
    /// Of the manifest.
    pub(crate) digest: [u8; 32],
    /// Its file name in the same folder. The seal counts only once a file of this name and digest is there.
    pub(crate) manifest: Name<256>,
}

/// What a seal says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seal {
    /// Its name.
    pub(crate) id: SealId,
    /// The child that takes the file's name over; zero where none does.
    pub(crate) child_id: UniqueId,
    /// The name of the snapshot; empty where it is none.
    pub(crate) snapshot: Name<64>,
    /// The name that the child takes over; empty where none does.
    pub(crate) leaf_name: Name<256>,
    /// The VM state that belongs to it.
    pub(crate) state: StateLink,
    /// The modification time that the file is to have from then on.
    pub(crate) modified: FileTime,
}

impl Seal {
    /// The lineage of an image that gets this seal.
    pub(super) fn put_into(&self, lineage: &Lineage) -> Lineage {
        Lineage {
            seal_id: self.id,
            child_id: self.child_id,
            snapshot: self.snapshot,
            leaf_name: self.leaf_name,
            state_digest: self.state.digest,
            manifest: self.state.manifest,
            ..*lineage
        }
    }
}

impl Layer {
    /// Notes that a snapshot is under way, so that whoever finds the image with this note takes away what there is of it; durable
    /// on return.
    pub(crate) fn begin_snapshot(&self, child_id: UniqueId, name: Name<64>) -> Result<()> {
        self.change_lineage(|lineage| (lineage.child_id, lineage.snapshot) = (child_id, name))
    }

    /// Takes that note back: there is nothing of the snapshot; durable on return.
    pub(crate) fn forget_snapshot(&self) -> Result<()> {
        self.change_lineage(Lineage::forget_snapshot)
    }

    fn change_lineage(&self, change: impl FnOnce(&mut Lineage)) -> Result<()> {
        let session = self.session()?;
        let mut core = session.core.lock();
        session.check(&self.path)?;
        self.check_open()?;
        change(&mut core.superblocks.current.lineage);
        let written = core.superblocks.write_next(&*self.file);
        written.map_err(|error| Error::io(&self.path, "writing a superblock", error))
    }
}

/// Why a sealed image is not opened for writing.
pub(crate) fn refusal(path: &Path, lineage: &Lineage) -> Error {
    let what = match lineage.snapshot.as_bytes() {
        [] => "it is sealed: other disks show what it holds, so that it never changes".to_string(),
        name => format!(
            "it is sealed as the snapshot \"{}\", so that it never changes",
            String::from_utf8_lossy(name)
        ),
    };
    Error::Sealed { path: path.to_path_buf(), what }
}

/// What follows the first superblock with the seal. Every step may be repeated.
pub(super) fn finish(
    file: &dyn File,
    place: &Placement,
    header: &DynamicHeader,
    superblocks: &mut Superblocks,
) -> io::Result<()> {
    superblocks.write_next(file)?;
    // Both superblocks say now that the journal counts no more.
    zero_range(file, place.ring_offset, place.ring_bytes)?;
    write_header(file, place, header, HeaderCookie::Normal)?;
    file.set_modified(superblocks.current.fingerprint.modified)?;
    // The seal keeps writers of ours away; this is for other programs, as far as the file system knows permissions.
    let _ = file.set_read_only(true);
    Ok(())
}

/// Does the rest of a sealing that was cut; nothing if it was not. The file is open for writing and locked. False where the image is
/// not sealed: a seal whose write failed may have been in a cache alone.
pub(crate) fn finish_interrupted(vfs: Arc<dyn Vfs>, file: Arc<dyn File>, path: &Path) -> Result<bool> {
    let opening = Opening::new(vfs, file, path)?;
    let mut superblocks = opening.superblocks()?;
    if !superblocks.current.lineage.is_sealed() {
        return Ok(false);
    }
    // Also if all looks done: whoever did it may have been killed before it was durable.
    let opening = match defect::active(Defect::SealFromCache) {
        true => opening,
        false => opening.settle(&mut superblocks)?,
    };
    let mut superblocks = opening.superblocks()?;
    let sealed = superblocks.current.lineage.is_sealed();
    match opening.decision.condition {
        _ if !sealed => return Ok(false),
        Condition::Clean => return Ok(true),
        // Maintenance that was cut: it is recovered like any session, and the seal stays.
        Condition::Dirty => {
            let mut opening = opening;
            opening.maintenance = true;
            return opening.open(Access::ReadWrite)?.close().map(|()| true);
        }
        Condition::HalfClosed => {}
    }
    let (file, header) = (&*opening.file, &opening.decision.header);
    if opening.decision.front_lost {
        let dirty = DynamicHeader { cookie: HeaderCookie::Dirty, ..header.clone() };
        file.write_all_at(&pair_bytes(&opening.decision.footer, &dirty), 0)
            .map_err(opening.io("writing the start of the file from its backup"))?;
        opening.sync()?;
    }
    superblocks
        .write_again(file)
        .and_then(|()| finish(file, &opening.place, header, &mut superblocks))
        .map_err(opening.io("sealing the image"))?;
    Ok(true)
}

/// Takes a seal away that was never committed; the note that the snapshot is under way stays, for whoever takes away the rest. The
/// file is open for writing and locked, and its sealing was finished. Durable on return, and may be repeated.
pub(crate) fn unseal(vfs: Arc<dyn Vfs>, file: Arc<dyn File>, path: &Path) -> Result<()> {
    let opening = Opening::new(vfs, file, path)?;
    let mut superblocks = opening.superblocks()?;
    let lineage = &mut superblocks.current.lineage;
    lineage.seal_id = SealId::default();
    lineage.leaf_name = Name::default();
    (lineage.state_digest, lineage.manifest) = Default::default();
    superblocks.current.data_crcs = DataCrcs::default();
    let (file, modified) = (&*opening.file, superblocks.current.fingerprint.modified);
    // As far as the file system knows permissions.
    let _ = file.set_read_only(false);
    // Both: losing one of them must not bring the seal back when its child is gone.
    superblocks
        .write_next(file)
        .and_then(|()| superblocks.write_next(file))
        .and_then(|()| file.set_modified(modified))
        .map_err(opening.io("taking the seal away"))
}
