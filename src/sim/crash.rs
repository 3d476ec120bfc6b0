//! Crash points and the states that a power cut there may leave.
//!
//! Each pending change may be lost, kept, torn at any 512-byte boundary, or leave garbage in whole 4 KiB physical sectors,
//! independently of all others. Up to twelve pending changes every subset is made; of more, all with at most so many
//! missing or present as the limit allows, and seeded ones. Tearing is exhaustive for a single short write and seeded
//! otherwise.

use super::pages::{Change, PAGE, Pages, mix};
use super::rng::Rng;
use super::vfs::SimVfs;
use std::path::PathBuf;
use std::sync::Arc;

const SECTOR: u64 = 512;
/// Up to this many pending changes, every subset is made.
const EXHAUSTIVE_CHANGES: usize = 12;

/// A file when the power failed.
#[derive(Debug, Clone)]
pub(super) struct FileAtCrash {
    pub(super) path: PathBuf,
    pub(super) medium: Pages,
    pub(super) pending: Vec<Change>,
}

/// A moment at which the power may fail.
#[derive(Debug, Clone)]
pub struct CrashPoint {
    pub(super) clock: u64,
    pub(super) files: Vec<FileAtCrash>,
}

/// What becomes of a pending change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Lost,
    Kept,
    /// Of its sectors those survive whose bit is set in the generator of this seed.
    Torn(u64),
    /// The sectors whose bit is set survive (at most 64 of them).
    Mask(u64),
    /// Some of the 4 KiB pages it touches hold garbage, the others are torn.
    Garbage(u64),
}

/// One state that a crash point may leave.
#[derive(Debug, Clone)]
pub struct CrashState {
    files: Vec<(PathBuf, Pages)>,
    /// In-flight physical sectors may hold garbage.
    pub garbage: bool,
    /// The hash of all files.
    pub hash: u64,
}

impl CrashState {
    /// The file system after the power came back.
    pub fn to_vfs(&self, seed: u64) -> SimVfs {
        SimVfs::with_files(seed, self.files.iter().cloned())
    }
}

impl CrashPoint {
    /// The clock when the power failed.
    pub fn clock(&self) -> u64 {
        self.clock
    }

    /// How many changes are pending.
    pub fn pending(&self) -> usize {
        self.files.iter().map(|file| file.pending.len()).sum()
    }

    /// Calls `visit` with states of this point until about `limit` were made or it returns false. The same seed gives the
    /// same states.
    pub fn for_each_state(&self, seed: u64, limit: usize, mut visit: impl FnMut(CrashState) -> bool) {
        let count = self.pending();
        let mut rng = Rng::new(seed);
        let mut made = 0;
        let mut emit = |fates: &[Fate]| {
            made += 1;
            visit(self.state(fates)) && made < limit
        };
        if count <= EXHAUSTIVE_CHANGES && 1usize << count <= limit {
            for subset in 0..1u64 << count {
                let fates: Vec<Fate> = (0..count).map(|i| kept_if(subset >> i & 1 == 1)).collect();
                if !emit(&fates) {
                    return;
                }
            }
        } else {
            for invert in [false, true] {
                for absent in 0..=count {
                    let fates: Vec<Fate> = (0..count).map(|i| kept_if((i == absent) == invert)).collect();
                    if !emit(&fates) {
                        return;
                    }
                }
            }
        }
        if let [only] = self.single_short_write().as_slice() {
            for mask in 0..1u64 << only {
                if !emit(&[Fate::Mask(mask)]) {
                    return;
                }
            }
        }
        for _ in 0..limit {
            let style = rng.below(4);
            let fates: Vec<Fate> = (0..count)
                .map(|_| match (style, rng.below(4)) {
                    (1, 0) | (2, 0 | 1) => Fate::Torn(rng.next_u64()),
                    (3, 0 | 1) => Fate::Garbage(rng.next_u64()),
                    (_, choice) => kept_if(choice & 1 == 1),
                })
                .collect();
            if !emit(&fates) || count == 0 {
                return;
            }
        }
    }

    /// The sectors of the pending write, if it is the only change and short enough to tear it in every way.
    fn single_short_write(&self) -> Vec<u64> {
        let mut changes = self.files.iter().flat_map(|file| &file.pending);
        match (changes.next(), changes.next()) {
            (Some(Change::Write { bytes, .. }), None) if bytes.len() as u64 <= 8 * SECTOR => {
                vec![bytes.len() as u64 / SECTOR]
            }
            _ => Vec::new(),
        }
    }

    fn state(&self, fates: &[Fate]) -> CrashState {
        let mut fates = fates.iter().copied();
        let mut garbage = false;
        let mut hash = 0u64;
        let files = self
            .files
            .iter()
            .map(|file| {
                let mut pages = file.medium.clone();
                for change in &file.pending {
                    let fate = fates.next().unwrap_or(Fate::Lost);
                    garbage |= matches!(fate, Fate::Garbage(_));
                    apply(&mut pages, change, fate);
                }
                hash = mix(hash ^ pages.hash());
                (file.path.clone(), pages)
            })
            .collect();
        CrashState { files, garbage, hash }
    }
}

fn kept_if(kept: bool) -> Fate {
    if kept { Fate::Kept } else { Fate::Lost }
}

fn apply(pages: &mut Pages, change: &Change, fate: Fate) {
    match (fate, change) {
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
        (Fate::Mask(_), Change::Punch { .. }) => pages.apply(change),
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
            let last = (offset + bytes.len() as u64 - 1) / PAGE as u64;
            let mut rng = Rng::new(seed);
            for page in (first..=last).filter(|page| mix(seed ^ page) & 2 == 2) {
                let junk: Vec<u8> = (0..PAGE / 8).flat_map(|_| rng.next_u64().to_le_bytes()).collect();
                pages.apply(&Change::Write { offset: page * PAGE as u64, bytes: junk.into() });
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
