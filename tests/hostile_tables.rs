//! A sparse file of a few KiB on the medium claims a block table of 16 GiB: it was read whole, zeros and all.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cowvhd::check::{Consent, Severity, check, plan};
use cowvhd::vfs::HostVfs;
use cowvhd::vhd::{DiskType, DynamicHeader, Footer, MAX_DYNAMIC_SIZE, Timestamp, UniqueId, bat_bytes};
use cowvhd::{ErrorKind, OpenOptions};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// The most memory this process has had, in KiB.
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn memory_grows_with_what_the_file_holds() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    let before = peak_memory();
    // (size of the disk, block size, entries, whether it can be opened)
    let cases = [
        (MAX_DYNAMIC_SIZE, 512, (MAX_DYNAMIC_SIZE / 512) as u32, false),
        (MAX_DYNAMIC_SIZE, 4096, u32::MAX, false),
        // A table larger than the disk needs is room to grow, and means nothing.
        (64 << 20, 2 << 20, u32::MAX, true),
        (2 << 20, 2 << 20, 1 << 30, true),
    ];
    for (size, block_size, entries, opens) in cases {
        let mut footer = Footer::new(DiskType::Dynamic, size, UniqueId::from_bytes([3; 16]), Timestamp(1));
        footer.data_offset = 512;
        let header = DynamicHeader::new(1536, entries, block_size);
        let end = (1536 + bat_bytes(entries)).next_multiple_of(512);
        let file = File::create(&path).unwrap();
        file.set_len(end + 512).unwrap();
        for (bytes, at) in [(&footer.to_bytes()[..], 0), (&header.to_bytes(), 512), (&footer.to_bytes(), end)]
        {
            file.write_all_at(bytes, at).unwrap();
        }
        file.write_all_at(&[0xff; 4096], 1536).unwrap();
        let result = OpenOptions::new().read_only(true).open(&path);
        match result {
            Ok(disk) => {
                assert!(opens);
                let mut buf = [0xee; 4096];
                disk.read_at(&mut buf, size - 4096).unwrap();
                assert_eq!(buf, [0; 4096]);
            }
            Err(error) => {
                assert!(!opens, "{error}");
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            }
        }
        // Nor does a check, or the plan of a repair.
        let report = check(Arc::new(HostVfs), &path).unwrap();
        assert_eq!(report.worst() > Some(Severity::Leak), !opens, "{:?}", report.findings());
        drop(plan(Arc::new(HostVfs), &path, Consent::All).unwrap());
    }
    let grown = peak_memory() - before;
    assert!(grown < 128 << 10, "{grown} KiB");
}

/// The largest legal disk: its table is there, and takes the memory that it takes.
#[test]
fn the_largest_disk_opens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    cowvhd::CreateOptions::new(MAX_DYNAMIC_SIZE).create(&path).unwrap();
    for read_only in [true, false] {
        let disk = OpenOptions::new().read_only(read_only).open(&path).unwrap();
        assert_eq!(disk.size(), MAX_DYNAMIC_SIZE);
        if !read_only {
            disk.write_at(&[1; 512], MAX_DYNAMIC_SIZE - 512).unwrap();
        }
        disk.close().unwrap();
    }
}

/// One entry near 2 TiB in an image of small blocks leaves hundreds of millions of free slots below it: each of them was
/// kept in memory.
#[cfg(feature = "sim")]
#[test]
fn free_slots_take_bounded_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    let before = peak_memory();
    cowvhd::CreateOptions::new(1 << 20).test_geometry(4096, 128 << 10).create(&path).unwrap();
    let disk = OpenOptions::new().open(&path).unwrap();
    disk.write_at(&[1; 4096], 0).unwrap();
    disk.flush().unwrap();
    disk.close().unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    // The first block's entry, moved by a whole number of slots.
    let table = 1 << 20;
    let mut entry = [0; 4];
    file.read_exact_at(&mut entry, table).unwrap();
    let far = u32::from_be_bytes(entry) + 16 * 250_000_000;
    file.write_all_at(&far.to_be_bytes(), table).unwrap();
    let mut footer = [0; 512];
    file.read_exact_at(&mut footer, 0).unwrap();
    file.write_all_at(&footer, (u64::from(far) * 512 + 8192).next_multiple_of(512)).unwrap();
    let disk = OpenOptions::new().open(&path).unwrap();
    disk.write_at(&[2; 4096], 8192).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let grown = peak_memory() - before;
    assert!(grown < 128 << 10, "{grown} KiB");
}
