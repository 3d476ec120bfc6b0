//! Seeded choices: every run prints its seed, and `COWVHD_TEST_SEED` repeats one. That repeats the work and the plan of
//! crashes; the exact moment of a kill is the machine's.

use std::hash::{BuildHasher, RandomState};

/// How often something is killed: `default` times, or as `COWVHD_TEST_CYCLES` says.
pub fn cycles(default: u32) -> u32 {
    match std::env::var("COWVHD_TEST_CYCLES") {
        Ok(text) => text.parse().expect("COWVHD_TEST_CYCLES is a number"),
        Err(_) => default,
    }
}

/// The seed of this run, printed.
pub fn seed(test: &str) -> u64 {
    let seed = match std::env::var("COWVHD_TEST_SEED") {
        Ok(text) => text.parse().expect("COWVHD_TEST_SEED is a number"),
        // Short enough to be typed again, and to be a kernel parameter.
        Err(_) => RandomState::new().hash_one(test) % 1_000_000_000,
    };
    println!("{test}: COWVHD_TEST_SEED={seed}");
    seed
}

/// SplitMix64.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `from..to`.
    pub fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % (to - from)
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
        bytes
    }
}
