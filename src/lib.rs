//! cowvhd: disks for virtual machines that survive.

mod error;

pub use error::{Error, ErrorKind, FormatError, Result};
