//! A block page (header and sector bitmap) as journaled records leave it, in a session or in a replay.

use crate::ext::{BlockHeader, PAGE_BYTES, Placement};
use crate::vhd::bitmap;
use std::ops::Range;

const PAGE: usize = PAGE_BYTES as usize;

/// A block page that is not, or not surely, in place.
#[derive(Debug)]
pub(crate) enum BlockPage {
    /// Made by an `alloc` record and unchanged since: kept small, since a ring holds tens of thousands of them.
    Fresh {
        /// The header.
        header: BlockHeader,
        /// Whether every bit of the bitmap is set.
        bitmap_set: bool,
    },
    /// Any other.
    Bytes {
        /// The page.
        bytes: Box<[u8; PAGE]>,
        /// The live records determine it alone; if not, it must be imaged before it may be written in place.
        determined: bool,
    },
}

impl BlockPage {
    /// The page's bytes.
    pub(crate) fn bytes(&self, place: &Placement) -> Box<[u8; PAGE]> {
        match self {
            BlockPage::Fresh { header, bitmap_set } => {
                let bitmap = vec![if *bitmap_set { 0xff } else { 0 }; place.bitmap_bytes() as usize];
                Box::new(header.to_page(&bitmap))
            }
            BlockPage::Bytes { bytes, .. } => bytes.clone(),
        }
    }

    /// Sets the bits of `sectors`, counted within the block.
    pub(super) fn set_bits(&mut self, place: &Placement, sectors: Range<u32>) {
        if let BlockPage::Fresh { bitmap_set, .. } = self {
            if *bitmap_set {
                return;
            }
            *self = BlockPage::Bytes { bytes: self.bytes(place), determined: true };
        }
        if let BlockPage::Bytes { bytes, .. } = self {
            let start = PAGE - place.bitmap_bytes() as usize;
            bitmap::set_range(bytes.get_mut(start..).unwrap_or_default(), sectors, true);
        }
    }

    /// Whether the live records alone make the page, without what is in place.
    pub(super) fn is_determined(&self) -> bool {
        match self {
            BlockPage::Fresh { .. } => true,
            BlockPage::Bytes { determined, .. } => *determined,
        }
    }
}
