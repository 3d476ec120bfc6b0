//! Broken and hostile images: what a check finds, what a repair does, and that neither harms.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/damage.rs"]
mod damage;
#[path = "support/golden.rs"]
mod golden;
#[path = "support/hostile.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod hostile;

use cowvhd::check::{Code, Consent, Finding, Repair, Report, Step, check, plan, repair, salvage, undo};
use cowvhd::vfs::HostVfs;
use cowvhd::{CreateOptions, DiskInfo, ErrorKind, OpenOptions};
use damage::{SLOTS, STRIDE, content};
use golden::nameless;
use hostile::images::{self, MIB, OUR_TABLE};
use hostile::{Case, Outcome, cases};
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

/// Enough of a file to see that it was not changed.
type Fingerprint = (u64, std::time::SystemTime, Vec<u8>);

/// Huge ones are sparse.
fn fingerprint(path: &Path) -> Fingerprint {
    let metadata = fs::metadata(path).unwrap();
    let small = metadata.len() < 64 << 20;
    let bytes = if small { fs::read(path).unwrap() } else { Vec::new() };
    (metadata.len(), metadata.modified().unwrap(), bytes)
}

fn checked(path: &Path, name: &str) -> Report {
    let before = fingerprint(path);
    let report = check(Arc::new(HostVfs), path).unwrap_or_else(|error| panic!("{name}: {error}"));
    for consent in [Consent::Safe, Consent::All] {
        drop(plan(Arc::new(HostVfs), path, consent).unwrap_or_else(|error| panic!("{name}: {error}")));
    }
    assert!(fingerprint(path) == before, "{name}: checking changed the file");
    report
}

fn judge(case: &Case) {
    let dir = tempfile::tempdir().unwrap();
    let (path, saved) = (dir.path().join("disk.vhd"), dir.path().join("undo"));
    let name = case.name;
    (case.build)(&path);
    let before = fingerprint(&path);
    let report = checked(&path, name);
    match case.code {
        Some(code) => assert!(report.count(code) > 0, "{name}: {:#?}", report.findings()),
        None => assert!(report.findings().iter().all(|f| f.code.as_str().ends_with("-all-set")), "{name}"),
    }
    match case.outcome {
        Outcome::Sound => assert!(report.is_sound(), "{name}: {:#?}", report.findings()),
        Outcome::Refused => assert!(!report.is_sound(), "{name}"),
        // A leak, or a journal to be replayed, is no damage.
        Outcome::Preened | Outcome::Repaired => assert!(report.worst().is_some(), "{name}"),
    }

    let vfs = || Arc::new(HostVfs);
    let preened = repair(vfs(), &path, Consent::Safe, &saved).unwrap_or_else(|e| panic!("{name}: {e}"));
    let changes = case.outcome == Outcome::Preened;
    assert_eq!(preened.changes(), changes, "{name} -p: {:#?} {:#?}", preened.steps, preened.after.findings());
    let repaired = match changes {
        true => preened,
        false => repair(vfs(), &path, Consent::All, &saved).unwrap_or_else(|e| panic!("{name}: {e}")),
    };
    let mended = matches!(case.outcome, Outcome::Preened | Outcome::Repaired);
    let said = format!("{name}: {:#?} {:#?}", repaired.steps, repaired.after.findings());
    assert_eq!(repaired.changes(), mended, "{said}");
    assert_eq!(repaired.is_sound(), case.outcome != Outcome::Refused, "{said}");
    if mended {
        let second = repair(vfs(), &path, Consent::All, &dir.path().join("undo-2")).unwrap();
        assert!(!second.changes() && second.is_sound(), "{said} {:#?}", second.steps);
        let disk = OpenOptions::new().read_only(true).open(&path).unwrap_or_else(|e| panic!("{said}: {e}"));
        let mut content = vec![0; disk.size() as usize];
        disk.read_at(&mut content, 0).unwrap();
        drop(disk);
        undo(vfs(), &saved, &path, false).unwrap();
    }
    assert!(fingerprint(&path) == before, "{said}: not as it was");
}

#[test]
fn every_image_is_found_out_and_mended_or_refused() {
    let failed: Vec<String> = cases()
        .iter()
        .filter_map(|case| {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| judge(case)));
            result.err().map(|_| case.name.to_string())
        })
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

