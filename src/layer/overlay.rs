//! Guest data and block pages that a journal holds and that are not yet in place, for disks opened read-only while dirty.

use crate::ext::Placement;
use crate::journal::{BlockPage, Replay};
use crate::vhd::SECTOR;
use std::collections::HashMap;

const SECTOR_BYTES: usize = SECTOR as usize;

/// Sectors by their number in the file; bounded by the size of the ring.
#[derive(Debug, Default)]
pub(crate) struct Overlay {
    sectors: HashMap<u64, Box<[u8; SECTOR_BYTES]>>,
}

impl Overlay {
    /// What a replay would write, later over earlier. Whole blocks that an `alloc` record describes are left out: the block
    /// map says all about them.
    pub(crate) fn new(place: &Placement, replay: &Replay<'_>) -> Self {
        let mut overlay = Overlay::default();
        for (offset, page) in replay.block_pages() {
            if !matches!(page, BlockPage::Fresh { bitmap_set: true, .. }) {
                let bytes = page.bytes(place);
                overlay.insert(offset, bytes.len() as u64, Some(bytes.as_slice()));
            }
        }
        for data in replay.data() {
            overlay.insert(data.offset, data.length, data.bytes);
        }
        overlay
    }

    /// Adds what is to be read instead of the file where nothing else is.
    pub(crate) fn put_beneath(&mut self, offset: u64, bytes: &[u8]) {
        let above = std::mem::take(&mut self.sectors);
        self.insert(offset, bytes.len() as u64, Some(bytes));
        self.sectors.extend(above);
    }

    fn insert(&mut self, offset: u64, length: u64, bytes: Option<&[u8]>) {
        for index in 0..length / SECTOR {
            let mut content = Box::new([0; SECTOR_BYTES]);
            let at = index as usize * SECTOR_BYTES;
            if let Some(bytes) = bytes.and_then(|bytes| bytes.get(at..at + SECTOR_BYTES)) {
                content.copy_from_slice(bytes);
            }
            self.sectors.insert(offset / SECTOR + index, content);
        }
    }

    /// Whether there is nothing to lay over the file.
    pub(crate) fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// All sectors, by file offset.
    pub(crate) fn sectors(&self) -> impl Iterator<Item = (u64, &[u8; SECTOR_BYTES])> + '_ {
        self.sectors.iter().map(|(&index, content)| (index * SECTOR, &**content))
    }

    /// Lays the overlay over `buf`, which was read from file offset `offset`.
    pub(crate) fn apply(&self, offset: u64, buf: &mut [u8]) {
        if self.is_empty() {
            return;
        }
        let end = offset + buf.len() as u64;
        for sector in offset / SECTOR..end.div_ceil(SECTOR) {
            let Some(content) = self.sectors.get(&sector) else { continue };
            let from = (sector * SECTOR).max(offset);
            let to = ((sector + 1) * SECTOR).min(end);
            let source = content.get((from - sector * SECTOR) as usize..(to - sector * SECTOR) as usize);
            let target = buf.get_mut((from - offset) as usize..(to - offset) as usize);
            if let (Some(source), Some(target)) = (source, target) {
                target.copy_from_slice(source);
            }
        }
    }
}
