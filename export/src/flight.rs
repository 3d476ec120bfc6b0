//! The memory budget: bytes in flight per connection and over all connections.
//!
//! A request is charged when its header has been read, before its payload or its answer gets memory, and the charge is
//! released when the last byte of the answer has gone into the socket or the connection is given up. Invariants:
//!
//! 1. A connection's requests occupy at most `connection_bytes`; only its own reader waits for that.
//! 2. Beyond a small reserve that each connection has to itself, all connections together occupy at most
//!    `total_bytes`. So the server's memory is bounded by `connections * RESERVE + total_bytes`, and a client with
//!    ordinary small requests never waits for what others occupy.
//! 3. Those that wait for the total are served in the order they came: a large request is not starved by small ones.
//! 4. A connection with nothing charged has nothing in flight: neither executing nor unsent.

use parking_lot::{Condvar, Mutex};
use std::sync::Arc;

/// What each connection may occupy without asking the total.
pub(crate) const RESERVE_BYTES: usize = 256 << 10;

/// The charge for a request's own structures, on top of its payload or answer.
pub(crate) const REQUEST_BYTES: usize = 512;

/// The budget shared by all connections.
pub(crate) struct Total {
    state: Mutex<TotalState>,
    changed: Condvar,
}

struct TotalState {
    free: usize,
    next_ticket: u64,
    serving: u64,
    closed: bool,
}

impl Total {
    pub(crate) fn new(bytes: usize) -> Arc<Self> {
        let state = TotalState { free: bytes, next_ticket: 0, serving: 0, closed: false };
        Arc::new(Total { state: Mutex::new(state), changed: Condvar::new() })
    }

    fn acquire(&self, bytes: usize) -> bool {
        let mut state = self.state.lock();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        while !state.closed && (state.serving != ticket || state.free < bytes) {
            self.changed.wait(&mut state);
        }
        if state.closed {
            return false;
        }
        state.free -= bytes;
        state.serving += 1;
        if state.serving != state.next_ticket {
            self.changed.notify_all();
        }
        true
    }

    fn release(&self, bytes: usize) {
        let mut state = self.state.lock();
        state.free += bytes;
        if state.serving != state.next_ticket {
            self.changed.notify_all();
        }
    }

    /// Turns away everybody who waits, now and later.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_all();
    }

    #[cfg(test)]
    pub(crate) fn free_bytes(&self) -> usize {
        self.state.lock().free
    }
}

/// One connection's requests in flight.
pub(crate) struct Flight {
    state: Mutex<FlightState>,
    changed: Condvar,
    total: Arc<Total>,
    connection_bytes: usize,
}

#[derive(Default)]
struct FlightState {
    used: usize,
    of_reserve: usize,
    waiting: bool,
    abandoned: bool,
}

impl Flight {
    pub(crate) fn new(total: Arc<Total>, connection_bytes: usize) -> Arc<Self> {
        Arc::new(Flight { state: Mutex::default(), changed: Condvar::new(), total, connection_bytes })
    }

    /// Charges `bytes` if that needs no waiting.
    pub(crate) fn try_acquire(self: &Arc<Self>, bytes: usize) -> Option<Permit> {
        let mut state = self.state.lock();
        if state.of_reserve + bytes > RESERVE_BYTES || state.used + bytes > self.connection_bytes {
            return None;
        }
        state.used += bytes;
        state.of_reserve += bytes;
        Some(Permit { flight: Arc::clone(self), bytes, reserve: true })
    }

    /// Charges `bytes`, waiting until they are free. `None` when the connection is given up meanwhile.
    ///
    /// Only the connection's reader calls this. A request beyond the connection's limit is let through alone.
    pub(crate) fn acquire(self: &Arc<Self>, bytes: usize) -> Option<Permit> {
        let mut state = self.state.lock();
        while !state.abandoned && state.used > 0 && state.used + bytes > self.connection_bytes {
            state.waiting = true;
            self.changed.wait(&mut state);
        }
        state.waiting = false;
        if state.abandoned {
            return None;
        }
        state.used += bytes;
        let reserve = state.of_reserve + bytes <= RESERVE_BYTES;
        if reserve {
            state.of_reserve += bytes;
            return Some(Permit { flight: Arc::clone(self), bytes, reserve });
        }
        drop(state);
        if !self.total.acquire(bytes) {
            self.state.lock().used -= bytes;
            return None;
        }
        Some(Permit { flight: Arc::clone(self), bytes, reserve })
    }

