//! A connection's answers on their way into the socket.
//!
//! Any thread appends frames; whoever asks to send becomes the sender unless there is one already, and sends
//! everything queued, also what others append meanwhile, many frames with one call. Invariants:
//!
//! 1. There is at most one sender, and while frames are queued there is one, or a thread of the connection is about
//!    to ask.
//! 2. [`Output::send`] never waits for the client. When the socket is full, it leaves what is left to
//!    [`Output::send_stalled`], which runs in a thread of its own, so that no worker and no reader is ever held by a
//!    client that does not fetch its answers.
//! 3. Nothing is queued without a permit of the connection's budget, which bounds the queue.
//! 4. Once broken, frames are dropped as they come, which releases their permits.

use crate::frame::Frame;
use crate::options::Limits;
use crate::patience::Patience;
use crate::socket;
use parking_lot::Mutex;
use rustix::fd::OwnedFd;
use std::collections::VecDeque;
use std::io::{self, IoSlice};

/// Parts handed to one call.
const MAX_PARTS: usize = 128;
/// Bytes after which no further frame joins a call.
const CALL_BYTES: usize = 512 << 10;
/// A queue that a flood has made longer than this is not kept.
const KEEP_FRAMES: usize = 1024;

#[derive(Default)]
pub(crate) struct Output {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Frame>,
    queued_bytes: usize,
    sending: bool,
    broken: bool,
    /// What the sender left when the socket was full.
    stalled: Option<Batch>,
    /// An empty queue to swap in.
    spare: VecDeque<Frame>,
}

/// Frames being sent, the first of them perhaps in part.
struct Batch {
    frames: VecDeque<Frame>,
    first_sent: usize,
}

/// What came of an attempt to send.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// Nothing is left, or another thread is at it.
    Done,
    /// The socket is full: [`Output::send_stalled`] has to be called, where waiting harms nobody.
    Stalled,
    /// The connection is broken and has just become so.
    Broken,
}

impl Output {
    /// Queues frames and returns how many bytes are queued now.
    pub(crate) fn push(&self, frames: &mut Vec<Frame>) -> usize {
        let mut state = self.state.lock();
        if state.broken {
            drop(state);
            frames.clear();
            return 0;
        }
        state.queued_bytes += frames.iter().map(Frame::wire_bytes).sum::<usize>();
        state.queue.extend(frames.drain(..));
        state.queued_bytes
    }

    /// Sends what is queued as far as the socket takes it.
    pub(crate) fn send(&self, socket: &OwnedFd) -> Sent {
        let mut spent = None;
        loop {
            let Some(mut batch) = self.next_batch(spent.take(), false) else {
                return Sent::Done;
            };
            match batch.send(|parts| socket::send_now(socket, parts)) {
                Ok(true) => spent = Some(batch.frames),
                Ok(false) => {
                    self.state.lock().stalled = Some(batch);
                    return Sent::Stalled;
                }
                Err(_) => {
                    drop(batch);
                    self.break_off();
                    return Sent::Broken;
                }
            }
        }
    }

    /// Sends what [`Output::send`] left and what is queued after it, waiting for the client as long as `limits` allow.
    pub(crate) fn send_stalled(&self, socket: &OwnedFd, limits: &Limits) -> io::Result<()> {
        let Some(mut batch) = self.state.lock().stalled.take() else {
            return Ok(());
        };
        let mut patience = Patience::new(limits);
        loop {
            let sent = batch.send(|parts| {
                loop {
                    if let Some(sent) = socket::send_now(socket, parts)? {
                        patience.progress(sent)?;
                        return Ok(Some(sent));
                    }
                    socket::wait_to_send(socket, patience.deadline())?;
                }
            });
            if let Err(error) = sent {
                drop(batch);
                self.break_off();
                return Err(error);
            }
            match self.next_batch(Some(batch.frames), true) {
                Some(next) => batch = next,
                None => return Ok(()),
            }
        }
    }

    /// Takes what is queued; `None` when another thread is sending or nothing is queued, and then the caller no longer
    /// is the sender.
    fn next_batch(&self, spent: Option<VecDeque<Frame>>, is_sender: bool) -> Option<Batch> {
        let is_sender = is_sender || spent.is_some();
        let mut state = self.state.lock();
        if let Some(spent) = spent
            && spent.capacity() <= KEEP_FRAMES
        {
            state.spare = spent;
        }
        if state.sending && !is_sender {
            return None;
        }
        state.sending = !state.queue.is_empty();
        if !state.sending {
            return None;
        }
        state.queued_bytes = 0;
        let empty = std::mem::take(&mut state.spare);
        let frames = std::mem::replace(&mut state.queue, empty);
        Some(Batch { frames, first_sent: 0 })
    }

