//! Which structures describe a file, where a guest or another program has had a hand in them.
//!
//! A guest of a fixed disk writes whatever it likes to its first sectors, a complete VHD among other things; the disk was
//! taken for the dynamic one that those sectors describe, and cut to its length. So what a guest can write decides nothing:
//! the last sector of the file says whether a disk is fixed, and in a dynamic one that sector is never the guest's.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cowvhd::vhd::{DiskType, Footer, Timestamp, UniqueId};
use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions, Result};
use std::fs;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

struct Image {
    dir: tempfile::TempDir,
    path: PathBuf,
}

/// A closed image of 64 MiB with something in its first block.
fn image() -> Image {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    CreateOptions::new(64 * MIB).create(&path).unwrap();
    let disk = open(&path).unwrap();
    disk.write_at(&[1; 4096], 0).unwrap();
    disk.close().unwrap();
    Image { dir, path }
}

fn open(path: &Path) -> Result<Disk> {
    OpenOptions::new().open(path)
}

fn open_read_only(path: &Path) -> Result<Disk> {
    OpenOptions::new().read_only(true).open(path)
}

fn fixed_footer(size: u64) -> Footer {
    Footer::new(DiskType::Fixed, size, UniqueId::from_bytes([7; 16]), Timestamp(1))
}

fn first_sectors(disk: &Disk) -> Vec<u8> {
    let mut buf = vec![0xee; 4096];
    disk.read_at(&mut buf, 0).unwrap();
    buf
}

/// Changes a footer in the file, with the right checksum.
fn change_footer(bytes: &mut [u8], at: usize, change: impl FnOnce(&mut Footer)) {
    let mut footer = Footer::parse(&bytes[at..at + 512]).unwrap();
    change(&mut footer);
    bytes[at..at + 512].copy_from_slice(&footer.to_bytes());
}

#[test]
fn a_fixed_disk_whose_guest_wrote_a_vhd_to_its_start_is_not_taken_for_it() {
    let image = image();
    let clean = fs::read(&image.path).unwrap();
    let disk = open(&image.path).unwrap();
    disk.write_at(&[2; 512], 0).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let dirty = fs::read(&image.path).unwrap();
    for inner in [clean, dirty] {
        let size = 16 * MIB;
        let mut bytes = inner;
        bytes.resize(size as usize, 0);
        bytes.extend(fixed_footer(size).to_bytes());
        let path = image.dir.path().join("fixed.vhd");
        fs::write(&path, &bytes).unwrap();
        for read_only in [true, false] {
            let disk = OpenOptions::new().read_only(read_only).open(&path).unwrap();
            assert_eq!(disk.size(), size);
            assert!(first_sectors(&disk) == bytes[..4096]);
            disk.close().unwrap();
        }
        assert!(fs::read(&path).unwrap() == bytes, "the file was changed");
    }
}

#[test]
fn a_guest_of_a_dynamic_disk_cannot_make_it_look_fixed_after_a_crash() {
    let image = image();
    for (block, leave) in (1..12u64).zip([false, true].into_iter().cycle()) {
        let disk = open(&image.path).unwrap();
        disk.write_at(&[9; 512], block * 2 * MIB).unwrap();
        // A footer in every sector of the block, right for any place at which the file may end in it.
        let file_bytes = fs::metadata(&image.path).unwrap().len();
        let footers: Vec<u8> = (0..4096)
            .flat_map(|i| {
                let end = if leave { file_bytes } else { file_bytes - 2 * MIB + 512 * (i + 1) };
                fixed_footer(end - 512).to_bytes()
            })
            .collect();
        disk.write_at(&footers, block * 2 * MIB).unwrap();
        disk.flush().unwrap();
        drop(disk);
        let bytes = fs::read(&image.path).unwrap();
        assert!(Footer::parse(&bytes[bytes.len() - 512..]).is_err(), "block {block}");
        let disk = open_read_only(&image.path).unwrap();
        assert_eq!(disk.size(), 64 * MIB);
        let disk_read = first_sectors(&disk);
        assert!(disk_read == [1; 4096]);
    }
    let disk = open(&image.path).unwrap();
    disk.close().unwrap();
    let bytes = fs::read(&image.path).unwrap();
    assert!(bytes[bytes.len() - 512..] == bytes[..512]);
    assert_eq!(open(&image.path).unwrap().size(), 64 * MIB);
}

