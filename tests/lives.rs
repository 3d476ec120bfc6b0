//! Random lives of a disk: requests, snapshots, going back, clones, merges, deletions, other parents, kills and power cuts, against
//! what the disk, each snapshot and each clone should hold.
//!
//! `COWVHD_LIVES` says how many; `COWVHD_SEED` is the seed of the first.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/summary.rs"]
mod summary;

use cowvhd::sim::{FileSystem, Rng, SimVfs};
use cowvhd::snapshot::{self, SnapshotName};
use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const LEAF: &str = "/vm.vhd";
const BLOCK: u64 = 16 << 10;
const RING: u64 = 128 << 10;
const BLOCKS: u64 = 4;
const SIZE: u64 = BLOCKS * BLOCK - 1024;
const SECTOR: u64 = 512;
/// Lives of a run of the test command.
const LIVES: u64 = 10_000;

/// What can happen, and how often it did and was refused.
const EVENTS: [&str; 12] = [
    "write",
    "discard",
    "flush",
    "snapshot",
    "revert",
    "clone",
    "merge",
    "live merge",
    "delete",
    "live delete",
    "rebase",
    "reopen",
];

#[derive(Default)]
struct Counts {
    done: [AtomicU64; EVENTS.len()],
    refused: [AtomicU64; EVENTS.len()],
}

/// A snapshot or a clone, and what it holds.
struct Kept {
    path: PathBuf,
    name: Option<SnapshotName>,
    content: Vec<u8>,
}

struct Life<'a> {
    rng: Rng,
    vfs: SimVfs,
    /// `None` while something else has the image open.
    disk: Option<Disk>,
    content: Vec<u8>,
    snapshots: Vec<Kept>,
    clones: Vec<Kept>,
    counts: &'a Counts,
}

type Outcome = Result<(), String>;

fn said(what: impl std::fmt::Display) -> impl FnOnce(cowvhd::Error) -> String {
    move |error| format!("{what}: {error}")
}

