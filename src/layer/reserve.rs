//! Space that is kept for bringing metadata in place on a full file system.
//!
//! A new block's page, and the footer, get their space only at a checkpoint or at the close, long after the guest was told
//! that its data is safe. So before a slot is taken as much space is allocated far behind the end of the file, where nothing
//! ever stands. A checkpoint that meets a full file system gives it back first and finds it free. The content of the
//! file never changes by any of this, nor its length; cutting the file to its own length ends a reserve, also one that a crash left.
//!
//! Allocating it in large steps costs one call for many new blocks. A file system that cannot do it goes without.

use crate::error::is_no_space;
use crate::ext::PAGE_BYTES;
use crate::vfs::File;
use std::io;

/// Behind every place that a block table can name (2 TiB), and within what file systems with small blocks can address (4 TiB).
const OFFSET: u64 = 3 << 40;
/// It grows by at least so many pages.
const STEP_PAGES: u64 = 64;
/// Pages beside those of new blocks: the footer's, and some for the file system's own.
const SPARE_PAGES: u64 = 4;

/// Whether there is no space; a place that the file system cannot address at all is another matter.
fn lacks_space(error: &io::Error) -> bool {
    is_no_space(error) && error.kind() != io::ErrorKind::FileTooLarge
}

/// The reserve of one session.
#[derive(Debug, Default)]
pub(super) struct Reserve {
    held_pages: u64,
    unsupported: bool,
}

impl Reserve {
    /// Sees to it that the pages of `blocks` new blocks have space kept for them. Fails where there is none.
    pub(super) fn cover(&mut self, file: &dyn File, blocks: u64) -> io::Result<()> {
        let needed = blocks + SPARE_PAGES;
        if needed <= self.held_pages || self.unsupported {
            return Ok(());
        }
        let step = (needed - self.held_pages).max(STEP_PAGES).max(self.held_pages / 2);
        let allocate = |pages: u64| {
            file.allocate_beyond_end(OFFSET + self.held_pages * PAGE_BYTES, pages * PAGE_BYTES)
                .map(|()| pages)
        };
        // On a nearly full file system what is needed now is enough.
        let result = allocate(step).or_else(|error| match lacks_space(&error) {
            true => allocate(needed - self.held_pages),
            false => Err(error),
        });
        match result {
            Ok(pages) => self.held_pages += pages,
            Err(error) if lacks_space(&error) => return Err(error),
            Err(_) => self.unsupported = true,
        }
        Ok(())
    }

    /// Gives all of it back; whether there was any. `file_bytes` is the length of the file, which does not change.
    pub(super) fn give_back(&mut self, file: &dyn File, file_bytes: u64) -> io::Result<bool> {
        if self.held_pages == 0 {
            return Ok(false);
        }
        file.set_len(file_bytes)?;
        self.held_pages = 0;
        Ok(true)
    }
}