/// docs/check.md has a row for each.
#[test]
fn every_image_is_documented() {
    let document = include_str!("../docs/check.md");
    for Case { name, code, outcome, .. } in cases() {
        let code = code.map_or("–".to_string(), |code| format!("`{code}`"));
        let repair = match outcome {
            Outcome::Sound => "nothing to do",
            Outcome::Preened => "`-p`",
            Outcome::Repaired => "`-y`",
            Outcome::Refused => "refused",
        };
        let row = format!("| {name} | {code} | {repair} |\n");
        assert!(document.contains(&row), "docs/check.md lacks: {row}");
    }
}

#[test]
fn what_only_a_newer_version_knows_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    images::ours(&path);
    let mut page = fs::read(&path).unwrap()[4096..8192].to_vec();
    page[39] = 0x40;
    let crc = crc32fast::hash(&page[..4092]);
    page[4092..].copy_from_slice(&crc.to_be_bytes());
    images::write(&path, &page, 4096);
    let before = fingerprint(&path);
    assert_eq!(check(Arc::new(HostVfs), &path).unwrap_err().kind(), ErrorKind::Unsupported);
    let error = repair(Arc::new(HostVfs), &path, Consent::All, &dir.path().join("undo")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(fingerprint(&path) == before && !dir.path().join("undo").exists());
}

#[test]
fn what_is_no_file_is_an_error_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    for path in [dir.path(), &fifo, Path::new("/dev/zero")] {
        assert_eq!(check(Arc::new(HostVfs), path).unwrap_err().kind(), ErrorKind::Io, "{path:?}");
    }
}

/// A disk that lost both superblocks.
fn damaged(path: &Path) -> Fingerprint {
    images::ours(path);
    images::write(path, &[1], 4096);
    images::write(path, &[1], 8192);
    fingerprint(path)
}

/// Brings a file back to what it was, without the undo file.
fn put_back(path: &Path, (_, modified, bytes): &Fingerprint) {
    fs::write(path, bytes).unwrap();
    fs::File::options().write(true).open(path).unwrap().set_modified(*modified).unwrap();
}

#[test]
fn an_undo_file_that_is_damaged_or_none_restores_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (path, saved) = (dir.path().join("disk.vhd"), dir.path().join("undo"));
    let before = damaged(&path);
    assert!(repair(Arc::new(HostVfs), &path, Consent::All, &saved).unwrap().changes());
    let (after, sound) = (fingerprint(&path), fs::read(&saved).unwrap());
    let with = |at: usize, byte: u8, mend_crc: bool| {
        let mut bytes = sound.clone();
        bytes[at] = byte;
        if mend_crc {
            let crc = crc32fast::hash(&bytes[..60]);
            bytes[60..64].copy_from_slice(&crc.to_be_bytes());
        }
        bytes
    };
    for (bytes, words) in [
        (with(0, b'x', true), "undo file: field magic (byte 0) is [78, "),
        (with(50, 1, false), "undo file: field CRC (byte 60) is 0x"),
        (with(11, 2, true), "undo file: field version (byte 8) is 2, expected 1"),
        (Vec::new(), "undo file: field magic (byte 0) is [00, "),
    ] {
        fs::write(&saved, &bytes).unwrap();
        let error = undo(Arc::new(HostVfs), &saved, &path, true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(fingerprint(&path) == after, "{words}");
        // Nor is it written over.
        put_back(&path, &before);
        let error = repair(Arc::new(HostVfs), &path, Consent::All, &saved).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exists, "{error}");
        assert!(fingerprint(&path) == before && fs::read(&saved).unwrap() == bytes, "{words}");
        put_back(&path, &after);
    }
}

