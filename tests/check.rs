//! The checker: sound images are found in order, damage is found with its code and place, and nothing is changed by looking.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/qemu.rs"]
mod qemu;

use cowvhd::check::{Code, Consent, Finding, Report, Severity, check, repair, salvage};
use cowvhd::vfs::HostVfs;
use cowvhd::vhd::{DiskType, DynamicHeader, Footer, Timestamp, UniqueId};
use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions};
use qemu::qemu_img;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const TABLE: u64 = 3 * MIB;
const SLOTS: u64 = 7 * MIB;
const STRIDE: u64 = 2 * MIB + 4096;

struct Bench {
    _dir: TempDir,
    path: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Bench { path: dir.path().join("disk.vhd"), _dir: dir }
    }

    /// A disk of 16 blocks, of which three are there.
    fn image() -> Self {
        let bench = Bench::new();
        CreateOptions::new(32 * MIB).create(&bench.path).unwrap();
        let disk = bench.open();
        for block in [0, 3, 15] {
            disk.write_at(&[block as u8 + 1; 4096], block * 2 * MIB + 8192).unwrap();
        }
        disk.close().unwrap();
        bench
    }

    fn open(&self) -> Disk {
        OpenOptions::new().open(&self.path).unwrap()
    }

    fn write(&self, bytes: &[u8], offset: u64) {
        let file = fs::OpenOptions::new().write(true).open(&self.path).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }

    fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        fs::File::open(&self.path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    /// Checks, and sees that nothing changed by it.
    fn check(&self) -> Report {
        let before = fs::read(&self.path).unwrap();
        let report = check(Arc::new(HostVfs), &self.path).unwrap();
        assert!(fs::read(&self.path).unwrap() == before);
        report
    }

    /// Another program adds a block at the end; returns where its bitmap is.
    fn add_block(&self, block: u64, bitmap: &[u8; 512], data: &[u8]) -> u64 {
        let end = fs::metadata(&self.path).unwrap().len() - 512;
        let footer = self.read(end, 512);
        self.write(bitmap, end);
        self.write(data, end + 512);
        self.write(&footer, end + 512 + 2 * MIB);
        self.write(&((end / 512) as u32).to_be_bytes(), TABLE + block * 4);
        end
    }

    fn codes(&self) -> Vec<Code> {
        self.check().codes().map(|(code, _)| code).collect()
    }
}

fn qemu_io(command: &str, path: &Path) {
    let output = Command::new("qemu-io")
        .args(["-f", "vpc", "-c", command])
        .arg(path)
        .output()
        .unwrap_or_else(|error| panic!("qemu-io: {error}; scripts/install-test-tools installs it"));
    assert!(output.status.success(), "{command}: {output:?}");
}

#[test]
fn sound_images_are_in_order() {
    let bench = Bench::new();
    CreateOptions::new(32 * MIB).create(&bench.path).unwrap();
    assert_eq!(bench.codes(), []);
    let bench = Bench::image();
    let report = bench.check();
    assert_eq!((report.worst(), report.allocated_blocks, report.total_blocks), (None, 3, 16));
    assert_eq!(report.virtual_size, Some(32 * MIB));
    let bench = Bench::new();
    CreateOptions::new(MIB + 512).fixed().create(&bench.path).unwrap();
    assert_eq!(bench.codes(), []);
}

#[test]
fn what_qemu_makes_is_in_order() {
    for options in ["subformat=dynamic", "subformat=dynamic,force_size", "subformat=fixed"] {
        let bench = Bench::new();
        let path = bench.path.to_str().unwrap();
        qemu_img(&["create", "-f", "vpc", "-o", options, path, "40M"]);
        for command in ["write -P 1 30M 64k", "write -P 2 0 1k", "write -P 3 5M 3M"] {
            qemu_io(command, &bench.path);
        }
        let report = bench.check();
        assert!(report.worst() <= Some(Severity::Note), "{options}: {:?}", report.findings());
    }
}

/// What QEMU adds to an image of ours is a note.
#[test]
fn blocks_of_another_program_are_a_note() {
    let bench = Bench::image();
    qemu_io("write -P 9 10M 64k", &bench.path);
    assert_eq!(bench.codes(), [Code::ForeignChanges]);
}

/// Most programs look for the footer at the end of the file alone: what somebody appended is a risk, and is told from a footer that is lost.
#[test]
fn a_footer_that_has_something_behind_it_is_named_by_its_place() {
    for junk in [1, 511, 512, 700, 60_000, 100_000] {
        let bench = Bench::image();
        let mut bytes = fs::read(&bench.path).unwrap();
        let at = bytes.len() - 512;
        bytes.resize(bytes.len() + junk, 5);
        fs::write(&bench.path, &bytes).unwrap();
        let report = bench.check();
        let found = report.findings().iter().find(|found| found.code == Code::FooterDamaged).unwrap();
        let what = match junk {
            100_000 => "field cookie (byte 0) is".to_string(),
            _ => format!("it stands at offset {at}, and {junk} bytes behind it"),
        };
        assert!(found.what.contains(&what), "{junk}: {}", found.what);
        assert_eq!(found.severity(), Severity::Risk);
    }
}

