//! A disk on the host's file system: create, write, flush, close, open again, and what other states look like.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
use cowvhd::{CreateOptions, Disk, ErrorKind, ExtentKind, OpenOptions, ZeroMode};
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

struct Image {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn image(size: u64) -> Image {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    CreateOptions::new(size).create(&path).unwrap();
    Image { _dir: dir, path }
}

fn open(path: &Path) -> Disk {
    OpenOptions::new().open(path).unwrap()
}

fn read(disk: &Disk, offset: u64, length: usize) -> Vec<u8> {
    let mut buf = vec![0xee; length];
    disk.read_at(&mut buf, offset).unwrap();
    buf
}

#[test]
fn what_was_written_is_there_after_close_and_open() {
    let image = image(10 * MIB + 512);
    let disk = open(&image.path);
    disk.write_at(&[1; 512], 0).unwrap();
    disk.write_at(&[2; 8192], 2 * MIB - 4096).unwrap();
    disk.write_at(&[3; 512], 10 * MIB).unwrap();
    disk.close().unwrap();
    let disk = open(&image.path);
    assert!(disk.notices().is_empty(), "{:?}", disk.notices());
    assert_eq!(read(&disk, 0, 1024), [[1; 512], [0; 512]].concat());
    assert_eq!(read(&disk, 2 * MIB - 4096, 8192), [2; 8192]);
    assert_eq!(read(&disk, 10 * MIB, 512), [3; 512]);
    assert!(read(&disk, 4 * MIB, 1 << 20).iter().all(|&b| b == 0));
}

#[test]
fn a_disk_dropped_without_close_is_recovered_and_reads_the_same_before() {
    let image = image(64 * MIB);
    let disk = open(&image.path);
    for block in 0..20 {
        disk.write_at(&[block as u8 + 1; 4096], block * 3 * MIB).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    for read_only in [true, false] {
        let disk = OpenOptions::new().read_only(read_only).open(&image.path).unwrap();
        assert_eq!(disk.notices().len(), 1, "{:?}", disk.notices());
        for block in 0..20 {
            assert_eq!(read(&disk, block * 3 * MIB, 4096), [block as u8 + 1; 4096], "{block} {read_only}");
        }
    }
}

#[test]
fn accesses_that_do_not_fit_are_refused() {
    let image = image(MIB);
    let disk = open(&image.path);
    for (offset, length) in [(MIB, 512), (MIB - 512, 1024), (u64::MAX - 511, 512), (u64::MAX, 512)] {
        assert_eq!(disk.write_at(&vec![0; length], offset).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(disk.read_at(&mut vec![0; length], offset).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
    assert_eq!(disk.write_at(&[0; 100], 0).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(disk.write_at(&[0; 512], 100).unwrap_err().kind(), ErrorKind::InvalidInput);
    disk.read_at(&mut [0; 100], 77).unwrap();
    disk.read_at(&mut [], MIB).unwrap();
}

#[test]
fn zeroes_and_discard_read_as_zeros_and_give_space_back() {
    let image = image(16 * MIB);
    let disk = open(&image.path);
    disk.write_at(&vec![7; 8 << 20], 0).unwrap();
    disk.write_zeroes(512, 1024, ZeroMode::MayPunch).unwrap();
    disk.write_zeroes(2 * MIB, 2 * MIB, ZeroMode::KeepAllocated).unwrap();
    disk.discard(4 * MIB, 4 * MIB).unwrap();
    assert_eq!(read(&disk, 0, 2048), [vec![7; 512], vec![0; 1024], vec![7; 512]].concat());
    assert!(read(&disk, 2 * MIB, 6 << 20).iter().all(|&b| b == 0));
    let kinds: Vec<_> =
        disk.extents(0, 16 * MIB).unwrap().iter().map(|e| (e.offset, e.length, e.kind)).collect();
    assert_eq!(kinds, [(0, 4 * MIB, ExtentKind::Data), (4 * MIB, 12 * MIB, ExtentKind::Hole)]);
    disk.close().unwrap();
    let length = std::fs::metadata(&image.path).unwrap().len();
    assert_eq!(length, 7 * MIB + 2 * (2 * MIB + 4096) + 512);
    let disk = open(&image.path);
    assert!(read(&disk, 2 * MIB, 6 << 20).iter().all(|&b| b == 0));
}

#[test]
fn a_second_opener_is_turned_away_and_a_read_only_disk_takes_no_writes() {
    let image = image(MIB);
    let disk = open(&image.path);
    assert_eq!(OpenOptions::new().open(&image.path).unwrap_err().kind(), ErrorKind::InUse);
    assert_eq!(OpenOptions::new().read_only(true).open(&image.path).unwrap_err().kind(), ErrorKind::InUse);
    disk.close().unwrap();
    drop(disk);
    let before = std::fs::read(&image.path).unwrap();
    let disk = OpenOptions::new().read_only(true).open(&image.path).unwrap();
    assert_eq!(disk.write_at(&[0; 512], 0).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(disk.discard(0, 512).unwrap_err().kind(), ErrorKind::ReadOnly);
    disk.flush().unwrap();
    disk.close().unwrap();
    assert!(before == std::fs::read(&image.path).unwrap());
    assert_eq!(CreateOptions::new(MIB).create(&image.path).unwrap_err().kind(), ErrorKind::Exists);
}

#[test]
fn a_closed_disk_takes_no_writes_and_close_is_idempotent() {
    let image = image(4 * MIB);
    let disk = open(&image.path);
    disk.write_at(&[1; 512], 0).unwrap();
    disk.close().unwrap();
    let closed = std::fs::read(&image.path).unwrap();
    assert!(disk.write_at(&[2; 512], 0).is_err());
    assert!(disk.write_at(&[2; 512], 2 * MIB).is_err());
    assert!(disk.discard(0, 2 * MIB).is_err());
    disk.flush().unwrap();
    disk.close().unwrap();
    assert!(closed == std::fs::read(&image.path).unwrap());
}

#[test]
fn sizes_that_cannot_be_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    for (size, reason) in
        [(0, "multiple of 512"), (1000, "multiple of 512"), ((2040 << 30) + 512, "2040 GiB")]
    {
        let error = CreateOptions::new(size).create(&dir.path().join("x.vhd")).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing half made stays behind");
}
