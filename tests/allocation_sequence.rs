//! Of two block headers that name one block the one with the higher allocation sequence is right: so says whoever rebuilds a
//! lost block table. After a crash the numbers of the lost session were given out again, so that an older header could win.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cowvhd::{CreateOptions, Disk, OpenOptions};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const BLOCK: u64 = 2 << 20;
const ORIGIN: u64 = 7 << 20;
const SUPERBLOCKS: [u64; 2] = [4096, 8192];

struct Image {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn image() -> Image {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    CreateOptions::new(1024 * BLOCK).create(&path).unwrap();
    Image { _dir: dir, path }
}

fn open(path: &Path) -> Disk {
    OpenOptions::new().open(path).unwrap()
}

fn number(path: &Path, at: u64) -> u64 {
    let mut bytes = [0; 8];
    File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

/// (block, allocation sequence) of every header in the file.
fn headers(path: &Path) -> Vec<(u64, u64)> {
    let end = fs::metadata(path).unwrap().len();
    let slots = (ORIGIN..end - 512).step_by(BLOCK as usize + 4096);
    slots
        .filter(|&at| number(path, at) == u64::from_be_bytes(*b"cowvhdBL"))
        .map(|at| (number(path, at + 32) >> 32, number(path, at + 40)))
        .collect()
}

fn allocation_of(path: &Path, block: u64) -> u64 {
    headers(path).into_iter().filter(|(b, _)| *b == block).map(|(_, allocation)| allocation).max().unwrap()
}

/// The place of the superblock that counts.
fn newest(path: &Path) -> u64 {
    SUPERBLOCKS.into_iter().max_by_key(|at| number(path, at + 8)).unwrap()
}

#[test]
fn numbers_of_a_lost_session_are_not_given_out_again() {
    let image = image();
    let disk = open(&image.path);
    for block in 0..300 {
        disk.write_at(&[1; 512], block * BLOCK).unwrap();
    }
    disk.flush().unwrap();
    // More freed slots than may wait: everything comes in place and the records of the allocations are forgotten.
    for block in 0..299 {
        disk.discard(block * BLOCK, BLOCK).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    assert!(headers(&image.path).len() < 100);
    for block in 500..503 {
        let before = headers(&image.path).into_iter().map(|(_, allocation)| allocation).max().unwrap();
        let disk = open(&image.path);
        disk.write_at(&[9; 512], block * BLOCK).unwrap();
        disk.flush().unwrap();
        drop(disk);
        open(&image.path).close().unwrap();
        assert!(allocation_of(&image.path, block) > before.max(300), "{:?}", headers(&image.path));
    }
}

#[test]
fn nor_are_they_when_the_superblock_of_a_clean_close_is_lost() {
    let image = image();
    let disk = open(&image.path);
    for block in 0..20 {
        disk.write_at(&[1; 512], block * BLOCK).unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    let lost = newest(&image.path);
    File::options().write(true).open(&image.path).unwrap().write_all_at(&[0xaa; 4096], lost).unwrap();
    let disk = open(&image.path);
    disk.write_at(&[2; 512], 20 * BLOCK).unwrap();
    disk.close().unwrap();
    assert!(allocation_of(&image.path, 20) > 20, "{:?}", headers(&image.path));
}

#[test]
fn a_clean_close_leaves_the_exact_number() {
    let image = image();
    for session in 0..3 {
        let disk = open(&image.path);
        disk.write_at(&[1; 512], session * BLOCK).unwrap();
        disk.close().unwrap();
        assert_eq!(number(&image.path, newest(&image.path) + 128), session + 2);
    }
}
