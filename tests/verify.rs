//! CRCs of sealed data: written once, they tell any later change of the medium, to the 4 KiB; what is not proven is said so.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use cowvhd::check::{Code, Coverage, Report, Verified, check, verify, write_crcs};
use cowvhd::snapshot::{Checkpoint, SnapshotName};
use cowvhd::vfs::HostVfs;
use cowvhd::vhd::{DynamicHeader, HeaderCookie};
use cowvhd::{CreateOptions, ErrorKind, OpenOptions};
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
const SLOTS: u64 = 7 * MIB;
const STRIDE: u64 = BLOCK + 4096;

struct Bench {
    dir: TempDir,
}

impl Bench {
    /// A disk of 32 MiB with two snapshots: `first` has blocks 0, 3 and 15 in this order of its slots, `second` parts of 3 and 4.
    fn new() -> Self {
        let bench = Bench { dir: tempfile::tempdir().unwrap() };
        CreateOptions::new(32 * MIB).create(&bench.path("vm.vhd")).unwrap();
        let disk = OpenOptions::new().open(&bench.path("vm.vhd")).unwrap();
        for block in [0, 3, 15] {
            disk.write_at(&pattern(64 << 10, block), block * BLOCK + 8192).unwrap();
        }
        disk.snapshot(&SnapshotName::new("first").unwrap()).unwrap();
        // The second unit as it was before.
        disk.write_at(&pattern(4096, 77), 3 * BLOCK + 8192).unwrap();
        disk.write_at(&pattern(64 << 10, 3)[4096..8192], 3 * BLOCK + 12288).unwrap();
        disk.write_at(&pattern(512, 78), 4 * BLOCK + 512).unwrap();
        disk.snapshot(&SnapshotName::new("second").unwrap()).unwrap();
        disk.write_at(&pattern(4096, 79), 9 * BLOCK).unwrap();
        disk.close().unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn verify(&self, seal: bool) -> Verified {
        verify(&OpenOptions::new(), &self.path("vm.vhd"), seal, &mut |_, _| ControlFlow::Continue(()))
            .unwrap()
    }

    /// The same of sealed layers alone.
    fn verify_sealed(&self, name: &str, seal: bool) -> Verified {
        verify(&OpenOptions::new(), &self.path(name), seal, &mut |_, _| ControlFlow::Continue(())).unwrap()
    }

    fn write(&self, name: &str, bytes: &[u8], offset: u64) {
        let path = self.path(name);
        let before = fs::metadata(&path).unwrap();
        let mut writable = before.permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut writable, 0o644);
        fs::set_permissions(&path, writable).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(bytes, offset).unwrap();
        // The medium changes no times.
        file.set_modified(before.modified().unwrap()).unwrap();
    }
}

fn pattern(length: usize, seed: u64) -> Vec<u8> {
    (0..length).map(|at| (at as u64 * 31 + seed * 7 + at as u64 / 512) as u8).collect()
}

fn codes(report: &Report) -> Vec<Code> {
    report.codes().map(|(code, _)| code).collect()
}

fn written(verified: &Verified) -> Vec<u64> {
    verified.coverage().iter().map(|coverage| coverage.written_pages).collect()
}

