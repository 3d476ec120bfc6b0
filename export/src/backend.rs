//! What the server asks of a disk: the [`Backend`] trait, and the errors that come back through it.

use std::borrow::Cow;
use std::fmt;

/// A disk that can be exported.
///
/// All offsets and lengths are bytes of the guest's disk and multiples of 512; the server has already checked them
/// against [`size_bytes`](Backend::size_bytes), which is a multiple of 512 too. Methods are called from many threads at
/// once, and an implementation may block in them.
pub trait Backend: Send + Sync {
    /// The disk's size in bytes, a multiple of 512.
    fn size_bytes(&self) -> u64;

    /// Whether writes are refused. The server then refuses them itself and tells its clients beforehand.
    fn read_only(&self) -> bool;

    /// Fills all of `buf` from `offset`. What `buf` holds on entry is of no meaning; after `Ok` every byte of it is
    /// sent.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), Errno>;

    /// Writes all of `buf` at `offset`. Later reads on any connection see it; it is durable after the next flush.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), Errno>;

    /// Makes every write, zeroing and discard that completed before this call durable, whichever connection it came
    /// through. This is what lets the server promise `CAN_MULTI_CONN`.
    fn flush(&self) -> Result<(), Errno>;

    /// Makes the range read as zeros. With `punch` its space may be given back; without (NBD's `NO_HOLE`) the range
    /// must stay or become allocated, so that later writes to it cannot run out of space.
    fn write_zeroes(&self, offset: u64, length: u64, punch: bool) -> Result<(), Errno>;

    /// A hint that the range's content is no longer needed.
    fn discard(&self, offset: u64, length: u64) -> Result<(), Errno>;

    /// What the range is made of: extents that are not empty, sorted, without gaps, covering the range exactly.
    fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, Errno>;

    /// Whether [`write_zeroes`](Backend::write_zeroes) on this range is faster than writing zeros as data. Answers the
    /// protocol's `FAST_ZERO`: a client that asks for speed gets `ENOTSUP` when this says no.
    ///
    /// Unless overridden: punching is fast, allocating zeros is not.
    fn zeroes_are_fast(&self, offset: u64, length: u64, punch: bool) -> bool {
        let _ = (offset, length);
        punch
    }
}

/// A run of the disk that is all of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts, in bytes of the guest's disk.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// What is there.
    pub kind: ExtentKind,
}

/// What an [`Extent`] is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Allocated, any content.
    Data,
    /// Allocated, reads as zeros.
    Zero,
    /// Not allocated, reads as zeros.
    Hole,
}

/// A failed backend operation: a positive errno value, and a message for the log.
///
/// Clients are sent the nearest of the protocol's error values, never the message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errno {
    code: i32,
    message: Cow<'static, str>,
}

impl Errno {
    /// Operation not permitted.
    pub const EPERM: Errno = Errno::of(1, "operation not permitted");
    /// Input/output error.
    pub const EIO: Errno = Errno::of(5, "input/output error");
    /// Invalid argument.
    pub const EINVAL: Errno = Errno::of(22, "invalid argument");
    /// No space left on device.
    pub const ENOSPC: Errno = Errno::of(28, "no space left on device");
    /// Read-only file system.
    pub const EROFS: Errno = Errno::of(30, "read-only");

    const fn of(code: i32, message: &'static str) -> Self {
        Errno { code, message: Cow::Borrowed(message) }
    }

    /// The error `code` (a positive Linux errno; anything else becomes `EIO`) with a message for the log.
    pub fn new(code: i32, message: impl Into<Cow<'static, str>>) -> Self {
        Errno { code: if code > 0 { code } else { 5 }, message: message.into() }
    }

    /// The positive errno value.
    pub fn code(&self) -> i32 {
        self.code
    }

    /// What happened, for the log.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (errno {})", self.message, self.code)
    }
}

impl std::error::Error for Errno {}

impl From<std::io::Error> for Errno {
    fn from(error: std::io::Error) -> Self {
        Errno::new(error.raw_os_error().unwrap_or(5), error.to_string())
    }
}
