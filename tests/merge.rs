//! Merging layers into the disk over them: no view changes, whatever a crash leaves.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/chain_ops.rs"]
#[allow(dead_code, reason = "shared with the other tests of chains")]
mod chain_ops;

use chain_ops::{Chain, SIZE, must_be_sound, must_hold, options};
use cowvhd::ErrorKind;
use cowvhd::convert::Progress;
use cowvhd::sim::{Bounds, Fault, FaultPlan, FileSystem, Rng};
use cowvhd::snapshot::{SnapshotName, merge, merge_running};
use cowvhd::vfs::Vfs;
use std::ops::ControlFlow;
use std::path::Path;

#[test]
fn merging_keeps_what_the_disk_shows_at_every_step() {
    let states: u64 = (0..40)
        .map(|seed| {
            let bounds = Bounds::sample(if seed < 4 { 20 } else { 4 });
            chain_ops::merged(seed, &bounds).unwrap_or_else(|error| panic!("seed {seed}: {error}"))
        })
        .sum();
    println!("{states} distinct states: no violation");
}

#[test]
fn merging_into_a_running_disk_beside_its_guest() {
    let states: u64 = (0..24)
        .map(|seed| {
            let bounds = Bounds::sample(if seed < 4 { 16 } else { 3 });
            chain_ops::merged_running(seed, &bounds).unwrap_or_else(|error| panic!("seed {seed}: {error}"))
        })
        .sum();
    println!("{states} distinct states: no violation");
}

/// Any one operation, and all from it on, lack space: nothing is lost, and with space the merge comes to its end.
#[test]
fn a_lack_of_space_loses_nothing() {
    let go_on = || |_| ControlFlow::Continue(());
    for seed in 0..6 {
        for count in [1, u64::MAX] {
            for number in (0..).step_by(3) {
                let Chain { vfs, layers, content } = Chain::random(seed, 4);
                let disk = Path::new("/vm.vhd");
                let until = layers[0].clone();
                vfs.set_faults(FaultPlan::new(Fault::Error(28), number, count));
                let result = merge(&options(&vfs), disk, Some(&until), &mut go_on());
                let injected = vfs.injected_faults();
                vfs.set_faults(FaultPlan::default());
                must_hold(&options(&vfs).read_only(true), disk, &content)
                    .unwrap_or_else(|error| panic!("seed {seed}, operation {number}: {error}"));
                if let Err(error) = &result {
                    let text = error.to_string();
                    let expected = [ErrorKind::NoSpace, ErrorKind::Poisoned];
                    assert!(expected.contains(&error.kind()), "operation {number}: {text}");
                }
                merge(&options(&vfs), disk, Some(&until), &mut go_on()).unwrap();
                layers[1..layers.len() - 1].iter().for_each(|layer| vfs.remove(layer).unwrap());
                must_hold(&options(&vfs).read_only(true), disk, &content).unwrap();
                // A journal entry that could not be written stops the disk, and leaves its mark.
                if !options(&vfs)
                    .read_only(true)
                    .open(disk)
                    .unwrap()
                    .notices()
                    .join("")
                    .contains("a sync failed")
                {
                    must_be_sound(&vfs, disk).unwrap();
                }
                if injected == 0 {
                    break;
                }
            }
        }
    }
}