/// What a repair had saved when it was cut counts; what it had changed is taken back before another one looks.
#[test]
fn a_repair_that_was_cut_is_taken_back_first() {
    let dir = tempfile::tempdir().unwrap();
    let name = |name: &str| dir.path().join(name);
    let (path, saved) = (name("disk.vhd"), name("undo"));
    let repaired = |path: &Path| repair(Arc::new(HostVfs), path, Consent::All, &saved);
    let before = damaged(&path);
    assert!(repaired(&path).unwrap().changes());
    let (after, whole) = (fingerprint(&path), fs::read(&saved).unwrap());
    // Its last record says that it is complete. Half of one is none.
    let cut = &whole[..whole.len() - 16];

    // Nothing is changed yet: it goes on.
    put_back(&path, &before);
    fs::write(&saved, cut).unwrap();
    assert!(repaired(&path).unwrap().is_sound());
    undo(Arc::new(HostVfs), &saved, &path, false).unwrap();
    assert!(fingerprint(&path) == before, "not what it was before the first of the two");

    // One superblock is written and the other one is not.
    let mut half = before.clone();
    half.2[4096..8192].copy_from_slice(&after.2[4096..8192]);
    // Where zeros were saved.
    let mut hole = before.clone();
    let zeros = before.2.chunks(4096).position(|page| page.iter().all(|&byte| byte == 0)).unwrap();
    hole.2[zeros * 4096 + 4095] = 1;
    for changed in [&half, &hole] {
        put_back(&path, changed);
        fs::write(&saved, cut).unwrap();
        let error = repaired(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        let words = format!(
            "disk.vhd: a repair of it was cut short, and {} has what that replaced; restore it first (cowvhd repair \
             --undo-apply), or, if it has been used since, name another undo file",
            saved.display()
        );
        assert!(error.to_string().ends_with(&words), "{error}");
        assert!(fingerprint(&path) == *changed && fs::read(&saved).unwrap() == cut);
        undo(Arc::new(HostVfs), &saved, &path, false).unwrap();
        assert!(fingerprint(&path) == before);
        assert!(repaired(&path).unwrap().is_sound());
    }
    undo(Arc::new(HostVfs), &saved, &path, false).unwrap();

    // One that is complete belongs to that repair alone, and one of another disk to that disk.
    let error = repaired(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists, "{error}");
    assert!(fingerprint(&path) == before);
    let other = name("other.vhd");
    let before = damaged(&other);
    fs::write(&saved, cut).unwrap();
    let error = repaired(&other).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists, "{error}");
    assert!(fingerprint(&other) == before && fs::read(&saved).unwrap() == cut);
}

#[test]
fn undoing_a_repair_over_later_changes_wants_to_be_forced() {
    let dir = tempfile::tempdir().unwrap();
    let (path, saved) = (dir.path().join("disk.vhd"), dir.path().join("undo"));
    let before = damaged(&path);
    repair(Arc::new(HostVfs), &path, Consent::All, &saved).unwrap();
    let disk = OpenOptions::new().open(&path).unwrap();
    disk.write_at(&[9; 4096], 0).unwrap();
    disk.close().unwrap();
    drop(disk);
    let changed = fingerprint(&path);
    let error = undo(Arc::new(HostVfs), &saved, &path, false).unwrap_err();
    let words = "it was changed after the repair, and going back would mix the two; use --force if that is what you want";
    assert!(error.to_string().contains(words), "{error}");
    assert!(fingerprint(&path) == changed);
    undo(Arc::new(HostVfs), &saved, &path, true).unwrap();
    // What the disk got since stays where the repair had nothing to save; all that it saved is back.
    let now = fingerprint(&path);
    assert_eq!((now.0, now.1), (before.0, before.1));
    assert!(now.2[..16384] == before.2[..16384]);
}

/// An empty entry proves nothing where a page of the table is damaged, and what the header of its block says counts; in another page it
/// is what another program may have made it.
#[test]
fn a_lost_entry_comes_back_beside_a_bad_one_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (path, saved) = (dir.path().join("disk.vhd"), dir.path().join("undo"));
    CreateOptions::new(1100 * 2 * MIB).create(&path).unwrap();
    let disk = OpenOptions::new().open(&path).unwrap();
    for block in [3u64, 1030, 1031] {
        disk.write_at(&[block as u8; 4096], block * 2 * MIB).unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    // So that no table is proven.
    images::append_block(&path, 5);
    let entry = |block: u64| u32::from_be_bytes(images::read(&path, OUR_TABLE + 4 * block));
    let before = [1030, 1031].map(entry);
    for (block, value) in [(3, u32::MAX), (1030, u32::MAX), (1031, u32::MAX - 1)] {
        images::write(&path, &value.to_be_bytes(), OUR_TABLE + 4 * block);
    }
    let repaired = repair(Arc::new(HostVfs), &path, Consent::All, &saved).unwrap();
    assert!(repaired.is_sound(), "{:?}", repaired.after.findings());
    assert!(
        repaired.steps[0].what.ends_with("the entries of blocks 1030, 1031 from their headers"),
        "{:?}",
        repaired.steps
    );
    assert_eq!(([1030, 1031].map(entry), entry(3)), (before, u32::MAX));
}

