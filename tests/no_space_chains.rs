//! The host's file system becomes full in the middle of a merge, of a deletion and of a snapshot: nothing is lost, the error says what is
//! missing, and once there is space the same call goes on.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/small_file_system.rs"]
mod small_file_system;

use cowvhd::convert::Progress;
use cowvhd::snapshot::{SnapshotName, delete, delete_running, merge, merge_running};
use cowvhd::{CreateOptions, Disk, Error, ErrorKind, OpenOptions};
use small_file_system::{on_a_small_file_system, small_folder};
use std::fs::{self, File};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

const BLOCK: u64 = 2 << 20;
const SIZE: u64 = 64 << 20;

/// A disk with the snapshots `a`, `b` and `c`, and what it holds.
struct Bench {
    folder: PathBuf,
    content: Vec<u8>,
}

impl Bench {
    fn new() -> Self {
        let bench = Bench { folder: small_folder(), content: vec![0; SIZE as usize] };
        CreateOptions::new(SIZE).create(&bench.disk()).unwrap();
        bench
    }

    /// With two blocks of data in each layer.
    fn with_snapshots() -> Self {
        let mut bench = Self::new();
        let disk = bench.open();
        for (number, name) in (0..).zip(["a", "b", "c", ""]) {
            let range = 2 * number * BLOCK..(2 * number + 2) * BLOCK - 512 * number;
            let data = &mut bench.content[range.start as usize..range.end as usize];
            data.fill(number as u8 + 1);
            disk.write_at(data, range.start).unwrap();
            if !name.is_empty() {
                disk.snapshot(&SnapshotName::new(name).unwrap()).unwrap();
            }
        }
        disk.close().unwrap();
        bench
    }

    fn disk(&self) -> PathBuf {
        self.folder.join("vm.vhd")
    }

    fn open(&self) -> Disk {
        OpenOptions::new().open(&self.disk()).unwrap()
    }

    fn filler(&self) -> PathBuf {
        self.folder.join("filler")
    }

    /// Leaves so many bytes of the file system, or a little less.
    fn leave(&self, bytes: u64) {
        let mut filler = File::options().create(true).append(true).open(self.filler()).unwrap();
        while filler.write_all(&[1; 4096]).is_ok() {}
        let length = filler.metadata().unwrap().len();
        filler.set_len(length - bytes).unwrap();
    }

    fn free(&self) {
        fs::remove_file(self.filler()).unwrap();
    }

    fn holds(&self, disk: &Disk) {
        let mut found = vec![0xee; SIZE as usize];
        disk.read_at(&mut found, 0).unwrap();
        assert!(found == self.content, "the disk shows something else");
    }

    /// The names in the folder.
    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(&self.folder).unwrap();
        let mut names: Vec<String> =
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// What is done while the file system becomes full once so many bytes were copied.
    fn full_after(&self, bytes: u64) -> impl FnMut(Progress) -> ControlFlow<()> {
        let mut full = false;
        move |progress: Progress| {
            if progress.copied >= bytes && !std::mem::replace(&mut full, true) {
                self.leave(0);
            }
            ControlFlow::Continue(())
        }
    }
}

fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn name(name: &str) -> SnapshotName {
    SnapshotName::new(name).unwrap()
}

fn must_lack_space<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    error.to_string()
}

#[test]
fn a_merge_without_space_is_refused_or_goes_on_later() {
    on_a_small_file_system("merges", "44m");
}

