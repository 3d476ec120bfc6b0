//! The handshake: fixed newstyle negotiation, from the greeting to the transmission phase.
//!
//! Works on any reader and writer; whoever calls gives them their deadline. Bounded in everything: an option's data
//! is kept only up to [`MAX_OPTION_BYTES`], read and dropped up to [`MAX_DRAINED_BYTES`], and beyond that ends the
//! connection, as do more than [`MAX_OPTIONS`] options.

use crate::export::Export;
use crate::protocol::{
    ALLOCATION_CONTEXT, ALLOCATION_CONTEXT_ID, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Fields, GREETING_MAGIC,
    INFO_BLOCK_SIZE, INFO_EXPORT, MAX_PAYLOAD_BYTES, MAX_STRING_BYTES, MIN_BLOCK_BYTES, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, PREFERRED_BLOCK_BYTES, option, reply, transmission,
};
use std::io::{self, Read, Write};

const MAX_OPTION_BYTES: usize = 64 << 10;
const MAX_DRAINED_BYTES: usize = 1 << 20;
const MAX_OPTIONS: usize = 128;

/// What was negotiated, fixed for the rest of the connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Session {
    /// Reads are answered with structured replies, and errors with chunks.
    pub(crate) structured: bool,
    /// `base:allocation` was selected for the export entered.
    pub(crate) allocation_context: bool,
    /// The client asked for the block sizes and so promised to keep to them. Others may send any byte range.
    pub(crate) aligned: bool,
}

/// Why a handshake ended without a session.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("the client ended the handshake")]
    Aborted,
    #[error("the handshake broke off: {0}")]
    Io(#[from] io::Error),
    #[error("the client broke the protocol: {0}")]
    Protocol(&'static str),
}

/// The flags of the export, as this session sees them.
pub(crate) fn transmission_flags(export: &Export, structured: bool) -> u16 {
    use transmission::*;
    let mut flags = HAS_FLAGS
        | SEND_FLUSH
        | SEND_FUA
        | SEND_TRIM
        | SEND_WRITE_ZEROES
        | SEND_FAST_ZERO
        | SEND_CACHE
        | CAN_MULTI_CONN;
    if structured {
        flags |= SEND_DF;
    }
    if export.read_only() {
        flags |= READ_ONLY;
    }
    flags
}

/// Negotiates with a client until it enters the transmission phase. `entering` is called just before the client is told
/// that it has.
pub(crate) fn negotiate(
    stream: &mut (impl Read + Write),
    export: &Export,
    entering: impl Fn(),
) -> Result<Session, HandshakeError> {
    let mut greeting = Vec::with_capacity(18);
    greeting.extend(GREETING_MAGIC.to_be_bytes());
    greeting.extend(OPTION_MAGIC.to_be_bytes());
    greeting.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    stream.write_all(&greeting)?;

    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    let flags = u32::from_be_bytes(flags);
    if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
        return Err(HandshakeError::Protocol("unknown handshake flags"));
    }
    let mut negotiation = Negotiation {
        stream,
        export,
        fixed: flags & u32::from(FLAG_FIXED_NEWSTYLE) != 0,
        no_zeroes: flags & u32::from(FLAG_NO_ZEROES) != 0,
        session: Session::default(),
        context_name: None,
        replies: Vec::new(),
    };
    for _ in 0..MAX_OPTIONS {
        if let Some(session) = negotiation.option(&entering)? {
            return Ok(session);
        }
    }
    Err(HandshakeError::Protocol("too many options"))
}

struct Negotiation<'a, S> {
    stream: &'a mut S,
    export: &'a Export,
    fixed: bool,
    no_zeroes: bool,
    session: Session,
    /// The export name that `SET_META_CONTEXT` selected `base:allocation` for.
    context_name: Option<Vec<u8>>,
    /// Replies to the option at hand, sent together.
    replies: Vec<u8>,
}

