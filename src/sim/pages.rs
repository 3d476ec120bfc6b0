//! The content of a simulated file: copy-on-write pages and a hash that follows every change.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

pub(super) const PAGE: usize = 4096;

#[derive(Debug, Clone)]
struct Page {
    bytes: Arc<[u8; PAGE]>,
    hash: u64,
}

/// A sparse file. Clones share their pages.
#[derive(Debug, Clone, Default)]
pub(super) struct Pages {
    length: u64,
    pages: BTreeMap<u64, Page>,
    hash: u64,
}

/// One change of a file, as the medium sees it.
#[derive(Debug, Clone)]
pub(super) enum Change {
    /// Bytes at an offset; what lies past the end of the file is lost, since a size change is a change of its own.
    Write { offset: u64, bytes: Arc<[u8]> },
    /// Zeros at an offset.
    Punch { offset: u64, length: u64 },
    /// A new length.
    SetLength(u64),
}

impl Pages {
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// A hash of length and content; equal content has an equal hash.
    pub(super) fn hash(&self) -> u64 {
        self.hash ^ mix(self.length ^ 0x5bd1_e995)
    }

    /// The same as if zeros stood in a range of whole pages.
    pub(super) fn hash_without(&self, range: Range<u64>) -> u64 {
        let numbers = range.start / PAGE as u64..(range.end / PAGE as u64).max(range.start / PAGE as u64);
        self.pages.range(numbers).fold(self.hash(), |hash, (_, page)| hash ^ page.hash)
    }

    /// Bytes of the pages that are not zero throughout.
    pub(super) fn allocated_bytes(&self) -> u64 {
        (self.pages.len() * PAGE) as u64
    }

    /// The next run of pages that are not zero throughout, from `offset` on.
    pub(super) fn next_data(&self, offset: u64) -> Option<Range<u64>> {
        let page_bytes = PAGE as u64;
        let mut numbers = self.pages.range(offset / page_bytes..).map(|(&number, _)| number);
        let first = numbers.next()?;
        let last =
            numbers.zip(first + 1..).take_while(|(n, next)| n == next).last().map_or(first, |(n, _)| n);
        let range = (first * page_bytes).max(offset)..((last + 1) * page_bytes).min(self.length);
        (!range.is_empty()).then_some(range)
    }

    /// Reads up to the end of the file; returns how many bytes.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let count = self.length.saturating_sub(offset).min(buf.len() as u64) as usize;
        for (number, within, range) in split(offset, count) {
            let target = buf.get_mut(range).unwrap_or_default();
            match self.pages.get(&number).and_then(|page| page.bytes.get(within..within + target.len())) {
                Some(source) => target.copy_from_slice(source),
                None => target.fill(0),
            }
        }
        count
    }

    pub(super) fn apply(&mut self, change: &Change) {
        match change {
            Change::Write { offset, bytes } => {
                let count = self.length.saturating_sub(*offset).min(bytes.len() as u64) as usize;
                for (number, within, range) in split(*offset, count) {
                    let source = bytes.get(range).unwrap_or_default();
                    // Most zeros are written where a new file has some already.
                    if !self.pages.contains_key(&number) && is_zero(source) {
                        continue;
                    }
                    self.change_page(number, |page| {
                        if let Some(target) = page.get_mut(within..within + source.len()) {
                            target.copy_from_slice(source);
                        }
                    });
                }
            }
            Change::Punch { offset, length } => self.zero(*offset, *length),
            Change::SetLength(length) => {
                if *length < self.length {
                    self.zero(*length, self.length - *length);
                }
                self.length = *length;
            }
        }
    }

    fn zero(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length).min(self.length);
        let first = offset / PAGE as u64;
        let numbers: Vec<u64> =
            self.pages.range(first..end.div_ceil(PAGE as u64).max(first)).map(|(&n, _)| n).collect();
        for number in numbers {
            let start = number * PAGE as u64;
            let from = offset.max(start) - start;
            let to = end.min(start + PAGE as u64) - start;
            self.change_page(number, |page| {
                if let Some(range) = page.get_mut(from as usize..to as usize) {
                    range.fill(0);
                }
            });
        }
    }

    fn change_page(&mut self, number: u64, change: impl FnOnce(&mut [u8; PAGE])) {
        let old = self.pages.remove(&number);
        let mut bytes = old.map_or_else(
            || Arc::new([0; PAGE]),
            |page| {
                self.hash ^= page.hash;
                page.bytes
            },
        );
        change(Arc::make_mut(&mut bytes));
        // All-zero pages are left out, so that a hole and written zeros hash alike.
        if !is_zero(bytes.as_slice()) {
            let hash = page_hash(number, &bytes);
            self.hash ^= hash;
            self.pages.insert(number, Page { bytes, hash });
        }
    }
}

/// Whether a part of a page is zeros: compared in one call, since every write asks.
fn is_zero(part: &[u8]) -> bool {
    static ZEROS: [u8; PAGE] = [0; PAGE];
    ZEROS.get(..part.len()) == Some(part)
}

/// Splits a range into (page number, offset within the page, range within the buffer).
fn split(offset: u64, count: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done >= count {
            return None;
        }
        let at = offset + done as u64;
        let within = (at % PAGE as u64) as usize;
        let length = (PAGE - within).min(count - done);
        let item = (at / PAGE as u64, within, done..done + length);
        done += length;
        Some(item)
    })
}

fn page_hash(number: u64, bytes: &[u8; PAGE]) -> u64 {
    let mut hash = mix(number.wrapping_add(1));
    for word in bytes.chunks_exact(8) {
        let word = word.try_into().map_or(0, u64::from_le_bytes);
        hash = (hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    mix(hash)
}

/// A bijection on 64 bits that spreads every bit (the finaliser of SplitMix64).
pub(super) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_content_hashes_alike_however_it_came_about() {
        let write = |offset, bytes: &[u8]| Change::Write { offset, bytes: bytes.into() };
        let mut a = Pages::default();
        a.apply(&Change::SetLength(20_000));
        a.apply(&write(4000, &[7; 5000]));
        a.apply(&Change::Punch { offset: 5000, length: 1000 });
        let mut b = Pages::default();
        b.apply(&Change::SetLength(30_000));
        b.apply(&write(6000, &[7; 3000]));
        b.apply(&write(25_000, &[1; 100]));
        b.apply(&write(4000, &[7; 1000]));
        assert_ne!(a.hash(), b.hash());
        assert_eq!(b.hash_without(4096..12_288), {
            let mut without = b.clone();
            without.apply(&Change::Punch { offset: 4096, length: 8192 });
            without.hash()
        });
        b.apply(&Change::SetLength(20_000));
        assert_eq!(a.hash(), b.hash());
        let mut buf = [9; 8192];
        assert_eq!(a.read(&mut buf, 15_000), 5000);
        assert_eq!(a.read(&mut buf, 3000), 8192);
        assert_eq!((buf[999], buf[1000], buf[1999], buf[2000], buf[3000]), (0, 7, 7, 0, 7));
        assert_eq!(b.next_data(0), Some(0..12_288));
        assert_eq!(b.next_data(12_000), Some(12_000..12_288));
        assert_eq!(b.next_data(12_288), None);
        b.apply(&write(19_990, &[5; 20]));
        assert_eq!(b.next_data(12_288), Some(16_384..20_000));
        assert_eq!(b.length(), 20_000, "a write does not extend");
    }
}
