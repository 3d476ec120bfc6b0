//! The server's state machine on any byte stream, in one thread: what a fuzzer drives, and the simplest way to serve
//! one connection of an unusual kind.

use crate::backend::Backend;
use crate::buffer::BufferPool;
use crate::execute::{check, execute};
use crate::export::Export;
use crate::frame::Frame;
use crate::handshake::{HandshakeError, negotiate};
use crate::protocol::{MAX_PAYLOAD_BYTES, REQUEST_HEADER_BYTES, Request, command};
use std::io::{self, Read, Write};
use std::sync::Arc;

/// Writes with more payload than this end the connection; between the maximum and this their payload is read and
/// dropped, so that the client learns why.
pub(crate) const MAX_DRAINED_PAYLOAD_BYTES: u32 = 2 * MAX_PAYLOAD_BYTES;

/// Serves one client over `stream` until it disconnects or breaks the protocol: the handshake, then its requests one
/// after another. Returns how many requests were answered.
///
/// The answers are those of [`Server`](crate::Server), which shares this code; only threads, limits and deadlines are
/// missing, so `stream` must bring its own timeouts. It never panics, whatever the client sends, and holds at most one
/// payload and one answer at a time.
///
/// # Errors
///
/// The stream's own errors, and [`io::ErrorKind::InvalidData`] when the client broke the protocol. A client that leaves
/// between two requests is no error.
pub fn serve_stream<S: Read + Write>(stream: &mut S, backend: Arc<dyn Backend>) -> io::Result<u64> {
    let export = Export::new(backend, BufferPool::new(1 << 20));
    let session = match negotiate(stream, &export, || {}) {
        Ok(session) => session,
        Err(HandshakeError::Aborted) => return Ok(0),
        Err(HandshakeError::Io(error)) => return Err(error),
        Err(error @ HandshakeError::Protocol(_)) => {
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
    };
    let mut answered = 0;
    let mut frames = Vec::new();
    loop {
        let mut header = [0; REQUEST_HEADER_BYTES];
        match stream.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(answered),
            Err(error) => return Err(error),
        }
        let Some(request) = Request::decode(&header) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a request without its magic"));
        };
        if request.command == command::DISC {
            return Ok(answered);
        }
        let payload_bytes = request.payload_bytes();
        if payload_bytes > MAX_DRAINED_PAYLOAD_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a write far beyond the maximum payload"));
        }
        let verdict = check(&request, &session, &export);
        let mut payload = None;
        if payload_bytes > 0 {
            if verdict.is_ok() {
                let mut buffer = export.buffers.get(payload_bytes as usize);
                stream.read_exact(&mut buffer)?;
                payload = Some(buffer);
            } else {
                let dropped =
                    io::copy(&mut Read::by_ref(stream).take(u64::from(payload_bytes)), &mut io::sink())?;
                if dropped < u64::from(payload_bytes) {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
        match verdict {
            // A failed request has its frame too; there is no log here.
            Ok(()) => drop(execute(&request, payload.as_ref(), &session, &export, &mut frames)),
            Err(error) => frames.push(Frame::error(&request, session.structured, error)),
        }
        for frame in frames.drain(..) {
            stream.write_all(frame.head())?;
            stream.write_all(frame.body())?;
        }
        stream.flush()?;
        answered += 1;
    }
}
