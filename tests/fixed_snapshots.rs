//! A fixed disk as a snapshot: what stands for the notes, the registry and the seal that it has no place for. (Power cuts, kills and
//! failures in the middle of one: `snapshots.rs`, `merge.rs`, `snapshot_delete.rs`, which have fixed disks among theirs.)

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use cowvhd::check::{Code, check, check_chain};
use cowvhd::sim::SimVfs;
use cowvhd::snapshot::{self, SnapshotName};
use cowvhd::vfs::{Access, Vfs};
use cowvhd::vhd::DiskType;
use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const DISK: &str = "/vm.vhd";
const SNAPSHOT: &str = "/vm@s1.vhd";
const BLOCK: u32 = 16 << 10;
const SIZE: u64 = 8 * BLOCK as u64;

fn options(vfs: &SimVfs) -> OpenOptions {
    OpenOptions::new().test_geometry(BLOCK, 128 << 10).vfs(Arc::new(vfs.clone()))
}

fn name(name: &str) -> SnapshotName {
    SnapshotName::new(name).unwrap()
}

fn create(vfs: &SimVfs, path: &str) {
    CreateOptions::new(SIZE).fixed().vfs(Arc::new(vfs.clone())).create(Path::new(path)).unwrap();
}

fn write(vfs: &SimVfs, path: &str, value: u8, offset: u64) {
    let disk = options(vfs).open(Path::new(path)).unwrap();
    disk.write_at(&[value; 4096], offset).unwrap();
    disk.close().unwrap();
}

fn byte(disk: &Disk, offset: u64) -> u8 {
    let mut buf = [0; 1];
    disk.read_at(&mut buf, offset).unwrap();
    buf[0]
}

fn shows(vfs: &SimVfs, path: &str, bytes: &[(u64, u8)]) {
    let disk = options(vfs).read_only(true).open(Path::new(path)).unwrap();
    for &(offset, expected) in bytes {
        assert_eq!(byte(&disk, offset), expected, "{path} at {offset}");
    }
}

/// A fixed disk with a snapshot, and something else in it since.
fn with_snapshot() -> SimVfs {
    let vfs = SimVfs::new(1);
    create(&vfs, DISK);
    write(&vfs, DISK, 1, 0);
    let disk = options(&vfs).open(Path::new(DISK)).unwrap();
    assert_eq!(disk.snapshot(&name("s1")).unwrap(), Path::new(SNAPSHOT));
    assert_eq!(disk.disk_type(), DiskType::Differencing);
    disk.write_at(&[2; 4096], 8192).unwrap();
    disk.close().unwrap();
    vfs
}

#[test]
fn it_is_listed_is_in_the_tree_and_is_not_written_to() {
    let vfs = with_snapshot();
    let (disk, snapshot) = (Path::new(DISK), Path::new(SNAPSHOT));
    let before = vfs.content_hash(snapshot);
    let error = options(&vfs).open(snapshot).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Sealed);
    assert!(error.to_string().contains("fixed disk") && error.to_string().contains("clone"), "{error}");
    let found = snapshot::list(&options(&vfs), disk).unwrap();
    assert_eq!((found.len(), found[0].name.as_str(), found[0].depth), (1, "s1", Some(1)));
    let tree = snapshot::tree(&options(&vfs), disk).unwrap();
    let root = tree[0].state.as_ref().unwrap();
    assert_eq!((root.disk_type, root.sealed, root.snapshot.as_deref()), (DiskType::Fixed, true, Some("s1")));
    assert_eq!((tree.len(), tree[1].parent, tree[1].is_disk), (2, Some(0), true));
    assert_eq!(found[0].taken, root.changed);
    // Another file whose name fits is no snapshot as long as it may be written to.
    create(&vfs, "/vm@x.vhd");
    assert_eq!(snapshot::list(&options(&vfs), disk).unwrap().len(), 1);
    let error = snapshot::revert(&options(&vfs), disk, &name("x")).unwrap_err();
    assert!(error.to_string().contains("chmod a-w"), "{error}");
    shows(&vfs, DISK, &[(0, 1), (8192, 2)]);
    shows(&vfs, SNAPSHOT, &[(0, 1), (8192, 0)]);
    assert_eq!(vfs.content_hash(snapshot), before);
    assert!(check_chain(&options(&vfs), disk).unwrap().codes().is_empty());
}

