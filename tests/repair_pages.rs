//! One damaged page: each 4 KiB page of metadata in turn is zeroed, filled with garbage, with 0xFF, and shifted. After a
//! repair the guest's content is what it was, a second repair finds nothing to do, and undoing restores the damaged bytes.
//!
//! `COWVHD_TEST_PAGES_SIZE=4G cargo test --release --test repair_pages` does it for a larger disk.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/damage.rs"]
mod damage;

use cowvhd::check::{Consent, check, repair, undo};
use cowvhd::vfs::HostVfs;
use cowvhd::{CreateOptions, OpenOptions};
use damage::{MIB, SLOTS, STRIDE, TABLE, content, qemu_convert};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

const PAGE: u64 = 4096;

fn disk_bytes() -> u64 {
    let Ok(size) = std::env::var("COWVHD_TEST_PAGES_SIZE") else { return 40 * MIB };
    let (number, unit) = size.split_at(size.len() - 1);
    number.parse::<u64>().unwrap() * if unit == "G" { 1 << 30 } else { MIB }
}

/// Blocks here and there, with content of their own; two were freed again.
fn fill(path: &Path, size: u64) {
    CreateOptions::new(size).create(path).unwrap();
    let disk = OpenOptions::new().open(path).unwrap();
    let blocks = size / (2 * MIB);
    for block in (0..blocks).filter(|block| block % 5 != 2) {
        let mut bytes = vec![0; 8192];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = (block as usize * 7 + i / 512 + i) as u8;
        }
        disk.write_at(&bytes, block * 2 * MIB + (block % 100) * 8192).unwrap();
    }
    disk.discard(2 * MIB, 2 * MIB).unwrap();
    disk.discard(6 * MIB, 2 * MIB).unwrap();
    disk.close().unwrap();
}

/// All pages of metadata that are in use: start, superblocks, backup, the first of the ring, the table, block pages, the end.
fn metadata_pages(path: &Path) -> Vec<u64> {
    let length = fs::metadata(path).unwrap().len();
    let size = disk_bytes();
    let mut pages = vec![0, PAGE, 2 * PAGE, 3 * PAGE, 256 << 10];
    pages.extend((0..(size / (2 * MIB) * 4).div_ceil(PAGE)).map(|page| TABLE + page * PAGE));
    pages.extend((0..).map(|slot| SLOTS + slot * STRIDE).take_while(|page| page + STRIDE < length));
    pages.push(length / PAGE * PAGE);
    pages
}

type Damage = fn(&[u8], u64) -> Vec<u8>;

const DAMAGES: [(&str, Damage); 4] = [
    ("zeroed", |page, _| vec![0; page.len()]),
    ("garbage", |page, seed| {
        let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        page.iter().map(|_| next()).collect()
    }),
    ("0xff", |page, _| vec![0xff; page.len()]),
    ("shifted", |page, _| {
        let mut shifted = page.to_vec();
        shifted.rotate_right(page.len().min(PAGE as usize) / 8);
        shifted
    }),
];

#[test]
fn one_damaged_page_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (good, path) = (dir.path().join("good.vhd"), dir.path().join("disk.vhd"));
    fill(&good, disk_bytes());
    let expected = content(&good);
    for at in metadata_pages(&good) {
        for (name, damage) in DAMAGES {
            let what = format!("page at {at} {name}");
            copy(&good, &path);
            let length = fs::metadata(&good).unwrap().len();
            let file = fs::File::options().read(true).write(true).open(&path).unwrap();
            let mut page = vec![0; PAGE.min(length - at) as usize];
            file.read_exact_at(&mut page, at).unwrap();
            file.write_all_at(&damage(&page, at), at).unwrap();
            repaired_is(&path, &expected, &what);
        }
    }
}

/// The table as a whole; start, footers and table at once; a truncated end; both superblocks.
#[test]
fn damage_to_several_structures_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (good, path) = (dir.path().join("good.vhd"), dir.path().join("disk.vhd"));
    fill(&good, 40 * MIB);
    let expected = content(&good);
    let end = fs::metadata(&good).unwrap().len() - 512;
    let cases: [(&str, &[(u64, u64)]); 7] = [
        ("table", &[(TABLE, PAGE)]),
        ("start and table", &[(0, PAGE), (TABLE, PAGE)]),
        ("start, footer and table", &[(0, PAGE), (end, 512), (TABLE, PAGE)]),
        ("start and one superblock", &[(0, 2 * PAGE)]),
        ("both superblocks", &[(PAGE, 2 * PAGE)]),
        ("both superblocks, footer", &[(PAGE, 2 * PAGE), (end, 512)]),
        ("footer, backup, superblock", &[(2 * PAGE, 2 * PAGE), (end, 512)]),
    ];
    for (what, ranges) in cases {
        for byte in [0, 0xff, 0x35] {
            copy(&good, &path);
            let file = fs::File::options().write(true).open(&path).unwrap();
            for &(at, length) in
                ranges.iter().filter(|(at, _)| what != "table and two block pages" || *at < SLOTS)
            {
                file.write_all_at(&vec![byte; length as usize], at).unwrap();
            }
            repaired_is(&path, &expected, &format!("{what} {byte:#x}"));
        }
    }
}

/// A sparse copy.
fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_file(to);
    let status =
        std::process::Command::new("cp").args(["--sparse=always"]).args([from, to]).status().unwrap();
    assert!(status.success());
}

fn repaired_is(path: &Path, expected: &[u8], what: &str) {
    let vfs = || Arc::new(HostVfs);
    let undo_path = path.with_extension("undo");
    let _ = fs::remove_file(&undo_path);
    let damaged = fs::read(path).unwrap();
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    let found = check(vfs(), path).unwrap();
    let first = repair(vfs(), path, Consent::All, &undo_path).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(first.is_sound(), "{what}: {:#?}\n{:#?}", first.steps, first.after.findings());
    assert!(content(path) == expected, "{what}: {:#?}\n{:#?}", found.findings(), first.steps);
    let second = repair(vfs(), path, Consent::All, &path.with_extension("undo2")).unwrap();
    assert!(!second.changes(), "{what}: {:?} {:?}", first.steps, second.steps);
    if what.contains("zeroed") {
        assert!(qemu_convert(path)[..expected.len()] == *expected, "{what}");
    }
    if first.changes() {
        undo(vfs(), &undo_path, path, false).unwrap();
    }
    assert!(fs::read(path).unwrap() == damaged, "{what}: undone");
    assert_eq!(fs::metadata(path).unwrap().modified().unwrap(), modified);
}
