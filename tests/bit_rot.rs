//! Metadata that the medium lost, zeroed, flipped or put in the wrong place: it is noticed or repaired, never served as if
//! nothing were wrong. Each page of metadata is damaged in each way, in a closed image and in one that a crash left behind.
//!
//! Not noticed, because nothing in the format tells: the newest entry of a journal, which looks like one that was never
//! finished, and pages of the block table of an image that was not closed, as long as their entries name blocks within the file;
//! those only the checker sees.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use cowvhd::sim::{Bounds, CrashState, Rng, SimVfs};
use cowvhd::vfs::Vfs;
use cowvhd::{CreateOptions, Disk, OpenOptions, ZeroMode};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

const PATH: &str = "/disk.vhd";
const BLOCK_BYTES: u64 = 16 << 10;
/// Long enough for flushes that journal data.
const RING_BYTES: u64 = 512 << 10;
const SIZE: u64 = 12 * BLOCK_BYTES;
const PAGE: usize = 4096;
const RING_OFFSET: usize = 256 << 10;

fn options(vfs: &SimVfs) -> OpenOptions {
    OpenOptions::new().vfs(Arc::new(vfs.clone()))
}

/// An image with some blocks, and its content. Without `close` a crash has left it, everything flushed; what the last flush
/// needed is not the newest entry of its journal.
fn image(seed: u64, close: bool) -> (Vec<u8>, Vec<u8>) {
    let vfs = SimVfs::new(seed);
    let mut rng = Rng::new(seed);
    let path = Path::new(PATH);
    CreateOptions::new(SIZE)
        .test_geometry(BLOCK_BYTES as u32, RING_BYTES)
        .vfs(Arc::new(vfs.clone()))
        .create(path)
        .unwrap();
    let mut content = vec![0; SIZE as usize];
    let disk = options(&vfs).open(path).unwrap();
    for value in 1..40 {
        let first = rng.below(SIZE / 512);
        let count = (1 + rng.below(24)).min(SIZE / 512 - first);
        let range = (first * 512) as usize..((first + count) * 512) as usize;
        content[range.clone()].fill(value);
        disk.write_at(&content[range], first * 512).unwrap();
        if rng.one_in(3) {
            disk.flush().unwrap();
        }
    }
    if close {
        disk.close().unwrap();
    } else {
        disk.flush().unwrap();
        // The newest entry: nothing is missed without it, since the zeros are in place as well.
        let zeros = SIZE - PAGE as u64;
        content[zeros as usize..].fill(0);
        disk.write_at(&content[zeros as usize..], zeros).unwrap();
        disk.flush().unwrap();
        disk.write_zeroes(zeros, PAGE as u64, ZeroMode::MayPunch).unwrap();
        disk.flush().unwrap();
    }
    drop(disk);
    (vfs.content(path).unwrap(), content)
}

/// The pages that hold metadata: in front of the table, the table, each block's page, and the end.
fn metadata(image: &[u8], closed: bool) -> Vec<usize> {
    let table = u64::from_be_bytes(image[512 + 16..512 + 24].try_into().unwrap()) as usize;
    let origin = table + (4 << 20);
    let used = |page: &usize| image[*page..].iter().take(PAGE).any(|&byte| byte != 0);
    let slots = (origin..image.len().saturating_sub(PAGE)).step_by(PAGE + BLOCK_BYTES as usize);
    let front = (0..RING_OFFSET + RING_BYTES as usize).step_by(PAGE).filter(used);
    let table = closed.then_some(table);
    front.chain(table).chain(slots.filter(used)).collect()
}

#[derive(Debug, Clone, Copy)]
enum Rot {
    Zeroed,
    Flipped,
    /// In the first byte of the page's last sector: of a block's page, its bitmap.
    LastSector,
    Misdirected,
    Garbage,
}

fn damage(image: &mut [u8], page: usize, rot: Rot, rng: &mut Rng) {
    let range: Range<usize> = page..(page + PAGE).min(image.len());
    match rot {
        Rot::Zeroed => image[range].fill(0),
        Rot::Flipped => {
            // A byte that means something.
            let used: Vec<usize> = range.filter(|&at| image[at] != 0).collect();
            image[used[rng.below(used.len() as u64) as usize]] ^= 1 << rng.below(8);
        }
        Rot::LastSector => image[(range.end - 512).max(page)] ^= 0x10,
        Rot::Misdirected => {
            let other = image[RING_OFFSET - 2 * PAGE..RING_OFFSET - PAGE].to_vec();
            let other = if rng.one_in(2) { other } else { image[4096..8192].to_vec() };
            let length = range.len();
            image[range].copy_from_slice(&other[..length]);
        }
        Rot::Garbage => range.for_each(|at| image[at] = rng.next_u64() as u8),
    }
}

