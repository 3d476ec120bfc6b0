//! Deleting snapshots: nothing that anybody sees changes, whatever a crash leaves; what others need stays.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/chain_ops.rs"]
#[allow(dead_code, reason = "shared with the other tests of chains")]
mod chain_ops;

use chain_ops::{Chain, create, must_hold, options};
use cowvhd::ErrorKind;
use cowvhd::sim::Bounds;
use cowvhd::snapshot::{SnapshotName, delete};
use std::ops::ControlFlow;
use std::path::Path;

#[test]
fn deleting_changes_what_nobody_sees_at_every_step() {
    let states: u64 = (0..30)
        .map(|seed| {
            let bounds = Bounds::sample(if seed < 4 { 12 } else { 3 });
            chain_ops::deleted(seed, &bounds).unwrap_or_else(|error| panic!("seed {seed}: {error}"))
        })
        .sum();
    println!("{states} distinct states: no violation");
}

/// A snapshot that a clone is made over stays, and so does one whose readers are there.
#[test]
fn what_others_need_stays() {
    let Chain { vfs, layers, content } = Chain::random(2, 4);
    let (disk, name) = (Path::new("/vm.vhd"), SnapshotName::new("0").unwrap());
    let delete = || delete(&options(&vfs), disk, &name, &mut |_| ControlFlow::Continue(()));
    let clone = Path::new("/elsewhere.vhd");
    create(&vfs, clone, Some(&layers[0]));
    let error = delete().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("elsewhere.vhd"), "{error}");
    // One that is not found counts as there.
    cowvhd::vfs::Vfs::rename(&vfs, clone, Path::new("/moved.vhd")).unwrap();
    assert_eq!(delete().unwrap_err().kind(), ErrorKind::Unsupported);
    must_hold(&options(&vfs).read_only(true), disk, &content).unwrap();
    let running = options(&vfs).open(disk).unwrap();
    assert_eq!(delete().unwrap_err().kind(), ErrorKind::InUse);
    running.close().unwrap();
    let none = SnapshotName::new("none").unwrap();
    let error = cowvhd::snapshot::delete(&options(&vfs), disk, &none, &mut |_| ControlFlow::Continue(()));
    assert_eq!(error.unwrap_err().kind(), ErrorKind::NotFound);
}
