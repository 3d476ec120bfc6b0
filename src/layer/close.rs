//! Clean close: everything in place, freed slots punched, the file cut, then in this order, each durable before the next:
//! end footer · superblock(clean, fingerprint) · normal cookie; last the modification time that the fingerprint names.

use super::Layer;
use super::open::write_header;
use super::session::{Session, SessionCore};
use super::table::{Survey, entries_crc};
use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::ext::{Fingerprint, SessionId, State};
use crate::vfs::FileExt;
use crate::vhd::HeaderCookie;

impl Layer {
    /// Closes the image cleanly, so that every VHD tool can open it. Waits for calls under way; later ones fail. Closing
    /// again does nothing. After a failure the image stays dirty and the next open recovers it.
    pub(crate) fn close(&self) -> Result<()> {
        let Some(session) = &self.session else { return Ok(()) };
        if !self.map.close() {
            return Ok(());
        }
        let mut core = session.core.lock();
        if defect::active(Defect::CloseCookieFirst) {
            let _ = write_header(&*self.file, &self.header, HeaderCookie::Normal);
        }
        let result = self
            .flush_locked(session, &mut core)
            .and_then(|()| self.reclaim_locked(session, &mut core))
            .and_then(|()| self.write_clean_end(session, &mut core));
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

    fn write_clean_end(&self, session: &Session, core: &mut SessionCore) -> Result<()> {
        let file = &*self.file;
        let io = |operation: &'static str| move |error| Error::io(&self.path, operation, error);
        let entries = core.journal.table();
        let survey = Survey::new(&self.path, &self.place, entries, None)?;
        let end = self.place.slot_offset(survey.fresh);
        let bat_crc = entries_crc(entries);

        let file_bytes = self.place.file_bytes(survey.fresh);
        file.set_len(file_bytes).map_err(io("cutting the file behind its last block"))?;
        session.allocator.lock().set_file_bytes(file_bytes);
        let footer = self.footer.to_bytes();
        file.write_all_at(&footer, end).map_err(io("writing the footer"))?;
        if !defect::active(Defect::CloseWithoutSync) {
            file.sync_data().map_err(io("syncing the image"))?;
        }

        let modified = self.vfs.now();
        let superblock = &mut core.superblocks.current;
        superblock.state = State::Clean;
        superblock.session = SessionId::default();
        superblock.next_allocation = session.allocator.lock().next_allocation();
        superblock.fingerprint = Fingerprint {
            file_bytes,
            footer_crc: crc32fast::hash(&footer),
            header_crc: crc32fast::hash(&self.header.to_bytes()),
            bat_crc,
            modified,
        };
        core.superblocks.write_next(file).map_err(io("writing a superblock"))?;
        write_header(file, &self.header, HeaderCookie::Normal).map_err(io("writing the dynamic header"))?;
        file.set_modified(modified).map_err(io("setting the modification time"))
    }
}
