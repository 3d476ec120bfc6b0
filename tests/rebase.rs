//! Naming another parent: whole or not at all, whatever a crash leaves.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/chain_ops.rs"]
#[allow(dead_code, reason = "shared with the other tests of chains")]
mod chain_ops;
#[path = "support/failing.rs"]
mod failing;

use chain_ops::{SIZE, change_closed, copy, create, must_be_sound, must_hold, options};
use cowvhd::ErrorKind;
use cowvhd::sim::{Bounds, Rng, SimVfs};
use cowvhd::snapshot::relink;
use std::path::Path;

#[test]
fn a_moved_parent_is_named_whole_or_not_at_all() {
    let states: u64 = (0..12)
        .map(|seed| {
            chain_ops::relinked(seed, &Bounds::sample(60))
                .unwrap_or_else(|error| panic!("seed {seed}: {error}"))
        })
        .sum();
    println!("{states} distinct states: no violation");
    assert!(states > 1000);
}

#[test]
fn another_parent_changes_nothing_that_is_shown() {
    let states: u64 = (0..40)
        .map(|seed| {
            let bounds = Bounds::sample(if seed < 4 { 20 } else { 4 });
            chain_ops::rebased(seed, &bounds).unwrap_or_else(|error| panic!("seed {seed}: {error}"))
        })
        .sum();
    println!("{states} distinct states: no violation");
}

/// The checksum of a header is a sum: one of two halves may pass.
#[test]
fn a_header_that_is_torn_where_the_sums_agree() {
    let states = chain_ops::torn_header(1, &Bounds::sample(1000)).unwrap();
    println!("{states} distinct states: no violation");
}

#[test]
fn again_and_again() {
    let vfs = SimVfs::new(7);
    let mut rng = Rng::new(7);
    let (disk, first) = (Path::new("/vm.vhd"), Path::new("/0/root.vhd"));
    let mut content = vec![0; SIZE as usize];
    create(&vfs, first, None);
    change_closed(&vfs, first, &mut content, &mut rng, 6);
    create(&vfs, disk, Some(first));
    let mut old = first.to_path_buf();
    for number in 1..20 {
        let new = Path::new(&format!("/{number}/root.vhd")).to_path_buf();
        copy(&vfs, &old, &new);
        relink(&options(&vfs), disk, &new).unwrap();
        cowvhd::vfs::Vfs::remove(&vfs, &old).unwrap();
        change_closed(&vfs, disk, &mut content, &mut rng, 1);
        must_hold(&options(&vfs).read_only(true), disk, &content).unwrap();
        must_be_sound(&vfs, disk).unwrap();
        old = new;
    }
}

/// What is refused changes nothing.
#[test]
fn only_the_right_parent_is_named() {
    let vfs = SimVfs::new(1);
    let (root, other, disk) = (Path::new("/root.vhd"), Path::new("/other.vhd"), Path::new("/vm.vhd"));
    create(&vfs, root, None);
    create(&vfs, other, None);
    create(&vfs, disk, Some(root));
    let before = [root, other, disk].map(|path| vfs.content_hash(path));
    let error = relink(&options(&vfs), disk, other).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ParentMissing);
    assert!(error.to_string().contains("is another disk"), "{error}");
    assert_eq!(before, [root, other, disk].map(|path| vfs.content_hash(path)));
    let error = relink(&options(&vfs), other, root).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    must_be_sound(&vfs, other).unwrap();
    // A sealed image can be re-pointed, too; this one has no parent, and stays as it is.
    let error = relink(&options(&vfs), root, other).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(options(&vfs).open(root).unwrap_err().kind(), ErrorKind::Sealed);
    must_hold(&options(&vfs).read_only(true), disk, &[0; SIZE as usize]).unwrap();
    assert!(relink(&options(&vfs), disk, Path::new("/none.vhd")).is_err());
    assert!(relink(&options(&vfs), disk, disk).is_err());
}
