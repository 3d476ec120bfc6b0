//! Thirty layers are merged into a running disk while its guest writes, and the process is killed again and again.
//!
//! What the guest has flushed is there after each kill, everything else is what it was, and neither the layers nor a foreign child of one
//! of them change in a byte. `COWVHD_SEED` repeats a run as far as processes allow.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use cowvhd::snapshot::merge_running;
use cowvhd::{CreateOptions, OpenOptions};
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

/// The process that is killed: it merges, and each step waits for the guest's next flush.
#[test]
#[ignore = "run by the other test"]
fn worker() {
    let folder = PathBuf::from(std::env::var_os("COWVHD_MERGE_DIR").unwrap());
    let first: u64 = std::env::var("COWVHD_MERGE_FIRST").unwrap().parse().unwrap();
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
        merge_running(disk, Some(&layer(&folder, 0)), &mut |_| {
            step.recv().unwrap();
            ControlFlow::Continue(())
        })
        .unwrap();
    });
    disk.close().unwrap();
    say("merged\n");
}

/// What the guest says on standard error until it ends, or is killed after some flushes: its last flushed value, and whether it merged.
fn run(folder: &Path, first: u64, kill_after: u64) -> (Option<u64>, bool) {
    let mut child = Command::new(std::env::current_exe().unwrap())
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

#[test]
fn a_merge_of_30_layers_survives_20_kills() {
    let seed = std::env::var("COWVHD_SEED").map_or(0x30, |seed| seed.parse().unwrap());
    println!("COWVHD_SEED={seed}");
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let mut content = make(folder, seed);
    // Another disk over one of the layers.
    let foreign = folder.join("clone.vhd");
    CreateOptions::child_of(&layer(folder, LAYERS / 2)).create(&foreign).unwrap();
    let disk = OpenOptions::new().open(&foreign).unwrap();
    disk.write_at(&[0x77; 8192], 5 << 20).unwrap();
    disk.close().unwrap();
    let foreign_content = read(&foreign);
    let untouched: Vec<PathBuf> =
        (0..LAYERS).map(|number| layer(folder, number)).chain([foreign.clone()]).collect();
    // All but the registry of children, which the merge changes.
    let bytes = |path: &PathBuf| {
        let mut bytes = fs::read(path).unwrap();
        bytes[64 << 10..256 << 10].fill(0);
        crc32fast::hash(&bytes)
    };
    let before: Vec<u32> = untouched.iter().map(bytes).collect();

    let mut flushes = 0;
    for attempt in 1.. {
        let first = attempt << 40;
        let kill_after = if attempt <= KILLS { 1 + mixed(seed ^ attempt) % 14 } else { u64::MAX };
        let (flushed, merged) = run(folder, first, kill_after);
        content = check(folder, &content, first, flushed);
        flushes += flushed.map_or(0, |flushed| (flushed - first) / WRITES + 1);
        assert!(read(&foreign) == foreign_content, "a foreign child shows something else");
        if merged {
            assert!(attempt > KILLS, "merged after {attempt} attempts: too few kills");
            break;
        }
    }
    let after: Vec<u32> = untouched.iter().map(bytes).collect();
    assert_eq!(after, before, "a file that is none of ours changed");
    // The merged layers are not needed any more, but for the foreign child.
    (LAYERS / 2 + 1..LAYERS).for_each(|number| fs::remove_file(layer(folder, number)).unwrap());
    assert!(read(&layer(folder, LAYERS)) == content);
    println!("{KILLS} kills, {flushes} flushes verified");
}
