//! Naming another parent in a differencing image, or none, in one step that a crash leaves whole or undone.
//!
//! What the guest sees does not depend on which of the two headers counts: the caller has seen to that, durably. Order, each step
//! durable before the next: the new locators, in pages that the old header does not name · one journal entry with images of the
//! start of the file (cookie dirty) and of its backup · the start of the file · the backup. A tear of either copy, and a mixture of the
//! two headers that passes for one, is made good by the images; an image durable before its locators would name nothing.

use super::Layer;
use super::create::ParentLink;
use super::headers::{HeaderPair, pair_bytes};
use super::session::SessionCore;
use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::ext::{
    FixedParent, HEADER_BACKUP_OFFSET, LOCATORS_END, LOCATORS_OFFSET, Lineage, PAGE_BYTES, Placement, SealId,
};
use crate::journal::Failure;
use crate::vfs::FileExt;
use crate::vhd::{DiskType, DynamicHeader, HeaderCookie, ParentLocator, Timestamp, UniqueId};
use std::ops::Range;

const PAGE: usize = PAGE_BYTES as usize;

/// Payloads of locators, and where they go.
type Payloads = Vec<(u64, Vec<u8>)>;

impl Layer {
    /// Makes the image name `parent` as its parent from now on; without one it becomes a dynamic disk, of which every block that
    /// is allocated must be whole. All that was written before is made durable first. What a guest sees must be the same over
    /// either parent. The layer itself goes on over what it is used with.
    ///
    /// After a failure on the way the layer is stopped, and the next open finds the old parent or the new one.
    pub(crate) fn repoint(&self, parent: Option<&ParentLink>) -> Result<()> {
        let session = self.session()?;
        let _one_at_a_time = session.closing.lock();
        let mut core = session.core.lock();
        session.check(&self.path)?;
        self.check_open()?;
        if self.place.temporary.is_some() {
            let what = "it was made by another program and has no room for other parent locators: run \
                        `cowvhd upgrade` on it first";
            return Err(Error::Unsupported { path: self.path.clone(), what: what.into() });
        }
        if !defect::active(Defect::RepointWithoutFlush) {
            self.flush_locked(session, &mut core)?;
            // So that the ring has room, and that nothing but the headers waits to come in place.
            self.reclaim_locked(session, &mut core)?;
        }
        let (pair, locators) = self.new_headers(&core.headers, parent)?;
        let result = self.write_headers(&mut core, &pair, &locators);
        result.map_err(|failure| session.failed(&mut core, &*self.file, &self.path, failure))?;
        core.headers = pair;
        // Whoever finds the new parent and the old lineage goes by the parent's id, and takes the lineage for none.
        let lineage = core.superblocks.current.lineage;
        let none = Lineage {
            parent_seal: SealId::default(),
            parent_id: UniqueId::default(),
            fixed_parent: FixedParent::default(),
            ..lineage
        };
        let lineage = parent.map_or(none, |parent| parent.in_lineage(&none));
        if lineage == core.superblocks.current.lineage {
            return Ok(());
        }
        core.superblocks.current.lineage = lineage;
        let written = core.superblocks.write_next(&*self.file);
        written.map_err(|error| Error::io(&self.path, "writing a superblock", error))
    }

    /// The headers with another parent, and the payloads of its locators with their places.
    fn new_headers(
        &self,
        (footer, header): &HeaderPair,
        parent: Option<&ParentLink>,
    ) -> Result<(HeaderPair, Payloads)> {
        let (mut footer, mut header) = (footer.clone(), header.clone());
        let Some(parent) = parent else {
            for block in 0..self.place.table_entries {
                if self.is_partial(block)? {
                    let what = format!("{}: block {block} shows what is below in part", self.path.display());
                    return Err(Error::Invalid { what });
                }
            }
            footer.disk_type = DiskType::Dynamic;
            header.parent_unique_id = UniqueId::default();
            header.parent_timestamp = Timestamp::default();
            header.locators = [ParentLocator::default(); 8];
            header.set_parent_name(&[]).map_err(|error| error.at(&self.path, 0))?;
            return Ok(((footer, header), Vec::new()));
        };
        let free = free_locator_pages(&self.place, &header).ok_or_else(|| Error::Unsupported {
            path: self.path.clone(),
            what: "it has no room for other parent locators: convert it (`cowvhd convert`) and use the copy"
                .into(),
        })?;
        let locators = parent.describe(&mut header, free)?;
        Ok(((footer, header), locators))
    }

    fn write_headers(
        &self,
        core: &mut SessionCore,
        (footer, header): &HeaderPair,
        locators: &[(u64, Vec<u8>)],
    ) -> Result<(), Failure> {
        let file = &*self.file;
        let failed = |operation, fatal| move |error| Failure { operation, error, fatal };
        for (offset, payload) in locators {
            let mut page = payload.clone();
            page.resize(PAGE, 0);
            file.write_all_at(&page, *offset).map_err(failed("writing a parent locator", false))?;
        }
        if !defect::active(Defect::RepointBeforeLocators) {
            core.journal.sync(file)?;
        }
        let dirty = DynamicHeader { cookie: HeaderCookie::Dirty, ..header.clone() };
        let front = page_of(&pair_bytes(footer, &dirty));
        let backup = page_of(&pair_bytes(footer, header));
        if !defect::active(Defect::RepointWithoutImages) {
            core.journal.append_images_of(file, &[(0, &front), (HEADER_BACKUP_OFFSET, &backup)])?;
        }
        // From here on a failure must keep the journal's tails from passing that entry.
        let failed = |operation| failed(operation, true);
        if defect::active(Defect::RepointCopiesAtOnce) {
            file.write_all_at(&front, 0).map_err(failed("writing the headers"))?;
            file.write_all_at(&backup, HEADER_BACKUP_OFFSET).map_err(failed("writing the headers"))?;
            return core.journal.sync(file);
        }
        file.write_durable_at(&front, 0).map_err(failed("writing the start of the file"))?;
        file.write_durable_at(&backup, HEADER_BACKUP_OFFSET)
            .map_err(failed("writing the header backup at offset 12288"))
    }
}

fn page_of(bytes: &[u8]) -> Vec<u8> {
    let mut page = bytes.to_vec();
    page.resize(PAGE, 0);
    page
}

/// Pages for locators that `header` does not name.
fn free_locator_pages(place: &Placement, header: &DynamicHeader) -> Option<[u64; 3]> {
    let used: Vec<Range<u64>> =
        header.locators.iter().filter_map(|locator| locator.payload_range().ok().flatten()).collect();
    let end = LOCATORS_END.min(place.ring_offset);
    let mut free = (LOCATORS_OFFSET..end)
        .step_by(PAGE)
        .filter(|page| page + PAGE_BYTES <= end)
        .filter(|page| used.iter().all(|used| used.end <= *page || page + PAGE_BYTES <= used.start));
    Some([free.next()?, free.next()?, free.next()?])
}
