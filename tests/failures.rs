//! What is left when the medium fails while a disk is opened, recovered or closed.
//!
//! A close that had failed said on the second call that all was well, and one that came while another was under way said so at
//! once. A sync that failed in an opening, a recovery or a close was forgotten, although the kernel reports it only once;
//! and what such an attempt had left in the cache was believed to be on the medium by the next.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/crash.rs"]
#[allow(dead_code, reason = "shared with the other tests of crashes")]
mod crash;
#[path = "support/failing.rs"]
mod failing;
#[path = "support/strict_vhd.rs"]
mod strict_vhd;

use cowvhd::check::{Consent, check, repair};
use cowvhd::sim::{Bounds, Fault, FaultPlan, FileSystem, History, Operation, SimVfs, Underway};
use cowvhd::vfs::{Access, Vfs};
use cowvhd::vhd::Footer;
use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions, Result, ZeroMode};
use crash::{Explorer, PATH, SMALL, Segment};
use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

const EIO: i32 = 5;

fn image(seed: u64) -> SimVfs {
    let vfs = SimVfs::new(seed);
    CreateOptions::new(SMALL.size)
        .test_geometry(SMALL.block_bytes, SMALL.ring_bytes)
        .vfs(Arc::new(vfs.clone()))
        .create(Path::new(PATH))
        .unwrap();
    vfs
}

fn open(vfs: &SimVfs) -> Result<Disk> {
    OpenOptions::new().vfs(Arc::new(vfs.clone())).open(Path::new(PATH))
}

fn first_sector(disk: &Disk) -> [u8; 512] {
    let mut buf = [0xee; 512];
    disk.read_at(&mut buf, 0).unwrap();
    buf
}

fn remembers_failed_sync(vfs: &SimVfs) -> bool {
    let read_only =
        OpenOptions::new().read_only(true).vfs(Arc::new(vfs.clone())).open(Path::new(PATH)).unwrap();
    read_only.notices().iter().any(|notice| notice.contains("a sync failed"))
}

/// Lets the operations of one kind fail one after the other, each in a world of its own, while `run` runs, until it meets none.
/// Returns how many there were. `run` asks with its last argument, once, whether it met the failure; no other will follow.
fn fail_each(
    operation: Operation,
    prepare: impl Fn() -> (SimVfs, Option<Disk>),
    run: impl Fn(&SimVfs, Option<Disk>, &dyn Fn() -> bool),
) -> u64 {
    for number in 0.. {
        let (vfs, disk) = prepare();
        vfs.set_faults(FaultPlan::new(Fault::Error(EIO), number, 1).only(operation));
        let met = Cell::new(None);
        run(&vfs, disk, &|| {
            met.set(Some(vfs.injected_faults() == 1));
            vfs.set_faults(FaultPlan::default());
            met.get() == Some(true)
        });
        if met.get() == Some(false) {
            return number;
        }
    }
    unreachable!()
}

fn written() -> (SimVfs, Option<Disk>) {
    let vfs = image(1);
    let disk = open(&vfs).unwrap();
    disk.write_at(&[1; 512], 0).unwrap();
    disk.flush().unwrap();
    disk.write_at(&[2; 512], 0).unwrap();
    disk.write_at(&[2; 512], SMALL.block_bytes.into()).unwrap();
    disk.discard((2 * SMALL.block_bytes).into(), SMALL.block_bytes.into()).unwrap();
    (vfs, Some(disk))
}

