//! Resuming a VM: a private map of its saved RAM against a copy of it, and what clones of one state occupy together.
//!
//! The RAM is dense: no page is zero. Both ways start with the file in the page cache and end when a page in the middle was read
//! and written, which is when a guest could execute its first instruction. The clones are processes that read every page of their
//! map and write to 1 % of them; what they occupy is what Linux says of the map (`smaps`): Rss counts a shared page in each
//! process, Pss its share.
//!
//! `cargo bench --bench resume`

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![allow(unsafe_code, reason = "what is mapped is touched through its pointer, within its length")]

#[allow(dead_code, reason = "shared with the other benchmarks")]
mod support;

use cowvhd::state::{Digest, Draft, ManifestDisk, PrivateMap, StateBlob, StateNames, VmState};
use cowvhd::vfs::HostVfs;
use cowvhd::vhd::UniqueId;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::directory;

const PAGE: usize = 4096;
const MIB: u64 = 1 << 20;
const ROUNDS: usize = 9;
const CLONES: usize = 4;
const DISK: UniqueId = UniqueId::from_bytes([1; 16]);
const SEAL: [u8; 16] = [2; 16];

fn names(folder: &Path) -> StateNames {
    StateNames::new(&folder.join("vm.vhd"), "bench").unwrap()
}

/// A state of `bytes` of RAM; its digest.
fn save(folder: &Path, bytes: u64) -> Digest {
    let draft = Draft::new(Arc::new(HostVfs), names(folder)).unwrap();
    let ram = draft.blob("ram").unwrap();
    let mut piece = vec![0; MIB as usize];
    for at in (0..bytes).step_by(piece.len()) {
        for (number, word) in piece.chunks_mut(8).enumerate() {
            word.copy_from_slice(&((at + number as u64) | 1).to_le_bytes());
        }
        ram.write_at(&piece, at).unwrap();
    }
    let disk = ManifestDisk { disk_id: DISK, seal_id: SEAL, file_name: b"vm.vhd".to_vec() };
    let digest = draft.write_manifest(vec![disk]).unwrap();
    draft.publish().unwrap();
    digest
}

fn open(folder: &Path, digest: Digest) -> VmState {
    VmState::open(&HostVfs, &names(folder), DISK, SEAL, digest).unwrap()
}

/// Reads a page of a map and writes to it.
fn touch(map: &PrivateMap, page: usize) -> u8 {
    assert!((page + 1) * PAGE <= map.length());
    // SAFETY: the page lies within the map.
    unsafe {
        let at = map.as_mut_ptr().add(page * PAGE);
        let value = at.read_volatile();
        at.write_volatile(!value);
        value
    }
}

/// Memory that a guest's RAM is copied into before it runs.
fn copy(ram: &StateBlob) -> Vec<u8> {
    let mut memory = vec![0; ram.length() as usize];
    for (piece, at) in memory.chunks_mut(MIB as usize).zip((0..).step_by(MIB as usize)) {
        ram.read_at(piece, at).unwrap();
    }
    let middle = memory.len() / 2;
    memory[middle] = !memory[middle];
    memory
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, word, folder, digest] = &arguments[..]
        && word == "clone"
    {
        return clone(Path::new(folder), digest);
    }
    for bytes in [256 * MIB, 2048 * MIB] {
        let dir = directory();
        let digest = save(dir.path(), bytes);
        let (mut maps, mut copies, mut checks) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let start = Instant::now();
            let state = open(dir.path(), digest);
            let map = state.blob("ram").unwrap().map_private().unwrap();
            touch(&map, map.length() / PAGE / 2);
            maps.push(start.elapsed());
            drop(map);

            let start = Instant::now();
            let state = open(dir.path(), digest);
            let memory = copy(state.blob("ram").unwrap());
            copies.push(start.elapsed());
            drop(memory);

            let start = Instant::now();
            state.verify().unwrap();
            checks.push(start.elapsed());
        }
        let (map, copy, check) = (median(maps), median(copies), median(checks));
        println!(
            "{} MiB: private map {map:.1?}, copy {copy:.1?} ({:.0} times as long), verify {check:.1?} ({:.2} GB/s)",
            bytes / MIB,
            copy.as_secs_f64() / map.as_secs_f64(),
            bytes as f64 / 1e9 / check.as_secs_f64()
        );
        clones(dir.path(), digest, bytes);
    }
}

/// Starts clones, lets them touch their memory, and says what they occupy.
fn clones(folder: &Path, digest: Digest, bytes: u64) {
    let own = std::env::current_exe().unwrap();
    let mut children: Vec<Child> = (0..CLONES)
        .map(|_| {
            let mut command = Command::new(&own);
            command.arg("clone").arg(folder).arg(digest.to_string());
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let mut outputs: Vec<_> =
        children.iter_mut().map(|child| BufReader::new(child.stdout.take().unwrap())).collect();
    let mut line = String::new();
    for output in &mut outputs {
        // It has touched all its memory.
        output.read_line(&mut line).unwrap();
    }
    for child in &mut children {
        child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }
    let mut sums = [0; 3];
    for output in &mut outputs {
        line.clear();
        output.read_line(&mut line).unwrap();
        let values: Vec<u64> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
        sums.iter_mut().zip(&values).for_each(|(sum, value)| *sum += value);
    }
    for mut child in children {
        // The end of its input.
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }
    let mib = sums.map(|kib| kib / 1024);
    println!(
        "{} MiB, {CLONES} clones: Rss {} MiB, Pss {} MiB, of their own {} MiB; {CLONES} copies would be {} MiB",
        bytes / MIB,
        mib[0],
        mib[1],
        mib[2],
        CLONES as u64 * bytes / MIB
    );
}

/// One clone: maps the RAM, reads all of it, writes to 1 % of it, and says when asked what Linux counts of it, in KiB.
fn clone(folder: &Path, digest: &str) {
    let bytes: Vec<u8> =
        (0..digest.len()).step_by(2).map(|at| u8::from_str_radix(&digest[at..at + 2], 16).unwrap()).collect();
    let state = open(folder, Digest(bytes.try_into().unwrap()));
    let map = state.blob("ram").unwrap().map_private().unwrap();
    let pages = map.length() / PAGE;
    for page in 0..pages {
        // SAFETY: the page lies within the map.
        let value = unsafe { map.as_mut_ptr().add(page * PAGE).read_volatile() };
        assert_ne!(value, 0);
    }
    for page in (0..pages).step_by(100) {
        touch(&map, page);
    }
    println!("touched");
    let mut input = std::io::stdin().lock();
    input.read_exact(&mut [0]).unwrap();
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", map.as_mut_ptr() as usize);
    let own = smaps.lines().skip_while(|line| !line.starts_with(&start)).skip(1);
    let own: Vec<&str> = own.take_while(|line| !line.contains('-')).collect();
    let value = |key: &str| {
        let line = own.iter().find_map(|line| line.strip_prefix(key)).unwrap();
        line.split_whitespace().next().unwrap().to_string()
    };
    println!("{} {} {}", value("Rss:"), value("Pss:"), value("Private_Dirty:"));
    // The others are counting.
    let _ = input.read(&mut [0]);
}