/// The footer behind the last block is lost, so that the file ends with the block: it is there, and both entries that name it show it.
#[test]
fn a_block_that_ends_with_the_file_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let (path, saved) = (dir.path().join("disk.vhd"), dir.path().join("undo"));
    images::ours(&path);
    images::append_block(&path, 5);
    images::set_length(&path, images::length(&path) - 512);
    let entry: [u8; 4] = images::read(&path, OUR_TABLE + 4 * 5);
    images::write(&path, &entry, OUR_TABLE + 4 * 6);
    let repaired = repair(Arc::new(HostVfs), &path, Consent::All, &saved).unwrap();
    assert!(repaired.is_sound(), "{:?}", repaired.after.findings());
    let shown = content(&path);
    for block in [5, 6] {
        let data = &shown[block * 2 * MIB as usize..][..2 * MIB as usize];
        assert!(data[4096..12288].iter().all(|&byte| byte == 6), "{:?}", repaired.steps);
        assert!(data[12288..].iter().all(|&byte| byte == 0));
    }
}

/// A salvage leaves the file alone, and what it makes is in order; it lists what has no place any more.
#[test]
fn what_can_be_read_is_saved() {
    for case in cases().iter().filter(|case| !case.name.contains("4 GiB") && !case.name.contains("locator")) {
        let dir = tempfile::tempdir().unwrap();
        let (path, out) = (dir.path().join("disk.vhd"), dir.path().join("saved.vhd"));
        (case.build)(&path);
        let before = fingerprint(&path);
        let name = case.name;
        match salvage(Arc::new(HostVfs), &path, &out) {
            Ok(salvaged) => {
                assert_eq!(check(Arc::new(HostVfs), &out).unwrap().worst(), None, "{name}");
                let lost = [
                    "entry 1",
                    "entry 2",
                    "entry 3, the table itself",
                    "entry past the end",
                    "an entry past the end, and one that was lost beside it",
                    "entry 0xFFFFFFFE",
                    "a bitmap cut by the end of the file",
                    "a block cut by the end of the file",
                    "a block of ours cut by the end of the file",
                    "a block cut behind its bitmap",
                    "a block cut by the end of the file, and an entry past that",
                    "a block cut by the end of the file, and an entry into it",
                    "an entry past the end, and one used twice",
                ];
                assert_eq!(!salvaged.lost.is_empty(), lost.contains(&name), "{name}: {:?}", salvaged.lost);
            }
            Err(error) => {
                let no_parent = error.kind() == ErrorKind::ParentMissing;
                assert!(case.outcome == Outcome::Refused || no_parent, "{name}: {error}");
            }
        }
        assert!(fingerprint(&path) == before, "{name}");
    }
}

/// What all images are said to have, word by word and with every place, what a repair says that it did, and what a guest sees then.
/// `COWVHD_TEST_WRITE=1` writes it again: read the difference.
#[test]
fn every_image_is_described_in_the_same_words() {
    let mut text = String::new();
    for case in cases().iter().filter(|case| !case.name.contains("4 GiB")) {
        let dir = tempfile::tempdir().unwrap();
        let (path, saved) = (dir.path().join("disk.vhd"), dir.path().join("undo"));
        (case.build)(&path);
        let salvaged = salvage(Arc::new(HostVfs), &path, &dir.path().join("saved.vhd"));
        let repaired = repair(Arc::new(HostVfs), &path, Consent::All, &saved).unwrap();
        writeln!(text, "\n{}", case.name).unwrap();
        describe(&mut text, &path, &repaired);
        match salvaged {
            Ok(found) => {
                let journal = if found.journal_lost { ", and of the journal" } else { "" };
                writeln!(text, "  salvage: {} bytes, lost {:?}{journal}", found.written, found.lost).unwrap();
            }
            Err(error) => writeln!(text, "  no salvage: {:?}", error.kind()).unwrap(),
        }
    }
    golden::compare("hostile.txt", &text, include_str!("support/hostile.txt"));
}

