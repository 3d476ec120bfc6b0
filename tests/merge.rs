//! Merging layers into the disk over them: no view changes, whatever a crash leaves.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/chain_ops.rs"]
#[allow(dead_code, reason = "shared with the other tests of chains")]
mod chain_ops;
#[path = "support/crash.rs"]
#[allow(dead_code, reason = "shared with the tests of crashes")]
mod crash;
#[path = "support/failing.rs"]
mod failing;
#[path = "support/sharing_file_systems.rs"]
mod sharing_file_systems;
#[path = "support/strict_vhd.rs"]
mod strict_vhd;

use chain_ops::{Chain, SIZE, must_be_sound, must_hold, options};
use cowvhd::convert::Progress;
use cowvhd::sim::{Bounds, Fault, FaultPlan, FileSystem, History, Operation, Rng, SimVfs};
use cowvhd::snapshot::{SnapshotName, merge, merge_running};
use cowvhd::vfs::{Access, HostVfs, Vfs};
use cowvhd::{CreateOptions, ErrorKind, OpenOptions, upgrade};
use crash::{FOREIGN_CHILD, PACKED, PARENT_PATH, PATH, Shape, check_content, read_hot};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
            vfs.set_kind(FileSystem {
                available_bytes: Some(bytes),
                no_clones: true,
                ..FileSystem::default()
            });
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

