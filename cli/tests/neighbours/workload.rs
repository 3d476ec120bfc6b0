//! What the guests of all disks do, over NBD, and what they may therefore find.

use std::collections::BTreeMap;
use std::path::Path;

use super::history::History;
use super::raw::{Client, cmd};
use super::subject::Position;
use crate::support::random::Random;

const SECTOR: u64 = 512;
/// The places that guests write to are as far apart as the largest blocks of a format.
const BLOCK: u64 = 2 << 20;
const BLOCKS: u64 = 32;
pub const SIZE: u64 = BLOCKS * BLOCK;
/// All writes go to the beginnings of blocks.
const HOT: u64 = 128 << 10;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    NewBlocks,
    Overwrites,
    Concurrent,
    NoSpace,
}

impl Workload {
    pub const ALL: [Workload; 4] =
        [Workload::NewBlocks, Workload::Overwrites, Workload::Concurrent, Workload::NoSpace];

    pub fn name(self) -> &'static str {
        match self {
            Workload::NewBlocks => "new blocks",
            Workload::Overwrites => "overwrites",
            Workload::Concurrent => "second write to a block being allocated",
            Workload::NoSpace => "one write without space",
        }
    }

    /// Runs on a fresh disk; the server is killed afterwards.
    pub fn run(self, guest: &mut Guest, random: &mut Random) {
        let sectors = BLOCK / SECTOR;
        match self {
            Workload::NewBlocks => {
                for block in shuffled(random) {
                    guest.write(block * sectors + random.between(0, 8) * 8, 8);
                    if random.between(0, 3) == 0 {
                        guest.flush();
                    }
                }
                guest.flush();
            }
            Workload::Overwrites => {
                let blocks = &shuffled(random)[..8];
                for block in blocks {
                    guest.write(block * sectors, HOT / SECTOR);
                }
                guest.flush();
                for _ in 0..60 {
                    let block = blocks[random.between(0, 8) as usize];
                    guest.write(block * sectors + random.between(0, 128), random.between(1, 17));
                    if random.between(0, 6) == 0 {
                        guest.flush();
                    }
                }
                guest.flush();
            }
            Workload::Concurrent => {
                for block in shuffled(random) {
                    let first = guest.send_write(block * sectors + 16, 112);
                    let second = guest.send_write(block * sectors, 8);
                    guest.wait(second);
                    guest.flush();
                    guest.wait(first);
                }
            }
            Workload::NoSpace => {
                // A failed write is repeated: space was made. Later all is written once more.
                let blocks = &shuffled(random)[..8];
                for block in blocks.iter().chain(blocks) {
                    if !guest.write(block * sectors, 8) {
                        guest.write(block * sectors, 8);
                    }
                    guest.flush();
                }
            }
        }
    }
}

fn shuffled(random: &mut Random) -> Vec<u64> {
    let mut blocks: Vec<u64> = (0..BLOCKS).collect();
    for at in (1..blocks.len()).rev() {
        blocks.swap(at, random.between(0, at as u64 + 1) as usize);
    }
    blocks
}

/// How a state compares with what the guest may expect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Right,
    /// A sector shows an older value than its last flushed one.
    Lost(String),
    /// A sector shows what was never written to it.
    Foreign(String),
}

/// What was asked of a disk, and answered.
pub struct Record {
    history: History,
    written: BTreeMap<u64, Vec<u64>>,
    /// Positions at which a flush had returned.
    pub acknowledged: Vec<u64>,
    /// Requests that failed.
    pub errors: u64,
}

impl Record {
    /// Judges what the disk shows after a crash at `position`.
    pub fn judge(&self, position: u64, content: &[u8]) -> Verdict {
        let at = clock(position + 1, 0) - 1;
        let mut verdict = Verdict::Right;
        for block in 0..BLOCKS {
            let start = (block * BLOCK) as usize;
            let Some(hot) = content.get(start..start + HOT as usize) else {
                return Verdict::Foreign(format!("only {} bytes can be read", content.len()));
            };
            let mut first = block * BLOCK / SECTOR;
            let mut rest = hot;
            while let Err(violation) = self.history.check(at, first, rest, false) {
                let sector = violation.sector;
                let older = self.written.get(&sector).map_or(&[][..], Vec::as_slice);
                match violation.found {
                    Some(value) if value == 0 || older.contains(&value) => {
                        verdict = Verdict::Lost(violation.to_string());
                    }
                    _ => return Verdict::Foreign(violation.to_string()),
                }
                rest = &rest[((sector + 1 - first) * SECTOR) as usize..];
                first = sector + 1;
            }
        }
        verdict
    }
}

/// Orders events among the operations on the file, and among each other.
fn clock(position: u64, tick: u64) -> u64 {
    position << 24 | tick
}

/// A client that notes everything.
pub struct Guest<'a> {
    client: Client,
    position: Position<'a>,
    tick: u64,
    record: Record,
    /// Requests without an answer: when it was sent, first sector, sectors; none for a flush.
    waiting: BTreeMap<u64, Option<(u64, u64, u64)>>,
    failed: Vec<u64>,
}

impl<'a> Guest<'a> {
    pub fn connect(socket: &Path, position: Position<'a>) -> Self {
        let record = Record {
            history: History::default(),
            written: BTreeMap::new(),
            acknowledged: Vec::new(),
            errors: 0,
        };
        let client = Client::connect(socket).go();
        Guest { client, position, tick: 0, record, waiting: BTreeMap::new(), failed: Vec::new() }
    }

    pub fn into_record(self) -> Record {
        self.record
    }

    fn now(&mut self) -> u64 {
        self.tick += 1;
        clock((self.position)(), self.tick)
    }

    fn write(&mut self, first: u64, count: u64) -> bool {
        let cookie = self.send_write(first, count);
        self.wait(cookie)
    }

    /// Sends a write and returns its cookie.
    fn send_write(&mut self, first: u64, count: u64) -> u64 {
        let now = self.now();
        let value = self.record.history.new_value();
        self.record.history.submit(now, first, count, value);
        for sector in first..first + count {
            self.record.written.entry(sector).or_default().push(value);
        }
        let mut payload = vec![0; (count * SECTOR) as usize];
        History::fill(value, &mut payload);
        self.waiting.insert(value, Some((now, first, count)));
        self.client.send(0, cmd::WRITE, value, first * SECTOR, payload.len() as u32, &payload);
        value
    }

    fn flush(&mut self) {
        let called = self.now();
        let cookie = u64::MAX - self.tick;
        self.waiting.insert(cookie, None);
        self.client.send(0, cmd::FLUSH, cookie, 0, 0, &[]);
        if self.wait(cookie) {
            let returned = self.now();
            self.record.history.flushed(called, returned);
            self.record.acknowledged.push(returned >> 24);
        } else {
            let now = self.now();
            self.record.history.flush_failed(now);
        }
    }

    /// Waits for an answer; others that come before it count as well. Returns whether it was good news.
    fn wait(&mut self, cookie: u64) -> bool {
        while self.waiting.contains_key(&cookie) {
            let (error, answered) = self.client.simple_reply();
            let request = self.waiting.remove(&answered).expect("an answer to a request");
            if error != 0 {
                self.record.errors += 1;
                self.failed.push(answered);
            } else if let Some((submitted, first, count)) = request {
                let now = self.now();
                self.record.history.completed(submitted, now, first, count);
            }
        }
        !self.failed.contains(&cookie)
    }
}
