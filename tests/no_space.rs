//! The host's file system is full, and blocks that the guest has discarded still occupy it.
//!
//! Only an extension of the file that failed made the engine bring freed blocks back. But files grow sparsely: it is the write
//! of the data that meets the lack of space, and that went to the guest as ENOSPC with gigabytes waiting to be punched.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/small_file_system.rs"]
mod small_file_system;

use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions};
use small_file_system::{on_a_small_file_system, small_folder};

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

#[cfg(feature = "sim")]
mod simulated {
    use cowvhd::sim::{Fault, FaultPlan, Operation, SimVfs};
    use cowvhd::{CreateOptions, ErrorKind, OpenOptions, ZeroMode};
    use std::path::Path;
    use std::sync::Arc;

    const ENOSPC: i32 = 28;
    const BLOCK: u64 = 16 << 10;

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
