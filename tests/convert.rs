//! Conversions: every kind into every kind, holes stay holes, and the new image is there complete or not at all.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/sharing_file_systems.rs"]
mod sharing_file_systems;
#[path = "support/strict_vhd.rs"]
mod strict_vhd;

use cowvhd::convert::{ConvertOptions, Converted, Format, Phase};
use cowvhd::{CreateOptions, ErrorKind, OpenOptions, Result};
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use strict_vhd::{Guest, Kind, StrictVhd};

const MIB: u64 = 1 << 20;

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Bench { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A raw disk of a few pieces of data and many holes.
    fn raw(&self, name: &str, size: u64) -> Vec<u8> {
        let mut content = vec![0; size as usize];
        let file = fs::File::create(self.path(name)).unwrap();
        file.set_len(size).unwrap();
        let pieces = [(0, 1), (700, 513), (2 * MIB - 300, 1000), (3 * MIB, 300_000), (size - 1, 1)];
        for (number, (at, length)) in pieces.into_iter().enumerate() {
            let end = (at + length).min(size);
            if at < end {
                let piece: Vec<u8> = (at..end).map(|i| (i % 251) as u8 | 1 << (number % 8)).collect();
                file.write_all_at(&piece, at).unwrap();
                content[at as usize..end as usize].copy_from_slice(&piece);
            }
        }
        content
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn convert(&self, options: &ConvertOptions, from: &str, to: &str) -> Result<Converted> {
        options.run(&self.path(from), &self.path(to), &mut |_| ControlFlow::Continue(()))
    }
}

fn blocks(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks()
}

fn strict_content(path: &Path) -> (Kind, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let mut strict = StrictVhd::from_bytes(&bytes).unwrap();
    let mut content = vec![0; strict.size() as usize];
    strict.read_at(0, &mut content).unwrap();
    (strict.kind(), content)
}

#[test]
fn every_kind_becomes_every_kind_and_stays_sparse() {
    let by_name = ConvertOptions::new();
    for size in [512, 3 * 512, 4 * MIB, 17 * MIB + 512, 17 * MIB + 7 * 512, 20 * MIB] {
        let bench = Bench::new();
        let content = bench.raw("a.raw", size);
        let converted = bench.convert(&by_name, "a.raw", "b.vhd").unwrap();
        assert_eq!((converted.size, converted.padding), (size, 0));
        assert!(strict_content(&bench.path("b.vhd")) == (Kind::Dynamic, content.clone()), "{size}");
        bench.convert(&by_name.clone().to(Format::Fixed), "b.vhd", "c.vhd").unwrap();
        assert!(strict_content(&bench.path("c.vhd")) == (Kind::Fixed, content.clone()), "{size}");
        bench.convert(&by_name, "c.vhd", "d.VHD").unwrap();
        assert!(strict_content(&bench.path("d.VHD")) == (Kind::Dynamic, content.clone()), "{size}");
        bench.convert(&by_name, "d.VHD", "e.img").unwrap();
        assert!(fs::read(bench.path("e.img")).unwrap() == content, "{size}");
        bench.convert(&by_name, "e.img", "f.img").unwrap();
        assert!(fs::read(bench.path("f.img")).unwrap() == content, "{size}");
        assert_eq!(bench.names(), ["a.raw", "b.vhd", "c.vhd", "d.VHD", "e.img", "f.img"]);
        for name in ["e.img", "f.img"] {
            // A page more where the file system has already written down where the pieces are.
            assert!(blocks(&bench.path(name)) <= blocks(&bench.path("a.raw")) + 8, "{name}");
        }
    }
}

/// What was written as zeros becomes a hole as well.
#[test]
fn written_zeros_take_no_space_in_the_new_image() {
    let bench = Bench::new();
    fs::write(bench.path("full.raw"), vec![0; 8 << 20]).unwrap();
    let converted = bench.convert(&ConvertOptions::new(), "full.raw", "a.vhd").unwrap();
    assert_eq!(converted.written, 0);
    let disk = OpenOptions::new().read_only(true).open(&bench.path("a.vhd")).unwrap();
    assert_eq!(disk.extents(0, 8 * MIB).unwrap().len(), 1);
    let converted = bench.convert(&ConvertOptions::new(), "full.raw", "b.raw").unwrap();
    assert!(converted.cloned || blocks(&bench.path("b.raw")) < 16);
}

#[test]
fn a_raw_disk_of_no_whole_sectors_is_padded_with_zeros() {
    let bench = Bench::new();
    let mut content = bench.raw("a.raw", 3 * MIB + 1000);
    for to in [Format::Dynamic, Format::Fixed] {
        let options = ConvertOptions::new().to(to).replace(true);
        let converted = bench.convert(&options, "a.raw", "b.vhd").unwrap();
        assert_eq!((converted.size, converted.padding), (3 * MIB + 1024, 24));
        content.resize(3 * MIB as usize + 1024, 0);
        assert!(strict_content(&bench.path("b.vhd")).1 == content);
    }
    let converted = bench.convert(&ConvertOptions::new(), "a.raw", "c.raw").unwrap();
    assert_eq!((converted.size, converted.padding), (3 * MIB + 1000, 0));
    assert!(fs::read(bench.path("c.raw")).unwrap() == content[..3 * MIB as usize + 1000]);
}

#[test]
fn a_source_that_was_not_closed_is_read_with_its_journal_and_not_changed() {
    let bench = Bench::new();
    CreateOptions::new(16 * MIB).create(&bench.path("a.vhd")).unwrap();
    let disk = OpenOptions::new().open(&bench.path("a.vhd")).unwrap();
    for block in 0..8 {
        disk.write_at(&[block as u8 + 1; 4096], block * 2 * MIB + 512).unwrap();
        disk.flush().unwrap();
    }
    let error = bench.convert(&ConvertOptions::new(), "a.vhd", "b.raw").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    drop(disk);
    let before = fs::read(bench.path("a.vhd")).unwrap();
    bench.convert(&ConvertOptions::new(), "a.vhd", "b.raw").unwrap();
    assert!(fs::read(bench.path("a.vhd")).unwrap() == before);
    let found = fs::read(bench.path("b.raw")).unwrap();
    for block in 0..8u8 {
        let at = usize::from(block) * 2 * MIB as usize + 512;
        assert!(found[at..at + 4096].iter().all(|&byte| byte == block + 1), "{block}");
    }
}

#[test]
fn a_cancelled_conversion_leaves_nothing_and_a_finished_one_reports_all() {
    let bench = Bench::new();
    bench.raw("a.raw", 17 * MIB + 512);
    let (from, to) = (bench.path("a.raw"), bench.path("b.vhd"));
    for format in [Format::Raw, Format::Dynamic, Format::Fixed] {
        let options = ConvertOptions::new().to(format);
        let mut steps = Vec::new();
        options
            .run(&from, &to, &mut |progress| {
                steps.push(progress);
                ControlFlow::Continue(())
            })
            .unwrap();
        fs::remove_file(&to).unwrap();
        assert!(steps.windows(2).all(|pair| pair[0].done <= pair[1].done), "{steps:?}");
        let last = steps.last().unwrap();
        assert_eq!((last.phase, last.done, last.total), (Phase::Sync, 17 * MIB + 512, 17 * MIB + 512));
        for stop_at in 0..steps.len() {
            let mut step = 0;
            let error = options
                .run(&from, &to, &mut |_| {
                    step += 1;
                    if step > stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                })
                .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Cancelled);
            assert_eq!(bench.names(), ["a.raw"]);
        }
    }
}

