//! A cowvhd disk beside a raw file with criterion: regressions of each side by itself. How the sides compare is what
//! `ratios` measures; criterion runs one after the other, so that a machine which changes its mind in between shows up as a
//! difference between them.

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

mod support;

use cowvhd::{CreateOptions, Disk, OpenOptions};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use std::fs::File;
use std::path::Path;
use std::time::Duration;
use support::{BLOCK, GIB, MIB, Rng, SMALL, Target, create_raw, directory, fill, pair};

/// Bytes of the disk whose content is in the page cache.
const HOT_BYTES: u64 = 256 * MIB;

fn sides<'a>(raw: &'a File, disk: &'a Disk) -> [(&'static str, &'a dyn Target); 2] {
    [("raw", raw), ("cowvhd", disk)]
}

/// Requests to what exists and is in the page cache.
fn hot(criterion: &mut Criterion, directory: &Path) {
    let (raw, disk) = pair(directory, "hot", HOT_BYTES);
    fill([&raw, &disk], HOT_BYTES);
    let mut small = [0; SMALL as usize];
    let mut large = vec![0; MIB as usize];
    for (side, target) in sides(&raw, &disk) {
        let mut rng = Rng(7);
        let mut any = move || rng.place(HOT_BYTES / SMALL, SMALL);
        let mut sequence = (0..HOT_BYTES / MIB).map(|at| at * MIB).cycle();
        let mut next = move || sequence.next().unwrap_or(0);

        let mut group = criterion.benchmark_group("4K");
        group.throughput(Throughput::Bytes(SMALL));
        group.bench_function(BenchmarkId::new("read", side), |b| b.iter(|| target.read(&mut small, any())));
        group.bench_function(BenchmarkId::new("overwrite", side), |b| b.iter(|| target.write(&small, any())));
        target.flush();
        group.bench_function(BenchmarkId::new("overwrite and flush", side), |b| {
            b.iter(|| {
                target.write(&small, any());
                target.flush();
            });
        });
        group.finish();

        let mut group = criterion.benchmark_group("1M sequential");
        group.throughput(Throughput::Bytes(MIB));
        group.bench_function(BenchmarkId::new("read", side), |b| b.iter(|| target.read(&mut large, next())));
        group
            .bench_function(BenchmarkId::new("overwrite", side), |b| b.iter(|| target.write(&large, next())));
        target.flush();
        group.finish();
    }
    disk.close().unwrap();
}

/// A new block each time; raw: a new hole. Begins again at the front, as overwrites, in the unlikely case that a run gets
/// through all of the disk.
fn allocating(criterion: &mut Criterion, directory: &Path) {
    const BYTES: u64 = 1024 * GIB;
    let (raw, disk) = pair(directory, "new", BYTES);
    let mut group = criterion.benchmark_group("4K");
    for (side, target) in sides(&raw, &disk) {
        let mut next = (0..BYTES / BLOCK).map(|block| block * BLOCK).cycle();
        group.bench_function(BenchmarkId::new("new block and flush", side), |b| {
            b.iter(|| {
                target.write(&[1; SMALL as usize], next.next().unwrap_or(0));
                target.flush();
            });
        });
    }
    group.finish();
    disk.close().unwrap();
}

/// Making, and opening until the first read is answered; closing is not counted.
fn whole_images(criterion: &mut Criterion, directory: &Path) {
    const BYTES: u64 = 2040 * GIB;
    let mut group = criterion.benchmark_group("2040G");
    let (raw_path, disk_path) = (directory.join("open.raw"), directory.join("open.vhd"));
    create_raw(&raw_path, BYTES);
    CreateOptions::new(BYTES).create(&disk_path).unwrap();
    let mut buf = [0; SMALL as usize];
    group.bench_function("open and read/raw", |b| {
        b.iter(|| {
            let raw = File::options().read(true).write(true).open(&raw_path).unwrap();
            raw.read(&mut buf, 0);
        });
    });
    group.bench_function("open and read/cowvhd", |b| {
        b.iter_custom(|rounds| {
            let mut total = Duration::ZERO;
            for _ in 0..rounds {
                let start = std::time::Instant::now();
                let disk = OpenOptions::new().open(&disk_path).unwrap();
                disk.read(&mut buf, 0);
                total += start.elapsed();
                disk.close().unwrap();
            }
            total
        });
    });
    let mut names = 0..;
    let mut path = || directory.join(format!("create{}", names.next().unwrap_or(0)));
    group.bench_function("create/raw", |b| {
        b.iter_batched(
            &mut path,
            |path| {
                create_raw(&path, BYTES).sync_all().unwrap();
                Made(path)
            },
            BatchSize::PerIteration,
        );
    });
    group.bench_function("create/cowvhd", |b| {
        b.iter_batched(
            &mut path,
            |path| {
                CreateOptions::new(BYTES).create(&path).unwrap();
                Made(path)
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

/// A file that is removed after its creation was measured.
struct Made(std::path::PathBuf);

impl Drop for Made {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    let directory = directory();
    hot(&mut criterion, directory.path());
    allocating(&mut criterion, directory.path());
    whole_images(&mut criterion, directory.path());
    criterion.final_summary();
}
