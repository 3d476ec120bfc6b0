//! Chains of differencing disks by depth: random reads after warm-up relative to a chain of one, the first touch, and opening.
//!
//! Each layer writes 1 % of the disk in scattered pieces of 64 KiB. All depths are measured in turn within one run, and ratios
//! are medians over the rounds. What of a difference is the kernel's, who looks for pages in one file or in a thousand, show
//! bare `pread`s of places drawn in the same way from the files that hold them.
//!
//! Then the same chains as qcow2, read by `qemu-img bench`, relative to its own depth of one.
//!
//! `cargo bench --bench chains [-- DEPTH]` goes up to that depth (1000).

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[allow(dead_code, reason = "shared with the other benchmarks")]
mod support;

use cowvhd::{CreateOptions, Disk, OpenOptions};
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use support::{BLOCK, GIB, KIB, Rng, SMALL, directory, qcow2};

const SIZE: u64 = GIB;
const PIECE: u64 = 64 * KIB;
const ROUNDS: usize = 12;
const READS: u64 = 20_000;
/// The disk whose open is measured; nothing but one block a layer is written to it.
const SPARSE_SIZE: u64 = 64 * GIB;

/// The image with `depth` layers.
fn name(folder: &Path, depth: u64) -> PathBuf {
    folder.join(format!("{depth}.vhd"))
}

/// Makes a chain of `depth` images; `write` fills each.
fn build(folder: &Path, size: u64, depth: u64, mut write: impl FnMut(&Disk)) {
    for layer in 1..=depth {
        let options = match layer {
            1 => CreateOptions::new(size),
            _ => CreateOptions::child_of(&name(folder, layer - 1)),
        };
        let path = name(folder, layer);
        options.create(&path).unwrap();
        let disk = OpenOptions::new().open(&path).unwrap();
        write(&disk);
        disk.close().unwrap();
    }
}

fn open(folder: &Path, depth: u64) -> Disk {
    OpenOptions::new().read_only(true).open(&name(folder, depth)).unwrap()
}

fn read(disk: &Disk, rng: &mut Rng) -> Duration {
    let mut buf = [0; SMALL as usize];
    let start = Instant::now();
    for _ in 0..READS {
        disk.read_at(&mut buf, rng.place(SIZE / SMALL, SMALL)).unwrap();
        black_box(&buf);
    }
    start.elapsed()
}

/// A bare descriptor and where in its file a piece of the disk is.
type Place = (usize, u64);

/// The files of a chain, from the top down, and the places of all small pieces of the disk.
struct Bare {
    files: Vec<File>,
    places: Vec<Place>,
}

impl Bare {
    fn new(folder: &Path, depth: u64, disk: &Disk) -> Self {
        let files = (1..=depth).rev().map(|layer| File::open(name(folder, layer)).unwrap()).collect();
        let mut places = Vec::new();
        for part in disk.map(0, SIZE).unwrap() {
            let start = part.file_offset.unwrap();
            let pieces = (start..start + part.extent.length).step_by(SMALL as usize);
            places.extend(pieces.map(|at| (part.depth as usize, at)));
        }
        Bare { files, places }
    }

