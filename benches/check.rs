//! What a check costs: images of four sizes up to the largest, all of whose blocks are there, of which only the metadata takes
//! space (4 KiB for 2 MiB of disk: 4 GiB at 2040 GiB). Each check is a process of its own, so that its memory can be told; the first
//! one warms the cache and does not count. Beside it, in turn, what nobody can do without: reading all block pages with one thread.
//!
//! `cargo bench --bench check [-- GIB...]`; without sizes 255, 510, 1020 and 2040. `COWVHD_BENCH_DIR` names the file system; one in
//! memory (`/dev/shm`) is always warm.

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[allow(dead_code, reason = "shared with the other benchmarks")]
mod support;

use cowvhd::CreateOptions;
use cowvhd::check::check;
use cowvhd::vfs::HostVfs;
use std::env;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::{BLOCK, GIB, MIB, directory};

const ROUNDS: usize = 5;
const TABLE: u64 = 3 * MIB;
const SLOTS: u64 = 7 * MIB;
const STRIDE: u64 = BLOCK + 4096;
/// Tells a process that it is the one that checks.
const CHECK: &str = "--check";
const READ: &str = "--read";

/// An image as cowvhd leaves it that has written to every block, without the blocks' data.
fn fill(path: &Path, size: u64) {
    CreateOptions::new(size).create(path).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut footer = [0; 512];
    file.read_exact_at(&mut footer, 0).unwrap();
    let blocks = size / BLOCK;
    let mut page = [0; 4096];
    page[3584..].fill(0xff);
    page[..8].copy_from_slice(b"cowvhdBL");
    page[16..32].copy_from_slice(&footer[68..84]);
    let mut table = Vec::new();
    for block in 0..blocks {
        let at = SLOTS + block * STRIDE;
        page[8..16].copy_from_slice(&at.to_be_bytes());
        page[32..36].copy_from_slice(&(block as u32).to_be_bytes());
        page[40..48].copy_from_slice(&(block + 1).to_be_bytes());
        let crc = crc32fast::hash(&page[..60]);
        page[60..64].copy_from_slice(&crc.to_be_bytes());
        file.write_all_at(&page, at).unwrap();
        table.extend_from_slice(&(((at + 3584) / 512) as u32).to_be_bytes());
    }
    file.write_all_at(&table, TABLE).unwrap();
    let end = SLOTS + blocks * STRIDE;
    file.set_len(end).unwrap();
    file.write_all_at(&footer, end).unwrap();
    for at in [4096, 8192] {
        let mut superblock = vec![0; 4096];
        file.read_exact_at(&mut superblock, at).unwrap();
        superblock[128..136].copy_from_slice(&(blocks + 1).to_be_bytes());
        superblock[144..152].copy_from_slice(&(end + 512).to_be_bytes());
        superblock[160..164].copy_from_slice(&crc32fast::hash(&table).to_be_bytes());
        let crc = crc32fast::hash(&superblock[..4092]);
        superblock[4092..].copy_from_slice(&crc.to_be_bytes());
        file.write_all_at(&superblock, at).unwrap();
    }
    file.sync_data().unwrap();
}

/// Checks, in a process of its own, and prints what it took: seconds of the clock, of the processors, and KiB of memory at most.
fn check_here(path: &Path) {
    report(|| {
        let report = check(Arc::new(HostVfs), path).unwrap();
        // Only the time of change is another one.
        assert_eq!(report.worst(), None, "{:?}", report.findings());
        assert_eq!(report.allocated_blocks, report.total_blocks);
    });
}

fn read_here(path: &Path) {
    report(|| {
        let file = File::open(path).unwrap();
        let end = file.metadata().unwrap().len() - 512;
        let mut page = [0; 4096];
        for at in (SLOTS..end).step_by(STRIDE as usize) {
            file.read_exact_at(&mut page, at).unwrap();
        }
    });
}

fn report(work: impl FnOnce()) {
    let start = Instant::now();
    work();
    let wall = start.elapsed().as_secs_f64();
    let field = |file: &str, name: &str| -> f64 {
        let text = std::fs::read_to_string(file).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or(&text).to_string();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let ticks: Vec<f64> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|t| t.parse().unwrap())
        .collect();
    let cpu = ticks.iter().sum::<f64>() / 100.0;
    println!("{wall} {cpu} {}", field("/proc/self/status", "VmHWM:"));
}

/// Wall and processor seconds, and KiB.
fn run(what: &str, path: &Path) -> [f64; 3] {
    let output = Command::new(env::current_exe().unwrap()).arg(what).arg(path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let values: Vec<f64> = text.split_whitespace().map(|word| word.parse().unwrap()).collect();
    values.try_into().unwrap()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match &arguments[..] {
        [what, path] if what == CHECK => return check_here(Path::new(path)),
        [what, path] if what == READ => return read_here(Path::new(path)),
        _ => {}
    }
    let mut sizes: Vec<u64> = arguments.iter().filter_map(|argument| argument.parse().ok()).collect();
    if sizes.is_empty() {
        sizes = vec![255, 510, 1020, 2040];
    }
    println!(
        "{:>8} {:>9} {:>9} {:>9} {:>12} {:>12} {:>12}",
        "GiB", "seconds", "CPU", "MiB", "us per block", "to reading", "CPU ratio"
    );
    for gib in sizes {
        let dir = directory();
        let path = dir.path().join("disk.vhd");
        fill(&path, gib * GIB);
        run(CHECK, &path);
        let pairs: Vec<_> = (0..ROUNDS).map(|_| (run(CHECK, &path), run(READ, &path))).collect();
        let of = |field: usize| median(pairs.iter().map(|(check, _)| check[field]).collect());
        let ratio = median(pairs.iter().map(|(check, read)| check[0] / read[0]).collect());
        let cpu = median(pairs.iter().map(|(check, read)| check[1] / read[1]).collect());
        let blocks = (gib * GIB / BLOCK) as f64;
        let per_block = Duration::from_secs_f64(of(1) / blocks).as_nanos() as f64 / 1e3;
        println!(
            "{gib:>8} {:>9.3} {:>9.3} {:>9.1} {per_block:>12.3} {ratio:>12.2} {cpu:>12.2}",
            of(0),
            of(1),
            of(2) / 1024.0
        );
    }
}