/// An image at rest on a medium.
fn at_rest(image: &[u8]) -> CrashState {
    let vfs = SimVfs::new(1);
    let file = vfs.create_new(Path::new(PATH)).unwrap();
    file.set_len(image.len() as u64).unwrap();
    assert_eq!(file.write_at(image, 0).unwrap(), image.len());
    file.sync_data().unwrap();
    vfs.sync_dir(Path::new("/")).unwrap();
    let mut state = None;
    vfs.crash_now().for_each_state(0, &Bounds::sample(1), |only| {
        state = Some(only);
        false
    });
    state.unwrap()
}

/// Opens a damaged image: an error, a notice that the sound one does not get, or the right content. `Err` says what was served
/// silently; `Ok` holds the notices.
fn judge(vfs: &SimVfs, content: &[u8], read_only: bool, usual: &[String]) -> Result<Vec<String>, String> {
    let Ok(disk) = options(vfs).read_only(read_only).open(Path::new(PATH)) else { return Ok(Vec::new()) };
    let mut found = vec![0xee; content.len()];
    for (at, block) in found.chunks_mut(BLOCK_BYTES as usize).enumerate() {
        let start = at * BLOCK_BYTES as usize;
        if disk.read_at(block, start as u64).is_ok()
            && *block != content[start..start + block.len()]
            && notices(&disk) == usual
        {
            return Err(format!("block {at} is served wrong"));
        }
    }
    Ok(notices(&disk))
}

/// What an open tells, but for copies that stand in for others: of what they stand in for nothing may be missing.
fn notices(disk: &Disk) -> Vec<String> {
    disk.notices().into_iter().filter(|notice| !notice.ends_with(" counts")).collect()
}

fn rot(close: bool) -> u64 {
    let mut cases = 0;
    for seed in 0..3 {
        let (image, content) = image(seed, close);
        let sound = at_rest(&image);
        let usual = [true, false].map(|read_only| judge(&sound.to_vfs(1), &content, read_only, &[]));
        let mut rng = Rng::new(seed);
        for page in metadata(&image, close) {
            for rot in [Rot::Zeroed, Rot::Flipped, Rot::LastSector, Rot::Misdirected, Rot::Garbage] {
                let mut bad = image.clone();
                damage(&mut bad, page, rot, &mut rng);
                for (read_only, usual) in [true, false].into_iter().zip(&usual) {
                    cases += 1;
                    let vfs = sound.to_vfs(1);
                    vfs.corrupt(Path::new(PATH), page as u64, &bad[page..(page + PAGE).min(bad.len())]);
                    judge(&vfs, &content, read_only, usual.as_ref().unwrap())
                        .unwrap_or_else(|what| panic!("seed {seed}, page {page}, {rot:?}: {what}"));
                }
            }
        }
    }
    cases
}

#[test]
fn of_a_closed_image() {
    println!("{} cases", rot(true));
}

#[test]
fn of_an_image_that_was_not_closed() {
    println!("{} cases", rot(false));
}

/// Whatever a page of the table turned to, a file that was not closed never grows over blocks that no live record made.
#[test]
fn entries_past_the_end_count_only_where_a_record_makes_them() {
    let (image, content) = image(1, false);
    let table = u64::from_be_bytes(image[512 + 16..512 + 24].try_into().unwrap()) as usize;
    let (origin, stride) = (table + (4 << 20), PAGE + BLOCK_BYTES as usize);
    let entries = (SIZE / BLOCK_BYTES) as usize;
    let slot = |index: usize| (((origin + index * stride + PAGE - 512) / 512) as u32).to_be_bytes();
    let (sound, mut refused) = (at_rest(&image), 0);
    for block in 0..entries {
        for read_only in [true, false] {
            let vfs = sound.to_vfs(1);
            vfs.corrupt(Path::new(PATH), (table + 4 * block) as u64, &slot(1000 + block));
            let before = vfs.content_hash(Path::new(PATH));
            match options(&vfs).read_only(read_only).open(Path::new(PATH)) {
                Ok(disk) => {
                    let mut found = vec![0; content.len()];
                    disk.read_at(&mut found, 0).unwrap();
                    assert!(found == content, "block {block}");
                }
                Err(error) => {
                    assert!(error.to_string().contains("past the file's"), "{error}");
                    assert_eq!(vfs.content_hash(Path::new(PATH)), before);
                    refused += 1;
                }
            }
        }
    }
    println!("{refused} of {} refused", 2 * entries);
    assert!(refused > 0);
}