#[test]
fn a_close_that_failed_fails_again() {
    for operation in [Operation::Sync, Operation::Write, Operation::DurableWrite, Operation::SetLength] {
        let operations = fail_each(operation, written, |vfs, disk, met| {
            let disk = disk.unwrap();
            let first = disk.close();
            assert_eq!(first.is_err(), met(), "{operation:?}");
            for _ in 0..2 {
                let again = disk.close();
                assert_eq!(again.is_err(), first.is_err(), "{operation:?}");
                if let (Err(first), Err(again)) = (&first, again) {
                    assert_eq!(again.kind(), ErrorKind::Poisoned);
                    assert!(
                        first.kind() == ErrorKind::Poisoned || again.to_string().contains("failed"),
                        "{again}"
                    );
                }
            }
            drop(disk);
            let disk = open(vfs).unwrap();
            let found = first_sector(&disk);
            assert!(found == [1; 512] || found == [2; 512]);
            disk.close().unwrap();
        });
        assert!(operations > 0, "{operation:?}");
    }
}

#[test]
fn a_close_during_another_waits_for_it() {
    let (vfs, disk) = written();
    let disk = Arc::new(disk.unwrap());
    let second = Arc::new(Mutex::new(None));
    {
        let (vfs, disk, second) = (vfs.clone(), Arc::downgrade(&disk), Arc::clone(&second));
        let inner = vfs.clone();
        vfs.set_hook(Some(Box::new(move |underway| {
            let mut second = second.lock().unwrap();
            if underway != Underway::Sync || second.is_some() {
                return;
            }
            let (disk, vfs) = (disk.upgrade().unwrap(), inner.clone());
            *second = Some(std::thread::spawn(move || {
                let result = disk.close();
                (result.is_ok(), vfs.content(Path::new(PATH)).unwrap()[512..520].to_vec())
            }));
            // Time for a close that does not wait.
            std::thread::sleep(Duration::from_millis(100));
        })));
    }
    disk.close().unwrap();
    let second = second.lock().unwrap().take().expect("a close syncs");
    assert_eq!(
        second.join().unwrap(),
        (true, b"cxsparse".to_vec()),
        "it returned before the image was closed"
    );
    vfs.set_hook(None);
}

#[test]
fn a_sync_that_fails_in_a_close_is_remembered() {
    let syncs = fail_each(Operation::Sync, written, |vfs, disk, met| {
        let closed = disk.unwrap().close();
        assert_eq!(closed.is_err(), met());
        if closed.is_err() {
            assert!(remembers_failed_sync(vfs));
            open(vfs).unwrap().close().unwrap();
            assert!(remembers_failed_sync(vfs));
        }
    });
    assert!(syncs >= 3, "{syncs}");
}

#[test]
fn a_sync_that_fails_in_a_recovery_is_remembered() {
    let dirty = || {
        let (vfs, disk) = written();
        disk.unwrap().flush().unwrap();
        (vfs, None)
    };
    let syncs = fail_each(Operation::Sync, dirty, |vfs, _, met| {
        let opened = open(vfs);
        assert_eq!(opened.is_err(), met());
        if opened.is_err() {
            assert!(remembers_failed_sync(vfs));
            assert_eq!(first_sector(&open(vfs).unwrap()), [2; 512]);
        }
    });
    assert!(syncs >= 2, "{syncs}");
}

#[test]
fn a_sync_that_fails_in_an_opening_is_remembered() {
    let closed = || {
        let (vfs, disk) = written();
        disk.unwrap().close().unwrap();
        (vfs, None)
    };
    let syncs = fail_each(Operation::Sync, closed, |vfs, _, met| {
        let opened = open(vfs);
        assert_eq!(opened.is_err(), met());
        if opened.is_err() {
            assert!(remembers_failed_sync(vfs));
            assert_eq!(first_sector(&open(vfs).unwrap()), [2; 512]);
        }
    });
    assert!(syncs >= 1, "{syncs}");
}

