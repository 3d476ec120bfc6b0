//! Snapshots of a simulated disk, with writes in the middle of them: the power is cut, the process killed or an operation fails at
//! every step. Afterwards the disk opens with all that was flushed, and each snapshot is there whole or not at all.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/failing.rs"]
mod failing;
#[path = "support/snapshots.rs"]
mod support;

use cowvhd::check::{Code, Consent, check, plan, repair};
use cowvhd::sim::{Bounds, Fault, FaultPlan, FileSystem, SimVfs};
use cowvhd::snapshot::{self, SnapshotName};
use cowvhd::vfs::Vfs;
use cowvhd::{CreateOptions, ErrorKind, OpenOptions};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use support::{
    LEAF, Root, Story, cut_anywhere, fail_recovery, judge, kill_anywhere, options, sample, stages,
};

#[test]
fn a_power_cut_at_any_step() {
    let states = stages().map(|stage| cut_anywhere(stage, bound(10)).unwrap()).sum::<u64>();
    println!("{states} distinct states: no violation");
    assert!(states > 300, "{states}");
}

#[test]
fn a_kill_at_any_step_and_a_power_cut_later() {
    let kills = stages().map(|stage| kill_anywhere(stage, bound(4)).unwrap()).sum::<u64>();
    println!("{kills} kills: no violation");
    assert!(kills > 100, "{kills}");
}

/// How many states are made of a crash point; more with `COWVHD_SNAPSHOT_STATES`, a factor.
fn bound(states: usize) -> usize {
    let factor = std::env::var("COWVHD_SNAPSHOT_STATES").ok().and_then(|factor| factor.parse().ok());
    states * factor.unwrap_or(1usize)
}

/// An operation fails: the disk goes on as it was or is stopped, and what was flushed is there.
#[test]
fn a_failure_at_any_step() {
    for (root, kind) in stages() {
        for errno in [5, 28] {
            for step in 0.. {
                let mut story = Story::new(1, root, kind);
                story.write_some(3);
                story.flush();
                story.vfs.set_faults(FaultPlan::new(Fault::Error(errno), step, 1));
                story.snapshot("s1", 0);
                let injected = story.vfs.injected_faults() > 0;
                story.vfs.set_faults(FaultPlan::default());
                story.write_some(1);
                story.try_flush();
                let point = story.vfs.crash_now();
                point.for_each_state(step, &sample(root, bound(3)), |state| {
                    judge(&story, &state, point.clock(), 0).unwrap_or_else(|what| {
                        panic!("{root:?}, {kind:?}, {errno} at {step}, {}: {what}", state.fates())
                    });
                    true
                });
                if !injected {
                    break;
                }
            }
        }
    }
}

/// An opening that finds half a snapshot fails at any step; the next one finishes it or takes it back.
#[test]
fn a_failure_at_any_step_of_a_recovery() {
    let failed = stages().map(|stage| fail_recovery(stage, 7).unwrap()).sum::<u64>();
    println!("{failed} failures in an opening: no violation");
    assert!(failed > 300, "{failed}");
}

/// The snapshot that a disk stands on has lost the registry of its children: a revert to another one said so when it was done.
#[test]
fn a_revert_is_refused_before_it_is_done() {
    let mut story = Story::new(1, Root::Dynamic, FileSystem::default());
    for name in ["s1", "s2"] {
        story.write_some(3);
        story.snapshot(name, 0);
    }
    story.write_some(2);
    story.close();
    let (vfs, content) = (story.vfs.clone(), story.content());
    let (leaf, standing) = (Path::new(LEAF), Path::new("/vm@s2.vhd"));
    for copy in [65536, 163_840] {
        vfs.corrupt(standing, copy, &[0xff; 64]);
    }
    let files =
        |vfs: &SimVfs| -> Vec<_> { vfs.paths().into_iter().map(|path| vfs.content_hash(&path)).collect() };
    let before = files(&vfs);
    let revert = || snapshot::revert(&options(&vfs), leaf, &SnapshotName::new("s1").unwrap());
    let error = revert().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains("vm@s2.vhd: neither copy of the registry"), "{error}");
    assert!(files(&vfs) == before);
    let shows = || {
        let disk = options(&vfs).read_only(true).open(leaf).unwrap();
        let mut found = vec![0xee; disk.size() as usize];
        disk.read_at(&mut found, 0).unwrap();
        found
    };
    assert!(shows() == content);
    let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
    assert!(repair(shared, standing, Consent::All, Path::new("/undo")).unwrap().is_sound());
    revert().unwrap();
    assert!(shows() != content);
}

