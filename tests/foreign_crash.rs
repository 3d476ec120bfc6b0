//! A power cut at any moment of a session on an image to which another program has added blocks, one of them in a page of
//! the block table: that one moves before the page is written, and is never lost on the way.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/crash.rs"]
#[allow(dead_code, reason = "shared with the other tests of crashes")]
mod crash;
#[path = "support/failing.rs"]
mod failing;
#[path = "support/strict_vhd.rs"]
mod strict_vhd;

use cowvhd::sim::{Bounds, History, Rng, SimVfs};
use cowvhd::vfs::{Access, Vfs};
use cowvhd::vhd::DynamicHeader;
use cowvhd::{CreateOptions, Disk, OpenOptions, ZeroMode};
use crash::{ALIGNED, Explorer, PACKED, PATH, SMALL, Segment, Workload};
use std::path::Path;
use std::sync::Arc;

const SECTOR: u64 = 512;
const BLOCK: u64 = SMALL.block_bytes as u64;

/// What another program does: bitmap and data at `at`, and the entry of the block.
fn plant(vfs: &SimVfs, history: &mut History, table: u64, block: u64, at: u64) {
    let value = history.new_value();
    let mut data = vec![0; BLOCK as usize];
    History::fill(value, &mut data);
    vfs.corrupt(Path::new(PATH), at, &[0xff; 512]);
    vfs.corrupt(Path::new(PATH), at + 512, &data);
    vfs.corrupt(Path::new(PATH), table + 4 * block, &((at / SECTOR) as u32).to_be_bytes());
    let sectors = BLOCK.min(SMALL.size - block * BLOCK) / SECTOR;
    history.continue_from(block * BLOCK / SECTOR, &data[..(sectors * SECTOR) as usize]);
}

fn open(vfs: &SimVfs) -> Disk {
    OpenOptions::new().vfs(Arc::new(vfs.clone())).open(Path::new(PATH)).unwrap()
}

struct Driver<'a> {
    vfs: &'a SimVfs,
    disk: &'a Disk,
    history: &'a mut History,
}

impl Driver<'_> {
    fn request(&mut self, first: u64, count: u64, value: u64) {
        let submitted = self.history.submit(self.vfs.tick(), first, count, value);
        let (offset, length) = (first * SECTOR, count * SECTOR);
        if value == 0 {
            self.disk.write_zeroes(offset, length, ZeroMode::MayPunch).unwrap();
        } else {
            let mut buf = vec![0; length as usize];
            History::fill(value, &mut buf);
            self.disk.write_at(&buf, offset).unwrap();
        }
        self.history.completed(submitted, self.vfs.tick(), first, count);
    }

    fn step(&mut self, rng: &mut Rng) {
        let total = SMALL.size / SECTOR;
        let block = rng.below(8) * (BLOCK / SECTOR);
        match rng.below(8) {
            0..=2 => {
                let first = (block + rng.below(BLOCK / SECTOR)).min(total - 1);
                let value = self.history.new_value();
                self.request(first, (1 + rng.below(12)).min(total - first), value);
            }
            3 | 4 => self.request(block, (BLOCK / SECTOR).min(total - block), 0),
            _ => {
                let called = self.vfs.tick();
                self.disk.flush().unwrap();
                self.history.flushed(called, self.vfs.tick());
            }
        }
    }
}

#[test]
fn blocks_of_another_program_survive_every_crash() {
    let mut explorer = Explorer::new(SMALL);
    for seed in 0..40 {
        let vfs = SimVfs::new(seed);
        CreateOptions::new(SMALL.size)
            .test_geometry(SMALL.block_bytes, SMALL.ring_bytes)
            .vfs(Arc::new(vfs.clone()))
            .create(Path::new(PATH))
            .unwrap();
        let mut history = History::default();
        let disk = open(&vfs);
        let mut rng = Rng::new(seed);
        for _ in 0..8 {
            Driver { vfs: &vfs, disk: &disk, history: &mut history }.step(&mut rng);
        }
        let called = vfs.tick();
        // Space in front of the file's end for what is planted below, and every block that is planted is absent.
        for block in [1, 4, 6] {
            let first = block * BLOCK / SECTOR;
            let mut driver = Driver { vfs: &vfs, disk: &disk, history: &mut history };
            driver.request(first, (BLOCK / SECTOR).min(SMALL.size / SECTOR - first), 0);
        }
        disk.close().unwrap();
        history.flushed(called, vfs.tick());
        drop(disk);

        let file = vfs.open(Path::new(PATH), Access::ReadOnly).unwrap();
        let mut header = [0; 1024];
        assert_eq!(file.read_at(&mut header, 512).unwrap(), 1024);
        let table = DynamicHeader::parse(&header).unwrap().table_offset;
        drop(file);
        plant(&vfs, &mut history, table, 1, table + 512);
        // Data aligned to pages, as the history takes it to be.
        plant(&vfs, &mut history, table, 4, table + 6 * 4096 - 512);
        plant(&vfs, &mut history, table, 6, table + (1 << 20) - 512);

        vfs.record(true);
        let disk = open(&vfs);
        for _ in 0..24 {
            Driver { vfs: &vfs, disk: &disk, history: &mut history }.step(&mut rng);
        }
        let mut points = vfs.take_crash_points();
        points.push(vfs.crash_now());
        if let Err(error) = explorer.explore(&[Segment { history, points }], seed, &Bounds::sample(40)) {
            panic!("{error}");
        }
    }
    println!(
        "{} distinct states, {} of them of recoveries that were cut",
        explorer.states, explorer.of_recoveries
    );
}

/// A block of another program may share the first page with the headers: it comes back before they do, or is never seen again.
#[test]
fn a_spoiled_first_page_comes_back_whole() {
    for shape in [ALIGNED, PACKED] {
        let mut explorer = Explorer::new(shape);
        for seed in 0..4 {
            let mut workload = Workload::new(shape, seed, false);
            workload.run(4);
            explorer.explore_lost_starts(&workload.finish(), seed, 16).unwrap();
        }
        println!("{} states of recoveries that were cut", explorer.of_recoveries);
        assert!(explorer.of_recoveries > 100);
    }
}
