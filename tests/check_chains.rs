//! Chains: what a check of all layers finds, which file it names, and how a parent that has moved is found again.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/golden.rs"]
mod golden;
#[path = "support/hostile_chains.rs"]
mod hostile_chains;

use cowvhd::check::{ChainReport, Code, Consent, Finding, Severity, check_chain, plan, relink, undo};
use cowvhd::vfs::{Access, HostVfs, LockMode, Vfs};
use cowvhd::vhd::{Footer, Timestamp};
use cowvhd::{CreateOptions, ErrorKind, OpenOptions};
use hostile_chains::{Case, Outcome, add_block, cases, child_made_elsewhere, damaged_layers, layers};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::SystemTime;

/// All files of a folder: their bytes and times.
fn files(folder: &Path) -> BTreeMap<PathBuf, (SystemTime, Vec<u8>)> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                let modified = entry.metadata().unwrap().modified().unwrap();
                files.insert(entry.path(), (modified, fs::read(entry.path()).unwrap()));
            }
        }
    }
    files
}

fn checked(path: &Path) -> ChainReport {
    check_chain(&OpenOptions::new(), path).unwrap()
}

fn text(chain: &ChainReport) -> String {
    chain.layers().iter().map(|layer| format!("{:?}: {:#?}\n", layer.path, layer.findings())).collect()
}

fn judge(case: &Case) {
    let (dir, name) = (tempfile::tempdir().unwrap(), case.name);
    (case.build)(dir.path());
    let disk = dir.path().join("disks/disk.vhd");
    let deep = case.code == Code::ChainTooDeep;
    let before = if deep { BTreeMap::new() } else { files(dir.path()) };

    let chain = checked(&disk);
    let said = if deep { String::new() } else { text(&chain) };
    let layer = chain.layers().get(case.layer).unwrap_or_else(|| panic!("{name}: {said}"));
    assert!(layer.count(case.code) > 0, "{name}: {said}");
    assert_eq!(chain.is_sound(), case.outcome == Outcome::Sound, "{name}: {said}");
    if deep {
        return;
    }

    // Nothing that a repair of the disk itself does is about its parents.
    let planned = plan(Arc::new(HostVfs), &disk, Consent::All).unwrap();
    assert!(!planned.changes(), "{name}: {:?}", planned.steps);
    let opened = || OpenOptions::new().read_only(true).open(&disk).map(drop);
    let saved = dir.path().join("undo");
    let linked = relink(&OpenOptions::new(), &disk, None, Some(&saved));
    match case.outcome {
        Outcome::Relinked => {
            let parent = linked.unwrap().unwrap();
            assert_eq!(chain.parent_candidates(), std::slice::from_ref(&parent), "{name}");
            opened().unwrap();
            assert!(checked(&disk).is_sound(), "{name}: {}", text(&checked(&disk)));
            assert_eq!(relink(&OpenOptions::new(), &disk, None, None).unwrap(), None);
            undo(Arc::new(HostVfs), &saved, &disk, false).unwrap();
            fs::remove_file(&saved).unwrap();
        }
        _ => assert!(!matches!(linked, Ok(Some(_))), "{name}: {linked:?}"),
    }
    let mut after = files(dir.path());
    if case.outcome == Outcome::Relinked {
        // The parent has noted where its child is.
        let noted = |path: &PathBuf| path == &chain.parent_candidates()[0];
        after.extend(before.iter().filter(|(path, _)| noted(path)).map(|(p, f)| (p.clone(), f.clone())));
    }
    assert!(after == before, "{name}: something was changed");
    if case.outcome == Outcome::Sound {
        opened().unwrap();
    }
}

#[test]
fn every_chain_is_found_out_and_mended_or_refused() {
    let failed: Vec<&str> = cases()
        .iter()
        .filter(|case| std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| judge(case))).is_err())
        .map(|case| case.name)
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

