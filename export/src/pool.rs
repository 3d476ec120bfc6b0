//! Threads that serve connections.
//!
//! A thread has no fixed role: it reads one connection's requests, executes one, or sends answers, whatever the
//! [`Task`] says, and then waits for the next task; one that waits too long ends. What bounds the number of threads
//! is what bounds the tasks: one reader and at most one sender per connection, and the limit of workers.

use crate::connection::{Connection, Job};
use parking_lot::{Condvar, Mutex};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a thread without a task stays.
const IDLE: Duration = Duration::from_secs(10);
/// Only pages that are touched count; backends may need some depth.
const STACK_BYTES: usize = 1 << 20;

pub(crate) enum Task {
    /// Greet a new client, then read its requests.
    Greet(Arc<Connection>),
    /// Take over the reading of a connection.
    Read(Arc<Connection>),
    /// Execute one request.
    Run(Arc<Connection>, Job),
    /// Send the answers a client is slow to fetch.
    Send(Arc<Connection>),
}

impl Task {
    fn connection(&self) -> &Arc<Connection> {
        match self {
            Task::Greet(connection)
            | Task::Read(connection)
            | Task::Run(connection, _)
            | Task::Send(connection) => connection,
        }
    }
}

#[derive(Default)]
pub(crate) struct Pool {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Threads that wait, the one that came last on top: its cache is the warmest.
    idle: Vec<Arc<Seat>>,
    threads: usize,
    closed: bool,
}

/// Where a thread waits for its task.
#[derive(Default)]
struct Seat {
    slot: Mutex<Slot>,
    given: Condvar,
}

#[derive(Default)]
struct Slot {
    task: Option<Task>,
    closed: bool,
}

impl Pool {
    /// Has a thread carry out `task`; gives it back if no thread can be had.
    pub(crate) fn submit(self: &Arc<Self>, task: Task) -> Result<(), Task> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(task);
        }
        if let Some(seat) = state.idle.pop() {
            drop(state);
            seat.slot.lock().task = Some(task);
            seat.given.notify_one();
            return Ok(());
        }
        state.threads += 1;
        drop(state);
        let seat = Arc::new(Seat::default());
        seat.slot.lock().task = Some(task);
        let its_seat = Arc::clone(&seat);
        let presence = Presence(Arc::clone(self));
        let body = move || {
            let presence = presence;
            presence.0.work(&its_seat);
        };
        match std::thread::Builder::new().name("nbd".into()).stack_size(STACK_BYTES).spawn(body) {
            Ok(_) => Ok(()),
            // The thread's body is gone, and its presence with it; the task is still in the seat.
            Err(_) => seat.slot.lock().task.take().map_or(Ok(()), Err),
        }
    }

    fn work(self: &Arc<Self>, seat: &Arc<Seat>) {
        let mut frames = Vec::new();
        while let Some(task) = self.next_task(seat) {
            let connection = Arc::clone(task.connection());
            let done = catch_unwind(AssertUnwindSafe(|| match task {
                Task::Greet(connection) => connection.greet(&mut frames),
                Task::Read(connection) => connection.take_over(&mut frames),
                Task::Run(connection, job) => connection.run_job(job, &mut frames),
                Task::Send(connection) => connection.send_stalled(),
            }));
            if done.is_err() {
                frames.clear();
                connection.give_up();
            }
        }
    }

    /// The task in the thread's seat, waiting for one; `None` ends the thread.
    fn next_task(&self, seat: &Arc<Seat>) -> Option<Task> {
        if let Some(task) = seat.slot.lock().task.take() {
            return Some(task);
        }
        {
            let mut state = self.state.lock();
            if state.closed {
                return None;
            }
            state.idle.push(Arc::clone(seat));
        }
        let end = Instant::now() + IDLE;
        {
            let mut slot = seat.slot.lock();
            while slot.task.is_none() && !slot.closed {
                if seat.given.wait_until(&mut slot, end).timed_out() {
                    break;
                }
            }
            if let Some(task) = slot.task.take() {
                return Some(task);
            }
        }
        let mut state = self.state.lock();
        if let Some(at) = state.idle.iter().position(|other| Arc::ptr_eq(other, seat)) {
            state.idle.remove(at);
            return None;
        }
        drop(state);
        // Somebody has taken the seat to put a task there.
        let mut slot = seat.slot.lock();
        while slot.task.is_none() {
            seat.given.wait(&mut slot);
        }
        slot.task.take()
    }

    /// Ends the threads that wait and those that finish from now on.
    pub(crate) fn close(&self) {
        let idle = {
            let mut state = self.state.lock();
            state.closed = true;
            state.idle.clone()
        };
        for seat in idle {
            seat.slot.lock().closed = true;
            seat.given.notify_one();
        }
    }

    /// Waits until all threads have ended or `deadline` passes; returns how many have not.
    pub(crate) fn wait_until(&self, deadline: Instant) -> usize {
        let mut state = self.state.lock();
        while state.threads > 0 {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        state.threads
    }
}

/// A thread counts as long as this lives, also when it never started or panicked.
struct Presence(Arc<Pool>);

impl Drop for Presence {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.threads -= 1;
        if state.threads == 0 {
            self.0.changed.notify_all();
        }
    }
}
