//! Preparing and committing changes of guest data.
//!
//! A write gets a [`WriteGuard`] that says where its bytes go and keeps the slot from being reused, moves the payload, and
//! commits. It counts from its commit. A guard dropped without a commit is a failed write.
//!
//! In a differencing layer a write to an absent 4 KiB unit brings the unit: what the write leaves of it is copied up from
//! below, the unit is written whole, and its bits are set with the commit (I8).

use super::Layer;
use super::allocator::Written;
use super::below::Below;
use super::dirty::UnderWay;
use super::map::{Mapping, Pin};
use super::session::Session;
use super::units::{self, Bringing, UNIT_BYTES, UNIT_SECTORS, Units};
use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::ext::PAGE_BYTES;
use crate::journal::{DirtyExtent, write_zeros, zero_range};
use crate::sync::Ordering;
use crate::vfs::FileExt;
use crate::vhd;
use std::ops::Range;

/// With more freed slots than this waiting to be reused the engine brings them back itself.
const MAX_WAITING_SLOTS: usize = 256;

/// A write under way to one block.
#[derive(Debug)]
pub(crate) struct WriteGuard<'a> {
    pub(super) layer: &'a Layer,
    session: &'a Session,
    pub(super) block: u32,
    pub(super) slot: u32,
    /// The bytes of the block that are written.
    pub(super) range: Range<u64>,
    allocating: bool,
    committed: bool,
    /// The units that the write brings, with the table that it tells.
    bringing: Option<(&'a Units, Bringing<'a>)>,
    /// Before the pin, so that it ends first.
    under_way: Option<UnderWay<'a>>,
    _pin: Option<Pin<'a>>,
}

impl Layer {
    /// Where a write to bytes `range` of `block` goes: its slot, or a new one. Whoever holds the payload moves it to the
    /// guard's [`WriteGuard::place_of`] and then commits.
    pub(crate) fn prepare(&self, block: u32, range: Range<u64>) -> Result<WriteGuard<'_>> {
        let session = self.session()?;
        session.check(&self.path)?;
        let mut bringing: Option<(&Units, Bringing<'_>)> = None;
        loop {
            let (mapping, pin) = self.map.get_pinned(block);
            let mapping = self.verify(block, mapping)?;
            // Where the write needs units that are absent, it waits for whoever brings them now, and looks again.
            let absent = match (mapping, &self.units) {
                (Mapping::Partial(slot), Some(units)) => match units.get(slot) {
                    Some(present) => (!present.all(units::touched(&range))).then_some(units),
                    None => continue,
                },
                (Mapping::Absent, Some(units)) => (!units.takes_whole_blocks()).then_some(units),
                _ => None,
            };
            if let Some(units) = absent.filter(|_| bringing.is_none()) {
                drop(pin);
                self.check_open()?;
                bringing = Some((units, units.bring(block, units::touched(&range))));
                continue;
            }
            let (slot, allocating, pin) = match mapping {
                Mapping::Partial(slot) if self.units.is_none() || self.place.slot_index(slot).is_none() => {
                    drop(pin);
                    self.check_open()?;
                    self.complete_block(session, block)?;
                    continue;
                }
                Mapping::Whole(slot) | Mapping::Partial(slot) => (slot, false, pin),
                Mapping::Absent | Mapping::Unverified(_) => match self.ride(session, block)? {
                    Some((slot, pin)) => (slot, true, pin),
                    // Somebody published the block in between.
                    None => continue,
                },
            };
            let bringing = bringing.filter(|_| absent.is_some());
            let touched = match bringing {
                Some(_) => range.start / UNIT_BYTES * UNIT_BYTES..range.end.next_multiple_of(UNIT_BYTES),
                None => range.clone(),
            };
            let mut guard = WriteGuard {
                layer: self,
                session,
                block,
                slot,
                range,
                allocating,
                committed: false,
                bringing,
                under_way: None,
                _pin: pin,
            };
            self.check_open()?;
            let at = self.place.data_offset(slot);
            guard.under_way = Some(session.writes.begin(at + touched.start..at + touched.end));
            return Ok(guard);
        }
    }

