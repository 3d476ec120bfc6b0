//! Repair on a medium that loses power: cut at every step, and the repair after that again. In every state undoing restores the
//! damaged bytes, from which another repair ends with all of the guest's content, and nothing is worse than before. Where block
//! headers tell of all blocks, so does a repair of what the first one left.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use cowvhd::check::{Code, Consent, Severity, check, check_chain, relink, repair, undo, verify};
use cowvhd::sim::{Bounds, CrashPoint, CrashState, Rng, SimVfs};
use cowvhd::vfs::{Access, Vfs};
use cowvhd::vhd::{DynamicHeader, HeaderCookie};
use cowvhd::{CreateOptions, ErrorKind, OpenOptions, Result};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

const IMAGE: &str = "/disk.vhd";
const UNDO: &str = "/disk.vhd.undo";
/// Of a repair, and of those that go on with what it left.
const UNDO_FILES: [&str; 3] = [UNDO, "/second.undo", "/third.undo"];
const BLOCK: u64 = 16 << 10;
const TABLE: u64 = 1 << 20;
const SLOTS: u64 = 5 << 20;
const STRIDE: u64 = BLOCK + 4096;

fn image(closed: bool) -> (SimVfs, Vec<u8>) {
    let vfs = SimVfs::new(7);
    let path = Path::new(IMAGE);
    let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
    CreateOptions::new(8 * BLOCK)
        .test_geometry(BLOCK as u32, 128 << 10)
        .vfs(Arc::clone(&shared))
        .create(path)
        .unwrap();
    let disk = OpenOptions::new().vfs(Arc::clone(&shared)).open(path).unwrap();
    for block in [0, 1, 3, 6, 7] {
        disk.write_at(&vec![block as u8 + 1; 6144], block * BLOCK + 1024 * block).unwrap();
    }
    disk.discard(3 * BLOCK, BLOCK).unwrap();
    disk.flush().unwrap();
    if closed {
        disk.close().unwrap();
    } else {
        // A checkpoint, and something behind it.
        disk.write_at(&[9; 512], 7 * BLOCK).unwrap();
        disk.flush().unwrap();
    }
    drop(disk);
    let content = content(&vfs);
    (vfs, content)
}

fn content(vfs: &SimVfs) -> Vec<u8> {
    let disk = OpenOptions::new().vfs(Arc::new(vfs.clone())).read_only(true).open(Path::new(IMAGE)).unwrap();
    let mut content = vec![0xee; disk.size() as usize];
    disk.read_at(&mut content, 0).unwrap();
    content
}

/// The files as they are, on a medium of their own, nothing pending.
fn copy(vfs: &SimVfs) -> SimVfs {
    let mut copies = Vec::new();
    let file = vfs.open(Path::new(IMAGE), Access::ReadWrite);
    file.or_else(|_| vfs.open(Path::new(IMAGE), Access::ReadOnly)).unwrap().sync_data().unwrap();
    vfs.crash_now().for_each_state(0, &Bounds::sample(1), |state| {
        copies.push(state.to_vfs(1));
        false
    });
    copies.pop().unwrap()
}

/// Takes back all that was repaired, the last first.
fn take_back(vfs: &SimVfs) {
    for saved in UNDO_FILES.iter().rev().map(Path::new) {
        if vfs.open(saved, Access::ReadOnly).is_ok() {
            undo(Arc::new(vfs.clone()), saved, Path::new(IMAGE), true).unwrap();
        }
    }
}

