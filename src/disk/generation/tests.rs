//! A running disk that gets new leaves while threads read, write, discard and flush.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::chain::ParentImage;
use crate::disk::{CreateOptions, Disk, OpenOptions, RunningLeaf};
use crate::error::ErrorKind;
use crate::layer::{self, CreateParameters, Image, ParentLink};
use crate::sim::SimVfs;
use crate::sync::{AtomicBool, AtomicU64};
use crate::vfs::{Access, HostVfs, Vfs};
use crate::vhd::Timestamp;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

const SECTOR: u64 = 512;
const BLOCK: u64 = 64 << 10;
const RING: u64 = 512 << 10;

fn name(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("{number}.vhd"))
}

fn create_root(vfs: &Arc<dyn Vfs>, folder: &Path, size: u64) -> Disk {
    let options = CreateOptions::new(size).test_geometry(BLOCK as u32, RING).vfs(Arc::clone(vfs));
    options.create(&name(folder, 0)).unwrap();
    OpenOptions::new().vfs(Arc::clone(vfs)).open(&name(folder, 0)).unwrap()
}

fn leaf(disk: &Disk) -> Arc<Layer> {
    match disk.leaf().unwrap() {
        RunningLeaf::Layer(layer) => layer,
        RunningLeaf::Fixed(_) => unreachable!(),
    }
}

/// An empty child of the leaf, numbered as it is to be named.
fn child(vfs: &Arc<dyn Vfs>, folder: &Path, disk: &Disk, number: u64) -> Box<Layer> {
    let path = name(folder, number);
    let parent = ParentLink {
        unique_id: leaf(disk).footer().unique_id,
        modified: Timestamp::from_unix_seconds(1 << 30),
        path: name(Path::new(""), number - 1),
        seal_id: Default::default(),
        fixed: Default::default(),
    };
    let (size, block_bytes) = (disk.size(), BLOCK as u32);
    let parameters = CreateParameters { size, block_bytes, ring_bytes: RING, parent: Some(parent) };
    layer::create(&**vfs, &path, &parameters).unwrap();
    match layer::open(Arc::clone(vfs), &path, Access::ReadWrite, |_, _, _| Ok(())).unwrap().0 {
        Image::Dynamic(layer) => layer,
        Image::Fixed(_) => unreachable!(),
    }
}

/// The former leaf, closed, as the parent that a later open would see.
fn sealed(vfs: &Arc<dyn Vfs>, leaf: &Layer) -> Arc<dyn Source> {
    leaf.close().unwrap();
    let file = vfs.open(leaf.path(), Access::ReadOnly).unwrap();
    Arc::new(ParentImage::open(file, leaf.path()).unwrap())
}

fn fill(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(SECTOR as usize / 8)
}

const THREADS: u64 = 4;
const BLOCKS: u64 = 12;
const SIZE: u64 = BLOCKS * BLOCK;
const SWITCHES: u64 = 24;

/// What one thread wrote: sector to value, absent for zeros.
type Content = HashMap<u64, u64>;

/// A thread writes a value to the first of its ordered sectors, then, when that has returned, to the second.
fn ordered(thread: u64) -> [u64; 2] {
    [BLOCKS - 2, BLOCKS - 1].map(|block| block * BLOCK / SECTOR + thread)
}