/// What all chains are said to have, layer by layer and word by word. `COWVHD_TEST_WRITE=1` writes it again: read the difference.
#[test]
fn every_chain_is_described_in_the_same_words() {
    let mut said = String::new();
    for case in cases().iter().filter(|case| case.code != Code::ChainTooDeep) {
        let dir = tempfile::tempdir().unwrap();
        (case.build)(dir.path());
        said.push_str(&format!("\n{}\n", case.name));
        for layer in checked(&dir.path().join("disks/disk.vhd")).layers() {
            said.push_str(&format!("  {}\n", layer.path.file_name().unwrap().display()));
            for Finding { code, structure, offset, what, .. } in layer.findings() {
                let at = offset.map_or(String::new(), |at| format!(" at {at}"));
                let what = what.replace(dir.path().to_str().unwrap(), "");
                said.push_str(&format!("    {code}: {structure}{at}: {}\n", golden::nameless(&what)));
            }
        }
    }
    golden::compare("hostile_chains.txt", &said, include_str!("support/hostile_chains.txt"));
}

/// Of all layers together no more than 2,000 findings are kept; the others are counted.
#[test]
fn findings_of_a_chain_are_bounded_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    damaged_layers(dir.path(), 50);
    let chain = checked(&dir.path().join("disk.vhd"));
    let counted: u64 = chain.layers().iter().map(|layer| layer.count(Code::BatRange)).sum();
    assert_eq!(counted, 50 * 64, "{}", text(&chain));
    // That its parent is missing is said of the last besides.
    let mut kept: Vec<usize> = chain.layers().iter().map(|layer| layer.findings().len()).collect();
    assert_eq!(kept.pop(), Some(1));
    assert_eq!(kept.iter().sum::<usize>(), 2000, "{kept:?}");
    assert_eq!(kept.last(), Some(&0), "{kept:?}");
}

/// docs/check.md has a row for each.
#[test]
fn every_chain_is_documented() {
    let document = include_str!("../docs/check.md");
    for Case { name, code, layer, outcome, .. } in cases() {
        let layer = match layer {
            0 => "the disk",
            1 => "its parent",
            _ => "the last layer",
        };
        let repair = match outcome {
            Outcome::Sound => "nothing to do",
            Outcome::Relinked => "`--relink`",
            Outcome::Refused => "refused",
        };
        let row = format!("| {name} | `{code}` | {layer} | {repair} |\n");
        assert!(document.contains(&row), "docs/check.md lacks: {row}");
    }
}

/// A root, a child in a folder below, and a child over that.
fn three(dir: &Path) -> [PathBuf; 3] {
    fs::create_dir(dir.join("base")).unwrap();
    let [root, middle, disk] = ["base/root.vhd", "base/middle.vhd", "disk.vhd"].map(|name| dir.join(name));
    CreateOptions::new(64 << 20).create(&root).unwrap();
    CreateOptions::child_of(&root).create(&middle).unwrap();
    CreateOptions::child_of(&middle).create(&disk).unwrap();
    let open = OpenOptions::new().open(&disk).unwrap();
    open.write_at(&[1; 512], 5 << 20).unwrap();
    open.close().unwrap();
    [disk, middle, root]
}

#[test]
fn a_sound_chain_is_in_order_layer_by_layer() {
    let dir = tempfile::tempdir().unwrap();
    let paths = three(dir.path());
    let chain = checked(&paths[0]);
    assert_eq!(chain.worst(), None, "{}", text(&chain));
    let found: Vec<&Path> = chain.layers().iter().map(|layer| layer.path.as_path()).collect();
    assert_eq!(found, paths.iter().map(PathBuf::as_path).collect::<Vec<_>>());
}

/// The layer in the middle has lost its parent: it is the file that is named, and that is mended.
#[test]
fn damage_far_down_is_named_by_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let [disk, middle, root] = three(dir.path());
    let moved = dir.path().join("base/elsewhere");
    fs::rename(&root, &moved).unwrap();
    let chain = checked(&disk);
    assert_eq!(chain.layers().len(), 2);
    assert_eq!(chain.layers()[1].count(Code::ParentMoved), 1, "{}", text(&chain));
    assert_eq!(chain.parent_candidates(), std::slice::from_ref(&moved));
    let saved = dir.path().join("undo");
    assert_eq!(relink(&OpenOptions::new(), &middle, None, None).unwrap().unwrap(), moved);
    assert_eq!(relink(&OpenOptions::new(), &middle, None, Some(&saved)).unwrap().unwrap(), moved);
    let chain = checked(&disk);
    assert_eq!(chain.layers().len(), 3);
    assert!(chain.worst() <= Some(Severity::Note), "{}", text(&chain));
}

