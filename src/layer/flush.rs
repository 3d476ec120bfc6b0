//! Flush: everything committed before the call is durable when it returns (I6).
//!
//! One flush at a time, from its cut to its durable entry; callers that arrive meanwhile share the next one. A full flush
//! takes the cut (all map changes committed so far), then syncs, then appends the cut's records: so a record is durable
//! only with or after the data it exposes (I1). The entry is left out where there is nothing to say.

use super::Layer;
use super::session::{Session, SessionCore};
use crate::defect::{self, Defect};
use crate::error::Result;
use crate::journal::Failure;
use crate::sync::{Condvar, Mutex, Ordering};

/// More slots than this in quarantine make a flush bring them back.
const MAX_QUARANTINED_SLOTS: usize = 256;

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
        let needed = state.begun + 1;
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
        if result.is_ok() {
            state.succeeded = state.succeeded.max(number);
        }
        self.changed.notify_all();
        result
    }
}

impl Layer {
    /// Makes everything durable that was committed before the call, on any thread. Does nothing on a read-only image.
    pub(crate) fn flush(&self) -> Result<()> {
        let Some(session) = &self.session else { return Ok(()) };
        session.gate.pass(|| {
            let mut core = session.core.lock();
            self.flush_locked(session, &mut core)?;
            if !core.closed && core.journal.waiting_slots() > MAX_QUARANTINED_SLOTS {
                self.reclaim_locked(session, &mut core)?;
            }
            Ok(())
        })
    }

    /// Flushes, and brings freed slots back as far as nobody uses them.
    pub(super) fn reclaim(&self) -> Result<()> {
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
        let (mut changes, soiled) = session.allocator.lock().cut();
        let commits = session.commits.load(Ordering::SeqCst);
        if changes.is_empty() && soiled.is_empty() && commits == core.synced_commits {
            return Ok(());
        }
        let mut result = match () {
            () if defect::active(Defect::FlushWithoutSync) || defect::active(Defect::EntryBeforeData) => {
                Ok(())
            }
            () => core.journal.sync(&*self.file),
        };
        if defect::active(Defect::CutAfterSync) {
            changes.extend(session.allocator.lock().cut().0);
        }
        if result.is_ok() {
            core.synced_commits = commits;
            soiled.into_iter().for_each(|slot| core.journal.quarantine_unnamed(slot));
            if defect::active(Defect::ImageFromMemory) {
                core.journal.take_table_from((0..).map(|block| self.map.get(block).slot()));
            }
            result = core.journal.append(&*self.file, &mut changes);
        }
        if result.is_ok() && defect::active(Defect::EntryBeforeData) {
            result = core.journal.sync(&*self.file);
        }
        if !changes.is_empty() {
            session.allocator.lock().put_back(changes);
        }
        self.finish(session, core, result)
    }

    pub(super) fn reclaim_locked(&self, session: &Session, core: &mut SessionCore) -> Result<()> {
        let journal = &mut core.journal;
        let file = &*self.file;
        let result = journal
            .checkpoint(file)
            .and_then(|()| journal.punch(file, |slot| self.map.is_pinned(slot)))
            .and_then(|()| journal.sync(file))
            .and_then(|()| journal.append_tails(file));
        self.finish(session, core, result)
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
