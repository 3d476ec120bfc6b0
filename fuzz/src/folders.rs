//! Target `folders`: a folder with a disk, its snapshots, their VM state, a second disk of that VM and a clone, in every state that a
//! power cut leaves, and with seals, registries and manifests changed and mended. Then somebody looks, and somebody works on.
//!
//! Whatever the files say:
//!
//! * nothing panics, hangs, or takes memory without bound;
//! * looking (check, list, states, opening for reading) changes no file and no name;
//! * a disk that opens shows what was written to it, also through kills after a flush, closes, snapshots, merges and deletions;
//! * a snapshot holds what the disk held; going back to one brings that back;
//! * whatever else can be read shows the same as long as it is there.

use crate::Seed;
use crate::bases::{BLOCK_BYTES, first_state};
use crate::guest::PATH;
use crate::guest::length;
use crate::input::Input;
use crate::mutation;
use cowvhd::check::{check, check_chain};
use cowvhd::sim::{CrashState, SimVfs};
use cowvhd::snapshot::{self, Checkpoint, SnapshotName};
use cowvhd::vfs::Vfs;
use cowvhd::{CreateOptions, Disk, OpenOptions, Result};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

const OTHER: &str = "/other.vhd";
const CLONE: &str = "/clone.vhd";
const BLOCKS: u64 = 5;
const SIZE: u64 = BLOCKS * BLOCK_BYTES as u64;
const SECTOR: u64 = 512;
const STEPS: usize = 24;
/// A file that an earlier change made longer than this is not copied.
const MOST_COPIED: u64 = 64 << 20;
/// Names that steps take snapshots by; the bases have the first two.
const NAMES: [&str; 4] = ["s1", "s2", "s3", "s4"];

/// The body of the target.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let bases = bases();
    let vfs = bases[input.below(bases.len() as u64) as usize].to_vfs(1);
    for _ in 0..input.u8() % 6 {
        change(&vfs, &mut input);
    }
    look(&vfs);
    work(&vfs, &mut input);
}

fn options(vfs: &SimVfs) -> OpenOptions {
    OpenOptions::new().vfs(Arc::new(vfs.clone()))
}

fn name(index: u8) -> Option<SnapshotName> {
    SnapshotName::new(NAMES[usize::from(index) % NAMES.len()]).ok()
}

fn images(vfs: &SimVfs) -> Vec<PathBuf> {
    vfs.paths().into_iter().filter(|path| path.extension().is_some_and(|ending| ending == "vhd")).collect()
}

fn hashes(vfs: &SimVfs) -> Vec<(PathBuf, Option<u64>)> {
    vfs.paths().into_iter().map(|path| (path.clone(), vfs.content_hash(&path))).collect()
}

/// One change of one file, or of the names in the folder.
fn change(vfs: &SimVfs, input: &mut Input) {
    let paths = vfs.paths();
    if paths.is_empty() {
        return;
    }
    let path = &paths[input.below(paths.len() as u64) as usize];
    let other = &paths[input.below(paths.len() as u64) as usize];
    let kind = input.u8();
    match input.u8() % 16 {
        0 => drop(vfs.remove(path)),
        1 => drop(vfs.exchange(path, other)),
        2 => drop(vfs.rename(path, other)),
        3 if path != other && length(vfs, path) <= MOST_COPIED => {
            let content = vfs.content(path).unwrap_or_default();
            if let Ok(file) = vfs.remove(other).and_then(|()| vfs.create_new(other)) {
                let _ = file.write_at(&content, 0);
            }
        }
        // Whoever speaks of seals and children: superblocks and registries.
        4..=9 if images(vfs).contains(path) => {
            mutation::change(vfs, path, kind & 0xf0 | 12, input);
        }
        _ if images(vfs).contains(path) => mutation::change(vfs, path, kind, input),
        // What belongs to a VM state: its manifest, or a blob.
        _ if path.to_string_lossy().contains('+') => vfs.corrupt(path, u64::from(input.u16()), &[kind]),
        _ => {
            let images = images(vfs);
            let images: Vec<&Path> = images.iter().map(PathBuf::as_path).collect();
            mutation::manifest(vfs, path, &images, input, kind & 0x80 == 0);
        }
    }
}

