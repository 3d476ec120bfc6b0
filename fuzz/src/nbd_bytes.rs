//! Target `nbd_bytes`: whatever a client sends, the server survives it, and what it answers is well formed.
//!
//! The first byte says how much of a handshake is done for the input: none, simple replies, or structured ones with block
//! status. The rest is what the client sends.

use crate::Seed;
use crate::input::Input;
use cowvhd_export::{MemoryBackend, serve_stream};
use std::io::{self, Read, Write};
use std::sync::Arc;

const SIZE: u64 = 1 << 20;
/// More is cut off: a few requests of the largest size are enough.
const MAX_ANSWER_BYTES: usize = 96 << 20;

struct Stream<'a> {
    sent: &'a [u8],
    answers: Vec<u8>,
}

impl Read for Stream<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.sent.read(buf)
    }
}

impl Write for Stream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.answers.len() > MAX_ANSWER_BYTES {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.answers.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The body of the target.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let choice = input.u8() % 4;
    let handshake = handshake(choice);
    let sent = [&handshake, input.0].concat();
    let backend = Arc::new(match choice {
        3 => MemoryBackend::new(SIZE).into_read_only(),
        _ => MemoryBackend::new(SIZE),
    });
    let mut stream = Stream { sent: &sent, answers: Vec::new() };
    let served = serve_stream(&mut stream, backend);
    // Data in simple replies has no length of its own.
    if choice < 2 || stream.answers.len() > MAX_ANSWER_BYTES {
        return;
    }
    let answered = well_formed(&stream.answers);
    if let Ok(requests) = served {
        assert!(answered == requests, "{answered} answers to {requests} requests");
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn handshake(choice: u8) -> Vec<u8> {
    const GO: [u8; 6] = [0; 6];
    let mut bytes = vec![0, 0, 0, 3];
    match choice {
        0 => return Vec::new(),
        1 => {}
        _ => {
            bytes.extend(option(8, &[]));
            bytes.extend(option(10, b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation"));
        }
    }
    bytes.extend(option(7, &GO));
    bytes
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// Walks over the answers, which must be whole, and counts them.
fn well_formed(answers: &[u8]) -> u64 {
    let mut rest = Input(answers);
    assert!(rest.bytes(16) == b"NBDMAGICIHAVEOPT");
    rest.bytes(2);
    // The replies to the options of the handshake, up to that of GO.
    loop {
        let header = rest.bytes(20);
        assert!(header.len() == 20 && number(&header[..8]) == 0x0003_e889_0455_65a9);
        let length = number(&header[16..]) as usize;
        assert!(rest.bytes(length).len() == length);
        if number(&header[8..12]) == 7 && number(&header[12..16]) == 1 {
            break;
        }
    }
    let mut count = 0;
    while !rest.is_empty() {
        let magic = number(&rest.0[..4.min(rest.0.len())]);
        if magic == 0x668e_33ef {
            let header = rest.bytes(20);
            let length = number(header.get(16..).unwrap_or_default()) as usize;
            assert!(header.len() == 20 && rest.bytes(length).len() == length, "a chunk cut short");
            count += number(&header[4..6]) & 1;
        } else {
            assert!(magic == 0x6744_6698, "neither a simple nor a structured reply: {magic:x}");
            assert!(rest.bytes(16).len() == 16);
            count += 1;
        }
    }
    count
}

/// A request's bytes.
fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// Inputs to start from: a session with every command, in each kind of handshake.
pub fn seeds() -> Vec<Seed> {
    let mut session = Vec::new();
    for (number, flags) in
        [(1, 0), (1, 1), (0, 0), (0, 4), (3, 0), (4, 0), (5, 0), (6, 2), (6, 16), (7, 8), (9, 0)]
    {
        let length = if number == 3 { 0 } else { 1024 };
        session.extend(request(flags, number, u64::from(number), 512, length));
        if number == 1 {
            session.extend([5; 1024]);
        }
    }
    session.extend(request(0, 0, 1, SIZE - 512, 1024));
    session.extend(request(0, 0, 2, u64::MAX, u32::MAX));
    session.extend(request(0, 2, 3, 0, 0));
    let with = |choice: u8| [&[choice][..], &session].concat();
    let options = [&[0][..], &handshake(2), &session].concat();
    let negotiation = [
        &[0, 0, 0, 0, 3][..],
        &option(3, &[]),
        &option(5, &[]),
        &option(6, b"\0\0\0\x01x\0\x01\0\x03"),
        &option(9, b"\0\0\0\0\0\0\0\0"),
        &option(99, b"what"),
        &option(1, b"name"),
        &session,
    ]
    .concat();
    vec![
        ("simple", with(1)),
        ("structured", with(2)),
        ("read-only", with(3)),
        ("whole", options),
        ("negotiation", negotiation),
    ]
}
