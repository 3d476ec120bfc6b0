//! From a request to its reply frames: the checks the protocol asks for, then the disk.
//!
//! [`check`] judges a header alone, so that nothing is allocated and no payload is kept for a request that will be
//! refused. [`execute`] does what passed. Neither knows sockets or threads.

use crate::backend::{Errno, Extent, ExtentKind};
use crate::buffer::{Buffer, class_bytes};
use crate::export::Export;
use crate::flight::REQUEST_BYTES;
use crate::frame::{Body, Frame};
use crate::handshake::Session;
use crate::protocol::{
    ALLOCATION_CONTEXT_ID, MAX_PAYLOAD_BYTES, MIN_BLOCK_BYTES, Request, STATE_HOLE, STATE_ZERO, WireError,
    command, flag,
};

/// Reads from this length on are looked at for holes.
const SPARSE_READ_BYTES: u32 = 64 << 10;
/// A hole shorter than this is cheaper to send as data.
const HOLE_BYTES: u64 = 32 << 10;

/// Descriptors in one block status reply; clients ask again from where it ends.
const MAX_DESCRIPTORS: usize = 8192;
const DESCRIPTOR_BYTES: usize = 8;
/// The backend is asked for extents in windows, so that what it returns is bounded too: from the first length, doubling
/// while the answers are short, up to the last.
const FIRST_WINDOW_BYTES: u64 = 4 << 20;
const LAST_WINDOW_BYTES: u64 = 16 << 20;
const SHORT_ANSWER_EXTENTS: usize = 256;

/// What a request occupies while it is in flight.
pub(crate) fn charge_bytes(request: &Request) -> usize {
    REQUEST_BYTES
        + match request.command {
            // A read of part of a sector reads the whole of it.
            command::READ => {
                let block = u64::from(MIN_BLOCK_BYTES);
                let unaligned = request.offset % block + u64::from(request.length);
                class_bytes(unaligned.next_multiple_of(block) as usize)
            }
            command::WRITE => class_bytes(request.length as usize),
            command::BLOCK_STATUS => MAX_DESCRIPTORS * DESCRIPTOR_BYTES,
            _ => 0,
        }
}