/// All that looks at files and must not change them.
fn look(vfs: &SimVfs) {
    let before = hashes(vfs);
    let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
    let leaf = Path::new(PATH);
    for path in images(vfs) {
        let _ = check(Arc::clone(&shared), &path);
        let _ = shown(vfs, &path);
    }
    let _ = check_chain(&options(vfs), leaf);
    let _ = snapshot::list(&options(vfs), leaf);
    for path in [PATH, OTHER, CLONE].map(Path::new) {
        let states = name(0).map(|name| snapshot::state(&options(vfs), path, &name));
        for state in states.into_iter().chain([snapshot::resumable(&options(vfs), path)]) {
            let Ok(state) = state else { continue };
            for blob in state.blobs() {
                let mut bytes = [0; 512];
                let read = blob.read_at(&mut bytes, 0);
                assert!(read.is_ok() || blob.length() < 512, "{read:?}");
                assert!(blob.read_at(&mut bytes, blob.length()).is_err());
            }
            let _ = state.verify();
        }
    }
    let points = [None, name(0), name(1)].map(|name| name.map(|name| PathBuf::from(name.as_str())));
    for (from, to) in [(1, 0), (1, 2), (2, 0), (0, 1)] {
        let (Some(from), to) = (points[from].as_deref(), points[to].as_deref()) else { continue };
        let _ = snapshot::diff(&options(vfs), leaf, from, to);
    }
    assert!(hashes(vfs) == before, "looking changed something");
}

fn content(disk: &Disk) -> Option<Vec<u8>> {
    (disk.size() <= 16 * SIZE).then_some(())?;
    let mut content = vec![0xee; disk.size() as usize];
    disk.read_at(&mut content, 0).ok().map(|()| content)
}

/// What a reader sees in the image, if anything.
fn shown(vfs: &SimVfs, path: &Path) -> Option<Vec<u8>> {
    let disk = options(vfs).read_only(true).open(path).ok()?;
    content(&disk)
}

/// The disk as it is worked on, and what is known of the files beside it.
struct Worker {
    vfs: SimVfs,
    disk: Option<Disk>,
    content: Vec<u8>,
    others: BTreeMap<PathBuf, Vec<u8>>,
}

/// Works on the disk, and says in how many steps.
fn work(vfs: &SimVfs, input: &mut Input) -> usize {
    let Ok(disk) = options(vfs).open(Path::new(PATH)) else { return 0 };
    let Some(content) = content(&disk) else { return 0 };
    if disk.close().is_err() {
        return 0;
    }
    drop(disk);
    // Opening may have finished or undone a snapshot: what the others hold counts from here on.
    let others = images(vfs).into_iter().filter(|path| path != Path::new(PATH));
    let others = others.filter_map(|path| Some((path.clone(), shown(vfs, &path)?))).collect();
    let mut worker = Worker { vfs: vfs.clone(), disk: None, content, others };
    let steps =
        (0..STEPS).take_while(|&number| !input.is_empty() && worker.step(input, number).is_some()).count();
    drop(worker.disk.take());
    worker.compare();
    steps
}

impl Worker {
    /// One step; `None` if the disk cannot be worked on any further.
    fn step(&mut self, input: &mut Input, number: usize) -> Option<()> {
        let kind = input.u8();
        if kind & 8 == 0 { self.request(kind, input, number) } else { self.idle(kind, input) }
    }

