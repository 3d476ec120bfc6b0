//! The lists of runs of mixed blocks: a bounded store that is read without a lock.
//!
//! Lists stand one behind the other in segments of words, which are filled in turn; when all are full the oldest is emptied. A
//! list is a head (block and count), the first sectors of its runs, four to a word, and a word for each run that says where it
//! is. The runs follow each other without a gap; the last one has no end. A list begins on a cache line, so that finding a run touches
//! few of them: that is all that it costs.
//!
//! Whoever reads a list may meet another one being written over it. So he asks afterwards whether the word of the block, which
//! names the list, is what it was: a word changes before its list is overwritten, and never comes back.

use crate::sync::{AtomicU64, Mutex, MutexGuard, OnceLock, Ordering};
use std::ops::Range;

/// Words of a segment, 512 KiB. Tests have small ones, that come round soon.
const SEGMENT_WORDS: usize = if cfg!(any(test, feature = "schedules")) { 1 << 11 } else { 1 << 16 };
/// All together 16 MiB.
const SEGMENTS: usize = if cfg!(any(test, feature = "schedules")) { 4 } else { 32 };
/// A longer list is not kept.
const MAX_LIST_WORDS: usize = SEGMENT_WORDS / 4;
/// Words of a cache line.
const LINE_WORDS: usize = 8;
const SECTORS_PER_WORD: usize = 4;
const SECTOR_BITS: usize = u64::BITS as usize / SECTORS_PER_WORD;

/// Where lists are, as a number below 2^21.
pub(super) type Index = u32;

/// The store.
#[derive(Debug)]
pub(super) struct RunLists {
    segments: Box<[OnceLock<Box<[AtomicU64]>>]>,
    end: Mutex<End>,
}

/// Where the next list goes.
#[derive(Debug, Default)]
struct End {
    segment: usize,
    used: usize,
}

/// A list as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct List {
    words: Vec<u64>,
}

impl List {
    /// The list of `block` with `runs`: first sectors, from 0 on and rising, and a word for each. `None` where it is too long to
    /// be kept, or a sector is too large (as in blocks of 32 MiB and more).
    pub(super) fn new(block: u32, runs: &[(u32, u64)]) -> Option<Self> {
        let mut words = Vec::with_capacity(words_for(runs.len()));
        words.push(u64::from(block) << 32 | runs.len() as u64);
        for four in runs.chunks(SECTORS_PER_WORD) {
            let mut word = 0;
            for (place, (first, _)) in four.iter().enumerate() {
                word |= u64::from(u16::try_from(*first).ok()?) << (SECTOR_BITS * place);
            }
            words.push(word);
        }
        words.extend(runs.iter().map(|(_, word)| word));
        (words.len() <= MAX_LIST_WORDS).then_some(List { words })
    }
}

/// Words of a list of so many runs.
fn words_for(runs: usize) -> usize {
    1 + runs.div_ceil(SECTORS_PER_WORD) + runs
}

/// The right to add lists.
#[derive(Debug)]
pub(super) struct Writer<'a> {
    lists: &'a RunLists,
    end: MutexGuard<'a, End>,
}

impl RunLists {
    pub(super) fn new() -> Self {
        RunLists { segments: (0..SEGMENTS).map(|_| OnceLock::new()).collect(), end: Mutex::default() }
    }

