//! Sequences of events that break weaker rules and that need a disk of a certain shape. docs/crash-safety.md lists all of them,
//! with the tests and seeded defects for the rest.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cowvhd::sim::{Bounds, SimVfs};
use cowvhd::{CreateOptions, Disk, Error, ErrorKind, OpenOptions};
use std::path::Path;
use std::sync::Arc;

const PATH: &str = "/disk.vhd";
const SUPERBLOCKS: [u64; 2] = [4096, 8192];

fn open(vfs: &SimVfs) -> Disk {
    OpenOptions::new().vfs(Arc::new(vfs.clone())).open(Path::new(PATH)).unwrap()
}

fn image(size: u64, block_bytes: u32, ring_bytes: u64) -> SimVfs {
    let vfs = SimVfs::new(1);
    CreateOptions::new(size)
        .test_geometry(block_bytes, ring_bytes)
        .vfs(Arc::new(vfs.clone()))
        .create(Path::new(PATH))
        .unwrap();
    vfs
}

/// Each block has an entry in another page of the block table; the ring has room for the images of eight.
#[test]
fn a_flush_of_more_new_blocks_than_the_ring_has_room_for_images() {
    const BLOCKS: u64 = 600;
    const APART: u64 = 1024 * 4096;
    let vfs = image(BLOCKS * APART, 4096, 128 << 10);
    let disk = open(&vfs);
    for block in 0..BLOCKS {
        disk.write_at(&[block as u8 | 1; 512], block * APART).unwrap();
    }
    vfs.record(true);
    disk.flush().unwrap();
    let mut points = vfs.take_crash_points();
    assert!(points.len() > 75, "{} steps: entries, images and checkpoints in turn", points.len());
    vfs.record(false);
    // In the middle of it: none is owed yet, and what is there is what was written.
    let middle = points.swap_remove(points.len() / 2);
    let mut states = Vec::new();
    middle.for_each_state(1, &Bounds::sample(6), |state| {
        states.push((state.to_vfs(2), false));
        true
    });
    vfs.crash_now().for_each_state(1, &Bounds::sample(6), |state| {
        states.push((state.to_vfs(2), true));
        true
    });
    for (vfs, flushed) in states {
        let disk = open(&vfs);
        for block in 0..BLOCKS {
            let mut buf = [0xee; 512];
            disk.read_at(&mut buf, block * APART).unwrap();
            let right = buf == [block as u8 | 1; 512] || (!flushed && buf == [0; 512]);
            assert!(right, "block {block}, {flushed}: {}", buf[0]);
        }
        disk.close().unwrap();
    }
}

/// Both superblocks name the session, so that losing either does not make an older, clean one count.
#[test]
fn either_superblock_of_a_session_may_rot() {
    for lost in SUPERBLOCKS {
        let vfs = image(64 << 20, 2 << 20, 2 << 20);
        let disk = open(&vfs);
        disk.write_at(&[1; 512], 0).unwrap();
        disk.close().unwrap();
        drop(disk);
        let disk = open(&vfs);
        disk.write_at(&[2; 512], 0).unwrap();
        disk.write_at(&[3; 512], 40 << 20).unwrap();
        disk.flush().unwrap();
        vfs.crash_now().for_each_state(1, &Bounds::sample(20), |state| {
            let vfs = state.to_vfs(2);
            vfs.corrupt(Path::new(PATH), lost, &[0xa5; 4096]);
            let disk = open(&vfs);
            let mut buf = [0; 512];
            for (offset, byte) in [(0, 2), (40 << 20, 3)] {
                disk.read_at(&mut buf, offset).unwrap();
                assert_eq!(buf, [byte; 512], "superblock at {lost} lost, offset {offset}");
            }
            disk.close().unwrap();
            true
        });
    }
}