/// A parent elsewhere is found by a folder that the caller allows, never without.
#[test]
fn candidates_come_from_allowed_folders_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (disks, outside) = (dir.path().join("disks"), dir.path().join("outside"));
    fs::create_dir(&disks).unwrap();
    fs::create_dir_all(outside.join("deep/er")).unwrap();
    let (disk, base) = (disks.join("disk.vhd"), disks.join("base.vhd"));
    CreateOptions::new(8 << 20).create(&base).unwrap();
    CreateOptions::child_of(&base).create(&disk).unwrap();
    let moved = outside.join("deep/er/base");
    fs::rename(&base, &moved).unwrap();
    let options = OpenOptions::new();
    assert_eq!(checked(&disk).layers()[0].count(Code::ParentMissing), 1);
    assert_eq!(relink(&options, &disk, None, None).unwrap_err().kind(), ErrorKind::ParentMissing);
    let options = options.allow_parents_in(&outside);
    let chain = check_chain(&options, &disk).unwrap();
    assert_eq!(chain.parent_candidates(), std::slice::from_ref(&moved));
    let saved = dir.path().join("undo");
    assert_eq!(relink(&options, &disk, None, Some(&saved)).unwrap().unwrap(), moved);
    assert!(check_chain(&options, &disk).unwrap().is_sound());
    // What is named is no permission: the policy still holds.
    assert_eq!(checked(&disk).layers()[0].count(Code::ParentMissing), 1);
    // And the caller's own word may be any file, if it is the right one.
    let fourth = dir.path().join("undo-2");
    let wrong = relink(&OpenOptions::new(), &disk, Some(&disk), Some(&fourth));
    assert_eq!(wrong.unwrap_err().kind(), ErrorKind::ParentMissing);
    assert!(!fourth.exists());
    assert_eq!(relink(&OpenOptions::new(), &disk, Some(&moved), Some(&fourth)).unwrap().unwrap(), moved);
}

/// QEMU takes a differencing disk for a dynamic one, writes, and sets whole bitmaps.
#[test]
fn what_qemu_writes_to_a_child_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let [disk, ..] = three(dir.path());
    let output = Command::new("qemu-io")
        .args(["-f", "vpc", "-c", "write -P 9 4M 4k"])
        .arg(&disk)
        .output()
        .unwrap_or_else(|error| panic!("qemu-io: {error}; scripts/install-test-tools installs it"));
    assert!(output.status.success(), "{output:?}");
    let chain = checked(&disk);
    assert_eq!(chain.layers()[0].count(Code::BitmapsAllSet), 1, "{}", text(&chain));
}

#[test]
fn a_parent_in_use_for_writing_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let [disk, middle, _] = three(dir.path());
    let open = HostVfs.open(&middle, Access::ReadOnly).unwrap();
    open.lock(LockMode::Exclusive).unwrap();
    let error = check_chain(&OpenOptions::new(), &disk).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    drop(open);
}

#[test]
fn a_chain_is_deep_above_a_hundred_layers() {
    for (count, deep) in [(100, 0), (101, 1)] {
        let dir = tempfile::tempdir().unwrap();
        layers(dir.path(), count);
        let chain = checked(&dir.path().join("disk.vhd"));
        assert_eq!(chain.layers().len() as u32, count);
        assert_eq!(chain.layers()[0].count(Code::ChainDeep), deep, "{count} layers");
        assert_eq!(chain.layers()[count as usize - 1].count(Code::ParentMissing), 1);
    }
}