/// A fixed disk has no journal: whatever fails, of a sector is there what was or what was written. A sync that failed stops the disk.
#[test]
fn a_fixed_disk_over_a_medium_that_fails() {
    const SIZE: usize = 32 << 10;
    let page = |number: usize| number * 4096..(number + 1) * 4096;
    let full = || {
        let vfs = SimVfs::new(2);
        let create = CreateOptions::new(SIZE as u64).fixed().vfs(Arc::new(vfs.clone()));
        create.create(Path::new(PATH)).unwrap();
        let disk = open(&vfs).unwrap();
        disk.write_at(&[1; SIZE], 0).unwrap();
        disk.close().unwrap();
        drop(disk);
        // Its footer lacks the last byte, which an opening adds.
        let file = vfs.open(Path::new(PATH), Access::ReadWrite).unwrap();
        file.set_len(SIZE as u64 + 511).unwrap();
        (vfs, None)
    };
    for operation in
        [Operation::Read, Operation::Write, Operation::SetLength, Operation::Punch, Operation::Sync]
    {
        let operations = fail_each(operation, full, |vfs, _, met| {
            let mut errors = Vec::new();
            match open(vfs) {
                Ok(disk) => {
                    let results = [
                        disk.write_at(&[2; 4096], page(1).start as u64),
                        disk.flush(),
                        disk.write_zeroes(page(2).start as u64, 4096, ZeroMode::KeepAllocated),
                        disk.discard(page(3).start as u64, 4096),
                        disk.read_at(&mut [0; 512], 0),
                        disk.close(),
                    ];
                    errors.extend(results.into_iter().filter_map(Result::err));
                }
                Err(error) => errors.push(error),
            }
            assert_eq!(!errors.is_empty(), met(), "{operation:?}: {errors:?}");
            for (number, error) in errors.iter().enumerate() {
                let expected = if number == 0 { ErrorKind::Io } else { ErrorKind::Poisoned };
                assert!(error.kind() == expected && error.to_string().contains(PATH), "{error}");
            }
            let stops = operation == Operation::Sync && errors.len() > 1;
            assert!(errors.len() <= 1 || stops, "{operation:?}: {errors:?}");

            let disk = open(vfs).unwrap();
            let mut found = vec![0xee; SIZE];
            disk.read_at(&mut found, 0).unwrap();
            disk.close().unwrap();
            for (number, new) in [(1, 2), (2, 0), (3, 0)] {
                let done = found[page(number)].iter().all(|&byte| byte == new);
                assert!(done || !errors.is_empty(), "{operation:?}: page {number}");
                assert!(found[page(number)].iter().all(|&byte| byte == new || byte == 1), "{operation:?}");
                found[page(number)].fill(1);
            }
            assert!(found == [1; SIZE], "{operation:?}: what nobody has written to");
            let file = vfs.content(Path::new(PATH)).unwrap();
            assert_eq!(Footer::parse(&file[SIZE..]).unwrap().current_size, SIZE as u64);
        });
        assert!(operations > 0, "{operation:?}");
    }
}

/// Another program has rewritten the start of the file. The first opening fails to write the new backup, which the cache holds
/// all the same. The second one writes the start of the file: if that is torn, there must be a backup.
#[test]
fn a_backup_that_only_the_cache_holds_is_not_relied_on() {
    let mut explorer = Explorer::new(SMALL);
    for durable_write in 0..5 {
        let vfs = image(durable_write);
        let file = vfs.open(Path::new(PATH), Access::ReadOnly).unwrap();
        let mut footer = [0; 512];
        assert_eq!(file.read_at(&mut footer, 0).unwrap(), 512);
        let mut footer = Footer::parse(&footer).unwrap();
        footer.creator_app = *b"test";
        let end = file.length().unwrap() - 512;
        drop(file);
        vfs.corrupt(Path::new(PATH), 0, &footer.to_bytes());
        vfs.corrupt(Path::new(PATH), end, &footer.to_bytes());
        vfs.set_faults(FaultPlan::new(Fault::Error(EIO), durable_write, 1).only(Operation::DurableWrite));
        let failed = open(&vfs).is_err();
        assert_eq!(failed, durable_write < 4, "header backup, two superblocks, cookie");
        vfs.set_faults(FaultPlan::default());
        vfs.record(true);
        drop(open(&vfs).unwrap());
        let points = vfs.take_crash_points();
        let segment = Segment { history: History::default(), points };
        if let Err(error) = explorer.explore(&[segment], durable_write, &Bounds::sample(200)) {
            panic!("durable write {durable_write}: {error}");
        }
    }
}

