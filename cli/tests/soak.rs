//! Real processes are killed while they write, again and again, on one image: one that writes through the library with
//! several threads, and a server with several connections.
//!
//! Each writer follows a plan that the seed determines, and reports each flush that was acknowledged. After the kill every
//! sector must hold what the plan says for the last report, or what was submitted after it: never an older value, another
//! sector's, or a mixture. What is found is what the next cycle goes on from. Some kills hit the opening of the image,
//! so that recoveries are killed as well.
//!
//! A killed process leaves the page cache alive: see `guest_power_cut` and the simulator for what this cannot show.
//! `scripts/soak` runs 1000 cycles.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../export/tests/nbd/raw.rs"]
#[allow(dead_code, reason = "a part of it is used here")]
mod raw;
mod support;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::channel;

use cowvhd::{CreateOptions, Disk, OpenOptions, ZeroMode};
use raw::Client;
use support::process::Process;
use support::random::{Random, cycles, seed};
use support::server::Server;

const SECTOR: u64 = 512;
const SECTORS_PER_BLOCK: u64 = (2 << 20) / SECTOR;
const WRITERS: u64 = 4;
/// Blocks that all writers write to, sector by sector in turn.
const SHARED_BLOCKS: u64 = 6;
/// Blocks of one writer alone, who also discards them.
const OWN_BLOCKS: u64 = 3;
const SECTORS: u64 = (SHARED_BLOCKS + WRITERS * OWN_BLOCKS) * SECTORS_PER_BLOCK;

/// One step of a writer. Ranges are (first sector, sectors).
#[derive(Debug, Clone, Copy)]
enum Step {
    Write(u64, u64, u64),
    Zero(u64, u64),
    Flush,
}

/// What a writer does in a cycle: the same steps for the same numbers.
struct Plan {
    random: Random,
    cycle: u64,
    writer: u64,
    step: u64,
}

impl Plan {
    fn new(seed: u64, cycle: u64, writer: u64) -> Self {
        let random = Random::new(seed ^ cycle << 32 ^ writer << 60);
        Plan { random, cycle, writer, step: 0 }
    }
}

impl Iterator for Plan {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        self.step += 1;
        let random = &mut self.random;
        let own_block = SHARED_BLOCKS + self.writer * OWN_BLOCKS + random.between(0, OWN_BLOCKS);
        let own = own_block * SECTORS_PER_BLOCK;
        let shared = random.between(0, SHARED_BLOCKS) * SECTORS_PER_BLOCK
            + random.between(0, 32) * WRITERS
            + self.writer;
        let value = self.cycle << 40 | self.writer << 32 | self.step;
        Some(match random.between(0, 16) {
            0 => Step::Zero(own, SECTORS_PER_BLOCK),
            1 => Step::Zero(own + random.between(0, 64), random.between(1, 64)),
            2..=6 => Step::Flush,
            7..=11 => Step::Write(shared, 1, value),
            // Now and then more than a small flush takes.
            12 => Step::Write(own + random.between(0, 64), random.between(300, 600), value),
            _ => Step::Write(own + random.between(0, 64), random.between(1, 17), value),
        })
    }
}

fn fill(value: u64, sectors: u64) -> Vec<u8> {
    value.to_le_bytes().repeat((sectors * SECTOR) as usize / 8)
}

/// The value of each sector; a mixture of values is none.
fn values(disk: &Disk) -> Vec<Option<u64>> {
    let mut content = vec![0xee; (SECTORS * SECTOR) as usize];
    disk.read_at(&mut content, 0).unwrap();
    let value = |sector: &[u8]| {
        let (words, _) = sector.as_chunks::<8>();
        words.iter().all(|word| word == &words[0]).then_some(u64::from_le_bytes(words[0]))
    };
    content.chunks(SECTOR as usize).map(value).collect()
}

/// Lets some time pass that no clock measures.
fn dawdle(random: &mut Random) {
    for _ in 0..random.between(0, 200_000) {
        std::hint::spin_loop();
    }
}