/// The caller's word is about the disk's own parent; those beneath are where their children say.
#[test]
fn the_parent_that_the_caller_names_is_that_of_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let [disk, middle, root] = three(dir.path());
    let moved = dir.path().join("base/elsewhere");
    fs::rename(&middle, &moved).unwrap();
    let chain = check_chain(&OpenOptions::new().parent(&moved), &disk).unwrap();
    assert_eq!(chain.worst(), None, "{}", text(&chain));
    let found: Vec<&Path> = chain.layers().iter().map(|layer| layer.path.as_path()).collect();
    assert_eq!(found, [&disk, &moved, &root]);
}

/// A fixed parent has no seal: its child knows how long its file was.
#[test]
fn a_fixed_parent_that_has_grown_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let [base, disk] = ["base.vhd", "disk.vhd"].map(|name| dir.path().join(name));
    CreateOptions::new(1 << 20).fixed().create(&base).unwrap();
    CreateOptions::child_of(&base).create(&disk).unwrap();
    assert_eq!(checked(&disk).worst(), None, "{}", text(&checked(&disk)));
    let mut bytes = fs::read(&base).unwrap();
    let footer = Footer::parse(&bytes.split_off(1 << 20)).unwrap();
    bytes.resize(2 << 20, 0);
    let grown = Footer::new(footer.disk_type, 2 << 20, footer.unique_id, footer.timestamp);
    bytes.extend(grown.to_bytes());
    fs::remove_file(&base).unwrap();
    fs::write(&base, bytes).unwrap();
    let chain = checked(&disk);
    let findings = chain.layers()[0].findings();
    let changed = findings.iter().find(|finding| finding.code == Code::ParentChanged).unwrap();
    assert_eq!(changed.what, "its file has 2097664 bytes, and had 1049088 when this disk was made");
}

/// A child of another program knows when its parent was changed. Whether that was a guest or a copy, the parent tells.
#[test]
fn a_parent_that_changed_after_its_child_of_another_program() {
    let changed = |parent: fn(&Path), seconds_after: i64| {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.vhd");
        CreateOptions::new(8 << 20).create(&base).unwrap();
        parent(&base);
        let modified = fs::metadata(&base).unwrap().modified().unwrap();
        let seconds = modified.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() as i64;
        let noted = Timestamp::from_unix_seconds(seconds - seconds_after);
        child_made_elsewhere(dir.path(), noted);
        let chain = checked(&dir.path().join("disk.vhd"));
        assert_eq!(chain.layers().len(), 2, "{}", text(&chain));
        let count = |code| chain.layers()[0].count(code);
        (count(Code::ParentChanged), count(Code::ParentTime))
    };
    let touched = |base: &Path| {
        let file = fs::File::options().write(true).open(base).unwrap();
        file.set_modified(SystemTime::now() + std::time::Duration::from_secs(100)).unwrap();
    };
    assert_eq!(changed(|_| (), 0), (0, 0));
    assert_eq!(changed(|_| (), 1), (1, 0));
    assert_eq!(changed(|_| (), -1), (0, 1));
    assert_eq!(changed(touched, 1), (0, 1));
    assert_eq!(changed(add_block, 1), (1, 0));
    assert_eq!(changed(add_block, -1), (0, 1));
}

/// A file in the parent's place that cannot say which disk it is may be the parent, damaged: it is that which has to be repaired, and
/// no copy elsewhere is offered.
#[test]
fn a_damaged_parent_in_its_place_is_looked_at_before_copies_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let [disk, middle, _] = three(dir.path());
    fs::copy(&middle, dir.path().join("base/copy.vhd")).unwrap();
    fs::remove_file(&middle).unwrap();
    fs::write(&middle, vec![0x33; 100_000]).unwrap();
    let chain = checked(&disk);
    assert_eq!(chain.layers()[0].count(Code::ParentMissing), 1, "{}", text(&chain));
    assert_eq!((chain.layers().len(), chain.layers()[1].path.as_path()), (2, middle.as_path()));
    assert_eq!(chain.layers()[1].count(Code::HeadersLost), 1, "{}", text(&chain));
    assert_eq!(chain.parent_candidates(), &[] as &[PathBuf]);
}