/// Which parent a disk has that was killed after a merge, its journal says. An opening that fails to read that once does not take it for
/// the old one, which may be removed.
#[test]
fn a_failed_read_does_not_bring_the_old_parent_back() {
    let vfs = SimVfs::new(1);
    let [root, layer, path] = ["/vm@0.vhd", "/vm@1.vhd", "/vm.vhd"].map(Path::new);
    let (mut content, mut rng) = (vec![0; SIZE as usize], Rng::new(1));
    for (path, parent) in [(root, None), (layer, Some(root)), (path, Some(layer))] {
        chain_ops::create(&vfs, path, parent);
        chain_ops::change_closed(&vfs, path, &mut content, &mut rng, 4);
    }
    let disk = options(&vfs).open(path).unwrap();
    merge_running(&disk, Some(root), &mut |_| ControlFlow::Continue(())).unwrap();
    drop(disk);
    let mut states = Vec::new();
    vfs.crash_now().for_each_state(1, &Bounds::sample(2), |state| {
        states.push(state);
        true
    });
    for state in &states {
        for read in 0.. {
            let vfs = state.to_vfs(read);
            vfs.set_faults(FaultPlan::new(Fault::Error(5), read, 1).only(Operation::Read));
            let opened = options(&vfs).open(path);
            let met = vfs.injected_faults() > 0;
            vfs.set_faults(FaultPlan::default());
            drop(opened);
            vfs.remove(layer).unwrap();
            must_hold(&options(&vfs), path, &content)
                .unwrap_or_else(|error| panic!("{}, read {read}: {error}", state.fates()));
            if !met {
                break;
            }
        }
    }
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

/// What stands in whole pages shares their space, where files can, in pieces of a thirty-second of a block or more.
#[test]
fn a_disk_shares_the_space_of_what_it_takes_over() {
    const BLOCK: u64 = 256 << 10;
    let go_on = &mut |_: Progress| ControlFlow::Continue(());
    for no_clones in [false, true] {
        let vfs = SimVfs::new(1);
        vfs.set_kind(FileSystem { no_clones, ..FileSystem::default() });
        let [below, top] = ["/vm@a.vhd", "/vm.vhd"].map(Path::new);
        let made = |create: CreateOptions, path| {
            let create = create.test_geometry(BLOCK as u32, 128 << 10).vfs(Arc::new(vfs.clone()));
            create.create(path).unwrap();
            options(&vfs).open(path).unwrap()
        };
        let mut content = vec![0; 4 * BLOCK as usize];
        let mut write = |disk: &cowvhd::Disk, offset: u64, length: usize, value: u8| {
            content[offset as usize..][..length].fill(value);
            disk.write_at(&content[offset as usize..][..length], offset).unwrap();
        };
        let disk = made(CreateOptions::new(4 * BLOCK), below);
        // A whole block; pieces that are long enough, and too short.
        write(&disk, 0, BLOCK as usize, 1);
        write(&disk, BLOCK, 8 << 10, 2);
        write(&disk, BLOCK + (16 << 10), 4 << 10, 3);
        write(&disk, 2 * BLOCK + (100 << 10), 4 << 10, 4);
        disk.close().unwrap();
        let disk = made(CreateOptions::child_of(below), top);
        write(&disk, 512, 512, 5);
        disk.close().unwrap();
        let before = vfs.counts();
        merge(&options(&vfs), top, None, go_on).unwrap();
        let shares = vfs.counts().shares - before.shares;
        // Of the first block what the disk lacks; of the second 8 KiB, and the holes on both sides of the 4 KiB; of the third the holes.
        assert_eq!(shares, if no_clones { 0 } else { 1 + 3 + 2 });
        vfs.remove(below).unwrap();
        must_hold(&options(&vfs), top, &content).unwrap();
    }
}

/// The disk that takes over was made by another program, with sectors of its own in units that it does not have, and with blocks that
/// are not on pages.
#[test]
fn sectors_of_its_own_are_not_shared_away() {
    let packed = Shape { child: true, ..PACKED };
    let mut shares = 0;
    for seed in 0..40 {
        for shape in [FOREIGN_CHILD, packed] {
            let vfs = SimVfs::new(seed);
            let mut history = History::default();
            crash::create(&vfs, shape, seed, &mut history);
            upgrade(Arc::new(vfs.clone()), Path::new(PATH)).unwrap();
            let before = vfs.counts().shares;
            merge(&options(&vfs), Path::new(PATH), None, &mut |_| ControlFlow::Continue(())).unwrap();
            shares += vfs.counts().shares - before;
            vfs.remove(Path::new(PARENT_PATH)).unwrap();
            let disk = options(&vfs).open(Path::new(PATH)).unwrap();
            let parts = read_hot(&disk, shape).unwrap();
            check_content(&history, u64::MAX, &parts, false)
                .unwrap_or_else(|what| panic!("seed {seed}: {what}"));
            disk.close().unwrap();
        }
    }
    assert!(shares > 20, "{shares}");
}

/// What is shared needs no space: a file system that has less left than the data takes is enough, and one byte less than what is copied is
/// not.
#[test]
fn space_is_needed_for_what_is_copied_alone() {
    const BLOCK: u64 = 256 << 10;
    let vfs = SimVfs::new(1);
    let [below, top] = ["/vm@a.vhd", "/vm.vhd"].map(Path::new);
    for (path, create) in [(below, CreateOptions::new(4 * BLOCK)), (top, CreateOptions::child_of(below))] {
        let create = create.test_geometry(BLOCK as u32, 128 << 10).vfs(Arc::new(vfs.clone()));
        create.create(path).unwrap();
        let disk = options(&vfs).open(path).unwrap();
        if path == below {
            // All of a block, and a sector of another one.
            disk.write_at(&[1; BLOCK as usize], 0).unwrap();
            disk.write_at(&[2; 512], 2 * BLOCK).unwrap();
        }
        disk.close().unwrap();
    }
    let merged = |available, no_clones| {
        vfs.set_kind(FileSystem { available_bytes: Some(available), no_clones, ..FileSystem::default() });
        merge(&options(&vfs), top, None, &mut |_| ControlFlow::Continue(()))
            .map_err(|error| (error.kind(), error.to_string()))
    };
    // The sector is a unit, and each block has a page.
    let (copied, all) = (4096 + 2 * 4096, BLOCK + 4096 + 2 * 4096);
    let (kind, said) = merged(all - 1, true).unwrap_err();
    assert!(kind == ErrorKind::NoSpace && said.contains(&format!("up to {all} bytes")), "{said}");
    let (kind, said) = merged(copied - 1, false).unwrap_err();
    assert!(kind == ErrorKind::NoSpace && said.contains(&format!("up to {copied} bytes")), "{said}");
    merged(copied, false).unwrap();
}

/// Whatever fails, the disk shows what it did; only a lack of space or of the ability is made up for by a copy.
#[test]
fn a_share_that_fails_is_an_error() {
    const EIO: i32 = 5;
    let go_on = || |_| ControlFlow::Continue(());
    let mut failed = 0;
    for seed in (0..12).step_by(2) {
        for number in 0.. {
            let Chain { vfs, content, .. } = Chain::random(seed, 4);
            let disk = Path::new("/vm.vhd");
            vfs.set_faults(FaultPlan::new(Fault::Error(EIO), number, 1).only(Operation::Write));
            let result = merge(&options(&vfs), disk, None, &mut go_on());
            let injected = vfs.injected_faults();
            vfs.set_faults(FaultPlan::default());
            if let Err(error) = &result {
                failed += u64::from(error.to_string().contains("sharing"));
                assert_eq!(error.kind(), ErrorKind::Io, "{error}");
            } else {
                assert_eq!(injected, 0, "seed {seed}, write {number}: swallowed");
            }
            must_hold(&options(&vfs).read_only(true), disk, &content).unwrap();
            if injected == 0 {
                break;
            }
        }
    }
    assert!(failed > 0);
}

/// Real file systems that share space: a merge takes next to none, and begins where there is not enough for a copy. To run it, as root:
/// `cargo test --features sim --test merge -- --ignored --nocapture`.
#[test]
#[ignore = "needs root, btrfs-progs and xfsprogs"]
fn file_systems_that_share_space() {
    const MIB: u64 = 1 << 20;
    let names = [("closed.vhd", false, false), ("running.vhd", true, false), ("direct.vhd", true, true)];
    sharing_file_systems::on_each(400 * MIB, |kind, folder| {
        for (name, running, direct) in names {
            let path = |layer: &str| folder.join(format!("{layer}-{name}"));
            let mut content = vec![0; 512 * MIB as usize];
            let mut make =
                |create: CreateOptions, layer: &str, pieces: &mut dyn Iterator<Item = (u64, u64)>| {
                    create.create(&path(layer)).unwrap();
                    let disk = OpenOptions::new().open(&path(layer)).unwrap();
                    for (offset, length) in pieces {
                        let piece = &mut content[offset as usize..][..length as usize];
                        (offset..).zip(piece.iter_mut()).for_each(|(at, byte)| *byte = (at % 251) as u8 + 1);
                        piece[0] = layer.len() as u8;
                        disk.write_at(piece, offset).unwrap();
                    }
                    disk.close().unwrap();
                };
            make(CreateOptions::new(512 * MIB), "base", &mut [(3 * MIB, 192 * MIB)].into_iter());
            let scattered = &mut (0..512).map(|n| ((n * 389 % 4096) * (128 << 10), 64 << 10));
            make(CreateOptions::child_of(&path("base")), "middle", scattered);
            make(CreateOptions::child_of(&path("middle")), "disk", &mut [(8 * MIB + 512, 512)].into_iter());
            let free = || {
                assert!(Command::new("sync").arg("-f").arg(folder).status().unwrap().success());
                HostVfs.open(&path("base"), Access::ReadOnly).unwrap().available_bytes().unwrap().unwrap()
            };
            let (before, mut took) = (free(), Duration::ZERO);
            assert!(before < 224 * MIB, "{kind}: there is space for a copy: {before}");
            let mut go_on = |_: Progress| ControlFlow::Continue(());
            let options = OpenOptions::new().direct(direct);
            let merged = match running {
                false => {
                    let since = Instant::now();
                    let merged = merge(&options, &path("disk"), None, &mut go_on).unwrap();
                    took += since.elapsed();
                    merged
                }
                true => {
                    let disk = options.open(&path("disk")).unwrap();
                    let since = Instant::now();
                    let merged = merge_running(&disk, None, &mut go_on).unwrap();
                    took += since.elapsed();
                    let mut found = vec![0; content.len()];
                    disk.read_at(&mut found, 0).unwrap();
                    assert!(found == content, "{kind}: {name}");
                    disk.close().unwrap();
                    merged
                }
            };
            let space = before.saturating_sub(free());
            let extents = Command::new("filefrag").arg("-v").arg(path("disk")).output().unwrap();
            let extents = String::from_utf8_lossy(&extents.stdout).into_owned();
            let shared = extents.lines().filter(|line| line.contains("shared")).count();
            println!(
                "{kind}, {name}: {} bytes taken over in {took:?}, {space} bytes of space, {shared} shared extents",
                merged.copied
            );
            assert!(merged.copied > 200 * MIB && space < 8 * MIB && shared > 0, "{kind}, {name}: {extents}");
            for layer in ["middle", "base"] {
                std::fs::remove_file(path(layer)).unwrap();
            }
            let disk = OpenOptions::new().open(&path("disk")).unwrap();
            let mut found = vec![0; content.len()];
            disk.read_at(&mut found, 0).unwrap();
            assert!(found == content, "{kind}: {name}");
            disk.close().unwrap();
            std::fs::remove_file(path("disk")).unwrap();
        }
    });
}
