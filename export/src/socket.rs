//! Socket calls with deadlines.
//!
//! Sockets stay in blocking mode; what must not block says so per call. That way one thread can wait for requests
//! while others send answers on the same socket.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use std::io::{self, IoSlice, Read, Write};
use std::time::{Duration, Instant};

/// How long a full socket is left alone.
const SEND_AGAIN: Duration = Duration::from_secs(1);

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Receives what there is, waiting for the first byte; 0 is the end of the stream.
pub(crate) fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(retry(|| recv(socket, &mut *buffer, RecvFlags::empty()))?.0)
}

/// Receives what there is, waiting for the first byte until `deadline`; 0 is the end of the stream.
pub(crate) fn receive_until(socket: &OwnedFd, buffer: &mut [u8], deadline: Instant) -> io::Result<usize> {
    loop {
        match retry(|| recv(socket, &mut *buffer, RecvFlags::DONTWAIT)) {
            Ok((received, _)) => return Ok(received),
            Err(Errno::AGAIN) => wait(socket, PollFlags::IN, deadline)?,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends what fits without waiting; `None` when nothing does.
pub(crate) fn send_now(socket: &OwnedFd, parts: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match retry(|| sendmsg(socket, parts, &mut SendAncillaryBuffer::default(), flags)) {
        Ok(sent) => Ok(Some(sent)),
        Err(Errno::AGAIN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Waits until it is worth trying to send: the system says that there is room only when there is much of it, and a client that
/// fetches slowly makes progress before that.
pub(crate) fn wait_to_send(socket: &OwnedFd, deadline: Instant) -> io::Result<()> {
    match wait(socket, PollFlags::OUT, deadline.min(Instant::now() + SEND_AGAIN)) {
        Err(error) if error.kind() == io::ErrorKind::TimedOut && Instant::now() < deadline => Ok(()),
        result => result,
    }
}

fn wait(socket: &OwnedFd, what: PollFlags, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the client did not go on in time"));
        }
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(socket, what)], Some(&left)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// A socket as a stream whose every operation has to be over by one deadline.
pub(crate) struct Timed<'a> {
    pub(crate) socket: &'a OwnedFd,
    pub(crate) deadline: Instant,
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        receive_until(self.socket, buffer, self.deadline)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match send_now(self.socket, &[IoSlice::new(bytes)])? {
                Some(sent) => return Ok(sent),
                None => wait_to_send(self.socket, self.deadline)?,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
