//! Images to start from: ours in every state of their life, and small ones laid out by hand.

use crate::guest::{PARENT, PATH, file_of};
use cowvhd::sim::{Bounds, CrashState, History, SimVfs};
use cowvhd::snapshot::relink;
use cowvhd::vfs::{Access, Vfs};
use cowvhd::vhd::{
    DiskType, DynamicHeader, Footer, ParentLocator, PlatformCode, Timestamp, UniqueId, bat, bitmap_bytes,
    locator,
};
use cowvhd::{CreateOptions, Disk, OpenOptions, ZeroMode};
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// Blocks of the images made by the library.
pub const BLOCK_BYTES: u32 = 16 << 10;
const RING_BYTES: u64 = 128 << 10;
/// Not a whole number of blocks.
const SIZE: u64 = 12 * BLOCK_BYTES as u64 - 1024;

/// The images that mutations start from.
pub fn all() -> &'static [CrashState] {
    static ALL: OnceLock<Vec<CrashState>> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut bases = vec![
            made(|_| Some(())),
            made(|disk| {
                fill(disk, 0, 12)?;
                disk.discard(3 * u64::from(BLOCK_BYTES), u64::from(BLOCK_BYTES) * 2).ok()?;
                disk.flush().ok()
            }),
        ];
        bases.extend(lives());
        bases.push(fixed());
        bases.extend([child(true), child(false)]);
        bases.extend(relinked());
        bases.extend(elsewhere());
        bases.extend(small_images().iter().map(|(_, image)| at_rest(&file_of(image))));
        bases.into_iter().flatten().collect()
    })
}

fn made(work: impl FnOnce(&Disk) -> Option<()>) -> Option<CrashState> {
    let vfs = SimVfs::new(7);
    create(&vfs).create(Path::new(PATH)).ok()?;
    let disk = open(&vfs)?;
    work(&disk)?;
    disk.close().ok()?;
    drop(disk);
    at_rest(&vfs)
}

fn create(vfs: &SimVfs) -> CreateOptions {
    CreateOptions::new(SIZE).test_geometry(BLOCK_BYTES, RING_BYTES).vfs(Arc::new(vfs.clone()))
}

fn open(vfs: &SimVfs) -> Option<Disk> {
    OpenOptions::new().vfs(Arc::new(vfs.clone())).open(Path::new(PATH)).ok()
}

/// Writes to every second page of some blocks.
fn fill(disk: &Disk, from_block: u64, to_block: u64) -> Option<()> {
    for block in from_block..to_block {
        let mut buf = vec![0; 4096];
        History::fill(block + 1, &mut buf);
        disk.write_at(&buf, block * u64::from(BLOCK_BYTES)).ok()?;
        disk.write_at(&buf[..512], block * u64::from(BLOCK_BYTES) + 8192).ok()?;
    }
    Some(())
}

/// Images after kills and power cuts: a journal with everything in it, a closing half-way, and a session just begun.
fn lives() -> Vec<Option<CrashState>> {
    let vfs = SimVfs::new(9);
    let mut states = Vec::new();
    let mut live = || {
        create(&vfs).create(Path::new(PATH)).ok()?;
        vfs.record(true);
        let disk = open(&vfs)?;
        states.extend(vfs.take_crash_points().last().and_then(|point| first_state(point, 1)));
        for round in 0..3 {
            fill(&disk, round * 4, round * 4 + 2)?;
            disk.flush().ok()?;
            fill(&disk, round * 3, round * 3 + 1)?;
            disk.discard(u64::from(BLOCK_BYTES) * (round + 1), u64::from(BLOCK_BYTES)).ok()?;
            disk.write_zeroes(8192, 4096, ZeroMode::KeepAllocated).ok()?;
            disk.flush().ok()?;
        }
        let (mut large, before) = (vec![0; 128 << 10], vfs.take_crash_points());
        states.extend(before.last().and_then(|point| first_state(point, 3)));
        History::fill(99, &mut large);
        disk.write_at(&large, 0).ok()?;
        disk.flush().ok()?;
        // The ring goes round: checkpoints.
        for round in 0..40 {
            disk.discard((round % 12) * u64::from(BLOCK_BYTES), 4096).ok()?;
            fill(&disk, round % 11, round % 11 + 1)?;
            disk.flush().ok()?;
        }
        vfs.take_crash_points();
        states.extend(first_state(&vfs.crash_now(), 1));
        disk.close().ok()?;
        let closing = vfs.take_crash_points();
        states.extend(closing.iter().filter_map(|point| first_state(point, 1)));
        Some(())
    };
    if live().is_none() {
        return Vec::new();
    }
    states.into_iter().map(Some).collect()
}

