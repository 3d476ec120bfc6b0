//! Reply frames: what goes onto the wire in one piece, a header and perhaps a body.
//!
//! One request is answered by one frame, or with structured replies by several, of which the last carries the done
//! flag. Frames of different requests may be interleaved; the frames of one request stay in order.

use crate::buffer::Buffer;
use crate::flight::Permit;
use crate::protocol::{CHUNK_DONE, Request, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, WireError, chunk};

/// The longest header: a structured chunk's 20 bytes with a hole's 12.
const HEAD_BYTES: usize = 32;

pub(crate) enum Body {
    None,
    Bytes(Buffer),
    Text(&'static str),
}

pub(crate) struct Frame {
    head: [u8; HEAD_BYTES],
    head_length: u8,
    body: Body,
    /// What the request occupies of the memory budget, on its last frame: dropping the frame once sent releases it.
    pub(crate) permit: Option<Permit>,
}

impl Frame {
    fn new(body: Body) -> Self {
        Frame { head: [0; HEAD_BYTES], head_length: 0, body, permit: None }
    }

    fn put<const N: usize>(mut self, bytes: [u8; N]) -> Self {
        let at = usize::from(self.head_length);
        self.head[at..at + N].copy_from_slice(&bytes);
        self.head_length += N as u8;
        self
    }

    fn structured(request: &Request, done: bool, kind: u16, payload_bytes: u32, body: Body) -> Self {
        Frame::new(body)
            .put(STRUCTURED_REPLY_MAGIC.to_be_bytes())
            .put(if done { CHUNK_DONE } else { 0 }.to_be_bytes())
            .put(kind.to_be_bytes())
            .put(request.cookie.to_be_bytes())
            .put(payload_bytes.to_be_bytes())
    }

    /// A simple reply; `error` 0 is success.
    pub(crate) fn simple(request: &Request, error: u32, body: Body) -> Self {
        Frame::new(body)
            .put(SIMPLE_REPLY_MAGIC.to_be_bytes())
            .put(error.to_be_bytes())
            .put(request.cookie.to_be_bytes())
    }

    /// A chunk that says nothing but that the request is done.
    pub(crate) fn none(request: &Request) -> Self {
        Frame::structured(request, true, chunk::NONE, 0, Body::None)
    }

    /// A chunk of data that was read from `offset`.
    pub(crate) fn data(request: &Request, done: bool, offset: u64, data: Buffer) -> Self {
        let length = data.len() as u32 + 8;
        Frame::structured(request, done, chunk::OFFSET_DATA, length, Body::Bytes(data))
            .put(offset.to_be_bytes())
    }

    /// A chunk that says `length` bytes from `offset` are zeros.
    pub(crate) fn hole(request: &Request, done: bool, offset: u64, length: u32) -> Self {
        Frame::structured(request, done, chunk::OFFSET_HOLE, 12, Body::None)
            .put(offset.to_be_bytes())
            .put(length.to_be_bytes())
    }

    /// The chunk of a metadata context; `descriptors` are its (length, flags) pairs, encoded.
    pub(crate) fn block_status(request: &Request, context: u32, descriptors: Buffer) -> Self {
        let length = descriptors.len() as u32 + 4;
        Frame::structured(request, true, chunk::BLOCK_STATUS, length, Body::Bytes(descriptors))
            .put(context.to_be_bytes())
    }

    /// The answer to a request that failed.
    pub(crate) fn error(request: &Request, structured: bool, error: WireError) -> Self {
        if !structured {
            return Frame::simple(request, error.code, Body::None);
        }
        let text = error.message.len() as u16;
        Frame::structured(request, true, chunk::ERROR, 6 + u32::from(text), Body::Text(error.message))
            .put(error.code.to_be_bytes())
            .put(text.to_be_bytes())
    }

    pub(crate) fn head(&self) -> &[u8] {
        &self.head[..usize::from(self.head_length)]
    }

    pub(crate) fn body(&self) -> &[u8] {
        match &self.body {
            Body::None => &[],
            Body::Bytes(bytes) => bytes,
            Body::Text(text) => text.as_bytes(),
        }
    }

    pub(crate) fn wire_bytes(&self) -> usize {
        self.head().len() + self.body().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::BufferPool;

    const REQUEST: Request =
        Request { flags: 0, command: 0, cookie: 0x1122_3344_5566_7788, offset: 0, length: 0 };

    #[test]
    fn the_length_of_a_structured_chunk_is_what_follows_its_header() {
        let pool = BufferPool::new(0);
        let frames = [
            Frame::none(&REQUEST),
            Frame::data(&REQUEST, true, 512, pool.get(1024)),
            Frame::hole(&REQUEST, false, 512, 4096),
            Frame::block_status(&REQUEST, 1, pool.get(16)),
            Frame::error(&REQUEST, true, WireError::new(5, "no")),
        ];
        for frame in frames {
            let said = u32::from_be_bytes(frame.head()[16..20].try_into().unwrap()) as usize;
            assert_eq!(said, frame.wire_bytes() - 20);
            assert_eq!(frame.head()[8..16], REQUEST.cookie.to_be_bytes());
        }
    }

    #[test]
    fn simple_replies_carry_no_message() {
        let frame = Frame::error(&REQUEST, false, WireError::new(WireError::NOSPC, "past the end"));
        assert_eq!(frame.wire_bytes(), 16);
        assert_eq!(frame.head()[4..8], 28u32.to_be_bytes());
    }
}