#[test]
fn a_file_is_replaced_only_when_asked_and_only_if_nobody_uses_it() {
    let bench = Bench::new();
    let content = bench.raw("a.raw", 4 * MIB);
    CreateOptions::new(MIB).create(&bench.path("b.vhd")).unwrap();
    let error = bench.convert(&ConvertOptions::new(), "a.raw", "b.vhd").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
    let replace = ConvertOptions::new().replace(true);
    let disk = OpenOptions::new().open(&bench.path("b.vhd")).unwrap();
    assert_eq!(bench.convert(&replace, "a.raw", "b.vhd").unwrap_err().kind(), ErrorKind::InUse);
    disk.close().unwrap();
    drop(disk);
    bench.convert(&replace, "a.raw", "b.vhd").unwrap();
    assert!(strict_content(&bench.path("b.vhd")).1 == content);
    // A disk onto itself would be lost on the way.
    assert_eq!(bench.convert(&replace, "a.raw", "a.raw").unwrap_err().kind(), ErrorKind::InUse);
    assert!(fs::read(bench.path("a.raw")).unwrap() == content);
    assert_eq!(bench.names(), ["a.raw", "b.vhd"]);
}

#[test]
fn what_a_source_is_goes_by_its_name_or_by_what_the_caller_says() {
    let bench = Bench::new();
    CreateOptions::new(MIB).create(&bench.path("a.vhd")).unwrap();
    fs::rename(bench.path("a.vhd"), bench.path("a.img")).unwrap();
    let bytes = fs::read(bench.path("a.img")).unwrap();
    // A raw disk on which a guest keeps a VHD is no VHD.
    bench.convert(&ConvertOptions::new(), "a.img", "raw.img").unwrap();
    assert!(fs::read(bench.path("raw.img")).unwrap() == bytes);
    bench.convert(&ConvertOptions::new().from(Format::Dynamic), "a.img", "b.img").unwrap();
    assert_eq!(fs::metadata(bench.path("b.img")).unwrap().len(), MIB);
    let error = bench.convert(&ConvertOptions::new().from(Format::Fixed), "a.img", "c.img").unwrap_err();
    assert!(error.to_string().contains("it is a dynamic disk, not a fixed one"), "{error}");
    assert_eq!(
        bench.convert(&ConvertOptions::new(), "missing.img", "c.img").unwrap_err().kind(),
        ErrorKind::Io
    );
    fs::write(bench.path("empty.img"), "").unwrap();
    let error = bench.convert(&ConvertOptions::new(), "empty.img", "c.vhd").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(bench.names(), ["a.img", "b.img", "empty.img", "raw.img"]);
}

