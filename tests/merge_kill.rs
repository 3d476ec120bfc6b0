//! Thirty layers are merged into a running disk while its guest writes, and the process is killed again and again.
//!
//! What the guest has flushed is there after each kill, everything else is what it was, and neither the layers nor a foreign child of one
//! of them change in a byte. The same when all layers are merged, so that the disk is to need no parent, with kills at any step up to the last. `COWVHD_SEED` repeats a run as far as processes allow.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use cowvhd::snapshot::merge_running;
use cowvhd::vhd::DiskType;
use cowvhd::{CreateOptions, ErrorKind, OpenOptions};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::sync_channel;

const SIZE: u64 = 48 << 20;
const SECTOR: usize = 512;
const LAYERS: usize = 30;
const KILLS: u64 = 20;
/// When all layers are merged, so many steps go with a flush, and a kill comes at most so many flushes later than the one before.
const STEPS: u64 = 4;
const STRIDE: u64 = 40;
/// Writes of the guest between two flushes.
const WRITES: u64 = 4;

/// Numbers that look random (splitmix64).
fn mixed(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// The sector that the guest writes its number `value` to.
fn sector_of(value: u64) -> usize {
    (mixed(value) % (SIZE / SECTOR as u64)) as usize
}

fn filled(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(SECTOR / 8)
}

fn layer(folder: &Path, number: usize) -> PathBuf {
    folder.join(if number == LAYERS { "vm.vhd".into() } else { format!("vm@{number}.vhd") })
}

/// Makes the chain; returns what the disk holds.
fn make(folder: &Path, seed: u64) -> Vec<u8> {
    let mut content = vec![0; SIZE as usize];
    for number in 0..=LAYERS {
        let path = layer(folder, number);
        match number {
            0 => CreateOptions::new(SIZE).create(&path).unwrap(),
            _ => CreateOptions::child_of(&layer(folder, number - 1)).create(&path).unwrap(),
        }
        let disk = OpenOptions::new().open(&path).unwrap();
        for write in 0..12 {
            let random = mixed(seed ^ (number as u64) << 32 ^ write);
            let (offset, length) = (random % (SIZE - (64 << 10)) / 512 * 512, 512 * (1 + random % 127));
            let range = offset as usize..(offset + length) as usize;
            content[range.clone()].copy_from_slice(&filled(random).repeat((length / 512) as usize));
            disk.write_at(&content[range], offset).unwrap();
        }
        disk.close().unwrap();
    }
    content
}

fn read(path: &Path) -> Vec<u8> {
    let disk = OpenOptions::new().read_only(true).open(path).unwrap();
    let mut content = vec![0xee; SIZE as usize];
    disk.read_at(&mut content, 0).unwrap();
    content
}

/// Says a line in one write, so that a kill leaves all of it or nothing.
fn say(line: &str) {
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

/// The process that is killed: it merges, and each step, or the first of some, waits for the guest's next flush.
#[test]
#[ignore = "run by the other test"]
fn worker() {
    let folder = PathBuf::from(std::env::var_os("COWVHD_MERGE_DIR").unwrap());
    let first: u64 = std::env::var("COWVHD_MERGE_FIRST").unwrap().parse().unwrap();
    let until = std::env::var_os("COWVHD_MERGE_ALL").is_none().then(|| layer(&folder, 0));
    let steps_of_flush = if until.is_some() { 1 } else { STEPS };
    let disk = OpenOptions::new().open(&layer(&folder, LAYERS)).unwrap();
    let (flushed, step) = sync_channel(0);
    std::thread::scope(|scope| {
        let disk = &disk;
        scope.spawn(move || {
            for value in first.. {
                disk.write_at(&filled(value), (sector_of(value) * SECTOR) as u64).unwrap();
                if value % WRITES == 0 {
                    disk.flush().unwrap();
                    say(&format!("flushed {value}\n"));
                    if flushed.send(()).is_err() {
                        return;
                    }
                }
            }
        });
        let step = step;
        let mut steps = 0;
        let merged = merge_running(disk, until.as_deref(), &mut |_| {
            if steps % steps_of_flush == 0 {
                step.recv().unwrap();
            }
            steps += 1;
            ControlFlow::Continue(())
        });
        match merged {
            // The one that was killed had come to its end.
            Err(error) if until.is_none() && error.kind() == ErrorKind::InvalidInput => {}
            merged => drop(merged.unwrap()),
        }
    });
    disk.close().unwrap();
    say("merged\n");
}

/// What the guest says on standard error until it ends, or is killed after some flushes: its last flushed value, and whether it merged.
fn run(folder: &Path, all: bool, first: u64, kill_after: u64) -> (Option<u64>, bool) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    if all {
        command.env("COWVHD_MERGE_ALL", "yes");
    }
    let mut child = command
        .args(["worker", "--exact", "--ignored", "--nocapture"])
        .env("COWVHD_MERGE_DIR", folder)
        .env("COWVHD_MERGE_FIRST", first.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut flushed, mut merged, mut flushes) = (None, false, 0);
    let mut said = String::new();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    loop {
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        said.push_str(&line);
        // One without an end was not said to the end.
        let Some(line) = line.strip_suffix('\n') else { break };
        if let Some(value) = line.strip_prefix("flushed ") {
            flushed = Some(value.parse().unwrap());
            flushes += 1;
            if flushes == kill_after {
                child.kill().unwrap();
            }
        }
        merged |= line == "merged";
    }
    let status = child.wait().unwrap();
    assert!(flushes >= kill_after || (merged && status.success()), "{status}: {said}");
    (flushed, merged)
}

/// Checks the disk against what it held before; returns what it holds now.
fn check(folder: &Path, before: &[u8], first: u64, flushed: Option<u64>) -> Vec<u8> {
    let now = read(&layer(folder, LAYERS));
    // The last value that each sector must have got.
    let mut owed = std::collections::HashMap::new();
    (first..=flushed.unwrap_or(0)).for_each(|value| {
        owed.insert(sector_of(value), value);
    });
    for (sector, (now, before)) in now.chunks(SECTOR).zip(before.chunks(SECTOR)).enumerate() {
        let value = u64::from_le_bytes(now[..8].try_into().unwrap());
        let is_new = value >= first && value < first + (1 << 32) && sector_of(value) == sector;
        let whole = now == filled(value);
        match owed.get(&sector) {
            Some(&least) => {
                assert!(is_new && whole && value >= least, "sector {sector}: {value}, not {least}")
            }
            None => assert!(now == before || (is_new && whole), "sector {sector} holds {value}"),
        }
    }
    now
}

/// A chain with another disk over one of its layers, and what must not change.
struct Bench {
    dir: tempfile::TempDir,
    /// What the disk holds.
    content: Vec<u8>,
    foreign_content: Vec<u8>,
    untouched: Vec<u32>,
    flushes: u64,
}

impl Bench {
    fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path();
        let content = make(folder, seed);
        let foreign = folder.join("clone.vhd");
        CreateOptions::child_of(&layer(folder, LAYERS / 2)).create(&foreign).unwrap();
        let disk = OpenOptions::new().open(&foreign).unwrap();
        disk.write_at(&[0x77; 8192], 5 << 20).unwrap();
        disk.close().unwrap();
        let foreign_content = read(&foreign);
        let mut bench = Bench { dir, content, foreign_content, untouched: Vec::new(), flushes: 0 };
        bench.untouched = bench.sums();
        bench
    }

    fn folder(&self) -> &Path {
        self.dir.path()
    }

    /// Of all other files, without the registry of children, which the merge changes.
    fn sums(&self) -> Vec<u32> {
        let layers = (0..LAYERS).map(|number| layer(self.folder(), number));
        let sum = |path: PathBuf| {
            let mut bytes = fs::read(path).unwrap();
            bytes[64 << 10..256 << 10].fill(0);
            crc32fast::hash(&bytes)
        };
        layers.chain([self.folder().join("clone.vhd")]).map(sum).collect()
    }

    /// Lets the layers be merged, by a process that is killed after so many flushes; whether it came to its end.
    fn attempt(&mut self, all: bool, number: u64, kill_after: u64) -> bool {
        let first = number << 40;
        let (flushed, merged) = run(self.folder(), all, first, kill_after);
        self.content = check(self.folder(), &self.content, first, flushed);
        self.flushes += flushed.map_or(0, |flushed| (flushed - first) / WRITES + 1);
        let foreign = read(&self.folder().join("clone.vhd"));
        assert!(foreign == self.foreign_content, "a foreign child shows something else");
        merged
    }

    /// The layers that are merged are not needed any more, but for the foreign child.
    fn end(self, all: bool) {
        assert_eq!(self.sums(), self.untouched, "a file that is none of ours changed");
        let kept = if all { 0..0 } else { 0..LAYERS / 2 + 1 };
        let gone = (0..LAYERS).filter(|number| !kept.contains(number));
        gone.for_each(|number| fs::remove_file(layer(self.folder(), number)).unwrap());
        assert!(read(&layer(self.folder(), LAYERS)) == self.content);
    }
}

