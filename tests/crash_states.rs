//! A power cut at any moment: the disk opens, and every sector holds its last flushed value or a later one.
//!
//! `COWVHD_STATES` says how many distinct states are judged: `COWVHD_STATES=100000000 cargo test --release --features sim --test
//! crash_states every -- --nocapture` is the long run. `COWVHD_SEED` is the seed of the first workload.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/campaign.rs"]
mod campaign;
#[path = "support/crash.rs"]
#[allow(dead_code, reason = "shared with the other tests of crashes")]
mod crash;
#[path = "support/failing.rs"]
mod failing;
#[path = "support/strict_vhd.rs"]
mod strict_vhd;
#[path = "support/summary.rs"]
mod summary;

use cowvhd::sim::{Bounds, History, SimVfs};
use cowvhd::{CreateOptions, ExtentKind, OpenOptions};
use crash::{Explorer, SMALL, Segment};

/// States of a run of the test command.
const STATES: u64 = 1_000_000;
/// Runs of so many states and more take every state that the bar asks for at each crash point.
const LONG_RUN: u64 = 10_000_000;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn every_state_opens_with_all_that_was_flushed() {
    let states = variable("COWVHD_STATES").unwrap_or(STATES);
    let bounds = match states {
        ..LONG_RUN => Bounds { apart: 1, tears: 256, seeded: 24, ..Bounds::full() },
        _ => Bounds::full(),
    };
    let step = (states / 100).max(1);
    let reported = std::sync::atomic::AtomicU64::new(0);
    let progress = |tally: &campaign::Tally| {
        let steps = tally.states / step;
        if states >= LONG_RUN && reported.swap(steps, std::sync::atomic::Ordering::SeqCst) != steps {
            println!("{tally}");
        }
    };
    match campaign::run(variable("COWVHD_SEED").unwrap_or(0), states, &bounds, progress) {
        Ok(tally) => summary::add(&format!("simulation: {tally}, 0 violations")),
        Err(wrong) => panic!(
            "{wrong}\nreplay with\nCOWVHD_REPLAY='{}' cargo test --release --features sim --test crash_states replay -- \
             --exact --nocapture",
            wrong.replay()
        ),
    }
}

/// Judges one state again: what a failure printed stands in `COWVHD_REPLAY`.
#[test]
fn replay() {
    if let Ok(text) = std::env::var("COWVHD_REPLAY") {
        match campaign::replay(&text) {
            Ok(()) => println!("{text}: no violation"),
            Err(wrong) => panic!("{wrong}"),
        }
    }
}

/// QEMU's first block in an empty image lands right behind the block table, in the page where the table ends. It moves when
/// the image is opened for writing: its content must be durable before its new place is.
#[test]
fn a_block_in_the_tables_page_moves_safely() {
    let shape = SMALL;
    let vfs = SimVfs::new(1);
    let path = std::path::Path::new(crash::PATH);
    CreateOptions::new(shape.size)
        .test_geometry(shape.block_bytes, shape.ring_bytes)
        .vfs(std::sync::Arc::new(vfs.clone()))
        .create(path)
        .unwrap();
    let image = vfs.content(path).unwrap();
    let table = u64::from_be_bytes(image[512 + 16..512 + 24].try_into().unwrap());
    let mut history = History::default();
    let value = history.new_value();
    let mut block = vec![0xff; 512 + shape.block_bytes as usize];
    History::fill(value, &mut block[512..]);
    vfs.foreign_write(path, table + 512, &block);
    vfs.foreign_write(path, table + 4 * 3, &((table / 512 + 1) as u32).to_be_bytes());
    history.continue_from(3 * u64::from(shape.block_bytes) / 512, &block[512..]);

    vfs.record(true);
    let disk = OpenOptions::new().vfs(std::sync::Arc::new(vfs.clone())).open(path).unwrap();
    disk.write_at(&[0; 512], 0).unwrap();
    let mut points = vfs.take_crash_points();
    points.push(vfs.crash_now());
    let mut explorer = Explorer::new(shape);
    explorer.explore(&[Segment { history, points }], 1, &Bounds::sample(200)).unwrap();
    println!("{} distinct states: no violation", explorer.states);
}