fn go_on(_: cowvhd::convert::Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn content_of(disk: &Disk) -> cowvhd::Result<Vec<u8>> {
    let mut content = vec![0xee; SIZE as usize];
    disk.read_at(&mut content, 0).map(|()| content)
}

impl<'a> Life<'a> {
    fn new(seed: u64, counts: &'a Counts) -> Self {
        let mut rng = Rng::new(seed);
        let vfs = SimVfs::new(seed);
        let no_exchange = rng.one_in(2);
        let no_nameless_files = no_exchange && rng.one_in(2);
        vfs.set_kind(FileSystem { no_exchange, no_nameless_files, ..FileSystem::default() });
        let create = CreateOptions::new(SIZE).test_geometry(BLOCK as u32, RING);
        let create = if seed % 4 == 1 { create.fixed() } else { create };
        create.vfs(Arc::new(vfs.clone())).create(Path::new(LEAF)).unwrap();
        let (snapshots, clones, content) = (Vec::new(), Vec::new(), vec![0; SIZE as usize]);
        Life { rng, vfs, disk: None, content, snapshots, clones, counts }
    }

    fn options(&self) -> OpenOptions {
        let options = OpenOptions::new().test_geometry(BLOCK as u32, RING).vfs(Arc::new(self.vfs.clone()));
        options.allow_parents_in(Path::new("/"))
    }

    /// The disk, opened if it is not.
    fn disk(&mut self) -> Result<&Disk, String> {
        if self.disk.is_none() {
            self.disk = Some(self.options().open(Path::new(LEAF)).map_err(said("opening"))?);
        }
        self.disk.as_ref().ok_or_else(String::new)
    }

    fn close(&mut self) -> Outcome {
        self.disk.take().map_or(Ok(()), |disk| disk.close().map_err(said("closing")))
    }

    fn write(&mut self) -> Outcome {
        let first = self.rng.below(SIZE / SECTOR);
        let count = (1 + self.rng.below(24)).min(SIZE / SECTOR - first);
        let range = (first * SECTOR) as usize..((first + count) * SECTOR) as usize;
        let value = 1 + self.rng.below(255) as u8;
        self.content[range.clone()].fill(value);
        self.disk()?.write_at(&vec![value; range.len()], range.start as u64).map_err(said("write"))
    }

    fn discard(&mut self) -> Outcome {
        let start = self.rng.below(BLOCKS) * BLOCK;
        let length = BLOCK.min(SIZE - start);
        self.content[start as usize..(start + length) as usize].fill(0);
        self.disk()?.discard(start, length).map_err(said("discard"))
    }

    fn snapshot(&mut self, step: u64) -> Outcome {
        let name = SnapshotName::new(&format!("s{step}")).unwrap();
        let path = self.disk()?.snapshot(&name).map_err(said("snapshot"))?;
        self.snapshots.push(Kept { path, name: Some(name), content: self.content.clone() });
        Ok(())
    }

    fn any(&mut self, count: usize) -> usize {
        self.rng.below(count as u64) as usize
    }

    fn revert(&mut self) -> Outcome {
        self.close()?;
        let chosen = self.any(self.snapshots.len());
        let to = &self.snapshots[chosen];
        snapshot::revert(&self.options(), Path::new(LEAF), to.name.as_ref().unwrap())
            .map_err(said("revert"))?;
        self.content.clone_from(&to.content);
        Ok(())
    }

    /// A clone of a snapshot, which is written to at once.
    fn clone_one(&mut self, step: u64) -> Outcome {
        let chosen = self.any(self.snapshots.len());
        let from = &self.snapshots[chosen];
        let (path, mut content) = (PathBuf::from(format!("/clones/c{step}.vhd")), from.content.clone());
        snapshot::clone_to(&self.options(), &from.path, &path).map_err(said("clone"))?;
        let clone = self.options().open(&path).map_err(said("opening a clone"))?;
        let at = self.rng.below(BLOCKS) * BLOCK;
        content[at as usize..][..512].fill(step as u8);
        clone.write_at(&[step as u8; 512], at).map_err(said("writing to a clone"))?;
        clone.close().map_err(said("closing a clone"))?;
        self.clones.push(Kept { path, name: None, content });
        Ok(())
    }

    /// Into the disk, or into a clone.
    fn merge(&mut self) -> Result<bool, String> {
        self.close()?;
        let into = match self.clones.is_empty() || self.rng.one_in(2) {
            true => PathBuf::from(LEAF),
            false => {
                let chosen = self.any(self.clones.len());
                self.clones[chosen].path.clone()
            }
        };
        let until = match self.rng.one_in(3) {
            true => None,
            false => {
                let chosen = self.any(self.snapshots.len());
                Some(self.snapshots[chosen].path.clone())
            }
        };
        refusable(snapshot::merge(&self.options(), &into, until.as_deref(), &mut go_on), "merge")
    }

    fn merge_running(&mut self) -> Result<bool, String> {
        let chosen = self.any(self.snapshots.len());
        let until = self.snapshots[chosen].path.clone();
        refusable(snapshot::merge_running(self.disk()?, Some(&until), &mut go_on), "live merge")
    }

    fn delete(&mut self, running: bool) -> Result<bool, String> {
        let chosen = self.any(self.snapshots.len());
        let name = self.snapshots[chosen].name.clone().unwrap();
        let result = if running {
            snapshot::delete_running(self.disk()?, &name, &mut go_on)
        } else {
            self.close()?;
            snapshot::delete(&self.options(), Path::new(LEAF), &name, &mut go_on)
        };
        // A fixed disk stays, and what it holds.
        let is_kept = result.as_ref().is_ok_and(|deleted| deleted.kept.is_some());
        let deleted = refusable(result, "delete")?;
        if deleted && !is_kept {
            let gone = self.snapshots.swap_remove(chosen);
            if self.vfs.content(&gone.path).is_some() {
                return Err(format!("{} was deleted and is there", gone.path.display()));
            }
        }
        Ok(deleted)
    }

    fn rebase(&mut self) -> Result<bool, String> {
        self.close()?;
        let chosen = self.any(self.snapshots.len());
        let parent = self.snapshots[chosen].path.clone();
        refusable(snapshot::rebase(&self.options(), Path::new(LEAF), &parent, &mut go_on), "rebase")
    }

    /// The disk is closed, or the process ends, or the power fails: all that was flushed is there.
    fn reopen(&mut self) -> Outcome {
        match self.rng.below(3) {
            0 => self.close(),
            1 => {
                self.disk()?.flush().map_err(said("flush"))?;
                self.disk = None;
                Ok(())
            }
            _ => {
                self.disk()?.flush().map_err(said("flush"))?;
                let point = self.vfs.crash_now();
                self.disk = None;
                let seed = self.rng.next_u64();
                let mut skip = self.rng.below(6);
                point.for_each_state(seed, &cowvhd::sim::Bounds::sample(6), |state| {
                    self.vfs = state.to_vfs(seed);
                    skip = skip.saturating_sub(1);
                    skip > 0
                });
                Ok(())
            }
        }
    }

    fn step(&mut self, step: u64) -> Outcome {
        let mut event = self.rng.below(17) as usize;
        if event >= EVENTS.len() {
            event = [0, 0, 0, 3, 3][event - EVENTS.len()];
        }
        if self.snapshots.is_empty() && (4..11).contains(&event) {
            event = 3;
        }
        let done = match event {
            0 => self.write().map(|()| true),
            1 => self.discard().map(|()| true),
            2 => self.disk()?.flush().map_err(said("flush")).map(|()| true),
            3 => self.snapshot(step).map(|()| true),
            4 => self.revert().map(|()| true),
            5 => self.clone_one(step).map(|()| true),
            6 => self.merge(),
            7 => self.merge_running(),
            8 => self.delete(false),
            9 => self.delete(true),
            10 => self.rebase(),
            _ => self.reopen().map(|()| true),
        };
        let counts = if done? { &self.counts.done } else { &self.counts.refused };
        counts[event].fetch_add(1, Ordering::Relaxed);
        let found = content_of(self.disk()?).map_err(said("reading"))?;
        if found != self.content {
            return Err(format!("after {}: the disk holds something else", EVENTS[event]));
        }
        Ok(())
    }

    fn end(mut self) -> Outcome {
        self.close()?;
        let disk = Kept { path: LEAF.into(), name: None, content: std::mem::take(&mut self.content) };
        for Kept { path, content, .. } in self.snapshots.iter().chain(&self.clones).chain([&disk]) {
            let disk = self.options().read_only(true).open(path);
            let found = disk.and_then(|disk| content_of(&disk)).map_err(said(path.display()))?;
            if found != *content {
                return Err(format!("{} holds something else", path.display()));
            }
        }
        Ok(())
    }
}

/// What may be refused for a reason that the life does not look for: the layer is none of this disk's, or somebody else needs it.
fn refusable<T>(result: cowvhd::Result<T>, what: &str) -> Result<bool, String> {
    match result {
        Ok(_) => Ok(true),
        Err(error)
            if [ErrorKind::InvalidInput, ErrorKind::Unsupported, ErrorKind::NotFound]
                .contains(&error.kind()) =>
        {
            Ok(false)
        }
        Err(error) => Err(format!("{what}: {error}")),
    }
}

fn live(seed: u64, counts: &Counts) -> Outcome {
    let mut life = Life::new(seed, counts);
    for step in 0..8 + life.rng.below(16) {
        life.step(step).map_err(|what| format!("step {step}: {what}"))?;
    }
    life.end()
}

#[test]
fn random_lives_agree_with_the_model() {
    let variable = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let lives = variable("COWVHD_LIVES").unwrap_or(LIVES);
    let first = variable("COWVHD_SEED").unwrap_or(0);
    let (counts, next, wrong) = (Counts::default(), AtomicU64::new(first), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                while wrong.lock().unwrap().is_none() {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= first + lives {
                        break;
                    }
                    if let Err(what) = live(seed, &counts) {
                        *wrong.lock().unwrap() = Some(format!("seed {seed}, {what}"));
                    }
                }
            });
        }
    });
    if let Some(what) = wrong.into_inner().unwrap() {
        panic!("{what}");
    }
    for (event, name) in EVENTS.iter().enumerate() {
        let [done, refused] =
            [&counts.done, &counts.refused].map(|counts| counts[event].load(Ordering::Relaxed));
        println!("{name}: {done}, refused {refused}");
        assert!(lives < 100 || done > lives / 20, "{name}: {done} in {lives} lives");
    }
    summary::add(&format!("random lives of disks with snapshots and clones: {lives}, all as the model"));
}
