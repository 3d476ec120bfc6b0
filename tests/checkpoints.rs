//! Checkpoints of a simulated VM: the power is cut, or an operation fails, at every step. Afterwards disks and state are all old or
//! all new, and a state is opened for the disks that it belongs to alone.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/checkpoints.rs"]
mod checkpoints;
#[path = "support/failing.rs"]
mod failing;
#[path = "support/groups.rs"]
mod groups;

use checkpoints::{Story, cut_anywhere, fail_recovery, judge};
use cowvhd::sim::{Bounds, Fault, FaultPlan, SimVfs};
use cowvhd::snapshot::{self, Checkpoint, Member, Participant, SnapshotName, StateRef};
use cowvhd::state::ManifestDisk;
use cowvhd::vfs::Vfs;
use cowvhd::{CreateOptions, ErrorKind, OpenOptions, Result};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How many states are made of a crash point; more with `COWVHD_SNAPSHOT_STATES`, a factor.
fn bound(states: usize) -> usize {
    let factor = std::env::var("COWVHD_SNAPSHOT_STATES").ok().and_then(|factor| factor.parse().ok());
    states * factor.unwrap_or(1usize)
}

#[test]
fn a_power_cut_at_any_step() {
    let judged = [1, 2].map(|count| cut_anywhere(count, bound(12)).unwrap_or_else(|what| panic!("{what}")));
    println!("{judged:?} distinct states: no violation");
    assert!(judged[0] > 100 && judged[1] > 200, "{judged:?}");
}

/// An operation fails: the disks go on as they were, or are stopped; then the power is cut.
#[test]
fn a_failure_at_any_step() {
    for (count, errno) in [(1, 5), (2, 5), (2, 28)] {
        for step in 0.. {
            let mut story = Story::new(1, count);
            story.write_some(2);
            story.flush();
            story.vfs.set_faults(FaultPlan::new(Fault::Error(errno), step, 1));
            let result = story.checkpoint();
            let injected = story.vfs.injected_faults() > 0;
            story.vfs.set_faults(FaultPlan::default());
            story.write_some(1);
            story.flush();
            let point = story.vfs.crash_now();
            point.for_each_state(step, &Bounds::sample(bound(4)), |state| {
                judge(&story, &state, point.clock(), 0, step % 2 == 0).unwrap_or_else(|what| {
                    panic!("{count} disks, {errno} at {step} ({result:?}), {}: {what}", state.fates())
                });
                true
            });
            if !injected {
                assert!(result.is_ok(), "{result:?}");
                break;
            }
        }
    }
}

/// Openings that find half a checkpoint fail at any step; the next ones finish it or take it back.
#[test]
fn a_failure_at_any_step_of_a_recovery() {
    let failed = [1, 2].map(|count| fail_recovery(count, 7).unwrap_or_else(|what| panic!("{what}")));
    println!("{failed:?} failures in an opening: no violation");
    assert!(failed[0] > 100 && failed[1] > 300, "{failed:?}");
}

/// The disks are open in two processes, and a third one leads: any of them is killed after any step, and what it leaves is what
/// the others go on with. Then the power is cut at every step of that.
#[test]
fn any_process_of_a_checkpoint_is_killed_at_any_step() {
    let judged = groups::end_anywhere(bound(6)).unwrap_or_else(|what| panic!("{what}"));
    println!("{judged} distinct states: no violation");
    assert!(judged > 1000, "{judged}");
}

/// A disk in another process, which waits for its leader no longer when it is sealed.
#[derive(Debug)]
struct Impatient<'a> {
    member: Option<Member<'a>>,
    disk: ManifestDisk,
}

impl<'a> Impatient<'a> {
    fn new(member: Member<'a>) -> Self {
        Impatient { disk: member.disk().clone(), member: Some(member) }
    }
}

