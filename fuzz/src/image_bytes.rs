//! Target `image_bytes`: any bytes as an image, and a guest on it. See `guest` for what must hold.
//!
//! An input is the length of a script (two bytes), the script, and the file. Checksums are not made right: for that see
//! `image_mutations`.

use crate::Seed;
use crate::guest::{exercise, file_of};
use crate::input::Input;

/// The body of the target.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let length = input.u16();
    let script = input.bytes(length.into());
    exercise(file_of(input.0), script);
}

/// Inputs to start from: small images laid out by hand, each with a script of everything.
pub fn seeds() -> Vec<Seed> {
    let script = crate::bases::script();
    let with_script = |image: &[u8]| [&(script.len() as u16).to_be_bytes()[..], &script, image].concat();
    let mut seeds: Vec<Seed> =
        crate::bases::small_images().iter().map(|(name, image)| (*name, with_script(image))).collect();
    seeds.push(("empty", Vec::new()));
    seeds
}
