//! One damaged page of a sealed layer: each page of its metadata in turn, with its locators, its registry of children, its seal and
//! its CRCs. After a repair every disk over it shows what it did, it is sealed as it was, and undoing restores the damaged bytes.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/damage.rs"]
mod damage;

use cowvhd::check::{Code, Consent, check, check_chain, repair, undo, verify};
use cowvhd::snapshot::{Checkpoint, SnapshotName};
use cowvhd::vfs::HostVfs;
use cowvhd::{CreateOptions, Disk, OpenOptions};
use damage::{DAMAGES, MIB, PAGE, SLOTS, STRIDE, TABLE};
use std::collections::BTreeSet;
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const SIZE: u64 = 16 * MIB;
const DISKS: [&str; 4] = ["vm.vhd", "clone.vhd", "vm@second.vhd", "vm@first.vhd"];
const REGISTRY: [u64; 2] = [65536, 163_840];

struct Bench {
    dir: tempfile::TempDir,
    content: Vec<Vec<u8>>,
}

impl Bench {
    /// A disk over two snapshots, of which the first one has a clone, too; both have their CRCs.
    fn new() -> Self {
        let dir = damage::folder();
        let path = |name: &str| dir.path().join(name);
        CreateOptions::new(SIZE).create(&path("vm.vhd")).unwrap();
        let disk = OpenOptions::new().open(&path("vm.vhd")).unwrap();
        for block in [0, 1, 3, 5, 7] {
            disk.write_at(&pattern(block, 40 << 10), block * 2 * MIB + 4096).unwrap();
        }
        disk.snapshot(&SnapshotName::new("first").unwrap()).unwrap();
        disk.write_at(&pattern(8, 8192), 2 * MIB + 8192).unwrap();
        // Zeros that hide what is beneath.
        disk.write_at(&[0; 8192], 6 * MIB + 8192).unwrap();
        disk.write_at(&pattern(9, 4096), 14 * MIB).unwrap();
        // Also in a block whose CRCs begin within the second page of them.
        disk.write_at(&[0; 4096], 14 * MIB + 8192).unwrap();
        disk.snapshot(&SnapshotName::new("second").unwrap()).unwrap();
        disk.write_at(&pattern(10, 512), 8 * MIB).unwrap();
        disk.close().unwrap();
        cowvhd::snapshot::clone_to(&OpenOptions::new(), &path("vm@first.vhd"), &path("clone.vhd")).unwrap();
        let mut go = |_, _| ControlFlow::Continue(());
        verify(&OpenOptions::new(), &path("vm.vhd"), true, &mut go).unwrap();
        let mut bench = Bench { dir, content: Vec::new() };
        bench.content = bench.contents();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn contents(&self) -> Vec<Vec<u8>> {
        DISKS.iter().map(|name| damage::content(&self.path(name))).collect()
    }
}

fn pattern(seed: u64, length: usize) -> Vec<u8> {
    (0..length).map(|at| (at as u64 / 7 + at as u64 * 13 + seed * 31) as u8 | 1).collect()
}

/// Pages of metadata that hold something; for the table the first, of the others one of each kind and place.
fn pages(path: &Path) -> Vec<u64> {
    let length = fs::metadata(path).unwrap().len();
    let mut pages: Vec<u64> = (0..7).map(|page| page * PAGE).collect();
    pages.extend(REGISTRY);
    pages.push(TABLE);
    let file = fs::File::open(path).unwrap();
    let mut page = vec![0; PAGE as usize];
    pages.extend((0..).map(|slot| SLOTS + slot * STRIDE).take_while(|at| at + STRIDE < length));
    let crcs = SLOTS + (length - SLOTS) / STRIDE * STRIDE;
    pages.extend((crcs..length).step_by(PAGE as usize));
    pages.retain(|&at| {
        let read = file.read_at(&mut page, at).unwrap();
        page[..read].iter().any(|&byte| byte != 0)
    });
    pages
}

fn lineage(path: &Path) -> [Vec<u8>; 2] {
    [4096, 8192].map(|at| {
        let mut bytes = vec![0; 720];
        fs::File::open(path).unwrap().read_exact_at(&mut bytes, at + 176).unwrap();
        bytes
    })
}

fn write(path: &Path, bytes: &[u8], at: u64) {
    let before = fs::metadata(path).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
    file.set_modified(before.modified().unwrap()).unwrap();
    fs::set_permissions(path, before.permissions()).unwrap();
}

#[test]
fn one_damaged_page_of_a_sealed_layer_loses_nothing() {
    let bench = Bench::new();
    let mut cases = 0;
    let mut steps = BTreeSet::new();
    for name in ["vm@first.vhd", "vm@second.vhd"] {
        let path = bench.path(name);
        let (good, stamp) = (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().modified().unwrap());
        let seals = lineage(&path);
        for at in pages(&path) {
            let end = (at + PAGE).min(good.len() as u64) as usize;
            let page = &good[at as usize..end];
            for (damage, make) in DAMAGES {
                let what = format!("{name} {at} {damage}");
                let damaged = make(page, at);
                write(&path, &damaged, at);
                let found = check(Arc::new(HostVfs), &path).unwrap();
                let saved = bench.path("undo");
                let first = repair(Arc::new(HostVfs), &path, Consent::All, &saved).unwrap();
                steps.extend(first.steps.iter().map(|step| (step.safe, unnumbered(&step.what))));
                let left = first.after.codes().map(|(code, _)| code).collect::<Vec<_>>();
                let said = format!("{what}: {:?} {:#?} {left:?}", found.findings(), first.steps);
                // The other two locators still name the parent, and the page says nothing else.
                let is_locator = (16384..28672).contains(&at);
                assert!(first.is_sound() || (is_locator && left.contains(&Code::Locator)), "{said}");
                assert_eq!(bench.contents(), bench.content, "{said}");
                assert_eq!(lineage(&path), seals, "{said}");
                let chain = check_chain(&OpenOptions::new(), &bench.path("vm.vhd")).unwrap();
                assert!(chain.is_sound() || is_locator, "{said} {:?}", chain.codes());
                assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), stamp, "{said}");
                let mut go = |_, _| ControlFlow::Continue(());
                let verified = verify(&OpenOptions::new(), &path, false, &mut go).unwrap();
                assert_eq!(verified.chain().codes().get(&Code::DataDamaged), None, "{said}");
                assert_eq!(verified.chain().codes().get(&Code::BitmapDamaged), None, "{said}");
                let second = repair(Arc::new(HostVfs), &path, Consent::All, &bench.path("undo2")).unwrap();
                assert!(!second.changes(), "{said} {:#?}", second.steps);
                if first.changes() {
                    undo(Arc::new(HostVfs), &saved, &path, false).unwrap();
                    fs::remove_file(&saved).unwrap();
                }
                let mut now = vec![0; page.len()];
                fs::File::open(&path).unwrap().read_exact_at(&mut now, at).unwrap();
                assert!(now == damaged, "{said}: undone");
                write(&path, page, at);
                assert!(fs::read(&path).unwrap() == good, "{said}: undone");
                cases += 1;
            }
        }
    }
    println!("{cases} cases");
    assert!(cases > 100);
    let steps: Vec<(bool, &str)> = steps.iter().map(|(safe, what)| (*safe, what.as_str())).collect();
    // All of them safe: something proves it.
    let expected = [
        "make the block table again from the block headers: it is what the last close left",
        "make the headers of block  again, all their bits set",
        "make the headers of block  again, the bits set that the CRCs tell",
        "recover the image and close it",
        "the superblock counts allocations on from ",
        "write the backup of the headers again from the start of the file",
        "write the copy of the registry of children again from the other one",
        "write the footer again at offset  from the copy at the start",
        "write the other superblock again",
    ];
    assert_eq!(steps, expected.map(|what| (true, what)));
}

