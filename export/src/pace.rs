//! Predicts whether a request will be slow, from how long requests of its kind have taken.
//!
//! A request that takes a few microseconds is best executed by the thread that read it; passing it on costs more than
//! it saves. One that waits for a medium must not keep the thread from reading the next. Which it is depends on the
//! backend, the cache and the moment, so it is measured: one moving average per kind, shared by all connections.

use crate::protocol::{Request, command, flag};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// From this average on, a kind of request is passed on: about what passing on costs.
const SLOW_NANOS: u32 = 25_000;
/// One sample counts at most this much, so that a single stall does not brand its kind.
const MAX_SAMPLE_NANOS: u32 = 4 * SLOW_NANOS;
/// A sample's weight is one in 2^this.
const WEIGHT_SHIFT: u32 = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind(usize);

const FLUSH: usize = 0;
const OTHER: usize = 1;
const READ: usize = 2;
const WRITE: usize = 5;
const KINDS: usize = 8;

pub(crate) fn kind_of(request: &Request) -> Kind {
    let size = match request.length {
        0..=16_384 => 0,
        16_385..=131_072 => 1,
        _ => 2,
    };
    Kind(match request.command {
        command::FLUSH => FLUSH,
        command::READ => READ + size,
        command::CACHE | command::BLOCK_STATUS => OTHER,
        _ if request.has(flag::FUA) => FLUSH,
        command::WRITE => WRITE + size,
        _ => OTHER,
    })
}

pub(crate) struct Pace {
    average_nanos: [AtomicU32; KINDS],
}

impl Pace {
    pub(crate) fn new() -> Self {
        let pace = Pace { average_nanos: std::array::from_fn(|_| AtomicU32::new(0)) };
        // Flushes are slow until they prove otherwise.
        pace.average_nanos[FLUSH].store(2 * SLOW_NANOS, Ordering::Relaxed);
        pace
    }

    pub(crate) fn is_slow(&self, kind: Kind) -> bool {
        self.average_nanos[kind.0].load(Ordering::Relaxed) >= SLOW_NANOS
    }

    /// Records how long a request took. Lost updates of racing threads do not matter.
    pub(crate) fn record(&self, kind: Kind, took: Duration) {
        let sample = u32::try_from(took.as_nanos()).unwrap_or(u32::MAX).min(MAX_SAMPLE_NANOS);
        let average = &self.average_nanos[kind.0];
        let before = average.load(Ordering::Relaxed);
        let after = before - (before >> WEIGHT_SHIFT) + (sample >> WEIGHT_SHIFT);
        average.store(after, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(length: u32) -> Kind {
        kind_of(&Request { flags: 0, command: command::READ, cookie: 0, offset: 0, length })
    }

    #[test]
    fn a_kind_becomes_slow_by_experience_and_fast_again() {
        let pace = Pace::new();
        assert!(!pace.is_slow(read(4096)));
        pace.record(read(4096), Duration::from_secs(1));
        assert!(!pace.is_slow(read(4096)), "one stall brands nothing");
        for _ in 0..20 {
            pace.record(read(4096), Duration::from_micros(100));
        }
        assert!(pace.is_slow(read(4096)));
        assert!(!pace.is_slow(read(1 << 20)), "kinds are apart");
        for _ in 0..100 {
            pace.record(read(4096), Duration::from_micros(2));
        }
        assert!(!pace.is_slow(read(4096)));
    }

    #[test]
    fn flushes_start_slow_and_writes_with_fua_are_flushes() {
        let pace = Pace::new();
        let write =
            |flags| kind_of(&Request { flags, command: command::WRITE, cookie: 0, offset: 0, length: 512 });
        assert!(pace.is_slow(write(flag::FUA)));
        assert!(!pace.is_slow(write(0)));
    }
}