/// Other programs leave bits clear in a block's bitmap. The first write moves such a block; what it showed stays.
#[test]
fn a_block_with_missing_sectors_moves_when_it_is_written() {
    let shape = SMALL;
    let vfs = SimVfs::new(1);
    let path = std::path::Path::new(crash::PATH);
    CreateOptions::new(shape.size)
        .test_geometry(shape.block_bytes, shape.ring_bytes)
        .vfs(std::sync::Arc::new(vfs.clone()))
        .create(path)
        .unwrap();
    let disk = OpenOptions::new().vfs(std::sync::Arc::new(vfs.clone())).open(path).unwrap();
    let mut history = History::default();
    let value = history.new_value();
    let mut block = vec![0; shape.block_bytes as usize];
    History::fill(value, &mut block);
    disk.write_at(&block, u64::from(shape.block_bytes)).unwrap();
    disk.close().unwrap();
    drop(disk);
    let image = vfs.content(path).unwrap();
    let table = u64::from_be_bytes(image[512 + 16..512 + 24].try_into().unwrap()) as usize;
    let sector = u32::from_be_bytes(image[table + 4..table + 8].try_into().unwrap());
    // Another program: the block is now number 5, and its sectors 8 to 15 are not present.
    vfs.foreign_write(path, table as u64 + 4, &[0xff; 4]);
    vfs.foreign_write(path, table as u64 + 4 * 5, &sector.to_be_bytes());
    // It knows nothing of block headers.
    vfs.foreign_write(path, (u64::from(sector) - 7) * 512, &[0; 7 * 512]);
    vfs.foreign_write(path, u64::from(sector) * 512 + 1, &[0]);
    block[8 * 512..16 * 512].fill(0);
    vfs.foreign_write(path, u64::from(sector) * 512 + 512, &block);
    let first = 5 * u64::from(shape.block_bytes) / 512;
    history.continue_from(first, &block);

    vfs.record(true);
    let disk = OpenOptions::new().vfs(std::sync::Arc::new(vfs.clone())).open(path).unwrap();
    let kinds: Vec<_> =
        disk.extents(first * 512, 32 * 512).unwrap().iter().map(|extent| extent.kind).collect();
    assert_eq!(kinds, [ExtentKind::Data, ExtentKind::Zero, ExtentKind::Data]);
    let value = history.new_value();
    let mut buf = [0; 1024];
    History::fill(value, &mut buf);
    let submitted = history.submit(vfs.tick(), first + 9, 2, value);
    disk.write_at(&buf, (first + 9) * 512).unwrap();
    history.completed(submitted, vfs.tick(), first + 9, 2);
    let called = vfs.tick();
    disk.flush().unwrap();
    history.flushed(called, vfs.tick());
    let mut content = vec![0; shape.block_bytes as usize];
    disk.read_at(&mut content, first * 512).unwrap();
    history.check_current(first, &content).unwrap();
    let mut points = vfs.take_crash_points();
    points.push(vfs.crash_now());
    let mut explorer = Explorer::new(shape);
    explorer.explore(&[Segment { history, points }], 1, &Bounds::sample(200)).unwrap();
    println!("{} distinct states: no violation", explorer.states);
}

/// A crash while an image is made leaves no file of that name or the whole image; once `create` has returned, the image.
#[test]
fn create_is_seen_whole_or_not_at_all() {
    for fixed in [false, true] {
        let vfs = SimVfs::new(1);
        vfs.record(true);
        let path = std::path::Path::new(crash::PATH);
        let options = CreateOptions::new(SMALL.size)
            .test_geometry(SMALL.block_bytes, SMALL.ring_bytes)
            .vfs(std::sync::Arc::new(vfs.clone()));
        let options = if fixed { options.fixed() } else { options };
        options.create(path).unwrap();
        let returned = vfs.tick();
        let mut points = vfs.take_crash_points();
        points.push(vfs.crash_now());
        let (mut without, mut with) = (0, 0);
        for point in points {
            point.for_each_state(1, &Bounds::full(), |state| {
                if !state.has(path) {
                    assert!(point.clock() < returned, "the image is gone: {}", state.fates());
                    without += 1;
                    return true;
                }
                let vfs = std::sync::Arc::new(state.to_vfs(2));
                let disk = OpenOptions::new().vfs(vfs).open(path).unwrap();
                let mut content = vec![0xee; SMALL.size as usize];
                disk.read_at(&mut content, 0).unwrap();
                assert!(content.iter().all(|&byte| byte == 0));
                disk.close().unwrap();
                with += 1;
                true
            });
        }
        println!("{without} states without the image, {with} with it");
        assert!(without > 0 && with > 0);
    }
}
