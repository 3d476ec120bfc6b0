//! The flat map: for each block of the disk, where beneath the leaf its bytes are.
//!
//! One word per block: not known, zeros, wholly and in order in one parent's file, or mixed, which is a list of runs in a
//! table beside. The runs of mixed blocks are bounded: where there are too many, some are forgotten and found again when
//! needed.
//!
//! A word is read without a lock and changed under the lock of its shard, by someone who says what the word was when he began
//! to find the new value. Unknown and mixed words carry a version that never comes back. So whoever looked at the parents before
//! a former leaf was folded in, and is done after that, does not undo it.

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

/// What was known of a block at some moment.
#[derive(Debug)]
pub(super) struct Seen {
    word: u64,
    /// What is beneath the leaf, if that was known.
    pub(super) flat: Option<Flat>,
}

const KIND_SHIFT: u32 = 62;
const UNKNOWN: u64 = 0;
const ZERO: u64 = 1 << KIND_SHIFT;
const WHOLE: u64 = 2 << KIND_SHIFT;
const MIXED: u64 = 3 << KIND_SHIFT;
const VERSION_MASK: u64 = (1 << KIND_SHIFT) - 1;
const SOURCE_SHIFT: u32 = 48;
const MAX_SOURCE: u32 = (1 << 14) - 1;
const MAX_SECTOR: u64 = (1 << SOURCE_SHIFT) - 1;
const SHARDS: usize = 64;
/// So many runs are kept, some 24 MiB.
const MAX_RUNS: usize = 1 << 20;

/// Runs of mixed blocks, with the word that stands for them.
type Shard = RwLock<HashMap<u32, (u64, Arc<[Run]>)>>;

/// The map of one chain.
#[derive(Debug)]
pub(super) struct FlatMap {
    words: Box<[AtomicU64]>,
    mixed: Box<[Shard]>,
    runs: AtomicUsize,
    versions: AtomicU64,
}

impl FlatMap {
    /// A map of `blocks` of which nothing is known.
    pub(super) fn new(blocks: u64) -> Self {
        Self::filled(blocks, UNKNOWN)
    }

    /// A map of `blocks` that are zeros.
    pub(super) fn zeros(blocks: u64) -> Self {
        Self::filled(blocks, ZERO)
    }

    fn filled(blocks: u64, word: u64) -> Self {
        FlatMap {
            words: (0..blocks).map(|_| AtomicU64::new(word)).collect(),
            mixed: (0..SHARDS).map(|_| RwLock::default()).collect(),
            runs: AtomicUsize::new(0),
            versions: AtomicU64::new(0),
        }
    }

    /// How many blocks it has.
    pub(super) fn blocks(&self) -> u32 {
        u32::try_from(self.words.len()).unwrap_or(u32::MAX)
    }

    /// What is known of a block.
    pub(super) fn get(&self, block: u32) -> Seen {
        loop {
            let Some(word) = self.words.get(block as usize) else {
                return Seen { word: UNKNOWN, flat: None };
            };
            let word = word.load(Ordering::Acquire);
            let flat = match word & !VERSION_MASK {
                ZERO => Some(Flat::Zero),
                WHOLE => Some(Flat::Whole {
                    source: (word >> SOURCE_SHIFT) as u32 & MAX_SOURCE,
                    file_offset: (word & MAX_SECTOR) * SECTOR,
                }),
                MIXED => match self.shard(block).read().get(&block) {
                    Some((version, runs)) if *version == word => Some(Flat::Mixed(Arc::clone(runs))),
                    // The word has changed since.
                    _ => continue,
                },
                _ => None,
            };
            return Seen { word, flat };
        }
    }

