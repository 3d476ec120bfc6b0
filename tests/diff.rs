//! What changed between two points of a chain, compared with what was written and with what the points hold.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use cowvhd::sim::{Rng, SimVfs};
use cowvhd::snapshot::{Change, ChangeKind, diff, export_delta, snapshot_path};
use cowvhd::vfs::Vfs;
use cowvhd::{CreateOptions, ErrorKind, OpenOptions, ZeroMode};
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const UNIT: u64 = 4096;
const BLOCK: u32 = 16 << 10;
const SIZE: u64 = 8 * BLOCK as u64 - 1024;

/// A chain on a simulated medium, from the root up, with what each layer shows and which units were written in it.
struct Chain {
    vfs: SimVfs,
    layers: Vec<PathBuf>,
    contents: Vec<Vec<u8>>,
    touched: Vec<BTreeSet<u64>>,
}

fn options(vfs: &SimVfs) -> OpenOptions {
    OpenOptions::new().vfs(Arc::new(vfs.clone()))
}

impl Chain {
    /// Layers `vm@0.vhd`, `vm@1.vhd`, … and `vm.vhd` on top. The last one may be left without closing it.
    fn random(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let vfs = SimVfs::new(seed);
        let disk = Path::new("/vm.vhd");
        let depth = 2 + rng.below(4) as usize;
        let mut chain = Chain { vfs, layers: Vec::new(), contents: Vec::new(), touched: Vec::new() };
        let mut content = vec![0; SIZE as usize];
        for number in 0..depth {
            let path = match number + 1 == depth {
                true => disk.to_path_buf(),
                false => snapshot_path(disk, &number.to_string()).unwrap(),
            };
            let create = match chain.layers.last() {
                None => CreateOptions::new(SIZE).test_geometry(BLOCK, 128 << 10),
                Some(parent) => CreateOptions::child_of(parent).test_geometry(BLOCK, 128 << 10),
            };
            create.vfs(Arc::new(chain.vfs.clone())).create(&path).unwrap();
            let touched = chain.change(&path, &mut content, &mut rng, number + 1 == depth);
            chain.layers.push(path);
            chain.contents.push(content.clone());
            chain.touched.push(touched);
        }
        chain
    }

    fn change(&self, path: &Path, content: &mut [u8], rng: &mut Rng, top: bool) -> BTreeSet<u64> {
        let disk = options(&self.vfs).open(path).unwrap();
        let mut touched = BTreeSet::new();
        for _ in 0..rng.below(6) {
            let sectors = SIZE / 512;
            let first = rng.below(sectors);
            let count = (1 + rng.below(40)).min(sectors - first);
            let (start, end) = (first * 512, (first + count) * 512);
            let range = start as usize..end as usize;
            match rng.below(3) {
                0 => {
                    content[range].fill(0);
                    disk.write_zeroes(start, end - start, ZeroMode::MayPunch).unwrap();
                }
                _ => {
                    content[range.clone()].fill(1 + rng.below(255) as u8);
                    disk.write_at(&content[range], start).unwrap();
                }
            }
            touched.extend(start / UNIT..end.div_ceil(UNIT));
            if rng.one_in(3) {
                disk.flush().unwrap();
            }
        }
        match top && rng.one_in(2) {
            true => disk.flush().unwrap(),
            false => disk.close().unwrap(),
        }
        touched
    }
}

impl Chain {
    /// Exports the changes between two points: the new disk shows the newer one.
    fn check_export(&self, from: &Path, to: Option<&Path>, expected: &[u8]) {
        let (disk, out) = (self.layers.last().unwrap(), Path::new("/delta.vhd"));
        let go_on = &mut |_| ControlFlow::Continue(());
        export_delta(&options(&self.vfs), disk, from, to, out, go_on).unwrap();
        let delta = options(&self.vfs).read_only(true).open(out).unwrap();
        let mut content = vec![0xee; SIZE as usize];
        delta.read_at(&mut content, 0).unwrap();
        assert!(content == expected);
        drop(delta);
        self.vfs.remove(out).unwrap();
    }
}

