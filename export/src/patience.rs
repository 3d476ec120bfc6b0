//! How long a transfer with a client may go on.
//!
//! A transfer is given up when nothing of it has moved for the stall timeout, and when it falls behind the slowest rate that is put
//! up with by as much. What was fast before buys no more than that: so a client that holds memory of the server, with a payload it
//! does not finish or answers it does not fetch, pays for all but the stall timeout of that by moving bytes.

use crate::options::{Limits, from_now};
use std::io;
use std::time::{Duration, Instant};

/// The patience with one transfer.
pub(crate) struct Patience {
    deadline: Instant,
    stall_timeout: Duration,
    min_bytes_per_second: u64,
}

impl Patience {
    /// For a transfer that starts now.
    pub(crate) fn new(limits: &Limits) -> Self {
        Patience {
            deadline: from_now(limits.stall_timeout),
            stall_timeout: limits.stall_timeout,
            min_bytes_per_second: limits.min_bytes_per_second.max(1),
        }
    }

    /// By when something has to move.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// So many bytes have moved, and more are to come: an error when that is too slow.
    pub(crate) fn progress(&mut self, bytes: usize) -> io::Result<()> {
        self.advance(bytes, from_now(self.stall_timeout));
        if Instant::now() < self.deadline {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "the client was too slow"))
    }

    /// `full` is a deadline without anything to make up for.
    fn advance(&mut self, bytes: usize, full: Instant) {
        let nanos = bytes as u128 * 1_000_000_000 / u128::from(self.min_bytes_per_second);
        let earned = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.deadline = self.deadline.checked_add(earned).map_or(full, |earned| earned.min(full));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A transfer of steps (seconds since the step before, bytes), at 64 KiB a second with 30 s to stall: at which step it was given up.
    fn given_up_at(steps: impl IntoIterator<Item = (u64, usize)>) -> Option<usize> {
        let limits = Limits::default();
        assert_eq!((limits.stall_timeout.as_secs(), limits.min_bytes_per_second), (30, 64 << 10));
        let mut patience = Patience::new(&limits);
        let mut now = patience.deadline - limits.stall_timeout;
        for (step, (seconds, bytes)) in steps.into_iter().enumerate() {
            now += Duration::from_secs(seconds);
            if now >= patience.deadline {
                return Some(step);
            }
            patience.advance(bytes, now + limits.stall_timeout);
        }
        None
    }

    #[test]
    fn what_keeps_the_rate_is_never_given_up() {
        assert_eq!(given_up_at(vec![(1, 64 << 10); 10_000]), None);
        assert_eq!(given_up_at(vec![(29, 29 * (64 << 10)); 1000]), None);
        assert_eq!(given_up_at(vec![(0, 1 << 20); 1000]), None);
    }

    #[test]
    fn what_stands_still_is_given_up_whatever_it_did_before() {
        assert_eq!(given_up_at([(30, 1)]), Some(0));
        assert_eq!(given_up_at([(0, 31 << 20), (29, 1 << 20), (30, 1)]), Some(2));
    }

    #[test]
    fn what_trickles_is_given_up_as_one_that_stands_still() {
        assert_eq!(given_up_at(vec![(1, 1); 100]), Some(30));
        assert_eq!(given_up_at([(0, 31 << 20)].into_iter().chain(vec![(1, 1); 100])), Some(31));
        // Half the rate: for twice the time.
        assert_eq!(given_up_at(vec![(1, 32 << 10); 100]), Some(58));
    }

    #[test]
    fn limits_at_their_ends_are_no_trouble() {
        let limits = Limits { stall_timeout: Duration::MAX, min_bytes_per_second: 0, ..Limits::default() };
        let mut patience = Patience::new(&limits);
        patience.progress(usize::MAX).unwrap();
        assert!(patience.deadline() > Instant::now() + Duration::from_secs(1 << 30));
    }
}
