//! One line on standard error for each request that failed, so that whoever looks at 3 am sees which disk, where, and why.
//!
//! A broken medium fails thousands of requests a second and standard error may be slow or stuck, so requests never wait
//! for the log: they leave a note in a bounded queue. A thread writes the first few notes of each interval and counts
//! the rest.

use crate::output;
use cowvhd::vhd::Timestamp;
use cowvhd_export::{Event, Observer};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Notes that may wait for the thread.
const QUEUE: usize = 64;
/// Lines that are written in one interval.
const BURST: u32 = 10;
const INTERVAL: Duration = Duration::from_secs(10);

/// An observer for a server, which logs what concerns the disk at `path`. Its thread ends with the last observer.
pub(crate) fn observer(path: &Path) -> std::io::Result<Observer> {
    let (sender, receiver) = sync_channel(QUEUE);
    let lost = Arc::new(AtomicU64::new(0));
    let writer = Writer { path: path.to_path_buf(), receiver, lost: Arc::clone(&lost) };
    std::thread::Builder::new().name("log".into()).spawn(move || writer.run(output::say))?;
    Ok(Arc::new(move |event| note(event, &sender, &lost)))
}

fn note(event: &Event, sender: &SyncSender<Note>, lost: &AtomicU64) {
    if let Some(note) = Note::of(event)
        && sender.try_send(note).is_err()
    {
        lost.fetch_add(1, Ordering::Relaxed);
    }
}

/// What a line says, the path aside.
struct Note {
    time: Timestamp,
    text: String,
}

impl Note {
    /// Clients come and go without a word; only what somebody may have to act on is worth a line.
    fn of(event: &Event) -> Option<Self> {
        let text = match event {
            Event::RequestFailed { connection, request, error } => format!(
                "event=io-error request={request} errno={} connection={connection} error={:?}",
                error.code(),
                error.message()
            ),
            Event::Refused { reason } => format!("event=client-refused error={reason:?}"),
            _ => return None,
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = Timestamp::from_unix_seconds(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        Some(Note { time, text })
    }
}

struct Writer {
    path: PathBuf,
    receiver: Receiver<Note>,
    lost: Arc<AtomicU64>,
}

impl Writer {
    fn run(self, write: impl Fn(String)) {
        // The interval under way, if any line was written or dropped in it.
        let mut interval: Option<Interval> = None;
        loop {
            let received = match &interval {
                None => self.receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(interval) => {
                    self.receiver.recv_timeout(interval.end.saturating_duration_since(Instant::now()))
                }
            };
            match received {
                Ok(note) => {
                    let interval = interval.get_or_insert_with(Interval::begin);
                    if interval.written < BURST {
                        interval.written += 1;
                        write(self.line(&note));
                    } else {
                        interval.dropped += 1;
                    }
                    if Instant::now() < interval.end {
                        continue;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    self.end(interval, &write);
                    return;
                }
            }
            self.end(interval.take(), &write);
        }
    }

    fn end(&self, interval: Option<Interval>, write: &impl Fn(String)) {
        let dropped = interval.map_or(0, |interval| interval.dropped) + self.lost.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            write(format!("event=suppressed count={dropped} path={:?}", self.path));
        }
    }

    fn line(&self, note: &Note) -> String {
        let Note { time, text } = note;
        format!("time={time} path={:?} {text}", self.path)
    }
}

struct Interval {
    end: Instant,
    written: u32,
    dropped: u64,
}

impl Interval {
    fn begin() -> Self {
        Interval { end: Instant::now() + INTERVAL, written: 0, dropped: 0 }
    }
}