#[test]
fn footers_that_differ_are_reported_and_writing_waits() {
    let image = image();
    let good = fs::read(&image.path).unwrap();
    let end = good.len() - 512;
    // (at which footer, what is changed, the size that then counts)
    type Change = fn(&mut Footer);
    let cases: [(usize, Change, &str, u64); 4] = [
        (end, |footer| footer.saved_state = 1, "saved state", 64 * MIB),
        (end, |footer| footer.unique_id = UniqueId::from_bytes([9; 16]), "unique id", 64 * MIB),
        // The table has no entries for 80 MiB: the file is not built as this footer says.
        (0, |footer| footer.current_size = 80 * MIB, "current size", 64 * MIB),
        (end, |footer| *footer = fixed_footer(80 * MIB), "disk type", 64 * MIB),
    ];
    for (at, change, field, size) in cases {
        let mut bytes = good.clone();
        change_footer(&mut bytes, at, change);
        fs::write(&image.path, &bytes).unwrap();
        let disk = open_read_only(&image.path).unwrap();
        assert_eq!(disk.size(), size, "{field}");
        assert!(first_sectors(&disk) == [1; 4096]);
        let notices = disk.notices().join("\n");
        assert!(notices.contains("footers") && notices.contains(field), "{notices}");
        drop(disk);
        let error = open(&image.path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        let text = error.to_string();
        assert!(text.contains(field) && text.contains("read-only"), "{text}");
        assert!(fs::read(&image.path).unwrap() == bytes, "the file was changed: {field}");
    }
}

#[test]
fn a_lost_footer_copy_is_made_up_for_by_the_footer_at_the_end() {
    let image = image();
    let mut bytes = fs::read(&image.path).unwrap();
    bytes[..512].fill(0xaa);
    // Without a backup of ours, as in an image made elsewhere.
    bytes[4096..16384].fill(0);
    fs::write(&image.path, &bytes).unwrap();
    let disk = open_read_only(&image.path).unwrap();
    assert!(first_sectors(&disk) == [1; 4096]);
    assert!(disk.notices().join("\n").contains("damaged"), "{:?}", disk.notices());
    drop(disk);
    assert!(open(&image.path).is_err());
    assert!(fs::read(&image.path).unwrap() == bytes, "the file was changed");
}

#[test]
fn the_dynamic_header_is_where_the_footer_says() {
    let image = image();
    let mut good = fs::read(&image.path).unwrap();
    let end = good.len() - 512;
    // No backup that could stand in.
    good[12288..16384].fill(0);
    let mut bytes = good.clone();
    for at in [0, end] {
        change_footer(&mut bytes, at, |footer| footer.data_offset = 65536);
    }
    // At 512 the old header stays, valid and out of date; without a header at 65536 it must not count.
    fs::write(&image.path, &bytes).unwrap();
    let error = open_read_only(&image.path).unwrap_err().to_string();
    assert!(error.contains("65536") && error.contains("cookie"), "{error}");

    bytes.copy_within(512..1536, 65536);
    bytes[512..1536].fill(0xaa);
    fs::write(&image.path, &bytes).unwrap();
    assert!(first_sectors(&open_read_only(&image.path).unwrap()) == [1; 4096]);
    let error = open(&image.path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("65536"), "{error}");
    assert!(fs::read(&image.path).unwrap() == bytes, "the file was changed");

    for place in [0, 100, u64::from(u32::MAX), u64::MAX - 1023, u64::MAX] {
        let mut bytes = good.clone();
        for at in [0, end] {
            change_footer(&mut bytes, at, |footer| footer.data_offset = place);
        }
        fs::write(&image.path, &bytes).unwrap();
        assert_eq!(open_read_only(&image.path).unwrap_err().kind(), ErrorKind::Corrupt, "{place}");
    }
}

/// A closed image is changed by another program, which keeps no backup; then the start of the file is lost.
#[test]
fn a_backup_older_than_another_programs_change_is_not_written_over_it() {
    let image = image();
    let good = fs::read(&image.path).unwrap();
    let end = good.len() - 512;
    let mut bytes = good.clone();
    bytes[..4096].fill(0xaa);
    // The backup is as the close left it, and so is the rest: nothing is lost.
    fs::write(&image.path, &bytes).unwrap();
    let disk = open(&image.path).unwrap();
    assert!(first_sectors(&disk) == [1; 4096]);
    disk.close().unwrap();
    drop(disk);
    assert!(fs::read(&image.path).unwrap()[..1536] == good[..1536]);

    // The disk has grown by a block.
    change_footer(&mut bytes, end, |footer| footer.current_size += 2 * MIB);
    fs::write(&image.path, &bytes).unwrap();
    let disk = open_read_only(&image.path).unwrap();
    assert!(first_sectors(&disk) == [1; 4096]);
    assert!(disk.notices().join("\n").contains("out of date"), "{:?}", disk.notices());
    drop(disk);
    let error = open(&image.path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("current size"), "{error}");
    assert!(fs::read(&image.path).unwrap() == bytes, "the file was changed");
}

/// As QEMU does it: the footers and the header stay as they are.
#[test]
fn a_block_added_before_the_start_was_lost_is_kept() {
    let image = image();
    let mut bytes = fs::read(&image.path).unwrap();
    let end = bytes.len() - 512;
    let footer = bytes.split_off(end);
    bytes.extend([0xff; 512]);
    bytes.extend(vec![0x55; 2 << 20]);
    bytes.extend(footer);
    let table = 3 << 20;
    bytes[table + 20..table + 24].copy_from_slice(&((end / 512) as u32).to_be_bytes());
    bytes[..4096].fill(0xaa);
    fs::write(&image.path, &bytes).unwrap();
    for read_only in [true, false] {
        let disk = OpenOptions::new().read_only(read_only).open(&image.path).unwrap();
        let mut buf = [0; 512];
        disk.read_at(&mut buf, 10 * MIB).unwrap();
        assert_eq!(buf, [0x55; 512]);
        assert!(first_sectors(&disk) == [1; 4096]);
        assert!(disk.notices().join("\n").contains("another program"), "{:?}", disk.notices());
        disk.close().unwrap();
    }
}

/// A block of another program that lies on our grid, at the very place of a slot, has no header.
#[test]
fn a_block_on_the_grid_added_before_the_start_was_lost_is_kept() {
    let image = image();
    let mut bytes = fs::read(&image.path).unwrap();
    let end = bytes.len() - 512;
    let footer = bytes.split_off(end);
    bytes.resize(end + 4096 - 512, 0);
    let entry = (bytes.len() / 512) as u32;
    bytes.extend([0xff; 512]);
    bytes.extend(vec![0x55; 2 << 20]);
    bytes.extend(footer);
    let table = 3 << 20;
    bytes[table + 20..table + 24].copy_from_slice(&entry.to_be_bytes());
    bytes[..4096].fill(0xaa);
    fs::write(&image.path, &bytes).unwrap();
    for read_only in [true, false, false] {
        let disk = OpenOptions::new().read_only(read_only).open(&image.path).unwrap();
        let mut buf = [0; 512];
        disk.read_at(&mut buf, 10 * MIB).unwrap();
        assert_eq!(buf, [0x55; 512]);
        disk.close().unwrap();
    }
}
