//! Connects the kernel's NBD client to a server's Unix socket: the negotiation in user space, then the socket is handed
//! to the kernel.

use std::fs::OpenOptions;
use std::io::{Error, ErrorKind, Read, Result as IoResult, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

unsafe extern "C" {
    fn ioctl(fd: i32, request: u64, ...) -> i32;
}

const NBD_SET_SOCK: u64 = 0xab00;
const NBD_SET_BLKSIZE: u64 = 0xab01;
const NBD_DO_IT: u64 = 0xab03;
const NBD_SET_SIZE_BLOCKS: u64 = 0xab07;
const NBD_SET_FLAGS: u64 = 0xab0a;

const FIXED_NEWSTYLE_NO_ZEROES: u32 = 3;
const OPT_GO: u32 = 7;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const SECTOR: u64 = 512;

pub fn run(device: &str, socket: &str) -> Result<(), String> {
    let mut stream = connect(socket).map_err(|error| format!("{socket}: {error}"))?;
    let (size, flags) = negotiate(&mut stream).map_err(|error| format!("negotiation: {error}"))?;
    let device_file =
        OpenOptions::new().read(true).write(true).open(device).map_err(|error| error.to_string())?;
    let set = |request: u64, value: u64| {
        // SAFETY: all of the NBD requests take one plain integer.
        match unsafe { ioctl(device_file.as_raw_fd(), request, value) } {
            0 => Ok(()),
            _ => Err(format!("{device}: ioctl {request:#x}: {}", Error::last_os_error())),
        }
    };
    set(NBD_SET_BLKSIZE, SECTOR)?;
    set(NBD_SET_SIZE_BLOCKS, size / SECTOR)?;
    set(NBD_SET_FLAGS, u64::from(flags))?;
    set(NBD_SET_SOCK, stream.as_raw_fd() as u64)?;
    println!("\nattaching {size} bytes, flags {flags:#x}");
    // Returns only when the connection ends.
    set(NBD_DO_IT, 0)
}

/// The server may still be on its way: this retries for a while.
fn connect(socket: &str) -> IoResult<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match UnixStream::connect(socket) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            done => return done,
        }
    }
}

fn negotiate(stream: &mut UnixStream) -> IoResult<(u64, u16)> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if &greeting[..16] != b"NBDMAGICIHAVEOPT" {
        return Err(Error::new(ErrorKind::InvalidData, "not an NBD server"));
    }
    let mut request = Vec::from(FIXED_NEWSTYLE_NO_ZEROES.to_be_bytes());
    request.extend(b"IHAVEOPT");
    request.extend(OPT_GO.to_be_bytes());
    // The length of the data: an empty name's length (u32) and no information requests (u16).
    request.extend(6_u32.to_be_bytes());
    request.extend([0; 6]);
    stream.write_all(&request)?;

    let mut export = None;
    loop {
        let mut head = [0; 20];
        stream.read_exact(&mut head)?;
        let (magic, rest) = head.split_at(8);
        let field = |at: usize| u32::from_be_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
        let (kind, length) = (field(4), field(8));
        if magic != OPTION_REPLY.to_be_bytes() || length > 4096 {
            return Err(Error::new(ErrorKind::InvalidData, "not an option reply"));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        match (kind, data.as_slice()) {
            (REP_INFO, [a, b, s0, s1, s2, s3, s4, s5, s6, s7, f0, f1])
                if u16::from_be_bytes([*a, *b]) == INFO_EXPORT =>
            {
                let size = u64::from_be_bytes([*s0, *s1, *s2, *s3, *s4, *s5, *s6, *s7]);
                export = Some((size, u16::from_be_bytes([*f0, *f1])));
            }
            (REP_INFO, _) => {}
            (REP_ACK, _) => return export.ok_or_else(|| Error::new(ErrorKind::InvalidData, "no export")),
            (kind, _) => return Err(Error::other(format!("option reply {kind:#x}"))),
        }
    }
}
