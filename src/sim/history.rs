//! What a guest wrote and flushed, and what it may therefore find after a crash.
//!
//! Each sector holds, after a crash, its last flushed value or one submitted later: never an older one, never another
//! sector's. Values are numbers that fill the sector ([`History::fill`]), so that a mixture is noticed as well; 0 is a
//! sector of zeros.

use std::collections::BTreeMap;
use std::fmt;

const SECTOR: usize = 512;
/// Sectors of a 4 KiB physical sector.
const UNIT: u64 = 8;

#[derive(Debug, Clone, Copy)]
struct Submitted {
    at: u64,
    /// When the call returned successfully; a call that failed or never returned is only ever a possibility.
    done: u64,
    value: u64,
}

#[derive(Debug, Clone, Copy)]
struct Flush {
    called: u64,
    returned: u64,
}

/// The events of one disk, by a clock that only grows.
#[derive(Debug, Clone, Default)]
pub struct History {
    sectors: BTreeMap<u64, Vec<Submitted>>,
    flushes: Vec<Flush>,
    next_value: u64,
}

/// A sector that holds what it must not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Number of the guest's sector.
    pub sector: u64,
    /// What it holds; `None` for a mixture of values.
    pub found: Option<u64>,
    /// What it might hold.
    pub allowed: Vec<u64>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sector {} holds {:?}, allowed are {:?}", self.sector, self.found, self.allowed)
    }
}

impl History {
    /// A value that was not used before.
    pub fn new_value(&mut self) -> u64 {
        self.next_value += 1;
        self.next_value
    }

    /// Fills a buffer with a value.
    pub fn fill(value: u64, buf: &mut [u8]) {
        buf.chunks_mut(8).for_each(|word| {
            let bytes = value.to_le_bytes();
            word.copy_from_slice(bytes.get(..word.len()).unwrap_or_default());
        });
    }

    /// The call that writes `value` to `count` sectors from `first` on begins at clock `at`, at which no other one does. Returns
    /// `at`, by which [`History::completed`] knows it.
    pub fn submit(&mut self, at: u64, first: u64, count: u64, value: u64) -> u64 {
        for sector in first..first + count {
            self.sectors.entry(sector).or_default().push(Submitted { at, done: u64::MAX, value });
        }
        at
    }

    /// The call that began at clock `submitted` has returned successfully at clock `at`.
    pub fn completed(&mut self, submitted: u64, at: u64, first: u64, count: u64) {
        for sector in first..first + count {
            let of_sector = self.sectors.entry(sector).or_default();
            of_sector.iter_mut().filter(|s| s.at == submitted).for_each(|s| s.done = at);
        }
    }

    /// A flush that was called at one clock returned successfully at another.
    pub fn flushed(&mut self, called: u64, returned: u64) {
        self.flushes.push(Flush { called, returned });
    }

    /// A flush failed at clock `at`: what it was to make durable may be lost for good, and no later flush promises it.
    pub fn flush_failed(&mut self, at: u64) {
        let flushed = self.flushes.iter().filter(|f| f.returned <= at).map(|f| f.called).max().unwrap_or(0);
        for submitted in self.sectors.values_mut().flatten().filter(|s| s.done > flushed) {
            submitted.done = u64::MAX;
        }
    }

    /// The values a sector may hold after a crash at clock `at`.
    pub fn allowed(&self, sector: u64, at: u64) -> Vec<u64> {
        let flushed = self.flushes.iter().filter(|f| f.returned <= at).map(|f| f.called).max().unwrap_or(0);
        self.possible(sector, at, flushed)
    }

    /// The values a sector may hold now, without a crash: the last one, or any of several that were written at once.
    pub fn current(&self, sector: u64) -> Vec<u64> {
        self.possible(sector, u64::MAX, u64::MAX - 1)
    }

