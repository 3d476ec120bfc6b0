//! The workload, as a pure function of a seed: what step N does, and every byte it writes. So the verifier of a later
//! boot needs to be told only the seed and the last step that was durable.
//!
//! All steps flush before they count as done:
//! - most append records to `records` and rewrite 4 KiB blocks at random places of `blocks` (half of them in a small
//!   hot set, so that an old generation coming back is likely to be seen);
//! - some create a file of a few hundred KiB in `files`, or delete one created earlier;
//! - some trim the whole file system.
//!
//! Every sector written names its place and generation in text, then holds pseudo-random bytes of them.

pub const SECTOR: usize = 512;
pub const BLOCK: usize = 4096;
/// Blocks in the file `blocks`. It starts as one hole.
pub const BLOCKS: u64 = 8192;
const HOT_BLOCKS: u64 = 48;
const FILE_LIFE: u64 = 24;

pub enum Step {
    /// Append `records` records, rewrite `blocks`, one fdatasync for each of the two files.
    Batch {
        records: Vec<Record>,
        blocks: Vec<u64>,
    },
    Create {
        sectors: u64,
    },
    Delete {
        created: u64,
    },
    Trim,
}

pub struct Record {
    index: u64,
    length: usize,
}

pub fn step(seed: u64, n: u64) -> Step {
    let mut random = Random::new(&[seed, n]);
    if n % 16 == 5 {
        return Step::Create { sectors: 1 + random.below(600) };
    }
    if let Some(created) = deletion_of(n) {
        return Step::Delete { created };
    }
    if n % 64 == 63 {
        return Step::Trim;
    }
    let records =
        (0..random.below(4)).map(|index| Record { index, length: 40 + random.below(3000) as usize });
    let records: Vec<_> = records.collect();
    let blocks = (0..1 + random.below(8))
        .map(|_| if random.below(2) == 0 { random.below(HOT_BLOCKS) } else { random.below(BLOCKS) })
        .collect();
    Step::Batch { records, blocks }
}

/// The step whose file step `n` deletes.
fn deletion_of(n: u64) -> Option<u64> {
    (n % 16 == 13 && n > FILE_LIFE).then(|| n - FILE_LIFE)
}

/// The step that deletes the file of step `created`.
pub fn deleted_at(created: u64) -> u64 {
    created + FILE_LIFE
}

impl Record {
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn bytes(&self, seed: u64, step: u64) -> Vec<u8> {
        let mut bytes = vec![0; self.length];
        let label = format!("record {step}.{} of {} bytes\n", self.index, self.length);
        fill(&mut bytes, &label, &[seed, 1, step, self.index]);
        bytes
    }
}

/// One sector of block `block` as step `step` writes it.
pub fn block_sector(seed: u64, block: u64, step: u64, sector: usize) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    fill(
        &mut bytes,
        &format!("block {block}.{sector} step {step}\n"),
        &[seed, 2, block, step, sector as u64],
    );
    bytes
}

pub fn block(seed: u64, block: u64, step: u64) -> Vec<u8> {
    (0..BLOCK / SECTOR).flat_map(|sector| block_sector(seed, block, step, sector)).collect()
}

/// The file that step `step` creates.
pub fn file(seed: u64, step: u64, sectors: u64) -> Vec<u8> {
    let mut bytes = vec![0; sectors as usize * SECTOR];
    for (index, sector) in bytes.chunks_mut(SECTOR).enumerate() {
        fill(sector, &format!("file {step}.{index}\n"), &[seed, 3, step, index as u64]);
    }
    bytes
}

fn fill(bytes: &mut [u8], label: &str, key: &[u64]) {
    let mut random = Random::new(key);
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes()[..chunk.len()]);
    }
    let label = &label.as_bytes()[..label.len().min(bytes.len())];
    bytes[..label.len()].copy_from_slice(label);
}

/// SplitMix64.
pub struct Random(u64);

impl Random {
    pub fn new(key: &[u64]) -> Self {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for &part in key {
            random.0 ^= part;
            random.0 = random.next();
        }
        random
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
