//! Conversions: every kind into every kind, holes stay holes, and the new image is there complete or not at all.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

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
    bench.convert(&ConvertOptions::new(), "full.raw", "b.raw").unwrap();
    assert!(blocks(&bench.path("b.raw")) < 16);
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