    /// What a sector may hold at clock `at` when every write that was done by `settled` is sure to have happened.
    fn possible(&self, sector: u64, at: u64, settled: u64) -> Vec<u64> {
        let Some(submitted) = self.sectors.get(&sector) else { return vec![0] };
        let submitted = || submitted.iter().filter(|s| s.at <= at);
        // What was over before a settled write began is overwritten for good; writes at once may land in either order.
        let last = submitted().filter(|s| s.done <= settled).map(|s| s.at).max();
        let zero = if last.is_none() { Some(0) } else { None };
        zero.into_iter().chain(submitted().filter(|s| Some(s.done) >= last).map(|s| s.value)).collect()
    }

    /// Checks what the disk shows from sector `first` on after a crash at clock `at`. With `garbage`, physical sectors that
    /// had unflushed writes are let off: in place they are as exposed as on a raw disk.
    pub fn check(&self, at: u64, first: u64, content: &[u8], garbage: bool) -> Result<(), Violation> {
        for (sector, bytes) in (first..).zip(content.chunks(SECTOR)) {
            let found = value_of(bytes);
            let allowed = self.allowed(sector, at);
            if found.is_some_and(|found| allowed.contains(&found)) {
                continue;
            }
            let unit = sector / UNIT * UNIT;
            if garbage && (unit..unit + UNIT).any(|sector| self.allowed(sector, at).len() > 1) {
                continue;
            }
            return Err(Violation { sector, found, allowed });
        }
        Ok(())
    }

    /// Checks what the disk shows now, without a crash.
    pub fn check_current(&self, first: u64, content: &[u8]) -> Result<(), Violation> {
        for (sector, bytes) in (first..).zip(content.chunks(SECTOR)) {
            let (found, allowed) = (value_of(bytes), self.current(sector));
            if found.is_none_or(|found| !allowed.contains(&found)) {
                return Err(Violation { sector, found, allowed });
            }
        }
        Ok(())
    }

    /// Checks what a read returned, from sector `first` on, that was called at one clock and returned at another, beside other
    /// requests.
    pub fn check_read(
        &self,
        called: u64,
        returned: u64,
        first: u64,
        content: &[u8],
    ) -> Result<(), Violation> {
        for (sector, bytes) in (first..).zip(content.chunks(SECTOR)) {
            let (found, allowed) = (value_of(bytes), self.possible(sector, returned, called));
            // Beside a write the sector may be in the middle of it.
            if found.map_or(allowed.len() > 1, |found| allowed.contains(&found)) {
                continue;
            }
            return Err(Violation { sector, found, allowed });
        }
        Ok(())
    }

    /// Forgets everything but the values already used: a new history begins, in which every sector is zero.
    pub fn restart(&mut self) {
        self.flushes.clear();
        self.sectors.clear();
    }

    /// The new history begins with this durable content from sector `first` on.
    pub fn continue_from(&mut self, first: u64, content: &[u8]) {
        for (sector, bytes) in (first..).zip(content.chunks(SECTOR)) {
            let value = value_of(bytes).unwrap_or(0);
            self.sectors.insert(sector, vec![Submitted { at: 0, done: 0, value }]);
        }
    }
}

/// The value that fills a sector.
fn value_of(bytes: &[u8]) -> Option<u64> {
    let mut words = bytes.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes));
    let first = words.next()?;
    words.all(|word| word == first).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_flushed_value_or_a_later_one_is_allowed() {
        let mut history = History::default();
        assert_eq!(history.allowed(5, 100), [0]);
        history.submit(1, 5, 1, 11);
        history.completed(1, 2, 5, 1);
        assert_eq!(history.allowed(5, 2), [0, 11]);
        history.flushed(3, 6);
        assert_eq!(history.allowed(5, 5), [0, 11], "the flush had not returned");
        assert_eq!(history.allowed(5, 6), [11]);
        history.submit(7, 5, 1, 12);
        assert_eq!(history.allowed(5, 7), [11, 12]);
        history.flushed(8, 9);
        assert_eq!(history.allowed(5, 9), [11, 12], "the write had not returned");
        let mut sector = [0; 512];
        History::fill(12, &mut sector);
        assert_eq!(history.check(9, 5, &sector, false), Ok(()));
        sector[500] ^= 1;
        assert_eq!(history.check(9, 5, &sector, false).unwrap_err().found, None);
        assert_eq!(history.check(9, 5, &sector, true), Ok(()));
    }
}