/// An image that lives through all cycles, and what it holds.
struct Victim<'a> {
    path: &'a Path,
    seed: u64,
    random: Random,
    content: Vec<u64>,
    flushes: u64,
    open_kills: u64,
}

impl<'a> Victim<'a> {
    fn new(path: &'a Path, test: &str) -> Self {
        CreateOptions::new(SECTORS * SECTOR).create(path).unwrap();
        let seed = seed(test);
        Victim {
            path,
            seed,
            random: Random::new(seed),
            content: vec![0; SECTORS as usize],
            flushes: 0,
            open_kills: 0,
        }
    }

    /// Opens the image after a kill and judges it. `reports`: of each writer, the steps covered by its last acknowledged
    /// flush.
    fn judge(&mut self, cycle: u64, reports: &[u64]) {
        let mut allowed: HashMap<u64, Vec<u64>> = HashMap::new();
        for (writer, &covered) in reports.iter().enumerate() {
            for (number, step) in (1..).zip(Plan::new(self.seed, cycle, writer as u64)) {
                let (first, count, value) = match step {
                    Step::Write(first, count, value) => (first, count, value),
                    Step::Zero(first, count) => (first, count, 0),
                    // Beyond this one the writer did not get without a report.
                    Step::Flush if number > covered => break,
                    Step::Flush => continue,
                };
                for sector in first..first + count {
                    let values = allowed.entry(sector).or_insert_with(|| vec![self.content[sector as usize]]);
                    if number <= covered {
                        values.clear();
                    }
                    values.push(value);
                }
            }
        }
        let before = values(&OpenOptions::new().read_only(true).open(self.path).unwrap());
        let disk = OpenOptions::new().open(self.path).unwrap();
        let found = values(&disk);
        assert!(before == found, "cycle {cycle}: a read-only open shows another content than the recovery");
        for (sector, found) in (0..).zip(found) {
            let allowed = allowed.get(&sector);
            let unchanged = [self.content[sector as usize]];
            let allowed = allowed.map_or(&unchanged[..], Vec::as_slice);
            match found {
                Some(value) if allowed.contains(&value) => self.content[sector as usize] = value,
                _ => panic!(
                    "COWVHD_TEST_SEED={}, cycle {cycle}: sector {sector} holds {found:x?}, allowed are {allowed:x?}; \
                     reports {reports:?}",
                    self.seed
                ),
            }
        }
        // Either way the next process finds what this one leaves: a closed image, or once more a dirty one.
        if self.random.between(0, 2) == 0 {
            disk.close().unwrap();
        }
    }

    fn summary(&self, test: &str, cycles: u32) {
        println!(
            "{test}: {cycles} kills, {} of them while opening, {} acknowledged flushes verified",
            self.open_kills, self.flushes
        );
        assert!(self.flushes > 0, "no flush was ever acknowledged");
    }
}

/// Tells what the process that [`a_writer_through_the_library`] kills is to do: path, seed, cycle.
const CHILD: &str = "COWVHD_TEST_SOAK";

/// The body of that process; as a test of its own it does nothing.
#[test]
fn child_that_writes() {
    let Ok(orders) = std::env::var(CHILD) else { return };
    let [seed, cycle, path] = orders.splitn(3, ' ').collect::<Vec<_>>()[..] else { panic!("{orders}") };
    let (seed, cycle) = (seed.parse().unwrap(), cycle.parse().unwrap());
    let disk = OpenOptions::new().open(Path::new(path)).unwrap();
    println!("\nopen");
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let disk = &disk;
            scope.spawn(move || {
                for (number, step) in (1u64..).zip(Plan::new(seed, cycle, writer)) {
                    match step {
                        Step::Write(first, count, value) => {
                            disk.write_at(&fill(value, count), first * SECTOR)
                        }
                        Step::Zero(first, count) => {
                            disk.write_zeroes(first * SECTOR, count * SECTOR, ZeroMode::MayPunch)
                        }
                        Step::Flush => disk.flush(),
                    }
                    .unwrap();
                    if let Step::Flush = step {
                        println!("flushed {writer} {number}");
                    }
                }
            });
        }
    });
}

