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
