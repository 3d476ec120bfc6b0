//! Clean close: everything in place, freed slots punched, the file cut, then in this order, each durable before the next:
//! end footer · superblock(clean, fingerprint) · normal cookie; last the modification time that the fingerprint names.
//!
//! Sealing is the same with the seal in the superblock, which is then written to both places, so that the loss of neither
//! unseals the image; the ring is punched before the cookie, and the file's permission to be written goes. Between the last slot and
//! the end footer of a sealed image room is left, a hole, for the CRCs of its data.

use super::Layer;
use super::open::write_header;
use super::seal::{self, Seal};
use super::session::{Session, SessionCore};
use super::table::{Survey, entries_crc};
use crate::defect::{self, Defect};
use crate::error::Result;
use crate::ext::{DataCrcs, Fingerprint, Lineage, SessionId, State, Superblock};
use crate::journal::Failure;
use crate::vfs::{Access, FileExt, FileTime};
use crate::vhd::{self, HeaderCookie};

impl Layer {
    /// Closes the image cleanly, so that every VHD tool can open it. Waits for calls under way; later ones fail. Closing
    /// again, or at the same time, tells how the first close ended. After a failure the image stays dirty and the next open
    /// recovers it.
    pub(crate) fn close(&self) -> Result<()> {
        let Some(session) = &self.session else { return Ok(()) };
        let _one_at_a_time = session.closing.lock();
        self.map.close();
        let mut core = session.core.lock();
        if core.closed {
            return Ok(());
        }
        // A close that failed before has poisoned the disk.
        session.check(&self.path)?;
        if defect::active(Defect::CloseCookieFirst) {
            let _ = write_header(&*self.file, &self.place, &core.headers.1, HeaderCookie::Normal);
        }
        let result = self
            .flush_locked(session, &mut core)
            .and_then(|()| self.reclaim_locked(session, &mut core))
            .and_then(|()| {
                let place = self.upgrade.as_ref().unwrap_or(&self.place);
                Survey::new(&self.path, place, core.journal.table(), |_| u64::MAX)
            })
            .and_then(|survey| {
                let Superblock { lineage, fingerprint, .. } = core.superblocks.current;
                // Maintenance of a sealed image leaves its time.
                let modified = if lineage.is_sealed() { fingerprint.modified } else { self.vfs.now() };
                let result = self.write_clean_end(session, &mut core, survey.fresh, (lineage, modified));
                result.map_err(|failure| session.failed(&mut core, &*self.file, &self.path, failure))
            });
        match &result {
            Ok(()) => {
                core.closed = true;
                // Dropping the handle would do it, too; whoever waits for the file need not wait for that.
                let _ = self.file.unlock();
            }
            Err(error) => {
                session.poison(error.to_string());
            }
        }
        result
    }

    /// Seals the image: like [`Layer::close`], with the seal, and what it holds can be read on through this layer, beside
    /// others. From the call on nothing can be changed; no write may be under way. After a failure the disk is stopped, and the
    /// next open says whether the seal counts. Not for an image made elsewhere, which has no registry of children either.
    pub(crate) fn seal(&self, seal: &Seal) -> Result<()> {
        self.end_sealed(|superblock| (seal.put_into(&superblock.lineage), seal.modified))
    }

    /// The end of maintenance of a sealed image: the same with the seal and the time that it has.
    pub(crate) fn seal_again(&self) -> Result<()> {
        self.end_sealed(|superblock| (superblock.lineage, superblock.fingerprint.modified))
    }

    fn end_sealed(&self, end: impl FnOnce(&Superblock) -> (Lineage, FileTime)) -> Result<()> {
        let session = self.session()?;
        let _one_at_a_time = session.closing.lock();
        self.check_open()?;
        session.seal();
        let mut core = session.core.lock();
        session.check(&self.path)?;
        let result = self
            .flush_locked(session, &mut core)
            .and_then(|()| self.reclaim_locked(session, &mut core))
            .and_then(|()| Survey::new(&self.path, &self.place, core.journal.table(), |_| u64::MAX))
            .and_then(|survey| {
                let end = end(&core.superblocks.current);
                let result = self.write_clean_end(session, &mut core, survey.fresh, end);
                result.map_err(|failure| session.failed(&mut core, &*self.file, &self.path, failure))
            })
            .and_then(|()| super::lock(&*self.file, &self.path, Access::ReadOnly));
        match &result {
            Ok(()) => core.closed = true,
            Err(error) => {
                session.poison(error.to_string());
            }
        }
        result
    }

    /// Once the sync has returned nothing that was acknowledged can be lost, and no later failure is called a failed sync.
    fn write_clean_end(
        &self,
        session: &Session,
        core: &mut SessionCore,
        fresh: u64,
        (lineage, modified): (Lineage, FileTime),
    ) -> Result<(), Failure> {
        if let Some(temporary) = &self.place.temporary {
            let next_allocation = session.allocator.lock().next_allocation();
            return self.leave_clean(core, temporary, fresh, next_allocation);
        }
        let file = &*self.file;
        let failed = |operation| move |error| Failure { operation, error, fatal: false };
        let data_crcs = self.room_for_crcs(core.journal.table(), fresh, &lineage);
        let end = self.place.slot_offset(fresh) + data_crcs.bytes();
        let file_bytes = self.place.file_bytes(fresh) + data_crcs.bytes();

        let cutting = "cutting the file behind its last block";
        if data_crcs.is_some() {
            // What was there of slots that were never used must not look like CRCs.
            file.set_len(data_crcs.offset).map_err(failed(cutting))?;
        }
        file.set_len(file_bytes).map_err(failed(cutting))?;
        session.allocator.lock().set_file_bytes(file_bytes);
        let footer = core.headers.0.to_bytes();
        file.write_all_at(&footer, end).map_err(failed("writing the footer"))?;
        if !defect::active(Defect::CloseWithoutSync) {
            core.journal.sync(file)?;
        }

        let fingerprint = Fingerprint {
            file_bytes,
            footer_crc: crc32fast::hash(&footer),
            header_crc: crc32fast::hash(&core.headers.1.to_bytes()),
            bat_crc: entries_crc(core.journal.table()),
            modified,
        };
        let dirty = core.superblocks.current;
        core.superblocks.current = Superblock {
            state: State::Clean,
            session: SessionId::default(),
            next_allocation: session.allocator.lock().next_allocation(),
            fingerprint,
            lineage,
            data_crcs,
            ..dirty
        };
        if let Err(error) = core.superblocks.write_next(file) {
            let sequence = core.superblocks.current.sequence;
            core.superblocks.current = Superblock { sequence, ..dirty };
            return Err(failed("writing a superblock")(error));
        }
        if lineage.is_sealed() {
            seal::finish(file, &self.place, &core.headers.1, &mut core.superblocks)
                .map_err(failed("sealing the image"))
        } else {
            write_header(file, &self.place, &core.headers.1, HeaderCookie::Normal)
                .map_err(failed("writing the dynamic header"))?;
            file.set_modified(modified).map_err(failed("setting the modification time"))
        }
    }
    /// The room that the CRCs of a sealed image's data need.
    fn room_for_crcs(&self, table: &[u32], fresh: u64, lineage: &Lineage) -> DataCrcs {
        if !lineage.is_sealed() {
            return DataCrcs::default();
        }
        let blocks = table.iter().filter(|&&entry| entry != vhd::UNALLOCATED).count() as u64;
        DataCrcs::new(&self.place, blocks, self.place.slot_offset(fresh))
    }
}
