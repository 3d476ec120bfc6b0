//! One client's connection, and which thread does what for it.
//!
//! The right to read requests is the [`Reader`] itself. Whoever holds it reads a request and then decides:
//!
//! * A request whose kind has been fast is executed at once, by the same thread. While it is executed, the reader
//!   lies in [`Connection::reader`], where the [monitor](crate::monitor) can have it taken by another thread should
//!   the request turn out to hang. Afterwards the thread takes it back and goes on.
//! * A slow one is executed while another thread reads on: either the reader is left to a fresh thread and the
//!   request executed here, or, when more requests wait in the buffer already, the request is given away and reading
//!   goes on here.
//!
//! Invariants:
//!
//! 1. There is one reader. It is held by one thread, or lies in the slot, and then a thread that put it there comes
//!    back for it or a thread has been sent for it.
//! 2. Of the threads that serve a connection all but one are counted in `extra`, and a thread that comes for the
//!    reader and finds none leaves and takes one off the count. The limits on that count bound how many requests are
//!    executed at once; when it is used up, the thread that reads executes, and the client's further requests wait in
//!    the socket.
//! 3. Answers are queued by whoever executed and sent before the thread waits for anything.
//! 4. When reading has ended, the connection stays until every request in flight is answered or the client is beyond
//!    reach.

use crate::buffer::Buffer;
use crate::execute::execute;
use crate::export::Export;
use crate::flight::{Flight, Permit};
use crate::frame::Frame;
use crate::handshake::{Session, negotiate};
use crate::options::{Event, from_now};
use crate::output::{Output, Sent};
use crate::pace::Kind;
use crate::pool::Task;
use crate::protocol::Request;
use crate::reader::Reader;
use crate::server::Shared;
use crate::socket::Timed;
use parking_lot::Mutex;
use rustix::fd::OwnedFd;
use rustix::net::Shutdown;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// Answers are sent when this much is queued, even while more requests wait in the buffer.
const SEND_BYTES: usize = 64 << 10;

/// A request that is to be executed.
pub(crate) struct Job {
    pub(crate) request: Request,
    pub(crate) payload: Option<Buffer>,
    pub(crate) permit: Permit,
    pub(crate) kind: Kind,
}

/// Why reading from a client ended.
#[derive(Debug)]
pub(crate) enum End {
    Left,
    Shutdown,
    Protocol(&'static str),
    Io(io::Error),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        End::Io(error)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Left => write!(f, "the client left"),
            End::Shutdown => write!(f, "the server is shutting down"),
            End::Protocol(what) => write!(f, "the client broke the protocol: {what}"),
            End::Io(error) => write!(f, "{error}"),
        }
    }
}

pub(crate) struct Connection {
    pub(crate) number: u64,
    pub(crate) socket: OwnedFd,
    pub(crate) server: Arc<Shared>,
    pub(crate) flight: Arc<Flight>,
    output: Output,
    session: OnceLock<Session>,
    /// Set before the client learns that its handshake is over, so that it is not dropped as one that is still in it.
    entered: AtomicBool,
    reader: Mutex<Option<Box<Reader>>>,
    extra: AtomicUsize,
    /// The number of the request that the reader's thread is executing, or 0.
    pub(crate) executing: AtomicU64,
    /// What the monitor saw there last, and what it acted on last.
    pub(crate) seen: AtomicU64,
    pub(crate) acted_on: AtomicU64,
}

impl Connection {
    pub(crate) fn new(number: u64, socket: OwnedFd, server: Arc<Shared>) -> Arc<Self> {
        let flight = Flight::new(Arc::clone(&server.total), server.options.limits.connection_bytes);
        Arc::new(Connection {
            number,
            socket,
            server,
            flight,
            output: Output::default(),
            session: OnceLock::new(),
            entered: AtomicBool::new(false),
            reader: Mutex::new(None),
            extra: AtomicUsize::new(0),
            executing: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            acted_on: AtomicU64::new(0),
        })
    }

    pub(crate) fn session(&self) -> Session {
        self.session.get().copied().unwrap_or_default()
    }

    pub(crate) fn export(&self) -> &Export {
        &self.server.export
    }

    pub(crate) fn in_handshake(&self) -> bool {
        !self.entered.load(Ordering::Acquire)
    }

    /// Negotiates, then reads requests.
    pub(crate) fn greet(self: &Arc<Self>, frames: &mut Vec<Frame>) {
        let deadline = from_now(self.server.options.limits.handshake_timeout);
        let entering = || self.entered.store(true, Ordering::Release);
        match negotiate(&mut Timed { socket: &self.socket, deadline }, self.export(), entering) {
            Ok(session) => {
                let _ = self.session.set(session);
                self.read(Reader::new(), frames);
            }
            Err(error) => self.over(error.to_string()),
        }
    }

    /// Comes for the reader; if it is there, sends what is queued and reads on.
    pub(crate) fn take_over(self: &Arc<Self>, frames: &mut Vec<Frame>) {
        match self.pick_up() {
            Some(reader) => {
                self.send();
                self.read(reader, frames);
            }
            None => self.leave(),
        }
    }

    /// Executes a request that was given to this thread.
    pub(crate) fn run_job(self: &Arc<Self>, job: Job, frames: &mut Vec<Frame>) {
        self.execute(job, frames);
        self.output.push(frames);
        self.send();
        self.take_over(frames);
    }

