//! The host's file system is full, and blocks that the guest has discarded still occupy it.
//!
//! Only an extension of the file that failed made the engine bring freed blocks back. But files grow sparsely: it is the write
//! of the data that meets the lack of space, and that went to the guest as ENOSPC with gigabytes waiting to be punched.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/small_file_system.rs"]
mod small_file_system;

use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions};
use small_file_system::{on_a_small_file_system, small_folder};
use std::path::Path;
use std::process::Command;

const BLOCK: u64 = 2 << 20;

fn block(byte: u8) -> Vec<u8> {
    vec![byte; BLOCK as usize]
}

fn check(disk: &Disk, blocks: &[(u64, u8)]) {
    for &(number, byte) in blocks {
        let mut buf = block(0xee);
        disk.read_at(&mut buf, number * BLOCK).unwrap();
        assert!(buf == block(byte), "block {number}");
    }
}

fn small_image() -> std::path::PathBuf {
    let path = small_folder().join("disk.vhd");
    CreateOptions::new(256 << 20).create(&path).unwrap();
    path
}

#[test]
fn space_of_discarded_blocks_is_found_before_a_write_fails() {
    on_a_small_file_system("space_is_found", "24m");
}

#[test]
#[ignore = "run by another test, on a small file system"]
fn space_is_found() {
    let path = small_image();
    let disk = OpenOptions::new().open(&path).unwrap();
    for number in 0..10 {
        disk.write_at(&block(1), number * BLOCK).unwrap();
    }
    disk.flush().unwrap();
    // Sixteen times round, always with most of the file system in discarded blocks.
    for round in 0..16u8 {
        let first = 10 * (u64::from(round) % 2);
        disk.discard(first * BLOCK, 8 * BLOCK).unwrap();
        let first = 10 - first;
        for number in first..first + 8 {
            disk.write_at(&block(round + 2), number * BLOCK).unwrap();
        }
        check(&disk, &[(8, 1), (9, 1), (first, round + 2), (first + 7, round + 2)]);
    }
    disk.close().unwrap();
    drop(disk);
    let disk = OpenOptions::new().open(&path).unwrap();
    check(&disk, &[(8, 1), (9, 1), (0, 17), (7, 17), (10, 0), (17, 0)]);
}

#[test]
fn a_full_file_system_is_an_error_of_the_write_alone() {
    on_a_small_file_system("space_is_not_found", "16m");
}

#[test]
#[ignore = "run by another test, on a small file system"]
fn space_is_not_found() {
    let path = small_image();
    let disk = OpenOptions::new().open(&path).unwrap();
    let written = (0..).take_while(|&number| disk.write_at(&block(1), number * BLOCK).is_ok()).count() as u64;
    assert!((5..8).contains(&written), "{written}");
    let error = disk.write_at(&block(2), written * BLOCK).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, 28), "{error}");
    let blocks: Vec<(u64, u8)> = (0..written).map(|number| (number, 1)).collect();
    check(&disk, &blocks);
    // An overwrite needs no space.
    disk.write_at(&block(3), 0).unwrap();
    // Space comes back, and the disk goes on.
    disk.discard(BLOCK, 2 * BLOCK).unwrap();
    disk.write_at(&block(4), 50 * BLOCK).unwrap();
    disk.flush().unwrap();
    disk.close().unwrap();
    drop(disk);
    let disk = OpenOptions::new().open(&path).unwrap();
    check(&disk, &[(0, 3), (1, 0), (2, 0), (3, 1), (50, 4), (written, 0)]);
}

#[test]
fn a_disk_on_a_full_file_system_flushes_and_closes() {
    on_a_small_file_system("close_without_space", "24m");
}

