//! What the fuzz targets do, as plain functions of bytes, so that `cargo test` can run them too: over the seeds and their
//! neighbours, and over any input a fuzzer found.
//!
//! Each module is one target: `run` is its body, which panics if a property is broken, and `seeds` gives inputs to start
//! from. `cargo run --example seed_corpus` writes them where cargo-fuzz looks.

pub mod vhd_structures;

/// An input to start from: a file name, and its bytes.
pub type Seed = (&'static str, Vec<u8>);

/// A target's name and its seeds.
pub type TargetSeeds = (&'static str, Vec<Seed>);

/// The seeds of every target.
pub fn all_seeds() -> Vec<TargetSeeds> {
    vec![("vhd_structures", vhd_structures::seeds())]
}

/// Runs `body` on each seed, on each beginning of it, and on each with one byte changed.
#[cfg(test)]
fn run_neighbourhood(seeds: &[Seed], body: fn(&[u8])) {
    for (_, seed) in seeds {
        body(seed);
        for length in 0..seed.len() {
            body(&seed[..length]);
        }
        for index in 0..seed.len() {
            for flip in [0x01, 0x80, 0xFF] {
                let mut changed = seed.clone();
                changed[index] ^= flip;
                body(&changed);
            }
        }
    }
}
