//! Many threads on one disk: writes that ride on each other's allocations, reads beside discards and reuse of slots, and
//! flushes beside all of it. Each thread knows what its own sectors hold, whatever the others do.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cowvhd::{CreateOptions, Disk, OpenOptions, ZeroMode};
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

const SECTOR: u64 = 512;
const BLOCK: u64 = 2 << 20;
const THREADS: u64 = 4;
/// Blocks that all threads write to, each its own sectors.
const SHARED_BLOCKS: u64 = 8;
/// Blocks of one thread alone, who also discards them: their slots wander from thread to thread.
const OWN_BLOCKS: u64 = 6;
const STEPS: u64 = 1500;
const SIZE: u64 = (SHARED_BLOCKS + THREADS * OWN_BLOCKS) * BLOCK;

/// What one thread wrote: sector to value, absent for zeros.
type Content = HashMap<u64, u64>;

fn fill(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(SECTOR as usize / 8)
}

fn check(disk: &Disk, content: &Content, sector: u64) {
    let mut found = vec![0xee; SECTOR as usize];
    disk.read_at(&mut found, sector * SECTOR).unwrap();
    assert!(found == fill(content.get(&sector).copied().unwrap_or(0)), "sector {sector}");
}

fn work(disk: &Disk, thread: u64, mut content: Content) -> Content {
    let mut random = thread + 1;
    let mut below = |end: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % end
    };
    let sectors = BLOCK / SECTOR;
    for step in 0..STEPS {
        let own = (SHARED_BLOCKS + thread * OWN_BLOCKS + below(OWN_BLOCKS)) * sectors;
        // In shared blocks a thread's sectors lie between those of the others, in the same 4 KiB units.
        let shared = below(SHARED_BLOCKS) * sectors + below(64) * THREADS + thread;
        let value = thread << 32 | (step + 1);
        match below(12) {
            0 => {
                disk.discard(own * SECTOR, BLOCK).unwrap();
                content.retain(|&sector, _| !(own..own + sectors).contains(&sector));
                check(disk, &content, own + below(64));
            }
            1 => {
                let (first, count) = (own + below(32), 1 + below(32));
                let mode = if below(2) == 0 { ZeroMode::MayPunch } else { ZeroMode::KeepAllocated };
                disk.write_zeroes(first * SECTOR, count * SECTOR, mode).unwrap();
                content.retain(|&sector, _| !(first..first + count).contains(&sector));
            }
            2 => disk.flush().unwrap(),
            3..=7 => {
                disk.write_at(&fill(value), shared * SECTOR).unwrap();
                content.insert(shared, value);
                check(disk, &content, shared);
            }
            _ => {
                let (first, count) = (own + below(64), 1 + below(16));
                disk.write_at(&fill(value).repeat(count as usize), first * SECTOR).unwrap();
                content.extend((first..first + count).map(|sector| (sector, value)));
                check(disk, &content, own + below(64));
            }
        }
    }
    content
}

#[test]
fn threads_keep_out_of_each_others_sectors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    CreateOptions::new(SIZE).create(&path).unwrap();
    work_on(&path, &Content::new());
}

/// In a differencing disk the threads also bring the same 4 KiB units, of which each writes its own sectors, and the rest is
/// copied up: nobody's copy may undo what another has written (I8).
#[test]
fn threads_bring_the_same_units_of_a_differencing_disk() {
    let dir = tempfile::tempdir().unwrap();
    let parent = dir.path().join("parent.vhd");
    CreateOptions::new(SIZE).create(&parent).unwrap();
    let disk = OpenOptions::new().open(&parent).unwrap();
    let mut below = Content::new();
    for block in 0..SIZE / BLOCK {
        for sector in (block * BLOCK / SECTOR..).take(64 * THREADS as usize) {
            below.insert(sector, 1 << 40 | sector);
            disk.write_at(&fill(1 << 40 | sector), sector * SECTOR).unwrap();
        }
    }
    disk.close().unwrap();
    drop(disk);
    // A unit is brought once in the life of an image.
    for round in 0..8 {
        let path = dir.path().join(format!("child{round}.vhd"));
        CreateOptions::child_of(&parent).create(&path).unwrap();
        work_on(&path, &below);
    }
}

/// Whose sector it is.
fn owner(sector: u64) -> u64 {
    match (sector * SECTOR / BLOCK).checked_sub(SHARED_BLOCKS) {
        None => sector % THREADS,
        Some(own) => own / OWN_BLOCKS,
    }
}

/// All threads work on a disk that holds `initial`.
fn work_on(path: &Path, initial: &Content) {
    let disk = OpenOptions::new().open(path).unwrap();
    let done = AtomicBool::new(false);
    let contents: Vec<Content> = std::thread::scope(|scope| {
        let disk = &disk;
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                disk.flush().unwrap();
            }
        });
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let content = initial.iter().filter(|(sector, _)| owner(**sector) == thread);
                let content = content.map(|(&sector, &value)| (sector, value)).collect();
                scope.spawn(move || work(disk, thread, content))
            })
            .collect();
        // A worker that fails must not leave the flushes running for ever.
        let results: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        done.store(true, Ordering::SeqCst);
        results.into_iter().map(Result::unwrap).collect()
    });
    let verify = |disk: &Disk| {
        let content: Content = contents.iter().flatten().map(|(&sector, &value)| (sector, value)).collect();
        let mut block = vec![0xee; BLOCK as usize];
        for number in 0..SIZE / BLOCK {
            disk.read_at(&mut block, number * BLOCK).unwrap();
            for (sector, found) in (number * BLOCK / SECTOR..).zip(block.chunks(SECTOR as usize)) {
                assert!(found == fill(content.get(&sector).copied().unwrap_or(0)), "sector {sector}");
            }
        }
    };
    verify(&disk);
    disk.flush().unwrap();
    drop(disk);
    let disk = OpenOptions::new().open(path).unwrap();
    verify(&disk);
    disk.close().unwrap();
    drop(disk);
    verify(&OpenOptions::new().read_only(true).open(path).unwrap());
}

#[test]
fn close_waits_for_writes_and_refuses_later_ones() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    CreateOptions::new(SIZE).create(&path).unwrap();
    for round in 0..20 {
        let disk = OpenOptions::new().open(&path).unwrap();
        let written: Vec<u64> = std::thread::scope(|scope| {
            let disk = &disk;
            let writers: Vec<_> = (0..THREADS)
                .map(|thread| {
                    scope.spawn(move || {
                        let sector = |n: u64| (n * THREADS + thread) * 3001 % (SIZE / SECTOR);
                        (0..)
                            .take_while(|&n| disk.write_at(&fill(round + 1), sector(n) * SECTOR).is_ok())
                            .count() as u64
                    })
                })
                .collect();
            // Whatever the writers have done by now: nothing here depends on how much it is.
            disk.close().unwrap();
            writers.into_iter().map(|writer| writer.join().unwrap()).collect()
        });
        drop(disk);
        let disk = OpenOptions::new().read_only(true).open(&path).unwrap();
        assert!(disk.notices().is_empty(), "{:?}", disk.notices());
        for (thread, count) in written.into_iter().enumerate() {
            for n in 0..count {
                let mut found = vec![0; SECTOR as usize];
                let sector = (n * THREADS + thread as u64) * 3001 % (SIZE / SECTOR);
                disk.read_at(&mut found, sector * SECTOR).unwrap();
                assert!(found == fill(round + 1), "round {round}, sector {sector}");
            }
        }
    }
}
