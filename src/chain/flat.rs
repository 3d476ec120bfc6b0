//! The flat map: for each block of the disk, where beneath the leaf its bytes are.
//!
//! One word per block: not known, zeros, wholly and in order in one parent's file, or mixed, which names a list of runs. Lists
//! are bounded: where there are too many, some are forgotten and found again when needed.
//!
//! Nobody who reads takes a lock. A word is replaced only by someone who names the word that he started from, and words that
//! say "unknown" or "mixed" carry a version that never comes back. So whoever looked at the parents before a former leaf was
//! folded in, and is done after that, does not undo it; and a list that was read counts if the word that names it is still there.

use super::runs::{Index, KEPT_WORDS, List, RunLists, Writer, words_of};
use crate::sync::{AtomicU64, Ordering};
use crate::vhd::SECTOR;
use std::ops::Range;

/// A run of a mixed block that is in a parent's file. What lies between runs is zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// First sector, from the start of the block.
    pub(super) first_sector: u32,
    /// Sectors.
    pub(super) sectors: u32,
    /// Where the first sector is.
    pub(super) place: Place,
}

/// Where bytes are beneath the leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// The parent, counted from the bottom.
    pub(crate) source: u32,
    /// Byte of its file.
    pub(crate) file_offset: u64,
}

impl Place {
    /// The place `sectors` behind this one.
    pub(super) fn behind(self, sectors: u32) -> Self {
        Place { file_offset: self.file_offset + u64::from(sectors) * SECTOR, ..self }
    }
}

/// What is beneath the leaf in one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Flat {
    /// Zeros.
    Zero,
    /// All of it in one file, in order.
    Whole(Place),
    /// Runs, in order.
    Mixed(Vec<Run>),
}

impl Flat {
    /// The run that holds `sector`; without an end, the last one of a block.
    pub(super) fn at(&self, sector: u32) -> Part {
        match self {
            Flat::Zero => (0..u32::MAX, None),
            Flat::Whole(place) => (0..u32::MAX, Some(*place)),
            Flat::Mixed(runs) => {
                let next = runs.partition_point(|run| run.first_sector <= sector);
                let before = next.checked_sub(1).and_then(|last| runs.get(last));
                let end = runs.get(next).map_or(u32::MAX, |run| run.first_sector);
                match before {
                    Some(run) if sector < run.first_sector + run.sectors => {
                        (run.first_sector..run.first_sector + run.sectors, Some(run.place))
                    }
                    Some(run) => (run.first_sector + run.sectors..end, None),
                    None => (0..end, None),
                }
            }
        }
    }
}

/// Sectors of a block that are in one file in order, or zeros.
pub(super) type Part = (Range<u32>, Option<Place>);

/// What was known of a block at some moment.
#[derive(Debug)]
pub(super) struct Seen {
    word: u64,
    /// What is beneath the leaf, if that was known.
    pub(super) flat: Option<Flat>,
}

const KIND_SHIFT: u32 = 62;
const KIND_MASK: u64 = 3 << KIND_SHIFT;
const UNKNOWN: u64 = 0;
const ZERO: u64 = 1 << KIND_SHIFT;
const WHOLE: u64 = 2 << KIND_SHIFT;
const MIXED: u64 = 3 << KIND_SHIFT;
const SOURCE_SHIFT: u32 = 48;
const MAX_SOURCE: u32 = (1 << 14) - 1;
const MAX_SECTOR: u64 = (1 << SOURCE_SHIFT) - 1;
/// A mixed word ends with the index of its list; before that comes the version, which an unknown word has in the same place.
const INDEX_BITS: u32 = 24;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
/// They come round after three days of a million changes a second; nobody looks for that long.
const VERSION_MASK: u64 = (1 << (KIND_SHIFT - INDEX_BITS)) - 1;

/// The word for bytes that are in one file in order, or zeros.
fn word_of(place: Option<Place>) -> u64 {
    let Some(Place { source, file_offset }) = place else { return ZERO };
    WHOLE | u64::from(source & MAX_SOURCE) << SOURCE_SHIFT | ((file_offset / SECTOR) & MAX_SECTOR)
}

/// What such a word says.
fn place_of(word: u64) -> Option<Place> {
    (word & KIND_MASK == WHOLE).then_some(Place {
        source: (word >> SOURCE_SHIFT) as u32 & MAX_SOURCE,
        file_offset: (word & MAX_SECTOR) * SECTOR,
    })
}

