//! Fixed disks: the guest's bytes in order and a footer. What is written goes straight into the file, the footer is never
//! touched, and nothing that a guest writes can make the file into something else.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/qemu.rs"]
mod qemu;
#[path = "support/strict_vhd.rs"]
mod strict_vhd;

use cowvhd::vhd::{DiskType, Footer};
use cowvhd::{CreateOptions, Disk, DiskInfo, ErrorKind, ExtentKind, JournalState, OpenOptions, ZeroMode};
use qemu::qemu_img;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use strict_vhd::StrictVhd;

const MIB: u64 = 1 << 20;

struct Image {
    dir: tempfile::TempDir,
    path: PathBuf,
}

fn image(size: u64) -> Image {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    CreateOptions::new(size).fixed().create(&path).unwrap();
    Image { dir, path }
}

fn open(path: &Path) -> Disk {
    OpenOptions::new().open(path).unwrap()
}

#[test]
fn a_new_disk_is_sparse_and_what_is_written_stands_where_it_belongs() {
    let image = image(10 * MIB + 512);
    let metadata = fs::metadata(&image.path).unwrap();
    assert_eq!(metadata.len(), 10 * MIB + 1024);
    assert!(metadata.blocks() * 512 < MIB);
    assert_eq!(fs::read_dir(image.dir.path()).unwrap().count(), 1);
    let footer = fs::read(&image.path).unwrap().split_off(10 * (MIB as usize) + 512);

    let disk = open(&image.path);
    assert!(disk.notices().is_empty());
    assert_eq!((disk.size(), disk.disk_type()), (10 * MIB + 512, DiskType::Fixed));
    disk.write_at(&[1; 4096], 512).unwrap();
    disk.write_at(&[2; 512], 10 * MIB).unwrap();
    disk.flush().unwrap();
    disk.close().unwrap();
    disk.close().unwrap();
    disk.flush().unwrap();
    assert!(disk.write_at(&[3; 512], 0).is_err());
    assert!(disk.read_at(&mut [0; 512], 0).is_err());

    let content = fs::read(&image.path).unwrap();
    let mut expected = vec![0; (10 * MIB) as usize];
    expected[512..4608].fill(1);
    expected.extend([2; 512]);
    expected.extend(footer);
    assert!(content == expected);
    assert_eq!(StrictVhd::from_bytes(&content).unwrap().kind(), strict_vhd::Kind::Fixed);
    let info = DiskInfo::read(&image.path).unwrap();
    assert_eq!((info.disk_type, info.virtual_size), (DiskType::Fixed, 10 * MIB + 512));
    assert_eq!((info.block_bytes, info.journal), (None, JournalState::None));
}

#[test]
fn zeroes_and_discard_give_space_back_and_leave_the_footer() {
    let size = 4 * MIB + 512;
    let image = image(size);
    let disk = open(&image.path);
    disk.write_at(&vec![7; size as usize], 0).unwrap();
    disk.flush().unwrap();
    let full = fs::metadata(&image.path).unwrap().blocks();
    disk.discard(MIB, 3 * MIB + 512).unwrap();
    disk.write_zeroes(0, 4096, ZeroMode::KeepAllocated).unwrap();
    disk.write_zeroes(8192 - 512, 1024, ZeroMode::MayPunch).unwrap();
    disk.discard(0, 0).unwrap();
    disk.flush().unwrap();
    assert!(fs::metadata(&image.path).unwrap().blocks() <= full - 5 * MIB / 2 / 512);
    let extents = disk.extents(0, size).unwrap();
    assert_eq!(extents.iter().map(|e| e.length).sum::<u64>(), size);
    assert_eq!((extents[0].offset, extents[0].kind), (0, ExtentKind::Data));
    assert!(extents.iter().any(|e| e.kind == ExtentKind::Hole && e.length >= 3 * MIB - 8192), "{extents:?}");
    for extent in disk.map(4096, MIB).unwrap() {
        assert_eq!(extent.file_offset, Some(extent.extent.offset));
    }
    disk.close().unwrap();

    let mut expected = vec![7; size as usize];
    expected[..4096].fill(0);
    expected[8192 - 512..8192 + 512].fill(0);
    expected[MIB as usize..].fill(0);
    let content = fs::read(&image.path).unwrap();
    assert!(content[..size as usize] == expected);
    StrictVhd::from_bytes(&content).unwrap();
}

/// A guest owns everything but the last sector. It may copy a whole VHD onto its disk, dirty or not.
#[test]
fn what_a_guest_writes_never_counts_as_structure() {
    let size = 16 * MIB;
    let image = image(size);
    let other = image.dir.path().join("other.vhd");
    CreateOptions::new(4 * MIB).create(&other).unwrap();
    for dirty in [false, true] {
        let inner = open(&other);
        inner.write_at(&[9; 4096], 0).unwrap();
        inner.flush().unwrap();
        if !dirty {
            inner.close().unwrap();
        }
        drop(inner);
        let bytes = fs::read(&other).unwrap();
        let disk = open(&image.path);
        disk.write_at(&bytes, 0).unwrap();
        let end = bytes.len() as u64;
        disk.write_at(&bytes[..512], size - 512).unwrap();
        disk.close().unwrap();
        drop(disk);
        for read_only in [true, false] {
            let disk = OpenOptions::new().read_only(read_only).open(&image.path).unwrap();
            assert_eq!((disk.size(), disk.disk_type()), (size, DiskType::Fixed));
            let mut found = vec![0; end as usize];
            disk.read_at(&mut found, 0).unwrap();
            assert!(found == bytes);
        }
        assert_eq!(DiskInfo::read(&image.path).unwrap().virtual_size, size);
    }
}