#[test]
#[ignore = "run by another test, on a small file system"]
fn close_without_space() {
    let path = small_image();
    let filler = path.with_file_name("filler");
    let disk = OpenOptions::new().open(&path).unwrap();
    // Many blocks with little data: what a close needs most is space for their pages.
    let written = (0..100)
        .take_while(|&number| disk.write_at(&[number as u8 + 1; 4096], number * BLOCK).is_ok())
        .count() as u64;
    assert_eq!(written, 100);
    disk.flush().unwrap();
    // Somebody else takes all that is left.
    let mut rest = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write(&mut rest, &[1; 4096]).is_ok_and(|count| count > 0) {}
    // Of what was kept for the pages of blocks some is left over when they are in place; then it is over.
    let more = (100..128)
        .take_while(|&number| match disk.write_at(&[number as u8 + 1; 4096], number * BLOCK) {
            Ok(()) => true,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                false
            }
        })
        .count() as u64;
    assert!(more < 28, "{more}");
    let written = written + more;
    disk.write_at(&[200; 4096], 3 * BLOCK).unwrap();
    disk.flush().unwrap();
    disk.close().unwrap();
    drop(disk);

    let disk = OpenOptions::new().read_only(true).open(&path).unwrap();
    let mut buf = [0; 4096];
    for number in 0..128 {
        disk.read_at(&mut buf, number * BLOCK).unwrap();
        let byte = if number == 3 { 200 } else { number as u8 + 1 };
        assert_eq!(buf, [if number < written { byte } else { 0 }; 4096], "block {number}");
    }
    drop(disk);

    // Space comes back, and writing goes on.
    drop(rest);
    std::fs::remove_file(&filler).unwrap();
    let disk = OpenOptions::new().open(&path).unwrap();
    disk.write_at(&[9; 4096], 120 * BLOCK).unwrap();
    disk.close().unwrap();
}

/// The same without a close: the file system is full when the image is opened after a kill.
#[test]
fn a_killed_disk_on_a_full_file_system_can_be_read_and_later_written() {
    on_a_small_file_system("open_without_space", "24m");
}

#[test]
#[ignore = "run by another test, on a small file system"]
fn open_without_space() {
    let path = small_image();
    let filler = path.with_file_name("filler");
    let disk = OpenOptions::new().open(&path).unwrap();
    for number in 0..100 {
        disk.write_at(&[number as u8 + 1; 4096], number * BLOCK).unwrap();
    }
    disk.flush().unwrap();
    let mut rest = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write(&mut rest, &[1; 4096]).is_ok_and(|count| count > 0) {}
    drop(disk);
    let check = |disk: &Disk| {
        let mut buf = [0; 4096];
        for number in 0..100 {
            disk.read_at(&mut buf, number * BLOCK).unwrap();
            assert_eq!(buf, [number as u8 + 1; 4096], "block {number}");
        }
    };
    check(&OpenOptions::new().read_only(true).open(&path).unwrap());
    match OpenOptions::new().open(&path) {
        // The reserve that was left behind was enough.
        Ok(disk) => {
            check(&disk);
            disk.close().unwrap();
        }
        Err(error) => assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}"),
    }
    check(&OpenOptions::new().read_only(true).open(&path).unwrap());
    drop(rest);
    std::fs::remove_file(&filler).unwrap();
    let disk = OpenOptions::new().open(&path).unwrap();
    check(&disk);
    disk.write_at(&[9; 4096], 120 * BLOCK).unwrap();
    disk.close().unwrap();
}

/// A file system that promises space which what is below it does not have, as thin volumes do: the lack shows when the kernel writes
/// back. To run it, as root: `cargo test --test no_space -- --ignored --exact space_that_is_missing_at_writeback`.
#[test]
#[ignore = "needs root and a loop device"]
fn space_that_is_missing_at_writeback() {
    on_a_small_file_system("space_is_missing_below", "48m");
}

