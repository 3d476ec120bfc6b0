//! Watches for requests that hang in the thread that reads.
//!
//! Fast requests are executed by the thread that read them. Should one of them hang after all, the client's other
//! requests would wait behind it. So a thread looks every [`TICK`] at what each connection's reading thread is
//! executing, and where it is still the same request, sends another thread to read on. With nothing to watch it
//! sleeps.

use crate::server::Shared;
use parking_lot::{Condvar, Mutex};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const TICK: Duration = Duration::from_millis(2);
/// Ticks without any request after which the monitor sleeps.
const QUIET_TICKS: u32 = 50;

#[derive(Default)]
pub(crate) struct Monitor {
    awake: AtomicBool,
    ended: Mutex<bool>,
    wake: Condvar,
}

impl Monitor {
    /// Makes sure that the monitor is awake; called after `executing` was set.
    pub(crate) fn watch(&self) {
        // SeqCst: either this sees that the monitor went to sleep, or the monitor's last look sees the request.
        if !self.awake.load(Ordering::SeqCst) {
            let _ended = self.ended.lock();
            self.awake.store(true, Ordering::SeqCst);
            self.wake.notify_one();
        }
    }

    pub(crate) fn end(&self) {
        *self.ended.lock() = true;
        self.wake.notify_one();
    }

    /// Watches until [`Monitor::end`].
    pub(crate) fn run(&self, server: &Shared) {
        let mut quiet = 0;
        loop {
            {
                let mut ended = self.ended.lock();
                if !*ended {
                    if self.awake.load(Ordering::SeqCst) {
                        self.wake.wait_for(&mut ended, TICK);
                    } else {
                        self.wake.wait(&mut ended);
                    }
                }
                if *ended {
                    return;
                }
            }
            if self.look(server) {
                quiet = 0;
                continue;
            }
            quiet += 1;
            if quiet >= QUIET_TICKS {
                quiet = 0;
                self.awake.store(false, Ordering::SeqCst);
                if server.connections().iter().any(|other| other.executing.load(Ordering::SeqCst) != 0) {
                    self.awake.store(true, Ordering::SeqCst);
                }
            }
        }
    }

    /// Looks at every connection once; whether anything is or was going on.
    fn look(&self, server: &Shared) -> bool {
        let mut busy = false;
        for connection in server.connections() {
            let now = connection.executing.load(Ordering::SeqCst);
            let before = connection.seen.swap(now, Ordering::Relaxed);
            busy |= now != before || now != 0;
            let hangs = now != 0 && now == before && connection.acted_on.load(Ordering::Relaxed) != now;
            if hangs && connection.relieve() {
                connection.acted_on.store(now, Ordering::Relaxed);
            }
        }
        busy
    }
}
