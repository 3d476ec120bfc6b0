//! What the flat map asks of each parent: where a range is.

use crate::error::Result;
use std::fmt;
use std::ops::Range;

/// Where a layer has a range of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// It does not: the layer below it decides.
    Below,
    /// Nowhere: it reads as zeros, whatever lies below.
    Zero,
    /// In its file, from this byte on.
    File(u64),
}

/// A layer that does not change.
pub(crate) trait Source: Send + Sync + fmt::Debug {
    /// Calls `visit` with the parts that make up `range` (guest bytes, whole sectors), in order.
    fn resolve(&self, range: Range<u64>, visit: &mut dyn FnMut(Range<u64>, Found)) -> Result<()>;

    /// Reads guest data at a byte of its file that [`Source::resolve`] named.
    fn read_file(&self, at: u64, buf: &mut [u8]) -> Result<()>;
}
