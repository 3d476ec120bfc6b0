//! Sectors that the medium does not give back: whoever meets them is told where, and what is in them is all that is lost.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use cowvhd::check::{Code, Consent, Finding, Report, Verified, check, check_chain, repair, salvage, verify};
use cowvhd::sim::SimVfs;
use cowvhd::snapshot::SnapshotName;
use cowvhd::vfs::Vfs;
use cowvhd::vhd::{DiskType, DynamicHeader, Footer, Timestamp, UniqueId};
use cowvhd::{CreateOptions, ErrorKind, OpenOptions};
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::Arc;

const DISK: &str = "/vm.vhd";
const SNAPSHOT: &str = "/vm@s1.vhd";
const BLOCK: u64 = 16 << 10;
const SIZE: u64 = 8 * BLOCK;
const PAGE: u64 = 4096;
const TABLE: u64 = 1 << 20;
const UNIT: Range<u64> = BLOCK + PAGE..BLOCK + 2 * PAGE;

fn options(vfs: &SimVfs) -> OpenOptions {
    OpenOptions::new().vfs(Arc::new(vfs.clone()))
}

/// A closed disk whose first four blocks are full.
fn disk() -> (SimVfs, Vec<u8>) {
    let vfs = SimVfs::new(1);
    let create = CreateOptions::new(SIZE).test_geometry(BLOCK as u32, 128 << 10);
    create.vfs(Arc::new(vfs.clone())).create(Path::new(DISK)).unwrap();
    let mut content: Vec<u8> = (0..SIZE).map(|at| (at / 512 + at % 251) as u8 | 1).collect();
    content[4 * BLOCK as usize..].fill(0);
    let disk = options(&vfs).open(Path::new(DISK)).unwrap();
    disk.write_at(&content[..4 * BLOCK as usize], 0).unwrap();
    disk.close().unwrap();
    (vfs, content)
}

/// Where in the image's own file a byte of the disk is.
fn place_of(vfs: &SimVfs, path: &str, offset: u64) -> u64 {
    let disk = options(vfs).read_only(true).open(Path::new(path)).unwrap();
    disk.map(offset, 512).unwrap()[0].file_offset.unwrap()
}

/// Makes a range of the file unreadable.
fn lose(vfs: &SimVfs, path: &str, at: u64, length: u64) {
    vfs.set_unreadable(Path::new(path), std::slice::from_ref(&(at..at + length)));
}

fn the_finding(report: &Report, code: Code) -> Finding {
    let found: Vec<_> = report.findings().iter().filter(|finding| finding.code == code).cloned().collect();
    assert_eq!(found.len(), 1, "{:?}", report.findings());
    found[0].clone()
}

fn read(vfs: &SimVfs, path: &str) -> Vec<u8> {
    let disk = options(vfs).read_only(true).open(Path::new(path)).unwrap();
    let mut content = vec![0xee; disk.size() as usize];
    disk.read_at(&mut content, 0).unwrap();
    content
}

#[test]
fn data_that_cannot_be_read_costs_itself_alone() {
    let (vfs, content) = disk();
    let at = place_of(&vfs, DISK, UNIT.start);
    lose(&vfs, DISK, at, PAGE);
    let disk = options(&vfs).read_only(true).open(Path::new(DISK)).unwrap();
    let mut found = vec![0; SIZE as usize];
    let error = disk.read_at(&mut found, 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains(DISK), "{error}");
    for good in [0..UNIT.start, UNIT.end..SIZE] {
        let range = good.start as usize..good.end as usize;
        disk.read_at(&mut found[range.clone()], good.start).unwrap();
        assert!(found[range.clone()] == content[range]);
    }
    drop(disk);
    let saved = salvage(Arc::new(vfs.clone()), Path::new(DISK), Path::new("/saved.vhd")).unwrap();
    assert_eq!(saved.lost, [UNIT]);
    let mut expected = content;
    expected[UNIT.start as usize..UNIT.end as usize].fill(0);
    assert!(read(&vfs, "/saved.vhd") == expected);
}

