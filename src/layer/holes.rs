//! Where the file has no space yet, as far as that is cheap to know: units of blocks allocated in this session that no flush
//! has seen written.
//!
//! A sync that covers a write into a hole makes the file system write its own metadata as well, which costs more than the
//! data does; a place in the journal's ring has its space already. Over written places it is the other way round: a sync writes
//! the data once, the journal twice. So a flush asks here which of both it has before it. A wrong answer costs time and
//! nothing else.

use crate::journal::DirtyExtent;
use std::collections::BTreeMap;

/// So many blocks at most are kept in mind: 64 bytes each.
const MAX_BLOCKS: usize = 1024;
const UNIT_SECTORS: u32 = 8;

/// The written units of young blocks, by slot.
#[derive(Debug, Default)]
pub(super) struct Holes {
    blocks: BTreeMap<u32, Vec<u64>>,
}

impl Holes {
    /// A slot was taken for a block: nothing stands in it.
    pub(super) fn allocated(&mut self, slot: u32) {
        if self.blocks.len() >= MAX_BLOCKS {
            self.blocks.pop_first();
        }
        self.blocks.insert(slot, Vec::new());
    }

    /// A slot holds no block any more.
    pub(super) fn freed(&mut self, slot: u32) {
        self.blocks.remove(&slot);
    }

    /// Nothing is known about any block: data was written that nobody named.
    pub(super) fn forget(&mut self) {
        self.blocks.clear();
    }

    /// Data was written; whether some of it went where nothing stood.
    pub(super) fn written(&mut self, extent: &DirtyExtent) -> bool {
        let Some(units) = self.blocks.get_mut(&extent.slot) else { return false };
        let range = extent.first_sector / UNIT_SECTORS..extent.end_sector().div_ceil(UNIT_SECTORS);
        let mut into_hole = false;
        for unit in range {
            let (word, bit) = ((unit / 64) as usize, 1 << (unit % 64));
            if units.len() <= word {
                units.resize(word + 1, 0);
            }
            if let Some(word) = units.get_mut(word) {
                into_hole |= *word & bit == 0;
                *word |= bit;
            }
        }
        into_hole
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(slot: u32, first_sector: u32, sectors: u32) -> DirtyExtent {
        DirtyExtent { block: slot, slot, first_sector, sectors, zero: false }
    }

    #[test]
    fn only_the_first_write_to_a_unit_of_a_young_block_goes_into_a_hole() {
        let mut holes = Holes::default();
        assert!(!holes.written(&extent(7, 0, 8)), "an old block");
        holes.allocated(7);
        assert!(holes.written(&extent(7, 0, 8)));
        assert!(!holes.written(&extent(7, 1, 1)));
        assert!(holes.written(&extent(7, 0, 16)), "its second half");
        assert!(!holes.written(&extent(7, 0, 16)));
        assert!(holes.written(&extent(7, 4095, 1)));
        holes.freed(7);
        assert!(!holes.written(&extent(7, 2048, 8)));
        (0..2 * MAX_BLOCKS as u32).for_each(|slot| holes.allocated(slot));
        assert_eq!(holes.blocks.len(), MAX_BLOCKS);
        holes.forget();
        assert!(!holes.written(&extent(2 * MAX_BLOCKS as u32 - 1, 0, 8)));
    }
}