    /// Reads requests and has them executed, until reading ends or another thread reads on.
    fn read(self: &Arc<Self>, mut reader: Box<Reader>, frames: &mut Vec<Frame>) {
        loop {
            let job = match reader.next(self, frames) {
                Ok(job) => job,
                Err(end) => {
                    drop(reader);
                    return self.finish(end);
                }
            };
            if self.server.pace.is_slow(job.kind) && self.enter() {
                if reader.has_request() {
                    match self.server.pool.submit(Task::Run(Arc::clone(self), job)) {
                        Ok(()) => {}
                        Err(task) => {
                            self.leave();
                            if let Task::Run(_, job) = task {
                                self.execute(job, frames);
                                self.queue(frames);
                            }
                        }
                    }
                    continue;
                }
                self.send();
                self.put_down(reader);
                if self.server.pool.submit(Task::Read(Arc::clone(self))).is_err() {
                    self.leave();
                }
                self.execute(job, frames);
                self.output.push(frames);
                self.send();
            } else {
                reader.sequence += 1;
                let number = reader.sequence;
                self.put_down(reader);
                self.executing.store(number, Ordering::SeqCst);
                self.server.monitor.watch();
                self.execute(job, frames);
                let _ = self.executing.compare_exchange(number, 0, Ordering::SeqCst, Ordering::Relaxed);
                self.queue(frames);
            }
            match self.pick_up() {
                Some(own) => reader = own,
                None => {
                    self.send();
                    return self.leave();
                }
            }
        }
    }

    /// Takes the reader out of its slot, and lets go of the slot.
    fn pick_up(&self) -> Option<Box<Reader>> {
        self.reader.lock().take()
    }

    fn put_down(&self, reader: Box<Reader>) {
        *self.reader.lock() = Some(reader);
    }

    /// Counts one more thread for this connection, if the limits allow.
    pub(crate) fn enter(&self) -> bool {
        let limits = &self.server.options.limits;
        if self.extra.fetch_add(1, Ordering::Relaxed) >= limits.workers_per_connection {
            self.extra.fetch_sub(1, Ordering::Relaxed);
            return false;
        }
        if self.server.busy_workers.fetch_add(1, Ordering::Relaxed) >= limits.workers {
            self.leave();
            return false;
        }
        true
    }

    fn leave(&self) {
        self.extra.fetch_sub(1, Ordering::Relaxed);
        self.server.busy_workers.fetch_sub(1, Ordering::Relaxed);
    }

    /// Has a fresh thread come for the reader, whose thread hangs in a request.
    pub(crate) fn relieve(self: &Arc<Self>) -> bool {
        if !self.enter() {
            return false;
        }
        if self.server.pool.submit(Task::Read(Arc::clone(self))).is_err() {
            self.leave();
            return false;
        }
        true
    }

    fn execute(&self, job: Job, frames: &mut Vec<Frame>) {
        let Job { request, payload, permit, kind } = job;
        let start = Instant::now();
        let result = execute(&request, payload.as_ref(), &self.session(), self.export(), frames);
        self.server.pace.record(kind, start.elapsed());
        if let Some(last) = frames.last_mut() {
            last.permit = Some(permit);
        }
        if let Err(error) = result {
            self.server.observe(|| Event::RequestFailed {
                connection: self.number,
                request: request.to_string(),
                error,
            });
        }
    }

    /// Queues answers; sends them if many are queued already.
    pub(crate) fn queue(self: &Arc<Self>, frames: &mut Vec<Frame>) {
        if self.output.push(frames) >= SEND_BYTES {
            self.send();
        }
    }

    /// Sends what is queued, without waiting for the client.
    pub(crate) fn send(self: &Arc<Self>) {
        match self.output.send(&self.socket) {
            Sent::Done => {}
            Sent::Stalled => {
                if let Err(Task::Send(this)) = self.server.pool.submit(Task::Send(Arc::clone(self))) {
                    this.send_stalled();
                }
            }
            Sent::Broken => self.cut(),
        }
    }

    /// Sends what the client was slow to fetch; gives the connection up when it is too slow.
    pub(crate) fn send_stalled(&self) {
        if self.output.send_stalled(&self.socket, &self.server.options.limits).is_err() {
            self.cut();
        }
    }

    /// Gives the connection up after a thread of it has panicked.
    pub(crate) fn give_up(&self) {
        self.flight.abandon();
        self.over("the server failed; this is a defect of it".into());
    }

    /// Ends the connection at once, whatever is in flight.
    pub(crate) fn cut(&self) {
        self.output.break_off();
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }

    /// Makes the reader see the end of the stream; answers can still be sent.
    pub(crate) fn stop_reading(&self) {
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Read);
    }

    /// Reading has ended: waits for what is in flight, then closes.
    fn finish(self: &Arc<Self>, end: End) {
        if let End::Io(_) = end {
            self.cut();
        }
        self.send();
        self.flight.wait_idle();
        self.over(end.to_string());
    }

    fn over(&self, reason: String) {
        self.cut();
        self.server.remove(self.number);
        self.server.observe(|| Event::Disconnected { connection: self.number, reason });
    }
}