impl<S: Read + Write> Negotiation<'_, S> {
    /// Handles one option; a session when it entered the transmission phase.
    fn option(&mut self, entering: &impl Fn()) -> Result<Option<Session>, HandshakeError> {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header)?;
        let mut fields = Fields(&header);
        let (Some(magic), Some(number), Some(length)) = (fields.u64(), fields.u32(), fields.u32()) else {
            return Err(HandshakeError::Protocol("short option"));
        };
        if magic != OPTION_MAGIC {
            return Err(HandshakeError::Protocol("an option without its magic"));
        }
        if !self.fixed && number != option::EXPORT_NAME {
            return Err(HandshakeError::Protocol("an option that needs fixed newstyle negotiation"));
        }
        let length = length as usize;
        if length > MAX_OPTION_BYTES {
            if length > MAX_DRAINED_BYTES || number == option::EXPORT_NAME {
                return Err(HandshakeError::Protocol("an option far too long"));
            }
            self.drain(length)?;
            self.reply(number, reply::ERR_TOO_BIG, &[b"option too long"]);
            self.send()?;
            return Ok(None);
        }
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data)?;

        self.replies.clear();
        let entered = match number {
            option::EXPORT_NAME => self.export_name(&data).map(Some)?,
            option::ABORT => {
                self.reply(number, reply::ACK, &[]);
                // The client may be gone already, which is its right.
                let _ = self.send();
                return Err(HandshakeError::Aborted);
            }
            option::LIST => self.without_data(number, &data, |this| {
                this.reply(number, reply::SERVER, &[&0u32.to_be_bytes()]);
                this.reply(number, reply::ACK, &[]);
            }),
            option::STARTTLS => self.without_data(number, &data, |this| {
                this.reply(number, reply::ERR_POLICY, &[b"this server does not offer TLS"]);
            }),
            option::STRUCTURED_REPLY => self.without_data(number, &data, |this| {
                this.session.structured = true;
                this.reply(number, reply::ACK, &[]);
            }),
            option::INFO | option::GO => self.info(number, &data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(number, &data);
                None
            }
            _ => {
                self.reply(number, reply::ERR_UNSUP, &[b"unknown option"]);
                None
            }
        };
        if entered.is_some() {
            entering();
        }
        self.send()?;
        Ok(entered)
    }

    /// Appends a reply to the option at hand.
    fn reply(&mut self, number: u32, kind: u32, parts: &[&[u8]]) {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        self.replies.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        self.replies.extend(number.to_be_bytes());
        self.replies.extend(kind.to_be_bytes());
        self.replies.extend((length as u32).to_be_bytes());
        for part in parts {
            self.replies.extend(*part);
        }
    }

    fn send(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.replies)?;
        self.replies.clear();
        self.stream.flush()
    }

    fn drain(&mut self, length: usize) -> io::Result<()> {
        let mut scrap = [0; 4096];
        let mut left = length;
        while left > 0 {
            let part = left.min(scrap.len());
            self.stream.read_exact(&mut scrap[..part])?;
            left -= part;
        }
        Ok(())
    }

    fn without_data(&mut self, number: u32, data: &[u8], answer: impl FnOnce(&mut Self)) -> Option<Session> {
        if data.is_empty() {
            answer(self);
        } else {
            self.reply(number, reply::ERR_INVALID, &[b"this option has no data"]);
        }
        None
    }

    /// The session for an export entered under `name`.
    fn enter(&self, name: &[u8], aligned: bool) -> Session {
        let allocation_context = self.context_name.as_deref() == Some(name);
        Session { allocation_context, aligned, ..self.session }
    }

    fn export_name(&mut self, name: &[u8]) -> Result<Session, HandshakeError> {
        if name.len() > MAX_STRING_BYTES {
            return Err(HandshakeError::Protocol("an export name too long"));
        }
        let flags = transmission_flags(self.export, self.session.structured);
        self.replies.extend(self.export.size_bytes().to_be_bytes());
        self.replies.extend(flags.to_be_bytes());
        if !self.no_zeroes {
            self.replies.extend([0; 124]);
        }
        Ok(self.enter(name, false))
    }

    fn info(&mut self, number: u32, data: &[u8]) -> Option<Session> {
        let Some((name, requests)) = parse_info(data) else {
            self.reply(number, reply::ERR_INVALID, &[b"malformed request for information"]);
            return None;
        };
        let sizes_wanted = requests.contains(&INFO_BLOCK_SIZE);
        let flags = transmission_flags(self.export, self.session.structured);
        let size = self.export.size_bytes();
        let export = [&INFO_EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()];
        self.reply(number, reply::INFO, &export);
        if sizes_wanted {
            let sizes = [
                &INFO_BLOCK_SIZE.to_be_bytes()[..],
                &MIN_BLOCK_BYTES.to_be_bytes(),
                &PREFERRED_BLOCK_BYTES.to_be_bytes(),
                &MAX_PAYLOAD_BYTES.to_be_bytes(),
            ];
            self.reply(number, reply::INFO, &sizes);
        }
        self.reply(number, reply::ACK, &[]);
        (number == option::GO).then(|| self.enter(name, sizes_wanted))
    }

    fn meta_context(&mut self, number: u32, data: &[u8]) {
        let set = number == option::SET_META_CONTEXT;
        if set {
            // Whatever comes of it, what was selected before no longer is.
            self.context_name = None;
        }
        if !self.session.structured {
            self.reply(number, reply::ERR_INVALID, &[b"negotiate structured replies first"]);
            return;
        }
        let Some((name, queries)) = parse_queries(data) else {
            self.reply(number, reply::ERR_INVALID, &[b"malformed metadata context queries"]);
            return;
        };
        let matched = if set {
            queries.contains(&ALLOCATION_CONTEXT)
        } else {
            queries.is_empty()
                || queries.iter().any(|query| *query == b"base:" || *query == ALLOCATION_CONTEXT)
        };
        if matched {
            let id = if set { ALLOCATION_CONTEXT_ID } else { 0 };
            self.reply(number, reply::META_CONTEXT, &[&id.to_be_bytes(), ALLOCATION_CONTEXT]);
        }
        if set && matched {
            self.context_name = Some(name.to_vec());
        }
        self.reply(number, reply::ACK, &[]);
    }
}

