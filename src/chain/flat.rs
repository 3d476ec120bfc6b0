//! The flat map: for each block of the disk, where beneath the leaf its bytes are.
//!
//! One word per block: not looked at yet, zeros, wholly and in order in one parent's file, or mixed, which is a list of
//! runs in a table beside. Parents do not change, so two who fill the same word write the same; nothing has to be undone.
//! The runs of mixed blocks are bounded: where there are too many, some are forgotten and found again when needed.

use crate::sync::{Arc, AtomicU64, AtomicUsize, Ordering, RwLock};
use crate::vhd::SECTOR;
use std::collections::HashMap;

/// A run of a mixed block that is in a parent's file. What lies between runs is zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// First sector, from the start of the block.
    pub(super) first_sector: u32,
    /// Sectors.
    pub(super) sectors: u32,
    /// The parent, counted from the bottom.
    pub(super) source: u32,
    /// Byte of its file.
    pub(super) file_offset: u64,
}

/// What is beneath the leaf in one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Flat {
    /// Zeros.
    Zero,
    /// All of it in one file, in order.
    Whole {
        /// The parent, counted from the bottom.
        source: u32,
        /// Byte of its file.
        file_offset: u64,
    },
    /// Runs, in order.
    Mixed(Arc<[Run]>),
}

const KIND_SHIFT: u32 = 62;
const ZERO: u64 = 1 << KIND_SHIFT;
const WHOLE: u64 = 2 << KIND_SHIFT;
const MIXED: u64 = 3 << KIND_SHIFT;
const SOURCE_SHIFT: u32 = 48;
const MAX_SOURCE: u32 = (1 << 14) - 1;
const MAX_SECTOR: u64 = (1 << SOURCE_SHIFT) - 1;
const SHARDS: usize = 64;
/// So many runs are kept, some 24 MiB.
const MAX_RUNS: usize = 1 << 20;

type Shard = RwLock<HashMap<u32, Arc<[Run]>>>;

/// The map of one chain.
#[derive(Debug)]
pub(super) struct FlatMap {
    words: Box<[AtomicU64]>,
    mixed: Box<[Shard]>,
    runs: AtomicUsize,
}

impl FlatMap {
    /// A map of `blocks` of which nothing is known.
    pub(super) fn new(blocks: u64) -> Self {
        FlatMap {
            words: (0..blocks).map(|_| AtomicU64::new(0)).collect(),
            mixed: (0..SHARDS).map(|_| RwLock::default()).collect(),
            runs: AtomicUsize::new(0),
        }
    }

    /// What is known of a block.
    pub(super) fn get(&self, block: u32) -> Option<Flat> {
        let word = self.words.get(block as usize)?.load(Ordering::Acquire);
        match word >> KIND_SHIFT << KIND_SHIFT {
            ZERO => Some(Flat::Zero),
            WHOLE => Some(Flat::Whole {
                source: (word >> SOURCE_SHIFT) as u32 & MAX_SOURCE,
                file_offset: (word & MAX_SECTOR) * SECTOR,
            }),
            MIXED => self.shard(block).read().get(&block).cloned().map(Flat::Mixed),
            _ => None,
        }
    }

    /// Notes what is beneath the leaf in `block`.
    pub(super) fn set(&self, block: u32, flat: &Flat) {
        let Some(word) = self.words.get(block as usize) else { return };
        let value = match flat {
            Flat::Zero => ZERO,
            Flat::Whole { source, file_offset } => {
                WHOLE | u64::from(source & MAX_SOURCE) << SOURCE_SHIFT | ((file_offset / SECTOR) & MAX_SECTOR)
            }
            Flat::Mixed(runs) => {
                self.make_room(block, runs.len());
                let old = self.shard(block).write().insert(block, Arc::clone(runs));
                self.runs.fetch_sub(old.map_or(0, |runs| runs.len()), Ordering::Relaxed);
                MIXED
            }
        };
        word.store(value, Ordering::Release);
    }

    fn make_room(&self, block: u32, runs: usize) {
        if self.runs.fetch_add(runs, Ordering::Relaxed) + runs <= MAX_RUNS {
            return;
        }
        // The words still say that these blocks are mixed; who misses their runs looks for them again.
        let mut forgotten = 0;
        for shard in (0..SHARDS).map(|next| self.shard(block.wrapping_add(1 + next as u32))) {
            forgotten += shard.write().drain().map(|(_, runs)| runs.len()).sum::<usize>();
            if forgotten >= runs.max(MAX_RUNS / 8) {
                break;
            }
        }
        self.runs.fetch_sub(forgotten, Ordering::Relaxed);
    }

    fn shard(&self, block: u32) -> &Shard {
        &self.mixed[block as usize % SHARDS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_hold_what_was_set() {
        let map = FlatMap::new(4);
        assert_eq!(map.get(1), None);
        assert_eq!(map.get(9), None);
        let run = Run { first_sector: 8, sectors: 8, source: 3, file_offset: 4096 };
        for flat in [
            Flat::Zero,
            Flat::Whole { source: MAX_SOURCE, file_offset: MAX_SECTOR * SECTOR },
            Flat::Mixed([run].into()),
        ] {
            map.set(1, &flat);
            assert_eq!(map.get(1), Some(flat));
        }
    }

    #[test]
    fn the_runs_are_bounded() {
        let map = FlatMap::new(1 << 12);
        let runs: Arc<[Run]> =
            vec![Run { first_sector: 0, sectors: 1, source: 0, file_offset: 0 }; 2048].into();
        (0..1 << 12).for_each(|block| map.set(block, &Flat::Mixed(Arc::clone(&runs))));
        let kept: usize = map.mixed.iter().map(|shard| shard.read().len() * 2048).sum();
        assert!(kept <= MAX_RUNS && kept > MAX_RUNS / 2, "{kept}");
        assert_eq!(map.get((1 << 12) - 1), Some(Flat::Mixed(runs)));
    }
}
