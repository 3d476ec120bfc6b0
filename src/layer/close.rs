//! Clean close: everything in place, freed slots punched, the file cut, then in this order, each durable before the next:
//! end footer · superblock(clean, fingerprint) · normal cookie; last the modification time that the fingerprint names.

use super::Layer;
use super::open::write_header;
use super::session::{Session, SessionCore};
use super::table::{Survey, entries_crc};
use crate::defect::{self, Defect};
use crate::error::Result;
use crate::ext::{Fingerprint, SessionId, State, Superblock};
use crate::journal::Failure;
use crate::vfs::FileExt;
use crate::vhd::HeaderCookie;

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
            let _ = write_header(&*self.file, &core.headers.1, HeaderCookie::Normal);
        }
        let result = self
            .flush_locked(session, &mut core)
            .and_then(|()| self.reclaim_locked(session, &mut core))
            .and_then(|()| Survey::new(&self.path, &self.place, core.journal.table(), |_| u64::MAX))
            .and_then(|survey| {
                let result = self.write_clean_end(session, &mut core, survey.fresh);
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

    /// Once the sync has returned nothing that was acknowledged can be lost, and no later failure is called a failed sync.
    fn write_clean_end(&self, session: &Session, core: &mut SessionCore, fresh: u64) -> Result<(), Failure> {
        let file = &*self.file;
        let failed = |operation| move |error| Failure { operation, error, fatal: false };
        let (end, file_bytes) = (self.place.slot_offset(fresh), self.place.file_bytes(fresh));

        file.set_len(file_bytes).map_err(failed("cutting the file behind its last block"))?;
        session.allocator.lock().set_file_bytes(file_bytes);
        let footer = core.headers.0.to_bytes();
        file.write_all_at(&footer, end).map_err(failed("writing the footer"))?;
        if !defect::active(Defect::CloseWithoutSync) {
            core.journal.sync(file)?;
        }

        let modified = self.vfs.now();
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
            ..dirty
        };
        if let Err(error) = core.superblocks.write_next(file) {
            let sequence = core.superblocks.current.sequence;
            core.superblocks.current = Superblock { sequence, ..dirty };
            return Err(failed("writing a superblock")(error));
        }
        write_header(file, &core.headers.1, HeaderCookie::Normal)
            .map_err(failed("writing the dynamic header"))?;
        file.set_modified(modified).map_err(failed("setting the modification time"))
    }
}