    pub(super) fn writer(&self) -> Writer<'_> {
        Writer { lists: self, end: self.end.lock() }
    }

    /// The run of a list that holds `sector`, and its word. What it returns is nonsense where the list is overwritten meanwhile.
    pub(super) fn find(&self, index: Index, sector: u32) -> Option<(Range<u32>, u64)> {
        let segment = self.segments.get(index as usize / SEGMENT_WORDS)?.get()?;
        let list = segment.get(index as usize % SEGMENT_WORDS..)?;
        let count = list.first()?.load(Ordering::Acquire) as u32 as usize;
        let first_sector = |run: usize| {
            let four = list.get(1 + run / SECTORS_PER_WORD).map_or(0, |word| word.load(Ordering::Acquire));
            u32::from((four >> (SECTOR_BITS * (run % SECTORS_PER_WORD))) as u16)
        };
        // Below `low` they begin at or before the sector, from `high` on behind it.
        let (mut low, mut high) = (1, count);
        while low < high {
            let middle = (low + high) / 2;
            if first_sector(middle) <= sector {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let end = if low < count { first_sector(low) } else { u32::MAX };
        let word = list.get(words_for(count).checked_sub(count - (low - 1))?)?.load(Ordering::Acquire);
        Some((first_sector(low - 1)..end, word))
    }
}

impl Writer<'_> {
    /// Whether the list fits where the next one goes.
    pub(super) fn has_room(&self, list: &List) -> bool {
        self.end.used + list.words.len() <= SEGMENT_WORDS
    }

    /// Goes to the next segment, the oldest. Returns the lists that stand there with their blocks: nothing may name them any more
    /// when the next one is added.
    pub(super) fn next_segment(&mut self) -> Vec<(u32, Index, List)> {
        self.end.segment = (self.end.segment + 1) % SEGMENTS;
        self.end.used = 0;
        let mut found = Vec::new();
        let segment = self.lists.segments.get(self.end.segment).and_then(OnceLock::get);
        let mut at = 0;
        while let Some(head) = segment.and_then(|words| words.get(at)) {
            let head = head.load(Ordering::Relaxed);
            let count = head as u32 as usize;
            let length = words_for(count);
            let Some(list) = segment.and_then(|words| words.get(at..at + length)).filter(|_| count > 0)
            else {
                break;
            };
            let words = list.iter().map(|word| word.load(Ordering::Relaxed)).collect();
            let index = self.end.segment * SEGMENT_WORDS + at;
            found.push(((head >> 32) as u32, index as Index, List { words }));
            at += length.next_multiple_of(LINE_WORDS);
        }
        found
    }

    /// Adds a list, for which there must be room.
    pub(super) fn add(&mut self, list: &List) -> Index {
        let index = self.end.segment * SEGMENT_WORDS + self.end.used;
        let Some(segment) = self.lists.segments.get(self.end.segment) else { return 0 };
        let segment = segment.get_or_init(|| (0..SEGMENT_WORDS).map(|_| AtomicU64::new(0)).collect());
        for (place, &word) in segment.iter().skip(self.end.used).zip(&list.words) {
            place.store(word, Ordering::Release);
        }
        self.end.used += list.words.len().next_multiple_of(LINE_WORDS);
        // A head of zero ends the segment, as far as it is used.
        if let Some(head) = segment.get(self.end.used) {
            head.store(0, Ordering::Release);
        }
        index as Index
    }
}

/// Words that lists take.
pub(super) fn words_of<'a>(lists: impl IntoIterator<Item = &'a List>) -> usize {
    lists.into_iter().map(|list| list.words.len().next_multiple_of(LINE_WORDS)).sum()
}

/// As many words as stay when a segment is emptied.
pub(super) const KEPT_WORDS: usize = SEGMENT_WORDS / 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_by_their_sectors() {
        let lists = RunLists::new();
        let mut writer = lists.writer();
        for count in 1..40 {
            let runs: Vec<(u32, u64)> = (0..count).map(|run| (run * 10, u64::from(run) + 100)).collect();
            let index = writer.add(&List::new(count, &runs).unwrap());
            for sector in 0..count * 10 + 20 {
                let run = (sector / 10).min(count - 1);
                let end = if run == count - 1 { u32::MAX } else { run * 10 + 10 };
                assert_eq!(lists.find(index, sector), Some((run * 10..end, u64::from(run) + 100)));
            }
        }
    }

    #[test]
    fn segments_come_round_with_the_lists_in_them() {
        let lists = RunLists::new();
        let mut writer = lists.writer();
        let list = |block: u32| List::new(block, &[(0, u64::from(block)); 30]).unwrap();
        let mut added = Vec::new();
        for block in 0.. {
            if !writer.has_room(&list(block)) {
                break;
            }
            added.push((block, writer.add(&list(block)), list(block)));
        }
        assert_eq!(added.len(), SEGMENT_WORDS / 40, "39 words, in whole lines");
        for _ in 1..SEGMENTS {
            assert_eq!(writer.next_segment(), []);
        }
        assert_eq!(writer.next_segment(), added);
        // Of what stands there only what was not overwritten is left to be found; nothing behind the end is taken for a list.
        writer.add(&list(7));
        (1..SEGMENTS).for_each(|_| drop(writer.next_segment()));
        assert_eq!(writer.next_segment(), [(7, 0, list(7))]);
    }
}