#[test]
fn crcs_are_written_once_and_prove_the_data() {
    let bench = Bench::new();
    let before = bench.verify(false);
    let layers = before.chain().layers();
    assert_eq!(layers.len(), 3);
    assert_eq!(codes(&layers[0]), []);
    assert_eq!(codes(&layers[1]), [Code::CrcsMissing]);
    assert_eq!(codes(&layers[2]), [Code::CrcsMissing]);
    assert!(before.chain().is_sound());
    // The leaf is not sealed; of the child's blocks only what it holds counts.
    assert_eq!(before.coverage()[0].unproven_bytes, BLOCK);
    assert_eq!(before.coverage()[1], Coverage { unproven_bytes: 3 * 4096, ..Coverage::default() });
    assert_eq!(before.coverage()[2], Coverage { unproven_bytes: 3 * BLOCK, ..Coverage::default() });

    let stamp = |name: &str| {
        let metadata = fs::metadata(bench.path(name)).unwrap();
        (metadata.len(), metadata.modified().unwrap(), metadata.permissions())
    };
    let stamps = [stamp("vm@first.vhd"), stamp("vm@second.vhd")];
    let sealed = bench.verify(true);
    // 2 and 3 times 513 words.
    assert_eq!(written(&sealed), [0, 2, 2]);
    assert_eq!([stamp("vm@first.vhd"), stamp("vm@second.vhd")], stamps);
    for verified in [sealed, bench.verify(false)] {
        assert_eq!(verified.chain().worst(), None, "{:?}", verified.chain().codes());
        assert_eq!(verified.coverage()[1].compared_bytes, 3 * 4096);
        assert_eq!(verified.coverage()[2].compared_bytes, 3 * BLOCK);
        assert!(verified.coverage()[1..].iter().all(|coverage| coverage.unproven_bytes == 0));
    }
    assert_eq!(written(&bench.verify(true)), [0, 0, 0]);
    let mut progress = Vec::new();
    verify(&OpenOptions::new(), &bench.path("vm.vhd"), false, &mut |done, all| {
        progress.push((done, all));
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(progress, [(2 * BLOCK, 2 * BLOCK), (3 * BLOCK, 3 * BLOCK)], "one batch of each sealed layer");
    assert_eq!(check(Arc::new(HostVfs), &bench.path("vm@first.vhd")).unwrap().worst(), None);
}

/// Also while a disk over the layers is open and written to.
#[test]
fn crcs_are_written_beside_a_running_disk() {
    let bench = Bench::new();
    let disk = OpenOptions::new().open(&bench.path("vm.vhd")).unwrap();
    assert_eq!(written(&bench.verify_sealed("vm@second.vhd", true)), [2, 2]);
    disk.write_at(&[1; 4096], 0).unwrap();
    let mut read = vec![0; 4096];
    disk.read_at(&mut read, 3 * BLOCK + 8192).unwrap();
    assert_eq!(read, pattern(4096, 77));
    disk.close().unwrap();
    assert_eq!(bench.verify(false).chain().worst(), None);
}

#[test]
fn rot_is_found_with_its_place_on_the_disk_and_in_the_file() {
    let bench = Bench::new();
    bench.verify(true);
    // Block 15 is in the third slot: its units 2 to 17 were written. The last byte of one and the first of the next.
    let data = SLOTS + 2 * STRIDE + 4096;
    bench.write("vm@first.vhd", &[0xff; 2], data + 5 * 4096 - 1);
    // A unit that was never written, and reads as zeros.
    bench.write("vm@first.vhd", &[1], data + 400 * 4096 + 17);
    let verified = bench.verify(false);
    let report = &verified.chain().layers()[2];
    assert_eq!(codes(report), [Code::DataDamaged]);
    let places: Vec<_> = report
        .findings()
        .iter()
        .map(|f| (f.offset.unwrap(), f.block.unwrap(), f.guest.clone().unwrap()))
        .collect();
    let guest = 15 * BLOCK;
    assert_eq!(
        places,
        [
            (data + 4 * 4096, 15, guest + 4 * 4096..guest + 6 * 4096),
            (data + 400 * 4096, 15, guest + 400 * 4096..guest + 401 * 4096)
        ]
    );
    assert!(report.findings()[0].what.contains("no parent has them"), "{report:?}");
    assert_eq!(codes(&verified.chain().layers()[1]), []);
    // Sealing again does not make it right.
    let again = bench.verify(true);
    assert_eq!(again.chain().layers()[2].count(Code::DataDamaged), 2);
    assert_eq!(written(&again), [0, 0, 0]);
}

#[test]
fn a_parent_that_still_has_it_is_named() {
    let bench = Bench::new();
    bench.verify(true);
    // Both units of block 3 that the second snapshot holds: only the latter is in the first, too.
    let data = SLOTS + 4096;
    for (unit, intact) in [(2, false), (3, true)] {
        bench.write("vm@second.vhd", &[0xee; 100], data + unit * 4096 + 50);
        let verified = bench.verify(false);
        let report = &verified.chain().layers()[1];
        let finding = report.findings().last().unwrap();
        assert_eq!(finding.code, Code::DataDamaged);
        let start = 3 * BLOCK + unit * 4096;
        match intact {
            false => {
                assert_eq!(finding.guest, Some(start..start + 4096));
                assert!(finding.what.ends_with("no parent has them"), "{finding:?}");
                let path = bench.path("vm@second.vhd");
                bench.write("vm@second.vhd", &pattern(4096, 77), data + unit * 4096);
                assert_eq!(check(Arc::new(HostVfs), &path).unwrap().worst(), None);
            }
            true => assert!(finding.what.ends_with("vm@first.vhd still has them"), "{finding:?}"),
        }
    }
}

/// A parent that is a child itself holds what its bitmap says, unit by unit: what stands beneath a clear bit is not what was there,
/// even if it is the same.
#[test]
fn a_parent_has_the_units_that_its_bitmap_says() {
    let bench = Bench { dir: tempfile::tempdir().unwrap() };
    CreateOptions::new(32 * MIB).create(&bench.path("vm.vhd")).unwrap();
    let disk = OpenOptions::new().open(&bench.path("vm.vhd")).unwrap();
    let (held, clear) = (3 * BLOCK + 5 * 4096, 3 * BLOCK + 2 * 4096);
    for (name, units) in [("first", &[][..]), ("second", &[held]), ("third", &[held, clear])] {
        for &at in units {
            disk.write_at(&if at == held { pattern(4096, 5) } else { vec![0; 4096] }, at).unwrap();
        }
        disk.snapshot(&SnapshotName::new(name).unwrap()).unwrap();
    }
    disk.close().unwrap();
    // The first layer is sealed, too, and has no data that would want CRCs.
    assert_eq!(bench.verify(true).chain().worst(), None);
    for unit in [5, 2] {
        bench.write("vm@third.vhd", &[0xee; 100], SLOTS + 4096 + unit * 4096);
    }
    let verified = bench.verify(false);
    let findings = verified.chain().layers()[1].findings();
    let said = |at: u64| {
        let finding = findings.iter().find(|finding| finding.guest == Some(at..at + 4096));
        finding.unwrap_or_else(|| panic!("{findings:?}")).what.clone()
    };
    assert!(said(held).ends_with("vm@second.vhd still has them"), "{findings:?}");
    assert!(said(clear).ends_with("no parent has them"), "{findings:?}");
}

#[test]
fn a_bitmap_that_changed_is_found() {
    let bench = Bench::new();
    bench.verify(true);
    // Block 4 is in the second slot: its first unit is there.
    for bits in [[0, 0], [0xff, 0xff]] {
        bench.write("vm@second.vhd", &bits, SLOTS + STRIDE + 3584);
        let verified = bench.verify(false);
        let report = &verified.chain().layers()[1];
        assert_eq!(codes(report), [Code::BitmapDamaged]);
        let finding = &report.findings()[0];
        assert_eq!((finding.offset, finding.block), (Some(SLOTS + STRIDE + 3584), Some(4)));
    }
}

#[test]
fn a_damaged_page_of_crcs_proves_nothing_and_is_made_again() {
    let bench = Bench::new();
    bench.verify(true);
    let crcs = SLOTS + 3 * STRIDE;
    bench.write("vm@first.vhd", &[1; 64], crcs + 4096 + 100);
    let verified = bench.verify(false);
    let report = &verified.chain().layers()[2];
    assert_eq!(codes(report), [Code::CrcsDamaged, Code::CrcsMissing]);
    assert_eq!(report.findings()[0].offset, Some(crcs + 4096));
    // 1016 words are the first block, and all but ten of the second.
    let unproven = verified.coverage()[2].unproven_bytes;
    assert_eq!(unproven, (3 * 512 - 1014) * 4096);
    assert_eq!(verified.coverage()[2].compared_bytes, 3 * BLOCK - unproven);
    assert_eq!(written(&bench.verify(true)), [0, 0, 1]);
    assert_eq!(bench.verify(false).chain().worst(), None);
    // Pages of another seal, or in the wrong place.
    let page = {
        let mut page = vec![0; 4096];
        fs::File::open(bench.path("vm@second.vhd"))
            .unwrap()
            .read_exact_at(&mut page, SLOTS + 2 * STRIDE)
            .unwrap();
        page
    };
    bench.write("vm@first.vhd", &page, crcs);
    assert_eq!(bench.verify(false).chain().layers()[2].count(Code::CrcsDamaged), 1);
    bench.write("vm@second.vhd", &page, SLOTS + 2 * STRIDE + 4096);
    assert_eq!(bench.verify(false).chain().layers()[1].count(Code::CrcsDamaged), 1);
}

/// CRCs are about the file as it was sealed: what another program makes of it is not called damage.
#[test]
fn a_file_that_lost_its_crcs_is_sound_and_not_proven() {
    let bench = Bench::new();
    bench.verify(true);
    let path = bench.path("vm@first.vhd");
    let length = fs::metadata(&path).unwrap().len();
    let mut footer = vec![0; 512];
    fs::File::open(&path).unwrap().read_exact_at(&mut footer, length - 512).unwrap();
    bench.write("vm@first.vhd", &footer, SLOTS + 3 * STRIDE);
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(SLOTS + 3 * STRIDE + 512).unwrap();
    let verified = bench.verify_sealed("vm@first.vhd", true);
    assert_eq!(codes(&verified.chain().layers()[0]), [Code::ForeignChanges, Code::CrcsMissing]);
    assert_eq!(verified.coverage()[0], Coverage { unproven_bytes: 3 * BLOCK, ..Coverage::default() });
}

/// A layer that takes over what a deleted one held has other data: room is made anew.
#[test]
fn a_layer_that_was_merged_into_is_sealed_anew() {
    let bench = Bench::new();
    bench.verify(true);
    let name = SnapshotName::new("first").unwrap();
    let disk = bench.path("vm.vhd");
    cowvhd::snapshot::delete(&OpenOptions::new(), &disk, &name, &mut |_| ControlFlow::Continue(())).unwrap();
    let verified = bench.verify(false);
    assert_eq!(verified.chain().layers().len(), 2);
    assert_eq!(codes(&verified.chain().layers()[1]), [Code::CrcsMissing]);
    assert_eq!(verified.coverage()[1].unproven_bytes, 4 * BLOCK);
    assert_eq!(written(&bench.verify(true)), [0, 3]);
    assert_eq!(bench.verify(false).chain().worst(), None);
}

#[test]
fn verifying_ends_when_it_is_told_to() {
    let bench = Bench::new();
    let error = verify(&OpenOptions::new(), &bench.path("vm.vhd"), true, &mut |done, total| {
        assert!(done > 0 && done <= total);
        ControlFlow::Break(())
    })
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(
        verify(&OpenOptions::new(), Path::new("/none"), false, &mut |_, _| ControlFlow::Continue(()))
            .unwrap_err()
            .kind(),
        ErrorKind::Io
    );
}

/// A VM state that belongs to a snapshot is compared with its digests: each of its blobs, and the manifest.
#[test]
fn the_state_of_a_vm_is_verified_too() {
    let bench = Bench::new();
    let saved = bench.path("saved");
    fs::write(&saved, pattern(100_000, 5)).unwrap();
    let disk = OpenOptions::new().open(&bench.path("vm.vhd")).unwrap();
    let checkpoint = Checkpoint::begin(&[&disk], &SnapshotName::new("third").unwrap()).unwrap();
    checkpoint.blob_from("ram", &saved).unwrap();
    checkpoint.blob_from("device", &saved).unwrap();
    checkpoint.commit().unwrap();
    disk.close().unwrap();
    let layer = |bench: &Bench| bench.verify(true).chain().layers()[1].clone();
    assert_eq!(codes(&layer(&bench)), []);
    bench.write("vm@third+ram.vmstate", &[0xee], 70_000);
    let report = layer(&bench);
    assert_eq!((codes(&report), report.count(Code::StateDamaged)), (vec![Code::StateDamaged], 1));
    assert!(report.findings()[0].what.contains("vm@third+ram.vmstate"), "{report:?}");
    fs::remove_file(bench.path("vm@third+device.vmstate")).unwrap();
    assert_eq!(codes(&layer(&bench)), [Code::StateDamaged]);
    bench.write("vm@third.vmstate", &[0xee], 30);
    let report = layer(&bench);
    assert_eq!(codes(&report), [Code::StateDamaged]);
    assert!(report.findings()[0].what.contains("vm@third.vmstate"), "{report:?}");
}

/// What a server does beside its disk after a snapshot: the CRCs are the same as those that `verify` writes.
#[test]
fn the_crcs_of_one_layer_are_written_without_the_others() {
    let bench = Bench::new();
    let mut go = |_, _| ControlFlow::Continue(());
    let mut write = |name: &str| write_crcs(Arc::new(HostVfs), &bench.path(name), &mut go).unwrap();
    let coverage = write("vm@second.vhd");
    assert!(coverage.written_pages > 0 && coverage.compared_bytes > 0, "{coverage:?}");
    assert_eq!(coverage.unproven_bytes, 0);
    assert_eq!(write("vm@second.vhd").written_pages, 0, "they are there");
    assert_eq!(write("vm.vhd"), Coverage::default(), "it is not sealed");
    let one_by_one = fs::read(bench.path("vm@second.vhd")).unwrap();
    let verified = bench.verify(true);
    assert_eq!(written(&verified)[1], 0);
    assert!(verified.chain().is_sound() && written(&verified)[2] > 0);
    assert!(fs::read(bench.path("vm@second.vhd")).unwrap() == one_by_one);
    let stopped =
        write_crcs(Arc::new(HostVfs), &bench.path("vm@first.vhd"), &mut |_, _| ControlFlow::Break(()));
    assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
}

/// The room for CRCs ends at the footer of a layer that is closed; elsewhere, and in a layer that is not, it counts for nothing.
#[test]
fn crcs_count_in_a_closed_layer_and_in_front_of_its_footer() {
    let spoil: [fn(&Bench); 2] = [
        |bench| {
            let mut bytes = [0; DynamicHeader::SIZE];
            fs::File::open(bench.path("vm@first.vhd")).unwrap().read_exact_at(&mut bytes, 512).unwrap();
            let header = DynamicHeader::parse(&bytes).unwrap();
            bench.write(
                "vm@first.vhd",
                &DynamicHeader { cookie: HeaderCookie::Dirty, ..header }.to_bytes(),
                512,
            );
        },
        |bench| {
            let bytes = fs::read(bench.path("vm@first.vhd")).unwrap();
            let (_, footer) = bytes.split_at(bytes.len() - 512);
            bench.write(
                "vm@first.vhd",
                &[&[0; 512], &[0; 3584][..], footer].concat(),
                bytes.len() as u64 - 512,
            );
        },
    ];
    for (number, spoil) in spoil.iter().enumerate() {
        let bench = Bench::new();
        let sealed = bench.verify(true);
        assert_eq!(sealed.coverage()[2].compared_bytes, 3 * BLOCK);
        spoil(&bench);
        let verified = bench.verify(false);
        assert_eq!(verified.coverage()[1].compared_bytes, 3 * 4096, "{number}");
        let unproven = Coverage { unproven_bytes: 3 * BLOCK, ..Coverage::default() };
        assert_eq!(verified.coverage()[2], unproven, "{number}");
        assert_eq!(verified.chain().layers()[2].count(Code::CrcsMissing), 1, "{number}");
    }
}

/// What a fixed parent holds at the same place of the disk is asked, too: only if it is the same there, it has it.
#[test]
fn a_fixed_parent_that_still_has_it_is_named() {
    let bench = Bench { dir: tempfile::tempdir().unwrap() };
    let base = bench.path("base.vhd");
    CreateOptions::new(8 * MIB).fixed().create(&base).unwrap();
    let disk = OpenOptions::new().open(&base).unwrap();
    disk.write_at(&pattern(4096, 5), 3 * BLOCK + 4096).unwrap();
    disk.close().unwrap();
    CreateOptions::child_of(&base).create(&bench.path("vm.vhd")).unwrap();
    let disk = OpenOptions::new().open(&bench.path("vm.vhd")).unwrap();
    disk.write_at(&pattern(4096, 4), 3 * BLOCK).unwrap();
    disk.write_at(&pattern(4096, 5), 3 * BLOCK + 4096).unwrap();
    disk.snapshot(&SnapshotName::new("first").unwrap()).unwrap();
    disk.close().unwrap();
    bench.verify(true);
    for (unit, said) in [(1, "base.vhd still has them"), (0, "no parent has them")] {
        bench.write("vm@first.vhd", &[0xee; 100], SLOTS + 4096 + unit * 4096);
        let verified = bench.verify(false);
        let start = 3 * BLOCK + unit * 4096;
        let findings = verified.chain().layers()[1].findings();
        let finding =
            findings.iter().find(|finding| finding.guest.as_ref().unwrap().contains(&start)).unwrap();
        assert!(finding.what.ends_with(said), "{findings:?}");
    }
}

#[test]
fn the_data_of_a_fixed_parent_is_not_proven() {
    let dir = tempfile::tempdir().unwrap();
    let [base, disk] = ["base.vhd", "disk.vhd"].map(|name| dir.path().join(name));
    CreateOptions::new(3 * MIB).fixed().create(&base).unwrap();
    CreateOptions::child_of(&base).create(&disk).unwrap();
    let verified = verify(&OpenOptions::new(), &disk, false, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let unproven = Coverage { unproven_bytes: 3 * MIB, ..Coverage::default() };
    assert_eq!(verified.coverage(), [Coverage::default(), unproven]);
}