    /// Waits until nothing is in flight, or the connection is given up.
    pub(crate) fn wait_idle(&self) {
        let mut state = self.state.lock();
        while state.used > 0 && !state.abandoned {
            state.waiting = true;
            self.changed.wait(&mut state);
        }
        state.waiting = false;
    }

    /// Ends every wait: the connection is given up with requests still in flight.
    pub(crate) fn abandon(&self) {
        self.state.lock().abandoned = true;
        self.changed.notify_all();
    }

    #[cfg(test)]
    pub(crate) fn is_idle(&self) -> bool {
        self.state.lock().used == 0
    }

    fn release(&self, bytes: usize, reserve: bool) {
        if !reserve {
            self.total.release(bytes);
        }
        let mut state = self.state.lock();
        state.used -= bytes;
        if reserve {
            state.of_reserve -= bytes;
        }
        if state.waiting {
            self.changed.notify_all();
        }
    }
}

/// A charge; dropping it releases it.
pub(crate) struct Permit {
    flight: Arc<Flight>,
    bytes: usize,
    reserve: bool,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.flight.release(self.bytes, self.reserve);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn small_requests_use_the_reserve_and_large_ones_the_total() {
        let total = Total::new(1 << 20);
        let flight = Flight::new(Arc::clone(&total), 8 << 20);
        let small = flight.acquire(100 << 10).unwrap();
        assert_eq!(total.free_bytes(), 1 << 20);
        let large = flight.acquire(200 << 10).unwrap();
        assert_eq!(total.free_bytes(), (1 << 20) - (200 << 10));
        drop((small, large));
        assert!(flight.is_idle());
        assert_eq!(total.free_bytes(), 1 << 20);
    }

    #[test]
    fn what_one_connection_occupies_does_not_hinder_small_requests_of_another() {
        let total = Total::new(1 << 20);
        let greedy = Flight::new(Arc::clone(&total), 8 << 20);
        let _all = greedy.acquire(1 << 20).unwrap();
        let modest = Flight::new(Arc::clone(&total), 8 << 20);
        let permits: Vec<_> = (0..32).map(|_| modest.acquire(4096 + REQUEST_BYTES).unwrap()).collect();
        assert_eq!(permits.len(), 32);
    }

    #[test]
    fn waiting_for_the_total_ends_by_release_in_order_and_by_closing() {
        let total = Total::new(1 << 20);
        let flight = Flight::new(Arc::clone(&total), 8 << 20);
        let held = flight.acquire(1 << 20).unwrap();
        let (send, receive) = mpsc::channel();
        std::thread::scope(|scope| {
            let other = Flight::new(Arc::clone(&total), 8 << 20);
            scope.spawn(move || send.send(other.acquire(1 << 20).map(drop).is_some()).unwrap());
            drop(held);
            assert!(receive.recv().unwrap());
        });
        let held = flight.acquire(1 << 20).unwrap();
        let (send, receive) = mpsc::channel();
        std::thread::scope(|scope| {
            let other = Flight::new(Arc::clone(&total), 8 << 20);
            scope.spawn(move || send.send(other.acquire(1 << 20).is_some()).unwrap());
            total.close();
            assert!(!receive.recv().unwrap());
        });
        drop(held);
    }

    #[test]
    fn a_connection_waits_for_itself_at_its_limit() {
        let total = Total::new(8 << 20);
        let flight = Flight::new(total, 1 << 20);
        let first = flight.acquire(1 << 20).unwrap();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| flight.acquire(4096).is_some());
            drop(first);
            assert!(second.join().unwrap());
        });
        assert!(flight.is_idle());
        let _alone = flight.acquire(2 << 20).unwrap();
        flight.abandon();
        assert!(flight.acquire(1).is_none());
        flight.wait_idle();
    }
}
