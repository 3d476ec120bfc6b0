//! One damaged page: each 4 KiB page of metadata in turn is zeroed, filled with garbage, with 0xFF, or shifted; those of each kind in
//! all of these ways. After a
//! repair the guest's content is what it was, a second repair finds nothing to do, and undoing restores the damaged bytes.
//!
//! `COWVHD_TEST_PAGES_SIZE=4G cargo test --release --test repair_pages` does it for a larger disk, in an hour or so.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/damage.rs"]
mod damage;

use cowvhd::check::{Consent, check, repair, undo};
use cowvhd::vfs::{Access, HostVfs, Vfs};
use cowvhd::{CreateOptions, OpenOptions};
use damage::{DAMAGES, MIB, PAGE, SLOTS, STRIDE, TABLE, content, qemu_convert};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

fn disk_bytes() -> u64 {
    let Ok(size) = std::env::var("COWVHD_TEST_PAGES_SIZE") else { return 256 * MIB };
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

/// What a file holds that is not zero, by page.
type Sparse = BTreeMap<u64, Vec<u8>>;

/// Adds the pages of what was read at `at` that are not zero.
fn add(sparse: &mut Sparse, at: u64, bytes: &[u8]) {
    for (page, bytes) in (at..).step_by(PAGE as usize).zip(bytes.chunks(PAGE as usize)) {
        if bytes.iter().any(|&byte| byte != 0) {
            sparse.insert(page, bytes.to_vec());
        }
    }
}

/// The file: holes are not read.
fn file_pages(path: &Path) -> (u64, Sparse) {
    let file = HostVfs.open(path, Access::ReadOnly).unwrap();
    let length = file.length().unwrap();
    let (mut sparse, mut at) = (Sparse::new(), 0);
    while let Some(data) = file.next_data(at).unwrap() {
        let mut bytes = vec![0; (data.end.min(length) - data.start) as usize];
        let mut done = 0;
        while done < bytes.len() {
            done += file.read_at(&mut bytes[done..], data.start + done as u64).unwrap();
        }
        add(&mut sparse, data.start, &bytes);
        at = data.end;
    }
    (length, sparse)
}

/// What a guest sees that is not zero: what the disk does not say to be zeros is read.
fn guest_pages(path: &Path) -> Sparse {
    let disk = OpenOptions::new().read_only(true).open(path).unwrap();
    let mut sparse = Sparse::new();
    for part in disk.map(0, disk.size()).unwrap().iter().filter(|part| part.file_offset.is_some()) {
        let mut bytes = vec![0; part.extent.length as usize];
        disk.read_at(&mut bytes, part.extent.offset).unwrap();
        add(&mut sparse, part.extent.offset, &bytes);
    }
    sparse
}

#[test]
fn one_damaged_page_loses_nothing() {
    let dir = damage::folder();
    let path = dir.path().join("disk.vhd");
    fill(&path, disk_bytes());
    let (length, good) = file_pages(&path);
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let expected = guest_pages(&path);
    let blocks = (0..disk_bytes() / (2 * MIB)).filter(|block| block % 5 != 2 && ![1, 3].contains(block));
    assert_eq!(expected.len(), 2 * blocks.count());
    let file = fs::File::options().read(true).write(true).open(&path).unwrap();
    let (saved, saved_again) = (path.with_extension("undo"), path.with_extension("undo2"));
    let vfs = || Arc::new(HostVfs);
    let pages = metadata_pages(&path);
    for &at in &pages {
        let mut page = vec![0; PAGE.min(length - at) as usize];
        file.read_exact_at(&mut page, at).unwrap();
        // Of block pages, which are all alike, a few in every way; each other one in one of them.
        let number = (at.max(SLOTS) - SLOTS) / STRIDE;
        let all = at < SLOTS || [0, 1, 50].contains(&number) || Some(&at) == pages.last();
        let ways = DAMAGES.into_iter().enumerate();
        for (_, (name, damage)) in ways.filter(|&(way, _)| all || way as u64 == number % 4) {
            let what = format!("page at {at} {name}");
            let damaged = damage(&page, at);
            file.write_all_at(&damaged, at).unwrap();
            file.set_modified(modified).unwrap();
            let found = check(vfs(), &path).unwrap();
            let first = repair(vfs(), &path, Consent::All, &saved).unwrap();
            assert!(first.is_sound(), "{what}: {:#?}\n{:#?}", first.steps, first.after.findings());
            assert!(guest_pages(&path) == expected, "{what}: {:#?}\n{:#?}", found.findings(), first.steps);
            let second = repair(vfs(), &path, Consent::All, &saved_again).unwrap();
            assert!(!second.changes(), "{what}: {:?} {:?}", first.steps, second.steps);
            if first.changes() {
                undo(vfs(), &saved, &path, false).unwrap();
                fs::remove_file(&saved).unwrap();
            }
            let mut with_damage = good.clone();
            with_damage.remove(&at);
            add(&mut with_damage, at, &damaged);
            assert!(file_pages(&path) == (length, with_damage), "{what}: undone");
            assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), modified);
        }
        file.write_all_at(&page, at).unwrap();
    }
    println!("{} pages", pages.len());
}

/// The table as a whole; start, footers and table at once; a truncated end; both superblocks.
#[test]
fn damage_to_several_structures_at_once() {
    let dir = damage::folder();
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

/// When the table is lost, the pages of blocks tell. One counts at its own offset alone, since other programs move blocks without it,
/// and of two the one of the later allocation. What was discarded does not come back.
#[test]
fn pages_that_are_out_of_place_or_older_bring_nothing_back() {
    let dir = damage::folder();
    let path = dir.path().join("disk.vhd");
    fill(&path, 40 * MIB);
    let expected = content(&path);
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let file = fs::File::options().read(true).write(true).open(&path).unwrap();
    let page = |slot: u64| {
        let mut page = vec![0; PAGE as usize];
        file.read_exact_at(&mut page, SLOTS + slot * STRIDE).unwrap();
        page
    };
    // Those of the blocks that were discarded.
    assert!([1, 2].iter().all(|&slot| page(slot).iter().all(|&byte| byte == 0)));
    let moved = page(3);
    let mut older = page(4);
    let allocation = u64::from_be_bytes(older[40..48].try_into().unwrap());
    older[8..16].copy_from_slice(&(SLOTS + 2 * STRIDE).to_be_bytes());
    older[40..48].copy_from_slice(&(allocation - 1).to_be_bytes());
    let crc = crc32fast::hash(&older[..60]);
    older[60..64].copy_from_slice(&crc.to_be_bytes());
    for (page, slot) in [(moved, 1), (older, 2)] {
        file.write_all_at(&page, SLOTS + slot * STRIDE).unwrap();
        file.write_all_at(&[0xbb; PAGE as usize], SLOTS + slot * STRIDE + PAGE).unwrap();
    }
    file.write_all_at(&[0; PAGE as usize], TABLE).unwrap();
    file.set_modified(modified).unwrap();
    repaired_is(&path, &expected, "table zeroed");
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