/// The map of one chain.
#[derive(Debug)]
pub(super) struct FlatMap {
    words: Box<[AtomicU64]>,
    lists: RunLists,
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
            lists: RunLists::new(),
            versions: AtomicU64::new(0),
        }
    }

    /// How many blocks it has.
    pub(super) fn blocks(&self) -> u32 {
        u32::try_from(self.words.len()).unwrap_or(u32::MAX)
    }

    /// The part of a block that holds `sector`, if it is known.
    pub(super) fn part(&self, block: u32, sector: u32) -> Option<Part> {
        let cell = self.words.get(block as usize)?;
        loop {
            let word = cell.load(Ordering::Acquire);
            match word & KIND_MASK {
                UNKNOWN => return None,
                MIXED => {
                    let found = self.lists.find((word & INDEX_MASK) as Index, sector);
                    if cell.load(Ordering::Acquire) == word {
                        return found.map(|(sectors, word)| (sectors, place_of(word)));
                    }
                }
                _ => return Some((0..u32::MAX, place_of(word))),
            }
        }
    }

    /// All that is known of a block, to be changed.
    pub(super) fn get(&self, block: u32) -> Seen {
        let Some(cell) = self.words.get(block as usize) else { return Seen { word: UNKNOWN, flat: None } };
        loop {
            let word = cell.load(Ordering::Acquire);
            let flat = match word & KIND_MASK {
                UNKNOWN => None,
                MIXED => self.runs((word & INDEX_MASK) as Index).map(Flat::Mixed),
                _ => Some(place_of(word).map_or(Flat::Zero, Flat::Whole)),
            };
            if cell.load(Ordering::Acquire) == word {
                return Seen { word, flat };
            }
        }
    }

    /// The runs of a list; nonsense where it is overwritten meanwhile.
    fn runs(&self, index: Index) -> Option<Vec<Run>> {
        let mut runs = Vec::new();
        let mut sector = 0;
        while sector != u32::MAX {
            let (sectors, word) = self.lists.find(index, sector)?;
            // Always so in a list that is not being overwritten.
            if sectors.start != sector || sectors.end <= sector {
                return None;
            }
            if let Some(place) = place_of(word) {
                runs.push(Run { first_sector: sector, sectors: sectors.end - sector, place });
            }
            sector = sectors.end;
        }
        Some(runs)
    }

    /// Notes what is beneath the leaf in `block`, or that it is not known any more. Does nothing, and returns false, where the
    /// word has changed since it was `seen`.
    pub(super) fn put(&self, block: u32, seen: &Seen, flat: Option<&Flat>) -> bool {
        match flat {
            None => self.exchange(block, seen.word, self.unknown()),
            Some(Flat::Zero) => self.exchange(block, seen.word, word_of(None)),
            Some(Flat::Whole(place)) => self.exchange(block, seen.word, word_of(Some(*place))),
            Some(Flat::Mixed(runs)) => {
                let Some(list) = list_of(block, runs) else {
                    return self.exchange(block, seen.word, self.unknown());
                };
                let mut writer = self.lists.writer();
                let is_current =
                    self.words.get(block as usize).is_some_and(|w| w.load(Ordering::Acquire) == seen.word);
                if !is_current {
                    return false;
                }
                let mut word = seen.word;
                while !writer.has_room(&list) {
                    self.empty_oldest(&mut writer, (block, &mut word));
                }
                self.exchange(block, word, self.mixed(writer.add(&list)))
            }
        }
    }

    /// Makes room for lists. If the word `own` is changed by that, it is followed.
    fn empty_oldest(&self, writer: &mut Writer<'_>, own: (u32, &mut u64)) {
        let mut live = Vec::new();
        for (block, index, list) in writer.next_segment() {
            let Some(cell) = self.words.get(block as usize) else { continue };
            let word = cell.load(Ordering::Acquire);
            if word & KIND_MASK != MIXED || (word & INDEX_MASK) as Index != index {
                continue;
            }
            let unknown = self.unknown();
            if self.exchange(block, word, unknown) {
                if block == own.0 && word == *own.1 {
                    *own.1 = unknown;
                } else {
                    live.push((block, unknown, list));
                }
            }
        }
        // Where most of it was replaced since, the rest stays; otherwise there are too many.
        if words_of(live.iter().map(|(_, _, list)| list)) <= KEPT_WORDS {
            for (block, unknown, list) in live {
                let index = writer.add(&list);
                self.exchange(block, unknown, self.mixed(index));
            }
        }
    }

    fn exchange(&self, block: u32, from: u64, to: u64) -> bool {
        let Some(cell) = self.words.get(block as usize) else { return false };
        cell.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn version(&self) -> u64 {
        ((self.versions.fetch_add(1, Ordering::Relaxed) + 1) & VERSION_MASK) << INDEX_BITS
    }

    fn unknown(&self) -> u64 {
        UNKNOWN | self.version()
    }

    fn mixed(&self, index: Index) -> u64 {
        MIXED | self.version() | (u64::from(index) & INDEX_MASK)
    }
}