fn check(changes: &[Change], before: &[u8], after: &[u8], touched: &BTreeSet<u64>) {
    let mut changed = vec![false; after.len()];
    let mut end = 0;
    for change in changes {
        assert!(change.offset >= end && change.length > 0, "in order, apart: {changes:?}");
        end = change.offset + change.length;
        let range = change.offset as usize..end as usize;
        changed[range.clone()].fill(true);
        if change.kind == ChangeKind::Zero {
            assert!(after[range].iter().all(|&byte| byte == 0), "{change:?} holds data");
        }
    }
    for (at, &changed) in changed.iter().enumerate() {
        assert!(changed || before[at] == after[at], "byte {at} changed, and the diff has it not");
        assert!(!changed || touched.contains(&(at as u64 / UNIT)), "byte {at} was never written to");
    }
}

#[test]
fn any_two_points_differ_where_the_diff_says() {
    for seed in 0..150 {
        let chain = Chain::random(seed);
        let before: Vec<_> = chain.layers.iter().map(|path| chain.vfs.content_hash(path)).collect();
        let disk = chain.layers.last().unwrap();
        let top = chain.layers.len() - 1;
        for from in 0..=top {
            for to in from..=top {
                // By name, by path, and as what is the default.
                let name = PathBuf::from(from.to_string());
                let from_point = if from < top { &name } else { disk };
                let to_point = (to < top).then_some(chain.layers[to].as_path());
                let found = diff(&options(&chain.vfs), disk, from_point, to_point)
                    .unwrap_or_else(|error| panic!("seed {seed}, {from} to {to}: {error}"));
                let touched = chain.touched[from + 1..=to].iter().flatten().copied().collect();
                check(&found.changes, &chain.contents[from], &chain.contents[to], &touched);
                assert_eq!((found.size_before, found.size), (SIZE, SIZE));
                if from < to {
                    chain.check_export(from_point, to_point, &chain.contents[to]);
                }
            }
        }
        let after: Vec<_> = chain.layers.iter().map(|path| chain.vfs.content_hash(path)).collect();
        assert_eq!(before, after, "a diff changed a file");
    }
}

#[test]
fn points_that_are_none_are_errors() {
    let chain = Chain::random(3);
    let disk = chain.layers.last().unwrap();
    let fails = |from: &str, to: Option<&str>| {
        diff(&options(&chain.vfs), disk, Path::new(from), to.map(Path::new)).unwrap_err()
    };
    let error = fails("monday", None);
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("neither /vm@monday.vhd nor monday exists"), "{error}");
    let error = fails("/vm.vhd", Some("0"));
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("is older than"), "{error}");
    let other = Path::new("/vm@other.vhd");
    CreateOptions::new(SIZE).vfs(Arc::new(chain.vfs.clone())).create(other).unwrap();
    let error = fails("other", None);
    assert!(error.to_string().contains("/vm@other.vhd is no layer of this disk"), "{error}");
}

/// A small change on a big disk costs reads of the block table and of what changed, and none of the guest's data.
#[test]
fn a_small_change_of_a_big_disk_is_found_by_a_few_reads() {
    let vfs = SimVfs::new(1);
    let (root, disk) = (Path::new("/vm@a.vhd"), Path::new("/vm.vhd"));
    CreateOptions::new(64 << 30).vfs(Arc::new(vfs.clone())).create(root).unwrap();
    CreateOptions::child_of(root).vfs(Arc::new(vfs.clone())).create(disk).unwrap();
    let open = options(&vfs).open(disk).unwrap();
    let places = [0, (1 << 30) - 4096, 40 << 30];
    for place in places {
        open.write_at(&[7; 8192], place).unwrap();
    }
    open.close().unwrap();
    let before = vfs.counts().reads;
    let found = diff(&options(&vfs), disk, Path::new("a"), None).unwrap();
    let reads = vfs.counts().reads - before;
    let change = |offset| Change { offset, length: 8192, kind: ChangeKind::Data };
    assert_eq!(found.changes, places.map(change));
    assert!(reads < 60, "{reads} reads");
}

/// An export that is cancelled, or has nothing to export, leaves nothing behind.
#[test]
fn a_cancelled_export_leaves_nothing() {
    let chain = Chain::random(5);
    let disk = chain.layers.last().unwrap();
    let names = chain.vfs.paths();
    let export = |from: &str, after: u32| {
        let mut calls = 0;
        export_delta(&options(&chain.vfs), disk, Path::new(from), None, Path::new("/out.vhd"), &mut |_| {
            calls += 1;
            if calls > after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    };
    for after in 0..3 {
        assert_eq!(export("0", after).unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(chain.vfs.paths(), names);
    }
    assert_eq!(export("/vm.vhd", u32::MAX).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(chain.vfs.paths(), names);
}
