//! Which parents may hold a block, found for many neighbours at once, so that the first touch of each asks those alone.
//!
//! A *window* is a run of blocks. To make one, each parent is asked for its table entries of the whole window: one read, whatever
//! it holds. For each block the window then has the parents that hold it, from the top down, with their entries. Parents do not
//! change, so a window stays true; where a former leaf has become a parent it is added on top. Windows are bounded: the ones made
//! first go first.

use super::source::Source;
use crate::error::Result;
use crate::sync::{Arc, Mutex};
use std::collections::{HashMap, VecDeque};

/// Blocks of a window: 2 KiB of a table.
const WINDOW_BLOCKS: u64 = 512;
/// So many bytes are kept in windows.
const MAX_BYTES: usize = 8 << 20;

/// A parent that may hold a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Candidate {
    /// The parent, counted from the bottom.
    pub(super) source: u32,
    /// Its table's entry of the block.
    pub(super) entry: u32,
}

/// The candidates of a run of blocks.
#[derive(Debug)]
pub(super) struct Window {
    /// How many of the parents, from the bottom up, were asked.
    sources: usize,
    /// Where the candidates of each block begin; one more than there are blocks.
    starts: Box<[u32]>,
    /// Of each block from the top down.
    candidates: Box<[Candidate]>,
}

impl Window {
    /// The candidates of a block, from the top down.
    pub(super) fn of(&self, block: u32) -> &[Candidate] {
        let index = (u64::from(block) % WINDOW_BLOCKS) as usize;
        match self.starts.get(index..index + 2) {
            Some(&[start, end]) => self.candidates.get(start as usize..end as usize).unwrap_or_default(),
            _ => &[],
        }
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.starts) + size_of_val(&*self.candidates)
    }

    /// The window with this number over `sources`; `known` is the same over some of them, from the bottom.
    fn new(
        number: u64,
        block_bytes: u64,
        sources: &[Arc<dyn Source>],
        known: Option<&Window>,
    ) -> Result<Self> {
        let blocks = number * WINDOW_BLOCKS..(number + 1) * WINDOW_BLOCKS;
        let asked = known.map_or(0, |window| window.sources);
        let mut found: Vec<(u32, Candidate)> = Vec::new();
        for (source, parent) in sources.iter().enumerate().skip(asked).rev() {
            parent.blocks(blocks.clone(), block_bytes, &mut |block, entry| {
                let index = block.saturating_sub(blocks.start) as u32;
                found.push((index, Candidate { source: source as u32, entry }));
            })?;
        }
        // Stable: of each block they stay in order.
        found.sort_by_key(|(index, _)| *index);
        let mut found = found.into_iter().peekable();
        let mut starts = vec![0];
        let mut candidates = Vec::with_capacity(found.len());
        for index in 0..WINDOW_BLOCKS as u32 {
            while let Some((_, candidate)) = found.next_if(|(block, _)| *block == index) {
                candidates.push(candidate);
            }
            candidates.extend_from_slice(known.map_or(&[], |window| window.of(index)));
            starts.push(candidates.len() as u32);
        }
        Ok(Window { sources: sources.len(), starts: starts.into(), candidates: candidates.into() })
    }
}

/// The windows of one chain.
#[derive(Debug)]
pub(super) struct Candidates {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    windows: HashMap<u64, Arc<Window>>,
    /// In the order in which they were made.
    order: VecDeque<u64>,
    bytes: usize,
}

impl Candidates {
    pub(super) fn new() -> Self {
        Candidates { kept: Mutex::default() }
    }

    /// The window of a block over `sources`, which may have grown since the last call by some on top. It may know of more.
    pub(super) fn window(
        &self,
        block: u32,
        block_bytes: u64,
        sources: &[Arc<dyn Source>],
    ) -> Result<Arc<Window>> {
        let number = u64::from(block) / WINDOW_BLOCKS;
        let known = self.kept.lock().windows.get(&number).cloned();
        if let Some(window) = known.as_ref().filter(|window| window.sources >= sources.len()) {
            return Ok(Arc::clone(window));
        }
        let window = Arc::new(Window::new(number, block_bytes, sources, known.as_deref())?);
        self.kept.lock().add(number, Arc::clone(&window));
        Ok(window)
    }
}

impl Kept {
    fn add(&mut self, number: u64, window: Arc<Window>) {
        if self.windows.get(&number).is_some_and(|other| other.sources >= window.sources) {
            return;
        }
        self.bytes += window.bytes();
        match self.windows.insert(number, window) {
            Some(old) => self.bytes -= old.bytes(),
            None => self.order.push_back(number),
        }
        while self.bytes > MAX_BYTES && self.order.len() > 1 {
            let oldest = self.order.pop_front().and_then(|number| self.windows.remove(&number));
            self.bytes -= oldest.map_or(0, |window| window.bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::source::Found;
    use crate::sync::{AtomicUsize, Ordering};
    use std::ops::Range;

    /// Holds every block that its number divides.
    #[derive(Debug)]
    struct Every(u64, AtomicUsize);

    impl Source for Every {
        fn resolve(&self, _range: Range<u64>, _visit: &mut dyn FnMut(Range<u64>, Found)) -> Result<()> {
            unreachable!()
        }

        fn blocks(&self, blocks: Range<u64>, _: u64, visit: &mut dyn FnMut(u64, u32)) -> Result<()> {
            self.1.fetch_add(1, Ordering::Relaxed);
            blocks.filter(|block| block % self.0 == 0).for_each(|block| visit(block, self.0 as u32));
            Ok(())
        }

        fn read_file(&self, _at: u64, _buf: &mut [u8]) -> Result<()> {
            unreachable!()
        }
    }

    #[test]
    fn a_block_has_the_parents_that_hold_it_from_the_top_down() {
        let every: Vec<Arc<Every>> =
            (1..=9).map(|number| Arc::new(Every(number, AtomicUsize::new(0)))).collect();
        let sources: Vec<Arc<dyn Source>> = every.iter().map(|one| Arc::clone(one) as _).collect();
        let candidates = Candidates::new();
        for count in [3, 3, 9, 9] {
            for block in [0u32, 1, 6, 511, 512, 515, 1_000_000] {
                let window = candidates.window(block, 1, &sources[..count]).unwrap();
                let expected: Vec<Candidate> = (0..count as u32)
                    .rev()
                    .filter(|source| block % (source + 1) == 0)
                    .map(|source| Candidate { source, entry: source + 1 })
                    .collect();
                assert_eq!(window.of(block), expected, "block {block} of {count}");
            }
        }
        // Three windows, each asked for once.
        assert!(every.iter().all(|one| one.1.load(Ordering::Relaxed) == 3));
    }

    #[test]
    fn windows_are_bounded() {
        let sources: Vec<Arc<dyn Source>> =
            (0..100).map(|_| Arc::new(Every(1, AtomicUsize::new(0))) as _).collect();
        let candidates = Candidates::new();
        for window in 0..100 {
            candidates.window(window * WINDOW_BLOCKS as u32, 1, &sources).unwrap();
        }
        let kept = candidates.kept.lock();
        assert_eq!(kept.bytes, kept.windows.values().map(|window| window.bytes()).sum());
        assert!(kept.bytes <= MAX_BYTES && kept.bytes > MAX_BYTES / 2 && kept.windows.contains_key(&99));
    }
}