/// What a sealed image says to those who want to write to it, and what stays as it was.
#[test]
fn a_sealed_image_is_not_written_to() {
    let mut story = Story::new(1, Root::Dynamic, FileSystem::default());
    story.write_some(3);
    story.snapshot("s1", 0);
    story.close();
    let vfs = story.vfs.clone();
    let snapshot = Path::new("/vm@s1.vhd");
    let before = vfs.content_hash(snapshot);
    let options = || OpenOptions::new().vfs(Arc::new(vfs.clone()));
    let error = options().open(snapshot).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Sealed);
    assert!(error.to_string().contains("\"s1\"") && error.to_string().contains("cowvhd clone"), "{error}");
    options().read_only(true).open(snapshot).unwrap().close().unwrap();
    assert_eq!(vfs.content_hash(snapshot), before);
    let disk = options().open(Path::new(LEAF)).unwrap();
    let exists = disk.snapshot(&SnapshotName::new("s1").unwrap()).unwrap_err();
    assert_eq!(exists.kind(), ErrorKind::Exists);
    disk.write_at(&[1; 512], 0).unwrap();
    disk.close().unwrap();
    assert_eq!(vfs.content_hash(snapshot), before);
}

/// A parent that got a child is sealed, in its place; the child notes its seal, and it the child.
#[test]
fn the_parent_of_a_new_image_is_sealed() {
    let vfs = SimVfs::new(3);
    let shared = || Arc::new(vfs.clone());
    let [parent, child] = ["/base.vhd", "/child.vhd"].map(Path::new);
    CreateOptions::new(1 << 20).test_geometry(16 << 10, 128 << 10).vfs(shared()).create(parent).unwrap();
    let disk = OpenOptions::new().vfs(shared()).open(parent).unwrap();
    disk.write_at(&[7; 4096], 0).unwrap();
    let create = || CreateOptions::child_of(parent).vfs(shared()).create(child);
    assert_eq!(create().unwrap_err().kind(), ErrorKind::InUse, "it is open");
    disk.close().unwrap();
    drop(disk);
    create().unwrap();
    assert_eq!(OpenOptions::new().vfs(shared()).open(parent).unwrap_err().kind(), ErrorKind::Sealed);
    assert_eq!(create().unwrap_err().kind(), ErrorKind::Exists);
    CreateOptions::child_of(parent).vfs(shared()).create(Path::new("/second.vhd")).unwrap();
    let content = vfs.content(parent).unwrap();
    let names = ["child.vhd", "second.vhd"]
        .map(|name| content.windows(name.len()).filter(|w| *w == name.as_bytes()).count());
    assert_eq!(names, [2, 2], "both copies of the registry");
    let disk = OpenOptions::new().vfs(shared()).open(child).unwrap();
    let mut buf = [0; 4096];
    disk.read_at(&mut buf, 0).unwrap();
    assert_eq!(buf, [7; 4096]);
    drop(disk);
    // Another state of the parent: its seal is gone.
    let unsealed = [0; 16];
    for superblock in [4096, 8192] {
        let mut bytes = vfs.content(parent).unwrap()[superblock..superblock + 4092].to_vec();
        bytes[176..192].copy_from_slice(&unsealed);
        let crc = crc32fast::hash(&bytes).to_be_bytes();
        vfs.corrupt(parent, superblock as u64, &[&bytes[..], &crc].concat());
    }
    let error = OpenOptions::new().vfs(shared()).open(child).unwrap_err();
    assert!(error.to_string().contains("not sealed any more"), "{error}");
}