fn describe(text: &mut String, path: &Path, repaired: &Repair) {
    summary(text, &repaired.before);
    repaired.before.findings().iter().for_each(|finding| line(text, "", finding));
    for step in &repaired.steps {
        let safe = if step.safe { "" } else { " (may lose)" };
        writeln!(text, "  - {}{safe}", nameless(&step.what)).unwrap();
    }
    if repaired.changes() {
        summary(text, &repaired.after);
        repaired.after.findings().iter().for_each(|finding| line(text, "left: ", finding));
        let modified = fs::metadata(path).unwrap().modified().unwrap();
        assert!(modified > UNIX_EPOCH + Duration::from_secs(50 * 365 * 86400), "{modified:?}");
        let front = fs::read(path).unwrap_or_default();
        let flags =
            [4096, 8192].map(|at| front.get(at..at + 64).filter(|page| page.starts_with(b"cowvhdSB")));
        if let [Some(one), Some(other)] = flags {
            writeln!(text, "  flags of the superblocks: {} {}", one[63], other[63]).unwrap();
        }
        // A repair is no other program.
        if let Ok(info) = DiskInfo::read(path) {
            writeln!(text, "  changed by others since: {:?}", info.foreign_changes).unwrap();
        }
    }
    if let Ok(disk) = OpenOptions::new().read_only(true).open(path)
        && disk.size() <= 64 << 20
    {
        let mut content = vec![0; disk.size() as usize];
        disk.read_at(&mut content, 0).unwrap();
        let runs = content.chunk_by(|a, b| a == b).scan(0, |at, run| {
            *at += run.len();
            Some((*at - run.len(), run))
        });
        let runs = runs
            .filter(|(_, run)| run[0] != 0)
            .map(|(at, run)| format!("{} of {:#x} at {at}", run.len(), run[0]));
        let runs: Vec<String> = runs.take(8).collect();
        writeln!(text, "  content: {}", if runs.is_empty() { "zeros".into() } else { runs.join(", ") })
            .unwrap();
    }
}

fn summary(text: &mut String, report: &Report) {
    let (blocks, all, leaked) = (report.allocated_blocks, report.total_blocks, report.leaked_bytes);
    let disk = match (report.disk_type, report.virtual_size) {
        (Some(disk_type), Some(size)) => format!("{disk_type:?}, {size} bytes"),
        other => format!("{other:?}"),
    };
    writeln!(text, "  {disk}: {blocks} of {all} blocks in {} bytes, {leaked} leaked", report.file_bytes)
        .unwrap();
}

fn line(text: &mut String, left: &str, finding: &Finding) {
    let Finding { code, structure, offset, block, guest, what } = finding;
    let at = offset.map_or(String::new(), |at| format!(" at {at}"));
    let block = block.map_or(String::new(), |block| format!(" of block {block}"));
    let guest = guest.as_ref().map_or(String::new(), |guest| format!(" ({guest:?})"));
    writeln!(text, "  {left}{code}: {structure}{at}{block}{guest}: {}", nameless(what)).unwrap();
}