    /// Joins or starts an allocation of an absent block.
    fn ride<'a>(&'a self, session: &Session, block: u32) -> Result<Option<(u32, Option<Pin<'a>>)>> {
        let mut allocator = session.allocator.lock();
        self.check_open()?;
        if self.map.get(block) != Mapping::Absent && !defect::active(Defect::RideWithoutSecondLook) {
            return Ok(None);
        }
        match allocator.ride(&*self.file, block) {
            Ok(Some((slot, first))) => {
                if let Some(units) = self.units.as_ref().filter(|units| first && !units.takes_whole_blocks())
                {
                    units.insert_empty(slot, self.place.block_bytes);
                }
                Ok(Some((slot, self.map.pin(slot))))
            }
            Ok(None) => {
                let what = "the file has reached the 2 TiB that a block table can address".to_string();
                Err(Error::NoSpace { path: self.path.clone(), what })
            }
            Err(error) => Err(Error::io(&self.path, "extending the image", error)),
        }
    }

    /// Writes `buf` at byte `offset` of `block`. Where it fails for lack of space it may succeed after [`Layer::reclaim`].
    pub(crate) fn write_block(&self, block: u32, offset: u64, buf: &[u8], below: &dyn Below) -> Result<()> {
        self.prepare(block, offset..offset + buf.len() as u64)?.write(buf, below)
    }

    /// Makes a range within one block read as zeros; with `keep_allocated` the space stays reserved in the file. Where it fails
    /// for lack of space it may succeed after [`Layer::reclaim`].
    pub(crate) fn zero_block(
        &self,
        block: u32,
        range: Range<u64>,
        keep_allocated: bool,
        below: &dyn Below,
    ) -> Result<()> {
        let start = self.guest_offset(block);
        let nothing_to_hide = |range: &Range<u64>| {
            let is_zero = || below.is_zero(start + range.start..start + range.end);
            Ok(!keep_allocated && (defect::active(Defect::ZerosDoNotHide) || is_zero()?))
        };
        if self.map.get(block) == Mapping::Absent && nothing_to_hide(&range)? {
            return self.session()?.check(&self.path);
        }
        let Some(units) = &self.units else { return self.zero_units(block, range, keep_allocated) };
        // Parts of units may need the rest of their unit from below.
        let first_whole = range.start.next_multiple_of(UNIT_BYTES).min(range.end);
        let end_whole = (range.end / UNIT_BYTES * UNIT_BYTES).max(first_whole);
        for part in [range.start..first_whole, end_whole..range.end] {
            if part.is_empty() || (nothing_to_hide(&part)? && self.is_absent(units, block, &part)) {
                continue;
            }
            let zeros = [0; UNIT_BYTES as usize];
            let zeros = zeros.get(..(part.end - part.start) as usize).unwrap_or_default();
            self.write_block(block, part.start, zeros, below)?;
        }
        if first_whole < end_whole {
            self.zero_units(block, first_whole..end_whole, keep_allocated)
        } else {
            Ok(())
        }
    }

    /// Whether nothing of a range within one unit of a differencing layer is here.
    fn is_absent(&self, units: &Units, block: u32, part: &Range<u64>) -> bool {
        let (mapping, _pin) = self.map.get_pinned(block);
        match mapping {
            Mapping::Absent => true,
            Mapping::Partial(slot) => units.get(slot).is_some_and(|present| {
                !present.is_mixed() && units::touched(part).all(|unit| !present.get(unit))
            }),
            Mapping::Whole(_) | Mapping::Unverified(_) => false,
        }
    }

    /// Zeroes a range within one block; of a differencing layer, whole units.
    fn zero_units(&self, block: u32, range: Range<u64>, keep_allocated: bool) -> Result<()> {
        let length = range.end - range.start;
        let start = range.start;
        let guard = self.prepare(block, range)?;
        let at = guard.place_of(start, length)?;
        let result = if keep_allocated {
            write_zeros(&*self.file, at, length)
        } else {
            zero_range(&*self.file, at, length)
        };
        result.map_err(|error| self.io_error("zeroing", at, length as usize, error))?;
        guard.commit_as(true);
        Ok(())
    }

    /// Gives a whole block back: it reads as zeros from now on. True where so many slots wait to be reused that the caller
    /// should bring them back ([`Layer::reclaim`]).
    pub(crate) fn free_block(&self, block: u32) -> Result<bool> {
        let session = self.session()?;
        session.check(&self.path)?;
        // The pin keeps a close from finishing under us.
        let (_, _pin) = self.map.get_pinned(block);
        self.check_open()?;
        let mut allocator = session.allocator.lock();
        Ok(allocator.free(&self.map, block) && allocator.freed_since_flush() > MAX_WAITING_SLOTS)
    }
}