#[test]
#[ignore = "run by another test, on a small file system"]
fn merges() {
    let bench = Bench::with_snapshots();
    let disk = bench.disk();
    // Seen before anything is copied.
    bench.leave(3 << 20);
    let length = || fs::metadata(&disk).unwrap().len();
    let before = length();
    let said = must_lack_space(merge(&OpenOptions::new(), &disk, None, &mut go_on));
    assert!(said.contains("bytes are to be copied") && said.contains("free some space"), "{said}");
    assert_eq!(length(), before);
    bench.free();
    // In the middle.
    let until_a = Some(Path::new("a"));
    must_lack_space(merge(&OpenOptions::new(), &disk, until_a, &mut bench.full_after(BLOCK)));
    bench.holds(&OpenOptions::new().read_only(true).open(&disk).unwrap());
    bench.free();
    let merged = merge(&OpenOptions::new(), &disk, until_a, &mut go_on).unwrap();
    // What was copied before is not copied again.
    assert!((2 * BLOCK..=3 * BLOCK).contains(&merged.copied), "{merged:?}");

    // The same beside a guest, who reads, overwrites and flushes all the time.
    let open = bench.open();
    must_lack_space(merge_running(&open, None, &mut bench.full_after(1)));
    bench.holds(&open);
    open.write_at(&[4; 4096], 6 * BLOCK).unwrap();
    open.flush().unwrap();
    bench.free();
    merge_running(&open, None, &mut go_on).unwrap();
    bench.holds(&open);
    open.close().unwrap();
    drop(open);
    for name in ["a", "b", "c"] {
        fs::remove_file(bench.folder.join(format!("vm@{name}.vhd"))).unwrap();
    }
    bench.holds(&bench.open());
}

#[test]
fn a_deletion_without_space_goes_on_later() {
    on_a_small_file_system("deletions", "44m");
}

#[test]
#[ignore = "run by another test, on a small file system"]
fn deletions() {
    let bench = Bench::with_snapshots();
    let disk = bench.disk();
    let options = OpenOptions::new();
    // Into a snapshot, of a closed disk.
    must_lack_space(delete(&options, &disk, &name("a"), &mut bench.full_after(1)));
    bench.holds(&options.clone().read_only(true).open(&disk).unwrap());
    bench.free();
    delete(&options, &disk, &name("a"), &mut go_on).unwrap();
    // Into a snapshot, and into the leaf, beside a guest.
    let open = bench.open();
    for (snapshot, left) in [("b", vec!["vm.vhd", "vm@c.vhd"]), ("c", vec!["vm.vhd"])] {
        must_lack_space(delete_running(&open, &name(snapshot), &mut bench.full_after(1)));
        bench.holds(&open);
        open.write_at(&[4; 4096], 6 * BLOCK).unwrap();
        open.flush().unwrap();
        bench.free();
        delete_running(&open, &name(snapshot), &mut go_on).unwrap();
        bench.holds(&open);
        assert_eq!(bench.names(), left);
    }
    open.close().unwrap();
    drop(open);
    bench.holds(&bench.open());
}

#[test]
fn a_snapshot_without_space_is_none() {
    on_a_small_file_system("snapshots", "24m");
}

#[test]
#[ignore = "run by another test, on a small file system"]
fn snapshots() {
    let mut bench = Bench::new();
    let disk = bench.open();
    disk.write_at(&vec![1; BLOCK as usize], 0).unwrap();
    bench.content[..BLOCK as usize].fill(1);
    disk.flush().unwrap();
    let mut taken = 0;
    // With all the space that can be left of what a snapshot takes.
    for left in (0..(5 << 20)).step_by(128 << 10) {
        bench.leave(left);
        let snapshot = name(&format!("s{left}"));
        match disk.snapshot(&snapshot) {
            Ok(_) => taken += 1,
            result => {
                must_lack_space(result);
                assert!(
                    !bench.names().iter().any(|name| name.contains(snapshot.as_str())),
                    "{:?}",
                    bench.names()
                );
            }
        }
        bench.holds(&disk);
        bench.free();
        let byte = (left >> 17) as u8;
        disk.write_at(&[byte; 4096], 0).unwrap();
        bench.content[..4096].fill(byte);
        disk.flush().unwrap();
        if taken == 3 {
            break;
        }
    }
    assert_eq!(taken, 3);
    bench.holds(&disk);
    disk.close().unwrap();
    drop(disk);
    bench.holds(&bench.open());
}
