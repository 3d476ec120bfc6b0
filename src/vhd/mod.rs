//! The published VHD format, version 1, as plain data: bytes in, typed structures out, and back.
//!
//! Source: Microsoft's *Virtual Hard Disk Image Format Specification* (2006), read together with what Virtual PC,
//! Hyper-V, QEMU, VirtualBox and blktap really write; where they differ, the item concerned says whom we follow.
//!
//! ```text
//! fixed            data .............................................................. | footer
//! dynamic          footer copy | dynamic header | BAT | [bitmap | data] [bitmap | data] | footer
//! differencing     the same, plus parent locator payloads anywhere behind the header
//! ```
//!
//! * [`Footer`]: 512 bytes, last in every file, repeated first in dynamic and differencing ones.
//! * [`DynamicHeader`]: 1024 bytes at the footer's data offset: block size, place of the BAT, the parent.
//! * [`bat`]: the block allocation table, one big-endian `u32` per block: the sector of its bitmap.
//! * [`bitmap`]: one bit per sector of a block, in front of the block's data.
//! * [`locator`]: where the parent of a differencing disk may be found, as paths in three notations.
//!
//! All integers in the file are big-endian; only the paths in two kinds of parent locator are UTF-16LE.
//!
//! Nothing here does I/O, knows file names or allocates by a length it read. A `parse` accepts what can be read
//! safely, names the field it refuses, and keeps every bit it does not interpret, so that writing a parsed structure
//! gives back the same bytes. What one structure says about another is checked by [`validate_geometry`] and
//! [`validate_locators`]; what they say about the file's length is for the caller, who knows it.

#[macro_use]
mod layout;

pub mod bat;
pub mod bitmap;
pub mod locator;

mod checksum;
mod chs;
mod consistency;
mod disk_type;
mod dynamic_header;
mod footer;
mod parent_path;
mod timestamp;
mod unique_id;

pub use bat::{UNALLOCATED, bat_bytes};
pub use bitmap::bitmap_bytes;
pub use checksum::checksum;
pub use chs::Chs;
pub use consistency::{validate_geometry, validate_locators};
pub use disk_type::DiskType;
pub use dynamic_header::{DynamicHeader, HeaderCookie};
pub use footer::Footer;
pub use locator::{ParentLocator, ParentPath, PlatformCode};
pub use timestamp::Timestamp;
pub use unique_id::UniqueId;

/// Bytes in a sector, always.
pub const SECTOR: u64 = 512;

/// The block size to create disks with, in bytes of data (2 MiB): blktap reads no other reliably.
pub const BLOCK_SIZE: u32 = 2 << 20;

/// The largest guest size of a dynamic or differencing disk, in bytes (2040 GiB).
///
/// A BAT entry counts 512-byte sectors in 32 bits, so that blocks start below 2 TiB; this size leaves room for bitmaps
/// and is the limit of Hyper-V, QEMU and XCP-ng too. Fixed disks have no BAT and no such limit.
pub const MAX_DYNAMIC_SIZE: u64 = 2040 << 30;

/// The largest byte offset in a file that operating systems accept; a range that ends beyond it cannot exist.
const MAX_FILE_OFFSET: u64 = i64::MAX as u64;

/// Bytes that should be text, for an error message.
fn quoted(bytes: &[u8]) -> String {
    format!("\"{}\"", bytes.escape_ascii())
}
