//! cowvhd against a raw file, in turn within one run: prints medians and their ratio for each kind of work.
//!
//! A clock alone says little: machines differ, and one machine differs from itself a minute later. So both sides do a
//! short round each, many times, changing who begins; the ratio is the median over the rounds.
//!
//! `cargo bench --bench ratios [-- PART]` runs the kinds of work whose name contains PART.

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

mod support;

use cowvhd::{CreateOptions, OpenOptions};
use std::fs::File;
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};
use support::{BLOCK, GIB, KIB, MIB, Rng, SMALL, Target, create_raw, directory, fill, open_direct, pair};

/// Bytes of the disk whose content is in the page cache.
const HOT_BYTES: u64 = 256 * MIB;
const ROUNDS: usize = 15;
/// Small writes of one commit.
const COMMIT_WRITES: u64 = 16;

struct Bench {
    part: Option<String>,
}

impl Bench {
    fn wanted(&self, name: &str) -> bool {
        self.part.as_ref().is_none_or(|part| name.contains(part.as_str()))
    }

    /// Both sides do `operations` each round and say how long that took; prints nanoseconds per operation and the ratio.
    fn compare(
        &self,
        name: &str,
        limit: Option<f64>,
        operations: u64,
        mut raw: impl FnMut() -> Duration,
        mut disk: impl FnMut() -> Duration,
    ) {
        if !self.wanted(name) {
            return;
        }
        let mut rounds = Vec::new();
        for round in 0..=ROUNDS {
            let (raw, disk) = if round % 2 == 0 {
                let raw = raw();
                (raw, disk())
            } else {
                let disk = disk();
                (raw(), disk)
            };
            // The first round warms up.
            if round > 0 {
                rounds.push((raw.as_secs_f64(), disk.as_secs_f64()));
            }
        }
        let per_operation = 1e9 / operations as f64;
        let raw = median(rounds.iter().map(|(raw, _)| raw * per_operation));
        let disk = median(rounds.iter().map(|(_, disk)| disk * per_operation));
        let ratio = median(rounds.iter().map(|(raw, disk)| disk / raw));
        let goal = match limit {
            None => String::new(),
            Some(limit) if ratio <= limit => format!("<= {limit}"),
            Some(limit) => format!("<= {limit}: MISSED"),
        };
        println!("| {name} | {raw:.0} | {disk:.0} | {ratio:.2} | {goal} |");
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// How one thread of a round works on a target.
type Work = fn(target: &dyn Target, operations: u64, rng: &mut Rng);

fn reads(target: &dyn Target, operations: u64, rng: &mut Rng) {
    let mut buf = [0; SMALL as usize];
    for _ in 0..operations {
        target.read(&mut buf, rng.place(HOT_BYTES / SMALL, SMALL));
    }
    black_box(buf);
}

fn overwrites(target: &dyn Target, operations: u64, rng: &mut Rng) {
    let buf = [0x33; SMALL as usize];
    for _ in 0..operations {
        target.write(&buf, rng.place(HOT_BYTES / SMALL, SMALL));
    }
}

fn sequential_reads(target: &dyn Target, operations: u64, _: &mut Rng) {
    let mut buf = vec![0; MIB as usize];
    for at in 0..operations {
        target.read(&mut buf, at * MIB % HOT_BYTES);
    }
    black_box(buf);
}

fn sequential_overwrites(target: &dyn Target, operations: u64, _: &mut Rng) {
    let buf = vec![0x44; MIB as usize];
    for at in 0..operations {
        target.write(&buf, at * MIB % HOT_BYTES);
    }
}

fn flushed_overwrites(target: &dyn Target, operations: u64, rng: &mut Rng) {
    let buf = [0x55; SMALL as usize];
    for _ in 0..operations {
        target.write(&buf, rng.place(HOT_BYTES / SMALL, SMALL));
        target.flush();
    }
}

/// As a guest's file system or database commits: some scattered pages, then one flush for all of them.
fn commits(target: &dyn Target, operations: u64, rng: &mut Rng) {
    for _ in 0..operations {
        overwrites(target, COMMIT_WRITES, rng);
        target.flush();
    }
}

/// A round: `threads` threads at once, each with its own numbers, `operations` in all.
fn round(target: &dyn Target, work: Work, threads: u64, operations: u64, seed: &mut u64) -> Duration {
    *seed += 1;
    let seed = *seed * 0x9e37_79b9;
    timed(|| {
        if threads == 1 {
            return work(target, operations, &mut Rng(seed));
        }
        std::thread::scope(|scope| {
            for thread in 0..threads {
                scope.spawn(move || work(target, operations / threads, &mut Rng(seed + thread + 1)));
            }
        });
    })
}

/// A hot target's kinds of work: name, goal, what a thread does, threads, operations a round.
type HotWork = (&'static str, Option<f64>, Work, u64, u64);

fn hot(bench: &Bench, directory: &Path) {
    let works: [HotWork; 10] = [
        ("4K random read, 1 thread", Some(1.15), reads, 1, 40_000),
        ("4K random read, 4 threads", Some(1.15), reads, 4, 80_000),
        ("4K random overwrite, 1 thread", Some(1.15), overwrites, 1, 20_000),
        ("4K random overwrite, 4 threads", Some(1.15), overwrites, 4, 40_000),
        ("1M sequential read", None, sequential_reads, 1, 128),
        ("1M sequential overwrite", None, sequential_overwrites, 1, 64),
        ("4K overwrite + flush", Some(1.0), flushed_overwrites, 1, 40),
        ("16 x 4K overwrite + flush, per flush", None, commits, 1, 30),
        ("4K overwrite + flush, 4 threads", None, flushed_overwrites, 4, 80),
        (
            "1M sequential overwrite + flush at the end",
            None,
            |target, operations, rng| {
                sequential_overwrites(target, operations, rng);
                target.flush();
            },
            1,
            32,
        ),
    ];
    if !works.iter().any(|(name, ..)| bench.wanted(name)) {
        return;
    }
    let (raw, disk) = pair(directory, "hot", HOT_BYTES);
    fill([&raw, &disk], HOT_BYTES);
    for (name, limit, work, threads, operations) in works {
        raw.flush();
        Target::flush(&disk);
        let (mut raw_seed, mut disk_seed) = (0, 0);
        bench.compare(
            name,
            limit,
            operations,
            || round(&raw, work, threads, operations, &mut raw_seed),
            || round(&disk, work, threads, operations, &mut disk_seed),
        );
    }
    disk.close().unwrap();
}

/// A write into a new block each time; raw: into a new hole.
fn allocating(bench: &Bench, directory: &Path) {
    let flushed = |target: &dyn Target, next: &mut u64, operations: u64| {
        timed(|| {
            for _ in 0..operations {
                target.write(&[0x66; SMALL as usize], *next);
                target.flush();
                *next += BLOCK;
            }
        })
    };
    let unflushed = |target: &dyn Target, next: &mut u64, operations: u64| {
        let time = timed(|| {
            for _ in 0..operations {
                target.write(&[0x66; SMALL as usize], *next);
                *next += BLOCK;
            }
        });
        target.flush();
        time
    };
    let sequential = |target: &dyn Target, next: &mut u64, operations: u64| {
        let buf = vec![0x77; MIB as usize];
        timed(|| {
            for _ in 0..operations {
                target.write(&buf, *next);
                *next += MIB;
            }
            target.flush();
        })
    };
    type Allocate<'a> = &'a dyn Fn(&dyn Target, &mut u64, u64) -> Duration;
    let works: [(&str, Option<f64>, Allocate<'_>, u64); 3] = [
        ("4K write + flush, a new 2M block each", Some(1.0), &flushed, 40),
        ("4K write, a new 2M block each, flush not counted", None, &unflushed, 128),
        ("1M sequential write into new blocks, flush at the end", None, &sequential, 32),
    ];
    for (index, (name, limit, work, operations)) in works.into_iter().enumerate() {
        if bench.wanted(name) {
            let (raw, disk) = pair(directory, &format!("new{index}"), 64 * GIB);
            let (mut raw_next, mut disk_next) = (0, 0);
            bench.compare(
                name,
                limit,
                operations,
                || work(&raw, &mut raw_next, operations),
                || work(&disk, &mut disk_next, operations),
            );
            disk.close().unwrap();
        }
    }
}

/// Both sides past the page cache.
fn direct(bench: &Bench, directory: &Path) {
    let works: [HotWork; 4] = [
        ("4K random read, O_DIRECT", None, aligned_reads, 1, 200),
        ("4K random overwrite, O_DIRECT", None, aligned_overwrites, 1, 200),
        (
            "4K overwrite + flush, O_DIRECT",
            None,
            |target, operations, rng| {
                for _ in 0..operations {
                    aligned_overwrites(target, 1, rng);
                    target.flush();
                }
            },
            1,
            40,
        ),
        ("1M sequential read, O_DIRECT", None, aligned_sequential_reads, 1, 32),
    ];
    if !works.iter().any(|(name, ..)| bench.wanted(name)) {
        return;
    }
    let (raw, disk) = pair(directory, "direct", HOT_BYTES);
    fill([&raw, &disk], HOT_BYTES);
    disk.close().unwrap();
    drop((raw, disk));
    let raw = open_direct(&directory.join("direct.raw"));
    let disk = OpenOptions::new().direct(true).open(&directory.join("direct.vhd")).unwrap();
    for (name, limit, work, threads, operations) in works {
        let (mut raw_seed, mut disk_seed) = (0, 0);
        bench.compare(
            name,
            limit,
            operations,
            || round(&raw, work, threads, operations, &mut raw_seed),
            || round(&disk, work, threads, operations, &mut disk_seed),
        );
    }
    disk.close().unwrap();
}

/// A buffer that direct transfers need no copy for.
#[repr(align(4096))]
struct Aligned<const N: usize>([u8; N]);

fn aligned_reads(target: &dyn Target, operations: u64, rng: &mut Rng) {
    let mut buf = Aligned([0; SMALL as usize]);
    for _ in 0..operations {
        target.read(&mut buf.0, rng.place(HOT_BYTES / SMALL, SMALL));
    }
    black_box(buf.0);
}

fn aligned_overwrites(target: &dyn Target, operations: u64, rng: &mut Rng) {
    let buf = Aligned([0x33; SMALL as usize]);
    for _ in 0..operations {
        target.write(&buf.0, rng.place(HOT_BYTES / SMALL, SMALL));
    }
}

fn aligned_sequential_reads(target: &dyn Target, operations: u64, _: &mut Rng) {
    let mut buf = Box::new(Aligned([0; MIB as usize]));
    for at in 0..operations {
        target.read(&mut buf.0, at * MIB % HOT_BYTES);
    }
    black_box(buf.0.first());
}

fn open_and_read(bench: &Bench, directory: &Path) {
    for (size, name) in [(GIB, "1 GiB"), (2040 * GIB, "2040 GiB")] {
        let (raw_path, disk_path) =
            (directory.join(format!("open {name}.raw")), directory.join(format!("open {name}.vhd")));
        let raw = create_raw(&raw_path, size);
        raw.write(&[1; SMALL as usize], size / 2);
        raw.flush();
        CreateOptions::new(size).create(&disk_path).unwrap();
        let disk = OpenOptions::new().open(&disk_path).unwrap();
        disk.write_at(&[1; SMALL as usize], size / 2).unwrap();
        disk.close().unwrap();
        let mut buf = [0; SMALL as usize];
        for read_only in [false, true] {
            let mut raw_buf = [0; SMALL as usize];
            let how = if read_only { "read-only" } else { "for writing" };
            bench.compare(
                &format!("open {how} + first read, {name}"),
                None,
                1,
                || {
                    timed(|| {
                        File::options()
                            .read(true)
                            .write(!read_only)
                            .open(&raw_path)
                            .unwrap()
                            .read(&mut raw_buf, size / 2);
                    })
                },
                || {
                    let start = Instant::now();
                    let disk = OpenOptions::new().read_only(read_only).open(&disk_path).unwrap();
                    disk.read(&mut buf, size / 2);
                    let time = start.elapsed();
                    disk.close().unwrap();
                    time
                },
            );
        }
    }
}

fn create(bench: &Bench, directory: &Path) {
    let mut names = 0..;
    let mut path = || directory.join(format!("create{}", names.next().unwrap_or(0)));
    let mut paths: Vec<_> = (0..2 * (ROUNDS + 1)).map(|_| path()).collect();
    let mut disk_paths = paths.split_off(ROUNDS + 1);
    bench.compare(
        "create 2040 GiB",
        None,
        1,
        || {
            let path = paths.pop().unwrap();
            timed(|| create_raw(&path, 2040 * GIB).sync_all().unwrap())
        },
        || {
            let path = disk_paths.pop().unwrap();
            timed(|| CreateOptions::new(2040 * GIB).create(&path).unwrap())
        },
    );
}

/// Kibibytes of this process that are in memory and not a file's.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// What an open disk of the greatest size keeps in memory while it is read and written.
fn resident(bench: &Bench, directory: &Path) {
    if !bench.wanted("resident") {
        return;
    }
    let path = directory.join("resident.vhd");
    CreateOptions::new(2040 * GIB).create(&path).unwrap();
    let before = resident_kib();
    let disk = OpenOptions::new().open(&path).unwrap();
    let mut rng = Rng(1);
    let mut most = resident_kib();
    for _ in 0..2000 {
        disk.write_at(&[1; SMALL as usize], rng.place(2040 * GIB / BLOCK, BLOCK)).unwrap();
        disk.read_at(&mut [0; SMALL as usize], rng.place(2040 * GIB / SMALL, SMALL)).unwrap();
        most = most.max(resident_kib());
    }
    disk.flush().unwrap();
    disk.close().unwrap();
    let most = most.max(resident_kib()).saturating_sub(before);
    println!("\n2040 GiB open, 2000 random new blocks written: {:.1} MiB resident", most as f64 / KIB as f64);
}

fn main() {
    // cargo passes its own flags, which are of no use here.
    let bench = Bench { part: std::env::args().skip(1).find(|argument| !argument.starts_with('-')) };
    let directory = directory();
    println!("| work | raw ns | cowvhd ns | ratio | goal |\n|---|---|---|---|---|");
    hot(&bench, directory.path());
    allocating(&bench, directory.path());
    direct(&bench, directory.path());
    open_and_read(&bench, directory.path());
    create(&bench, directory.path());
    resident(&bench, directory.path());
}