impl Participant for Impatient<'_> {
    fn disk(&self) -> &ManifestDisk {
        &self.disk
    }

    fn folder(&self) -> &Path {
        Path::new("/")
    }

    fn prepare(&mut self) -> Result<()> {
        self.member.as_mut().unwrap().prepare()
    }

    fn hold(&mut self) -> Result<()> {
        self.member.as_mut().unwrap().hold()
    }

    fn switch(&mut self, state: &StateRef) -> Result<()> {
        self.member.as_mut().unwrap().switch(state)
    }

    fn seal(&mut self) -> Result<()> {
        self.member.take().unwrap().seal()
    }

    fn commit(&mut self) -> Result<PathBuf> {
        Ok("/b@one.vhd".into())
    }

    fn fail(&mut self, _: &str) {}
}

/// What a disk that waited too long has committed is committed for its leader, too, whose other disks go on; and what it has ended, is
/// not.
#[test]
fn a_leader_that_is_too_slow_takes_what_was_decided() {
    for committed in [true, false] {
        let vfs = SimVfs::new(7);
        let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
        let options = OpenOptions::new().vfs(Arc::clone(&shared));
        let disks = ["/a.vhd", "/b.vhd"].map(|path| {
            let create =
                CreateOptions::new(1 << 20).test_geometry(16 << 10, 128 << 10).vfs(Arc::clone(&shared));
            create.create(Path::new(path)).unwrap();
            options.open(Path::new(path)).unwrap()
        });
        let name = SnapshotName::new("one").unwrap();
        let here: Box<dyn Participant> = Box::new(Member::begin(&disks[0], &name, committed).unwrap());
        let there = Box::new(Impatient::new(Member::begin(&disks[1], &name, !committed).unwrap()));
        // It is sealed last, or first: then there is nothing yet to commit.
        let participants: Vec<Box<dyn Participant>> =
            if committed { vec![here, there] } else { vec![there, here] };
        let saved = Checkpoint::of(Arc::clone(&shared), participants, &name).unwrap().commit();
        assert_eq!(saved.is_ok(), committed, "{saved:?}");
        assert_eq!(disks[0].flush().is_ok(), committed);
        drop(disks);
        for path in ["/a.vhd", "/b.vhd"] {
            drop(options.open(Path::new(path)).unwrap());
            assert_eq!(snapshot::state(&options, Path::new(path), &name).is_ok(), committed, "{path}");
        }
    }
}

/// What is dropped leaves nothing, and one at a time is made.
#[test]
fn a_checkpoint_that_is_dropped_leaves_the_disk_as_it_was() {
    let vfs = SimVfs::new(5);
    let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
    let open = |path: &str| {
        let path = Path::new(path);
        let create = CreateOptions::new(1 << 20).test_geometry(16 << 10, 128 << 10).vfs(Arc::clone(&shared));
        create.create(path).unwrap();
        OpenOptions::new().vfs(Arc::clone(&shared)).open(path).unwrap()
    };
    let (disk, elsewhere) = (open("/a.vhd"), open("/other/b.vhd"));
    let name = |name: &str| SnapshotName::new(name).unwrap();
    disk.write_at(&[1; 4096], 0).unwrap();

    let checkpoint = disk.checkpoint(&name("one")).unwrap();
    checkpoint.blob("ram").unwrap().write_at(&[2; 4096], 0).unwrap();
    assert_eq!(checkpoint.blob("ram").unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(checkpoint.blob("a+b").unwrap_err().kind(), ErrorKind::InvalidInput);
    for refused in [disk.snapshot(&name("two")).map(drop), disk.checkpoint(&name("two")).map(drop)] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::InUse);
    }
    disk.write_at(&[3; 4096], 4096).unwrap();
    disk.flush().unwrap();
    drop(checkpoint);
    assert_eq!(vfs.paths(), [Path::new("/a.vhd"), Path::new("/other/b.vhd")]);

    // Neither of these leaves anything behind either.
    for disks in [&[][..], &[&disk, &elsewhere], &[&disk, &disk]] {
        assert!(snapshot::group(disks, &name("one")).is_err());
    }
    assert_eq!(vfs.paths(), [Path::new("/a.vhd"), Path::new("/other/b.vhd")]);

    // A state that lies there is nobody's to take over.
    let stray = shared.create_new(Path::new("/a@two+ram.vmstate")).unwrap();
    assert_eq!(disk.snapshot(&name("two")).unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(disk.checkpoint(&name("two")).unwrap_err().kind(), ErrorKind::Exists);
    drop(stray);
    disk.snapshot(&name("one")).unwrap();
    assert_eq!(disk.checkpoint(&name("one")).unwrap_err().kind(), ErrorKind::Exists);
    disk.close().unwrap();
    drop(disk);

    // Opening it takes away what is under way, and this is not.
    let again = OpenOptions::new().vfs(Arc::clone(&shared)).open(Path::new("/a.vhd")).unwrap();
    let mut page = [0; 4096];
    again.read_at(&mut page, 4096).unwrap();
    assert_eq!(page, [3; 4096]);
    assert!(vfs.paths().contains(&"/a@two+ram.vmstate".into()));
}