fn seed() -> u64 {
    let seed = std::env::var("COWVHD_SEED").map_or(0x30, |seed| seed.parse().unwrap());
    println!("COWVHD_SEED={seed}");
    seed
}

#[test]
fn a_merge_of_30_layers_survives_20_kills() {
    let seed = seed();
    let mut bench = Bench::new(seed);
    for attempt in 1.. {
        let kill_after = if attempt <= KILLS { 1 + mixed(seed ^ attempt) % 14 } else { u64::MAX };
        if bench.attempt(false, attempt, kill_after) {
            assert!(attempt > KILLS, "merged after {attempt} attempts: too few kills");
            break;
        }
    }
    println!("{KILLS} kills, {} flushes verified", bench.flushes);
    bench.end(false);
}

/// With each kill later than the one before they come to all steps, those behind the last copy among them.
#[test]
fn a_merge_of_all_layers_survives_kills_at_any_step() {
    let seed = seed() ^ 0xa11;
    let mut bench = Bench::new(seed);
    let (mut kills, mut kill_after) = (0, 0);
    for attempt in 1.. {
        kill_after += 1 + mixed(seed ^ attempt) % STRIDE;
        if bench.attempt(true, attempt, kill_after) {
            break;
        }
        kills += 1;
    }
    assert!(kills >= 4, "merged after {kills} kills: too few");
    let disk = OpenOptions::new().read_only(true).open(&layer(bench.folder(), LAYERS)).unwrap();
    assert_eq!(disk.disk_type(), DiskType::Dynamic);
    drop(disk);
    println!(
        "{kills} kills, the last one due after {kill_after} flushes, {} flushes verified",
        bench.flushes
    );
    bench.end(true);
}