#[test]
#[ignore = "run by another test, on a small file system"]
fn space_is_missing_below() {
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
    };
    let thin = small_folder();
    let [below, at] = ["below", "at"].map(|name| thin.join(name).to_str().unwrap().to_string());
    std::fs::File::create(&below).unwrap().set_len(256 << 20).unwrap();
    std::fs::create_dir(&at).unwrap();
    run("/sbin/mkfs.ext4", &["-q", "-F", "-O", "^has_journal", &below]);
    run("mount", &["-o", "loop", &below, &at]);
    let result = std::panic::catch_unwind(|| {
        let path = Path::new(&at).join("disk.vhd");
        CreateOptions::new(200 << 20).create(&path).unwrap();
        let disk = OpenOptions::new().open(&path).unwrap();
        for number in 0..4 {
            disk.write_at(&block(number as u8 + 1), number * BLOCK).unwrap();
        }
        disk.flush().unwrap();
        // Somebody else takes the space.
        let filler = thin.join("filler");
        let mut rest = std::fs::File::create(&filler).unwrap();
        while std::io::Write::write(&mut rest, &[1; 4096]).is_ok_and(|count| count > 0) {}
        // The file system takes these, and the flush finds out.
        let mut acknowledged = 4;
        let error = loop {
            let written = disk.write_at(&block(acknowledged as u8 + 1), acknowledged * BLOCK);
            match written.and_then(|()| disk.flush()) {
                Ok(()) => acknowledged += 1,
                Err(error) => break error,
            }
            assert!(acknowledged < 100, "no flush failed");
        };
        println!("{acknowledged} blocks acknowledged, then: {error}");
        assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, 28), "{error}");
        // What is on the medium is not known any more: nothing is acknowledged until it is opened again.
        assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Poisoned);
        drop(disk);
        let blocks: Vec<(u64, u8)> = (0..acknowledged).map(|number| (number, number as u8 + 1)).collect();
        check(&OpenOptions::new().read_only(true).open(&path).unwrap(), &blocks);
        drop(rest);
        std::fs::remove_file(&filler).unwrap();
        let disk = OpenOptions::new().open(&path).unwrap();
        check(&disk, &blocks);
        disk.write_at(&block(99), 90 * BLOCK).unwrap();
        disk.close().unwrap();
        drop(disk);
        let disk = OpenOptions::new().read_only(true).open(&path).unwrap();
        check(&disk, &blocks);
        check(&disk, &[(90, 99)]);
    });
    run("umount", &[&at]);
    assert!(result.is_ok());
}