#[test]
fn locks_and_read_only_are_as_for_any_disk() {
    let image = image(MIB);
    let disk = open(&image.path);
    for read_only in [true, false] {
        let error = OpenOptions::new().read_only(read_only).open(&image.path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse);
        assert!(error.to_string().contains(&format!("pid {}", std::process::id())), "{error}");
    }
    assert!(DiskInfo::read(&image.path).unwrap().holder.is_some());
    disk.close().unwrap();
    assert_eq!(DiskInfo::read(&image.path).unwrap().holder, None);
    let disk = OpenOptions::new().read_only(true).open(&image.path).unwrap();
    assert_eq!(disk.write_at(&[0; 512], 0).unwrap_err().kind(), ErrorKind::ReadOnly);
    disk.flush().unwrap();
    disk.close().unwrap();
    assert_eq!(CreateOptions::new(MIB).fixed().create(&image.path).unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(fs::read_dir(image.dir.path()).unwrap().count(), 1);
}

#[test]
fn sizes_beyond_a_block_table_are_fine_and_impossible_ones_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for size in [0, 1000, u64::MAX - 511, 1 << 63] {
        let error = CreateOptions::new(size).fixed().create(&dir.path().join("x.vhd")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    // More than a dynamic disk holds, less than ext4's longest file.
    let path = dir.path().join("large.vhd");
    CreateOptions::new(3 << 40).fixed().create(&path).unwrap();
    let disk = open(&path);
    disk.write_at(&[5; 512], (3 << 40) - 512).unwrap();
    assert_eq!(disk.extents(0, 3 << 40).unwrap()[0].kind, ExtentKind::Hole);
    disk.close().unwrap();
}

/// Products before Virtual PC 2004 left the last byte of the footer out.
#[test]
fn a_footer_of_511_bytes_is_read_and_completed_by_the_first_open_for_writing() {
    let image = image(MIB);
    let whole = fs::read(&image.path).unwrap();
    fs::OpenOptions::new().write(true).open(&image.path).unwrap().set_len(MIB + 511).unwrap();
    let disk = OpenOptions::new().read_only(true).open(&image.path).unwrap();
    assert_eq!(disk.size(), MIB);
    drop(disk);
    assert_eq!(fs::metadata(&image.path).unwrap().len(), MIB + 511);
    open(&image.path).close().unwrap();
    assert!(fs::read(&image.path).unwrap() == whole);
}

#[test]
fn disks_go_both_ways_between_here_and_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let name = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (raw, theirs, ours, back) = (name("raw"), name("theirs.vhd"), name("ours.vhd"), name("back"));
    let mut content: Vec<u8> = (0..MIB as u32).flat_map(|i| (i / 100).to_le_bytes()).collect();
    content.truncate(3 * MIB as usize);
    fs::write(&raw, &content).unwrap();

    qemu_img(&["convert", "-f", "raw", "-O", "vpc", "-o", "subformat=fixed,force_size", &raw, &theirs]);
    let disk = open(Path::new(&theirs));
    let mut found = vec![0; content.len()];
    assert_eq!(disk.size(), content.len() as u64);
    disk.read_at(&mut found, 0).unwrap();
    assert!(found == content);
    disk.write_at(&[0xaa; 1024], MIB).unwrap();
    disk.close().unwrap();
    content[MIB as usize..][..1024].fill(0xaa);

    CreateOptions::new(3 * MIB).fixed().create(Path::new(&ours)).unwrap();
    let disk = open(Path::new(&ours));
    disk.write_at(&content, 0).unwrap();
    disk.close().unwrap();
    for vhd in [&theirs, &ours] {
        qemu_img(&["convert", "-f", "vpc", "-O", "raw", vhd, &back]);
        assert!(fs::read(&back).unwrap() == content, "{vhd}");
    }
}

#[test]
fn a_footer_that_does_not_fit_the_file_is_named() {
    let image = image(MIB);
    let mut footer = [0; 512];
    let file = fs::OpenOptions::new().read(true).write(true).open(&image.path).unwrap();
    file.read_exact_at(&mut footer, MIB).unwrap();
    let footer = Footer::parse(&footer).unwrap();
    file.set_len(2 * MIB).unwrap();
    file.write_all_at(&footer.to_bytes(), 2 * MIB).unwrap();
    assert_eq!(OpenOptions::new().open(&image.path).unwrap_err().kind(), ErrorKind::Corrupt);
}
