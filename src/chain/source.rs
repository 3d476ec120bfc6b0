//! What the flat map asks of each parent: where a range is.

use super::ParentImage;
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

    /// Calls `visit` with each of some blocks of `block_bytes` in which anything may be found but [`Found::Below`], or zeros at
    /// the bottom of a chain; and with what [`Source::resolve_block`] is to be told.
    fn blocks(&self, blocks: Range<u64>, block_bytes: u64, visit: &mut dyn FnMut(u64, u32)) -> Result<()>;

    /// The same as [`Source::resolve`] for a range within one of the blocks of `block_bytes` that [`Source::blocks`] named, with
    /// `entry`: for layers that find it sooner that way.
    fn resolve_block(
        &self,
        range: Range<u64>,
        block_bytes: u64,
        entry: u32,
        visit: &mut dyn FnMut(Range<u64>, Found),
    ) -> Result<()> {
        let _ = (block_bytes, entry);
        self.resolve(range, visit)
    }

    /// The image file that it is, where it is no more than that.
    fn as_parent(&self) -> Option<&ParentImage> {
        None
    }

    /// Reads guest data at a byte of its file that [`Source::resolve`] named.
    fn read_file(&self, at: u64, buf: &mut [u8]) -> Result<()>;
}