#[test]
fn a_block_page_that_cannot_be_read_is_named() {
    let (vfs, content) = disk();
    let before = vfs.content_hash(Path::new(DISK));
    let page = place_of(&vfs, DISK, 2 * BLOCK) - PAGE;
    lose(&vfs, DISK, page, PAGE);
    let report = check(Arc::new(vfs.clone()), Path::new(DISK)).unwrap();
    let found = the_finding(&report, Code::Unreadable);
    assert_eq!((found.structure, found.offset, found.block), ("block page", Some(page), Some(2)));
    assert!(found.what.starts_with("block 2: Input/output error"), "{}", found.what);
    assert!(!report.is_sound());
    // What cannot be saved first is not replaced.
    let error = repair(Arc::new(vfs.clone()), Path::new(DISK), Consent::All, Path::new("/undo")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    let disk = options(&vfs).read_only(true).open(Path::new(DISK)).unwrap();
    let error = disk.read_at(&mut [0; 512], 2 * BLOCK).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    drop(disk);
    assert_eq!(vfs.content_hash(Path::new(DISK)), before);
    vfs.set_unreadable(Path::new(DISK), &[]);
    assert!(check(Arc::new(vfs.clone()), Path::new(DISK)).unwrap().is_sound());
    assert!(read(&vfs, DISK) == content);
}

/// An image of another program: one block, at an offset in the file.
fn foreign(at: u64) -> SimVfs {
    let vfs = SimVfs::new(2);
    let mut footer =
        Footer::new(DiskType::Dynamic, BLOCK, UniqueId::from_bytes([7; 16]), Timestamp(700_000_000));
    footer.creator_app = *b"test";
    let mut table = [0xff; 512];
    table[..4].copy_from_slice(&(at as u32 / 512).to_be_bytes());
    let front =
        [&footer.to_bytes()[..], &DynamicHeader::new(1536, 1, BLOCK as u32).to_bytes(), &table].concat();
    let mut image = vec![0xff; (at + 512 + BLOCK) as usize];
    image[..at as usize].fill(0);
    image[..front.len()].copy_from_slice(&front);
    image.extend(footer.to_bytes());
    let file = vfs.create_new(Path::new(DISK)).unwrap();
    assert_eq!(file.write_at(&image, 0).unwrap(), image.len());
    vfs
}

/// Other programs keep no page, but a bitmap.
#[test]
fn a_bitmap_that_cannot_be_read_is_named() {
    const AT: u64 = 32768;
    let vfs = foreign(AT);
    let sound = check(Arc::new(vfs.clone()), Path::new(DISK)).unwrap();
    assert!(sound.is_sound(), "{:?}", sound.findings());
    lose(&vfs, DISK, AT, 512);
    let report = check(Arc::new(vfs.clone()), Path::new(DISK)).unwrap();
    let found = the_finding(&report, Code::Unreadable);
    assert_eq!((found.structure, found.offset, found.block), ("bitmap", Some(AT), Some(0)));
}

fn verified(vfs: &SimVfs, seal: bool) -> Verified {
    verify(&options(vfs), Path::new(DISK), seal, &mut |_, _| ControlFlow::Continue(())).unwrap()
}

/// Of a sealed layer: what cannot be read is damaged data, and data that has no CRC as long as it cannot be read.
#[test]
fn sealed_data_that_cannot_be_read_is_damage() {
    let (vfs, _) = disk();
    let disk = options(&vfs).open(Path::new(DISK)).unwrap();
    disk.snapshot(&SnapshotName::new("s1").unwrap()).unwrap();
    disk.close().unwrap();
    drop(disk);
    let at = place_of(&vfs, SNAPSHOT, UNIT.start);
    lose(&vfs, SNAPSHOT, at, PAGE);
    let without = verified(&vfs, true);
    assert_eq!(without.coverage()[1].written_pages, 0, "half a page of CRCs proves nothing");
    assert!(without.coverage()[1].unproven_bytes >= 4 * BLOCK - PAGE, "{:?}", without.coverage());

    vfs.set_unreadable(Path::new(SNAPSHOT), &[]);
    let good = verified(&vfs, true).coverage()[1];
    assert_eq!((good.written_pages, good.compared_bytes, good.unproven_bytes), (1, 4 * BLOCK, 0));
    lose(&vfs, SNAPSHOT, at, PAGE);
    let damaged = verified(&vfs, false);
    assert_eq!(damaged.chain().codes().get(&Code::DataDamaged), Some(&1), "{:?}", damaged.chain().codes());
    let found = the_finding(&damaged.chain().layers()[1], Code::DataDamaged);
    assert_eq!((found.block, found.offset, found.guest), (Some(1), Some(at), Some(UNIT)));
    assert_eq!(found.what, "4096 bytes at offset 20480 of the disk cannot be read; no parent has them");
    assert_eq!(damaged.coverage()[1].compared_bytes, 4 * BLOCK, "all others were compared");

    // The CRCs themselves: behind the last block, in front of the footer.
    let length = vfs.content(Path::new(SNAPSHOT)).unwrap().len() as u64;
    let crcs = (length - 512) / PAGE * PAGE - PAGE;
    lose(&vfs, SNAPSHOT, crcs, PAGE);
    let lost = verified(&vfs, false);
    let found = the_finding(&lost.chain().layers()[1], Code::CrcsDamaged);
    assert_eq!(found.offset, Some(crcs));
    assert!(found.what.contains("Input/output error"), "{}", found.what);
    assert_eq!(lost.coverage()[1].unproven_bytes, 4 * BLOCK);
}

/// What describes the disk is there twice, or told by what it describes.
#[test]
fn a_disk_is_saved_whichever_page_of_its_metadata_cannot_be_read() {
    let (vfs, content) = disk();
    let first = place_of(&vfs, DISK, 0);
    let file = vfs.content(Path::new(DISK)).unwrap();
    let end = file.len() as u64;
    let mut pages = vec![0, 4096, 8192, 12288];
    pages.extend((16384..first - PAGE).step_by(PAGE as usize).filter(|at| at % (64 * PAGE) == 0));
    assert!(pages.contains(&TABLE));
    pages.extend([first - PAGE, end / PAGE * PAGE]);
    for at in pages {
        lose(&vfs, DISK, at, PAGE);
        let out = format!("/saved-{at}.vhd");
        let saved = salvage(Arc::new(vfs.clone()), Path::new(DISK), Path::new(&out));
        let saved = saved.unwrap_or_else(|error| panic!("{at}: {error}"));
        assert!(
            saved.lost.is_empty() && read(&vfs, &out) == content,
            "{at}: {:?} {:?}",
            saved.steps,
            saved.lost
        );
        if file[at as usize..].iter().take(PAGE as usize).any(|&byte| byte != 0) {
            let found = the_finding(&saved.before, Code::Unreadable);
            assert_eq!((found.offset, found.structure == "block page"), (Some(at), at == first - PAGE));
        }
    }
    // All at once, but for the superblock that vouches for the backup.
    let all = [0..4096, 8192..12288, TABLE..first - PAGE];
    vfs.set_unreadable(Path::new(DISK), &all);
    let saved = salvage(Arc::new(vfs.clone()), Path::new(DISK), Path::new("/saved.vhd")).unwrap();
    assert!(saved.lost.is_empty() && read(&vfs, "/saved.vhd") == content, "{:?}", saved.steps);
}

/// The same for a check: it says which page that is, and goes on with the copy. Nothing else opens the disk, nor repairs it in place.
#[test]
fn metadata_that_cannot_be_read_is_named_and_the_check_goes_on() {
    let (vfs, _) = disk();
    let end = vfs.content(Path::new(DISK)).unwrap().len() as u64;
    let before = vfs.content_hash(Path::new(DISK));
    let cases = [
        (0, "start of the file", Code::FrontDamaged),
        (4096, "superblock", Code::SuperblockDamaged),
        (8192, "superblock", Code::SuperblockDamaged),
        (12288, "header backup", Code::BackupDamaged),
        (TABLE, "block table", Code::BatDamaged),
        (end / PAGE * PAGE, "end of the file", Code::FooterDamaged),
    ];
    for (at, structure, also) in cases {
        lose(&vfs, DISK, at, PAGE);
        let report =
            check(Arc::new(vfs.clone()), Path::new(DISK)).unwrap_or_else(|error| panic!("{at}: {error}"));
        let found = the_finding(&report, Code::Unreadable);
        assert_eq!((found.structure, found.offset), (structure, Some(at)));
        assert_eq!(report.count(also), 1, "{at}: {:?}", report.findings());
        assert!(!report.is_sound());
        let chain = check_chain(&options(&vfs), Path::new(DISK)).unwrap();
        assert_eq!(chain.codes().get(&Code::Unreadable), Some(&1), "{at}: {:?}", chain.codes());
        let error =
            repair(Arc::new(vfs.clone()), Path::new(DISK), Consent::All, Path::new("/undo")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io, "{at}: {error}");
        assert!(!vfs.paths().contains(&"/undo".into()), "{at}");
        assert_eq!(vfs.content_hash(Path::new(DISK)), before, "{at}");
    }
    // Without anything that tells what the file is there is nothing to judge.
    vfs.set_unreadable(Path::new(DISK), std::slice::from_ref(&(0..end)));
    assert_eq!(check(Arc::new(vfs.clone()), Path::new(DISK)).unwrap_err().kind(), ErrorKind::Io);
    vfs.set_unreadable(Path::new(DISK), &[]);
    assert!(check(Arc::new(vfs.clone()), Path::new(DISK)).unwrap().is_sound());
}

/// Other programs have blocks where we have superblocks, and the footer in one page with data: of such pages the data is lost, or, with its
/// bitmap, the block.
#[test]
fn data_beside_metadata_is_told_to_be_lost() {
    const AT: u64 = 8192;
    let vfs = foreign(AT);
    let end = vfs.content(Path::new(DISK)).unwrap().len() as u64;
    let data = AT + 512;
    let cases = [
        (8192, Some("block or locator"), 0..BLOCK),
        (12288, Some("block or locator"), 12288 - data..16384 - data),
        // Where no metadata can be nothing is left out, and the units of the disk are lost that it has a part of.
        (16384, None, 4096..12288),
        (end / PAGE * PAGE, Some("end of the file"), end / PAGE * PAGE - data..BLOCK),
    ];
    for (at, structure, lost) in cases {
        lose(&vfs, DISK, at, PAGE);
        let out = format!("/saved-{at}.vhd");
        let saved = salvage(Arc::new(vfs.clone()), Path::new(DISK), Path::new(&out)).unwrap();
        assert_eq!(saved.lost, std::slice::from_ref(&lost), "{at}");
        let mut expected = vec![0xff; BLOCK as usize];
        expected[lost.start as usize..lost.end as usize].fill(0);
        assert!(read(&vfs, &out) == expected, "{at}");
        if let Some(structure) = structure {
            assert_eq!(the_finding(&saved.before, Code::Unreadable).structure, structure, "{at}");
        }
    }
}

/// A page of the journal that was to be replayed: nothing has a copy of it.
#[test]
fn a_journal_that_cannot_be_read_is_told_to_be_lost() {
    let (vfs, content) = disk();
    let disk = options(&vfs).open(Path::new(DISK)).unwrap();
    disk.write_at(&[0xaa; 512], 6 * BLOCK).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let file = vfs.content(Path::new(DISK)).unwrap();
    // FORMAT.md, "Superblocks".
    let ring = u64::from_be_bytes(file[4096 + 80..4096 + 88].try_into().unwrap());
    lose(&vfs, DISK, ring, PAGE);
    let report = check(Arc::new(vfs.clone()), Path::new(DISK)).unwrap();
    let found = the_finding(&report, Code::Unreadable);
    assert_eq!((found.structure, found.offset), ("journal ring", Some(ring)));
    assert_eq!(options(&vfs).open(Path::new(DISK)).unwrap_err().kind(), ErrorKind::Io);
    let saved = salvage(Arc::new(vfs.clone()), Path::new(DISK), Path::new("/saved.vhd")).unwrap();
    assert!(saved.journal_lost && saved.lost.is_empty());
    assert_eq!(saved.before.count(Code::Unreadable), 1);
    assert!(read(&vfs, "/saved.vhd") == content, "what was in place is there");
    // Of a closed image no journal counts.
    vfs.set_unreadable(Path::new(DISK), &[]);
    options(&vfs).open(Path::new(DISK)).unwrap().close().unwrap();
    lose(&vfs, DISK, ring, PAGE);
    let saved = salvage(Arc::new(vfs.clone()), Path::new(DISK), Path::new("/again.vhd")).unwrap();
    assert!(!saved.journal_lost && read(&vfs, "/again.vhd")[6 * BLOCK as usize..][..512] == [0xaa; 512]);
}

/// A parent is found and checked, too.
#[test]
fn a_parent_whose_superblock_cannot_be_read_is_checked() {
    let (vfs, _) = disk();
    let disk = options(&vfs).open(Path::new(DISK)).unwrap();
    disk.snapshot(&SnapshotName::new("s1").unwrap()).unwrap();
    disk.close().unwrap();
    drop(disk);
    for (at, structure) in [(0, "start of the file"), (4096, "superblock"), (65536, "private area")] {
        lose(&vfs, SNAPSHOT, at, PAGE);
        let chain = check_chain(&options(&vfs), Path::new(DISK)).unwrap();
        assert_eq!(chain.layers().len(), 2, "{:?}", chain.codes());
        let found = the_finding(&chain.layers()[1], Code::Unreadable);
        assert_eq!((found.offset, found.structure), (Some(at), structure));
        assert!(chain.layers()[0].is_sound(), "{:?}", chain.layers()[0].findings());
    }
}

/// A parent that cannot be read is not passed over for a file of the same disk elsewhere, which may be an old copy.
#[test]
fn a_parent_that_cannot_be_read_is_not_replaced_by_another_file() {
    let (vfs, _) = disk();
    let [parent, copy, child] = ["/base/vm.vhd", "/child/vm.vhd", "/child/top.vhd"].map(Path::new);
    let vhd = vfs.content(Path::new(DISK)).unwrap();
    for path in [parent, copy] {
        let file = vfs.create_new(path).unwrap();
        assert_eq!(file.write_at(&vhd, 0).unwrap(), vhd.len());
    }
    let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
    let create = CreateOptions::child_of(parent).test_geometry(BLOCK as u32, 128 << 10).vfs(shared);
    create.create(child).unwrap();
    let options = options(&vfs).allow_parents_in(Path::new("/base")).read_only(true);
    options.open(child).unwrap();
    lose(&vfs, "/base/vm.vhd", 4096, PAGE);
    let error = options.open(child).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    assert!(error.to_string().starts_with("/base/vm.vhd: reading the superblock at offset 4096"), "{error}");
    // What is not there is another thing: then it was moved.
    vfs.remove(parent).unwrap();
    let error = options.open(child).unwrap_err();
    assert!(error.to_string().contains("/child/vm.vhd"), "{error}");
}

/// Each place by itself, wherever in the disk it is.
#[test]
fn what_a_salvage_loses_is_listed_by_its_place() {
    const MIB: u64 = 1 << 20;
    let vfs = SimVfs::new(3);
    CreateOptions::new(5 * MIB)
        .test_geometry(MIB as u32, 128 << 10)
        .vfs(Arc::new(vfs.clone()))
        .create(Path::new(DISK))
        .unwrap();
    let mut expected: Vec<u8> = (0..5 * MIB).map(|at| (at / 512 + at % 251) as u8 | 1).collect();
    let disk = options(&vfs).open(Path::new(DISK)).unwrap();
    disk.write_at(&expected, 0).unwrap();
    disk.close().unwrap();
    drop(disk);
    let lost = [PAGE..2 * PAGE, 3 * MIB + PAGE..3 * MIB + 2 * PAGE, 3 * MIB + 4 * PAGE..3 * MIB + 6 * PAGE];
    let places: Vec<Range<u64>> = lost
        .iter()
        .map(|range| place_of(&vfs, DISK, range.start))
        .zip(&lost)
        .map(|(at, range)| at..at + range.end - range.start)
        .collect();
    vfs.set_unreadable(Path::new(DISK), &places);
    let saved = salvage(Arc::new(vfs.clone()), Path::new(DISK), Path::new("/saved.vhd")).unwrap();
    assert_eq!(saved.lost, lost);
    lost.iter().for_each(|range| expected[range.start as usize..range.end as usize].fill(0));
    assert!(read(&vfs, "/saved.vhd") == expected);
}
