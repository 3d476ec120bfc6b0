//! Deleting snapshots: nothing that anybody sees changes, whatever a crash leaves; what others need stays.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/chain_ops.rs"]
#[allow(dead_code, reason = "shared with the other tests of chains")]
mod chain_ops;

use chain_ops::{Chain, create, must_hold, options, read};
use cowvhd::ErrorKind;
use cowvhd::sim::{Bounds, Fault, FaultPlan};
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

/// Any operation, or all from it on, lack space, while a snapshot is taken of a running disk, and one is deleted there and of the closed
/// disk: nothing is lost, and with space all comes to its end.
#[test]
fn a_lack_of_space_loses_nothing() {
    let disk_path = Path::new("/vm.vhd");
    let go_on = || |_| ControlFlow::Continue(());
    let mut lacked = [0; 3];
    for (round, count) in [1, u64::MAX, 1, u64::MAX, 1, u64::MAX].into_iter().enumerate() {
        for number in (round as u64 % 3..).step_by(5) {
            let Chain { vfs, layers, content } = five_layers();
            let victim = layers[(round + number as usize) % 4].clone();
            let names = [name("new"), name(&((round + number as usize) % 4).to_string())];
            let kept: Vec<_> = layers[..4].iter().filter(|path| **path != victim).collect();
            let shown = |vfs: &_| -> Vec<Vec<u8>> {
                kept.iter().map(|path| read(&options(vfs).read_only(true), path).unwrap()).collect()
            };
            let before = shown(&vfs);
            let kind = round / 2;
            let disk = (kind < 2).then(|| options(&vfs).open(disk_path).unwrap());
            vfs.set_faults(FaultPlan::new(Fault::Error(28), number, count));
            let result = match (&disk, kind) {
                (Some(disk), 0) => disk.snapshot(&names[0]).map(drop),
                (Some(disk), _) => delete_running(disk, &names[1], &mut go_on()).map(drop),
                (None, _) => delete(&options(&vfs), disk_path, &names[1], &mut go_on()).map(drop),
            };
            let injected = vfs.injected_faults();
            vfs.set_faults(FaultPlan::default());
            if let Err(error) = &result {
                let expected = [ErrorKind::NoSpace, ErrorKind::Poisoned];
                assert!(expected.contains(&error.kind()), "round {round}, operation {number}: {error}");
                lacked[kind] += 1;
            }
            if let Some(disk) = disk {
                // One that did not stop goes on.
                let mut found = vec![0; content.len()];
                disk.read_at(&mut found, 0).unwrap();
                assert!(found == content, "round {round}, operation {number}");
                if disk.flush().is_ok() {
                    disk.close().unwrap();
                }
            }
            must_hold(&options(&vfs), disk_path, &content)
                .unwrap_or_else(|error| panic!("round {round}, operation {number}: {error}"));
            if kind > 0 {
                match delete(&options(&vfs), disk_path, &names[1], &mut go_on()) {
                    Ok(_) => {}
                    Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "{error}"),
                }
                assert!(vfs.content(&victim).is_none());
            }
            assert!(shown(&vfs) == before, "round {round}, operation {number}");
            must_hold(&options(&vfs), disk_path, &content).unwrap();
            if injected == 0 {
                break;
            }
        }
    }
    assert!(lacked.iter().all(|&lacked| lacked > 10), "{lacked:?}");
}