/// Going back, a clone, more snapshots, and the fixed disk taken out of the middle of it all: nothing that anybody sees changes, and
/// the file stays.
#[test]
fn it_is_gone_back_to_cloned_and_taken_out() {
    let vfs = with_snapshot();
    let (disk, snapshot) = (Path::new(DISK), Path::new(SNAPSHOT));
    let go_on = || |_| ControlFlow::Continue(());
    snapshot::clone_to(&options(&vfs), snapshot, Path::new("/clone.vhd")).unwrap();
    let running = options(&vfs).open(disk).unwrap();
    running.snapshot(&name("s2")).unwrap();
    running.close().unwrap();
    drop(running);
    write(&vfs, "/clone.vhd", 3, 0);
    let deleted = snapshot::delete(&options(&vfs), disk, &name("s1"), &mut go_on()).unwrap();
    assert_eq!(deleted.kept.as_deref(), Some(snapshot));
    assert!(deleted.copied > 0);
    let found = snapshot::list(&options(&vfs), disk).unwrap();
    let found: Vec<_> = found.iter().map(|found| (found.name.as_str(), found.depth)).collect();
    assert_eq!(found, [("s1", None), ("s2", Some(1))]);
    shows(&vfs, DISK, &[(0, 1), (8192, 2)]);
    shows(&vfs, "/vm@s2.vhd", &[(0, 1), (8192, 2)]);
    shows(&vfs, "/clone.vhd", &[(0, 3), (8192, 0)]);
    let error = snapshot::delete(&options(&vfs), disk, &name("s1"), &mut go_on()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    snapshot::revert(&options(&vfs), disk, &name("s1")).unwrap();
    shows(&vfs, DISK, &[(0, 1), (8192, 0)]);
    let running = options(&vfs).open(disk).unwrap();
    let deleted = snapshot::delete_running(&running, &name("s1"), &mut go_on()).unwrap();
    assert_eq!(deleted.kept.as_deref(), Some(snapshot));
    assert_eq!((byte(&running, 0), running.disk_type()), (1, DiskType::Dynamic));
    running.close().unwrap();
    vfs.remove(snapshot).unwrap();
    shows(&vfs, DISK, &[(0, 1), (8192, 0)]);
    shows(&vfs, "/vm@s2.vhd", &[(0, 1), (8192, 2)]);
}

/// What happens to the fixed file all the same is told, or refused.
#[test]
fn a_fixed_parent_that_was_altered() {
    let disk = Path::new(DISK);
    let codes = |vfs: &SimVfs| {
        let codes = check_chain(&options(vfs), disk).unwrap().codes();
        codes.into_keys().collect::<Vec<_>>()
    };
    let vfs = with_snapshot();
    let file = vfs.open(Path::new(SNAPSHOT), Access::ReadOnly).unwrap();
    let time = file.modified().unwrap();
    assert!(options(&vfs).read_only(true).open(disk).unwrap().notices().is_empty());
    // Some file systems keep whole seconds.
    file.set_modified(cowvhd::vfs::FileTime { nanoseconds: 0, ..time }).unwrap();
    assert_eq!(codes(&vfs), []);
    vfs.foreign_write(Path::new(SNAPSHOT), 4096, &[9; 512]);
    assert_eq!(codes(&vfs), [Code::ParentTime]);
    let open = options(&vfs).open(disk).unwrap();
    let notices = open.notices();
    assert!(notices.len() == 1 && notices[0].contains("vm@s1.vhd was copied or written to"), "{notices:?}");
    open.close().unwrap();
    drop(open);

    // Another length is another disk.
    file.set_read_only(false).unwrap();
    let longer = vfs.open(Path::new(SNAPSHOT), Access::ReadWrite).unwrap();
    let mut footer = cowvhd::vhd::Footer::parse(&{
        let mut bytes = [0; 512];
        longer.read_at(&mut bytes, SIZE).unwrap();
        bytes
    })
    .unwrap();
    footer.current_size += 512;
    longer.set_len(SIZE + 1024).unwrap();
    longer.write_at(&footer.to_bytes(), SIZE + 512).unwrap();
    let error = options(&vfs).open(disk).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("had 131584 when"), "{error}");
    assert!(codes(&vfs).contains(&Code::ParentChanged));
}

