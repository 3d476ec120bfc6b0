//! A disk against a model, through closes, kills and power cuts, as sequences that proptest shrinks.
//!
//! `crash_states` opens very many states of few workloads; here each power cut leaves one state and the disk lives on with
//! it, so that what one recovery leaves meets the next.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cowvhd::sim::{Bounds, CrashState, History, SimVfs};
use cowvhd::{CreateOptions, Disk, OpenOptions, ZeroMode};
use proptest::prelude::*;
use std::path::Path;
use std::sync::Arc;

const BLOCK_BYTES: u64 = 16 << 10;
const RING_BYTES: u64 = 128 << 10;
const SECTOR: u64 = 512;
const SECTORS: u64 = 10 * BLOCK_BYTES / SECTOR - 3;
const PATH: &str = "/disk.vhd";

#[derive(Debug, Clone)]
enum Step {
    Write { first: u64, count: u64 },
    Zero { first: u64, count: u64, mode: ZeroMode },
    Discard { block: u64 },
    Flush,
    Close,
    Kill,
    PowerCut { seed: u64, state: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..SECTORS, 1..80u64).prop_map(|(first, count)| (first, count.min(SECTORS - first)));
    let mode = prop_oneof![Just(ZeroMode::MayPunch), Just(ZeroMode::KeepAllocated)];
    prop_oneof![
        8 => range().prop_map(|(first, count)| Step::Write { first, count }),
        2 => (range(), mode).prop_map(|((first, count), mode)| Step::Zero { first, count, mode }),
        2 => (0..10u64).prop_map(|block| Step::Discard { block }),
        4 => Just(Step::Flush),
        1 => Just(Step::Close),
        1 => Just(Step::Kill),
        2 => (any::<u64>(), 0..40usize).prop_map(|(seed, state)| Step::PowerCut { seed, state }),
    ]
}

struct Model {
    vfs: SimVfs,
    disk: Disk,
    history: History,
}

impl Model {
    fn new() -> Self {
        let vfs = SimVfs::new(1);
        CreateOptions::new(SECTORS * SECTOR)
            .test_geometry(BLOCK_BYTES as u32, RING_BYTES)
            .vfs(Arc::new(vfs.clone()))
            .create(Path::new(PATH))
            .unwrap();
        let disk = open(&vfs);
        Model { vfs, disk, history: History::default() }
    }

    fn run(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Write { first, count } => {
                let value = self.history.new_value();
                let mut buf = vec![0; (count * SECTOR) as usize];
                History::fill(value, &mut buf);
                self.change(first, count, value, |disk| disk.write_at(&buf, first * SECTOR));
            }
            Step::Zero { first, count, mode } => {
                self.change(first, count, 0, |disk| disk.write_zeroes(first * SECTOR, count * SECTOR, mode));
            }
            Step::Discard { block } => {
                let first = block * BLOCK_BYTES / SECTOR;
                let count = (BLOCK_BYTES / SECTOR).min(SECTORS - first);
                self.change(first, count, 0, |disk| disk.discard(first * SECTOR, count * SECTOR));
            }
            Step::Flush => self.flush(),
            Step::Close => {
                let called = self.vfs.tick();
                self.disk.close().unwrap();
                self.history.flushed(called, self.vfs.tick());
                self.reopen(self.vfs.clone(), false)?;
            }
            Step::Kill => self.reopen(self.vfs.clone(), false)?,
            Step::PowerCut { seed, state } => {
                let mut chosen: Option<CrashState> = None;
                let mut left = state;
                self.vfs.crash_now().for_each_state(seed, &Bounds::sample(state + 1), |state| {
                    chosen = Some(state);
                    left = left.saturating_sub(1);
                    left > 0
                });
                let state = chosen.unwrap();
                self.reopen(state.to_vfs(seed), state.garbage)?;
            }
        }
        let content = content(&self.disk);
        self.history
            .check_current(0, &content)
            .map_err(|violation| TestCaseError::fail(violation.to_string()))
    }

    fn flush(&mut self) {
        let called = self.vfs.tick();
        self.disk.flush().unwrap();
        self.history.flushed(called, self.vfs.tick());
    }

    fn change(&mut self, first: u64, count: u64, value: u64, call: impl FnOnce(&Disk) -> cowvhd::Result<()>) {
        let submitted = self.history.submit(self.vfs.tick(), first, count, value);
        call(&self.disk).unwrap();
        self.history.completed(submitted, self.vfs.tick(), first, count);
    }

    /// Goes on with what `vfs` holds, which must be allowed; from here on it is what the guest has.
    fn reopen(&mut self, vfs: SimVfs, garbage: bool) -> Result<(), TestCaseError> {
        // The lock of the old disk must fall first where it is the same file.
        let spare = SimVfs::new(0);
        CreateOptions::new(SECTOR).vfs(Arc::new(spare.clone())).create(Path::new(PATH)).unwrap();
        self.disk = open(&spare);
        self.disk = open(&vfs);
        self.vfs = vfs;
        let content = content(&self.disk);
        self.history
            .check(u64::MAX, 0, &content, garbage)
            .map_err(|violation| TestCaseError::fail(violation.to_string()))?;
        self.history.restart();
        self.history.continue_from(0, &content);
        // What a spoiled physical sector left is nobody's value: the guest writes such sectors anew, and flushes.
        for (sector, bytes) in (0..).zip(content.chunks(SECTOR as usize)) {
            if bytes.chunks(8).any(|word| word != &bytes[..8]) {
                let value = self.history.new_value();
                let mut buf = [0; SECTOR as usize];
                History::fill(value, &mut buf);
                self.change(sector, 1, value, |disk| disk.write_at(&buf, sector * SECTOR));
            }
        }
        self.flush();
        Ok(())
    }
}

fn open(vfs: &SimVfs) -> Disk {
    OpenOptions::new().vfs(Arc::new(vfs.clone())).open(Path::new(PATH)).unwrap()
}

fn content(disk: &Disk) -> Vec<u8> {
    let mut content = vec![0xee; (SECTORS * SECTOR) as usize];
    disk.read_at(&mut content, 0).unwrap();
    content
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_agrees_with_its_model(steps in proptest::collection::vec(step(), 1..60)) {
        let mut model = Model::new();
        for step in &steps {
            model.run(step)?;
        }
    }
}