    /// Something that the disk is open for.
    fn request(&mut self, kind: u8, input: &mut Input, number: usize) -> Option<()> {
        self.open()?;
        let disk = self.disk.as_ref()?;
        let sectors = self.content.len() as u64 / SECTOR;
        let first = u64::from(input.u8()) * 3 % sectors;
        let count = (1 + u64::from(kind >> 4)).min(sectors - first);
        let (from, to) = ((first * SECTOR) as usize, ((first + count) * SECTOR) as usize);
        match kind & 7 {
            0..=2 => {
                let bytes = vec![0x80 | number as u8; to - from];
                disk.write_at(&bytes, from as u64).ok()?;
                self.content[from..to].copy_from_slice(&bytes);
            }
            3 => {
                disk.discard(from as u64, (to - from) as u64).ok()?;
                self.content[from..to].fill(0);
            }
            4 => disk.flush().ok()?,
            5 => {
                let name = name(input.u8())?;
                let result = disk.snapshot(&name);
                if let Ok(path) = result {
                    self.others.insert(path, self.content.clone());
                }
            }
            6 => disk.close().ok().map(|()| drop(self.disk.take()))?,
            // A kill; what was not flushed would be anybody's guess.
            _ => disk.flush().ok().map(|()| drop(self.disk.take()))?,
        }
        Some(())
    }

    /// Something that nobody may have the disk open for.
    fn idle(&mut self, kind: u8, input: &mut Input) -> Option<()> {
        self.open()?;
        self.disk.take()?.close().ok()?;
        let leaf = Path::new(PATH);
        let options = options(&self.vfs);
        let name = name(input.u8())?;
        let mut all = |_| ControlFlow::Continue(());
        match kind & 7 {
            0 => {
                if snapshot::revert(&options, leaf, &name).is_ok() {
                    self.content = self.others.get(&snapshot::snapshot_path(leaf, name.as_str())?)?.clone();
                }
            }
            1 => {
                let result = snapshot::delete(&options, leaf, &name, &mut all);
                let path = snapshot::snapshot_path(leaf, name.as_str())?;
                if let Ok(deleted) = result {
                    let is_there = self.vfs.content(&path).is_some();
                    assert_eq!(
                        is_there,
                        deleted.kept.is_some(),
                        "a deleted snapshot is there, or a kept one is not"
                    );
                }
            }
            2 => drop(snapshot::merge(&options, leaf, Some(Path::new(name.as_str())), &mut all)),
            3 => drop(snapshot::merge(&options, leaf, None, &mut all)),
            4 => {
                let (from, to) = (snapshot::snapshot_path(leaf, name.as_str())?, PathBuf::from("/new.vhd"));
                if snapshot::clone_to(&options, &from, &to).is_ok() {
                    let content = self.others.get(&from)?.clone();
                    self.others.insert(to, content);
                }
            }
            5 => drop(check_chain(&options, leaf)),
            _ => self.compare(),
        }
        Some(())
    }

    /// Opens the disk, if it is not open.
    fn open(&mut self) -> Option<()> {
        if self.disk.is_none() {
            let disk = options(&self.vfs).open(Path::new(PATH)).ok()?;
            let found = content(&disk)?;
            assert!(found == self.content, "the disk shows something else from {:?} on", self.first(&found));
            self.disk = Some(disk);
        }
        Some(())
    }

    fn first(&self, found: &[u8]) -> Option<usize> {
        found.iter().zip(&self.content).position(|(one, other)| one != other)
    }

    /// Whatever can be read shows what it showed.
    fn compare(&self) {
        for (path, content) in &self.others {
            if let Some(found) = shown(&self.vfs, path) {
                assert!(found == *content, "{} shows something else", path.display());
            }
        }
    }
}

/// The folders that changes start from: the life of a VM with two disks, cut here and there.
fn bases() -> &'static [CrashState] {
    static BASES: OnceLock<Vec<CrashState>> = OnceLock::new();
    BASES.get_or_init(|| {
        let vfs = SimVfs::new(31);
        vfs.record(true);
        // Whatever failed would show in the test of the bases.
        let _ = live(&vfs);
        let points = vfs.take_crash_points();
        let mut bases: Vec<CrashState> =
            points.iter().skip(4).step_by(3).filter_map(|point| first_state(point, 2)).collect();
        bases.extend(first_state(&vfs.crash_now(), 1));
        // The finished ones come first.
        bases.reverse();
        bases
    })
}

