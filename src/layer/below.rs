//! What shows through where a layer holds nothing: zeros under a root disk, the parents under a differencing one.

use crate::error::Result;
use crate::sync::Arc;
use crate::vfs::File;
use std::fmt;
use std::ops::Range;

/// A part of a disk that stands in a file as it is read.
#[derive(Debug)]
pub(crate) struct Stored {
    /// Guest bytes.
    pub(crate) range: Range<u64>,
    /// The file.
    pub(crate) file: Arc<dyn File>,
    /// The byte of it at which the part begins.
    pub(crate) offset: u64,
}

/// The disk beneath a layer. It does not change while the layer uses it.
pub(crate) trait Below: Send + Sync + fmt::Debug {
    /// Reads `buf.len()` bytes at guest byte `offset`; past its end it reads as zeros.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Whether a range of guest bytes is known to be zeros, from metadata alone.
    fn is_zero(&self, range: Range<u64>) -> Result<bool>;

    /// Calls `visit` with the parts of a range of guest bytes that are known to stand in files, in order.
    fn stored(&self, range: Range<u64>, visit: &mut dyn FnMut(Stored)) -> Result<()> {
        let _ = (range, visit);
        Ok(())
    }
}

/// Beneath a root disk: zeros.
#[derive(Debug)]
pub(crate) struct Nothing;

impl Below for Nothing {
    fn read(&self, _offset: u64, buf: &mut [u8]) -> Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn is_zero(&self, _range: Range<u64>) -> Result<bool> {
        Ok(true)
    }
}