/// Whether a request may be executed, judged by its header alone.
pub(crate) fn check(request: &Request, session: &Session, export: &Export) -> Result<(), WireError> {
    const fn invalid(message: &'static str) -> WireError {
        WireError::new(WireError::INVAL, message)
    }
    let allowed_flags = match request.command {
        command::READ if session.structured => flag::FUA | flag::DF,
        command::READ | command::WRITE | command::FLUSH | command::TRIM | command::CACHE => flag::FUA,
        command::WRITE_ZEROES => flag::FUA | flag::NO_HOLE | flag::FAST_ZERO,
        command::BLOCK_STATUS => flag::FUA | flag::REQ_ONE,
        _ => return Err(invalid("unknown command")),
    };
    if request.flags & !allowed_flags != 0 {
        return Err(invalid("a flag that this command does not have"));
    }
    if request.command == command::FLUSH {
        if request.offset != 0 || request.length != 0 {
            return Err(invalid("a flush has neither offset nor length"));
        }
        return Ok(());
    }
    let writes = matches!(request.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
    if writes && export.read_only() {
        return Err(WireError::new(WireError::PERM, "the export is read-only"));
    }
    if matches!(request.command, command::READ | command::WRITE) && request.length > MAX_PAYLOAD_BYTES {
        let code = if request.command == command::READ && session.structured {
            WireError::OVERFLOW
        } else {
            WireError::INVAL
        };
        return Err(WireError::new(code, "longer than the maximum payload"));
    }
    match request.offset.checked_add(u64::from(request.length)) {
        Some(end) if end <= export.size_bytes() => {}
        _ if matches!(request.command, command::WRITE | command::WRITE_ZEROES) => {
            return Err(WireError::new(WireError::NOSPC, "past the end of the export"));
        }
        _ => return Err(invalid("past the end of the export")),
    }
    let block = u64::from(MIN_BLOCK_BYTES);
    if session.aligned && (!request.offset.is_multiple_of(block) || u64::from(request.length) % block != 0) {
        return Err(invalid("not a multiple of the negotiated minimum block size"));
    }
    if request.command == command::BLOCK_STATUS {
        if !session.allocation_context {
            return Err(invalid("no metadata context was negotiated"));
        }
        if request.length == 0 {
            return Err(invalid("block status of nothing"));
        }
    }
    Ok(())
}

/// Executes a request that [`check`] let through and appends its frames, in order, the last one marked as such.
///
/// `Err` is the backend's failure; the frame that tells the client is appended then too.
pub(crate) fn execute(
    request: &Request,
    payload: Option<&Buffer>,
    session: &Session,
    export: &Export,
    frames: &mut Vec<Frame>,
) -> Result<(), Errno> {
    let offset = request.offset;
    let length = u64::from(request.length);
    let done = match request.command {
        command::READ if length > 0 => {
            return or_error(request, session, frames, |frames| read(request, session, export, frames));
        }
        command::BLOCK_STATUS => {
            return or_error(request, session, frames, |frames| block_status(request, export, frames));
        }
        command::WRITE if length > 0 => match payload {
            Some(payload) => export.write(payload, offset),
            None => Err(Errno::new(5, "a write without payload")),
        },
        command::TRIM if length > 0 => export.discard(offset, length),
        command::WRITE_ZEROES if length > 0 => {
            let punch = !request.has(flag::NO_HOLE);
            if request.has(flag::FAST_ZERO) && !export.zeroes_are_fast(offset, length, punch) {
                let error = WireError::new(WireError::NOTSUP, "zeroing this would not be fast");
                frames.push(Frame::error(request, session.structured, error));
                return Ok(());
            }
            export.write_zeroes(offset, length, punch)
        }
        command::FLUSH => export.flush(),
        _ => Ok(()),
    };
    let durable = match request.command {
        command::WRITE | command::TRIM | command::WRITE_ZEROES if request.has(flag::FUA) => {
            done.and_then(|()| export.flush())
        }
        _ => done,
    };
    match durable {
        Ok(()) if session.structured && request.command == command::READ => frames.push(Frame::none(request)),
        Ok(()) => frames.push(Frame::simple(request, 0, Body::None)),
        Err(errno) => return fail(request, session, frames, errno),
    }
    Ok(())
}

fn fail(request: &Request, session: &Session, frames: &mut Vec<Frame>, errno: Errno) -> Result<(), Errno> {
    frames.push(Frame::error(request, session.structured, wire_error(&errno)));
    Err(errno)
}

/// Runs `work`; should it fail, its frames are taken back and an error is the only answer.
fn or_error(
    request: &Request,
    session: &Session,
    frames: &mut Vec<Frame>,
    work: impl FnOnce(&mut Vec<Frame>) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let before = frames.len();
    work(frames).or_else(|errno| {
        frames.truncate(before);
        fail(request, session, frames, errno)
    })
}

/// The protocol's nearest error value.
fn wire_error(errno: &Errno) -> WireError {
    const EPERM: i32 = 1;
    const ENOMEM: i32 = 12;
    const EACCES: i32 = 13;
    const EINVAL: i32 = 22;
    const EFBIG: i32 = 27;
    const ENOSPC: i32 = 28;
    const EROFS: i32 = 30;
    const ESHUTDOWN: i32 = 108;
    const EDQUOT: i32 = 122;
    match errno.code() {
        EPERM | EACCES | EROFS => WireError::new(WireError::PERM, "not permitted"),
        ENOMEM => WireError::new(WireError::NOMEM, "out of memory"),
        EINVAL => WireError::new(WireError::INVAL, "invalid request"),
        ENOSPC | EDQUOT | EFBIG => WireError::new(WireError::NOSPC, "no space left"),
        ESHUTDOWN => WireError::new(WireError::SHUTDOWN, "shutting down"),
        _ => WireError::new(WireError::IO, "input/output error"),
    }
}

fn read(request: &Request, session: &Session, export: &Export, frames: &mut Vec<Frame>) -> Result<(), Errno> {
    let (offset, length) = (request.offset, request.length);
    if !session.structured {
        let data = export.read(offset, length as usize)?;
        frames.push(Frame::simple(request, 0, Body::Bytes(data)));
        return Ok(());
    }
    if length >= SPARSE_READ_BYTES && !request.has(flag::DF) && aligned(offset, length) {
        // Without extents the disk can still be read.
        let extents = export.extents(offset, u64::from(length)).unwrap_or_default();
        let runs = data_and_hole_runs(&extents);
        // Many runs may round up to more memory than the request was charged.
        let occupied: usize =
            runs.iter().filter(|run| !run.hole).map(|run| class_bytes(run.length as usize)).sum();
        if runs.iter().any(|run| run.hole) && occupied <= class_bytes(length as usize) {
            let mut left = runs.len();
            for run in runs {
                left -= 1;
                frames.push(if run.hole {
                    Frame::hole(request, left == 0, run.offset, run.length as u32)
                } else {
                    let data = export.read(run.offset, run.length as usize)?;
                    Frame::data(request, left == 0, run.offset, data)
                });
            }
            return Ok(());
        }
    }
    let data = export.read(offset, length as usize)?;
    frames.push(Frame::data(request, true, offset, data));
    Ok(())
}

fn aligned(offset: u64, length: u32) -> bool {
    offset.is_multiple_of(u64::from(MIN_BLOCK_BYTES)) && length.is_multiple_of(MIN_BLOCK_BYTES)
}

struct Run {
    offset: u64,
    length: u64,
    hole: bool,
}

/// What to send as data and what as holes: zeros too short to be worth a chunk count as data.
fn data_and_hole_runs(extents: &[Extent]) -> Vec<Run> {
    let mut zeros: Vec<Run> = Vec::new();
    for extent in extents {
        let hole = extent.kind != ExtentKind::Data;
        match zeros.last_mut() {
            Some(last) if last.hole == hole => last.length += extent.length,
            _ => zeros.push(Run { offset: extent.offset, length: extent.length, hole }),
        }
    }
    let mut runs: Vec<Run> = Vec::new();
    for mut run in zeros {
        run.hole &= run.length >= HOLE_BYTES;
        match runs.last_mut() {
            Some(last) if last.hole == run.hole => last.length += run.length,
            _ => runs.push(run),
        }
    }
    runs
}

fn block_status(request: &Request, export: &Export, frames: &mut Vec<Frame>) -> Result<(), Errno> {
    let block = u64::from(MIN_BLOCK_BYTES);
    let end = request.offset + u64::from(request.length);
    let limit = if request.has(flag::REQ_ONE) { 1 } else { MAX_DESCRIPTORS };
    let mut descriptors: Vec<(u64, u32)> = Vec::new();
    // Whole sectors around the range; the first and last descriptor are cut to it.
    let mut at = request.offset - request.offset % block;
    let last = end.next_multiple_of(block);
    let mut window = FIRST_WINDOW_BYTES;
    'windows: while at < last {
        let extents = export.extents(at, window.min(last - at))?;
        for extent in &extents {
            let start = extent.offset.max(request.offset);
            let length = (extent.offset + extent.length).min(end) - start;
            let state = match extent.kind {
                ExtentKind::Data => 0,
                ExtentKind::Zero => STATE_ZERO,
                ExtentKind::Hole => STATE_ZERO | STATE_HOLE,
            };
            let full = descriptors.len() == limit;
            match descriptors.last_mut() {
                Some(previous) if previous.1 == state => previous.0 += length,
                _ if full => break 'windows,
                _ => descriptors.push((length, state)),
            }
        }
        at += window.min(last - at);
        if extents.len() < SHORT_ANSWER_EXTENTS {
            window = (window * 2).min(LAST_WINDOW_BYTES);
        }
    }
    let mut encoded = export.buffers.get(descriptors.len() * DESCRIPTOR_BYTES);
    for (bytes, (length, state)) in encoded.chunks_exact_mut(DESCRIPTOR_BYTES).zip(&descriptors) {
        // The sum of all lengths is the request's, which has 32 bits.
        bytes[..4].copy_from_slice(&(*length as u32).to_be_bytes());
        bytes[4..].copy_from_slice(&state.to_be_bytes());
    }
    frames.push(Frame::block_status(request, ALLOCATION_CONTEXT_ID, encoded));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ExtentKind::{Data, Hole, Zero};

    fn runs(extents: &[(u64, ExtentKind)]) -> Vec<(u64, u64, bool)> {
        let mut at = 0;
        let extents: Vec<_> = extents
            .iter()
            .map(|(length, kind)| {
                at += length;
                Extent { offset: at - length, length: *length, kind: *kind }
            })
            .collect();
        data_and_hole_runs(&extents).iter().map(|run| (run.offset, run.length, run.hole)).collect()
    }

    #[test]
    fn short_zeros_are_sent_as_data_and_long_ones_as_holes() {
        assert_eq!(runs(&[(65536, Data), (4096, Hole), (4096, Data)]), [(0, 73728, false)]);
        assert_eq!(
            runs(&[(16384, Zero), (16384, Hole), (512, Data)]),
            [(0, 32768, true), (32768, 512, false)]
        );
        assert_eq!(runs(&[(32768, Hole)]), [(0, 32768, true)]);
        assert_eq!(runs(&[]), []);
    }

    #[test]
    fn errno_values_outside_the_protocol_become_its_own() {
        for (from, to) in
            [(30, 1), (13, 1), (27, 28), (122, 28), (95, 5), (75, 5), (28, 28), (22, 22), (-3, 5)]
        {
            assert_eq!(wire_error(&Errno::new(from, "")).code, to, "errno {from}");
        }
    }
}