/// A result, or that with the next undo file where one belongs to a repair that is complete, or was cut.
fn with_another<T>(mut result: Result<T>, run: impl Fn(&'static str) -> Result<T>) -> Result<T> {
    for other in UNDO_FILES {
        match &result {
            Err(error) if matches!(error.kind(), ErrorKind::Exists | ErrorKind::Corrupt) => {
                result = run(other)
            }
            _ => break,
        }
    }
    result
}

struct Explorer {
    /// Block headers tell of all blocks.
    described: bool,
    content: Vec<u8>,
    damaged: Vec<u8>,
    damaged_hash: Option<u64>,
    before: Option<Severity>,
    states: u64,
    taken_back: u64,
}

impl Explorer {
    fn explore(&mut self, points: &[CrashPoint], seed: u64, limit: usize, depth: u32, what: &str) {
        let mut rng = Rng::new(seed);
        for (number, point) in points.iter().enumerate() {
            // Deeper down a few points are enough: every cut of the first repair leads there.
            if depth == 0 && !rng.one_in(6) {
                continue;
            }
            point.for_each_state(rng.next_u64(), &Bounds::sample(limit), |state| {
                self.judge(&state, depth, &format!("{what}, cut {number}"));
                true
            });
        }
    }

    fn judge(&mut self, state: &CrashState, depth: u32, what: &str) {
        self.states += 1;
        let path = Path::new(IMAGE);
        let vfs = state.to_vfs(state.hash);
        let found = check(Arc::new(vfs.clone()), path).unwrap_or_else(|error| panic!("{what}: {error}"));
        // A copy that is being written may be torn; another one counts.
        assert!(
            found.worst() <= self.before.max(Some(Severity::Risk)),
            "{what}: worse: {:#?}",
            found.findings()
        );

        let back = state.to_vfs(state.hash);
        take_back(&back);
        if back.content_hash(path) != self.damaged_hash {
            let restored = back.content(path).unwrap();
            let at = restored.iter().zip(&self.damaged).position(|(a, b)| a != b);
            let has_undo = back.open(Path::new(UNDO), Access::ReadOnly).is_ok();
            panic!(
                "{what}: undoing left a difference at {at:?}, lengths {} and {}, undo file: {has_undo}",
                restored.len(),
                self.damaged.len()
            );
        }

        vfs.record(depth > 0);
        let run = |vfs: &SimVfs, undo| repair(Arc::new(vfs.clone()), path, Consent::All, Path::new(undo));
        let again = run(&vfs, UNDO);
        if again.as_ref().is_err_and(|error| error.kind() == ErrorKind::Corrupt) {
            self.taken_back += 1;
            // It is the first repair again, so some are enough.
            if !self.described || self.taken_back % 8 == 1 {
                let again = run(&back, UNDO).unwrap_or_else(|error| panic!("{what}, taken back: {error}"));
                assert!(again.is_sound() && content(&back) == self.content, "{what}: {:#?}", again.steps);
            }
            if !self.described {
                return;
            }
        }
        // One that was cut behind its last record is complete, and nothing leads on from there.
        let is_complete = again.as_ref().is_err_and(|error| error.kind() == ErrorKind::Exists);
        let again =
            with_another(again, |undo| run(&vfs, undo)).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(again.is_sound(), "{what}: {:#?} {:#?}", again.steps, again.after.findings());
        assert!(content(&vfs) == self.content, "{what}: {:#?}", again.steps);
        let points = vfs.take_crash_points();
        if !is_complete && again.changes() && depth > 0 {
            self.explore(&points, state.hash, 2, depth - 1, what);
        }
    }
}

/// Damages an image.
type Damage<'a> = &'a dyn Fn(&SimVfs);

fn cut_everywhere(closed: bool, cases: &[(&str, &[(u64, u64)])]) {
    cut_everywhere_in(&image(closed), cases);
}

fn cut_everywhere_in(image: &(SimVfs, Vec<u8>), cases: &[(&str, &[(u64, u64)])]) {
    for &(name, ranges) in cases {
        for byte in [0x00, 0xd7] {
            let damage = |vfs: &SimVfs| {
                for &(at, length) in ranges {
                    vfs.corrupt(Path::new(IMAGE), at, &vec![byte; length as usize]);
                }
            };
            cut_everywhere_after(image, &[(&format!("{name} {byte:#x}"), &damage)]);
        }
    }
}

fn cut_everywhere_after(image: &(SimVfs, Vec<u8>), cases: &[(&str, Damage<'_>)]) {
    explore_cuts(image, true, cases);
}

fn explore_cuts((good, content): &(SimVfs, Vec<u8>), described: bool, cases: &[(&str, Damage<'_>)]) {
    for (name, damage) in cases {
        let vfs = copy(good);
        damage(&vfs);
        let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
        let before = check(Arc::clone(&shared), Path::new(IMAGE)).unwrap().worst();
        let damaged = vfs.content(Path::new(IMAGE)).unwrap();
        let damaged_hash = vfs.content_hash(Path::new(IMAGE));
        vfs.record(true);
        let repaired = repair(shared, Path::new(IMAGE), Consent::All, Path::new(UNDO)).unwrap();
        assert!(repaired.is_sound() && repaired.changes(), "{name}: {:?}", repaired.after.findings());
        let mut points = vfs.take_crash_points();
        points.push(vfs.crash_now());
        let content = content.clone();
        let mut explorer =
            Explorer { described, content, damaged, damaged_hash, before, states: 0, taken_back: 0 };
        explorer.explore(&points, 1, 6, 1, name);
        assert!(explorer.states > 20, "{name}: {} states", explorer.states);
        assert!(described || explorer.taken_back > 20, "{name}: {}", explorer.taken_back);
    }
}

#[test]
fn a_closed_image() {
    let end = {
        let (vfs, _) = image(true);
        vfs.content(Path::new(IMAGE)).unwrap().len() as u64 - 512
    };
    cut_everywhere(
        true,
        &[
            ("start", &[(0, 4096)]),
            ("a superblock", &[(4096, 4096)]),
            ("both superblocks", &[(4096, 8192)]),
            ("table", &[(TABLE, 4096)]),
            ("a part of the table", &[(TABLE, 8)]),
            ("a block page", &[(SLOTS + STRIDE, 4096)]),
            ("a bitmap", &[(SLOTS + 3584, 512)]),
            ("start, table and footer", &[(0, 4096), (TABLE, 4096), (end, 512)]),
        ],
    );
}

#[test]
fn an_image_that_was_not_closed() {
    cut_everywhere(
        false,
        &[
            ("nothing", &[]),
            ("start", &[(0, 4096)]),
            ("a superblock", &[(8192, 4096)]),
            ("table", &[(TABLE, 4096)]),
            ("start and table", &[(0, 4096), (TABLE, 4096)]),
        ],
    );
}

/// A sealed image with a child and CRCs: its seal and its registry are made again from them.
#[test]
fn a_sealed_image() {
    let (vfs, content) = image(true);
    let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
    let child = Path::new("/child.vhd");
    CreateOptions::child_of(Path::new(IMAGE)).vfs(Arc::clone(&shared)).create(child).unwrap();
    let options = OpenOptions::new().vfs(shared);
    verify(&options, child, true, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let lineage = |vfs: &SimVfs| vfs.content(Path::new(IMAGE)).unwrap()[4096 + 176..4096 + 884].to_vec();
    let seal = lineage(&vfs);
    assert!(seal[..16].iter().any(|&byte| byte != 0));
    cut_everywhere_in(
        &(vfs.clone(), content),
        &[
            ("a superblock", &[(8192, 4096)]),
            ("both superblocks", &[(4096, 8192)]),
            ("a copy of the registry", &[(65536, 4096)]),
            ("start, and a copy of the registry", &[(0, 4096), (65536, 4096)]),
        ],
    );
    vfs.corrupt(Path::new(IMAGE), 4096, &[0; 8192]);
    repair(Arc::new(vfs.clone()), Path::new(IMAGE), Consent::All, Path::new(UNDO)).unwrap();
    assert_eq!(lineage(&vfs), seal);
}

#[test]
fn an_image_whose_cookie_was_turned_back() {
    let (vfs, _) = image(false);
    let file = vfs.open(Path::new(IMAGE), Access::ReadOnly).unwrap();
    let mut header = [0; DynamicHeader::SIZE];
    assert_eq!(file.read_at(&mut header, 512).unwrap(), header.len());
    let dirty = DynamicHeader::parse(&header).unwrap();
    let normal = DynamicHeader { cookie: HeaderCookie::Normal, ..dirty }.to_bytes();
    cut_everywhere_after(
        &image(false),
        &[("the cookie", &|vfs| vfs.corrupt(Path::new(IMAGE), 512, &normal))],
    );
}

/// What a reader that follows the table shows of an image of eight blocks.
fn shown(bytes: &[u8]) -> Vec<u8> {
    let mut content = vec![0; 8 * BLOCK as usize];
    let table = bytes[TABLE as usize..].chunks(4);
    for (block, entry) in content.chunks_mut(BLOCK as usize).zip(table) {
        let at = u32::from_be_bytes(entry.try_into().unwrap()) as usize * 512;
        let Some((bits, data)) = bytes.get(at..).and_then(|block| block.split_at_checked(512)) else {
            continue;
        };
        for (sector, (to, from)) in block.chunks_mut(512).zip(data.chunks(512)).enumerate() {
            if bits[sector / 8] & (0x80 >> (sector % 8)) != 0 {
                to.copy_from_slice(from);
            }
        }
    }
    content
}

/// Another program added blocks, and entries that name what others hold: what each entry shows is kept.
#[test]
fn blocks_that_share_space() {
    let (vfs, _) = image(true);
    let path = Path::new(IMAGE);
    let bytes = vfs.content(path).unwrap();
    let (end, footer) = (bytes.len() as u64 - 512, &bytes[..512]);
    let mut block = vec![0; 512 + BLOCK as usize];
    block[0] = 0xff;
    block[512..][..4096].fill(0x5a);
    let file = vfs.open(path, Access::ReadWrite).unwrap();
    let entry = |block: u64, at: u64| {
        file.write_at(&u32::try_from(at / 512).unwrap().to_be_bytes(), TABLE + 4 * block).unwrap();
    };
    file.write_at(&block, end).unwrap();
    file.write_at(footer, end + block.len() as u64).unwrap();
    entry(2, end);
    entry(4, end);
    // Its bitmap is what block 0 holds.
    entry(5, SLOTS + 4096);
    file.sync_data().unwrap();
    let damaged = vfs.content(path).unwrap();
    let content = shown(&damaged);
    assert!(content[2 * BLOCK as usize..].starts_with(&[0x5a; 512]));
    explore_cuts(&(vfs, content), false, &[("blocks that share space", &|_| {})]);
}

const BASE: &str = "/base.vhd";
const MOVED: &str = "/moved.vhd";

/// A child over a parent that has been renamed since, and what it shows.
fn child_of_a_moved_parent() -> (SimVfs, Vec<u8>) {
    let vfs = SimVfs::new(11);
    let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
    CreateOptions::new(8 * BLOCK)
        .test_geometry(BLOCK as u32, 128 << 10)
        .vfs(Arc::clone(&shared))
        .create(Path::new(BASE))
        .unwrap();
    let options = OpenOptions::new().vfs(Arc::clone(&shared));
    let base = options.open(Path::new(BASE)).unwrap();
    base.write_at(&[1; 8192], 2 * BLOCK).unwrap();
    base.close().unwrap();
    CreateOptions::child_of(Path::new(BASE)).vfs(Arc::clone(&shared)).create(Path::new(IMAGE)).unwrap();
    let disk = options.open(Path::new(IMAGE)).unwrap();
    disk.write_at(&[2; 4096], 5 * BLOCK).unwrap();
    disk.close().unwrap();
    drop(disk);
    let content = content(&vfs);
    shared.rename(Path::new(BASE), Path::new(MOVED)).unwrap();
    shared.sync_dir(Path::new("/")).unwrap();
    (vfs, content)
}

/// What `relink` leaves of the child when it is cut: the old name or the new one, never a worse disk, always a way on and a way back.
fn judge_relink(
    state: &CrashState,
    (expected, before): (&[u8], &[u8]),
    depth: u32,
    what: &str,
    states: &mut [u64; 2],
) {
    let path = Path::new(IMAGE);
    let options = |vfs: &SimVfs| OpenOptions::new().vfs(Arc::new(vfs.clone()));
    let vfs = state.to_vfs(state.hash);
    let found = check_chain(&options(&vfs), path).unwrap_or_else(|error| panic!("{what}: {error}"));
    let moved = found.codes().contains_key(&Code::ParentMoved);
    states[usize::from(moved)] += 1;
    assert!(moved || found.worst() <= Some(Severity::Risk), "{what}: {:?}", found.codes());

    let back = state.to_vfs(state.hash);
    take_back(&back);
    assert!(back.content(path).unwrap() == before, "{what}: undone");

    vfs.record(depth > 0);
    let run = |undo| relink(&options(&vfs), path, None, Some(Path::new(undo)));
    let again = run(UNDO);
    let is_complete = again.as_ref().is_err_and(|error| error.kind() == ErrorKind::Exists);
    // One that was cut need not be taken back: it is a session like any other.
    let again = with_another(again, run).unwrap_or_else(|error| panic!("{what}: {error}"));
    // Where a journal alone has the new name, it is done again.
    assert!(again.is_some() || !moved, "{what}");
    let points = vfs.take_crash_points();
    // One that was named, and not closed, is recovered by an open.
    options(&vfs).open(path).unwrap_or_else(|error| panic!("{what}: {error}")).close().unwrap();
    assert!(content(&vfs) == expected, "{what}: content");
    let found = check_chain(&options(&vfs), path).unwrap();
    assert!(found.is_sound(), "{what}: {:?}", found.codes());
    if depth > 0 && !is_complete {
        for (cut, point) in points.iter().enumerate().step_by(5) {
            point.for_each_state(state.hash, &Bounds::sample(2), |state| {
                let what = format!("{what}, then {cut}");
                judge_relink(&state, (expected, before), depth - 1, &what, states);
                true
            });
        }
    }
}

#[test]
fn naming_a_parent_that_has_moved() {
    let (vfs, expected) = child_of_a_moved_parent();
    let before = vfs.content(Path::new(IMAGE)).unwrap();
    vfs.record(true);
    let options = OpenOptions::new().vfs(Arc::new(vfs.clone()));
    let found = relink(&options, Path::new(IMAGE), None, Some(Path::new(UNDO))).unwrap();
    assert_eq!(found.as_deref(), Some(Path::new(MOVED)));
    let mut points = vfs.take_crash_points();
    points.push(vfs.crash_now());
    let mut states = [0; 2];
    for (cut, point) in points.iter().enumerate() {
        point.for_each_state(cut as u64, &Bounds::sample(4), |state| {
            judge_relink(&state, (&expected, &before), 1, &format!("cut {cut}"), &mut states);
            true
        });
    }
    println!("{} states with the new name, {} with the old one", states[0], states[1]);
    assert!(states[0] > 20 && states[1] > 20, "{states:?}");
}
