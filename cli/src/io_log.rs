//! One line on standard error for each request that failed, so that whoever looks at 3 am sees which disk, where, and why.
//!
//! A broken medium fails thousands of requests a second, and standard error may be slow or stuck. So a few events of
//! each kind are let through in each interval, the rest is counted, and a thread does the writing: requests never wait
//! for it.

use crate::output;
use cowvhd::vhd::Timestamp;
use cowvhd_export::{Event, Observer};
use parking_lot::Mutex;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Lines of one kind in one interval.
const BURST: u32 = 10;
const INTERVAL: Duration = Duration::from_secs(10);
/// Lines that may wait to be written.
const QUEUE: usize = 64;

/// Writes what has to be said about a disk's requests until it is dropped.
pub(crate) struct IoLog {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

impl IoLog {
    /// A log for the disk at `path`.
    pub(crate) fn start(path: &Path) -> io::Result<Self> {
        let (sender, receiver) = sync_channel(QUEUE);
        let writer = std::thread::Builder::new().name("log".into()).spawn(move || write(&receiver))?;
        let shared = Arc::new(Shared { path: format!("{path:?}"), sender, limiters: Mutex::default() });
        Ok(IoLog { shared, writer: Some(writer) })
    }

    /// What a server tells its events.
    pub(crate) fn observer(&self) -> Observer {
        let shared = Arc::clone(&self.shared);
        Arc::new(move |event| shared.observe(event))
    }
}

impl Drop for IoLog {
    fn drop(&mut self) {
        let limiters = std::mem::take(&mut *self.shared.limiters.lock());
        for (kind, suppressed) in [("io-error", limiters.io_error), ("client-refused", limiters.refused)]
            .map(|(kind, limiter)| (kind, limiter.suppressed))
            .into_iter()
            .filter(|(_, suppressed)| *suppressed > 0)
        {
            let _ = self.shared.sender.send(Some(self.shared.line(kind, "", suppressed)));
        }
        let _ = self.shared.sender.send(None);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

fn write(lines: &Receiver<Option<String>>) {
    while let Ok(Some(line)) = lines.recv() {
        output::say(line);
    }
}

struct Shared {
    /// Quoted.
    path: String,
    /// `None` ends the writer.
    sender: SyncSender<Option<String>>,
    limiters: Mutex<Limiters>,
}

/// One for each kind of event, so that a rude client cannot crowd out the disk's errors.
#[derive(Default)]
struct Limiters {
    io_error: Limiter,
    refused: Limiter,
}

impl Shared {
    /// Clients come and go without a word; only what somebody may have to act on is worth a line.
    fn observe(&self, event: &Event) {
        let now = Instant::now();
        match event {
            Event::RequestFailed { connection, request, error } => {
                self.submit(
                    |limiters| &mut limiters.io_error,
                    now,
                    |suppressed| {
                        let (errno, message) = (error.code(), error.message());
                        let about = format!(
                            " request={request} errno={errno} connection={connection} error={message:?}"
                        );
                        self.line("io-error", &about, suppressed)
                    },
                );
            }
            Event::Refused { reason } => {
                self.submit(
                    |limiters| &mut limiters.refused,
                    now,
                    |suppressed| self.line("client-refused", &format!(" reason={reason:?}"), suppressed),
                );
            }
            _ => {}
        }
    }

    fn submit(
        &self,
        choose: impl Fn(&mut Limiters) -> &mut Limiter,
        now: Instant,
        line: impl FnOnce(u64) -> String,
    ) {
        let Some(suppressed) = choose(&mut self.limiters.lock()).admit(now) else { return };
        if self.sender.try_send(Some(line(suppressed))).is_err() {
            choose(&mut self.limiters.lock()).suppressed += suppressed + 1;
        }
    }

    fn line(&self, kind: &str, about: &str, suppressed: u64) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = Timestamp::from_unix_seconds(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        let suppressed = if suppressed > 0 { format!(" suppressed={suppressed}") } else { String::new() };
        format!("time={time} event={kind} path={}{about}{suppressed}", self.path)
    }
}

/// Lets the first [`BURST`] events of an interval through and counts the others.
#[derive(Default)]
struct Limiter {
    interval_start: Option<Instant>,
    admitted: u32,
    /// Events since the last one that was let through.
    suppressed: u64,
}

impl Limiter {
    /// Whether an event is let through, and then how many before it were not.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.interval_start.is_none_or(|start| now.saturating_duration_since(start) >= INTERVAL) {
            self.interval_start = Some(now);
            self.admitted = 0;
        }
        if self.admitted == BURST {
            self.suppressed += 1;
            return None;
        }
        self.admitted += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cowvhd_export::Errno;

    fn failed(request: &str) -> Event {
        Event::RequestFailed { connection: 3, request: request.into(), error: Errno::ENOSPC }
    }

    /// A log nobody reads from, with room for `queue` lines.
    fn log(queue: usize) -> (Shared, Receiver<Option<String>>) {
        let (sender, receiver) = sync_channel(queue);
        (Shared { path: "\"vm.vhd\"".into(), sender, limiters: Mutex::default() }, receiver)
    }

    #[test]
    fn a_line_names_the_disk_the_place_and_the_reason() {
        let (log, lines) = log(8);
        log.observe(&failed("write offset=4096 length=512"));
        let line = lines.recv().unwrap().unwrap();
        let expected = " event=io-error path=\"vm.vhd\" request=write offset=4096 length=512 errno=28 connection=3 \
                        error=\"no space left on device\"";
        assert!(line.starts_with("time=20"), "{line}");
        assert!(line.ends_with(expected), "{line}");
    }

    #[test]
    fn a_flood_is_counted_and_the_count_comes_with_the_next_line() {
        let mut limiter = Limiter::default();
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(limiter.admit(start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(limiter.admit(start + INTERVAL / 2), None);
        }
        assert_eq!(limiter.admit(start + INTERVAL), Some(1000));
        assert_eq!(limiter.admit(start + INTERVAL), Some(0));
    }

    #[test]
    fn a_stuck_standard_error_holds_nobody_up() {
        let (log, lines) = log(1);
        for _ in 0..1000 {
            log.observe(&failed("flush offset=0 length=0"));
        }
        assert_eq!(log.limiters.lock().io_error.suppressed, 999);
        drop(lines);
        log.observe(&failed("flush offset=0 length=0"));
        assert_eq!(log.limiters.lock().io_error.suppressed, 1000);
    }

    #[test]
    fn refused_clients_do_not_hide_errors() {
        let (log, lines) = log(QUEUE);
        for _ in 0..1000 {
            log.observe(&Event::Refused { reason: "128 clients are connected already".into() });
        }
        log.observe(&failed("read offset=0 length=512"));
        let lines: Vec<String> = lines.try_iter().flatten().collect();
        assert_eq!(lines.len() as u32, BURST + 1);
        assert!(lines.last().unwrap().contains("event=io-error"));
    }
}
