//! cowvhd: disks for virtual machines that survive.

mod error;
pub mod vhd;

pub use error::{Error, ErrorKind, FormatError, Result};