fn live(vfs: &SimVfs) -> Result<()> {
    let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
    let open = |path: &str| -> Result<Disk> {
        let create = CreateOptions::new(SIZE).test_geometry(BLOCK_BYTES, 128 << 10);
        create.vfs(Arc::clone(&shared)).create(Path::new(path))?;
        options(vfs).open(Path::new(path))
    };
    let (disk, other) = (open(PATH)?, open(OTHER)?);
    for (number, disk) in [&disk, &other].into_iter().enumerate() {
        for block in 0..3 {
            disk.write_at(&[1 + number as u8; 4096], block * u64::from(BLOCK_BYTES))?;
        }
        disk.flush()?;
    }
    let [first, second] = [0, 1].map(|index| name(index).unwrap_or_else(|| unreachable!("a legal name")));
    let checkpoint = Checkpoint::begin(&[&disk, &other], &first)?;
    let blob = checkpoint.blob("ram")?;
    blob.set_len(6000)?;
    blob.write_at(&[9; 5000], 0)?;
    checkpoint.commit()?;
    disk.write_at(&[3; 4096], 8192)?;
    disk.discard(0, u64::from(BLOCK_BYTES))?;
    disk.flush()?;
    disk.snapshot(&second)?;
    disk.write_at(&[4; 2048], SIZE - 2048)?;
    disk.close()?;
    other.close()?;
    drop((disk, other));
    snapshot::clone_to(&options(vfs), Path::new("/disk@s2.vhd"), Path::new(CLONE))?;
    snapshot::delete(&options(vfs), Path::new(PATH), &first, &mut |_| ControlFlow::Continue(()))?;
    snapshot::revert(&options(vfs), Path::new(PATH), &second)?;
    Ok(())
}

/// Steps of every kind.
const SCRIPT: [u8; 40] = [
    0x30, 9, 4, 0, 5, 2, 2, 0x11, 200, 7, 0, 8, 1, 0x22, 4, 4, 0, 12, 1, 3, 90, 5, 0, 3, 9, 2, 14, 0, 10, 1,
    0, 7, 6, 0, 11, 0, 13, 0, 14, 0,
];

/// Inputs to start from: each folder as it is, and some with a seal, a registry, a manifest or a name changed; then work of every kind.
pub fn seeds() -> Vec<Seed> {
    let mut seeds: Vec<Seed> = Vec::new();
    for base in 0..bases().len() as u8 {
        seeds.push(("folder", [&[base, 0][..], &SCRIPT].concat()));
        for file in (0..8).filter(|_| base % 8 == 0) {
            for (kind, what) in [(0, 4), (0x40, 4), (0x20, 4), (0, 15), (0, 0), (0, 1)] {
                let change = [file, file + 1, kind, what, 1, 0, 16 * file, 0, 0, 0, 0, 0, 0, 0, 1];
                seeds.push(("change", [&[base, 1][..], &change, &SCRIPT].concat()));
            }
        }
    }
    seeds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_life_of_the_bases_succeeds() {
        let vfs = SimVfs::new(31);
        let lived = live(&vfs);
        assert!(lived.is_ok(), "{lived:?}");
        let steps: Vec<usize> =
            bases().iter().map(|base| work(&base.to_vfs(1), &mut Input(&SCRIPT))).collect();
        assert!(steps.len() > 40 && steps.iter().all(|&steps| steps > 16), "{steps:?}");
        let with = |part: &str| {
            let has = |base: &&CrashState| {
                base.to_vfs(1).paths().iter().any(|path| path.to_string_lossy().contains(part))
            };
            bases().iter().filter(has).count()
        };
        for part in ["@s1.vhd", "@s1.vmstate", "+ram", "@s2.vhd", "clone"] {
            assert!(with(part) > 1, "{part}");
        }
    }
}