#[test]
fn a_disk_that_was_not_closed_is_judged_as_recovered() {
    let bench = Bench::image();
    let disk = bench.open();
    disk.write_at(&[7; 512], 20 * MIB).unwrap();
    disk.flush().unwrap();
    assert_eq!(check(Arc::new(HostVfs), &bench.path).unwrap_err().kind(), ErrorKind::InUse);
    drop(disk);
    let report = bench.check();
    assert_eq!(report.worst(), Some(Severity::Note), "{:?}", report.findings());
    assert_eq!((report.count(Code::NotClosed), report.allocated_blocks), (1, 4));
}

#[test]
fn damage_is_found_with_its_place() {
    let entry = |block: u64| TABLE + block * 4;
    let first = (SLOTS + 4096 - 512) as u32 / 512;
    let cases: [(&str, u64, Vec<u8>, Code, u64); 11] = [
        ("table lost", TABLE, vec![0xff; 4096], Code::BatDamaged, TABLE),
        ("an entry lost", entry(3), vec![0xff; 4], Code::BatDamaged, TABLE),
        ("an entry past the end", entry(3), 0x00ff_0000_u32.to_be_bytes().into(), Code::BatDamaged, TABLE),
        ("an entry in the journal", entry(9), 1000_u32.to_be_bytes().into(), Code::BatDamaged, TABLE),
        ("an entry twice", entry(9), first.to_be_bytes().into(), Code::BatDamaged, TABLE),
        ("start lost", 0, vec![0; 4096], Code::FrontDamaged, 0),
        ("superblock A lost", 4096, vec![0; 4096], Code::SuperblockDamaged, 4096),
        ("superblock B lost", 8192, vec![0x55; 4096], Code::SuperblockDamaged, 8192),
        ("backup lost", 12288, vec![0; 4096], Code::BackupDamaged, 12288),
        ("block page lost", SLOTS + STRIDE, vec![0; 4096], Code::BlockHeader, SLOTS + STRIDE),
        ("bitmap lost", SLOTS + 3584, vec![0; 512], Code::BitmapClear, SLOTS + 3584),
    ];
    for (name, offset, bytes, code, at) in cases {
        let bench = Bench::image();
        bench.write(&bytes, offset);
        let report = bench.check();
        let finding = report.findings().iter().find(|finding| finding.code == code);
        let finding = finding.unwrap_or_else(|| panic!("{name}: {:?}", report.findings()));
        assert_eq!(finding.offset, Some(at), "{name}");
        let worse = report.findings().iter().filter(|finding| finding.severity() > Severity::Note);
        assert_eq!(worse.count(), 1, "{name}: {:?}", report.findings());
    }
    let bench = Bench::image();
    let end = fs::metadata(&bench.path).unwrap().len() - 512;
    bench.write(&[0; 512], end);
    assert!(bench.codes().contains(&Code::FooterDamaged));
    let bench = Bench::image();
    bench.write(&[0; 8192], 4096);
    assert_eq!(bench.codes(), [Code::SuperblocksLost]);
}

/// Where another program has been in the file, headers prove nothing, and each entry is judged by itself.
#[test]
fn entries_that_cannot_be_right_are_found_one_by_one() {
    let first = (SLOTS + 4096 - 512) as u32 / 512;
    for (entry, code, what) in [
        (0x00ff_0000, Code::BatRange, "past the end"),
        (0xffff_fffe, Code::BatRange, "past the end"),
        (0, Code::BatMetadata, "over the footer copy"),
        (2, Code::BatMetadata, "over the dynamic header"),
        (8, Code::BatMetadata, "over the superblocks"),
        (1000, Code::BatMetadata, "over the journal ring"),
        (5000, Code::BatMetadata, "over the block table"),
        (6144, Code::BatMetadata, "over the block table"),
        (first, Code::BatOverlap, "shares 2097664 bytes with block 0"),
        (first + 1, Code::BatOverlap, "shares 2097152 bytes with block 0"),
        (first + 4095, Code::BatOverlap, "shares 1024 bytes with block 0"),
    ] {
        let bench = Bench::image();
        qemu_io("write -P 9 10M 64k", &bench.path);
        bench.write(&u32::to_be_bytes(entry), TABLE + 9 * 4);
        let report = bench.check();
        let said = |finding: &Finding| finding.code == code && finding.what.contains(what);
        assert!(report.findings().iter().any(said), "{entry}: {:?}", report.findings());
        assert_eq!(report.findings().last().map(|f| f.code), Some(code));
    }
}