/// The page of a block of a child is lost: what its own data says of the bits is all there is, and no more than that is set.
#[test]
fn bits_of_a_child_are_told_by_its_data() {
    let dir = tempfile::tempdir().unwrap();
    let [base, path, saved] = ["base.vhd", "disk.vhd", "undo"].map(|name| dir.path().join(name));
    CreateOptions::new(8 << 20).create(&base).unwrap();
    let disk = OpenOptions::new().open(&base).unwrap();
    disk.write_at(&[1; 4 << 20], 0).unwrap();
    disk.close().unwrap();
    CreateOptions::child_of(&base).create(&path).unwrap();
    let disk = OpenOptions::new().open(&path).unwrap();
    for unit in [0, 5, 511] {
        disk.write_at(&[2; 4096], (2 << 20) + unit * 4096).unwrap();
    }
    disk.close().unwrap();
    let before = content(&path);
    images::write(&path, &[0; 4096], 7 << 20);
    let vfs = || Arc::new(HostVfs);
    // Without consent nothing is begun: not the counting that goes with a new header either.
    let preened = repair(vfs(), &path, Consent::Safe, &saved).unwrap();
    assert!(!preened.changes(), "{:?}", preened.steps);
    let repaired = repair(vfs(), &path, Consent::All, &saved).unwrap();
    assert!(repaired.is_sound(), "{:?}", repaired.after.findings());
    let made = Step {
        what: "make the headers of block 1 again, the bits set where data is not zero".into(),
        safe: false,
    };
    assert!(repaired.steps.contains(&made), "{:?}", repaired.steps);
    assert!(content(&path) == before);
    let bits = fs::read(&path).unwrap()[(7 << 20) + 3584..][..512].to_vec();
    let set: Vec<usize> = (0..512).filter(|&unit| bits[unit] == 0xff).collect();
    assert!(set == [0, 5, 511] && bits.iter().all(|&byte| byte == 0 || byte == 0xff), "{set:?}");
}

/// Two entries name one slot, and another program has placed a block: nothing tells without loss which is right, and the header that
/// is there is not made again for the other block.
#[test]
fn a_slot_named_twice_is_left_alone_without_consent() {
    let dir = tempfile::tempdir().unwrap();
    let [path, saved] = ["disk.vhd", "undo"].map(|name| dir.path().join(name));
    images::ours(&path);
    let bytes = fs::read(&path).unwrap();
    let (end, entry) = (bytes.len() as u64 - 512, (7 * 1024 * 1024 + 3584_u32) / 512);
    images::write(&path, &[&[0xff; 512][..], &[9; 2 << 20], &bytes[end as usize..]].concat(), end);
    images::write(&path, &((end / 512) as u32).to_be_bytes(), (3 << 20) + 6 * 4);
    images::write(&path, &entry.to_be_bytes(), (3 << 20) + 5 * 4);
    let before = fs::read(&path).unwrap();
    let found = check(Arc::new(HostVfs), &path).unwrap();
    assert_eq!(found.count(Code::BatOverlap), 1, "{:?}", found.findings());
    let repaired = repair(Arc::new(HostVfs), &path, Consent::Safe, &saved).unwrap();
    assert!(!repaired.changes(), "{:?}", repaired.steps);
    assert!(fs::read(&path).unwrap() == before);
    // With consent the block whose header stands there keeps it, and nothing is copied.
    let repaired = repair(Arc::new(HostVfs), &path, Consent::All, &saved).unwrap();
    let what = "clear the entries of block 5, which read as zeros then";
    let steps: Vec<&str> = repaired.steps.iter().map(|step| step.what.as_str()).collect();
    assert_eq!(steps.first(), Some(&what), "{steps:?}");
    assert!(repaired.is_sound(), "{:?}", repaired.after.findings());
}