/// Going back to a snapshot, cut anywhere: the disk is as it was, or as it was then.
#[test]
fn a_revert_is_whole_or_not_at_all() {
    for (root, kind) in stages() {
        let mut story = Story::new(4, root, kind);
        story.write_some(3);
        story.snapshot("s1", 0);
        let then = story.content();
        story.write_some(3);
        story.snapshot("s2", 0);
        story.write_some(2);
        let now = story.content();
        story.close();
        let name = SnapshotName::new("s1").unwrap();
        story.vfs.record(true);
        snapshot::revert(&options(&story.vfs), Path::new(LEAF), &name).unwrap();
        let returned = story.vfs.tick();
        let mut points = story.vfs.take_crash_points();
        points.push(story.vfs.crash_now());
        let (mut old, mut new) = (0, 0);
        for point in &points {
            point.for_each_state(1, &sample(root, bound(12)), |state| {
                let vfs = state.to_vfs(2);
                let disk = options(&vfs).open(Path::new(LEAF)).unwrap();
                let mut content = vec![0xee; now.len()];
                disk.read_at(&mut content, 0).unwrap();
                assert!(content == then || (content == now && point.clock() < returned), "{}", state.fates());
                if content == then {
                    new += 1
                } else {
                    old += 1
                }
                disk.close().unwrap();
                drop(disk);
                snapshot::revert(&options(&vfs), Path::new(LEAF), &name).unwrap();
                let disk = options(&vfs).open(Path::new(LEAF)).unwrap();
                disk.read_at(&mut content, 0).unwrap();
                assert!(content == then);
                let found = snapshot::list(&options(&vfs), Path::new(LEAF)).unwrap();
                let found: Vec<_> =
                    found.iter().map(|found| (found.name.as_str(), found.depth.is_some())).collect();
                assert_eq!(found, [("s1", true), ("s2", false)]);
                assert!(!vfs.paths().iter().any(|path| path.to_string_lossy().ends_with("~new")));
                true
            });
        }
        assert!(old > 0 && new > 0, "{old} states before, {new} after");
    }
}

/// A clone, cut anywhere, is there whole or not at all; where it is, its snapshot knows, so that it is not deleted under it.
#[test]
fn a_clone_is_whole_or_not_at_all_and_its_snapshot_knows_it() {
    let (snapshot_path, clone) = (Path::new("/vm@s1.vhd"), Path::new("/clone.vhd"));
    for (root, kind) in stages() {
        let mut story = Story::new(5, root, kind);
        story.write_some(4);
        story.snapshot("s1", 0);
        let then = story.content();
        story.write_some(3);
        let now = story.content();
        story.close();
        story.vfs.record(true);
        snapshot::clone_to(&options(&story.vfs), snapshot_path, clone).unwrap();
        let returned = story.vfs.tick();
        let mut points = story.vfs.take_crash_points();
        points.push(story.vfs.crash_now());
        let (mut without, mut with) = (0, 0);
        for point in &points {
            point.for_each_state(1, &sample(root, bound(12)), |state| {
                let vfs = state.to_vfs(2);
                let shows = |path: &Path, expected: &[u8]| {
                    let disk = options(&vfs).open(path).unwrap();
                    let mut content = vec![0xee; expected.len()];
                    disk.read_at(&mut content, 0).unwrap();
                    assert!(content == expected, "{}: {}", path.display(), state.fates());
                    disk.close().unwrap();
                };
                if state.has(clone) {
                    with += 1;
                } else {
                    assert!(point.clock() < returned, "the clone is gone: {}", state.fates());
                    without += 1;
                    snapshot::clone_to(&options(&vfs), snapshot_path, clone).unwrap();
                }
                shows(clone, &then);
                let name = SnapshotName::new("s1").unwrap();
                let go_on = &mut |_| ControlFlow::Continue(());
                let deleted = snapshot::delete(&options(&vfs), Path::new(LEAF), &name, go_on);
                match root {
                    Root::Dynamic => assert_eq!(deleted.unwrap_err().kind(), ErrorKind::Unsupported),
                    // It knows of nobody, and is never removed.
                    Root::Fixed => assert_eq!(deleted.unwrap().kept.unwrap(), snapshot_path),
                }
                shows(clone, &then);
                shows(Path::new(LEAF), &now);
                true
            });
        }
        assert!(without > 0 && with > 0, "{without} states without the clone, {with} with it");
    }
}

