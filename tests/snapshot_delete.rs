//! Deleting snapshots: nothing that anybody sees changes, whatever a crash leaves; what others need stays.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/chain_ops.rs"]
#[allow(dead_code, reason = "shared with the other tests of chains")]
mod chain_ops;

use chain_ops::{Chain, create, must_hold, options, read};
use cowvhd::ErrorKind;
use cowvhd::sim::Bounds;
use cowvhd::snapshot::{SnapshotName, delete, delete_running};
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

#[test]
fn deleting_beside_a_guest_changes_what_nobody_sees() {
    let states: u64 = (0..24)
        .map(|seed| {
            let bounds = Bounds::sample(if seed < 4 { 12 } else { 3 });
            chain_ops::deleted_running(seed, &bounds).unwrap_or_else(|error| panic!("seed {seed}: {error}"))
        })
        .sum();
    println!("{states} distinct states: no violation");
}

/// A snapshot that a clone is made over stays, and so does one whose readers are there.
#[test]
fn what_others_need_stays() {
    let Chain { vfs, layers, content } = Chain::random(2, 4);
    let (disk, name) = (Path::new("/vm.vhd"), name("0"));
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

fn name(name: &str) -> SnapshotName {
    SnapshotName::new(name).unwrap()
}

/// Five layers, `/vm@0.vhd` to `/vm@3.vhd` and the disk.
fn five_layers() -> Chain {
    (0..).map(|seed| Chain::random(seed, 5)).find(|chain| chain.layers.len() == 5).unwrap()
}

/// Deletions of snapshots of a running disk, in any order, stopped anywhere, with snapshots in between: each goes on where it was.
#[test]
fn deletions_of_a_running_disk_go_on() {
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]] {
        let Chain { vfs, layers, content } = five_layers();
        let disk = options(&vfs).open(Path::new("/vm.vhd")).unwrap();
        let shows = || {
            let mut found = vec![0; content.len()];
            disk.read_at(&mut found, 0).unwrap();
            assert!(found == content, "order {order:?}");
        };
        let mut later = Vec::new();
        for number in order {
            let snapshot = name(&number.to_string());
            for stop_after in 0.. {
                let mut calls = 0;
                let result = delete_running(&disk, &snapshot, &mut |_| {
                    calls += 1;
                    if calls > stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                });
                shows();
                match result {
                    Ok(_) => break,
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}"),
                }
                if stop_after == 1 && later.len() < 2 {
                    // The next one finds another layer over it.
                    later.push(disk.snapshot(&name(&format!("later{number}"))).unwrap());
                }
            }
            assert!(vfs.content(&layers[number]).is_none());
        }
        for path in &later {
            assert!(read(&options(&vfs).read_only(true), path).unwrap() == content);
        }
        disk.flush().unwrap();
        disk.close().unwrap();
        must_hold(&options(&vfs), Path::new("/vm.vhd"), &content).unwrap();
    }
}

/// What a running disk cannot delete, and what it needs meanwhile.
#[test]
fn what_cannot_be_deleted_beside_a_guest_is_said() {
    let Chain { vfs, layers, content } = five_layers();
    let disk = options(&vfs).open(Path::new("/vm.vhd")).unwrap();
    let delete = |number: &str| delete_running(&disk, &name(number), &mut |_| ControlFlow::Continue(()));
    assert_eq!(delete("none").unwrap_err().kind(), ErrorKind::NotFound);
    // A disk over the snapshot; and one over the layer that it would go into, which is being read.
    let clone = Path::new("/clone.vhd");
    create(&vfs, clone, Some(&layers[1]));
    let error = delete("1").unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("clone.vhd"), "{error}");
    let reader = options(&vfs).read_only(true).open(clone).unwrap();
    let error = delete("0").unwrap_err();
    assert!(error.kind() == ErrorKind::InUse && error.to_string().contains("vm@1.vhd"), "{error}");
    drop(reader);
    // While one goes on there is no other, and nobody else gets the layer.
    let mut tried = false;
    delete_running(&disk, &name("0"), &mut |_| {
        if !std::mem::replace(&mut tried, true) {
            let error = delete("2").unwrap_err();
            assert!(error.kind() == ErrorKind::InUse && error.to_string().contains("merge"), "{error}");
            assert!(options(&vfs).read_only(true).open(clone).is_err());
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    must_hold(
        &options(&vfs).read_only(true),
        clone,
        &read(&options(&vfs).read_only(true), &layers[1]).unwrap(),
    )
    .unwrap();
    disk.close().unwrap();
    must_hold(&options(&vfs), Path::new("/vm.vhd"), &content).unwrap();
}