/// The writer and its steps from a line of the child.
fn report(line: &str) -> Option<(usize, u64)> {
    let (writer, steps) = line.strip_prefix("flushed ")?.split_once(' ')?;
    Some((writer.parse().ok()?, steps.parse().ok()?))
}

#[test]
fn a_writer_through_the_library() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    let mut victim = Victim::new(&path, "soak, library");
    let cycles = cycles(50);
    for cycle in 1..=u64::from(cycles) {
        let mut reports = [0; WRITERS as usize];
        let mut command = Command::new("env");
        command.arg(format!("{CHILD}={} {cycle} {}", victim.seed, path.display()));
        command.arg(std::env::current_exe().unwrap());
        command.args(["--exact", "child_that_writes", "--nocapture"]);
        let mut child = Process::spawn(&command);
        let while_opening = victim.random.between(0, 6) == 0;
        if while_opening {
            child.wait_for("the start", |line| line.starts_with("running").then_some(()));
            victim.open_kills += 1;
        } else {
            child.wait_for("the open", |line| (line == "open").then_some(()));
            for _ in 0..victim.random.between(0, 120) {
                let (writer, steps) = child.wait_for("a flush", report);
                reports[writer] = steps;
                victim.flushes += 1;
            }
        }
        dawdle(&mut victim.random);
        for (writer, steps) in child.kill().iter().filter_map(|line| report(line)) {
            reports[writer] = steps;
            victim.flushes += 1;
        }
        victim.judge(cycle, &reports);
    }
    victim.summary("soak, library", cycles);
}

/// One step over NBD; an error when the server is gone.
fn request(client: &mut Client, step: Step) -> io::Result<()> {
    use raw::cmd;
    let (command, first, count, payload) = match step {
        Step::Write(first, count, value) => (cmd::WRITE, first, count, fill(value, count)),
        Step::Zero(first, count) => (cmd::WRITE_ZEROES, first, count, Vec::new()),
        Step::Flush => (cmd::FLUSH, 0, 0, Vec::new()),
    };
    let mut bytes = raw::request(0, command, 1, first * SECTOR, (count * SECTOR) as u32);
    bytes.extend(payload);
    client.stream.write_all(&bytes)?;
    let mut reply = [0; 16];
    client.stream.read_exact(&mut reply)?;
    assert_eq!(raw::be32(&reply[4..]), 0, "{step:?} failed");
    Ok(())
}

#[test]
fn a_server_with_several_clients() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    let mut victim = Victim::new(&path, "soak, server");
    let cycles = cycles(50);
    for cycle in 1..=u64::from(cycles) {
        let mut serving = Server::Cowvhd.serve(&path);
        let mut reports = [0; WRITERS as usize];
        let (sender, receiver) = channel();
        let clients: Vec<_> = (0..WRITERS).map(|_| Client::connect(serving.socket()).go()).collect();
        let seed = victim.seed;
        std::thread::scope(|scope| {
            for (writer, mut client) in clients.into_iter().enumerate() {
                let sender = sender.clone();
                scope.spawn(move || {
                    for (number, step) in (1u64..).zip(Plan::new(seed, cycle, writer as u64)) {
                        if request(&mut client, step).is_err() {
                            return;
                        }
                        if let Step::Flush = step {
                            sender.send((writer, number)).unwrap();
                        }
                    }
                });
            }
            drop(sender);
            let mut take = |(writer, steps): (usize, u64)| {
                reports[writer] = steps;
                victim.flushes += 1;
            };
            for _ in 0..victim.random.between(0, 120) {
                take(receiver.recv().expect("the server lives"));
            }
            dawdle(&mut victim.random);
            serving.kill();
            receiver.iter().for_each(take);
        });
        victim.judge(cycle, &reports);
    }
    victim.summary("soak, server", cycles);
}
