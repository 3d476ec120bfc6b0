//! cowvhd: disks for virtual machines that survive.

pub mod convert;
#[cfg(feature = "defects")]
pub mod defect;
#[cfg(not(feature = "defects"))]
mod defect;
mod disk;
mod error;
mod ext;
mod journal;
mod layer;
#[cfg(feature = "sim")]
pub mod sim;
mod sync;
pub mod vfs;
pub mod vhd;

pub use disk::{
    CreateOptions, Disk, DiskInfo, Extent, ExtentKind, ForeignChanges, JournalState, MappedExtent,
    OpenOptions, ZeroMode,
};
pub use error::{Error, ErrorKind, FormatError, Result};
