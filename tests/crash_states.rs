//! A power cut at any moment: the disk opens, and every sector holds its last flushed value or a later one.
//!
//! `COWVHD_SEED=N cargo test --release --features sim --test crash_states` replays one workload.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/crash.rs"]
mod crash;
#[path = "support/strict_vhd.rs"]
mod strict_vhd;

use cowvhd::sim::{Bounds, History, SimVfs};
use cowvhd::{CreateOptions, ExtentKind, OpenOptions};
use crash::{CHILD, Explorer, FIXED, SMALL, Segment, Shape, WIDE, Workload};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Weather {
    Calm,
    /// Requests arrive in the middle of others.
    Busy,
    /// Operations fail, too.
    Faulty,
}

fn explore(shape: Shape, seeds: std::ops::Range<u64>, steps: usize, limit: usize, weather: Weather) {
    let seeds = match std::env::var("COWVHD_SEED") {
        Ok(seed) => {
            let seed = seed.parse().expect("COWVHD_SEED is a number");
            seed..seed + 1
        }
        Err(_) => seeds,
    };
    let mut explorer = Explorer::new(shape);
    let mut points = 0;
    let mut injected = 0;
    for seed in seeds.clone() {
        let mut workload = Workload::new(shape, seed, weather == Weather::Faulty);
        if weather != Weather::Calm {
            workload.interleave();
        }
        workload.run(steps);
        if weather != Weather::Faulty {
            workload.check_live();
        }
        injected += workload.injected;
        let segments = workload.finish();
        points += segments.iter().map(|segment| segment.points.len()).sum::<usize>();
        if let Err(error) = explorer.explore(&segments, seed, limit) {
            panic!("{error}\nreplay with COWVHD_SEED={seed}");
        }
    }
    println!(
        "{} workloads, {injected} errors injected, {points} crash points, {} distinct states, {} recoveries cut again: \
         no violation",
        seeds.count(),
        explorer.states,
        explorer.recoveries_cut,
    );
}

#[test]
fn small_blocks_one_thread() {
    explore(SMALL, 0..60, 60, 60, Weather::Calm);
}

#[test]
fn small_blocks_with_requests_during_syncs() {
    explore(SMALL, 1000..1060, 60, 60, Weather::Busy);
}

#[test]
fn blocks_all_over_the_table() {
    explore(WIDE, 2000..2020, 120, 40, Weather::Busy);
}

#[test]
fn small_blocks_with_failing_operations() {
    explore(SMALL, 3000..3080, 60, 40, Weather::Faulty);
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
    vfs.corrupt(path, table + 512, &block);
    vfs.corrupt(path, table + 4 * 3, &((table / 512 + 1) as u32).to_be_bytes());
    history.continue_from(3 * u64::from(shape.block_bytes) / 512, &block[512..]);

    vfs.record(true);
    let disk = OpenOptions::new().vfs(std::sync::Arc::new(vfs.clone())).open(path).unwrap();
    disk.write_at(&[0; 512], 0).unwrap();
    let mut points = vfs.take_crash_points();
    points.push(vfs.crash_now());
    let mut explorer = Explorer::new(shape);
    explorer.explore(&[Segment { history, points }], 1, 200).unwrap();
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
    vfs.corrupt(path, table as u64 + 4, &[0xff; 4]);
    vfs.corrupt(path, table as u64 + 4 * 5, &sector.to_be_bytes());
    vfs.corrupt(path, u64::from(sector) * 512 + 1, &[0]);
    block[8 * 512..16 * 512].fill(0);
    vfs.corrupt(path, u64::from(sector) * 512 + 512, &block);
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
    history.submit(vfs.tick(), first + 9, 2, value);
    disk.write_at(&buf, (first + 9) * 512).unwrap();
    history.complete(vfs.tick(), first + 9, 2, value);
    let called = vfs.tick();
    disk.flush().unwrap();
    history.flushed(called, vfs.tick());
    let mut content = vec![0; shape.block_bytes as usize];
    disk.read_at(&mut content, first * 512).unwrap();
    history.check_current(first, &content).unwrap();
    let mut points = vfs.take_crash_points();
    points.push(vfs.crash_now());
    let mut explorer = Explorer::new(shape);
    explorer.explore(&[Segment { history, points }], 1, 200).unwrap();
    println!("{} distinct states: no violation", explorer.states);
}

/// A fixed disk has what a raw disk has: no journal, and every flushed write.
#[test]
fn fixed_disk() {
    explore(FIXED, 4000..4030, 60, 60, Weather::Calm);
    explore(FIXED, 5000..5030, 60, 60, Weather::Busy);
    explore(FIXED, 6000..6030, 60, 40, Weather::Faulty);
}

/// A differencing disk: bitmaps change, units are copied up, zeros hide what the parent holds.
#[test]
fn differencing_disk() {
    explore(CHILD, 7000..7050, 60, 60, Weather::Calm);
    explore(CHILD, 8000..8050, 60, 60, Weather::Busy);
    explore(CHILD, 9000..9060, 60, 40, Weather::Faulty);
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