fn fixed() -> Option<CrashState> {
    let vfs = SimVfs::new(3);
    CreateOptions::new(64 << 10).fixed().vfs(Arc::new(vfs.clone())).create(Path::new(PATH)).ok()?;
    at_rest(&vfs)
}

/// A differencing disk over a parent with data, closed or as a crash leaves it.
fn child(closed: bool) -> Option<CrashState> {
    let vfs = SimVfs::new(11);
    create(&vfs).create(Path::new(PARENT)).ok()?;
    let parent = OpenOptions::new().vfs(Arc::new(vfs.clone())).open(Path::new(PARENT)).ok()?;
    fill(&parent, 0, 12)?;
    parent.close().ok()?;
    drop(parent);
    CreateOptions::child_of(Path::new(PARENT)).vfs(Arc::new(vfs.clone())).create(Path::new(PATH)).ok()?;
    let disk = open(&vfs)?;
    let block_bytes = u64::from(BLOCK_BYTES);
    disk.write_at(&[0x33; 1024], block_bytes + 512).ok()?;
    disk.discard(block_bytes * 4, block_bytes).ok()?;
    disk.flush().ok()?;
    disk.write_at(&[0x34; 4096], block_bytes * 7).ok()?;
    disk.flush().ok()?;
    if closed {
        disk.close().ok()?;
    }
    drop(disk);
    at_rest(&vfs)
}

/// A child that a crash has caught while it named another place of its parent: the journal holds images of its headers.
fn relinked() -> Vec<Option<CrashState>> {
    let mut states = Vec::new();
    let mut live = || {
        // Random ids of its own: whoever opens the base must not be given its session again.
        let vfs = child(true)?.to_vfs(12);
        let content = vfs.content(Path::new(PARENT))?;
        let moved = Path::new("/moved.vhd");
        let file = vfs.create_new(moved).ok()?;
        file.write_at(&content, 0).ok()?;
        file.sync_data().ok()?;
        vfs.record(true);
        relink(&OpenOptions::new().vfs(Arc::new(vfs.clone())), Path::new(PATH), moved).ok()?;
        let is_dirty = |state: &CrashState| {
            let header = state.to_vfs(1).content(Path::new(PATH));
            header.is_some_and(|bytes| bytes[512..520] == *b"cowdirty")
        };
        let points = vfs.take_crash_points();
        let found = points.iter().rev().filter_map(|point| first_state(point, 1)).filter(is_dirty);
        states.extend(found.take(4).map(Some));
        Some(())
    };
    live();
    states
}

/// Images made elsewhere while they are open for writing, and at the end of that: with a temporary journal. Random ids of its own,
/// as above.
fn elsewhere() -> Vec<Option<CrashState>> {
    let mut states = Vec::new();
    for (_, image) in small_images() {
        let mut live = || {
            let vfs = at_rest(&file_of(&image))?.to_vfs(14);
            let disk = open(&vfs)?;
            disk.write_at(&[0x41; 4096], 0).ok()?;
            disk.write_at(&[0x42; 512], disk.size() - 1024).ok()?;
            disk.flush().ok()?;
            disk.discard(0, 8192).ok()?;
            disk.write_at(&[0x43; 4096], 8192).ok()?;
            disk.flush().ok()?;
            let open = at_rest(&vfs)?;
            let has_journal = open.to_vfs(1).content(Path::new(PATH))?[512..].starts_with(b"cowdirty");
            has_journal.then_some(())?;
            states.push(Some(open));
            vfs.record(true);
            disk.close().ok()?;
            let closing = vfs.take_crash_points();
            states.extend(closing.iter().step_by(2).map(|point| first_state(point, 1)));
            Some(())
        };
        live();
    }
    states
}

