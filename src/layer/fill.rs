//! Bringing into a differencing layer what shows through it from below, without changing what a guest sees.
//!
//! It is a write of absent units with what is there already: whoever writes to one of them meanwhile waits, and overwrites (I8).
//!
//! What stands in whole pages of a file beneath shares their space, where the file system can, and is not read: zeros that somebody
//! wrote there take the space that they took before. Everything else is read, looked through for zeros, and written.

use super::below::{Below, Stored};
use super::map::Mapping;
use super::units::{self, UNIT_BYTES};
use super::write::WriteGuard;
use super::{Layer, Located};
use crate::defect::{self, Defect};
use crate::error::Result;
use crate::journal::zero_range;
use std::io;
use std::ops::Range;

/// Pieces below this part of a block are copied: each that is shared is an extent more to the file system. Of blocks of 2 MiB, 64 KiB.
const LEAST_SHARED_PART: u64 = 32;

/// What stands in one piece of at least so many bytes beneath a layer with blocks of `block_bytes` is shared, where it can be.
pub(crate) fn least_shared(block_bytes: u64) -> u64 {
    (block_bytes / LEAST_SHARED_PART).max(UNIT_BYTES)
}

impl Layer {
    /// Copies up what of bytes `range` of `block`, which is whole units, is not here. Returns how many bytes that was. Where it fails
    /// for lack of space it may succeed after [`Layer::reclaim`].
    pub(crate) fn fill(&self, block: u32, range: Range<u64>, below: &dyn Below) -> Result<u64> {
        let mut filled = 0;
        for run in self.absent_units(block, range)? {
            filled += self.prepare(block, run)?.fill(below)?;
        }
        Ok(filled)
    }

    /// The runs of units in `range` of `block` that are not here; none in a root disk.
    pub(crate) fn absent_units(&self, block: u32, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        let Some(units) = &self.units else { return Ok(Vec::new()) };
        loop {
            let (mapping, _pin) = self.map.get_pinned(block);
            return Ok(match self.verify(block, mapping)? {
                Mapping::Whole(_) => Vec::new(),
                Mapping::Absent | Mapping::Unverified(_) => std::iter::once(range).collect(),
                Mapping::Partial(slot) => match units.get(slot) {
                    Some(_) if defect::active(Defect::MergeOverwrites) => std::iter::once(range).collect(),
                    Some(present) => {
                        present.runs(range).filter(|(_, present)| !present).map(|(run, _)| run).collect()
                    }
                    // It is whole by now, or somewhere else.
                    None => continue,
                },
            });
        }
    }

    /// From now on blocks that are taken are whole, as those of a root disk, also in a differencing layer: nothing shows through where
    /// it has no block but zeros. No write may be under way.
    pub(crate) fn take_whole_blocks(&self) {
        if let Some(units) = self.units.as_ref().filter(|_| !defect::active(Defect::MergeTakesPartialBlocks))
        {
            units.take_whole_blocks();
        }
    }

    /// Whether some of the units of a block that is allocated are not here.
    pub(crate) fn is_partial(&self, block: u32) -> Result<bool> {
        let (mapping, _pin) = self.map.get_pinned(block);
        Ok(matches!(self.verify(block, mapping)?, Mapping::Partial(_)))
    }
}

impl WriteGuard<'_> {
    /// Writes what shows through in the units that are still absent.
    fn fill(self, below: &dyn Below) -> Result<u64> {
        let mut filled = 0;
        let mut absent: Option<Range<u64>> = None;
        for unit in units::touched(&self.range) {
            if self.is_absent(unit) || defect::active(Defect::MergeOverwrites) {
                let start = u64::from(unit) * UNIT_BYTES;
                let run = absent.get_or_insert(start..start);
                run.end = start + UNIT_BYTES;
                continue;
            }
            if let Some(run) = absent.take() {
                filled += self.fill_run(run, below)?;
            }
        }
        if let Some(run) = absent {
            filled += self.fill_run(run, below)?;
        }
        // Otherwise somebody else has brought all of them.
        if filled > 0 {
            self.commit_as(false);
        }
        Ok(filled)
    }

    /// Brings units that are absent. Returns how many bytes that was.
    fn fill_run(&self, run: Range<u64>, below: &dyn Below) -> Result<u64> {
        let mut at = run.start;
        for part in self.sharable(run.clone(), below)? {
            if self.share(&part)? {
                self.copy(at..part.range.start, below)?;
                at = part.range.end;
            }
        }
        self.copy(at..run.end, below)?;
        Ok(run.end - run.start)
    }

    /// The parts of `run`, in bytes of the block, that are whole pages of a file beneath in whole pages of this one.
    fn sharable(&self, run: Range<u64>, below: &dyn Below) -> Result<Vec<Stored>> {
        let (layer, mut found) = (self.layer, Vec::new());
        let is_whole = |at: u64| at.is_multiple_of(UNIT_BYTES);
        if !is_whole(layer.place.data_offset(self.slot)) || defect::active(Defect::MergeOverwrites) {
            return Ok(found);
        }
        let start = layer.guest_offset(self.block);
        let least = least_shared(layer.place.block_bytes.into());
        layer.locate(self.block, run, &mut |part, located| {
            // Another tool has written a part of a unit.
            if located != Located::Absent {
                return Ok(());
            }
            below.stored(start + part.start..start + part.end, &mut |Stored { range, file, offset }| {
                let first = (range.start - start).next_multiple_of(UNIT_BYTES);
                let end = match defect::active(Defect::MergeSharesUnitsInPart) {
                    true => (range.end - start).next_multiple_of(UNIT_BYTES),
                    false => (range.end - start) / UNIT_BYTES * UNIT_BYTES,
                };
                let offset = offset + (start + first - range.start);
                if first + least <= end && is_whole(offset) {
                    found.push(Stored { range: first..end, file, offset });
                }
            })
        })?;
        Ok(found)
    }

    /// Has a part share the space of what is beneath; false where it cannot be shared.
    fn share(&self, Stored { range, file, offset }: &Stored) -> Result<bool> {
        let length = range.end - range.start;
        let at = self.place_of(range.start, length)?;
        match self.layer.file.share_from(at, &**file, *offset, length) {
            Ok(()) => Ok(true),
            // There may be space for a copy, and if not, writing says so.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Unsupported | io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                ) =>
            {
                Ok(false)
            }
            Err(error) => Err(self.layer.io_error("sharing", at, length as usize, error)),
        }
    }

    /// Reads what shows through and writes it.
    fn copy(&self, run: Range<u64>, below: &dyn Below) -> Result<()> {
        if run.is_empty() {
            return Ok(());
        }
        let length = run.end - run.start;
        let mut bytes = vec![0; length as usize];
        match defect::active(Defect::MergeOverwrites) {
            true => below.read(self.layer.guest_offset(self.block) + run.start, &mut bytes)?,
            false => self.layer.read_block(self.block, run.start, &mut bytes, below)?,
        }
        if bytes.iter().all(|&byte| byte == 0) {
            // What lies under bits that are not set may be anything.
            let at = self.place_of(run.start, length)?;
            let zeroed = zero_range(&*self.layer.file, at, length);
            zeroed.map_err(|error| self.layer.io_error("zeroing", at, length as usize, error))
        } else {
            self.put(run.start, &bytes)
        }
    }
}
