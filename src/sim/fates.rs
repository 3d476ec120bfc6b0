//! What becomes of each piece at a power cut, and how that is written down.

use super::pages::{Change, PAGE, Pages, mix};
use super::rng::Rng;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

const SECTOR: u64 = 512;

/// What becomes of a pending change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Lost,
    Kept,
    /// Of a write the sectors before this one survive.
    Front(u64),
    /// Of a write this sector and those behind it survive.
    Back(u64),
    /// The sectors whose bit is set survive (of at most 64).
    Mask(u64),
    /// Of its sectors those survive that the seed chooses.
    Torn(u64),
    /// Some of the 4 KiB pages it touches hold garbage, the others are torn.
    Garbage(u64),
}

/// Of writes up to this many sectors every set of sectors is made.
const MASKED_SECTORS: u64 = 6;

impl Fate {
    pub(super) fn kept_if(kept: bool) -> Self {
        if kept { Fate::Kept } else { Fate::Lost }
    }

    /// All ways to tear a write of so many sectors: any of a short one, the front or the back of a longer one.
    pub(super) fn every_cut(sectors: u64) -> Vec<Fate> {
        match sectors {
            ..=MASKED_SECTORS => (0..1 << sectors).map(Fate::Mask).collect(),
            _ => (0..=sectors).map(Fate::Front).chain((1..sectors).map(Fate::Back)).collect(),
        }
    }

    /// Lets `change` reach the medium as far as this fate allows. What is not a write is whole or lost, except that a hole may
    /// be punched in part.
    pub(super) fn apply(self, change: &Change, pages: &mut Pages) {
        match (self, change) {
            (Fate::Lost, _) => {}
            (Fate::Kept, _) | (_, Change::SetLength(_)) => pages.apply(change),
            (Fate::Torn(seed) | Fate::Garbage(seed), Change::Punch { offset, length }) => {
                let mut rng = Rng::new(seed);
                let mut at = *offset;
                let end = offset + length;
                while at < end {
                    let next = (at / PAGE as u64 + 1).saturating_mul(PAGE as u64).min(end);
                    if rng.one_in(2) {
                        pages.apply(&Change::Punch { offset: at, length: next - at });
                    }
                    at = next;
                }
            }
            (_, Change::Punch { .. }) => pages.apply(change),
            (Fate::Front(end), Change::Write { offset, bytes }) => {
                tear(pages, *offset, bytes, |sector| sector < end);
            }
            (Fate::Back(start), Change::Write { offset, bytes }) => {
                tear(pages, *offset, bytes, |sector| sector >= start);
            }
            (Fate::Mask(mask), Change::Write { offset, bytes }) => {
                tear(pages, *offset, bytes, |sector| mask >> (sector % 64) & 1 == 1);
            }
            (Fate::Torn(seed), Change::Write { offset, bytes }) => {
                let mut rng = Rng::new(seed);
                let sectors = (bytes.len() as u64).div_ceil(SECTOR);
                // A clean cut from the front or the back is the commonest tear, a comb the nastiest.
                let (style, cut) = (rng.below(3), rng.below(sectors + 1));
                tear(pages, *offset, bytes, |sector| match style {
                    0 => sector < cut,
                    1 => sector >= cut,
                    _ => mix(seed ^ sector) & 1 == 1,
                });
            }
            (Fate::Garbage(seed), Change::Write { offset, bytes }) => {
                tear(pages, *offset, bytes, |sector| mix(seed ^ sector) & 1 == 1);
                let first = offset / PAGE as u64;
                let end = (offset + bytes.len() as u64).div_ceil(PAGE as u64);
                let mut rng = Rng::new(seed);
                for page in (first..end).filter(|page| mix(seed ^ page) & 2 == 2) {
                    let junk: Vec<u8> = (0..PAGE / 8).flat_map(|_| rng.next_u64().to_le_bytes()).collect();
                    pages.apply(&Change::Write { offset: page * PAGE as u64, bytes: junk.into() });
                }
            }
        }
    }
}

fn tear(pages: &mut Pages, offset: u64, bytes: &Arc<[u8]>, keep: impl Fn(u64) -> bool) {
    for (sector, part) in (0..).zip(bytes.chunks(SECTOR as usize)) {
        if keep(sector) {
            pages.apply(&Change::Write { offset: offset + sector * SECTOR, bytes: part.into() });
        }
    }
}

/// What becomes of every piece of a crash point. As text it is short, and reads back as the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fates {
    /// Of the changes of each file, then of those of names.
    pub(super) pieces: Vec<Fate>,
    /// The seed of the order in which changes of names persist; 0 for the order they were made in.
    pub(super) order: u64,
}

impl fmt::Display for Fates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "o{:x}", self.order)?;
        for run in self.pieces.chunk_by(|a, b| a == b) {
            let Some(fate) = run.first() else { continue };
            write!(f, ".{}", run.len())?;
            match fate {
                Fate::Lost => f.write_str("l")?,
                Fate::Kept => f.write_str("k")?,
                Fate::Front(sectors) => write!(f, "f{sectors:x}")?,
                Fate::Back(sectors) => write!(f, "b{sectors:x}")?,
                Fate::Mask(mask) => write!(f, "m{mask:x}")?,
                Fate::Torn(seed) => write!(f, "t{seed:x}")?,
                Fate::Garbage(seed) => write!(f, "g{seed:x}")?,
            }
        }
        Ok(())
    }
}

/// A text that is no [`Fates`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not what became of a pending change: expected a count and a letter, such as 3k or 1t5f")]
pub struct BadFates(String);

impl FromStr for Fates {
    type Err = BadFates;

    fn from_str(text: &str) -> Result<Self, BadFates> {
        let bad = |part: &str| BadFates(part.to_string());
        let mut parts = text.split('.');
        let order = parts.next().and_then(|order| u64::from_str_radix(order.strip_prefix('o')?, 16).ok());
        let order = order.ok_or_else(|| bad(text))?;
        let mut pieces = Vec::new();
        for part in parts {
            let letter = part.find(|c: char| !c.is_ascii_digit()).ok_or_else(|| bad(part))?;
            let (count, rest) = part.split_at(letter);
            let number = || {
                let digits = rest.get(1..).unwrap_or_default();
                u64::from_str_radix(digits, 16).map_err(|_| bad(part))
            };
            let fate = match rest.as_bytes().first() {
                Some(b'l') => Fate::Lost,
                Some(b'k') => Fate::Kept,
                Some(b'f') => Fate::Front(number()?),
                Some(b'b') => Fate::Back(number()?),
                Some(b'm') => Fate::Mask(number()?),
                Some(b't') => Fate::Torn(number()?),
                Some(b'g') => Fate::Garbage(number()?),
                _ => return Err(bad(part)),
            };
            let count: u32 = count.parse().map_err(|_| bad(part))?;
            pieces.extend(std::iter::repeat_n(fate, count as usize));
        }
        Ok(Fates { pieces, order })
    }
}