#[test]
fn what_is_no_vhd_is_said_so() {
    let bench = Bench::new();
    fs::write(&bench.path, vec![7; 10_000]).unwrap();
    assert_eq!(bench.codes(), [Code::HeadersLost]);
    fs::write(&bench.path, []).unwrap();
    assert_eq!(bench.codes(), [Code::HeadersLost]);
    assert_eq!(check(Arc::new(HostVfs), Path::new("/no/such/file")).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(check(Arc::new(HostVfs), Path::new("/")).unwrap_err().kind(), ErrorKind::Io);
}

#[test]
fn findings_are_bounded_and_counted() {
    let bench = Bench::new();
    CreateOptions::new(2048 * 2 * MIB).create(&bench.path).unwrap();
    bench.write(&[0; 8192], TABLE);
    let report = bench.check();
    assert_eq!(report.count(Code::BatDamaged), 1);
    bench.write(&[0, 0, 0, 1].repeat(2048), TABLE);
    let end = fs::metadata(&bench.path).unwrap().len() - 512;
    let footer = bench.read(end, 512);
    bench.write(&footer, end + STRIDE);
    bench.write(&[0; 512], 8192);
    bench.write(&[0; 512], 4096);
    let report = bench.check();
    assert_eq!(report.count(Code::BatMetadata), 2048);
    let by_severity = [Severity::Note, Severity::Leak, Severity::Risk, Severity::Corruption];
    let counted = by_severity.map(|severity| report.count_severity(severity));
    assert_eq!(counted.iter().sum::<u64>(), report.codes().map(|(_, count)| count).sum::<u64>());
    assert!(counted[3] >= 2048, "{counted:?}");
    assert!(report.findings().len() < 100);
}

/// docs/check.md lists every code, and nothing else.
#[test]
fn every_code_is_documented() {
    let document = include_str!("../docs/check.md");
    for code in Code::ALL {
        let row = format!("| `{code}` | {} | {} | {} |\n", code.severity(), code.means(), code.repair());
        assert!(document.contains(&row), "docs/check.md lacks: {row}");
    }
    assert_eq!(
        document
            .lines()
            .filter(|line| line.starts_with("| `") && line.ends_with(" |") && line.split(" | ").count() == 4)
            .count(),
        Code::ALL.len()
    );
}

/// The first page of slot 0 is a hole of the file, its data is not: the headers of the other slots are found, and give a lost table back.
#[test]
fn a_slot_that_begins_with_a_hole_hides_no_other() {
    let bench = Bench::image();
    let mut bytes = fs::read(&bench.path).unwrap();
    bytes[SLOTS as usize..][..4096].fill(0);
    bytes[TABLE as usize..][..4096].fill(0);
    fs::remove_file(&bench.path).unwrap();
    let file = fs::File::create(&bench.path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (at, page) in
        (0..).step_by(4096).zip(bytes.chunks(4096)).filter(|(_, page)| page.iter().any(|&b| b != 0))
    {
        file.write_all_at(page, at).unwrap();
    }
    let undo = bench.path.with_extension("undo");
    let repaired = repair(Arc::new(HostVfs), &bench.path, Consent::All, &undo).unwrap();
    assert!(repaired.is_sound(), "{:?}", repaired.after.findings());
    let disk = OpenOptions::new().read_only(true).open(&bench.path).unwrap();
    for (block, value) in [(0, 0), (3, 4), (15, 16)] {
        let mut data = [0; 4096];
        disk.read_at(&mut data, block * 2 * MIB + 8192).unwrap();
        assert_eq!(data, [value; 4096], "block {block}: {:?}", repaired.steps);
    }
}

/// A gap is a leak if a block of the kind behind it would fit: one of another program has a bitmap of a sector, and no page.
#[test]
fn a_gap_in_front_of_a_block_of_another_program_is_a_leak_if_a_block_would_fit() {
    for (gap, leaks) in [(2 * MIB + 512, 1), (2 * MIB, 0)] {
        let bench = Bench::image();
        let end = fs::metadata(&bench.path).unwrap().len() - 512;
        let footer = bench.read(end, 512);
        bench.write(&[&vec![0x55; gap as usize], footer.as_slice()].concat(), end);
        bench.add_block(7, &[0xff; 512], &[7; 4096]);
        let report = bench.check();
        assert_eq!(report.count(Code::LeakedSpace), leaks, "{gap}: {:?}", report.findings());
        let place = report.findings().iter().find(|finding| finding.code == Code::LeakedSpace);
        assert_eq!(place.and_then(|place| place.offset), (leaks > 0).then_some(end));
        assert_eq!(report.leaked_bytes, leaks * 2 * MIB);
    }
}

/// A sector with a clear bit reads as zeros here, and as what is there elsewhere: the first one that differs is named, however far
/// behind the first clear bit; what stands beneath set bits is nobody's business.
#[test]
fn data_beneath_clear_bits_is_named_by_its_first_sector() {
    for (hidden, found) in [(vec![16], Some(16)), (vec![4095, 316], Some(316)), (vec![15], None)] {
        let bench = Bench::image();
        let mut bitmap = [0; 512];
        bitmap[..2].fill(0xff);
        let mut data = vec![0; 2 << 20];
        data[..16 * 512].fill(9);
        hidden.iter().for_each(|sector| data[sector * 512 + 7] = 1);
        let at = bench.add_block(5, &bitmap, &data);
        let report = bench.check();
        let finding = report.findings().iter().find(|finding| finding.code == Code::BitmapHidden);
        let what = found.map(|sector| format!("block 5: sector {sector} of it is not zero"));
        assert_eq!(finding.map(|finding| finding.what.clone()), what, "{:?}", report.findings());
        assert_eq!(finding.and_then(|finding| finding.offset), found.map(|_| at));
    }
}

/// Files beside a disk that a checkpoint or a revert left; those of other disks, and states that are whole, are none of them.
#[test]
fn what_is_left_beside_a_disk_is_named() {
    let bench = Bench::new();
    let folder = bench.path.parent().unwrap();
    let found = |disk: &str| {
        let report = check(Arc::new(HostVfs), &folder.join(disk)).unwrap();
        report.findings().iter().map(|found| format!("{}: {}", found.code, found.what)).collect::<Vec<_>>()
    };
    for disk in ["vm.vhd", "vm.img", "fixed.vhd"] {
        let options = CreateOptions::new(4 * MIB);
        let options = if disk == "fixed.vhd" { options.fixed() } else { options };
        options.create(&folder.join(disk)).unwrap();
    }
    for name in [
        "vm@one+ram.vmstate",
        "vm@one+device.vmstate",
        "vm@two+ram.vmstate",
        "vm@two.vmstate",
        "vm@three+ram",
        "vm@four.vmstate+ram",
        "other@five+ram.vmstate",
        "fixed@six+ram.vmstate",
    ] {
        fs::write(folder.join(name), "").unwrap();
    }
    let one = "state-incomplete: the manifest of the state \"one\" is missing: vm@one+device.vmstate, vm@one+ram.vmstate";
    assert_eq!(found("vm.vhd"), [one]);
    assert_eq!(found("vm.img"), [""; 0]);
    let six = "state-incomplete: the manifest of the state \"six\" is missing: fixed@six+ram.vmstate";
    assert_eq!(found("fixed.vhd"), [six]);
    fs::write(folder.join("vm.vhd~new"), "").unwrap();
    assert_eq!(found("vm.vhd"), ["revert-unfinished: vm.vhd~new is there", one]);
}

/// The head of a temporary journal, which ends the file of an image made elsewhere while it is open, holds no blocks.
#[test]
fn a_block_over_the_head_of_a_temporary_journal_is_found() {
    let bench = Bench::new();
    let mut footer =
        Footer::new(DiskType::Dynamic, 256 << 10, UniqueId::from_bytes([5; 16]), Timestamp(1 << 29));
    footer.creator_app = *b"test";
    let footer = footer.to_bytes();
    let header = DynamicHeader::new(1536, 64, 4096).to_bytes();
    fs::write(&bench.path, [&footer[..], &header, &[0xff; 512], &footer].concat()).unwrap();
    let disk = bench.open();
    disk.write_at(&[3; 4096], 0).unwrap();
    disk.flush().unwrap();
    drop(disk);
    // Where the dirty header says that it is; its table is the page in front of it.
    let head = u64::from_be_bytes(bench.read(512 + 8, 8).try_into().unwrap());
    let table = head - 4096;
    assert_eq!(bench.read(table + 4, 4), [0xff; 4]);
    bench.write(&u32::try_from((head + 8192) / 512).unwrap().to_be_bytes(), table + 4);
    let report = check(Arc::new(HostVfs), &bench.path).unwrap();
    let found: Vec<String> =
        report.findings().iter().map(|found| format!("{}: {}", found.code, found.what)).collect();
    let what = format!("bat-metadata: block 1 is at offset {}, over the temporary journal", head + 8192);
    assert!(found.contains(&what), "{found:?}");
    // No repair mends that; what is sound is saved.
    let saved = bench.path.with_file_name("saved.vhd");
    let salvaged = salvage(Arc::new(HostVfs), &bench.path, &saved).unwrap();
    assert_eq!(salvaged.lost, std::slice::from_ref(&(4096..8192)));
    let mut found = [0; 8192];
    OpenOptions::new().read_only(true).open(&saved).unwrap().read_at(&mut found, 0).unwrap();
    assert!(found[..4096] == [3; 4096] && found[4096..] == [0; 4096]);
}
