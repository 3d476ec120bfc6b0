//! Keeping long work to a rate, so that it leaves the medium to others.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// Work that was behind its rate may catch up by so much.
const BURST: Duration = Duration::from_millis(100);

/// The rate at which data is copied.
#[derive(Debug, Clone)]
pub struct Pace {
    bytes_per_second: NonZeroU64,
    /// When what was copied until now is paid for.
    due: Instant,
    copied: u64,
}

impl Pace {
    /// At most so many bytes in a second, from now on.
    pub fn new(bytes_per_second: NonZeroU64) -> Self {
        Pace { bytes_per_second, due: Instant::now(), copied: 0 }
    }

    /// How long to wait now that `copied` bytes were copied since the start ([`Progress::copied`](super::Progress::copied)).
    pub fn wait(&mut self, copied: u64) -> Duration {
        self.wait_at(Instant::now(), copied)
    }

    fn wait_at(&mut self, now: Instant, copied: u64) -> Duration {
        let more = copied.saturating_sub(self.copied);
        self.copied = copied;
        let nanoseconds = u128::from(more) * 1_000_000_000 / u128::from(self.bytes_per_second.get());
        let cost = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        self.due = self.due.max(earliest).checked_add(cost).unwrap_or(now);
        self.due.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_over_time_and_bursts_are_short() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut pace = Pace { bytes_per_second: NonZeroU64::new(1000).unwrap(), due: start, copied: 0 };
        assert_eq!(pace.wait_at(start, 500), Duration::from_millis(500));
        assert_eq!(pace.wait_at(at(300), 500), Duration::from_millis(200));
        assert_eq!(pace.wait_at(at(500), 600), Duration::from_millis(100));
        // After a long time nothing but a short burst is made up for.
        assert_eq!(pace.wait_at(at(10_000), 700), Duration::ZERO);
        assert_eq!(pace.wait_at(at(10_000), 800), Duration::from_millis(100));
        // Nothing that a caller may say overflows.
        assert!(pace.wait_at(at(10_000), u64::MAX) > Duration::from_secs(3600));
        pace.wait_at(at(10_000), 0);
        pace.wait_at(at(10_000), u64::MAX);
    }
}
