//! Checking an image: what is wrong with it, where, what that means for the guest's data, and what a repair would do.
//!
//! A check reads and never changes a byte. It goes on where an open stops, and judges a file that was not closed as recovery
//! would leave it, in memory. Time is linear in what the file holds (the table is sorted once); memory is some 40 bytes for each
//! block that has a place in the file, and the findings are bounded.
//!
//! ```text
//! headers ──decide──▶ journal, replayed in memory ──▶ table ──▶ block pages ──▶ locators ──▶ unused space
//! ```
//!
//! [`check_chain`] does the same with every layer of a disk, and compares them. [`verify`] reads all data of sealed layers, too, and
//! compares it with the CRCs that were written when they were sealed.
//!
//! docs/check.md lists all codes.

mod blocks;
mod chain;
mod code;
mod data;
mod fixed;
mod footer;
mod headers;
mod image;
mod locators;
mod ranges;
mod registry;
mod repair;
mod report;
mod shadow;
mod slots;
mod space;
mod table;
mod unfinished;
mod unreadable;
mod verify;

pub use chain::{ChainReport, check_chain};
pub use code::{Code, Severity};
pub use data::Coverage;
pub use repair::{Consent, Repair, Salvaged, Step, plan, relink, repair, salvage, undo};
pub use report::{Finding, Report};
pub use verify::{Verified, verify, write_crcs};

use crate::error::{Error, Result};
use crate::layer;
use crate::sync::Arc;
use crate::vfs::{Access, Vfs};
use std::path::Path;

/// Checks the image at `path` without changing it.
///
/// Damage is in the report, and so is metadata that cannot be read where a copy stands in for it. An error means that the check could
/// not be made: the file cannot be read, somebody has it open
/// for writing ([`ErrorKind::InUse`](crate::ErrorKind::InUse)), or only a newer version understands it
/// ([`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported)).
pub fn check(vfs: Arc<dyn Vfs>, path: &Path) -> Result<Report> {
    let file =
        vfs.open(path, Access::ReadOnly).map_err(|error| Error::io(path, "opening the image", error))?;
    layer::lock(&*file, path, Access::ReadOnly)?;
    let (mut examined, file) = image::examine_readable(Arc::clone(&vfs), file, path)?;
    unfinished::check(&mut examined.report, &*vfs, &*file, path, examined.image.as_ref());
    Ok(examined.report)
}
