//! An NBD client written from the protocol's text, with nothing taken from the server: it sends whatever a test wants.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub mod cmd {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

pub mod flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 2;
    pub const DF: u16 = 4;
    pub const REQ_ONE: u16 = 8;
    pub const FAST_ZERO: u16 = 16;
}

pub mod opt {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

pub mod rep {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_POLICY: u32 = 0x8000_0002;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
}

/// A test that waits this long for the server has found a hang.
const HANG: Duration = Duration::from_secs(60);

pub trait Stream: Read + Write + Send {
    fn close_write(&self);
    fn watchdog(&self);
    fn again(&self) -> Box<dyn Stream>;
}

impl Stream for UnixStream {
    fn close_write(&self) {
        self.shutdown(std::net::Shutdown::Write).unwrap();
    }
    fn watchdog(&self) {
        self.set_read_timeout(Some(HANG)).unwrap();
        self.set_write_timeout(Some(HANG)).unwrap();
    }
    fn again(&self) -> Box<dyn Stream> {
        Box::new(self.try_clone().unwrap())
    }
}

impl Stream for TcpStream {
    fn close_write(&self) {
        self.shutdown(std::net::Shutdown::Write).unwrap();
    }
    fn watchdog(&self) {
        self.set_read_timeout(Some(HANG)).unwrap();
        self.set_write_timeout(Some(HANG)).unwrap();
    }
    fn again(&self) -> Box<dyn Stream> {
        Box::new(self.try_clone().unwrap())
    }
}

pub struct Client {
    pub stream: Box<dyn Stream>,
}

/// One chunk of a structured reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub done: bool,
    pub cookie: u64,
    pub content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    None,
    Data { offset: u64, data: Vec<u8> },
    Hole { offset: u64, length: u32 },
    Status { context: u32, extents: Vec<(u32, u32)> },
    Error { code: u32, message: String },
}

pub fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes(bytes[..2].try_into().unwrap())
}

pub fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}

pub fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().unwrap())
}

/// The bytes of a request.
pub fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// The bytes of an option.
pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The data of an `INFO` or `GO`.
pub fn info(name: &str, requests: &[u16]) -> Vec<u8> {
    let mut bytes = (name.len() as u32).to_be_bytes().to_vec();
    bytes.extend(name.as_bytes());
    bytes.extend((requests.len() as u16).to_be_bytes());
    bytes.extend(requests.iter().flat_map(|request| request.to_be_bytes()));
    bytes
}

/// The data of a metadata context option.
pub fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut bytes = (name.len() as u32).to_be_bytes().to_vec();
    bytes.extend(name.as_bytes());
    bytes.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        bytes.extend((query.len() as u32).to_be_bytes());
        bytes.extend(query.as_bytes());
    }
    bytes
}

impl Client {
    /// Connects and exchanges greetings.
    pub fn connect(path: &Path) -> Self {
        Self::over(UnixStream::connect(path).unwrap())
    }

    pub fn over(stream: impl Stream + 'static) -> Self {
        let mut client = Self::silent(stream);
        client.raw(&3u32.to_be_bytes());
        client
    }

    /// Reads the server's greeting and says nothing.
    pub fn silent(stream: impl Stream + 'static) -> Self {
        stream.watchdog();
        let mut client = Client { stream: Box::new(stream) };
        let greeting = client.take(18);
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        assert_eq!(be16(&greeting[16..]), 3, "fixed newstyle and no zeroes");
        client
    }

