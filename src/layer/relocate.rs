//! Blocks of other programs that move to a slot of ours: those that share a page with the BAT, and those that are written to
//! while some of their sectors are not present.
//!
//! QEMU puts the first block of an empty image right behind the BAT, where the BAT's last page goes on. We write pages of
//! the BAT whole. So before the first of them is written, the block is copied to a slot of ours; after a sync one journal
//! entry frees the old place and allocates the new one. Until that entry is durable the block counts where it was.
//!
//! blktap and VirtualBox leave bits clear in a block's bitmap. Such a block is copied, as a guest sees it, before the first
//! write to it: so no write is ever under way in a block that moves, and we never change a bitmap.

use super::Layer;
use super::below::Nothing;
use super::map::Mapping;
use super::session::Session;
use super::units::PresentUnits;
use super::upgrade::blocks_in_the_way;
use crate::error::{Error, Result};
use crate::sync::Ordering;
use crate::vfs::FileExt;
use crate::vhd::{self, bitmap};
use std::ops::Range;

const COPY_BYTES: u64 = 256 * 1024;

impl Layer {
    /// Moves the blocks that share a page with metadata. If that fails, the image is closed again as well as it can be.
    pub(super) fn clear_table_pages(&self) -> Result<()> {
        let Some(session) = &self.session else { return Ok(()) };
        let in_the_way: Vec<u32> = match &self.upgrade {
            Some(target) => blocks_in_the_way(&self.map, target),
            None => (0..self.place.table_entries)
                .filter(|&block| {
                    let slot = self.map.get(block).slot();
                    slot.is_some_and(|slot| self.place.shares_metadata_page(slot))
                })
                .collect(),
        };
        if in_the_way.is_empty() {
            return Ok(());
        }
        let result = in_the_way.iter().try_for_each(|&block| self.move_block(session, block));
        let result = result.and_then(|()| self.flush());
        if result.is_err() {
            // What failed is what the caller has to know; the block is still where it was.
            let _ = self.close();
        }
        result
    }

    /// Moves a block before its first write, unless another write has done so.
    pub(super) fn complete_block(&self, session: &Session, block: u32) -> Result<()> {
        let _one_at_a_time = session.moving.lock();
        match self.map.get(block) {
            Mapping::Partial(_) => self.move_block(session, block),
            _ => Ok(()),
        }
    }

    /// Copies a block, to which nobody writes meanwhile, to a slot of ours and publishes it there.
    fn move_block(&self, session: &Session, block: u32) -> Result<()> {
        let old = self.map.get(block).slot();
        let slot = session.allocator.lock().reserve(&*self.file, block);
        let slot = slot.map_err(|error| Error::io(&self.path, "extending the image", error))?;
        let Some(slot) = slot else {
            let what = "a block that shares a page with metadata has to move".to_string();
            return Err(Error::NoSpace { path: self.path.clone(), what });
        };
        let copied = self.copy_block(block, slot);
        let mut allocator = session.allocator.lock();
        match &copied {
            // A discard that came in between has the last word.
            Ok(_) if self.map.get(block).slot() != old => allocator.give_up(slot),
            Ok(bits) => {
                if let (Some(units), Some(bits)) = (&self.units, bits) {
                    units.insert(slot, PresentUnits::of_moved_block(bits, self.place.block_bytes));
                }
                let runs = bits.as_ref().map(|bits| self.set_runs(bits));
                allocator.move_block(&self.map, block, slot, runs.as_deref());
                // The copy is no guest write that a small flush could journal: the flush that publishes it must sync.
                session.dirty.overflow();
            }
            Err(_) => allocator.give_up(slot),
        }
        drop(allocator);
        session.commits.fetch_add(1, Ordering::SeqCst);
        copied.map(drop)
    }

    /// The runs of sectors whose bits are set.
    fn set_runs(&self, bits: &[u8]) -> Vec<Range<u32>> {
        let sectors = (u64::from(self.place.block_bytes) / vhd::SECTOR) as u32;
        bitmap::runs(bits, 0..sectors).filter(|run| run.set).map(|run| run.sectors).collect()
    }

    /// Copies a block into a slot that reads as zeros: of a root disk all that a guest sees; of a partial block of a
    /// differencing layer what is present, and its bitmap is returned.
    fn copy_block(&self, block: u32, slot: u32) -> Result<Option<Vec<u8>>> {
        let length = u64::from(self.place.block_bytes);
        let bits = match self.mapping(block)? {
            Mapping::Partial(old) if self.units.is_some() => Some(self.bitmap(old)?),
            _ => None,
        };
        let mut buf = vec![0; COPY_BYTES.min(length) as usize];
        for offset in (0..length).step_by(buf.len()) {
            // Under 0 bits nobody looks: zeros do.
            self.read_block(block, offset, &mut buf, &Nothing)?;
            let at = self.place.data_offset(slot) + offset;
            if buf.iter().any(|&byte| byte != 0) {
                let written = self.file.write_all_at(&buf, at);
                written.map_err(|error| self.io_error("writing", at, buf.len(), error))?;
            }
        }
        Ok(bits)
    }
}
