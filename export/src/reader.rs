//! Takes requests off a connection's socket.
//!
//! Many small requests arrive with one system call; large payloads go straight into their buffers. A client may be
//! silent for ever between requests, but a request it has begun has a deadline. Before the thread waits for anything,
//! answers that are queued are sent: they may be what the client waits for.

use crate::connection::{Connection, End, Job};
use crate::execute::{charge_bytes, check};
use crate::flight::{Permit, REQUEST_BYTES};
use crate::frame::Frame;
use crate::pace::kind_of;
use crate::patience::Patience;
use crate::protocol::{REQUEST_HEADER_BYTES, Request, command};
use crate::socket;
use crate::stream::MAX_DRAINED_PAYLOAD_BYTES;
use std::sync::Arc;

const BUFFER_BYTES: usize = 128 << 10;
/// What is missing of a payload is received straight into its place from this length on.
const DIRECT_BYTES: usize = 8 << 10;
/// While a client writes payloads from this length on, headers are received with little of what follows them, so that
/// most of a payload is copied once.
const LARGE_PAYLOAD_BYTES: usize = 16 << 10;
const HEADER_FILL_BYTES: usize = 4 << 10;

/// The reading end of a connection. There is one per connection, and whoever holds it is the connection's reader.
pub(crate) struct Reader {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// How much is received at once in search of a header.
    fill_bytes: usize,
    /// Counts requests, so that each execution by the reader has a number of its own.
    pub(crate) sequence: u64,
}

impl Reader {
    pub(crate) fn new() -> Box<Self> {
        Box::new(Reader {
            buffer: vec![0; BUFFER_BYTES].into(),
            start: 0,
            end: 0,
            fill_bytes: BUFFER_BYTES,
            sequence: 0,
        })
    }

    fn buffered(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Whether another request waits in the buffer, whole as far as a header tells.
    pub(crate) fn has_request(&self) -> bool {
        self.end - self.start >= REQUEST_HEADER_BYTES
    }

    /// The next request that is to be executed, with its payload. Requests that are refused are answered on the way.
    pub(crate) fn next(&mut self, connection: &Arc<Connection>, frames: &mut Vec<Frame>) -> Result<Job, End> {
        loop {
            if connection.server.is_draining() {
                return Err(End::Shutdown);
            }
            let header = self.header(connection)?;
            let request = Request::decode(&header).ok_or(End::Protocol("a request without its magic"))?;
            if request.command == command::DISC {
                return Err(End::Left);
            }
            if request.payload_bytes() > MAX_DRAINED_PAYLOAD_BYTES {
                return Err(End::Protocol("a write far beyond the maximum payload"));
            }
            let payload_bytes = request.payload_bytes() as usize;
            let refused = match check(&request, &connection.session(), connection.export()) {
                Ok(()) => {
                    let permit = charge(connection, charge_bytes(&request))?;
                    let payload = if payload_bytes > 0 {
                        let mut buffer = connection.export().buffers.get(payload_bytes);
                        self.payload(connection, &mut buffer)?;
                        Some(buffer)
                    } else {
                        None
                    };
                    return Ok(Job { kind: kind_of(&request), request, payload, permit });
                }
                Err(refused) => refused,
            };
            self.skip(connection, payload_bytes)?;
            let mut frame = Frame::error(&request, connection.session().structured, refused);
            frame.permit = Some(charge(connection, REQUEST_BYTES)?);
            frames.push(frame);
            connection.queue(frames);
        }
    }

    fn header(&mut self, connection: &Arc<Connection>) -> Result<[u8; REQUEST_HEADER_BYTES], End> {
        let mut patience = None;
        loop {
            if let Some(header) = self.buffered().first_chunk() {
                let header = *header;
                self.start += REQUEST_HEADER_BYTES;
                return Ok(header);
            }
            self.compact();
            connection.send();
            let room = &mut self.buffer[self.end..self.fill_bytes];
            let received = if self.end == 0 {
                socket::receive(&connection.socket, room)?
            } else {
                let limits = &connection.server.options.limits;
                let patience = patience.get_or_insert_with(|| Patience::new(limits));
                socket::receive_until(&connection.socket, room, patience.deadline())?
            };
            if received == 0 {
                return Err(if self.end == 0 { End::Left } else { End::Protocol("a request cut short") });
            }
            self.end += received;
        }
    }

    /// Moves what is buffered to the front.
    fn compact(&mut self) {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
    }

    fn payload(&mut self, connection: &Arc<Connection>, payload: &mut [u8]) -> Result<(), End> {
        self.fill_bytes = if payload.len() >= LARGE_PAYLOAD_BYTES { HEADER_FILL_BYTES } else { BUFFER_BYTES };
        let mut filled = self.take_buffered(payload);
        if filled == payload.len() {
            return Ok(());
        }
        connection.send();
        let mut patience = Patience::new(&connection.server.options.limits);
        while filled < payload.len() {
            let left = &mut payload[filled..];
            let part = if left.len() >= DIRECT_BYTES {
                let received = socket::receive_until(&connection.socket, left, patience.deadline())?;
                if received == 0 {
                    return Err(End::Protocol("a payload cut short"));
                }
                received
            } else {
                self.refill(connection, &patience)?;
                self.take_buffered(left)
            };
            filled += part;
            if filled < payload.len() {
                patience.progress(part)?;
            }
        }
        Ok(())
    }

    /// Receives and drops a payload.
    fn skip(&mut self, connection: &Arc<Connection>, length: usize) -> Result<(), End> {
        let mut left = length;
        let buffered = left.min(self.end - self.start);
        self.start += buffered;
        left -= buffered;
        if left == 0 {
            return Ok(());
        }
        connection.send();
        let mut patience = Patience::new(&connection.server.options.limits);
        while left > 0 {
            self.refill(connection, &patience)?;
            let part = left.min(self.end);
            self.start = part;
            left -= part;
            if left > 0 {
                patience.progress(part)?;
            }
        }
        Ok(())
    }

    fn take_buffered(&mut self, target: &mut [u8]) -> usize {
        let length = target.len().min(self.end - self.start);
        target[..length].copy_from_slice(&self.buffer[self.start..self.start + length]);
        self.start += length;
        length
    }

    /// Fills the buffer, which is empty, with the middle of a payload and what follows it.
    fn refill(&mut self, connection: &Arc<Connection>, patience: &Patience) -> Result<(), End> {
        debug_assert_eq!(self.start, self.end);
        self.start = 0;
        self.end = 0;
        self.end = socket::receive_until(&connection.socket, &mut self.buffer, patience.deadline())?;
        if self.end == 0 { Err(End::Protocol("a payload cut short")) } else { Ok(()) }
    }
}

/// Charges the connection's budget, waiting if need be.
fn charge(connection: &Arc<Connection>, bytes: usize) -> Result<Permit, End> {
    if let Some(permit) = connection.flight.try_acquire(bytes) {
        return Ok(permit);
    }
    connection.send();
    connection.flight.acquire(bytes).ok_or(End::Shutdown)
}