fn work(disk: &Disk, thread: u64, done: &AtomicBool, turns: &AtomicU64) -> Content {
    let mut random = thread + 1;
    let mut below = |end: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % end
    };
    let check = |content: &Content, sector: u64| {
        let mut found = vec![0xee; SECTOR as usize];
        disk.read_at(&mut found, sector * SECTOR).unwrap();
        assert!(found == fill(content.get(&sector).copied().unwrap_or(0)), "sector {sector}");
    };
    let mut content = Content::new();
    let sectors = BLOCK / SECTOR;
    let mut value = thread << 32;
    while !done.load(Ordering::SeqCst) {
        value += 1;
        // Blocks 0 to 3 belong to one thread each; in the next six every fourth sector does.
        let own = thread * sectors;
        let shared = (THREADS + below(6)) * sectors + below(sectors / THREADS) * THREADS + thread;
        match below(10) {
            0 => {
                disk.discard(own * SECTOR, BLOCK).unwrap();
                content.retain(|&sector, _| !(own..own + sectors).contains(&sector));
                check(&content, own + below(sectors));
            }
            1 => {
                let first = own + below(sectors - 20);
                disk.discard(first * SECTOR, 20 * SECTOR).unwrap();
                content.retain(|&sector, _| !(first..first + 20).contains(&sector));
            }
            2..=4 => {
                let (first, count) = (own + below(sectors - 16), 1 + below(16));
                disk.write_at(&fill(value).repeat(count as usize), first * SECTOR).unwrap();
                content.extend((first..first + count).map(|sector| (sector, value)));
                check(&content, own + below(sectors));
            }
            5..=8 => {
                disk.write_at(&fill(value), shared * SECTOR).unwrap();
                content.insert(shared, value);
                check(&content, shared);
            }
            _ => {
                for sector in ordered(thread) {
                    disk.write_at(&fill(value), sector * SECTOR).unwrap();
                    content.insert(sector, value);
                }
            }
        }
        turns.fetch_add(1, Ordering::SeqCst);
    }
    content
}

fn verify(disk: &Disk, content: &Content) {
    for sector in 0..SIZE / SECTOR {
        let mut found = vec![0xee; SECTOR as usize];
        disk.read_at(&mut found, sector * SECTOR).unwrap();
        assert!(found == fill(content.get(&sector).copied().unwrap_or(0)), "sector {sector}");
    }
}

fn value_at(disk: &Disk, sector: u64) -> u64 {
    let mut found = [0; 8];
    disk.read_at(&mut found, sector * SECTOR).unwrap();
    u64::from_le_bytes(found)
}

/// Nobody loses a write or a discard, no flush is answered while a leaf has no place in the chain, and each former leaf holds
/// a moment: never a write without another one that had returned before it began.
#[test]
fn threads_beside_new_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let vfs: Arc<dyn Vfs> = Arc::new(HostVfs);
    let disk = create_root(&vfs, dir.path(), SIZE);
    let (done, turns) = (AtomicBool::new(false), AtomicU64::new(0));
    let (switched, committed) = (AtomicU64::new(0), AtomicU64::new(0));
    let contents: Vec<Content> = std::thread::scope(|scope| {
        let (disk, done, turns, vfs) = (&disk, &done, &turns, &vfs);
        let (switched, committed) = (&switched, &committed);
        let flusher = scope.spawn(move || {
            while !done.load(Ordering::SeqCst) {
                let before = switched.load(Ordering::SeqCst);
                disk.flush().unwrap();
                assert!(committed.load(Ordering::SeqCst) >= before, "a flush was answered too early");
            }
        });
        let mut threads: Vec<_> =
            (0..THREADS).map(|thread| scope.spawn(move || work(disk, thread, done, turns))).collect();
        let any_ended = |threads: &[std::thread::ScopedJoinHandle<'_, Content>]| {
            flusher.is_finished() || threads.iter().any(|thread| thread.is_finished())
        };
        for number in 1..=SWITCHES {
            // Some work before each of them; whoever fails must not leave the others running for ever.
            let enough = turns.load(Ordering::SeqCst) + 60;
            while turns.load(Ordering::SeqCst) < enough && !any_ended(&threads) {
                std::thread::yield_now();
            }
            let child = child(vfs, dir.path(), disk, number);
            let old = leaf(disk);
            let switch = disk.switch_leaf(child).unwrap();
            switched.store(number, Ordering::SeqCst);
            let enough = turns.load(Ordering::SeqCst) + 20;
            while turns.load(Ordering::SeqCst) < enough && !any_ended(&threads) {
                std::thread::yield_now();
            }
            // As a snapshot would seal it: nothing but parents read it now.
            let sealed = sealed(vfs, &old);
            committed.store(number, Ordering::SeqCst);
            switch.commit((number % 3 != 0).then_some(sealed));
        }
        done.store(true, Ordering::SeqCst);
        flusher.join().unwrap();
        threads.drain(..).map(|thread| thread.join().unwrap()).collect()
    });
    let content: Content = contents.iter().flatten().map(|(&sector, &value)| (sector, value)).collect();
    verify(&disk, &content);
    disk.close().unwrap();
    drop(disk);
    for number in 0..=SWITCHES {
        let disk = OpenOptions::new().read_only(true).open(&name(dir.path(), number)).unwrap();
        for thread in 0..THREADS {
            let [first, second] = ordered(thread).map(|sector| value_at(&disk, sector));
            assert!(second <= first, "layer {number}, thread {thread}: {second} without {first}");
        }
        if number == SWITCHES {
            verify(&disk, &content);
        }
    }
}

