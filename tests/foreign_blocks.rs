//! QEMU adds blocks to an image between two sessions of ours, wherever it likes.
//!
//! It appends them without a block page, over the footer, which it writes again behind; the first block of an empty image lands
//! right behind the block table, in the rest of the table's own page. What went wrong: that image did not open at all; after a
//! discard of such a block and a crash the journal was taken for damaged; and once such a block was gone, the next block
//! in its place showed the guest an old footer (`conectix…`) that nobody had written.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/qemu.rs"]
mod qemu;

use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions};
use qemu::qemu_io;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
const TABLE: u64 = 3 * MIB;
const ORIGIN: u64 = 7 * MIB;

struct Image {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn empty_image() -> Image {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    CreateOptions::new(64 * MIB).create(&path).unwrap();
    Image { _dir: dir, path }
}

fn open(path: &Path) -> Disk {
    OpenOptions::new().open(path).unwrap()
}

fn read(disk: &Disk, offset: u64, length: u64) -> Vec<u8> {
    let mut buf = vec![0xee; length as usize];
    disk.read_at(&mut buf, offset).unwrap();
    buf
}

/// Every block's first 4 KiB hold the byte given, all else zeros.
fn check(disk: &Disk, blocks: &[(u64, u8)]) {
    check_bytes(disk, 4096, blocks);
}

/// Every block's first `length` bytes hold the byte given, all else zeros.
fn check_bytes(disk: &Disk, length: u64, blocks: &[(u64, u8)]) {
    for block in 0..disk.size() / BLOCK {
        let byte = blocks.iter().find(|(b, _)| *b == block).map_or(0, |(_, byte)| *byte);
        let found = read(disk, block * BLOCK, BLOCK);
        let wrong = (0..).zip(&found).find(|&(at, &found)| found != if at < length { byte } else { 0 });
        assert_eq!(wrong, None, "block {block}");
    }
}

fn qemu_writes(path: &Path, length: u64, blocks: &[(u64, u8)]) {
    let write = |(block, byte): &(u64, u8)| format!("write -P {byte} {} {length}", block * BLOCK);
    qemu_io(path, &blocks.iter().map(write).collect::<Vec<_>>());
}

fn qemu_agrees(path: &Path, blocks: &[(u64, u8)]) {
    let commands: Vec<String> =
        blocks.iter().map(|(block, byte)| format!("read -P {byte} {} 4096", block * BLOCK)).collect();
    qemu_io(path, &commands);
}

/// File offset at which a block starts.
fn place(path: &Path, block: u64) -> u64 {
    let mut entry = [0; 4];
    fs::File::open(path).unwrap().read_exact_at(&mut entry, TABLE + 4 * block).unwrap();
    u64::from(u32::from_be_bytes(entry)) * 512
}

#[test]
fn the_first_block_that_qemu_adds_to_an_empty_image() {
    let image = empty_image();
    qemu_writes(&image.path, 4096, &[(3, 85)]);
    assert_eq!(place(&image.path, 3), TABLE + 512, "QEMU places it behind the table");

    let before = fs::read(&image.path).unwrap();
    let disk = OpenOptions::new().read_only(true).open(&image.path).unwrap();
    check(&disk, &[(3, 85)]);
    drop(disk);
    assert!(fs::read(&image.path).unwrap() == before);

    let disk = open(&image.path);
    check(&disk, &[(3, 85)]);
    disk.write_at(&[1; 4096], 0).unwrap();
    disk.write_at(&[2; 4096], 3 * BLOCK).unwrap();
    disk.flush().unwrap();
    drop(disk);
    // After a crash.
    for read_only in [true, false] {
        let disk = OpenOptions::new().read_only(read_only).open(&image.path).unwrap();
        check(&disk, &[(0, 1), (3, 2)]);
    }
    let disk = open(&image.path);
    disk.close().unwrap();
    qemu_agrees(&image.path, &[(0, 1), (3, 2), (5, 0)]);
    let disk = open(&image.path);
    disk.discard(3 * BLOCK, BLOCK).unwrap();
    check(&disk, &[(0, 1)]);
    disk.close().unwrap();
    qemu_agrees(&image.path, &[(0, 1), (3, 0), (5, 0)]);
}

#[test]
fn blocks_of_qemu_fill_the_room_behind_the_table_and_reach_into_the_slots() {
    // QEMU does not clear what stood in a new block either; so it writes whole ones here.
    let image = empty_image();
    let foreign = [(9, 11), (3, 12), (17, 13), (4, 14)];
    qemu_writes(&image.path, BLOCK, &foreign);
    assert!(place(&image.path, 3) < ORIGIN && place(&image.path, 3) + BLOCK > ORIGIN);
    let disk = open(&image.path);
    check_bytes(&disk, BLOCK, &foreign);
    // New blocks beside them.
    disk.write_at(&[21; BLOCK as usize], 20 * BLOCK).unwrap();
    disk.write_at(&[22; BLOCK as usize], 21 * BLOCK).unwrap();
    disk.flush().unwrap();
    disk.discard(3 * BLOCK, BLOCK).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let blocks = [(9, 11), (17, 13), (4, 14), (20, 21), (21, 22)];
    let disk = open(&image.path);
    check_bytes(&disk, BLOCK, &blocks);
    disk.close().unwrap();
    qemu_agrees(&image.path, &blocks);
    // And in turns.
    qemu_writes(&image.path, BLOCK, &[(6, 31), (7, 32)]);
    let disk = open(&image.path);
    disk.discard(17 * BLOCK, BLOCK).unwrap();
    disk.write_at(&[33; BLOCK as usize], 8 * BLOCK).unwrap();
    let blocks = [(9, 11), (4, 14), (20, 21), (21, 22), (6, 31), (7, 32), (8, 33)];
    check_bytes(&disk, BLOCK, &blocks);
    disk.close().unwrap();
    qemu_agrees(&image.path, &blocks);
    check_bytes(&open(&image.path), BLOCK, &blocks);
}

#[test]
fn a_block_of_qemu_is_discarded_and_the_power_fails() {
    let image = empty_image();
    let disk = open(&image.path);
    disk.write_at(&[1; 4096], 0).unwrap();
    disk.close().unwrap();
    drop(disk);
    qemu_writes(&image.path, 4096, &[(5, 85)]);
    let disk = open(&image.path);
    disk.discard(5 * BLOCK, BLOCK).unwrap();
    disk.flush().unwrap();
    drop(disk);
    for read_only in [true, false] {
        let disk = OpenOptions::new().read_only(read_only).open(&image.path).unwrap();
        check(&disk, &[(0, 1)]);
    }
}

#[test]
fn where_a_block_of_qemu_was_a_new_one_reads_as_zeros() {
    // The footer behind QEMU's block lies in the middle of a slot of ours. It comes to light in that slot's next block: in
    // the session that freed QEMU's block, in the next one, and in the one after that.
    for sessions in 0..3 {
        let image = empty_image();
        let disk = open(&image.path);
        disk.write_at(&[1; 4096], 0).unwrap();
        disk.close().unwrap();
        drop(disk);
        qemu_writes(&image.path, 4096, &[(5, 85)]);
        let disk = open(&image.path);
        assert_eq!(disk.notices().len(), 1, "{:?}", disk.notices());
        // Keeps the slots before it from being cut off.
        disk.write_at(&[2; 4096], 6 * BLOCK).unwrap();
        disk.discard(5 * BLOCK, BLOCK).unwrap();
        let mut disk = disk;
        for _ in 0..sessions {
            disk.close().unwrap();
            drop(disk);
            disk = open(&image.path);
        }
        for block in 10..16 {
            disk.write_at(&[3; 4096], block * BLOCK).unwrap();
        }
        let mut blocks = vec![(0, 1), (6, 2)];
        blocks.extend((10..16).map(|block| (block, 3)));
        check(&disk, &blocks);
        disk.close().unwrap();
        qemu_agrees(&image.path, &blocks);
    }
}

#[test]
fn an_entry_that_aims_at_the_table_or_the_private_area_is_refused() {
    for at in [512, 4096, 262_144, TABLE - 512, TABLE] {
        let image = empty_image();
        let file = fs::OpenOptions::new().write(true).open(&image.path).unwrap();
        file.write_all_at(&((at / 512) as u32).to_be_bytes(), TABLE).unwrap();
        for read_only in [true, false] {
            let error = OpenOptions::new().read_only(read_only).open(&image.path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{at}: {error}");
        }
    }
}