/// What a power cut during a snapshot leaves, at each of its steps.
fn cut_snapshots() -> Vec<SimVfs> {
    let vfs = SimVfs::new(9);
    let shared = || Arc::new(vfs.clone());
    CreateOptions::new(1 << 20)
        .test_geometry(16 << 10, 128 << 10)
        .vfs(shared())
        .create(Path::new(LEAF))
        .unwrap();
    let disk = OpenOptions::new().vfs(shared()).open(Path::new(LEAF)).unwrap();
    disk.write_at(&[7; 4096], 0).unwrap();
    disk.flush().unwrap();
    vfs.record(true);
    disk.snapshot(&SnapshotName::new("s1").unwrap()).unwrap();
    let mut left = Vec::new();
    for point in vfs.take_crash_points() {
        point.for_each_state(1, &Bounds::sample(2), |state| {
            left.push(state.to_vfs(state.hash));
            true
        });
    }
    left
}

/// A state has its manifest last: what there is of one whose snapshot is under way is part of that.
fn parts_of_a_state_belong_to_the_snapshot_under_way(vfs: &SimVfs, is_unfinished: bool) {
    let parts = ["/vm@s1+ram.vmstate", "/vm@s2+ram.vmstate"].map(Path::new);
    parts.iter().for_each(|part| drop(vfs.create_new(part).unwrap()));
    let report = check(Arc::new(vfs.clone()), Path::new(LEAF)).unwrap();
    parts.iter().for_each(|part| vfs.remove(part).unwrap());
    let of = |code| report.findings().iter().filter(move |found| found.code == code).map(|found| &found.what);
    let incomplete: Vec<_> = of(Code::StateIncomplete).collect();
    assert_eq!(incomplete.len(), if is_unfinished { 1 } else { 2 }, "{incomplete:?}");
    assert!(incomplete.last().unwrap().contains("vm@s2+ram.vmstate"), "{incomplete:?}");
    assert!(of(Code::SnapshotUnfinished).all(|what| what.contains("vm@s1+ram.vmstate")));
}

/// What a check finds of a snapshot that was cut, a repair does what an open would do about it, and says so.
#[test]
fn a_repair_finishes_a_snapshot_that_was_cut_or_takes_it_away() {
    let path = Path::new(LEAF);
    let (mut finished, mut undone) = (0, 0);
    for vfs in cut_snapshots() {
        let shared = || Arc::new(vfs.clone());
        let before = vfs.content_hash(path);
        let report = check(shared(), path).unwrap();
        let plan = plan(shared(), path, Consent::Safe).unwrap();
        assert_eq!(vfs.content_hash(path), before, "looking changed it");
        let what = "finish the snapshot that was cut, or take away what there is of it";
        let is_unfinished = report.count(Code::SnapshotUnfinished) > 0;
        assert_eq!(plan.steps.iter().any(|step| step.what == what && step.safe), is_unfinished);
        assert_eq!(plan.after.count(Code::SnapshotUnfinished), 0);
        parts_of_a_state_belong_to_the_snapshot_under_way(&vfs, is_unfinished);
        let done = repair(shared(), path, Consent::Safe, Path::new("/undo")).unwrap();
        assert_eq!(done.steps.iter().any(|step| step.what == what), is_unfinished, "{:?}", done.steps);
        assert_eq!(done.before.count(Code::SnapshotUnfinished) > 0, is_unfinished);
        let after = check(shared(), path).unwrap();
        assert!(after.is_sound() && after.count(Code::SnapshotUnfinished) == 0, "{:?}", after.findings());
        let has_snapshot = vfs.identity(Path::new("/vm@s1.vhd")).is_ok();
        finished += u32::from(is_unfinished && has_snapshot);
        undone += u32::from(is_unfinished && !has_snapshot);
        let disk = OpenOptions::new().vfs(shared()).open(path).unwrap();
        let mut found = [0; 4096];
        disk.read_at(&mut found, 0).unwrap();
        assert_eq!(found, [7; 4096]);
        disk.close().unwrap();
    }
    assert!(finished > 0 && undone > 0, "{finished} finished, {undone} undone");
}

