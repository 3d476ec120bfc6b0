//! What a server does that takes long, for those who ask how far it has come.

use crate::progress;
use cowvhd::convert::Progress;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Instant;

/// Work as it is told; docs/tool.md has its keys.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct WorkStatus {
    /// What was asked for.
    pub(crate) request: String,
    /// The files whose data moves, from the top down.
    pub(crate) layers: Vec<String>,
    pub(crate) phase: String,
    /// Bytes of the disk.
    pub(crate) done: u64,
    pub(crate) total: u64,
    pub(crate) copied_bytes: u64,
    /// Seconds since it began.
    pub(crate) elapsed: f64,
    /// Bytes that are copied in a second, at most.
    pub(crate) rate: Option<NonZeroU64>,
}

/// What was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Work {
    pub(crate) request: &'static str,
    pub(crate) layers: Vec<PathBuf>,
    pub(crate) rate: Option<NonZeroU64>,
}

/// The one piece of work that is under way, if any.
#[derive(Debug, Default)]
pub(crate) struct Board(Mutex<Option<Note>>);

#[derive(Debug)]
struct Note {
    work: Work,
    since: Instant,
    progress: Progress,
}

impl Board {
    /// What is under way.
    pub(super) fn status(&self) -> Option<WorkStatus> {
        self.0.lock().as_ref().map(|Note { work, since, progress }| WorkStatus {
            request: work.request.into(),
            layers: work.layers.iter().map(|layer| layer.to_string_lossy().into_owned()).collect(),
            phase: progress::name(progress.phase).into(),
            done: progress.done,
            total: progress.total,
            copied_bytes: progress.copied,
            elapsed: since.elapsed().as_secs_f64(),
            rate: work.rate,
        })
    }
}

/// Work that may be about to begin; it is noted with its first progress, since it may be refused, and no more when this is dropped.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    board: &'a Board,
    work: Work,
    since: Instant,
    is_noted: bool,
}

impl<'a> Entry<'a> {
    pub(super) fn new(board: &'a Board, work: Work) -> Self {
        Entry { board, work, since: Instant::now(), is_noted: false }
    }

    /// It has come so far.
    pub(super) fn note(&mut self, progress: Progress) {
        self.is_noted = true;
        match &mut *self.board.0.lock() {
            Some(note) => note.progress = progress,
            none => *none = Some(Note { work: self.work.clone(), since: self.since, progress }),
        }
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        if self.is_noted {
            *self.board.0.lock() = None;
        }
    }
}
