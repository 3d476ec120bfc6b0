//! What the tests of damaged images share.

#![allow(dead_code, reason = "each test binary uses its part")]

use cowvhd::OpenOptions;
use std::fs;
use std::path::Path;
use std::process::Command;

pub const MIB: u64 = 1 << 20;
/// Where the table of a new image starts.
pub const TABLE: u64 = 3 * MIB;
/// Where its first slot starts.
pub const SLOTS: u64 = 7 * MIB;
/// From one slot to the next.
pub const STRIDE: u64 = 2 * MIB + 4096;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// What may become of a page, from its bytes and a number.
pub type Damage = fn(&[u8], u64) -> Vec<u8>;

pub const DAMAGES: [(&str, Damage); 4] = [
    ("zeroed", |page, _| vec![0; page.len()]),
    ("garbage", |page, seed| {
        let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        page.iter().map(|_| next()).collect()
    }),
    ("0xff", |page, _| vec![0xff; page.len()]),
    ("shifted", |page, _| {
        let mut shifted = page.to_vec();
        shifted.rotate_right(page.len().min(PAGE as usize) / 8);
        shifted
    }),
];

/// Where a test of many repairs has its files: in memory, if the system has such a place, since no power fails here and each repair
/// syncs some ten times.
pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// All that a guest sees.
pub fn content(path: &Path) -> Vec<u8> {
    let disk = OpenOptions::new().read_only(true).open(path).unwrap();
    let mut content = vec![0xee; disk.size() as usize];
    disk.read_at(&mut content, 0).unwrap();
    content
}

/// All that a guest of QEMU would see.
pub fn qemu_convert(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("raw");
    let output = Command::new("qemu-img")
        .args(["convert", "-f", "vpc", "-O", "raw"])
        .args([path, &raw])
        .output()
        .unwrap_or_else(|error| panic!("qemu-img: {error}; scripts/install-test-tools installs it"));
    assert!(output.status.success(), "{path:?}: {output:?}");
    fs::read(raw).unwrap()
}
