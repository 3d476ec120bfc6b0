//! One snapshot of a disk at a time, and none while a checkpoint is being made.

use crate::error::{Error, Result};
use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering};
use std::path::Path;

/// Who takes a snapshot now.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    snapshot: Mutex<()>,
    checkpoint: AtomicBool,
}

impl Turn {
    /// Waits for a snapshot under way; fails while a checkpoint of the disk at `path` is. No other one begins before the guard is
    /// dropped.
    pub(crate) fn snapshot(&self, path: &Path) -> Result<MutexGuard<'_, ()>> {
        let guard = self.snapshot.lock();
        match self.checkpoint.load(Ordering::Acquire) {
            false => Ok(guard),
            true => Err(under_way(path)),
        }
    }

    /// The same for a checkpoint, which may last.
    pub(crate) fn checkpoint(&self, path: &Path) -> Result<Checkpointing<'_>> {
        let _no_snapshot = self.snapshot.lock();
        match self.checkpoint.swap(true, Ordering::AcqRel) {
            false => Ok(Checkpointing(self)),
            true => Err(under_way(path)),
        }
    }
}

fn under_way(path: &Path) -> Error {
    let holder = Some("a checkpoint that is being made: it has to be committed or dropped first".into());
    Error::InUse { path: path.to_path_buf(), holder }
}

/// A checkpoint is being made.
#[derive(Debug)]
pub(crate) struct Checkpointing<'a>(&'a Turn);

impl Drop for Checkpointing<'_> {
    fn drop(&mut self) {
        self.0.checkpoint.store(false, Ordering::Release);
    }
}
