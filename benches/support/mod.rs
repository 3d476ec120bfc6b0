//! A raw file and a cowvhd disk side by side: the same file system, the same content, the caches filled the same way.

#[allow(dead_code, reason = "only one benchmark has this neighbour")]
pub mod qcow2;

use cowvhd::{CreateOptions, Disk, OpenOptions};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
/// Bytes of a small request.
pub const SMALL: u64 = 4 * KIB;
/// Bytes of a block of the disk.
pub const BLOCK: u64 = 2 * MIB;

/// What is measured: a disk, or what a hypervisor would use without one.
pub trait Target: Sync {
    fn read(&self, buf: &mut [u8], offset: u64);
    fn write(&self, buf: &[u8], offset: u64);
    fn flush(&self);
}

impl Target for File {
    fn read(&self, buf: &mut [u8], offset: u64) {
        self.read_exact_at(buf, offset).unwrap();
    }

    fn write(&self, buf: &[u8], offset: u64) {
        self.write_all_at(buf, offset).unwrap();
    }

    fn flush(&self) {
        self.sync_data().unwrap();
    }
}

impl Target for Disk {
    fn read(&self, buf: &mut [u8], offset: u64) {
        self.read_at(buf, offset).unwrap();
    }

    fn write(&self, buf: &[u8], offset: u64) {
        self.write_at(buf, offset).unwrap();
    }

    fn flush(&self) {
        Disk::flush(self).unwrap();
    }
}

/// A directory on the file system that is measured: `COWVHD_BENCH_DIR`, or one below cargo's target directory.
pub fn directory() -> tempfile::TempDir {
    let parent = std::env::var_os("COWVHD_BENCH_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    tempfile::tempdir_in(parent).unwrap()
}

pub fn create_raw(path: &Path, size: u64) -> File {
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(size).unwrap();
    file
}

#[allow(dead_code, reason = "only one benchmark compares direct files")]
/// Opens a raw file past the page cache.
pub fn open_direct(path: &Path) -> File {
    use rustix::fs::{Mode, OFlags};
    rustix::fs::open(path, OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()).unwrap().into()
}

pub fn create_disk(path: &Path, size: u64) -> Disk {
    CreateOptions::new(size).create(path).unwrap();
    OpenOptions::new().open(path).unwrap()
}

/// A raw file and a disk, both empty.
pub fn pair(directory: &Path, name: &str, size: u64) -> (File, Disk) {
    let raw = create_raw(&directory.join(format!("{name}.raw")), size);
    let disk = create_disk(&directory.join(format!("{name}.vhd")), size);
    (raw, disk)
}

/// Writes all of both targets in small requests, in turn, so that the page cache holds both in small folios from the same
/// parts of memory. (One that readahead has filled holds large folios, and overwrites of 4 KiB cost ten times as much then.)
pub fn fill(targets: [&dyn Target; 2], size: u64) {
    let buf = [0x5a; SMALL as usize];
    for page in 0..size / SMALL {
        targets.iter().for_each(|target| target.write(&buf, page * SMALL));
    }
    targets.iter().for_each(|target| target.flush());
}

/// Numbers that look random, the same in every run.
pub struct Rng(pub u64);

impl Rng {
    /// One of `count` places of `unit` bytes each.
    pub fn place(&mut self, count: u64, unit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % count * unit
    }
}