/// The file system is asked to copy what stands in the source's file as it is to stand in the new one.
#[test]
fn the_file_system_copies_by_itself_where_it_can() {
    let bench = Bench::new();
    let content = bench.raw("a.raw", 5 * MIB + 512);
    let to = |format| ConvertOptions::new().to(format);
    let asked = |options: &ConvertOptions, from: &str, name: &str| {
        let converted = bench.convert(options, from, name).unwrap();
        assert!(converted.cloned || converted.copied >= 256 << 10, "{from} to {name}: {converted:?}");
        assert!(converted.cloned || converted.copied < converted.written, "{from} to {name}: {converted:?}");
    };
    asked(&to(Format::Fixed), "a.raw", "fixed.vhd");
    asked(&to(Format::Raw), "fixed.vhd", "b.raw");
    let converted = bench.convert(&ConvertOptions::new(), "a.raw", "dynamic.vhd").unwrap();
    assert_eq!((converted.copied, converted.cloned), (0, false));
    asked(&to(Format::Raw), "dynamic.vhd", "c.raw");
    assert!(strict_content(&bench.path("fixed.vhd")) == (Kind::Fixed, content.clone()));
    for name in ["b.raw", "c.raw"] {
        assert!(fs::read(bench.path(name)).unwrap() == content, "{name}");
        assert!(blocks(&bench.path(name)) <= blocks(&bench.path("a.raw")) + 8, "{name}");
    }
}

/// Real file systems that share space: more disks fit into one than it has space for. To run it:
/// `cargo test --test convert -- --ignored`, as root.
#[test]
#[ignore = "needs root, btrfs-progs and xfsprogs"]
fn file_systems_that_share_space() {
    sharing_file_systems::on_each(400 * MIB, |kind, folder| {
        let bench = Bench { dir: tempfile::tempdir_in(folder).unwrap() };
        let content = bench.raw("a.raw", 150 * MIB + 1000);
        let file = fs::File::options().write(true).open(bench.path("a.raw")).unwrap();
        let dense: Vec<u8> = (0..100 * MIB).map(|i| (i % 253) as u8).collect();
        file.write_all_at(&dense, 8 * MIB).unwrap();
        file.sync_all().unwrap();
        let mut content = content;
        content[8 * MIB as usize..][..dense.len()].copy_from_slice(&dense);
        content.resize(150 * MIB as usize + 1024, 0);
        // Six disks with 100 MiB of data each, in 400 MiB.
        let shared = |options: ConvertOptions, from, to| bench.convert(&options, from, to).unwrap();
        let to = |format| ConvertOptions::new().to(format);
        assert!(shared(to(Format::Fixed), "a.raw", "fixed.vhd").cloned);
        assert!(shared(to(Format::Raw), "fixed.vhd", "b.raw").cloned);
        assert!(!shared(to(Format::Dynamic), "a.raw", "dynamic.vhd").cloned);
        for name in ["c.raw", "d.raw"] {
            let converted = shared(to(Format::Raw), "dynamic.vhd", name);
            assert!(converted.copied > 98 * MIB, "{converted:?}");
        }
        assert!(shared(to(Format::Fixed), "d.raw", "e.vhd").cloned);
        for name in ["b.raw", "c.raw", "d.raw"] {
            assert!(fs::read(bench.path(name)).unwrap() == content, "{kind}: {name}");
        }
        for name in ["fixed.vhd", "e.vhd"] {
            assert!(strict_content(&bench.path(name)) == (Kind::Fixed, content.clone()), "{kind}: {name}");
        }
        // What is written to one is not seen in the other.
        let disk = OpenOptions::new().open(&bench.path("fixed.vhd")).unwrap();
        disk.write_at(&[9; 4096], 9 * MIB).unwrap();
        disk.close().unwrap();
        assert!(fs::read(bench.path("b.raw")).unwrap() == content, "{kind}");
    });
}