/// After a thousand new leaves a block costs what it cost after one, whether it is touched for the first time since or not, and
/// the flat map has grown by nothing but the blocks that were written.
#[test]
fn a_thousand_leaves_later_a_read_is_one_read() {
    const LEAVES: u64 = 1000;
    let sim = SimVfs::new(1);
    let vfs: Arc<dyn Vfs> = Arc::new(sim.clone());
    let folder = Path::new("/");
    let disk = create_root(&vfs, folder, SIZE);
    let reads = |offset: u64| {
        let before = sim.counts().reads;
        let mut found = vec![0; 4096];
        disk.read_at(&mut found, offset).unwrap();
        (sim.counts().reads - before, found)
    };
    let page = |value: u8| vec![value; 4096];
    for block in 0..4 {
        disk.write_at(&page(1), block * BLOCK).unwrap();
    }
    for number in 1..=LEAVES {
        let child = child(&vfs, folder, &disk, number);
        let old = leaf(&disk);
        let switch = disk.switch_leaf(child).unwrap();
        let sealed = sealed(&vfs, &old);
        switch.commit(Some(sealed));
        if number == 1 {
            // The first touch of these; blocks 2 and 3 are not touched for a thousand leaves.
            (0..2).for_each(|block| assert_eq!(reads(block * BLOCK).1, page(1)));
        }
        // One unit of a block that each leaf holds in part.
        disk.write_at(&page((number % 251) as u8), 5 * BLOCK + number % 16 * 4096).unwrap();
    }
    assert_eq!(reads(0), (1, page(1)), "known since the first leaf, not touched since");
    let last = |unit: u64| (LEAVES - 15..=LEAVES).find(|number| number % 16 == unit).unwrap() % 251;
    for unit in (0..16).filter(|&unit| unit != LEAVES % 16) {
        let (count, found) = reads(5 * BLOCK + unit * 4096);
        assert_eq!(found, page(last(unit) as u8), "unit {unit}");
        assert_eq!(count, 1, "unit {unit}: folded in with each leaf");
    }
    let generation = disk.blocks().unwrap().generations().latest();
    assert_eq!(generation.parents.as_ref().unwrap().depth() as u64, LEAVES);
    assert_eq!(Arc::strong_count(&generation.leaf), 1, "nothing keeps former generations");
    disk.close().unwrap();
}

#[test]
fn without_a_commit_the_disk_stops() {
    for dropped in [false, true] {
        let vfs: Arc<dyn Vfs> = Arc::new(SimVfs::new(1));
        let folder = Path::new("/");
        let disk = create_root(&vfs, folder, SIZE);
        disk.write_at(&fill(1), 0).unwrap();
        let switch = disk.switch_leaf(child(&vfs, folder, &disk, 1)).unwrap();
        disk.write_at(&fill(2), SECTOR).unwrap();
        let flushed = std::thread::scope(|scope| {
            let flush = scope.spawn(|| disk.flush());
            match dropped {
                true => drop(switch),
                false => switch.fail("no space for its name"),
            }
            flush.join().unwrap()
        });
        let later = [disk.write_at(&fill(3), 0), disk.flush(), disk.discard(0, BLOCK)];
        assert_eq!((value_at(&disk, 0), value_at(&disk, 1)), (1, 2), "what is there can be read");
        for result in later.into_iter().chain([flushed, disk.close()]) {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Poisoned);
        }
    }
}

#[test]
fn a_leaf_of_another_shape_is_refused() {
    let vfs: Arc<dyn Vfs> = Arc::new(SimVfs::new(1));
    let folder = Path::new("/");
    let disk = create_root(&vfs, folder, SIZE);
    let other = create_root(&vfs, Path::new("/other"), SIZE + BLOCK);
    let error = disk.switch_leaf(child(&vfs, Path::new("/other"), &other, 1)).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    let child = child(&vfs, folder, &disk, 1);
    disk.close().unwrap();
    let error = disk.switch_leaf(child).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
}
