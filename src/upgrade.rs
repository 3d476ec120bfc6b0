//! Giving an image that another program made a private area of its own, in place.

use crate::error::Result;
use crate::layer;
use crate::sync::Arc;
use crate::vfs::Vfs;
use std::path::Path;

/// Makes the dynamic or differencing image at `path`, which another program made, one like those made here: with a journal and superblocks in front of
/// its block table, so that opening it for writing takes no temporary journal, and nothing is written twice at the close. False
/// where it is one already.
///
/// At most the blocks in the first 7 MiB of the file are copied to its end, and a few more where they stand badly. What a guest sees
/// stays the same. A crash at any moment leaves the image as it was or upgraded, with all that was flushed; it may be repeated.
///
/// The parent of a differencing disk is neither opened nor told. Fails with
/// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for fixed disks, for parent locators longer than 4096 bytes, and where
/// nothing of the file's structure allows any writing; with [`ErrorKind::InUse`](crate::ErrorKind::InUse) while anybody has it open.
pub fn upgrade(vfs: Arc<dyn Vfs>, path: &Path) -> Result<bool> {
    layer::upgrade(vfs, path)
}
