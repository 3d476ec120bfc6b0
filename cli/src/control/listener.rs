//! A client that waits for the end of work that takes long: it is told how far that has come, and ends it by leaving.

use super::protocol::{Answer, send};
use super::work::{Board, Entry, Work};
use crate::long_work::keep_pace;
use cowvhd::convert::{Pace, Phase, Progress};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Time between two reports.
const INTERVAL: Duration = Duration::from_millis(100);

/// Whoever waits.
pub(super) struct Listener<'a> {
    client: &'a UnixStream,
    entry: Entry<'a>,
    pace: Option<Pace>,
    last: Option<(Instant, Phase)>,
}

impl<'a> Listener<'a> {
    /// Work for this client is about to begin, which the board is to tell others of.
    pub(super) fn new(client: &'a UnixStream, board: &'a Board, work: Work) -> Self {
        let pace = work.rate.map(Pace::new);
        Listener { client, entry: Entry::new(board, work), pace, last: None }
    }

    /// The work has come so far; breaks when it is to stop.
    pub(super) fn hear(&mut self, progress: Progress) -> ControlFlow<()> {
        self.entry.note(progress);
        let now = Instant::now();
        if self.last.is_none_or(|(at, phase)| phase != progress.phase || now - at >= INTERVAL) {
            self.last = Some((now, progress.phase));
            if send(&mut &*self.client, &Answer::progress(progress)).is_err() {
                return ControlFlow::Break(());
            }
        }
        let client = self.client;
        keep_pace(self.pace.as_mut(), progress, &|| has_left(client))
    }
}

/// Whether the client sends nothing any more: it has left, wants the work to stop, or the server is to end.
fn has_left(client: &UnixStream) -> bool {
    let mut fds = [PollFd::new(client, PollFlags::RDHUP)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    !matches!(poll(&mut fds, Some(&at_once)), Ok(0) | Err(rustix::io::Errno::INTR))
}