/// A flush took the slots that failed writes had touched and forgot them when it failed itself. So their residue was still in
/// the file after a clean close, and showed up in the next block there.
#[test]
fn a_failed_flush_keeps_in_mind_what_failed_writes_have_left() {
    let vfs = image(9);
    let block = u64::from(SMALL.block_bytes);
    let disk = open(&vfs).unwrap();
    disk.write_at(&[1; 512], 0).unwrap();
    vfs.set_faults(FaultPlan::new(Fault::Error(EIO), 0, 1).only(Operation::Write));
    disk.write_at(&[2; 8192], block + 4096).unwrap_err();
    disk.write_at(&[3; 512], 2 * block).unwrap();
    vfs.set_faults(FaultPlan::new(Fault::Error(EIO), 0, 1).only(Operation::Read));
    assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Io, "the flush could not read the data back");
    vfs.set_faults(FaultPlan::default());
    disk.close().unwrap();
    drop(disk);
    let disk = open(&vfs).unwrap();
    disk.write_at(&[4; 512], 3 * block).unwrap();
    let mut rest = vec![0xee; block as usize - 512];
    disk.read_at(&mut rest, 3 * block + 512).unwrap();
    assert!(rest.iter().all(|&byte| byte == 0), "a new block shows what a failed write has left");
}

/// A file system that makes no holes gets zeros instead: what was discarded reads as zeros, and a repair ends with the same.
#[test]
fn without_holes_there_are_zeros() {
    let vfs = image(3);
    vfs.set_kind(FileSystem { no_holes: true, ..FileSystem::default() });
    let disk = open(&vfs).unwrap();
    let block = u64::from(SMALL.block_bytes);
    disk.write_at(&vec![7; 3 * block as usize], 0).unwrap();
    disk.discard(0, 2 * block).unwrap();
    disk.close().unwrap();
    let written = vfs.content(Path::new(PATH)).unwrap();
    let report = check(Arc::new(vfs.clone()), Path::new(PATH)).unwrap();
    assert!(report.is_sound(), "{:?}", report.findings());
    let disk = open(&vfs).unwrap();
    let mut content = vec![0xee; 3 * block as usize];
    disk.read_at(&mut content, 0).unwrap();
    assert!(content[..2 * block as usize].iter().all(|&byte| byte == 0));
    assert!(content[2 * block as usize..].iter().all(|&byte| byte == 7));
    disk.close().unwrap();
    assert!(written.iter().filter(|&&byte| byte == 7).count() < 2 * block as usize, "discarded data is left");

    // Another program has put its footer further back: there is space between that nobody uses.
    let undo = Path::new("/undo");
    let (junk, footer) = (vec![9; 2 * block as usize], written[written.len() - 512..].to_vec());
    vfs.foreign_write(Path::new(PATH), written.len() as u64 - 512, &[junk, footer].concat());
    let before = vfs.content(Path::new(PATH)).unwrap();
    let repaired = repair(Arc::new(vfs.clone()), Path::new(PATH), Consent::All, undo).unwrap();
    assert!(repaired.is_sound() && repaired.changes(), "{:?}", repaired.after.findings());
    let after = vfs.content(Path::new(PATH)).unwrap();
    assert!(after.iter().filter(|&&byte| byte == 9).count() < 4096, "{:?}", repaired.steps);
    cowvhd::check::undo(Arc::new(vfs.clone()), undo, Path::new(PATH), false).unwrap();
    assert!(vfs.content(Path::new(PATH)).unwrap() == before);
}