/// A base that others are made over loses its permission to be written, and the child of a snapshot that was never committed is not taken for
/// a parent's.
#[test]
fn a_parent_is_protected_and_left_to_its_owner() {
    let vfs = SimVfs::new(2);
    create(&vfs, "/base.vhd");
    write(&vfs, "/base.vhd", 5, 0);
    let base = Path::new("/base.vhd");
    let child = || CreateOptions::child_of(base).test_geometry(BLOCK, 128 << 10).vfs(Arc::new(vfs.clone()));
    let writer = options(&vfs).open(base).unwrap();
    assert_eq!(child().create(Path::new("/a.vhd")).unwrap_err().kind(), ErrorKind::InUse);
    writer.close().unwrap();
    drop(writer);
    child().create(Path::new("/a.vhd")).unwrap();
    let reader = options(&vfs).open(Path::new("/a.vhd")).unwrap();
    child().create(Path::new("/b.vhd")).unwrap();
    drop(reader);
    let error = options(&vfs).open(base).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Sealed, "{error}");
    let error =
        snapshot::rebase(&options(&vfs), base, Path::new("/a.vhd"), &mut |_| ControlFlow::Continue(()));
    assert!(error.is_err());
    // Whoever knows that nobody needs it gives the permission back.
    let file = vfs.open(base, Access::ReadOnly).unwrap();
    file.set_read_only(false).unwrap();
    options(&vfs).open(base).unwrap().close().unwrap();
}

/// The names of a leaf and a snapshot that somebody exchanged: what was the leaf is nobody's to remove.
#[test]
fn what_was_the_leaf_is_not_taken_for_a_child_that_was_cut() {
    let vfs = with_snapshot();
    let (disk, snapshot) = (Path::new(DISK), Path::new(SNAPSHOT));
    vfs.exchange(disk, snapshot).unwrap();
    vfs.open(disk, Access::ReadOnly).unwrap().set_read_only(false).unwrap();
    let there = vfs.content_hash(snapshot);
    options(&vfs).open(disk).unwrap().close().unwrap();
    assert_eq!(vfs.content_hash(snapshot), there, "with what was written to it");
    vfs.exchange(disk, snapshot).unwrap();
    shows(&vfs, DISK, &[(0, 1), (8192, 2)]);
}

/// Cut between the names and the commit: a check says so, no disk is made over it, and a repair or an open takes it away.
#[test]
fn a_snapshot_that_was_cut_is_told_of() {
    let vfs = SimVfs::new(4);
    create(&vfs, DISK);
    write(&vfs, DISK, 1, 0);
    let disk = Arc::new(options(&vfs).open(Path::new(DISK)).unwrap());
    let seen = vfs.clone();
    let at_commit = move |_| {
        let is_named = seen.paths().iter().any(|path| path == Path::new(SNAPSHOT));
        let is_protected = seen.open(Path::new(DISK), Access::ReadOnly).unwrap().is_read_only().unwrap();
        if is_named && is_protected && !std::thread::panicking() {
            std::panic::resume_unwind(Box::new("killed"));
        }
    };
    vfs.set_hook(Some(Box::new(at_commit)));
    let taking = Arc::clone(&disk);
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| taking.snapshot(&name("s1")))).unwrap_err();
    vfs.set_hook(None);
    drop((disk, taking));
    let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
    let report = check(Arc::clone(&shared), Path::new(DISK)).unwrap();
    let [finding] = report.findings() else { panic!("{:?}", report.findings()) };
    assert!(finding.code == Code::SnapshotUnfinished && finding.what.contains("vm@s1.vhd"), "{finding:?}");
    let child = CreateOptions::child_of(Path::new(DISK)).vfs(Arc::clone(&shared)).create(Path::new("/c.vhd"));
    assert!(child.unwrap_err().to_string().contains("never finished"));
    shows(&vfs, DISK, &[(0, 1)]);
    let repaired = cowvhd::check::repair(
        Arc::clone(&shared),
        Path::new(DISK),
        cowvhd::check::Consent::Safe,
        Path::new("/undo"),
    )
    .unwrap();
    assert_eq!(repaired.steps.len(), 1);
    assert_eq!(vfs.paths(), [Path::new(DISK)]);
    write(&vfs, DISK, 2, 0);
}

