//! What was repaired is read by other people's readers as it was before the damage: images of cowvhd, and one that QEMU made.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use cowvhd::check::{Consent, repair};
use cowvhd::vfs::HostVfs;
use cowvhd::{CreateOptions, OpenOptions};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use support::process::{run, tool};
use support::readers::{READERS, must_be_installed, must_equal};

const MIB: u64 = 1 << 20;
/// No multiple of a block.
const SIZE: u64 = 13 * MIB + 3 * 512;
const TABLE: u64 = 3 * MIB;
const SLOTS: u64 = 7 * MIB;
const STRIDE: u64 = 2 * MIB + 4096;

fn patch(path: &Path, bytes: &[u8], at: u64) {
    fs::File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

/// Repairs, and lets each reader say what it sees.
fn repaired_reads(path: &Path, expected: &[u8], what: &str) {
    let undo = path.with_extension("undo");
    let repaired = repair(Arc::new(HostVfs), path, Consent::All, &undo).unwrap();
    assert!(repaired.changes() && repaired.is_sound(), "{what}: {:?}", repaired.after.findings());
    for reader in READERS {
        reader.must_accept(path);
        let mut content = reader.content(path);
        // QEMU may round the size of others' disks up to its geometry.
        content.truncate(content.len().max(expected.len()).min(expected.len()));
        must_equal(&format!("{reader:?}, {what}"), &content, expected);
    }
    fs::remove_file(undo).unwrap();
}

#[test]
fn an_image_of_ours() {
    must_be_installed();
    let dir = tempfile::tempdir().unwrap();
    let (good, path) = (dir.path().join("good.vhd"), dir.path().join("d.vhd"));
    CreateOptions::new(SIZE).create(&good).unwrap();
    let disk = OpenOptions::new().open(&good).unwrap();
    for block in [1, 0, 4, 6] {
        let bytes: Vec<u8> = (0..20_480).map(|at| (at / 3 + block * 17) as u8 | 1).collect();
        disk.write_at(&bytes, block * 2 * MIB + 1024 * block).unwrap();
    }
    let mut expected = vec![0; SIZE as usize];
    disk.read_at(&mut expected, 0).unwrap();
    disk.close().unwrap();
    let end = fs::metadata(&good).unwrap().len() - 512;
    let junk = [0x5a; 8192];
    let cases: [(&str, &[(u64, usize)]); 8] = [
        ("start", &[(0, 4096)]),
        ("footer", &[(end, 512)]),
        ("table", &[(TABLE, 4096)]),
        ("start, footer and table", &[(0, 4096), (TABLE, 4096), (end, 512)]),
        ("both superblocks", &[(4096, 8192)]),
        ("a block page", &[(SLOTS + STRIDE, 4096)]),
        ("a bitmap", &[(SLOTS + 3584, 512)]),
        ("two block pages and half of the table", &[(SLOTS, 4096), (SLOTS + 2 * STRIDE, 4096)]),
    ];
    for (what, ranges) in cases {
        fs::copy(&good, &path).unwrap();
        ranges.iter().for_each(|&(at, length)| patch(&path, &junk[..length], at));
        repaired_reads(&path, &expected, what);
    }
    // One that was not closed.
    fs::copy(&good, &path).unwrap();
    let disk = OpenOptions::new().open(&path).unwrap();
    disk.write_at(&[9; 4096], 8 * MIB).unwrap();
    disk.flush().unwrap();
    drop(disk);
    expected[8 << 20..][..4096].fill(9);
    repaired_reads(&path, &expected, "not closed");
}

#[test]
fn an_image_of_qemu() {
    must_be_installed();
    let dir = tempfile::tempdir().unwrap();
    let (good, path) = (dir.path().join("good.vhd"), dir.path().join("d.vhd"));
    run(tool("qemu-img").args(["create", "-f", "vpc", "-o", "force_size=on"]).arg(&good).arg("16M"));
    for command in ["write -P 1 10M 64k", "write -P 2 0 1k", "write -P 3 5M 3M"] {
        run(tool("qemu-io").args(["-f", "vpc", "-c", command]).arg(&good));
    }
    let mut expected = vec![0; 16 << 20];
    OpenOptions::new().read_only(true).open(&good).unwrap().read_at(&mut expected, 0).unwrap();
    let end = fs::metadata(&good).unwrap().len() - 512;
    let table = {
        let mut bytes = [0; 8];
        fs::File::open(&good).unwrap().read_exact_at(&mut bytes, 512 + 16).unwrap();
        u64::from_be_bytes(bytes)
    };
    let mut first = [0; 4];
    fs::File::open(&good).unwrap().read_exact_at(&mut first, table + 5 * 4).unwrap();
    let cases: [(&str, u64, &[u8]); 4] = [
        ("the copy at the start", 0, &[0; 512]),
        ("footer", end, &[0; 512]),
        // Cleared, these read as zeros, as before.
        ("an entry past the end", table + 7 * 4, &[0, 0xff, 0, 0]),
        ("an entry over the table", table + 7 * 4, &[0, 0, 0, 3]),
    ];
    for (what, at, bytes) in cases {
        fs::copy(&good, &path).unwrap();
        patch(&path, bytes, at);
        repaired_reads(&path, &expected, what);
    }
    // Two blocks in one place get a copy each.
    fs::copy(&good, &path).unwrap();
    patch(&path, &first, table + 7 * 4);
    let (one, other) = expected.split_at_mut(14 << 20);
    other.copy_from_slice(&one[10 << 20..12 << 20]);
    repaired_reads(&path, &expected, "two blocks in one place");
}
