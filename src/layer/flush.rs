//! Flush: everything committed before the call is durable when it returns (I6).
//!
//! One flush at a time, from its cut to its durable entry; callers that arrive meanwhile share the next one. The cut is
//! taken first: all map changes and data committed so far. A *small* flush then writes both into the journal, in one
//! durable entry; the data stands in place as well, unsynced. A *full* flush syncs, then appends the map changes. Small
//! ones are for what the sync would have to allocate space for; overwrites alone are synced, which writes them once. Either
//! way a map record is durable only with or after the data it exposes (I1). The full flush's entry is left out where there
//! is nothing to say; it is needed, though, as long as a data record lives: or a crash would replay old data over what the
//! sync has just made durable (I7).

use super::Layer;
use super::dirty;
use super::session::{Session, SessionCore};
use crate::defect::{self, Defect};
use crate::error::Result;
use crate::journal::{DirtyExtent, Failure, MapChange};
use crate::sync::{Condvar, Mutex, Ordering};
use crate::vfs::FileExt;

/// What a flush has to make durable: everything committed before it was taken.
#[derive(Debug)]
struct Cut {
    changes: Vec<MapChange>,
    soiled: Vec<u32>,
    /// The data; `None` if it is too much to be journaled.
    dirty: Option<Vec<DirtyExtent>>,
    commits: u64,
}

impl Cut {
    fn take(session: &Session) -> Self {
        let mut allocator = session.allocator.lock();
        let (changes, soiled) = allocator.cut();
        let dirty = session.dirty.take();
        drop(allocator);
        // Last of all: a commit that is counted here is in the cut; one that is not makes the next flush look again.
        Cut { changes, soiled, dirty, commits: session.commits.load(Ordering::SeqCst) }
    }

    fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.dirty.as_ref().is_some_and(Vec::is_empty)
    }
}

/// More slots than this in quarantine make a flush bring them back, as does half a small disk.
const MAX_QUARANTINED_SLOTS: usize = 256;

/// After so many flushes of overwrites alone, live data records are retired: a sync and an entry, once; from then on a sync is
/// enough.
const OVERWRITE_FLUSHES_JOURNALED: u32 = 8;

/// Lets one flush run at a time and the waiting ones share the next.
#[derive(Debug, Default)]
pub(super) struct FlushGate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    running: bool,
    /// Flushes begun so far.
    begun: u64,
    /// The highest number among the flushes that succeeded.
    succeeded: u64,
}

impl FlushGate {
    /// Returns when a flush that began after this call has succeeded; runs it if nobody else does.
    fn pass(&self, flush: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut state = self.state.lock();
        let needed = state.begun + u64::from(!defect::active(Defect::FlushJoinsRunning));
        while state.running {
            self.changed.wait(&mut state);
            if state.succeeded >= needed {
                return Ok(());
            }
        }
        // A failed flush of somebody else proves nothing for us: we run our own and get our own error.
        state.running = true;
        state.begun += 1;
        let number = state.begun;
        drop(state);
        let result = flush();
        let mut state = self.state.lock();
        state.running = false;
        if result.is_ok() || defect::active(Defect::FailedFlushCounts) {
            state.succeeded = state.succeeded.max(number);
        }
        self.changed.notify_all();
        result
    }
}

/// Whether a small flush would be the cheaper one, and takes notice of what the cut holds. It is where a sync would make the
/// file system allocate or free space; and, for a while, where the sync alone would not do because data records are live.
fn should_journal(core: &mut SessionCore, cut: &Cut) -> bool {
    for change in &cut.changes {
        match *change {
            MapChange::Alloc { slot, .. } => core.holes.allocated(slot),
            MapChange::Free { slot, .. } => core.holes.freed(slot),
            MapChange::Bits { .. } => {}
        }
    }
    let Some(extents) = &cut.dirty else {
        core.holes.forget();
        return false;
    };
    let mut allocates = !cut.changes.is_empty();
    for extent in extents {
        allocates |= extent.zero || core.holes.written(extent);
    }
    if allocates || !core.journal.has_live_data() {
        core.overwrite_flushes = 0;
        return allocates;
    }
    core.overwrite_flushes += 1;
    core.overwrite_flushes <= OVERWRITE_FLUSHES_JOURNALED
}

impl Layer {
    /// Makes everything durable that was committed before the call, on any thread. Does nothing on a read-only image.
    pub(crate) fn flush(&self) -> Result<()> {
        let Some(session) = &self.session else { return Ok(()) };
        session.gate.pass(|| {
            let mut core = session.core.lock();
            self.flush_locked(session, &mut core)?;
            if !core.closed && core.journal.waiting_slots() > self.max_quarantined_slots() {
                self.reclaim_locked(session, &mut core)?;
            }
            Ok(())
        })
    }

    fn max_quarantined_slots(&self) -> usize {
        MAX_QUARANTINED_SLOTS.min(self.place.table_entries as usize / 2)
    }

    /// Flushes, and brings freed slots back with their space, as far as nobody uses them: no write of the caller may be under
    /// way.
    pub(crate) fn reclaim(&self) -> Result<()> {
        let session = self.session()?;
        let mut core = session.core.lock();
        if core.closed {
            return Ok(());
        }
        self.flush_locked(session, &mut core)?;
        self.reclaim_locked(session, &mut core)
    }