/// Of a table of two pages the second has a bad entry, and lacks one: both are told by their headers.
#[test]
fn entries_of_the_second_page_of_a_table() {
    let dir = tempfile::tempdir().unwrap();
    let [path, saved] = ["disk.vhd", "undo"].map(|name| dir.path().join(name));
    CreateOptions::new(1040 * (2 << 20)).create(&path).unwrap();
    let disk = OpenOptions::new().open(&path).unwrap();
    let blocks = [3, 1030, 1031];
    for block in blocks {
        disk.write_at(&[3 + block as u8; 4096], block * (2 << 20)).unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    // A block of another program, so that no table is proven.
    images::append_block(&path, 5);
    for (block, entry) in [(1030, 0xffff_fffe), (1031, u32::MAX)] {
        images::write(&path, &entry.to_be_bytes(), damage::TABLE + block * 4);
    }
    let repaired = repair(Arc::new(HostVfs), &path, Consent::All, &saved).unwrap();
    assert!(repaired.is_sound(), "{:?} {:?}", repaired.steps, repaired.after.findings());
    assert_eq!(repaired.steps[0].what, "take the entries of blocks 1030, 1031 from their headers");
    let disk = OpenOptions::new().read_only(true).open(&path).unwrap();
    for block in blocks {
        let mut found = [0; 4096];
        disk.read_at(&mut found, block * (2 << 20)).unwrap();
        assert_eq!(found, [3 + block as u8; 4096], "{block}");
    }
}

/// A journal that is in order is not given up for a mark.
#[test]
fn the_mark_of_a_failed_sync_is_taken_away_behind_a_recovery() {
    let dir = tempfile::tempdir().unwrap();
    let [path, saved] = ["disk.vhd", "undo"].map(|name| dir.path().join(name));
    images::ours_dirty(&path);
    for superblock in [4096, 8192] {
        images::patch_superblock(&path, superblock, 60, &[0, 0, 0, 1]);
    }
    let repaired = repair(Arc::new(HostVfs), &path, Consent::All, &saved).unwrap();
    let steps: Vec<&str> = repaired.steps.iter().map(|step| step.what.as_str()).collect();
    assert_eq!(steps[..2], ["recover the image and close it", "take away the mark of a failed sync"]);
    assert_eq!(repaired.after.worst(), None, "{:?}", repaired.after.findings());
}

/// The same of a block of that program itself: it has no header, so each of the two gets what is there.
#[test]
fn a_block_of_another_program_that_is_named_twice_gets_a_copy() {
    let dir = tempfile::tempdir().unwrap();
    let [path, saved] = ["disk.vhd", "undo"].map(|name| dir.path().join(name));
    images::ours(&path);
    let bytes = fs::read(&path).unwrap();
    let end = bytes.len() as u64 - 512;
    images::write(&path, &[&[0xff; 512][..], &[9; 2 << 20], &bytes[end as usize..]].concat(), end);
    for block in [5, 6] {
        images::write(&path, &((end / 512) as u32).to_be_bytes(), (3 << 20) + block * 4);
    }
    let repaired = repair(Arc::new(HostVfs), &path, Consent::All, &saved).unwrap();
    assert!(repaired.is_sound(), "{:?} {:?}", repaired.steps, repaired.after.findings());
    let content = content(&path);
    for (block, fill) in [(0_usize, 1), (1, 2), (3, 4)] {
        assert!(content[block << 21..][4096..12288].iter().all(|&byte| byte == fill), "block {block}");
    }
    assert!(content[10 << 20..14 << 20].iter().all(|&byte| byte == 9), "{:?}", repaired.steps);
}

/// A block's page is lost, and another header of the block stands in space that was leaked: the table, which is what the last close
/// left, tells where the block is.
#[test]
fn a_header_in_leaked_space_moves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let [path, saved] = ["disk.vhd", "undo"].map(|name| dir.path().join(name));
    images::ours(&path);
    let disk = OpenOptions::new().open(&path).unwrap();
    disk.discard(0, 2 << 20).unwrap();
    disk.close().unwrap();
    drop(disk);
    let (free, third) = (SLOTS + STRIDE, SLOTS + 2 * STRIDE);
    let mut older = fs::read(&path).unwrap()[third as usize..][..4096].to_vec();
    older[8..16].copy_from_slice(&free.to_be_bytes());
    older[40..48].copy_from_slice(&90_u64.to_be_bytes());
    let crc = crc32fast::hash(&older[..60]);
    older[60..64].copy_from_slice(&crc.to_be_bytes());
    images::write(&path, &older, free);
    images::write(&path, &[0; 4096], third);
    let repaired = repair(Arc::new(HostVfs), &path, Consent::All, &saved).unwrap();
    assert!(repaired.is_sound(), "{:?}", repaired.after.findings());
    assert!(content(&path)[3 * (2 << 20) + 4096..][..8192] == [4; 8192], "{:?}", repaired.steps);
    let given_back = Step { what: "give back 4096 bytes that belong to no block".into(), safe: true };
    assert!(repaired.steps.contains(&given_back), "{:?}", repaired.steps);
    // Whatever becomes of the other one, it is older.
    assert_eq!(fs::read(&path).unwrap()[third as usize..][40..48], 91_u64.to_be_bytes());
}