#[cfg(feature = "sim")]
mod simulated {
    use cowvhd::sim::{Bounds, Fault, FaultPlan, Operation, SimVfs};
    use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions, ZeroMode};
    use std::path::Path;
    use std::sync::Arc;

    const ENOSPC: i32 = 28;
    const BLOCK: u64 = 16 << 10;

    /// The lack of space shows late, at the sync of a flush or at the write of its entry: the guest hears of it, the disk stops, what
    /// was acknowledged is there for readers, and after the next open, when there is space, all goes on. Whatever the kernel has
    /// dropped then.
    #[test]
    fn space_that_is_missing_at_a_flush() {
        let mut met = 0;
        for operation in [Operation::Sync, Operation::DurableWrite] {
            for number in 0..12u64 {
                let vfs = SimVfs::new(number);
                let path = Path::new("/disk.vhd");
                CreateOptions::new(32 * BLOCK)
                    .test_geometry(BLOCK as u32, 128 << 10)
                    .vfs(Arc::new(vfs.clone()))
                    .create(path)
                    .unwrap();
                let options = OpenOptions::new().vfs(Arc::new(vfs.clone()));
                let disk = options.open(path).unwrap();
                vfs.set_faults(FaultPlan::new(Fault::Error(ENOSPC), number, u64::MAX).only(operation));
                let mut acknowledged = 0;
                // Small flushes, full ones, and checkpoints.
                let length = |block: u64| if block.is_multiple_of(3) { BLOCK } else { 512 };
                let buf = |block: u64| vec![block as u8 + 1; length(block) as usize];
                let error = (0..32).find_map(|block| {
                    let written = disk.write_at(&buf(block), block * BLOCK).and_then(|()| {
                        if block % 4 == 3 { disk.discard(block / 2 * BLOCK, 512) } else { Ok(()) }
                    });
                    let flushed = written.and_then(|()| disk.flush());
                    acknowledged = if flushed.is_ok() { block + 1 } else { acknowledged };
                    flushed.err()
                });
                let Some(error) = error else { continue };
                met += 1;
                assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, 28), "{error}");
                drop(disk);
                // Any part of what waits to be written may be lost by now; here, all of it or none.
                for keeps_cache in [true, false] {
                    let judge = |vfs: &SimVfs, disk: &Disk| {
                        for block in 0..acknowledged {
                            let mut found = vec![0xee; length(block) as usize];
                            disk.read_at(&mut found, block * BLOCK).unwrap();
                            let discarded = (0..acknowledged).any(|b| b % 4 == 3 && b / 2 == block);
                            // The discard that was not acknowledged may have happened.
                            let maybe = acknowledged % 4 == 3 && acknowledged / 2 == block;
                            let head = if discarded { 0 } else { block as u8 + 1 };
                            let (first, rest) = found.split_at(512);
                            assert!(first == [head; 512] || (maybe && first == [0; 512]), "block {block}");
                            assert!(rest.iter().all(|&byte| byte == block as u8 + 1), "block {block}");
                        }
                        assert!(vfs.content(path).is_some());
                    };
                    let (vfs, crash) = match keeps_cache {
                        true => (vfs.clone(), None),
                        false => (vfs.clone(), Some(vfs.crash_now())),
                    };
                    let vfs = crash.map_or(vfs, |point| {
                        let mut least = None;
                        point.for_each_state(1, &Bounds::sample(1), |state| {
                            least = Some(state.to_vfs(1));
                            false
                        });
                        least.unwrap()
                    });
                    vfs.set_faults(FaultPlan::default());
                    let options = OpenOptions::new().vfs(Arc::new(vfs.clone()));
                    judge(&vfs, &options.clone().read_only(true).open(path).unwrap());
                    let disk = options.open(path).unwrap();
                    judge(&vfs, &disk);
                    disk.write_at(&[77; 512], 31 * BLOCK).unwrap();
                    disk.close().unwrap();
                }
            }
        }
        assert!(met >= 20, "only {met} of 24 flushes failed");
    }

    /// Whichever operation of a write or zeroing lacks space, once: the guest does not see it. Lacking it for good: the guest
    /// sees it, and the disk goes on.
    #[test]
    fn whichever_operation_lacks_space() {
        for operation in [Operation::Write, Operation::SetLength] {
            for (first, count) in (0..4).flat_map(|first| [(first, 1), (first, u64::MAX)]) {
                for zeroes in [false, true] {
                    let vfs = SimVfs::new(first);
                    let path = Path::new("/disk.vhd");
                    CreateOptions::new(8 * BLOCK)
                        .test_geometry(BLOCK as u32, 128 << 10)
                        .vfs(Arc::new(vfs.clone()))
                        .create(path)
                        .unwrap();
                    let disk = OpenOptions::new().vfs(Arc::new(vfs.clone())).open(path).unwrap();
                    disk.write_at(&[1; 512], 0).unwrap();
                    disk.write_at(&[1; 512], BLOCK).unwrap();
                    disk.flush().unwrap();
                    disk.discard(0, BLOCK).unwrap();
                    vfs.set_faults(FaultPlan::new(Fault::Error(ENOSPC), first, count).only(operation));
                    let result = if zeroes {
                        disk.write_zeroes(2 * BLOCK, BLOCK, ZeroMode::KeepAllocated)
                    } else {
                        disk.write_at(&[2; 1024], 2 * BLOCK)
                    };
                    let met = vfs.injected_faults();
                    vfs.set_faults(FaultPlan::default());
                    match &result {
                        Ok(()) => {}
                        Err(error) => assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}"),
                    }
                    assert!(result.is_ok() || count > 1, "{operation:?} {first}");
                    assert!(first > 0 || met > 0 || operation == Operation::SetLength);
                    let expected = if zeroes || result.is_err() { [0; 512] } else { [2; 512] };
                    for _ in 0..2 {
                        let mut buf = [0xee; 512];
                        disk.read_at(&mut buf, 2 * BLOCK).unwrap();
                        assert_eq!(buf, expected);
                        disk.flush().unwrap();
                    }
                    disk.write_at(&[3; 512], 3 * BLOCK).unwrap();
                    disk.close().unwrap();
                }
            }
        }
    }
}