/// The name and information types of an `INFO` or `GO`.
fn parse_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.string().filter(|name| name.len() <= MAX_STRING_BYTES)?;
    let count = fields.u16()?;
    let requests = (0..count).map(|_| fields.u16()).collect::<Option<Vec<_>>>()?;
    fields.is_empty().then_some((name, requests))
}

/// The export name and queries of a metadata context option.
fn parse_queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut fields = Fields(data);
    let name = fields.string().filter(|name| name.len() <= MAX_STRING_BYTES)?;
    let count = fields.u32()?;
    // Each query has at least its length, so the data bounds how many there are, whatever the count says.
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.string().filter(|query| query.len() <= MAX_STRING_BYTES)?);
    }
    fields.is_empty().then_some((name, queries))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn information_requests_must_fill_their_option_exactly() {
        let good = [0, 0, 0, 1, b'x', 0, 2, 0, 3, 0, 0];
        assert_eq!(parse_info(&good), Some((&b"x"[..], vec![3, 0])));
        for length in 0..good.len() {
            assert_eq!(parse_info(&good[..length]), None, "cut to {length}");
        }
        assert_eq!(parse_info(&[&good[..], &[0]].concat()), None);
        assert_eq!(parse_info(&[0xff; 12]), None);
    }

    #[test]
    fn a_query_count_without_queries_ends_at_the_data() {
        let lie = [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, b'a'];
        assert_eq!(parse_queries(&lie), None);
        let none = [0u8; 8];
        assert_eq!(parse_queries(&none), Some((&[][..], vec![])));
    }
}