/// The tree of a disk: what its registries say, what is missing, and where it may look.
#[test]
fn the_tree_that_a_disk_is_part_of() {
    let mut story = Story::new(1, Root::Dynamic, FileSystem::default());
    story.write_some(3);
    story.snapshot("s1", 0);
    story.close();
    let vfs = story.vfs.clone();
    let options = OpenOptions::new().vfs(Arc::new(vfs.clone()));
    let [snapshot, near, far] = ["/vm@s1.vhd", "/near.vhd", "/away/far.vhd"].map(Path::new);
    for clone in [near, far] {
        snapshot::clone_to(&options, snapshot, clone).unwrap();
    }
    let told = |options: &OpenOptions| -> Vec<(String, Option<usize>, bool, bool, String)> {
        let layers = snapshot::tree(options, Path::new(LEAF)).unwrap();
        let state = |state: &Result<snapshot::LayerState, String>| match state {
            Ok(state) => format!("{:?} {} {:?}", state.disk_type, state.sealed, state.snapshot),
            Err(why) => why.clone(),
        };
        let row = |layer: &snapshot::TreeLayer| {
            let path = layer.path.to_str().unwrap().to_owned();
            (path, layer.parent, layer.registered, layer.is_disk, state(&layer.state))
        };
        layers.iter().map(row).collect()
    };
    let child =
        |path: &str, is_disk| (path.to_owned(), Some(0), true, is_disk, "Differencing false None".to_owned());
    let root = ("/vm@s1.vhd".to_owned(), None, false, false, "Dynamic true Some(\"s1\")".to_owned());
    let expected = [root, child(LEAF, true), child("/near.vhd", false), child("/away/far.vhd", false)];
    let mut found = told(&options);
    found[1..].sort();
    let mut sorted = expected.clone();
    sorted[1..].sort();
    assert_eq!(found, sorted);
    // A child that is gone is told of, as long as it is registered.
    vfs.remove(near).unwrap();
    let found = told(&options);
    let gone = found.iter().find(|layer| layer.0.ends_with("near.vhd")).unwrap();
    assert!(gone.2 && gone.4.contains("does not exist"), "{gone:?}");
    assert_eq!(found.len(), 4);
}

/// A disk over more parents than are asked one by one, half of which are its former leaves: each block is found where it is, also those
/// that nobody has touched before, and the last one, which is cut by the end of the disk.
#[test]
fn a_running_disk_over_many_layers_of_its_own() {
    const SIZE: u64 = 40 * (16 << 10) - 1024;
    let vfs = SimVfs::new(4);
    let shared = || Arc::new(vfs.clone());
    let path = Path::new(LEAF);
    CreateOptions::new(SIZE).test_geometry(16 << 10, 128 << 10).vfs(shared()).create(path).unwrap();
    let open = || OpenOptions::new().vfs(shared()).open(path).unwrap();
    let mut content = vec![0; SIZE as usize];
    let mut disk = open();
    for round in 0..40u64 {
        if round == 20 {
            disk.close().unwrap();
            drop(disk);
            disk = open();
        }
        // One unit, or a part of two, in blocks that come again in later rounds.
        for at in [round * 14_848 % SIZE / 512 * 512, (round * 7 + 3) % 40 * (16 << 10)] {
            let end = (at + 4096 + round % 3 * 512).min(SIZE);
            content[at as usize..end as usize].fill(round as u8 + 1);
            disk.write_at(&content[at as usize..end as usize], at).unwrap();
        }
        disk.snapshot(&SnapshotName::new(&format!("s{round}")).unwrap()).unwrap();
    }
    content[SIZE as usize - 512..].fill(99);
    disk.write_at(&[99; 512], SIZE - 512).unwrap();
    let mut found = vec![0xee; SIZE as usize];
    disk.read_at(&mut found, 0).unwrap();
    assert!(found == content, "running");
    disk.close().unwrap();
    drop(disk);
    open().read_at(&mut found, 0).unwrap();
    assert!(found == content, "opened again");
}