impl WriteGuard<'_> {
    /// The file offset at which bytes of the block go, from `offset` on. Fails, before anything is written, where that would be
    /// over metadata: whatever went wrong before, a guest never writes there.
    pub(super) fn place_of(&self, offset: u64, length: u64) -> Result<u64> {
        let (layer, slot) = (self.layer, self.slot);
        let mut at = layer.place.data_offset(slot) + offset;
        if defect::active(Defect::GuestWritesToMetadata) && self.block % 3 == 2 {
            at = at.saturating_sub(offset + PAGE_BYTES);
        }
        // Where other programs have placed blocks they may lie off the grid.
        let is_place = layer.place.slot_index(slot).is_some() || !layer.described;
        match is_place && layer.place.is_data(slot, at, length) {
            true => Ok(at),
            false => Err(Error::Damaged {
                path: layer.path.clone(),
                what: format!(
                    "{length} bytes of block {} would go to file offset {at}, over metadata; nothing was written",
                    self.block
                ),
                hint: "this is a fault of the program, or of the machine's memory: report it, and run `cowvhd check`",
            }),
        }
    }

    /// Writes the payload, as long as the range the guard was made for, and commits.
    pub(crate) fn write(self, buf: &[u8], below: &dyn Below) -> Result<()> {
        if self.bringing.is_some() {
            return self.write_units(buf, below);
        }
        self.put(self.range.start, buf)?;
        self.commit_as(false);
        Ok(())
    }

    /// Writes units of which some are absent: where the range begins or ends inside one of those, whole.
    fn write_units(mut self, buf: &[u8], below: &dyn Below) -> Result<()> {
        let Range { start, end } = self.range;
        let (first_unit, last_unit) = (start / UNIT_BYTES, (end - 1) / UNIT_BYTES);
        let mut middle = self.range.clone();
        for unit in std::iter::once(first_unit).chain((last_unit != first_unit).then_some(last_unit)) {
            let whole = unit * UNIT_BYTES..(unit + 1) * UNIT_BYTES;
            let covered = start <= whole.start && whole.end <= end;
            if covered || !self.is_absent(unit as u32) {
                continue;
            }
            let mut bytes = [0; UNIT_BYTES as usize];
            if !defect::active(Defect::NoCopyUp) {
                self.layer.read_block(self.block, whole.start, &mut bytes, below)?;
            }
            let (from, to) = (start.max(whole.start), end.min(whole.end));
            let target = bytes.get_mut((from - whole.start) as usize..(to - whole.start) as usize);
            let source = buf.get((from - start) as usize..(to - start) as usize);
            if let (Some(target), Some(source)) = (target, source) {
                target.copy_from_slice(source);
            }
            self.put(whole.start, &bytes)?;
            self.range = self.range.start.min(whole.start)..self.range.end.max(whole.end);
            if unit == first_unit {
                middle.start = to;
            } else {
                middle.end = from;
            }
        }
        if middle.start < middle.end {
            let rest = buf.get((middle.start - start) as usize..(middle.end - start) as usize);
            self.put(middle.start, rest.unwrap_or_default())?;
        }
        self.commit_as(false);
        Ok(())
    }

    /// Whether a unit that this write brings is absent still; nobody else changes that.
    pub(super) fn is_absent(&self, unit: u32) -> bool {
        match &self.bringing {
            Some((units, _)) => units.get(self.slot).is_none_or(|present| !present.get(unit)),
            None => false,
        }
    }

    pub(super) fn put(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let at = self.place_of(offset, bytes.len() as u64)?;
        let written = self.layer.file.write_all_at(bytes, at);
        written.map_err(|error| self.layer.io_error("writing", at, bytes.len(), error))
    }

    /// The payload is in the file: publishes what is new. From here on the write counts.
    pub(super) fn commit_as(mut self, zero: bool) {
        self.committed = true;
        let sectors = |bytes: u64| (bytes / vhd::SECTOR) as u32;
        let extent = DirtyExtent {
            block: self.block,
            slot: self.slot,
            first_sector: sectors(self.range.start),
            sectors: sectors(self.range.end - self.range.start),
            zero,
        };
        if self.allocating || self.bringing.is_some() {
            // One step for a flush's cut: never the map change without its data.
            let mut allocator = self.session.allocator.lock();
            match &self.bringing {
                None => {
                    allocator.commit(&self.layer.map, self.block, self.slot, self.allocating, Written::Whole)
                }
                Some((units, bringing)) => {
                    let block_units = (u64::from(self.layer.place.block_bytes) / UNIT_BYTES) as u32;
                    let written = match bringing.units == (0..block_units) {
                        true => Written::Whole,
                        false => Written::Sectors {
                            first: bringing.units.start * UNIT_SECTORS,
                            count: (bringing.units.end - bringing.units.start) * UNIT_SECTORS,
                        },
                    };
                    allocator.commit(&self.layer.map, self.block, self.slot, self.allocating, written);
                    self.publish_units(units, bringing.units.clone());
                }
            }
            if defect::active(Defect::CutBetweenMapAndData) {
                drop(allocator);
            }
            self.session.dirty.add(extent);
        } else {
            self.session.dirty.add(extent);
        }
        // After all that: a flush that sees this count also sees the change.
        self.session.commits.fetch_add(1, Ordering::SeqCst);
    }

    /// Makes units visible that were brought; the caller holds the allocator's lock. Does nothing where the block was
    /// discarded in the meantime.
    fn publish_units(&self, units: &Units, brought: Range<u32>) {
        let map = &self.layer.map;
        match map.get(self.block) {
            Mapping::Partial(slot) if slot == self.slot => {
                let Some(present) = units.get(slot) else { return };
                present.set(brought);
                if present.is_whole() {
                    map.set(self.block, Mapping::Whole(slot));
                    units.remove(slot);
                }
            }
            Mapping::Whole(slot) if slot == self.slot => units.remove(slot),
            _ => {}
        }
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