    /// Drops what is queued, now and later.
    pub(crate) fn break_off(&self) {
        let mut state = self.state.lock();
        state.broken = true;
        state.sending = false;
        state.queued_bytes = 0;
        let dropped = (std::mem::take(&mut state.queue), state.stalled.take());
        drop(state);
        // Dropping frames takes other locks.
        drop(dropped);
    }
}

impl Batch {
    /// Sends until nothing is left (`true`) or `call` has no room (`false`).
    fn send(
        &mut self,
        mut call: impl FnMut(&[IoSlice<'_>]) -> io::Result<Option<usize>>,
    ) -> io::Result<bool> {
        while !self.frames.is_empty() {
            let mut parts = [IoSlice::new(&[]); MAX_PARTS];
            let mut count = 0;
            let mut bytes = 0;
            let mut skip = self.first_sent;
            for frame in &self.frames {
                if count + 2 > MAX_PARTS || bytes >= CALL_BYTES {
                    break;
                }
                for part in [frame.head(), frame.body()] {
                    let left = part.get(skip..).unwrap_or_default();
                    skip = skip.saturating_sub(part.len());
                    if !left.is_empty() {
                        parts[count] = IoSlice::new(left);
                        count += 1;
                        bytes += left.len();
                    }
                }
            }
            match call(&parts[..count])? {
                Some(sent) => self.advance(sent),
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    fn advance(&mut self, sent: usize) {
        self.first_sent += sent;
        while let Some(first) = self.frames.front() {
            let length = first.wire_bytes();
            if self.first_sent < length {
                break;
            }
            self.first_sent -= length;
            self.frames.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::BufferPool;
    use crate::frame::Body;
    use crate::protocol::Request;
    use std::os::unix::net::UnixStream;

    fn frames(count: u64, length: usize) -> Vec<Frame> {
        let pool = BufferPool::new(0);
        (0..count)
            .map(|cookie| {
                let request = Request { flags: 0, command: 0, cookie, offset: 0, length: 0 };
                let mut body = pool.get(length);
                body.fill(cookie as u8);
                Frame::simple(&request, 0, Body::Bytes(body))
            })
            .collect()
    }

    /// However few bytes each call takes, the wire carries the frames whole and in order.
    #[test]
    fn partial_sends_resume_where_they_stopped() {
        let expected: Vec<u8> =
            frames(5, 100).iter().flat_map(|frame| [frame.head(), frame.body()].concat()).collect();
        for step in [1, 7, 16, 17, 115, 116, 117, 300, 10_000] {
            let mut batch = Batch { frames: frames(5, 100).into(), first_sent: 0 };
            let mut wire: Vec<u8> = Vec::new();
            let mut full = false;
            while !batch
                .send(|parts| {
                    full = !full;
                    if full {
                        return Ok(None);
                    }
                    let all: Vec<u8> = parts.iter().flat_map(|part| part.to_vec()).collect();
                    let sent = all.len().min(step);
                    wire.extend(&all[..sent]);
                    Ok(Some(sent))
                })
                .unwrap()
            {}
            assert_eq!(wire, expected, "steps of {step}");
        }
    }

    #[test]
    fn a_full_socket_stalls_the_sender_and_nobody_else_sends_meanwhile() {
        use std::io::Read;
        let (near, mut far) = UnixStream::pair().unwrap();
        let near = OwnedFd::from(near);
        let output = Output::default();
        output.push(&mut frames(200, 32 << 10));
        assert_eq!(output.send(&near), Sent::Stalled);
        output.push(&mut frames(1, 10));
        assert_eq!(output.send(&near), Sent::Done);
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            far.read_to_end(&mut all).unwrap();
            all
        });
        output.send_stalled(&near, &Limits::default()).unwrap();
        drop(near);
        let all = reader.join().unwrap();
        assert_eq!(all.len(), 200 * (16 + (32 << 10)) + 26);
        assert!(!output.state.lock().sending);
    }

    #[test]
    fn a_peer_that_left_breaks_the_output_and_later_frames_are_dropped() {
        let (near, far) = UnixStream::pair().unwrap();
        drop(far);
        let output = Output::default();
        output.push(&mut frames(2, 10));
        assert_eq!(output.send(&OwnedFd::from(near)), Sent::Broken);
        assert_eq!(output.push(&mut frames(2, 10)), 0);
        assert!(output.state.lock().queue.is_empty());
    }
}
