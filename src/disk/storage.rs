//! What keeps the bytes of a disk. Ranges are checked: within the disk, and whole sectors where something is changed.

use super::MappedExtent;
use super::blocks::Blocks;
use super::fixed::FixedDisk;
use crate::error::Result;
use crate::sync::Arc;
use crate::vfs::File;
use crate::vhd::DiskType;
use std::fmt;
use std::path::Path;

/// A kind of image, open.
pub(super) trait Storage: Send + Sync + fmt::Debug {
    /// The file's path.
    fn path(&self) -> &Path;

    /// Fixed, dynamic or differencing.
    fn disk_type(&self) -> DiskType;

    /// Itself, where it is made of blocks.
    fn as_blocks(&self) -> Option<&Blocks> {
        None
    }

    /// Itself, where it is a fixed disk.
    fn as_fixed(&self) -> Option<&FixedDisk> {
        None
    }

    /// Whether it is open for reading alone.
    fn is_read_only(&self) -> bool;

    /// What opening it found and did, for a person.
    fn notices(&self) -> Vec<String>;

    /// Reads `buf.len()` bytes at `offset`.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes `buf` at `offset`.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;

    /// Makes a range read as zeros; its space is given back unless it is to stay allocated.
    fn write_zeroes(&self, offset: u64, length: u64, keep_allocated: bool) -> Result<()>;

    /// Makes durable what was changed before the call.
    fn flush(&self) -> Result<()>;

    /// Flushes and gives the file back.
    fn close(&self) -> Result<()>;

    /// The file in which what [`Storage::map`] finds at depth 0 stands as a guest sees it; `None` where a journal that was replayed
    /// in memory says otherwise, or where the disk may change.
    fn stored_in(&self) -> Option<Arc<dyn File>>;

    /// Calls `visit` with ranges that make up `offset..offset + length`, in order.
    fn map(&self, offset: u64, length: u64, visit: &mut dyn FnMut(MappedExtent)) -> Result<()>;
}