/// Where the file system says that it has too little space, nothing is copied.
#[test]
fn space_is_looked_at_first() {
    let (disk, mut refused) = (Path::new("/vm.vhd"), 0);
    for seed in 0..20 {
        let Chain { vfs, layers, content } = Chain::random(seed, 4);
        let says = |bytes| {
            vfs.set_kind(FileSystem { available_bytes: Some(bytes), ..FileSystem::default() });
        };
        says(4096);
        let mut copied = 0;
        let mut watch = |progress: Progress| {
            copied += progress.copied;
            ControlFlow::Continue(())
        };
        if let Err(error) = merge(&options(&vfs), disk, None, &mut watch) {
            let said = error.to_string();
            assert!(error.kind() == ErrorKind::NoSpace && said.contains("nothing was changed"), "{said}");
            let running = options(&vfs).open(disk).unwrap();
            let error = merge_running(&running, None, &mut watch).unwrap_err();
            assert_eq!((error.kind(), copied), (ErrorKind::NoSpace, 0), "{error}");
            running.close().unwrap();
            refused += 1;
            // All that a disk can take.
            says(SIZE + 64 * 4096);
            merge(&options(&vfs), disk, None, &mut |_| ControlFlow::Continue(())).unwrap();
        }
        layers[..layers.len() - 1].iter().for_each(|layer| vfs.remove(layer).unwrap());
        must_hold(&options(&vfs), disk, &content).unwrap();
    }
    assert!(refused > 10, "{refused}");
}

/// A merge that is stopped anywhere goes on.
#[test]
fn a_stopped_merge_goes_on() {
    for seed in 0..20 {
        let chain = Chain::random(seed, 5);
        let disk = chain.disk();
        let mut calls = 0;
        for stop_after in 0.. {
            calls = 0;
            let result = merge(&options(&chain.vfs), disk, None, &mut |_| {
                calls += 1;
                if calls > stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            match result {
                Ok(_) => break,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Cancelled);
                    assert!(error.to_string().contains("goes on where it was"), "{error}");
                    must_hold(&options(&chain.vfs).read_only(true), disk, &chain.content).unwrap();
                }
            }
        }
        assert!(calls > 0);
        chain.parents().iter().for_each(|(layer, _)| chain.vfs.remove(layer).unwrap());
        must_hold(&options(&chain.vfs).read_only(true), disk, &chain.content).unwrap();
        let error = merge(&options(&chain.vfs), disk, None, &mut |_| ControlFlow::Continue(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
}

/// A running disk that has taken over all layers is a disk of its own: it goes on, gets snapshots, and merges those, too. A snapshot
/// ends a merge.
#[test]
fn a_running_disk_does_without_parents() {
    for seed in 0..20 {
        let Chain { vfs, layers, mut content } = Chain::random(seed, 4);
        let mut rng = Rng::new(seed);
        let path = Path::new("/vm.vhd");
        let disk = options(&vfs).open(path).unwrap();
        for round in 0..3 {
            let mut calls = 0;
            let stopped = merge_running(&disk, None, &mut |_| {
                calls += 1;
                if calls == 2 {
                    disk.snapshot(&SnapshotName::new(&format!("s{round}")).unwrap()).unwrap();
                }
                ControlFlow::Continue(())
            });
            if let Err(error) = stopped {
                let said = error.to_string();
                assert!(
                    error.kind() == ErrorKind::Unsupported && said.contains("a snapshot was taken"),
                    "{said}"
                );
            }
            merge_running(&disk, None, &mut |_| {
                chain_ops::change(&disk, &mut content, &mut rng, 1);
                ControlFlow::Continue(())
            })
            .unwrap();
            let error = merge_running(&disk, None, &mut |_| ControlFlow::Continue(())).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
            for layer in vfs.paths().into_iter().filter(|layer| layer != path) {
                vfs.remove(&layer).unwrap();
            }
            chain_ops::change(&disk, &mut content, &mut rng, 8);
            let mut found = vec![0; content.len()];
            disk.read_at(&mut found, 0).unwrap();
            assert!(found == content, "seed {seed}, round {round}, {} layers", layers.len());
            disk.snapshot(&SnapshotName::new(&format!("t{round}")).unwrap()).unwrap();
            chain_ops::change(&disk, &mut content, &mut rng, 8);
        }
        disk.flush().unwrap();
        disk.close().unwrap();
        must_hold(&options(&vfs), path, &content).unwrap();
        must_be_sound(&vfs, path).unwrap();
    }
}