/// What a step says, without its numbers.
fn unnumbered(what: &str) -> String {
    what.chars().filter(|character| !character.is_ascii_digit()).collect()
}

/// A snapshot that has a state of its VM names the manifest of that, which tells that it is the snapshot's own.
#[test]
fn a_lost_seal_names_its_state_again() {
    let dir = damage::folder();
    let path = |name: &str| dir.path().join(name);
    let mut disks = Vec::new();
    for name in ["a.vhd", "b.vhd"] {
        CreateOptions::new(SIZE).create(&path(name)).unwrap();
        let disk = OpenOptions::new().open(&path(name)).unwrap();
        disk.write_at(&pattern(1, 4096), 0).unwrap();
        disks.push(disk);
    }
    let checkpoint = |disks: &[&Disk], name: &str| {
        let checkpoint = Checkpoint::begin(disks, &SnapshotName::new(name).unwrap()).unwrap();
        let blob = checkpoint.blob("ram").unwrap();
        blob.set_len(4096).unwrap();
        blob.write_at(&[7; 4096], 0).unwrap();
        checkpoint.commit().unwrap();
    };
    checkpoint(&[&disks[0], &disks[1]], "one");
    // Another one, of the first disk alone.
    checkpoint(&[&disks[0]], "two");
    disks.drain(..).for_each(|disk| disk.close().unwrap());
    let snapshot = path("a@one.vhd");
    let seals = lineage(&snapshot);
    let manifest = path("a@one.vmstate");
    let own = fs::read(&manifest).unwrap();
    // The same with another seal, as of a disk that was sealed anew.
    let mut older = own.clone();
    let seal = own.windows(16).position(|window| window == &seals[0][..16]).unwrap();
    older[seal] ^= 1;
    let end = older.len() - 4;
    let crc = crc32fast::hash(&older[..end]);
    older[end..].copy_from_slice(&crc.to_be_bytes());
    for (there, is_own) in
        [(own.clone(), true), (fs::read(path("a@two.vmstate")).unwrap(), false), (older, false)]
    {
        fs::write(&manifest, there).unwrap();
        write(&snapshot, &[0; 8192], 4096);
        let undo_file = path("undo");
        let repaired = repair(Arc::new(HostVfs), &snapshot, Consent::All, &undo_file).unwrap();
        let found = lineage(&snapshot);
        assert!(found[0] == found[1], "{:?}", repaired.steps);
        let differ: Vec<usize> = (0..found[0].len()).filter(|&at| found[0][at] != seals[0][at]).collect();
        assert_eq!(differ.is_empty(), is_own, "{:?}", repaired.steps);
        assert!(is_own || found[0][48..80] == [0; 32], "the digest of another state");
        let of_state = |at: &usize| (48..80).contains(at) || (440..696).contains(at);
        assert!(differ.iter().all(of_state), "{differ:?}");
        // No CRCs were made, and none are said to be there.
        assert_eq!(repaired.after.worst(), None, "{:?}", repaired.after.findings());
        let mut go = |_, _| ControlFlow::Continue(());
        let verified = verify(&OpenOptions::new(), &snapshot, false, &mut go).unwrap();
        assert_eq!(verified.chain().codes().get(&Code::CrcsDamaged), None, "{:?}", verified.chain().codes());
        undo(Arc::new(HostVfs), &undo_file, &snapshot, true).unwrap();
        fs::remove_file(undo_file).unwrap();
    }
}

