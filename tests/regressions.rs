//! What the fuzz targets do, on their seeds, on variants of them, and on what has ever broken something, by name.
//!
//! The bodies are those of `fuzz/src`, so that a finding of a fuzzer can be repeated as it is, with the input's bytes; those that
//! were understood stand here as what they are about.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "a part of each target is for the fuzzer alone")]

#[path = "../fuzz/src/bases.rs"]
mod bases;
#[path = "../fuzz/src/differential.rs"]
mod differential;
#[path = "../fuzz/src/folders.rs"]
mod folders;
#[path = "../fuzz/src/guest.rs"]
mod guest;
#[path = "../fuzz/src/image_bytes.rs"]
mod image_bytes;
#[path = "../fuzz/src/image_mutations.rs"]
mod image_mutations;
#[path = "../fuzz/src/input.rs"]
mod input;
#[path = "../fuzz/src/mutation.rs"]
mod mutation;
#[path = "../fuzz/src/operations.rs"]
mod operations;
#[path = "../fuzz/src/parent_paths.rs"]
mod parent_paths;
#[path = "support/strict_vhd.rs"]
mod strict_vhd;
#[path = "../fuzz/src/vhd_structures.rs"]
mod vhd_structures;

use cowvhd::check::{Code, Consent, check, repair};
use cowvhd::sim::{Rng, SimVfs};
use cowvhd::vfs::{Access, Vfs};
use cowvhd::vhd::{DynamicHeader, HeaderCookie};
use cowvhd::{CreateOptions, ErrorKind, OpenOptions};
use std::path::Path;
use std::sync::Arc;

/// An input to start from: a name, and its bytes.
type Seed = (&'static str, Vec<u8>);

/// Says which input it was, as bytes for a test of its own.
struct OnPanic<'a>(&'a [u8]);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the input: {:?}", self.0);
        }
    }
}

/// Runs each seed, and seeded variants of it with some bytes changed.
fn replay(seeds: &[Seed], variants: u64, body: fn(&[u8])) {
    let mut random = 1u64;
    let mut below = |end: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % end
    };
    let body = |input: &[u8]| {
        let _told = OnPanic(input);
        body(input);
    };
    for (_, seed) in seeds {
        body(seed);
        for _ in 0..if seed.is_empty() { 0 } else { variants } {
            let mut changed = seed.clone();
            for _ in 0..1 + below(3) {
                let at = below(changed.len() as u64) as usize;
                changed[at] = [0, 1, 0xff, below(256) as u8][below(4) as usize];
            }
            body(&changed);
        }
    }
}

#[test]
fn seeds_of_image_bytes() {
    replay(&image_bytes::seeds(), 2000, image_bytes::run);
}

#[test]
fn seeds_of_image_mutations() {
    assert!(bases::all().len() >= 12, "some bases could not be made");
    replay(&image_mutations::seeds(), 8, image_mutations::run);
}

#[test]
fn seeds_of_folders() {
    replay(&folders::seeds(), 1, folders::run);
}

#[test]
fn seeds_of_operations() {
    replay(&operations::seeds(), 500, operations::run);
}

#[test]
fn seeds_of_parent_paths() {
    replay(&parent_paths::seeds(), 500, parent_paths::run);
}

#[test]
fn seeds_of_differential() {
    replay(&differential::seeds(), 500, differential::run);
}

const PATH: &str = "/disk.vhd";
const BLOCK_BYTES: u32 = 16 << 10;
const TABLE_OFFSET: u64 = 1 << 20;

/// A closed image with data in its first blocks.
fn closed_image() -> SimVfs {
    let vfs = SimVfs::new(1);
    let options = CreateOptions::new(8 * u64::from(BLOCK_BYTES)).test_geometry(BLOCK_BYTES, 128 << 10);
    options.vfs(Arc::new(vfs.clone())).create(Path::new(PATH)).unwrap();
    let disk = options_of(&vfs).open(Path::new(PATH)).unwrap();
    disk.write_at(&[7; 3 * BLOCK_BYTES as usize], 0).unwrap();
    disk.close().unwrap();
    vfs
}

