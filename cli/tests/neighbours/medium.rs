//! What was written to an image file, and what a power cut may leave of it.
//!
//! Between two syncs any subset of the writes survives, each torn at any 512-byte boundary. This is the simulator's model
//! without garbage and without size changes that are lost: QEMU's log has neither.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::support::random::Random;

const PAGE: u64 = 4096;
const SECTOR: u64 = 512;

/// One operation on the image file.
pub enum Change {
    Write {
        offset: u64,
        bytes: Vec<u8>,
        /// It was durable on its own when it returned.
        durable: bool,
    },
    SetLength(u64),
    Punch {
        offset: u64,
        length: u64,
    },
    /// The first `covers` operations are durable.
    Sync {
        covers: usize,
    },
}

/// The operations of a run in the order of their completion.
#[derive(Default)]
pub struct Log {
    pub changes: Vec<Change>,
    /// Where each stands, in the units in which the run told its position.
    pub positions: Vec<u64>,
}

/// A moment at which the power may fail.
struct Point {
    /// In the units of [`Log::positions`].
    position: u64,
    /// Operations that had completed.
    end: usize,
    /// The first of them that may be lost.
    pending_from: usize,
}

/// One state that a power cut may leave.
pub struct State {
    /// When the power failed.
    pub position: u64,
    pending_from: usize,
    fates: Vec<Fate>,
}

impl State {
    /// Whether nothing is lost: the process was killed, and the power stayed on.
    pub fn is_kill(&self) -> bool {
        self.fates.iter().all(|fate| *fate == Fate::Kept)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Lost,
    Kept,
    /// The sectors whose bit is set in the generator of this seed are kept.
    Torn(u64),
}

impl Log {
    /// About `limit` states, those of all points mixed. `acknowledged`: positions at which a guest's flush had returned.
    pub fn states(&self, acknowledged: &[u64], limit: usize, random: &mut Random) -> Vec<State> {
        let mut ends: Vec<(usize, u64)> = Vec::new();
        for (index, change) in self.changes.iter().enumerate() {
            // Just before a sync most is pending.
            if let Change::Sync { .. } = change {
                ends.push((index, self.positions[index].saturating_sub(1)));
            }
        }
        for &position in acknowledged {
            ends.push((self.positions.partition_point(|&at| at <= position), position));
        }
        let mut states = Vec::new();
        for (end, position) in ends {
            let point = Point { position, end, pending_from: self.covered(end) };
            self.states_of(&point, random, &mut states);
        }
        for at in (1..states.len()).rev() {
            states.swap(at, random.between(0, at as u64 + 1) as usize);
        }
        states.truncate(limit);
        states
    }

    /// The end of the run: everything that completed is on the medium, as after a kill.
    pub fn killed(&self) -> State {
        let position = self.positions.last().copied().unwrap_or(0);
        State { position, pending_from: self.changes.len(), fates: Vec::new() }
    }

    fn covered(&self, end: usize) -> usize {
        let covers = |change: &Change| if let Change::Sync { covers } = change { *covers } else { 0 };
        self.changes[..end].iter().map(covers).max().unwrap_or(0)
    }

    fn states_of(&self, point: &Point, random: &mut Random, states: &mut Vec<State>) {
        let pending = point.end - point.pending_from;
        let mut add = |fate: &mut dyn FnMut(usize) -> Fate| {
            let fates: Vec<Fate> = (0..pending).map(fate).collect();
            let Point { position, pending_from, .. } = *point;
            states.push(State { position, pending_from, fates });
        };
        let kept_if = |kept: bool| if kept { Fate::Kept } else { Fate::Lost };
        if pending <= 4 {
            (0..1u32 << pending).for_each(|subset| add(&mut |at| kept_if(subset >> at & 1 == 1)));
        } else {
            add(&mut |_| Fate::Lost);
            add(&mut |_| Fate::Kept);
            for _ in 0..4 {
                let one = random.between(0, pending as u64) as usize;
                add(&mut |at| kept_if(at == one));
                add(&mut |at| kept_if(at != one));
                add(&mut |_| kept_if(random.between(0, 2) == 0));
            }
        }
        for _ in 0..if pending > 0 { 4 } else { 0 } {
            add(&mut |_| match random.between(0, 3) {
                0 => Fate::Lost,
                1 => Fate::Kept,
                _ => Fate::Torn(random.next()),
            });
        }
    }

    /// What the medium holds in `state`, on top of what it held before the run.
    pub fn medium(&self, before: &Medium, state: &State) -> Medium {
        let mut medium = before.clone();
        for change in &self.changes[..state.pending_from] {
            medium.apply(change, Fate::Kept);
        }
        for (change, fate) in self.changes[state.pending_from..].iter().zip(&state.fates) {
            medium.apply(change, *fate);
        }
        medium
    }
}

/// The content of a file: pages that are not all zeros.
#[derive(Clone, Default)]
pub struct Medium {
    pages: BTreeMap<u64, Vec<u8>>,
    length: u64,
}

impl Medium {
    pub fn load(path: &Path) -> Self {
        let mut medium = Medium::default();
        medium.write(0, &std::fs::read(path).expect("the image"));
        medium
    }

    pub fn store(&self, path: &Path) {
        let file = File::create(path).expect("a file");
        file.set_len(self.length).expect("its length");
        for (number, page) in &self.pages {
            let count = (self.length - number * PAGE).min(PAGE) as usize;
            file.write_all_at(&page[..count], number * PAGE).expect("its content");
        }
    }

    /// Makes the file at least this long.
    pub fn extend(&mut self, length: u64) {
        self.length = self.length.max(length);
    }

    fn apply(&mut self, change: &Change, fate: Fate) {
        match (change, fate) {
            (Change::Write { offset, bytes, durable: true }, _)
            | (Change::Write { offset, bytes, .. }, Fate::Kept) => self.write(*offset, bytes),
            (Change::Write { offset, bytes, .. }, Fate::Torn(seed)) => {
                let mut random = Random::new(seed);
                for (sector, part) in (0..).zip(bytes.chunks(SECTOR as usize)) {
                    if random.between(0, 2) == 0 {
                        self.write(offset + sector * SECTOR, part);
                    }
                }
            }
            (Change::SetLength(length), _) => {
                let last = length / PAGE;
                self.pages.retain(|&number, _| number <= last);
                if let Some(page) = self.pages.get_mut(&last) {
                    page[(length % PAGE) as usize..].fill(0);
                }
                self.length = *length;
            }
            (Change::Punch { offset, length }, Fate::Kept) => {
                let end = (offset + length).min(self.length);
                let mut at = *offset;
                while at < end {
                    let next = (at / PAGE + 1).saturating_mul(PAGE).min(end);
                    if let Some(page) = self.pages.get_mut(&(at / PAGE)) {
                        page[(at % PAGE) as usize..][..(next - at) as usize].fill(0);
                    }
                    at = next;
                }
            }
            (Change::Write { .. } | Change::Punch { .. } | Change::Sync { .. }, _) => {}
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.length = self.length.max(offset + bytes.len() as u64);
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let (part, behind) = rest.split_at(rest.len().min((PAGE - at % PAGE) as usize));
            if self.pages.contains_key(&(at / PAGE)) || part.iter().any(|&byte| byte != 0) {
                let page = self.pages.entry(at / PAGE).or_insert_with(|| vec![0; PAGE as usize]);
                page[(at % PAGE) as usize..][..part.len()].copy_from_slice(part);
            }
            (at, rest) = (at + part.len() as u64, behind);
        }
    }
}
