//! Target `differential`: of an image that a strict reader of its own making accepts as well, we read the same.
//!
//! An input is either a file as it is, or a base with mended changes (see `mutation`). The strict reader shares no code with
//! the library; it refuses more than we do, so that what it accepts we must open, too, except where this version says that it
//! does not.

use crate::guest::{PATH, file_of};
use crate::strict_vhd::{Guest, Kind, Positional, StrictVhd};
use crate::{Seed, mutation};
use cowvhd::sim::SimVfs;
use cowvhd::vfs::{Access, Vfs};
use cowvhd::{ErrorKind, OpenOptions};
use std::path::Path;
use std::sync::Arc;

/// How much of a disk is compared at its start and at its end.
const COMPARED: u64 = 64 << 10;

/// The body of the target.
pub fn run(data: &[u8]) {
    let vfs = match data.split_first() {
        Some((0xff, image)) => file_of(image),
        _ => mutation::image(data).0,
    };
    compare(&vfs);
}

fn compare(vfs: &SimVfs) {
    let Ok(file) = vfs.open(Path::new(PATH), Access::ReadOnly) else { return };
    let ours = OpenOptions::new().vfs(Arc::new(vfs.clone())).read_only(true).open(Path::new(PATH));
    let Ok(length) = file.length() else { return };
    let source = Positional::new(length, move |buf, at| file.read_at(buf, at));
    let Ok(mut strict) = StrictVhd::open(source) else { return };
    if strict.kind() == Kind::Differencing {
        return;
    }
    let ours = match ours {
        Ok(ours) => ours,
        // What a newer version, or damage of the private area, forbids is no matter of VHD.
        Err(error) => {
            assert!(error.kind() != ErrorKind::Io, "the strict reader opens it, we do not: {error}");
            return;
        }
    };
    assert!(
        ours.size() == strict.size(),
        "{} bytes, and {} for the strict reader",
        ours.size(),
        strict.size()
    );
    for start in [0, ours.size().saturating_sub(COMPARED)] {
        let length = ours.size().min(COMPARED);
        let (mut one, mut other) = (vec![0xee; length as usize], vec![0xdd; length as usize]);
        match (ours.read_at(&mut one, start), strict.read_at(start, &mut other)) {
            (Ok(()), Ok(())) => {
                assert!(one == other, "other content than the strict reader's from {start} on")
            }
            // Each may refuse what it finds damaged when it gets there.
            (Err(_), _) | (_, Err(_)) => {}
        }
    }
}

/// Inputs to start from: small images as they are, and the bases of the mutations.
pub fn seeds() -> Vec<Seed> {
    let mut seeds: Vec<Seed> = crate::bases::small_images()
        .iter()
        .map(|(name, image)| (*name, [&[0xff][..], image].concat()))
        .collect();
    seeds.extend((0..crate::bases::all().len() as u8).map(|base| ("base", vec![base, 0])));
    seeds
}
