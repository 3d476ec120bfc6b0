//! Target `operations`: requests, flushes, kills, power cuts and failing I/O on a simulated medium, against the history of
//! what was written and flushed.
//!
//! The input is a list of steps. Every sector must hold what the guest may expect at every look, and after every power cut; and
//! the checker finds no corruption in what a power cut leaves.

use crate::Seed;
use crate::input::Input;
use cowvhd::check::{Code, Severity, check};
use cowvhd::sim::{Bounds, Fault, FaultPlan, History, Operation, SimVfs};
use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions, ZeroMode};
use std::path::Path;
use std::sync::Arc;

const PATH: &str = "/disk.vhd";
const SECTOR: u64 = 512;
const BLOCK_BYTES: u64 = 16 << 10;
const RING_BYTES: u64 = 128 << 10;
const BLOCKS: u64 = 8;
const SECTORS: u64 = BLOCKS * BLOCK_BYTES / SECTOR - 3;
const MAX_STEPS: usize = 100;

const EIO: i32 = 5;
const EINTR: i32 = 4;
const ENOSPC: i32 = 28;
const FAULTS: [Fault; 4] = [Fault::Error(EIO), Fault::Error(ENOSPC), Fault::Error(EINTR), Fault::Short];
const OPERATIONS: [Operation; 6] = [
    Operation::Read,
    Operation::Write,
    Operation::DurableWrite,
    Operation::Sync,
    Operation::SetLength,
    Operation::Punch,
];

struct Guest {
    vfs: SimVfs,
    disk: Option<Disk>,
    history: History,
    /// A fault was planned since the last clean start: requests may fail.
    faulty: bool,
}

/// The body of the target.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let vfs = SimVfs::new(u64::from(input.u8()));
    let fixed = input.u8() % 8 == 7;
    let mut options = CreateOptions::new(SECTORS * SECTOR)
        .test_geometry(BLOCK_BYTES as u32, RING_BYTES)
        .vfs(Arc::new(vfs.clone()));
    if fixed {
        options = options.fixed();
    }
    assert!(options.create(Path::new(PATH)).is_ok());
    let mut guest = Guest { vfs, disk: None, history: History::default(), faulty: false };
    guest.open();
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        guest.step(&mut input, fixed);
    }
    guest.look();
    guest.leave(true);
    if let Some(disk) = guest.disk.take()
        && disk.close().is_ok()
    {
        drop(disk);
        let report = report(&guest.vfs);
        // A failed sync leaves its mark.
        let others = report.findings().iter().filter(|finding| finding.code != Code::SyncFailed);
        let worst = others.max_by_key(|finding| finding.severity());
        let sound = worst.is_none_or(|finding| finding.severity() <= Severity::Leak);
        assert!(sound, "closed, and not sound: {worst:?}");
    }
}

fn report(vfs: &SimVfs) -> cowvhd::check::Report {
    let report = check(Arc::new(vfs.clone()), Path::new(PATH));
    report.unwrap_or_else(|error| unreachable!("nothing keeps the checker away: {error}"))
}

impl Guest {
    fn open(&mut self) {
        let options = OpenOptions::new().vfs(Arc::new(self.vfs.clone()));
        let disk = options.open(Path::new(PATH));
        assert!(disk.is_ok(), "it does not open: {disk:?}");
        self.disk = disk.ok();
    }

    fn step(&mut self, input: &mut Input, fixed: bool) {
        let kind = input.u8();
        match kind & 15 {
            0..=4 => {
                let (first, count) = range(input);
                let value = self.history.new_value();
                let mut buf = vec![0; (count * SECTOR) as usize];
                History::fill(value, &mut buf);
                self.request(first, count, value, |disk| disk.write_at(&buf, first * SECTOR));
            }
            5 => {
                let (first, count) = range(input);
                let mode = if kind & 16 == 0 { ZeroMode::MayPunch } else { ZeroMode::KeepAllocated };
                self.request(first, count, 0, |disk| disk.write_zeroes(first * SECTOR, count * SECTOR, mode));
            }
            6 => {
                let first = input.below(BLOCKS) * BLOCK_BYTES / SECTOR;
                let count = (BLOCK_BYTES / SECTOR).min(SECTORS - first);
                self.request(first, count, 0, |disk| disk.discard(first * SECTOR, count * SECTOR));
            }
            7..=9 => self.flush(),
            10 => self.look(),
            11 | 12 => {
                let fault = FAULTS[usize::from(input.u8()) % FAULTS.len()];
                let count = if kind & 16 == 0 { 1 } else { u64::from(input.u8()) };
                let plan = FaultPlan::new(fault, u64::from(input.u8() % 32), count);
                let only = input.u8();
                let plan = match OPERATIONS.get(usize::from(only % 12)) {
                    Some(&operation) => plan.only(operation),
                    None => plan,
                };
                self.faulty = true;
                self.vfs.set_faults(plan);
            }
            13 => self.leave(true),
            14 => self.leave(false),
            _ => self.power_cut(u64::from(input.u16()), fixed),
        }
        if self.is_stopped() {
            self.leave(false);
        }
    }

    fn disk(&self) -> &Disk {
        self.disk.as_ref().unwrap_or_else(|| unreachable!("the disk is open between steps"))
    }

    fn request(
        &mut self,
        first: u64,
        count: u64,
        value: u64,
        call: impl FnOnce(&Disk) -> cowvhd::Result<()>,
    ) {
        let submitted = self.history.submit(self.vfs.tick(), first, count, value);
        match call(self.disk()) {
            Ok(()) => self.history.completed(submitted, self.vfs.tick(), first, count),
            Err(error) => assert!(self.faulty, "a request failed without reason: {error}"),
        }
    }

