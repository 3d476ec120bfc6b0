//! What the fuzz targets do, as plain functions of bytes, so that `cargo test` can run them too: over the seeds and their
//! neighbours, and over any input a fuzzer found (`tests/regressions.rs` of the library, `export/tests/nbd`).
//!
//! Each public module is one target: `run` is its body, which panics if a property is broken, and `seeds` gives inputs to
//! start from.

use std::fs;
use std::path::Path;

mod bases;
pub mod differential;
pub mod folders;
mod guest;
pub mod image_bytes;
pub mod image_mutations;
mod input;
mod mutation;
pub mod nbd_bytes;
pub mod operations;
pub mod parent_paths;
#[path = "../../tests/support/strict_vhd.rs"]
mod strict_vhd;
pub mod vhd_structures;

/// An input to start from: a name, and its bytes.
pub type Seed = (&'static str, Vec<u8>);

/// Writes the seeds of a target where cargo-fuzz keeps its inputs, before the fuzzer looks there. What cannot be written it
/// goes without.
pub fn write_seeds(target: &str, seeds: &[Seed]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    if fs::create_dir_all(&folder).is_err() {
        return;
    }
    for (number, (name, bytes)) in seeds.iter().enumerate() {
        let _ = fs::write(folder.join(format!("seed-{number}-{name}")), bytes);
    }
}