/// The state number `number` that a power cut leaves, or the last one.
pub fn first_state(point: &cowvhd::sim::CrashPoint, number: usize) -> Option<CrashState> {
    let mut chosen = None;
    point.for_each_state(5, &Bounds::sample(number), |state| {
        chosen = Some(state);
        true
    });
    chosen
}

/// What is in the file, synced.
pub fn at_rest(vfs: &SimVfs) -> Option<CrashState> {
    vfs.open(Path::new(PATH), Access::ReadWrite).ok()?.sync_data().ok()?;
    first_state(&vfs.crash_now(), 1)
}

/// Small images laid out by hand: a fixed, two dynamic and a differencing disk.
pub fn small_images() -> Vec<(&'static str, Vec<u8>)> {
    let id = UniqueId::from_bytes([7; 16]);
    let fixed = Footer::new(DiskType::Fixed, 4096, id, Timestamp(700_000_000));
    let mut images = vec![("fixed", [&[5; 4096][..], &fixed.to_bytes()].concat())];
    for (name, disk_type, block_size, blocks) in [
        ("dynamic", DiskType::Dynamic, 4096u32, 5u32),
        ("dynamic-sectors", DiskType::Dynamic, 512, 9),
        ("differencing", DiskType::Differencing, 4096, 3),
    ] {
        let size = u64::from(block_size) * u64::from(blocks) - if block_size > 512 { 512 } else { 0 };
        let mut footer = Footer::new(disk_type, size, id, Timestamp(700_000_000));
        footer.data_offset = 512;
        let mut header = DynamicHeader::new(2048, blocks, block_size);
        let mut payload = Vec::new();
        if disk_type == DiskType::Differencing {
            header.parent_unique_id = UniqueId::from_bytes([9; 16]);
            for (unit, letter) in header.parent_name.iter_mut().zip("parent.vhd".encode_utf16()) {
                *unit = letter;
            }
            payload = locator::encode_relative(PlatformCode::W2ru, b"parent.vhd").unwrap_or_default();
            header.locators[0] = ParentLocator::new(PlatformCode::W2ru, 1536, 512, payload.len() as u32);
        }
        let mut image = vec![0; 2048];
        image[..512].copy_from_slice(&footer.to_bytes());
        image[512..1536].copy_from_slice(&header.to_bytes());
        image[1536..][..payload.len()].copy_from_slice(&payload);
        let mut table = vec![0xff; 512];
        let mut data = Vec::new();
        for block in (0..blocks).rev().step_by(2) {
            let sector = (2560 + data.len()) as u32 / 512;
            let _ = bat::set_entry(&mut table, block, sector);
            let mut bitmap = vec![0; bitmap_bytes(block_size) as usize];
            bitmap[0] = 0xff;
            data.extend(bitmap);
            data.extend(vec![block as u8 + 1; block_size as usize]);
        }
        image.extend(table);
        image.extend(data);
        image.extend(footer.to_bytes());
        images.push((name, image));
    }
    images
}

/// A script with every step, for `guest::exercise`.
pub fn script() -> Vec<u8> {
    let mut script = vec![0, 3];
    for kind in [0x10, 0x35, 0x09, 0x07, 0x91, 0x0c, 0x0d, 0x8a, 0x18, 0x15, 0x0e, 0x22, 0x0f] {
        script.extend([kind, 0, 5 + kind / 16, 7]);
        if kind & 15 > 7 {
            script.extend([1, 2]);
        }
    }
    script
}