    /// A second handle to the same connection.
    pub fn again(&self) -> Client {
        Client { stream: self.stream.again() }
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Whether the server closed, with nothing sent before.
    pub fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0; 1]) {
            Ok(read) => read == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    /// Sends an option and reads its replies up to the last.
    pub fn option(&mut self, number: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.raw(&option(number, data));
        let mut replies = Vec::new();
        loop {
            let (kind, data) = self.option_reply(number);
            let last = kind == rep::ACK || kind & 1 << 31 != 0;
            replies.push((kind, data));
            if last {
                return replies;
            }
        }
    }

    pub fn option_reply(&mut self, number: u32) -> (u32, Vec<u8>) {
        let header = self.take(20);
        assert_eq!(be64(&header), 0x0003_e889_0455_65a9);
        assert_eq!(be32(&header[8..]), number);
        let data = self.take(be32(&header[16..]) as usize);
        (be32(&header[12..]), data)
    }

    /// Enters the transmission phase with simple replies, free to access any byte range.
    pub fn go(mut self) -> Self {
        let replies = self.option(opt::GO, &info("", &[]));
        assert_eq!(replies.last().unwrap().0, rep::ACK);
        self
    }

    /// Enters the transmission phase with structured replies and `base:allocation`.
    pub fn go_structured(mut self) -> Self {
        assert_eq!(self.option(opt::STRUCTURED_REPLY, &[]), [(rep::ACK, vec![])]);
        assert_eq!(self.option(opt::SET_META_CONTEXT, &queries("", &["base:allocation"])).len(), 2);
        self.go()
    }

    pub fn send(&mut self, flags: u16, command: u16, cookie: u64, offset: u64, length: u32, payload: &[u8]) {
        let mut bytes = request(flags, command, cookie, offset, length);
        bytes.extend(payload);
        self.raw(&bytes);
    }

    /// A simple reply's (error, cookie).
    pub fn simple_reply(&mut self) -> (u32, u64) {
        let header = self.take(16);
        assert_eq!(be32(&header), 0x6744_6698, "a simple reply");
        (be32(&header[4..]), be64(&header[8..]))
    }

    /// Sends a request without payload and returns the error of its simple reply.
    pub fn simple(&mut self, flags: u16, command: u16, offset: u64, length: u32) -> u32 {
        self.send(flags, command, 77, offset, length, &[]);
        let (error, cookie) = self.simple_reply();
        assert_eq!(cookie, 77);
        error
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        assert_eq!(self.try_write(0, offset, data), 0);
    }

    pub fn try_write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        self.send(flags, cmd::WRITE, 88, offset, data.len() as u32, data);
        let (error, cookie) = self.simple_reply();
        assert_eq!(cookie, 88);
        error
    }

    /// Reads with a simple reply.
    pub fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        assert_eq!(self.simple(0, cmd::READ, offset, length), 0);
        self.take(length as usize)
    }

    pub fn chunk(&mut self) -> Chunk {
        let header = self.take(20);
        assert_eq!(be32(&header), 0x668e_33ef, "a structured chunk");
        let payload = self.take(be32(&header[16..]) as usize);
        let content = match be16(&header[6..]) {
            0 => {
                assert!(payload.is_empty());
                Content::None
            }
            1 => {
                assert!(payload.len() >= 9);
                Content::Data { offset: be64(&payload), data: payload[8..].to_vec() }
            }
            2 => {
                assert_eq!(payload.len(), 12);
                Content::Hole { offset: be64(&payload), length: be32(&payload[8..]) }
            }
            5 => {
                assert!(payload.len() >= 12 && payload.len() % 8 == 4);
                let pairs = payload[4..].chunks_exact(8).map(|pair| (be32(pair), be32(&pair[4..])));
                Content::Status { context: be32(&payload), extents: pairs.collect() }
            }
            0x8001 => {
                assert_eq!(payload.len(), 6 + usize::from(be16(&payload[4..])));
                let message = String::from_utf8(payload[6..].to_vec()).unwrap();
                Content::Error { code: be32(&payload), message }
            }
            other => panic!("unknown chunk type {other}"),
        };
        let flags = be16(&header[4..]);
        assert_eq!(flags & !1, 0);
        Chunk { done: flags & 1 != 0, cookie: be64(&header[8..]), content }
    }

    /// Sends a request and reads its structured reply.
    pub fn structured(&mut self, flags: u16, command: u16, offset: u64, length: u32) -> Vec<Content> {
        self.send(flags, command, 99, offset, length, &[]);
        let mut contents = Vec::new();
        loop {
            let chunk = self.chunk();
            assert_eq!(chunk.cookie, 99);
            contents.push(chunk.content);
            if chunk.done {
                return contents;
            }
        }
    }
}
