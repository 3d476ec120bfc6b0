//! Target `image_mutations`: a valid image with fields changed and checksums mended, and a guest on it. See `mutation` for
//! what an input means and `guest` for what must hold.

use crate::Seed;
use crate::guest::exercise;
use crate::mutation;

/// The body of the target.
pub fn run(data: &[u8]) {
    let (vfs, script) = mutation::image(data);
    exercise(vfs, script.0);
}

/// Inputs to start from: each base as it is and with a change of each kind, then a script of everything.
pub fn seeds() -> Vec<Seed> {
    let script = crate::bases::script();
    let mut seeds: Vec<Seed> = Vec::new();
    for base in 0..crate::bases::all().len() as u8 {
        seeds.push(("base", [&[base, 0][..], &script].concat()));
        for kind in (0..32).chain([0x25, 0x4c]) {
            let change = [kind, 2, 0, 16, 0, 0, 0, 0, 0, 0, 0, 1];
            seeds.push(("change", [&[base, 1][..], &change, &script].concat()));
        }
    }
    seeds
}
