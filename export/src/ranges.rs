//! Keeps byte-granular writes and sector-granular writes of the same sector apart.
//!
//! A write that does not cover whole sectors reads the sector, changes some bytes and writes it back. Were another
//! client's write of that sector to complete in between, its bytes would be lost although they were acknowledged. So
//! every changing request enters here with the range of whole sectors it touches: ordinary ones *shared* (they may
//! overlap each other, as on any disk), read-modify-writes *exclusive*. Invariants:
//!
//! 1. An exclusive range overlaps no other range that has entered.
//! 2. An exclusive request that waits already turns away newcomers it overlaps, so a stream of shared ones cannot
//!    starve it.
//! 3. Only requests that overlap ever wait for each other: a byte-granular client slows nobody who writes elsewhere.
//!
//! The lists hold at most as many entries as there are threads executing requests.

use parking_lot::{Condvar, Mutex};
use std::ops::Range;

#[derive(Default)]
pub(crate) struct RangeGate {
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Default)]
struct State {
    shared: Vec<Range<u64>>,
    exclusive: Vec<Range<u64>>,
    waiting: usize,
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

fn remove(list: &mut Vec<Range<u64>>, range: &Range<u64>) {
    if let Some(at) = list.iter().position(|entry| entry == range) {
        list.swap_remove(at);
    }
}

impl RangeGate {
    /// Enters for a write of whole sectors; waits for read-modify-writes of any of them.
    pub(crate) fn shared(&self, range: Range<u64>) -> Entered<'_> {
        let mut state = self.state.lock();
        while state.exclusive.iter().any(|other| overlap(other, &range)) {
            state.waiting += 1;
            self.left.wait(&mut state);
            state.waiting -= 1;
        }
        state.shared.push(range.clone());
        Entered { gate: self, range, exclusive: false }
    }

    /// Enters for a read-modify-write; waits for every write that overlaps.
    pub(crate) fn exclusive(&self, range: Range<u64>) -> Entered<'_> {
        let mut state = self.state.lock();
        while state.exclusive.iter().any(|other| overlap(other, &range)) {
            state.waiting += 1;
            self.left.wait(&mut state);
            state.waiting -= 1;
        }
        state.exclusive.push(range.clone());
        while state.shared.iter().any(|other| overlap(other, &range)) {
            state.waiting += 1;
            self.left.wait(&mut state);
            state.waiting -= 1;
        }
        Entered { gate: self, range, exclusive: true }
    }
}

/// A range that has entered; dropping it leaves.
pub(crate) struct Entered<'a> {
    gate: &'a RangeGate,
    range: Range<u64>,
    exclusive: bool,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.state.lock();
        let list = if self.exclusive { &mut state.exclusive } else { &mut state.shared };
        remove(list, &self.range);
        if state.waiting > 0 {
            self.gate.left.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn shared_ranges_overlap_and_exclusive_ones_elsewhere_do_not_wait() {
        let gate = RangeGate::default();
        let _one = gate.shared(0..1024);
        let _two = gate.shared(512..2048);
        let _far = gate.exclusive(2048..2560);
        let _farther = gate.exclusive(4096..4608);
    }

    /// Threads that add one to a counter by reading it, yielding and storing it lose counts unless they are kept apart.
    #[test]
    fn exclusive_ranges_exclude_each_other_and_shared_ones() {
        let gate = RangeGate::default();
        let value = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (gate, value) = (&gate, &value);
                scope.spawn(move || {
                    for round in 0..500u64 {
                        if thread == 3 {
                            drop(gate.shared(0..4096));
                            continue;
                        }
                        let _entered = gate.exclusive((round % 2) * 512..1024);
                        let seen = value.load(Ordering::Relaxed);
                        std::thread::yield_now();
                        value.store(seen + 1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(value.into_inner(), 1500);
        let state = gate.state.lock();
        assert!(state.shared.is_empty() && state.exclusive.is_empty() && state.waiting == 0);
    }
}
