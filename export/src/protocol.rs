//! The NBD protocol's numbers and wire structures, as `doc/proto.md` of the reference implementation states them.
//!
//! Everything on the wire is big endian. This file knows no sockets and no backend: bytes in, values out.

use std::fmt;

/// `NBDMAGIC`, the first eight bytes of a server's greeting.
pub(crate) const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, in the greeting and before each option.
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, both ways.
pub(crate) const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
pub(crate) const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Transmission flags.
pub(crate) mod transmission {
    pub(crate) const HAS_FLAGS: u16 = 1 << 0;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(crate) const SEND_CACHE: u16 = 1 << 10;
    pub(crate) const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Options of the handshake.
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
}

/// Types of a reply to an option.
pub(crate) mod reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub(crate) const ERR_POLICY: u32 = (1 << 31) + 2;
    pub(crate) const ERR_INVALID: u32 = (1 << 31) + 3;
    pub(crate) const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Information types of `INFO` and `GO`.
pub(crate) const INFO_EXPORT: u16 = 0;
pub(crate) const INFO_BLOCK_SIZE: u16 = 3;

/// Commands of the transmission phase.
pub(crate) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISC: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub(crate) mod flag {
    pub(crate) const FUA: u16 = 1 << 0;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    pub(crate) const FAST_ZERO: u16 = 1 << 4;
}

/// Types of a structured reply's chunks.
pub(crate) mod chunk {
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const OFFSET_HOLE: u16 = 2;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const ERROR: u16 = (1 << 15) + 1;
}

/// The flag that marks the last chunk of a structured reply.
pub(crate) const CHUNK_DONE: u16 = 1;

/// The one metadata context served, and the id it gets.
pub(crate) const ALLOCATION_CONTEXT: &[u8] = b"base:allocation";
pub(crate) const ALLOCATION_CONTEXT_ID: u32 = 1;
pub(crate) const STATE_HOLE: u32 = 1 << 0;
pub(crate) const STATE_ZERO: u32 = 1 << 1;

/// Strings of the protocol (names, queries, messages) are at most this long.
pub(crate) const MAX_STRING_BYTES: usize = 4096;

/// The smallest request alignment that the backend takes, and that clients are told.
pub(crate) const MIN_BLOCK_BYTES: u32 = 512;
/// What clients are told to prefer.
pub(crate) const PREFERRED_BLOCK_BYTES: u32 = 4096;
/// The largest payload of a read or write.
pub(crate) const MAX_PAYLOAD_BYTES: u32 = 32 << 20;

/// The length of a request's header on the wire.
pub(crate) const REQUEST_HEADER_BYTES: usize = 28;

/// An error value as the protocol's clients know it, with the sentence a structured reply carries.
///
/// The sentence is always one of this library's own: a backend's message may hold paths of this machine, which are
/// nothing for a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WireError {
    pub(crate) code: u32,
    pub(crate) message: &'static str,
}

impl WireError {
    pub(crate) const PERM: u32 = 1;
    pub(crate) const IO: u32 = 5;
    pub(crate) const NOMEM: u32 = 12;
    pub(crate) const INVAL: u32 = 22;
    pub(crate) const NOSPC: u32 = 28;
    pub(crate) const OVERFLOW: u32 = 75;
    pub(crate) const NOTSUP: u32 = 95;
    pub(crate) const SHUTDOWN: u32 = 108;

    pub(crate) const fn new(code: u32, message: &'static str) -> Self {
        WireError { code, message }
    }
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    /// The client's mark for this request, sent back untouched.
    pub(crate) cookie: u64,
    /// Byte offset in the export.
    pub(crate) offset: u64,
    /// Length in bytes.
    pub(crate) length: u32,
}

impl Request {
    /// Reads a header; `None` when it does not start with the magic, after which nothing of the stream can be trusted.
    pub(crate) fn decode(bytes: &[u8; REQUEST_HEADER_BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(Request {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?,
        })
    }

    /// Bytes of payload that follow the header on the wire. Only a write has any, whatever else is wrong with it.
    pub(crate) fn payload_bytes(&self) -> u32 {
        if self.command == command::WRITE { self.length } else { 0 }
    }

    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// For logs: `write offset=4096 length=512`.
impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.command {
            command::READ => "read",
            command::WRITE => "write",
            command::DISC => "disconnect",
            command::FLUSH => "flush",
            command::TRIM => "trim",
            command::CACHE => "cache",
            command::WRITE_ZEROES => "write-zeroes",
            command::BLOCK_STATUS => "block-status",
            _ => "unknown",
        };
        write!(f, "{name} offset={} length={}", self.offset, self.length)
    }
}

/// Takes big-endian fields off the front of a byte string; `None` when it is too short.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with its 32-bit length before it.
    pub(crate) fn string(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.u32()?).ok()?;
        self.take(length)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_header_fields_land_where_the_protocol_puts_them() {
        let mut bytes = [0u8; REQUEST_HEADER_BYTES];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&flag::FUA.to_be_bytes());
        bytes[6..8].copy_from_slice(&command::WRITE.to_be_bytes());
        bytes[8..16].copy_from_slice(&0x0102_0304_0506_0708u64.to_be_bytes());
        bytes[16..24].copy_from_slice(&0x1000u64.to_be_bytes());
        bytes[24..].copy_from_slice(&0x200u32.to_be_bytes());
        let request = Request::decode(&bytes).unwrap();
        assert_eq!(
            request,
            Request { flags: 1, command: 1, cookie: 0x0102_0304_0506_0708, offset: 0x1000, length: 0x200 }
        );
        assert_eq!(request.payload_bytes(), 0x200);
        bytes[0] ^= 1;
        assert_eq!(Request::decode(&bytes), None);
    }

    #[test]
    fn a_string_longer_than_its_message_is_refused() {
        let mut fields = Fields(&[0, 0, 0, 5, b'a', b'b']);
        assert_eq!(fields.string(), None);
        let mut fields = Fields(&[0xff, 0xff, 0xff, 0xff]);
        assert_eq!(fields.string(), None);
    }
}
