//! Preparing and committing changes of guest data.
//!
//! A write gets a [`WriteGuard`] that says where its bytes go and keeps the slot from being reused, moves the payload, and
//! commits. It counts from its commit. A guard dropped without a commit is a failed write.

use super::Layer;
use super::dirty::UnderWay;
use super::map::{Mapping, Pin};
use super::session::Session;
use crate::error::{Error, ErrorKind, Result};
use crate::journal::{DirtyExtent, write_zeros, zero_range};
use crate::sync::Ordering;
use crate::vfs::FileExt;
use crate::vhd;
use std::ops::Range;

/// More freed slots than this waiting to be reused make the engine bring them back itself.
const MAX_WAITING_SLOTS: usize = 256;

/// A write under way to one block.
#[derive(Debug)]
pub(crate) struct WriteGuard<'a> {
    layer: &'a Layer,
    session: &'a Session,
    block: u32,
    slot: u32,
    /// The bytes of the block that are written.
    range: Range<u64>,
    allocating: bool,
    committed: bool,
    /// Before the pin, so that it ends first.
    under_way: Option<UnderWay<'a>>,
    _pin: Option<Pin<'a>>,
}

impl Layer {
    /// Where a write to bytes `range` of `block` goes: its slot, or a new one. Whoever holds the payload moves it to the
    /// guard's [`WriteGuard::file_offset`] and then commits.
    pub(crate) fn prepare(&self, block: u32, range: Range<u64>) -> Result<WriteGuard<'_>> {
        let session = self.session()?;
        session.check(&self.path)?;
        loop {
            let (mapping, pin) = self.map.get_pinned(block);
            let guard = |slot, allocating, pin| WriteGuard {
                layer: self,
                session,
                block,
                slot,
                range: range.clone(),
                allocating,
                committed: false,
                under_way: None,
                _pin: pin,
            };
            let mut guard = match self.verify(block, mapping)? {
                Mapping::Whole(slot) => guard(slot, false, pin),
                Mapping::Partial(_) => {
                    self.check_open()?;
                    self.complete_block(session, block)?;
                    continue;
                }
                Mapping::Absent | Mapping::Unverified(_) => match self.ride(session, block)? {
                    Some((slot, pin)) => guard(slot, true, pin),
                    // Somebody published the block in between.
                    None => continue,
                },
            };
            self.check_open()?;
            let at = guard.file_offset();
            guard.under_way = Some(session.writes.begin(at..at + (range.end - range.start)));
            return Ok(guard);
        }
    }

    /// Joins or starts an allocation of an absent block.
    fn ride<'a>(&'a self, session: &Session, block: u32) -> Result<Option<(u32, Option<Pin<'a>>)>> {
        let mut allocator = session.allocator.lock();
        self.check_open()?;
        if self.map.get(block) != Mapping::Absent {
            return Ok(None);
        }
        match allocator.ride(&*self.file, block) {
            Ok(Some(slot)) => Ok(Some((slot, self.map.pin(slot)))),
            Ok(None) => {
                let what = "the file has reached the 2 TiB that a block table can address".to_string();
                Err(Error::NoSpace { path: self.path.clone(), what })
            }
            Err(error) => Err(Error::io(&self.path, "extending the image", error)),
        }
    }

    /// Runs a write; where no space is left for it, brings the freed slots back, with their space, and runs it once more.
    fn with_space(&self, write: impl Fn() -> Result<()>) -> Result<()> {
        let result = write();
        if !matches!(&result, Err(error) if error.kind() == ErrorKind::NoSpace) {
            return result;
        }
        // The guard of the write that failed is gone: nothing of it keeps a slot from coming back.
        match self.reclaim() {
            Err(error) if error.kind() != ErrorKind::NoSpace => Err(error),
            _ => write(),
        }
    }

    /// Writes `buf` at byte `offset` of `block`.
    pub(crate) fn write_block(&self, block: u32, offset: u64, buf: &[u8]) -> Result<()> {
        self.with_space(|| self.prepare(block, offset..offset + buf.len() as u64)?.write(buf))
    }

    /// Makes a range within one block read as zeros; with `keep_allocated` the space stays reserved in the file.
    pub(crate) fn zero_block(
        &self,
        block: u32,
        offset: u64,
        length: u64,
        keep_allocated: bool,
    ) -> Result<()> {
        if self.map.get(block) == Mapping::Absent && !keep_allocated {
            self.session()?.check(&self.path)?;
            return Ok(());
        }
        self.with_space(|| {
            let guard = self.prepare(block, offset..offset + length)?;
            let at = guard.file_offset();
            let result = if keep_allocated {
                write_zeros(&*self.file, at, length)
            } else {
                zero_range(&*self.file, at, length)
            };
            result.map_err(|error| self.io_error("zeroing", at, length as usize, error))?;
            guard.commit_as(true);
            Ok(())
        })
    }

    /// Gives a whole block back: it reads as zeros from now on.
    pub(crate) fn free_block(&self, block: u32) -> Result<()> {
        let session = self.session()?;
        session.check(&self.path)?;
        let waiting = {
            // The pin keeps a close from finishing under us.
            let (_, _pin) = self.map.get_pinned(block);
            self.check_open()?;
            let mut allocator = session.allocator.lock();
            if !allocator.free(&self.map, block) {
                return Ok(());
            }
            allocator.freed_since_flush()
        };
        if waiting > MAX_WAITING_SLOTS {
            self.reclaim()?;
        }
        Ok(())
    }
}

impl WriteGuard<'_> {
    /// The file offset at which the payload goes.
    pub(crate) fn file_offset(&self) -> u64 {
        self.layer.place.data_offset(self.slot) + self.range.start
    }

    /// Writes the payload, as long as the range the guard was made for, and commits.
    pub(crate) fn write(self, buf: &[u8]) -> Result<()> {
        let at = self.file_offset();
        self.layer
            .file
            .write_all_at(buf, at)
            .map_err(|error| self.layer.io_error("writing", at, buf.len(), error))?;
        self.commit();
        Ok(())
    }

    /// The payload is in the file: publishes the block, if it is new. From here on the write counts.
    pub(crate) fn commit(self) {
        self.commit_as(false);
    }

    fn commit_as(mut self, zero: bool) {
        self.committed = true;
        let sectors = |bytes: u64| (bytes / vhd::SECTOR) as u32;
        let extent = DirtyExtent {
            block: self.block,
            slot: self.slot,
            first_sector: sectors(self.range.start),
            sectors: sectors(self.range.end - self.range.start),
            zero,
        };
        if self.allocating {
            // One step for a flush's cut: never the map change without its data.
            let mut allocator = self.session.allocator.lock();
            allocator.commit(&self.layer.map, self.block, self.slot);
            self.session.dirty.add(extent);
        } else {
            self.session.dirty.add(extent);
        }
        // After all that: a flush that sees this count also sees the change.
        self.session.commits.fetch_add(1, Ordering::SeqCst);
    }
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        if self.allocating {
            self.session.allocator.lock().abort(&self.layer.map, self.block, self.slot);
        }
        // Part of the payload may have reached the file, where the next flush has to sync it.
        self.session.commits.fetch_add(1, Ordering::SeqCst);
    }
}
