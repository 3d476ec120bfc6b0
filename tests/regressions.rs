//! Defects that a fuzzer or somebody else has found, each by name.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cowvhd::sim::SimVfs;
use cowvhd::vfs::{Access, Vfs};
use cowvhd::{CreateOptions, ErrorKind, OpenOptions};
use std::path::Path;
use std::sync::Arc;

const PATH: &str = "/disk.vhd";
const BLOCK_BYTES: u32 = 16 << 10;
const TABLE_OFFSET: u64 = 1 << 20;

/// A closed image with data in its first blocks.
fn closed_image() -> SimVfs {
    let vfs = SimVfs::new(1);
    let options = CreateOptions::new(8 * u64::from(BLOCK_BYTES)).test_geometry(BLOCK_BYTES, 128 << 10);
    options.vfs(Arc::new(vfs.clone())).create(Path::new(PATH)).unwrap();
    let disk = options_of(&vfs).open(Path::new(PATH)).unwrap();
    disk.write_at(&[7; 3 * BLOCK_BYTES as usize], 0).unwrap();
    disk.close().unwrap();
    vfs
}

fn options_of(vfs: &SimVfs) -> OpenOptions {
    OpenOptions::new().vfs(Arc::new(vfs.clone()))
}

/// The start of the file was written again from its backup before the table was looked at.
#[test]
fn a_recovery_that_is_refused_has_changed_nothing() {
    let vfs = closed_image();
    vfs.corrupt(Path::new(PATH), 0, &[0xaa; 4096]);
    vfs.corrupt(Path::new(PATH), TABLE_OFFSET, &[0; 4]);
    let before = vfs.content_hash(Path::new(PATH));
    let error = options_of(&vfs).open(Path::new(PATH)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert_eq!(vfs.content_hash(Path::new(PATH)), before);
}

/// With the start lost as well, a file that had been cut was extended with zeros over its last blocks.
#[test]
fn a_file_that_was_cut_is_refused_and_not_extended() {
    let vfs = closed_image();
    vfs.corrupt(Path::new(PATH), 0, &[0xaa; 4096]);
    let file = vfs.open(Path::new(PATH), Access::ReadWrite).unwrap();
    file.set_len(file.length().unwrap() - 2 * u64::from(BLOCK_BYTES)).unwrap();
    file.sync_data().unwrap();
    for read_only in [true, false] {
        let error = options_of(&vfs).read_only(read_only).open(Path::new(PATH)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains("past the file's"), "{error}");
    }
}