/// Whoever replays a journal in memory keeps everybody from recovering the file, and who recovers it keeps everybody from reading it.
#[test]
fn nobody_recovers_an_image_that_is_being_replayed_in_memory() {
    let vfs = image(1 << 20, 16 << 10, 128 << 10);
    let options = OpenOptions::new().vfs(Arc::new(vfs.clone()));
    let path = Path::new(PATH);
    let disk = open(&vfs);
    disk.write_at(&[7; 4096], 40 << 10).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let left = vfs.content_hash(path);
    let readers = [0; 2].map(|_| options.clone().read_only(true).open(path).unwrap());
    assert_eq!(options.open(path).unwrap_err().kind(), ErrorKind::InUse);
    assert_eq!(vfs.content_hash(path), left);
    let mut buf = [0; 4096];
    for reader in readers {
        // Also when the other one has ended.
        assert_eq!(options.open(path).unwrap_err().kind(), ErrorKind::InUse);
        reader.read_at(&mut buf, 40 << 10).unwrap();
        assert_eq!(buf, [7; 4096]);
    }
    let disk = open(&vfs);
    assert_eq!(options.clone().read_only(true).open(path).unwrap_err().kind(), ErrorKind::InUse);
    disk.read_at(&mut buf, 40 << 10).unwrap();
    assert_eq!(buf, [7; 4096]);
    disk.close().unwrap();
}

/// Freed slots come back by themselves, whether the guest flushes or not: the file does not grow without end, and no write
/// waits for a flush that the guest does not send.
#[test]
fn a_guest_that_deletes_a_lot_does_not_use_up_the_slots() {
    const BLOCK: u64 = 16 << 10;
    const BLOCKS: u64 = 256;
    // Beside the blocks themselves: those that may wait at once, and growth ahead of need.
    const SLOTS: u64 = BLOCKS + 257 + 256 + 32;
    for flush_every in [u64::MAX, 1, 100] {
        let vfs = image(BLOCKS * BLOCK, BLOCK as u32, 128 << 10);
        let empty = vfs.content(Path::new(PATH)).unwrap().len() as u64;
        let disk = open(&vfs);
        for block in 0..BLOCKS {
            disk.write_at(&[1; 512], block * BLOCK).unwrap();
        }
        for turn in 0..5000 {
            let block = turn * 7 % BLOCKS;
            disk.discard(block * BLOCK, BLOCK).unwrap();
            disk.write_at(&[turn as u8; 512], block * BLOCK + 512).unwrap();
            if turn % flush_every == flush_every - 1 {
                disk.flush().unwrap();
            }
        }
        let length = vfs.content(Path::new(PATH)).unwrap().len() as u64;
        let slots = (length - empty).div_ceil(BLOCK + 4096);
        assert!(slots <= SLOTS, "{slots} slots, a flush every {flush_every}");
        for block in 0..BLOCKS {
            let mut buf = [0xee; 1024];
            disk.read_at(&mut buf, block * BLOCK).unwrap();
            let last = (0..5000).rev().find(|turn| turn * 7 % BLOCKS == block).unwrap();
            assert_eq!((buf[0], buf[512]), (0, last as u8), "block {block}");
        }
        disk.close().unwrap();
    }
}

/// A flipped bit in an entry that newer ones follow looks like the end of the journal. It is damage: nothing that was flushed
/// is dropped in silence, and nothing is changed.
#[test]
fn an_entry_that_rots_does_not_hide_the_newer_ones() {
    let vfs = image(64 << 20, 2 << 20, 2 << 20);
    let disk = open(&vfs);
    for block in 0..5 {
        disk.write_at(&[1; 512], block * (2 << 20)).unwrap();
        disk.flush().unwrap();
    }
    drop(disk);
    let content = vfs.content(Path::new(PATH)).unwrap();
    let entries: Vec<usize> =
        (0..content.len()).step_by(4096).filter(|&at| content[at..].starts_with(b"cowvhdJE")).collect();
    assert_eq!(entries.len(), 5);
    for &entry in &entries[..4] {
        for at in [entry + 60, entry + 120, entry + 5000] {
            vfs.corrupt(Path::new(PATH), at as u64, &[content[at] ^ 4]);
            let before = vfs.content(Path::new(PATH)).unwrap();
            let error = OpenOptions::new().vfs(Arc::new(vfs.clone())).open(Path::new(PATH)).unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }), "{error}");
            assert!(vfs.content(Path::new(PATH)).unwrap() == before, "the file was changed");
            vfs.corrupt(Path::new(PATH), at as u64, &content[at..=at]);
        }
    }
    drop(open(&vfs));
}