/// Both superblocks hold the seal; when both are lost, the CRCs tell it, or a child.
#[test]
fn a_lost_seal_is_found_elsewhere() {
    let bench = Bench::new();
    for (name, without_crcs) in
        [("vm@first.vhd", false), ("vm@first.vhd", true), ("vm@second.vhd", false), ("vm@second.vhd", true)]
    {
        let path = bench.path(name);
        let good = fs::read(&path).unwrap();
        let seals = lineage(&path);
        write(&path, &[0x5a; 8192], 4096);
        if without_crcs {
            let length = good.len() as u64;
            let crcs = SLOTS + (length - SLOTS) / STRIDE * STRIDE;
            write(&path, &vec![0; (length - 512 - crcs) as usize], crcs);
        }
        let repaired = repair(Arc::new(HostVfs), &path, Consent::All, &bench.path("undo")).unwrap();
        let said = format!("{name} {without_crcs}: {:#?} {:#?}", repaired.steps, repaired.after.findings());
        assert!(repaired.is_sound() && repaired.steps.len() == 3, "{said}");
        assert!(repaired.steps.iter().all(|step| !step.what.is_empty()), "{said}");
        assert_eq!(bench.contents(), bench.content, "{said}");
        assert!(check_chain(&OpenOptions::new(), &bench.path("vm.vhd")).unwrap().is_sound(), "{said}");
        // All but the numbers of the state of a fixed parent, which there is none of.
        let found = lineage(&path);
        assert!(found[0] == found[1] && found[0] == seals[0], "{said}");
        assert!(OpenOptions::new().open(&path).is_err(), "{said}");
        undo(Arc::new(HostVfs), &bench.path("undo"), &path, false).unwrap();
        fs::remove_file(bench.path("undo")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(&path, good).unwrap();
    }
}

/// Two superblocks that count the same: the other one is made the newer, and the seal stays.
#[test]
fn superblocks_of_one_sequence_in_a_sealed_layer() {
    let bench = Bench::new();
    let path = bench.path("vm@first.vhd");
    let (good, seals) = (fs::read(&path).unwrap(), lineage(&path));
    let mut page = good[8192..12288].to_vec();
    page[8..16].copy_from_slice(&good[4096 + 8..][..8]);
    let crc = crc32fast::hash(&page[..4092]);
    page[4092..].copy_from_slice(&crc.to_be_bytes());
    write(&path, &page, 8192);
    let repaired = repair(Arc::new(HostVfs), &path, Consent::Safe, &bench.path("undo")).unwrap();
    assert_eq!(repaired.before.count(Code::SuperblockSequence), 1, "{:?}", repaired.before.findings());
    assert_eq!(repaired.after.worst(), None, "{:?}", repaired.after.findings());
    assert_eq!(lineage(&path), seals);
}

/// Where nothing nearby tells the seal, it stays lost, and that is said.
#[test]
fn a_seal_that_nothing_tells_stays_lost() {
    let bench = Bench::new();
    let (path, elsewhere) = (bench.path("vm@first.vhd"), tempfile::tempdir().unwrap());
    let alone = elsewhere.path().join("vm@first.vhd");
    fs::copy(&path, &alone).unwrap();
    let length = fs::metadata(&alone).unwrap().len();
    let crcs = SLOTS + (length - SLOTS) / STRIDE * STRIDE;
    write(&alone, &vec![0; (length - 512 - crcs) as usize], crcs);
    write(&alone, &[0; 8192], 4096);
    let repaired = repair(Arc::new(HostVfs), &alone, Consent::All, &bench.path("undo")).unwrap();
    assert!(
        repaired.changes() && repaired.after.count(Code::SealLost) == 1,
        "{:?}",
        repaired.after.findings()
    );
    assert_eq!(damage::content(&alone), bench.content[3]);

    // With its CRCs it tells itself.
    let told = elsewhere.path().join("told.vhd");
    fs::copy(&path, &told).unwrap();
    write(&told, &[0; 8192], 4096);
    let repaired = repair(Arc::new(HostVfs), &told, Consent::All, &bench.path("undo2")).unwrap();
    assert!(repaired.is_sound(), "{:?}", repaired.after.findings());
    let seal_id = |path: &Path| lineage(path)[0][..16].to_vec();
    assert_eq!(seal_id(&told), seal_id(&path));
}

/// Of two copies of the registry one is made again from the other, without a question.
#[test]
fn a_damaged_copy_of_the_registry_is_made_again_without_consent() {
    let bench = Bench::new();
    let path = bench.path("vm@first.vhd");
    for at in REGISTRY {
        write(&path, &[0; PAGE as usize], at);
        let repaired = repair(Arc::new(HostVfs), &path, Consent::Safe, &bench.path("undo")).unwrap();
        assert_eq!(repaired.before.count(Code::RegistryDamaged), 1);
        assert!(repaired.changes() && repaired.after.worst().is_none(), "{:?}", repaired.after.findings());
        fs::remove_file(bench.path("undo")).unwrap();
    }
}

/// Both copies of the registry at once: the children are found beside the image.
#[test]
fn a_lost_registry_is_made_again_from_the_children() {
    let bench = Bench::new();
    let path = bench.path("vm@first.vhd");
    REGISTRY.iter().for_each(|&at| write(&path, &[7; 4096], at));
    let found = check(Arc::new(HostVfs), &path).unwrap();
    assert_eq!(found.count(Code::RegistryLost), 1, "{:?}", found.findings());
    let preened = repair(Arc::new(HostVfs), &path, Consent::Safe, &bench.path("undo")).unwrap();
    assert!(!preened.changes());
    let repaired = repair(Arc::new(HostVfs), &path, Consent::All, &bench.path("undo")).unwrap();
    assert!(repaired.is_sound(), "{:?}", repaired.after.findings());
    assert!(repaired.steps[0].what.starts_with("register 2 disks"), "{:?}", repaired.steps);
    let mut page = vec![0; 4096];
    fs::File::open(&path).unwrap().read_exact_at(&mut page, REGISTRY[1]).unwrap();
    for child in ["clone.vhd", "vm@second.vhd"] {
        assert!(page.windows(child.len()).any(|window| window == child.as_bytes()), "{child}");
    }
    assert_eq!(bench.contents(), bench.content);
}
