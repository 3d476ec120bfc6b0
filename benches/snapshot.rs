//! What a snapshot costs those who write meanwhile: the longest write beside each of 100 snapshots of a large disk, against the
//! longest in as much time without one, right before it. Two threads write 4 KiB at random places as fast as they can; a third one
//! flushes now and then, and its waits are reported apart.
//!
//! `cargo bench --bench snapshot [-- GIB...]`; without sizes 64 and 2040.

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[allow(dead_code, reason = "shared with the other benchmarks")]
mod support;

use cowvhd::snapshot::SnapshotName;
use cowvhd::{CreateOptions, Disk, OpenOptions};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use support::{GIB, MIB, SMALL, directory};

const SNAPSHOTS: usize = 100;
const WRITERS: u64 = 2;
/// So many bytes of the disk are written to, in pieces all over it. A snapshot writes all of them back before it is done: each is
/// an I/O of its own, and there are 100 snapshots.
const TOUCHED: u64 = 32 * MIB;

/// When a call began, and how long it took.
type Call = (Instant, Duration);

/// The longest of the calls that were under way in some time.
fn longest(calls: &[Call], from: Instant, to: Instant) -> Duration {
    let within = calls.iter().filter(|(start, took)| *start < to && *start + *took > from);
    within.map(|(_, took)| *took).max().unwrap_or_default()
}

fn quantile(sorted: &[f64], part: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * part).round() as usize]
}

fn milliseconds(of: impl Iterator<Item = Duration>) -> Vec<f64> {
    let mut values: Vec<f64> = of.map(|took| took.as_secs_f64() * 1e3).collect();
    values.sort_by(f64::total_cmp);
    values
}

fn print(what: &str, values: &[f64]) {
    let [p50, p99, max] = [0.5, 0.99, 1.0].map(|part| quantile(values, part));
    println!("  {what:<42} p50 {p50:8.3} ms   p99 {p99:8.3} ms   max {max:8.3} ms");
}

/// Calls until it is told to stop, and notes each one.
fn note(stop: &AtomicBool, calls: &Mutex<Vec<Call>>, mut call: impl FnMut()) {
    let mut own = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        call();
        own.push((start, start.elapsed()));
    }
    calls.lock().unwrap().append(&mut own);
}

fn write_at_random(disk: &Disk, mut seed: u64) {
    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    let pieces = TOUCHED / SMALL;
    let stride = disk.size() / pieces / SMALL * SMALL;
    disk.write_at(&[seed as u8; SMALL as usize], (seed >> 33) % pieces * stride).unwrap();
}

fn measure(gib: u64) {
    let folder = directory();
    let path = folder.path().join("vm.vhd");
    CreateOptions::new(gib * GIB).create(&path).unwrap();
    let disk = OpenOptions::new().open(&path).unwrap();
    let stop = AtomicBool::new(false);
    let (writes, flushes) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let mut windows = Vec::new();
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (disk, stop, writes) = (&disk, &stop, &writes);
            let mut turn = writer << 40;
            scope.spawn(move || {
                note(stop, writes, || {
                    turn += 1;
                    write_at_random(disk, turn);
                });
            });
        }
        scope.spawn(|| {
            note(&stop, &flushes, || {
                thread::sleep(Duration::from_millis(50));
                disk.flush().unwrap();
            });
        });
        for number in 0..SNAPSHOTS {
            thread::sleep(Duration::from_millis(100));
            let start = Instant::now();
            disk.snapshot(&SnapshotName::new(&format!("s{number}")).unwrap()).unwrap();
            windows.push((start, Instant::now()));
        }
        stop.store(true, Ordering::Relaxed);
    });
    let (writes, flushes) = (writes.into_inner().unwrap(), flushes.into_inner().unwrap());
    let beside = milliseconds(windows.iter().map(|&(from, to)| longest(&writes, from, to)));
    let before = milliseconds(windows.iter().map(|&(from, to)| longest(&writes, from - (to - from), from)));
    println!("{gib} GiB, {} writes, {SNAPSHOTS} snapshots", writes.len());
    print("longest write beside a snapshot", &beside);
    print("longest write in as much time before it", &before);
    print("a write, all of them", &milliseconds(writes.iter().map(|(_, took)| *took)));
    print("a flush beside a snapshot, 50 ms of rest in", &{
        milliseconds(windows.iter().map(|&(from, to)| longest(&flushes, from, to)))
    });
    print("a snapshot, from call to return", &milliseconds(windows.iter().map(|(from, to)| *to - *from)));
    disk.close().unwrap();
}

fn main() {
    let sizes: Vec<u64> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let sizes = if sizes.is_empty() { vec![64, 2040] } else { sizes };
    sizes.into_iter().for_each(measure);
}