    fn flush(&mut self) {
        let called = self.vfs.tick();
        match self.disk().flush() {
            Ok(()) => self.history.flushed(called, self.vfs.tick()),
            Err(error) => {
                assert!(self.faulty, "a flush failed without reason: {error}");
                // A disk that goes on still owes all of it to the next flush.
                if self.is_stopped() {
                    self.history.flush_failed(self.vfs.tick());
                }
            }
        }
    }

    /// Whether a failed sync has stopped the disk. Asks with a request that changes nothing.
    fn is_stopped(&self) -> bool {
        matches!(self.disk().discard(0, 0), Err(error) if error.kind() == ErrorKind::Poisoned)
    }

    /// What the disk shows now is what was written last.
    fn look(&mut self) {
        self.vfs.set_faults(FaultPlan::default());
        let content = self.content();
        let result = self.history.check_current(0, &content);
        assert!(result.is_ok(), "{result:?}");
    }

    fn content(&self) -> Vec<u8> {
        let mut content = vec![0xee; (SECTORS * SECTOR) as usize];
        let read = self.disk().read_at(&mut content, 0);
        assert!(read.is_ok(), "reading: {read:?}");
        content
    }

    /// Closes the disk or kills its process, and opens it again. The page cache survives that.
    fn leave(&mut self, cleanly: bool) {
        let called = self.vfs.tick();
        let disk = self.disk.take();
        let closed = cleanly && disk.as_ref().is_some_and(|disk| disk.close().is_ok());
        assert!(closed || !cleanly || self.faulty, "closing failed without reason");
        match closed {
            true => self.history.flushed(called, self.vfs.tick()),
            false if self.faulty => self.history.flush_failed(self.vfs.tick()),
            false => {}
        }
        drop(disk);
        self.vfs.set_faults(FaultPlan::default());
        self.open();
        let content = self.content();
        let check = self.history.check(u64::MAX, 0, &content, false);
        assert!(check.is_ok(), "after a kill or a close: {check:?}");
        // After a failed sync the cache may show what the medium does not hold: then the history just goes on.
        if !self.faulty {
            self.history.restart();
            self.history.continue_from(0, &content);
        }
    }

    /// Goes on with one of the states that a power cut leaves now.
    fn power_cut(&mut self, choice: u64, fixed: bool) {
        let mut chosen = None;
        self.vfs.crash_now().for_each_state(choice, &Bounds::sample(1 + (choice % 40) as usize), |state| {
            chosen = Some(state);
            true
        });
        let Some(state) = chosen else { return };
        // The footer of a fixed disk of this size shares a physical sector with the guest.
        if fixed && state.garbage {
            return;
        }
        self.vfs.set_faults(FaultPlan::default());
        self.disk = None;
        let checked = report(&state.to_vfs(1));
        assert!(checked.worst() < Some(Severity::Corruption), "after a power cut: {:?}", checked.findings());
        self.vfs = state.to_vfs(choice << 32 | self.history.new_value()); // Ids are never the same twice.
        self.open();
        let content = self.content();
        let check = self.history.check(u64::MAX, 0, &content, state.garbage);
        assert!(check.is_ok(), "after a power cut: {check:?}");
        self.history.restart();
        self.history.continue_from(0, &content);
        self.faulty = false;
        // What a spoiled physical sector left is nobody's value: the guest writes such sectors anew, and flushes.
        for (sector, bytes) in (0..).zip(content.chunks(SECTOR as usize)) {
            if bytes.chunks(8).any(|word| word != &bytes[..8]) {
                let value = self.history.new_value();
                let mut buf = [0; SECTOR as usize];
                History::fill(value, &mut buf);
                self.request(sector, 1, value, |disk| disk.write_at(&buf, sector * SECTOR));
            }
        }
        self.flush();
    }
}

fn range(input: &mut Input) -> (u64, u64) {
    let first = u64::from(input.u16()) % SECTORS;
    let count = match input.u8() {
        // A whole block, or more than a small flush takes.
        0xff => SECTORS,
        0xfe => BLOCK_BYTES / SECTOR,
        count => 1 + u64::from(count % 40),
    };
    (first, count.min(SECTORS - first))
}

/// Inputs to start from: lives with every step, without and with faults.
pub fn seeds() -> Vec<Seed> {
    let plain = [
        &[1, 0][..],
        &[0, 0, 0, 3, 0, 0, 40, 9, 7, 6, 1, 5, 0, 4, 8, 7, 15, 0, 17, 10, 1, 0, 99, 0xff, 8, 13],
        &[2, 0, 33, 0xfe, 7, 6, 2, 7, 3, 0, 70, 4, 7, 15, 0, 6, 14, 21, 0, 8, 16, 7, 15, 0, 39],
    ]
    .concat();
    let steps = [
        (&[0, 0, 0, 3][..]),
        &[7],
        &[11, 0, 2, 1],
        &[0, 0, 64, 9],
        &[7],
        &[6, 2],
        &[12, 1, 0, 2],
        &[2, 0, 96, 20],
        &[8],
        &[27, 1, 9, 1, 4],
        &[3, 0, 128, 20],
        &[13],
        &[15, 0, 11],
        &[5, 0, 3, 8],
        &[9],
        &[14],
    ];
    let faulty = [&[2, 0][..], &steps.concat(), &steps.concat()].concat();
    let mut fixed = plain.clone();
    fixed[1] = 7;
    let mut ring = vec![3, 0];
    for round in 0..60u8 {
        ring.extend([0, 0, round * 4, 7, 6, round % 8, 7]);
    }
    vec![("plain", plain), ("faulty", faulty), ("fixed", fixed), ("ring", ring)]
}