    fn read(&self, rng: &mut Rng) -> Duration {
        let places: Vec<Place> =
            (0..READS).map(|_| self.places[rng.place(SIZE / SMALL, 1) as usize]).collect();
        let mut buf = [0; SMALL as usize];
        let start = Instant::now();
        for (file, at) in places {
            self.files[file].read_exact_at(&mut buf, at).unwrap();
            black_box(&buf);
        }
        start.elapsed()
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Memory of this process, in MiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

fn main() {
    let deepest = std::env::args().skip(1).find_map(|text| text.parse().ok()).unwrap_or(1000);
    let depths: Vec<u64> = [1, 10, 100, 1000].into_iter().filter(|&depth| depth <= deepest).collect();

    let sparse = directory();
    let mut block = 0;
    build(sparse.path(), SPARSE_SIZE, deepest, |disk| {
        disk.write_at(&[1; SMALL as usize], block * BLOCK).unwrap();
        block = (block + 31) % (SPARSE_SIZE / BLOCK);
    });
    let before = resident();
    let start = Instant::now();
    let disk = open(sparse.path(), deepest);
    println!(
        "open {deepest} layers of {} GiB: {:.1} ms, resident {} MiB (before: {before})",
        SPARSE_SIZE / GIB,
        start.elapsed().as_secs_f64() * 1e3,
        resident()
    );
    drop(disk);
    drop(sparse);

    let folder = directory();
    let mut rng = Rng(0x1234_5678_9abc_def1);
    let mut first = true;
    build(folder.path(), SIZE, deepest, |disk| {
        // The root holds everything, so that no read is spared the file.
        if std::mem::take(&mut first) {
            (0..SIZE / PIECE).for_each(|piece| disk.write_at(&[2; PIECE as usize], piece * PIECE).unwrap());
        }
        for _ in 0..SIZE / PIECE / 100 {
            disk.write_at(&[3; PIECE as usize], rng.place(SIZE / PIECE, PIECE)).unwrap();
        }
    });
    let disks: Vec<Disk> = depths.iter().map(|&depth| open(folder.path(), depth)).collect();
    for (disk, depth) in disks.iter().zip(&depths) {
        let blocks = SIZE / BLOCK;
        let start = Instant::now();
        let mut buf = [0; SMALL as usize];
        (0..blocks).for_each(|block| disk.read_at(&mut buf, block * BLOCK).unwrap());
        let each = start.elapsed().as_secs_f64() * 1e6 / blocks as f64;
        println!("depth {depth:4}: first touch of a block {each:.1} us");
        read(disk, &mut rng);
    }
    let bare: Vec<Bare> =
        disks.iter().zip(&depths).map(|(disk, &depth)| Bare::new(folder.path(), depth, disk)).collect();
    let mut rounds: Vec<Vec<f64>> = vec![Vec::new(); depths.len()];
    let mut bare_rounds = rounds.clone();
    for round in 0..ROUNDS {
        for turn in 0..disks.len() {
            let at = (turn + round) % disks.len();
            // Who begins changes with the round.
            for side in [round % 2, (round + 1) % 2] {
                match side {
                    0 => rounds[at].push(read(&disks[at], &mut rng).as_secs_f64()),
                    _ => bare_rounds[at].push(bare[at].read(&mut rng).as_secs_f64()),
                }
            }
        }
    }
    println!("\n| depth | ns a read | of depth 1 | ns a bare read | of depth 1 | bare, of the same depth |");
    println!("|---|---|---|---|---|---|");
    for (at, depth) in depths.iter().enumerate() {
        let ratio =
            |one: &[f64], this: &[f64]| median(one.iter().zip(this).map(|(one, this)| one / this).collect());
        let nanoseconds = |times: &[f64]| median(times.to_vec()) * 1e9 / READS as f64;
        println!(
            "| {depth} | {:.0} | {:.2} | {:.0} | {:.2} | {:.2} |",
            nanoseconds(&rounds[at]),
            ratio(&rounds[0], &rounds[at]),
            nanoseconds(&bare_rounds[at]),
            ratio(&bare_rounds[0], &bare_rounds[at]),
            ratio(&bare_rounds[at], &rounds[at]),
        );
    }
    drop(disks);
    drop(folder);
    neighbour(&depths, &mut rng);
}

/// QEMU's curve. Each figure is a process of its own; what it takes to start and to open the chain is not in it.
fn neighbour(depths: &[u64], rng: &mut Rng) {
    let folder = directory();
    let deepest = depths.last().copied().unwrap_or(1);
    if qcow2::build(folder.path(), deepest, rng).is_none() {
        println!("\nqcow2: no chain could be made (apt-get install qemu-utils)");
        return;
    }
    println!("\n| depth | qcow2 by QEMU, ns a read | of depth 1 |\n|---|---|---|");
    let mut rounds: Vec<Vec<f64>> = vec![Vec::new(); depths.len()];
    for round in 0..6 {
        for (times, &depth) in rounds.iter_mut().zip(depths) {
            match qcow2::read(folder.path(), depth) {
                // The first one warms up.
                Some(seconds) if round > 0 => times.push(seconds),
                _ => {}
            }
        }
    }
    let first = median(rounds.first().cloned().unwrap_or_default());
    for (times, depth) in rounds.into_iter().zip(depths) {
        if times.is_empty() {
            println!("| {depth} | cannot be opened | |");
        } else {
            let seconds = median(times);
            println!("| {depth} | {:.0} | {:.3} |", seconds * 1e9 / qcow2::READS as f64, first / seconds);
        }
    }
}