    pub(super) fn flush_locked(&self, session: &Session, core: &mut SessionCore) -> Result<()> {
        session.check(&self.path)?;
        if core.closed {
            return Ok(());
        }
        let mut cut = Cut::take(session);
        // At once: should this flush fail, the next one would not know of them.
        cut.soiled.drain(..).for_each(|slot| core.journal.quarantine_unnamed(slot));
        if cut.is_empty() && cut.commits == core.flushed_commits {
            return Ok(());
        }
        // Past the page cache, reading the data back would cost more than the sync.
        let small = match should_journal(core, &cut) && !self.file.is_direct() {
            true => self.small_flush(session, core, &mut cut),
            false => Ok(false),
        };
        let result = match small {
            Ok(false) => self.full_flush(session, core, &mut cut),
            result => result.map(drop),
        };
        // A checkpoint on the way may need the space that is kept for it.
        let result = match self.has_space_again(session, &result) {
            true => self.full_flush(session, core, &mut cut),
            false => result,
        };
        if result.is_err() && !defect::active(Defect::FailedFlushForgetsData) {
            session.dirty.overflow();
        }
        if !cut.changes.is_empty() {
            session.allocator.lock().put_back(cut.changes);
        }
        self.finish(session, core, result)
    }

    /// Journals the data itself, if it is little and nobody is writing to it: one durable write and no sync. `Ok(false)`
    /// where a full flush is needed.
    fn small_flush(&self, session: &Session, core: &mut SessionCore, cut: &mut Cut) -> Result<bool, Failure> {
        let Some(extents) = &cut.dirty else { return Ok(false) };
        if !core.journal.has_room_for(&cut.changes, extents) {
            return Ok(false);
        }
        let mut pieces = Vec::with_capacity(extents.len());
        for extent in extents {
            if self.map.get(extent.block).slot() != Some(extent.slot) {
                // A block that was freed by this cut or one before needs no data. One that was freed since is still what a crash
                // would show, with what this flush was called for.
                if session.allocator.lock().waits_to_be_freed(extent.block, extent.slot)
                    && !defect::active(Defect::FreedDataIsNotFlushed)
                {
                    return Ok(false);
                }
                continue;
            }
            let mut data = Vec::new();
            if !extent.zero {
                let range = dirty::file_range(self.place.data_offset(extent.slot), extent);
                let Some(before) = session.writes.quiet(&range) else { return Ok(false) };
                data.resize((range.end - range.start) as usize, 0);
                self.file.read_or_zero_at(&mut data, range.start).map_err(|error| Failure {
                    operation: "reading data back for the journal",
                    error,
                    fatal: false,
                })?;
                if session.writes.quiet(&range) != Some(before) {
                    return Ok(false);
                }
            }
            if !(extent.zero && defect::active(Defect::ZerosNotJournaled)) {
                pieces.push((*extent, data));
            }
        }
        if defect::active(Defect::DataBeforeMap) && !cut.changes.is_empty() {
            let changes = std::mem::take(&mut cut.changes);
            core.journal.append_with_data(&*self.file, &mut cut.changes, &pieces)?;
            cut.changes = changes;
            pieces.clear();
            core.flushed_commits = cut.commits;
            return Ok(true);
        }
        core.journal.append_with_data(&*self.file, &mut cut.changes, &pieces)?;
        core.flushed_commits = cut.commits;
        Ok(true)
    }

    /// Syncs, then journals the map changes; without any, and without old data records to retire, the sync is all.
    fn full_flush(&self, session: &Session, core: &mut SessionCore, cut: &mut Cut) -> Result<(), Failure> {
        let file = &*self.file;
        if !defect::active(Defect::FlushWithoutSync) && !defect::active(Defect::EntryBeforeData) {
            core.journal.sync(file)?;
        }
        if defect::active(Defect::CutAfterSync) {
            let late = Cut::take(session);
            cut.changes.extend(late.changes);
            cut.commits = late.commits;
        }
        if defect::active(Defect::ImageFromMemory) {
            core.journal.take_table_from((0..).map(|block| self.map.get(block).slot()));
        }
        let retire = core.journal.has_live_data() && !defect::active(Defect::OldDataStaysLive);
        if cut.changes.is_empty() && retire {
            core.journal.retire_data(file)?;
        }
        core.journal.append(file, &mut cut.changes)?;
        if defect::active(Defect::EntryBeforeData) {
            core.journal.sync(file)?;
        }
        core.flushed_commits = cut.commits;
        Ok(())
    }

    pub(super) fn reclaim_locked(&self, session: &Session, core: &mut SessionCore) -> Result<()> {
        let journal = &mut core.journal;
        let file = &*self.file;
        let mut result = journal.checkpoint(file);
        if result.as_ref().is_err_and(Failure::is_no_space) {
            // It may need the space that it is to bring back.
            journal.empty_freed(file, |slot| self.map.is_pinned(slot));
            result = journal.checkpoint(file);
        }
        if self.has_space_again(session, &result) {
            result = journal.checkpoint(file);
        }
        if result.is_ok() {
            session.allocator.lock().pages_in_place();
        }
        let result = result
            .and_then(|()| journal.punch(file, |slot| self.map.is_pinned(slot)))
            .and_then(|()| match defect::active(Defect::ReuseBeforePunchIsDurable) {
                true => Ok(()),
                false => journal.sync(file),
            })
            .and_then(|()| journal.append_tails(file));
        self.finish(session, core, result)
    }

    /// After a lack of space: whether there is some now that was kept for bringing metadata in place.
    fn has_space_again(&self, session: &Session, result: &Result<(), Failure>) -> bool {
        result.as_ref().is_err_and(Failure::is_no_space)
            && matches!(session.allocator.lock().give_back_reserve(&*self.file), Ok(true))
    }

    /// Hands slots back that became free, and turns a failure into an error.
    fn finish(&self, session: &Session, core: &mut SessionCore, result: Result<(), Failure>) -> Result<()> {
        let released = core.journal.release();
        if !released.is_empty() {
            session.allocator.lock().give_back(released);
        }
        result.map_err(|failure| session.failed(core, &*self.file, &self.path, failure))
    }
}