    /// Notes what is beneath the leaf in `block`, or that it is not known any more. Does nothing, and returns false, where the
    /// word has changed since it was `seen`.
    pub(super) fn put(&self, block: u32, seen: &Seen, flat: Option<&Flat>) -> bool {
        let Some(word) = self.words.get(block as usize) else { return false };
        let runs = match flat {
            Some(Flat::Mixed(runs)) => runs.len(),
            _ => 0,
        };
        self.make_room(block, runs);
        let mut shard = self.shard(block).write();
        let mut too_many = runs;
        let is_new = word.load(Ordering::Relaxed) == seen.word;
        if is_new {
            let value = match flat {
                None => UNKNOWN | self.version(),
                Some(Flat::Zero) => ZERO,
                Some(Flat::Whole { source, file_offset }) => {
                    let source = u64::from(source & MAX_SOURCE) << SOURCE_SHIFT;
                    WHOLE | source | ((file_offset / SECTOR) & MAX_SECTOR)
                }
                Some(Flat::Mixed(_)) => MIXED | self.version(),
            };
            let old = match flat {
                Some(Flat::Mixed(runs)) => shard.insert(block, (value, Arc::clone(runs))),
                _ => shard.remove(&block),
            };
            too_many = old.map_or(0, |(_, runs)| runs.len());
            word.store(value, Ordering::Release);
        }
        self.runs.fetch_sub(too_many, Ordering::Relaxed);
        is_new
    }

    fn version(&self) -> u64 {
        (self.versions.fetch_add(1, Ordering::Relaxed) + 1) & VERSION_MASK
    }

    fn make_room(&self, block: u32, runs: usize) {
        if runs == 0 || self.runs.fetch_add(runs, Ordering::Relaxed) + runs <= MAX_RUNS {
            return;
        }
        let mut forgotten = 0;
        for shard in (0..SHARDS).map(|next| self.shard(block.wrapping_add(1 + next as u32))) {
            let mut shard = shard.write();
            for (block, (_, runs)) in shard.drain() {
                forgotten += runs.len();
                if let Some(word) = self.words.get(block as usize) {
                    word.store(UNKNOWN | self.version(), Ordering::Release);
                }
            }
            drop(shard);
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

    fn set(map: &FlatMap, block: u32, flat: &Flat) {
        assert!(map.put(block, &map.get(block), Some(flat)));
    }

    #[test]
    fn words_hold_what_was_set() {
        let map = FlatMap::new(4);
        assert_eq!(map.get(1).flat, None);
        assert_eq!(map.get(9).flat, None);
        assert!(!map.put(9, &map.get(9), Some(&Flat::Zero)));
        let run = Run { first_sector: 8, sectors: 8, source: 3, file_offset: 4096 };
        for flat in [
            Flat::Zero,
            Flat::Mixed([run].into()),
            Flat::Whole { source: MAX_SOURCE, file_offset: MAX_SECTOR * SECTOR },
            Flat::Mixed([run, run].into()),
        ] {
            set(&map, 1, &flat);
            assert_eq!(map.get(1).flat, Some(flat));
        }
        assert!(map.put(1, &map.get(1), None));
        assert_eq!(map.get(1).flat, None);
        assert_eq!(map.runs.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_was_found_before_a_change_does_not_undo_it() {
        let map = FlatMap::new(1);
        let run = Run { first_sector: 0, sectors: 1, source: 0, file_offset: 0 };
        let values = [None, Some(Flat::Mixed([run].into()))];
        for before in &values {
            map.put(0, &map.get(0), before.as_ref());
            let slow = map.get(0);
            // To the same kind of word, and by way of another one.
            assert!(map.put(0, &map.get(0), before.as_ref()));
            assert!(!map.put(0, &slow, Some(&Flat::Zero)), "{before:?}");
            set(&map, 0, &Flat::Zero);
            map.put(0, &map.get(0), before.as_ref());
            assert!(!map.put(0, &slow, Some(&Flat::Zero)), "{before:?}");
            assert_eq!(map.get(0).flat, *before);
        }
    }

    #[test]
    fn the_runs_are_bounded() {
        let map = FlatMap::new(1 << 12);
        let runs: Arc<[Run]> =
            vec![Run { first_sector: 0, sectors: 1, source: 0, file_offset: 0 }; 2048].into();
        (0..1 << 12).for_each(|block| set(&map, block, &Flat::Mixed(Arc::clone(&runs))));
        let kept: usize = map.mixed.iter().map(|shard| shard.read().len() * 2048).sum();
        assert!(kept <= MAX_RUNS && kept > MAX_RUNS / 2, "{kept}");
        assert_eq!(kept, map.runs.load(Ordering::Relaxed));
        assert_eq!(map.get((1 << 12) - 1).flat, Some(Flat::Mixed(runs)));
        assert_eq!(map.get(1).flat, None, "forgotten");
    }
}