/// What cannot be: the disk goes on as it was.
#[test]
fn what_is_refused_leaves_the_disk_running() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.vhd");
    CreateOptions::new(3 << 40).fixed().create(&path).unwrap();
    let disk = OpenOptions::new().open(&path).unwrap();
    disk.write_at(&[1; 512], 0).unwrap();
    let error = disk.snapshot(&name("s1")).unwrap_err();
    assert!(error.to_string().contains("2040 GiB"), "{error}");
    let error = disk.checkpoint(&name("s1")).unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("alone first"), "{error}");
    disk.write_at(&[2; 512], 0).unwrap();
    disk.close().unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    assert!(OpenOptions::new().open(&path).is_ok());
}

/// Threads write, read and flush while the fixed disk gets its snapshot: each finds what it wrote, and the snapshot holds of each thread's
/// writes, which go up, one after the other, a point between the first and the last.
#[test]
fn threads_go_on_over_it() {
    const THREADS: u64 = 4;
    const STRIDE: u64 = 1 << 20;
    for _ in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.vhd");
        CreateOptions::new(THREADS * STRIDE).fixed().create(&path).unwrap();
        let disk = OpenOptions::new().open(&path).unwrap();
        let (done, turns) = (AtomicBool::new(false), AtomicU64::new(0));
        let wait = |more: u64| {
            let until = turns.load(Ordering::SeqCst) + more;
            while turns.load(Ordering::SeqCst) < until {
                std::thread::yield_now();
            }
        };
        let (before, last) = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let (disk, done, turns) = (&disk, &done, &turns);
                    scope.spawn(move || {
                        let mut number = 0u64;
                        while !done.load(Ordering::SeqCst) {
                            number += 1;
                            // The first place never lags behind the second.
                            for place in [0, 65536] {
                                let sector = number.to_le_bytes().repeat(64);
                                disk.write_at(&sector, thread * STRIDE + place).unwrap();
                            }
                            let mut found = [0; 8];
                            disk.read_at(&mut found, thread * STRIDE).unwrap();
                            assert_eq!(u64::from_le_bytes(found), number);
                            if number.is_multiple_of(16) {
                                disk.flush().unwrap();
                            }
                            turns.fetch_add(1, Ordering::SeqCst);
                        }
                        number
                    })
                })
                .collect();
            wait(100);
            let before = turns.load(Ordering::SeqCst);
            disk.snapshot(&name("s1")).unwrap();
            wait(100);
            done.store(true, Ordering::SeqCst);
            let last: Vec<u64> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
            (before, last)
        });
        disk.close().unwrap();
        drop(disk);
        let at = |path: &Path| -> Vec<[u64; 2]> {
            let disk = OpenOptions::new().read_only(true).open(path).unwrap();
            (0..THREADS)
                .map(|thread| {
                    [0, 65536].map(|place| {
                        let mut found = [0; 8];
                        disk.read_at(&mut found, thread * STRIDE + place).unwrap();
                        u64::from_le_bytes(found)
                    })
                })
                .collect()
        };
        assert_eq!(at(&path), last.iter().map(|&number| [number; 2]).collect::<Vec<_>>());
        let then = at(&dir.path().join("vm@s1.vhd"));
        assert!(then.iter().all(|[first, second]| first == second || *first == second + 1), "{then:?}");
        assert!(then.iter().map(|[first, _]| first).sum::<u64>() >= before, "{then:?}");
    }
}