#[cfg(feature = "sim")]
mod simulated {
    use super::*;
    use cowvhd::sim::{Fault, FaultPlan, FileSystem, Operation, SimVfs};
    use cowvhd::vfs::Vfs;
    use std::sync::Arc;

    const SIZE: u64 = 6 * MIB + 512;

    fn content() -> Vec<u8> {
        let mut content = vec![0; SIZE as usize];
        content[MIB as usize..][..300_000].fill(5);
        content[3 * MIB as usize + 100..][..1000].fill(6);
        content[SIZE as usize - 1] = 7;
        content
    }

    fn raw(kind: FileSystem) -> (SimVfs, ConvertOptions) {
        let vfs = SimVfs::new(1);
        vfs.set_kind(kind);
        let file = vfs.create_new(Path::new("/a.raw")).unwrap();
        assert_eq!(file.write_at(&content(), 0).unwrap(), SIZE as usize);
        let source = OpenOptions::new().vfs(Arc::new(vfs.clone()));
        (vfs, ConvertOptions::new().open_source_with(source))
    }

    fn convert(options: &ConvertOptions, from: &str, to: &str) -> Result<Converted> {
        options.run(Path::new(from), Path::new(to), &mut |_| ControlFlow::Continue(()))
    }

    /// Whatever a file system can do, the images are the same.
    #[test]
    fn a_file_system_shares_copies_or_does_neither() {
        for (no_clones, no_copies) in [(false, false), (false, true), (true, false), (true, true)] {
            let kind = FileSystem { no_clones, no_copies, ..FileSystem::default() };
            let (vfs, options) = raw(kind);
            let to = |format| options.clone().to(format);
            for (from, name, format) in [
                ("/a.raw", "/fixed.vhd", Format::Fixed),
                ("/fixed.vhd", "/again.vhd", Format::Fixed),
                ("/again.vhd", "/b.raw", Format::Raw),
                ("/b.raw", "/dynamic.vhd", Format::Dynamic),
                ("/dynamic.vhd", "/c.raw", Format::Raw),
            ] {
                let from_dynamic = from == "/dynamic.vhd";
                let converted = convert(&to(format), from, name).unwrap();
                assert_eq!(converted.cloned, !no_clones && format != Format::Dynamic && !from_dynamic);
                assert_eq!(
                    converted.copied > 0,
                    !no_copies && format != Format::Dynamic && !converted.cloned,
                    "{kind:?} {name}"
                );
                assert!(
                    converted.copied <= converted.written && (converted.written == 0) == converted.cloned
                );
            }
            let found = |name: &str| vfs.content(Path::new(name)).unwrap();
            for name in ["/b.raw", "/c.raw"] {
                assert!(found(name) == content(), "{kind:?} {name}");
            }
            for name in ["/fixed.vhd", "/again.vhd"] {
                let bytes = found(name);
                let mut strict = StrictVhd::from_bytes(&bytes).unwrap();
                let mut read = vec![0; strict.size() as usize];
                strict.read_at(0, &mut read).unwrap();
                assert!((strict.kind(), read) == (Kind::Fixed, content()), "{kind:?} {name}");
            }
        }
    }

    /// A copy of the file system's that fails half way is done again by reading and writing; a file system that is full is said
    /// to be, and nothing stays behind.
    #[test]
    fn what_the_file_system_fails_to_copy_is_written() {
        const EIO: i32 = 5;
        const ENOSPC: i32 = 28;
        let kind = FileSystem { no_clones: true, ..FileSystem::default() };
        for fault in [Fault::Error(EIO), Fault::Short] {
            for first in 0..3 {
                let (vfs, options) = raw(kind);
                vfs.set_faults(FaultPlan::new(fault, first, 1).only(Operation::Write));
                let result = convert(&options, "/a.raw", "/b.raw");
                assert_eq!(vfs.injected_faults(), 1);
                // Only the first write is a copy.
                assert_eq!(result.is_ok(), first == 0 || fault == Fault::Short, "{result:?}");
                if result.is_ok() {
                    assert!(vfs.content(Path::new("/b.raw")).unwrap() == content());
                } else {
                    assert_eq!(vfs.paths(), [Path::new("/a.raw")]);
                }
            }
        }
        let (vfs, options) = raw(kind);
        vfs.set_faults(FaultPlan::new(Fault::Error(ENOSPC), 0, u64::MAX).only(Operation::Write));
        assert_eq!(convert(&options, "/a.raw", "/b.raw").unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(vfs.paths(), [Path::new("/a.raw")]);
    }
}