/// Between its seal and the commit a leaf is no parent: it may become writable again, or another file gets its name.
#[test]
fn no_disk_is_made_over_a_leaf_in_the_middle_of_a_snapshot() {
    let mut refused = 0;
    for count in [1, 2] {
        let points = Story::new(count as u64, count).record();
        for (p, point) in points.iter().enumerate() {
            point.for_each_state(p as u64, &Bounds::sample(bound(4)), |state| {
                let vfs = state.to_vfs(state.hash);
                let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
                let (leaf, clone) = (Path::new("/a.vhd"), Path::new("/clone.vhd"));
                let options = || OpenOptions::new().vfs(Arc::clone(&shared));
                match CreateOptions::child_of(leaf).vfs(Arc::clone(&shared)).create(clone) {
                    Ok(()) => {}
                    Err(error) => refused += u32::from(error.to_string().contains("a snapshot of it")),
                }
                // Whatever becomes of the leaf, what was made can be read.
                let _ = options().open(leaf);
                if vfs.paths().iter().any(|path| path == clone) {
                    options()
                        .open(clone)
                        .unwrap_or_else(|error| panic!("point {p}, {}: {error}", state.fates()));
                }
                true
            });
        }
    }
    assert!(refused > 10, "{refused}");
}

/// A VM state goes with the last of the snapshots that it was saved with, and leaves its names free.
#[test]
fn a_deleted_snapshot_takes_its_state_along() {
    let vfs = SimVfs::new(11);
    let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
    let options = OpenOptions::new().vfs(Arc::clone(&shared));
    let (first, second) = (Path::new("/a.vhd"), Path::new("/b.vhd"));
    let open = |path: &Path| {
        let create = CreateOptions::new(1 << 20).test_geometry(16 << 10, 128 << 10).vfs(Arc::clone(&shared));
        create.create(path).unwrap();
        options.open(path).unwrap()
    };
    let disks = [open(first), open(second)];
    let name = SnapshotName::new("one").unwrap();
    for (disk, byte) in disks.iter().zip(1..) {
        disk.write_at(&[byte; 4096], 0).unwrap();
    }
    let checkpoint = Checkpoint::begin(&[&disks[0], &disks[1]], &name).unwrap();
    checkpoint.blob("ram").unwrap().write_at(&[2; 4096], 0).unwrap();
    checkpoint.commit().unwrap();
    disks.iter().for_each(|disk| disk.close().unwrap());
    drop(disks);

    let states =
        || vfs.paths().iter().filter(|path| path.extension().is_some_and(|e| e == "vmstate")).count();
    let delete = |path| snapshot::delete(&options, path, &name, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(states(), 2);
    delete(first);
    snapshot::state(&options, second, &name).unwrap().verify().unwrap();
    delete(second);
    assert_eq!(vfs.paths(), [first, second]);
    for (path, byte) in [(first, 1), (second, 2)] {
        let mut page = [0; 4096];
        options.open(path).unwrap().read_at(&mut page, 0).unwrap();
        assert_eq!(page, [byte; 4096]);
    }
}
