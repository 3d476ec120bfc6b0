//! What an image open for writing has beside its map: allocator, journal, superblocks, and the word that says it is broken.

use super::allocator::Allocator;
use super::dirty::{DirtyData, WritesUnderWay};
use super::flush::FlushGate;
use super::headers::HeaderPair;
use super::holes::Holes;
use crate::error::{Error, Result};
use crate::ext::{DataCrcs, MAX_COUNTER, Placement, SessionId, State, Superblock, Tail, feature};
use crate::journal::{Failure, Journal};
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering};
use crate::vfs::File;
use std::path::Path;

/// The writing side of a layer.
#[derive(Debug)]
pub(crate) struct Session {
    /// One close at a time; taken before all others.
    pub(super) closing: Mutex<()>,
    pub(super) gate: FlushGate,
    pub(super) core: Mutex<SessionCore>,
    pub(super) allocator: Mutex<Allocator>,
    /// Counts commits of writes, so that a flush knows whether there is anything to do.
    pub(super) commits: AtomicU64,
    pub(super) dirty: DirtyData,
    pub(super) writes: WritesUnderWay,
    /// Held while a block of another program moves to a slot of ours.
    pub(super) moving: Mutex<()>,
    poisoned: AtomicBool,
    cause: Mutex<Option<String>>,
    /// The layer is sealed, or about to be.
    sealed: AtomicBool,
}

/// What one flush at a time may touch.
#[derive(Debug)]
pub(crate) struct SessionCore {
    pub(super) journal: Journal,
    pub(super) superblocks: Superblocks,
    /// Footer and dynamic header, with its normal cookie, as the next close writes them.
    pub(super) headers: HeaderPair,
    /// The value of `commits` that the last flush covered.
    pub(super) flushed_commits: u64,
    /// The image was closed cleanly; nothing is left to flush.
    pub(super) closed: bool,
    pub(super) holes: Holes,
    /// How many flushes of nothing but overwrites came one after the other while the journal had live data.
    pub(super) overwrite_flushes: u32,
}

impl Session {
    pub(super) fn new(
        journal: Journal,
        allocator: Allocator,
        superblocks: Superblocks,
        headers: HeaderPair,
    ) -> Self {
        Session {
            closing: Mutex::new(()),
            gate: FlushGate::default(),
            core: Mutex::new(SessionCore {
                journal,
                superblocks,
                headers,
                flushed_commits: 0,
                closed: false,
                holes: Holes::default(),
                overwrite_flushes: 0,
            }),
            allocator: Mutex::new(allocator),
            commits: AtomicU64::new(0),
            dirty: DirtyData::default(),
            writes: WritesUnderWay::default(),
            moving: Mutex::new(()),
            poisoned: AtomicBool::new(false),
            cause: Mutex::new(None),
            sealed: AtomicBool::new(false),
        }
    }

    /// From now on nothing is changed any more.
    pub(super) fn seal(&self) {
        self.sealed.store(true, Ordering::SeqCst);
    }

    /// Whether [`Session::seal`] was called.
    pub(super) fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::SeqCst)
    }

    /// Fails if a sync failed earlier (I5).
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        if !self.poisoned.load(Ordering::SeqCst) {
            return Ok(());
        }
        let cause = self.cause.lock().clone().unwrap_or_default();
        Err(Error::Poisoned { path: path.to_path_buf(), cause })
    }

    /// Stops the disk. Returns false if it was stopped before.
    pub(super) fn poison(&self, cause: String) -> bool {
        let mut first = self.cause.lock();
        if first.is_none() {
            *first = Some(cause);
        }
        !self.poisoned.swap(true, Ordering::SeqCst)
    }

    /// Turns a failure into an error; a fatal one stops the disk and leaves a durable mark, as far as that still works.
    pub(super) fn failed(
        &self,
        core: &mut SessionCore,
        file: &dyn File,
        path: &Path,
        failure: Failure,
    ) -> Error {
        if failure.fatal && self.poison(format!("{}: {}", failure.operation, failure.error)) {
            // The disk is stopped either way; the mark only tells the next open more.
            core.superblocks.mark_failed_sync(file);
        }
        Error::io(path, failure.operation, failure.error)
    }
}

/// More allocations than one session can make: at 10,000 a second they last three years. Eight million crashes use them up.
const ALLOCATIONS_OF_A_SESSION: u64 = 1 << 40;

/// The two superblocks, written in turn.
#[derive(Debug)]
pub(crate) struct Superblocks {
    pub(super) current: Superblock,
    /// Which of the two places the current one stands in.
    index: usize,
    /// The other place holds an older one.
    other_is_valid: bool,
    /// Their file offsets.
    offsets: [u64; 2],
}

impl Superblocks {
    pub(super) fn new(current: Superblock, index: usize, other_is_valid: bool, offsets: [u64; 2]) -> Self {
        let compatible = current.compatible & feature::KNOWN_COMPATIBLE;
        Superblocks { current: Superblock { compatible, ..current }, index, other_is_valid, offsets }
    }

    /// Writes the current content, with the next sequence, over the older of the two copies; durable on return.
    pub(super) fn write_next(&mut self, file: &dyn File) -> std::io::Result<()> {
        let index = 1 - self.index.min(1);
        self.current.sequence = self.current.sequence.saturating_add(1);
        let offset = self.offsets.get(index).copied().unwrap_or_default();
        file.write_durable_at(&self.current.to_bytes(), offset)?;
        self.index = index;
        Ok(())
    }

    /// The next write goes over the current copy, if the other is valid.
    fn distrust_current(&mut self) {
        if self.other_is_valid {
            self.index = 1 - self.index.min(1);
        }
    }

    /// Writes what the superblocks say again, to the place of which it is not sure that the medium has it; durable on return.
    pub(super) fn write_again(&mut self, file: &dyn File) -> std::io::Result<()> {
        self.distrust_current();
        self.write_next(file)
    }

    /// Notes for the next open that a sync failed, as far as that still works.
    pub(super) fn mark_failed_sync(&mut self, file: &dyn File) {
        self.current.sync_failed = true;
        let _ = self.write_next(file);
    }

    /// Starts a session: both copies name it, one after the other, so that losing either of them changes nothing. They hold
    /// a number above every allocation that the session will make, for whoever finds it without an end.
    ///
    /// After anything but a clean close the first write goes over the current copy, if the other is valid: an attempt whose
    /// write failed may have left the current one in the cache alone. The other one says the same, or what was true
    /// before; and everything that it speaks of had been brought in place when it was superseded.
    pub(super) fn start_session(
        &mut self,
        file: &dyn File,
        place: &Placement,
        session: SessionId,
        next_allocation: u64,
        closed_cleanly: bool,
    ) -> std::io::Result<()> {
        let closed_cleanly =
            closed_cleanly && self.current.state == State::Clean && !self.current.sync_failed;
        if !closed_cleanly {
            self.distrust_current();
        }
        self.current = Superblock {
            state: State::Dirty,
            session,
            ring_offset: place.ring_offset,
            ring_bytes: place.ring_bytes,
            meta_tail: Tail::FIRST,
            data_tail: Tail::FIRST,
            next_allocation: next_allocation.saturating_add(ALLOCATIONS_OF_A_SESSION).min(MAX_COUNTER),
            // Slots may come to lie where they stood.
            data_crcs: DataCrcs::default(),
            ..self.current
        };
        self.write_next(file)?;
        self.write_next(file)
    }
}