fn options_of(vfs: &SimVfs) -> OpenOptions {
    OpenOptions::new().vfs(Arc::new(vfs.clone()))
}

/// The start of the file was written again from its backup before the table was looked at.
#[test]
fn a_recovery_that_is_refused_has_changed_nothing() {
    let vfs = closed_image();
    vfs.corrupt(Path::new(PATH), 0, &[0xaa; 4096]);
    vfs.corrupt(Path::new(PATH), TABLE_OFFSET, &[0; 4]);
    let before = vfs.content_hash(Path::new(PATH));
    let error = options_of(&vfs).open(Path::new(PATH)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert_eq!(vfs.content_hash(Path::new(PATH)), before);
}

/// With the start lost as well, a file that had been cut was extended with zeros over its last blocks.
#[test]
fn a_file_that_was_cut_is_refused_and_not_extended() {
    let vfs = closed_image();
    vfs.corrupt(Path::new(PATH), 0, &[0xaa; 4096]);
    let file = vfs.open(Path::new(PATH), Access::ReadWrite).unwrap();
    file.set_len(file.length().unwrap() - 2 * u64::from(BLOCK_BYTES)).unwrap();
    file.sync_data().unwrap();
    for read_only in [true, false] {
        let error = options_of(&vfs).read_only(read_only).open(Path::new(PATH)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains("past the file's"), "{error}");
    }
}

/// The checker took a file for sound whose close was cut behind its superblock, and that had been cut short since.
#[test]
fn the_checker_sees_that_a_half_closed_file_was_cut() {
    let vfs = closed_image();
    let file = vfs.open(Path::new(PATH), Access::ReadWrite).unwrap();
    let mut bytes = [0; DynamicHeader::SIZE];
    file.read_at(&mut bytes, 512).unwrap();
    let header = DynamicHeader { cookie: HeaderCookie::Dirty, ..DynamicHeader::parse(&bytes).unwrap() };
    vfs.corrupt(Path::new(PATH), 512, &header.to_bytes());
    let report = || check(Arc::new(vfs.clone()), Path::new(PATH)).unwrap();
    assert!(report().is_sound(), "{:?}", report().findings());
    file.set_len(file.length().unwrap() - 2 * u64::from(BLOCK_BYTES)).unwrap();
    file.sync_data().unwrap();
    assert!(report().count(Code::BatRange) > 0, "{:?}", report().findings());
}

/// Counters that had no room left to count in: the next superblock had the sequence of the one before, and the next
/// allocation the number 0.
#[test]
fn counters_that_cannot_be_counted_on_are_damage() {
    // A superblock of the highest sequence, with a right CRC, and a guest.
    let input = [0x02, 0xeb, 0x07, 0x33, 0x00, 0x08, 0x00, 0x05, 0x07, 0x91, 0x00];
    image_mutations::run(&input);
    for field in [8, 128] {
        for places in [&[4096_u64][..], &[8192], &[4096, 8192]] {
            let vfs = closed_image();
            for &at in places {
                let mut page = vfs.content(Path::new(PATH)).unwrap()[at as usize..][..4096].to_vec();
                page[field..field + 8].fill(0xff);
                let crc = crc32fast::hash(&page[..4092]);
                page[4092..].copy_from_slice(&crc.to_be_bytes());
                vfs.corrupt(Path::new(PATH), at, &page);
            }
            let report = check(Arc::new(vfs.clone()), Path::new(PATH)).unwrap();
            let code = if places.len() == 2 { Code::SuperblocksLost } else { Code::SuperblockDamaged };
            assert!(report.count(code) > 0, "{:?}", report.findings());
            let disk = options_of(&vfs).open(Path::new(PATH));
            if let Ok(disk) = disk {
                disk.write_at(&[9; 4096], 5 * u64::from(BLOCK_BYTES)).unwrap();
                disk.close().unwrap();
                drop(disk);
                let report = check(Arc::new(vfs.clone()), Path::new(PATH)).unwrap();
                assert_eq!(report.count(Code::SuperblockSequence), 0, "{:?}", report.findings());
            } else {
                assert_eq!(places.len(), 2);
            }
        }
    }
}

/// What is left of the highest numbers is not given out: a disk that has no more gets no more blocks, and keeps those it has.
#[test]
fn a_disk_without_allocation_numbers_gets_no_new_blocks() {
    let vfs = closed_image();
    for at in [4096, 8192] {
        let mut page = vfs.content(Path::new(PATH)).unwrap()[at as usize..][..4096].to_vec();
        page[128..136].copy_from_slice(&(u64::MAX >> 1).to_be_bytes());
        let crc = crc32fast::hash(&page[..4092]);
        page[4092..].copy_from_slice(&crc.to_be_bytes());
        vfs.corrupt(Path::new(PATH), at, &page);
    }
    for _ in 0..3 {
        let disk = options_of(&vfs).open(Path::new(PATH)).unwrap();
        disk.write_at(&[8; 4096], 0).unwrap();
        let error = disk.write_at(&[9; 4096], 5 * u64::from(BLOCK_BYTES)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        disk.flush().unwrap();
    }
    let disk = options_of(&vfs).read_only(true).open(Path::new(PATH)).unwrap();
    let mut buf = [0; 4096];
    disk.read_at(&mut buf, 0).unwrap();
    assert_eq!(buf, [8; 4096]);
}

/// The journal of a relinked child holds its headers; what fuzzing changes in them has to be found there.
#[test]
fn images_of_headers_are_among_the_bases() {
    let with_headers = bases::all().iter().filter(|base| {
        let bytes = base.to_vfs(1).content(Path::new(guest::PATH)).unwrap();
        let pages = bytes.chunks(4096).enumerate().filter(|(at, _)| (64..96).contains(at));
        let mut ring: Vec<u8> = Vec::new();
        pages.for_each(|(_, page)| ring.extend(page));
        // A record's head, then the image of the start of the file.
        ring.windows(40).any(|bytes| bytes[..4] == [0, 6, 0, 0] && bytes[32..] == *b"conectix")
    });
    assert!(with_headers.count() >= 1);
}

/// A repair cleared entries in the table of a file that was cut in half, and the journal's image of that table brought them back: it
/// was never done.
#[test]
fn a_repair_of_what_the_journal_says_lasts() {
    let bases = bases::all();
    let live = bases.iter().map(|base| base.to_vfs(1)).filter(|vfs| {
        let start = vfs.content(Path::new(PATH)).unwrap();
        start.get(512..520) == Some(b"cowdirty") && vfs.content(Path::new(guest::PARENT)).is_none()
    });
    let mut repaired = 0;
    for vfs in live {
        let file = vfs.open(Path::new(PATH), Access::ReadWrite).unwrap();
        file.set_len(file.length().unwrap() / 2).unwrap();
        file.sync_data().unwrap();
        drop(file);
        let run = |undo| repair(Arc::new(vfs.clone()), Path::new(PATH), Consent::All, Path::new(undo));
        let Ok(first) = run("/first") else { continue };
        let second = run("/second").unwrap();
        assert!(!second.changes(), "{:?}, then {:?}", first.steps, second.steps);
        repaired += u32::from(first.changes() && first.is_sound());
    }
    assert!(repaired > 3, "{repaired}");
}

/// What a disk shows, if it opens.
fn shown(vfs: &SimVfs) -> Option<Vec<u8>> {
    let disk = options_of(vfs).read_only(true).open(Path::new(PATH)).ok()?;
    let mut content = vec![0xee; disk.size() as usize];
    disk.read_at(&mut content, 0).unwrap();
    Some(content)
}

/// Whether all but so many blocks are what they were, and what is missing of those is zeros, unless a parent shows through.
fn kept(before: &[u8], now: &[u8], lost: u64, zeros: bool) -> bool {
    let blocks = before.chunks(BLOCK_BYTES as usize).zip(now.chunks(BLOCK_BYTES as usize));
    let different: Vec<_> = blocks.filter(|(before, now)| before != now).collect();
    let cut = |(before, now): &(&[u8], &[u8])| {
        before.iter().zip(*now).all(|(before, now)| before == now || *now == 0)
    };
    different.len() as u64 <= lost && (!zeros || different.iter().all(cut))
}

/// An image that was left open and then cut: what was there is repaired in one go, or nothing is touched; a check after it finds nothing
/// that the repair did not speak of.
#[test]
fn a_repair_of_an_open_image_that_was_cut_leaves_nothing_behind() {
    let stride = u64::from(BLOCK_BYTES) + 4096;
    let (mut sound, mut left) = (0, 0);
    for (number, base) in bases::all().iter().enumerate() {
        let length = base.to_vfs(1).content(Path::new(PATH)).unwrap().len() as u64;
        let cuts =
            (1..=6).flat_map(|blocks| [-4096, -512, 0, 1, 512].map(|more| (blocks * stride) as i64 + more));
        for cut in [1, 511, 512, 4096].into_iter().chain(cuts) {
            let Some(shorter) = length.checked_sub(cut as u64) else { continue };
            let vfs = base.to_vfs(1);
            let file = vfs.open(Path::new(PATH), Access::ReadWrite).unwrap();
            file.set_len(shorter).unwrap();
            file.sync_data().unwrap();
            drop(file);
            let (before, shown) = (vfs.content_hash(Path::new(PATH)), shown(&base.to_vfs(1)));
            let at = format!("base {number} of {length} bytes, cut by {cut}");
            let shared = || Arc::new(vfs.clone());
            let run = |undo| repair(shared(), Path::new(PATH), Consent::All, Path::new(undo));
            let Ok(first) = run("/first") else {
                assert_eq!(vfs.content_hash(Path::new(PATH)), before, "{at}: changed, and refused");
                continue;
            };
            let report = check(shared(), Path::new(PATH)).unwrap();
            if first.is_sound() {
                assert!(report.is_sound(), "{at}: {:?} leaves {:?}", first.steps, report.findings());
                sound += 1;
                let left = shown.zip(self::shown(&vfs));
                let zeros = vfs.content(Path::new(guest::PARENT)).is_none();
                let lost = cut as u64 / stride + 2;
                assert!(left.is_none_or(|(before, now)| kept(&before, &now, lost, zeros)), "{at}");
            } else {
                // Of a fixed disk the footer is gone, of one made elsewhere the journal that stood at the end.
                let gone = report.count(Code::HeadersLost) + report.count(Code::JournalLost);
                assert!(gone > 0, "{at}: {:?} leaves {:?}", first.steps, report.findings());
                left += 1;
            }
            let second = run("/second").unwrap();
            assert!(!second.changes(), "{at}: {:?}, then {:?}", first.steps, second.steps);
        }
    }
    println!("{sound} repaired, {left} not");
    assert!(sound > 100, "{sound}");
}

/// Superblocks of a temporary journal that claimed a seal: the first open finished that seal, and said that the image was sealed; the next
/// one opened it.
#[test]
fn a_temporary_journal_carries_no_seal() {
    let (_, image) = &bases::small_images()[1];
    let vfs = guest::file_of(image).crash_now().pick(&mut Rng::new(1)).unwrap().to_vfs(2);
    let disk = options_of(&vfs).open(Path::new(PATH)).unwrap();
    disk.write_at(&[9; 4096], 0).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let head = u64::from_be_bytes(vfs.content(Path::new(PATH)).unwrap()[520..528].try_into().unwrap());
    for at in [head + 4096, head + 8192] {
        let mut page = vfs.content(Path::new(PATH)).unwrap()[at as usize..][..4096].to_vec();
        page[176..192].fill(1);
        let crc = crc32fast::hash(&page[..4092]);
        page[4092..].copy_from_slice(&crc.to_be_bytes());
        vfs.corrupt(Path::new(PATH), at, &page);
    }
    let before = vfs.content_hash(Path::new(PATH));
    for _ in 0..2 {
        let error = options_of(&vfs).open(Path::new(PATH)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert_eq!(vfs.content_hash(Path::new(PATH)), before);
    }
}

/// How much unused space is given back is what the medium says, and no two say the same of zeros that were written.
#[test]
fn zeros_that_were_written_are_a_hole_or_not() {
    image_mutations::run(b"_{e/\x80!/s~\xdf\x00II\xb6\xb6\xb6I");
}