/// A mixed block's list, if it may be kept: with the zeros between its runs and behind the last one.
fn list_of(block: u32, runs: &[Run]) -> Option<List> {
    let mut parts = Vec::with_capacity(2 * runs.len() + 1);
    let mut sector = 0;
    for run in runs {
        if sector < run.first_sector {
            parts.push((sector, word_of(None)));
        }
        parts.push((run.first_sector, word_of(Some(run.place))));
        sector = run.first_sector + run.sectors;
    }
    parts.push((sector, word_of(None)));
    List::new(block, &parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(map: &FlatMap, block: u32, flat: &Flat) {
        assert!(map.put(block, &map.get(block), Some(flat)));
    }

    fn run(first_sector: u32, sectors: u32, source: u32) -> Run {
        let place = Place { source, file_offset: 4096 * u64::from(first_sector) };
        Run { first_sector, sectors, place }
    }

    #[test]
    fn words_hold_what_was_set() {
        let map = FlatMap::new(4);
        assert_eq!(map.get(1).flat, None);
        assert_eq!(map.get(9).flat, None);
        assert!(!map.put(9, &map.get(9), Some(&Flat::Zero)));
        for flat in [
            Flat::Zero,
            Flat::Mixed(vec![run(8, 8, 3)]),
            Flat::Whole(Place { source: MAX_SOURCE, file_offset: MAX_SECTOR * SECTOR }),
            Flat::Mixed(vec![run(0, 8, 3), run(8, 8, 4), run(20, 10, MAX_SOURCE), run(4000, 96, 1)]),
        ] {
            set(&map, 1, &flat);
            assert_eq!(map.get(1).flat.as_ref(), Some(&flat));
            for sector in 0..4096 {
                let (found, expected) = (map.part(1, sector).unwrap(), flat.at(sector));
                assert_eq!(found.1, expected.1, "sector {sector}");
                assert_eq!(found.0, expected.0, "sector {sector}");
            }
        }
        assert!(map.put(1, &map.get(1), None));
        assert_eq!((map.get(1).flat, map.part(1, 0)), (None, None));
    }

    #[test]
    fn what_was_found_before_a_change_does_not_undo_it() {
        let map = FlatMap::new(1);
        let values = [None, Some(Flat::Mixed(vec![run(0, 1, 0)]))];
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

    /// Lists that are replaced again and again push nobody out; more lists than there is room for do, and what is left is right.
    #[test]
    fn the_lists_are_bounded() {
        let map = FlatMap::new(1 << 10);
        let flat = |block: u32, round: u32| {
            Flat::Mixed((0..10).map(|n| run(n * 2, 1, block % 1000 + round)).collect())
        };
        set(&map, 0, &flat(0, 0));
        for round in 0..3_000 {
            set(&map, 1, &flat(1, round % 100));
        }
        assert_eq!(map.get(0).flat, Some(flat(0, 0)));
        assert_eq!(map.get(1).flat, Some(flat(1, 2_999 % 100)));
        let blocks = map.blocks();
        (0..blocks).for_each(|block| set(&map, block, &flat(block, 1)));
        let kept: Vec<u32> = (0..blocks).filter(|&block| map.get(block).flat.is_some()).collect();
        assert!(kept.len() > 100 && kept.len() < blocks as usize / 2, "{}", kept.len());
        assert!(kept.iter().all(|&block| map.get(block).flat == Some(flat(block, 1))));
        assert!(kept.contains(&(blocks - 1)));
        let long = Flat::Mixed((0..500).map(|n| run(n * 2, 1, 1)).collect());
        assert!(map.put(0, &map.get(0), Some(&long)));
        assert_eq!(map.get(0).flat, None, "too long to be kept");
    }

    /// Whoever reads while lists are written over each other sees one of those that were there, never a part of another.
    #[test]
    fn readers_beside_writers_see_whole_lists() {
        let map = FlatMap::new(64);
        // Places that name the block.
        let flat = |block: u32, length: u32| {
            let place =
                |n: u32| Place { source: length, file_offset: 4096 * u64::from(block * 10_000 + n * 2) };
            let run = |n: u32| Run { first_sector: n * 2, sectors: 1 + n % 2, place: place(n) };
            Flat::Mixed((0..120 + length).map(run).collect())
        };
        let done = crate::sync::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for reader in 0..2 {
                let (map, done) = (&map, &done);
                scope.spawn(move || {
                    let mut sector = reader;
                    while !done.load(Ordering::Relaxed) {
                        sector = (sector * 5 + 7) % 240;
                        let block = sector % 64;
                        let Some((sectors, place)) = map.part(block, sector) else { continue };
                        assert!(sectors.contains(&sector));
                        let Some(place) = place else { continue };
                        assert_eq!(place.file_offset % SECTOR, 0);
                        assert_eq!(
                            place.file_offset / 4096 / 10_000,
                            u64::from(block),
                            "another block's list"
                        );
                        assert_eq!(place.file_offset / 4096 % 10_000, u64::from(sectors.start));
                    }
                });
            }
            for round in 0..100_000 {
                set(&map, round % 64, &flat(round % 64, round % 7));
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}
