//! Deleting snapshots: nothing that anybody sees changes, whatever a crash leaves; what others need stays.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/chain_ops.rs"]
#[allow(dead_code, reason = "shared with the other tests of chains")]
mod chain_ops;
#[path = "support/failing.rs"]
mod failing;

use chain_ops::{Chain, create, must_hold, options, read};
use cowvhd::ErrorKind;
use cowvhd::sim::{Bounds, Fault, FaultPlan, SimVfs};
use cowvhd::snapshot::{SnapshotName, clone_to, delete, delete_running};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

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

/// Runs `outer`, and `inner` in the middle of its operation `step`; whether it has so many.
fn in_the_middle(
    vfs: &SimVfs,
    step: u64,
    inner: impl FnOnce() + Send + 'static,
    outer: impl FnOnce(),
) -> bool {
    let (operations, inner) = (AtomicU64::new(0), Arc::new(Mutex::new(Some(inner))));
    let waits = Arc::clone(&inner);
    vfs.set_hook(Some(Box::new(move |_| {
        if operations.fetch_add(1, Ordering::SeqCst) == step {
            let inner = inner.lock().unwrap().take();
            inner.into_iter().for_each(|inner| inner());
        }
    })));
    outer();
    vfs.set_hook(None);
    waits.lock().unwrap().is_none()
}

/// Somebody clones a snapshot in the middle of its deletion, or deletes it in the middle of the cloning: one of the two is refused.
#[test]
fn a_clone_beside_a_deletion_keeps_its_parent() {
    let (disk, snapshot, clone) = (Path::new("/vm.vhd"), Path::new("/vm@1.vhd"), Path::new("/clones/a.vhd"));
    let mut refused = [0; 2];
    for cloning_is_inside in [true, false] {
        for step in 0.. {
            let Chain { vfs, content, .. } = five_layers();
            let shown = read(&options(&vfs).read_only(true), snapshot).unwrap();
            let options = options(&vfs).allow_parents_in(Path::new("/"));
            let (deleting, cloning) = (options.clone(), options.clone());
            let delete =
                move || drop(delete(&deleting, disk, &name("1"), &mut |_| ControlFlow::Continue(())));
            let make_clone = move || drop(clone_to(&cloning, snapshot, clone));
            let goes_on = match cloning_is_inside {
                true => in_the_middle(&vfs, step, make_clone, delete),
                false => in_the_middle(&vfs, step, delete, make_clone),
            };
            let there = [snapshot, clone].map(|path| vfs.content(path).is_some());
            if there[1] {
                must_hold(&options.clone().read_only(true), clone, &shown)
                    .unwrap_or_else(|error| panic!("step {step}, inside {cloning_is_inside}: {error}"));
            }
            must_hold(&options, disk, &content).unwrap();
            refused[usize::from(there[0])] += 1;
            if !goes_on {
                break;
            }
        }
    }
    assert!(refused.iter().all(|&refused| refused > 10), "{refused:?}");
}

/// Somebody starts to read a snapshot in the middle of its deletion. If it stays for that, the layer beneath it does, too.
#[test]
fn a_snapshot_that_stays_keeps_its_parent() {
    let (disk, snapshot) = (Path::new("/vm.vhd"), Path::new("/vm@1.vhd"));
    let mut stayed = 0;
    for step in 0.. {
        let Chain { vfs, content, .. } = five_layers();
        let reading = options(&vfs).read_only(true);
        let shown = read(&reading, snapshot).unwrap();
        let delete = |number| {
            delete(&options(&vfs), disk, &name(number), &mut |_| ControlFlow::Continue(())).map(drop)
        };
        let reader = Arc::new(Mutex::new(None));
        let (opened, options_of_reader) = (Arc::clone(&reader), reading.clone());
        let open = move || *opened.lock().unwrap() = options_of_reader.open(snapshot).ok();
        let mut deleted = Ok(());
        let goes_on = in_the_middle(&vfs, step, open, || deleted = delete("1"));
        drop(reader.lock().unwrap().take());
        if let Err(error) = deleted {
            assert_eq!(error.kind(), ErrorKind::InUse, "step {step}: {error}");
            stayed += 1;
            let _ = delete("0");
            must_hold(&reading, snapshot, &shown).unwrap_or_else(|error| panic!("step {step}: {error}"));
            delete("1").unwrap();
        }
        must_hold(&options(&vfs), disk, &content).unwrap();
        if !goes_on {
            break;
        }
    }
    assert!(stayed > 10, "{stayed}");
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

/// Over more parents than are asked one by one, one of which is open for writing while it takes over what is beneath it: each block
/// is found where it is, also when the guest touches it for the first time, and the last one, which the end of the disk cuts.
#[test]
fn a_guest_reads_through_many_layers_while_one_of_them_takes_over_another() {
    const BLOCK: u64 = 16 << 10;
    const SIZE: u64 = 40 * BLOCK - 1024;
    let vfs = SimVfs::new(12);
    let shared = || Arc::new(vfs.clone());
    let path = Path::new("/vm.vhd");
    let name = |round: u64| SnapshotName::new(&format!("s{round}")).unwrap();
    cowvhd::CreateOptions::new(SIZE)
        .test_geometry(BLOCK as u32, 128 << 10)
        .vfs(shared())
        .create(path)
        .unwrap();
    let mut content = vec![0; SIZE as usize];
    let disk = options(&vfs).open(path).unwrap();
    for round in 0..12 {
        for block in [round, round + 12, 39] {
            let at = block * BLOCK + round * 512;
            let end = (at + 6000).min(SIZE) / 512 * 512;
            content[at as usize..end as usize].fill(round as u8 + 1);
            disk.write_at(&content[at as usize..end as usize], at).unwrap();
        }
        disk.snapshot(&name(round)).unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    for deleted in [10, 5, 0] {
        let disk = options(&vfs).open(path).unwrap();
        let mut next = 0;
        let mut asked = 0;
        let mut read_one = |disk: &cowvhd::Disk| {
            let range = next * BLOCK..((next + 1) * BLOCK).min(SIZE);
            let mut found = vec![0xee; (range.end - range.start) as usize];
            disk.read_at(&mut found, range.start).unwrap();
            assert!(found == content[range.start as usize..range.end as usize], "s{deleted}, block {next}");
            next = (next + 1) % 40;
        };
        delete_running(&disk, &name(deleted), &mut |_| {
            asked += 1;
            (0..8).for_each(|_| read_one(&disk));
            ControlFlow::Continue(())
        })
        .unwrap();
        (0..40).for_each(|_| read_one(&disk));
        assert!(asked > 0);
        disk.close().unwrap();
    }
}
