//! What the two superblocks may make a program do.
//!
//! A flag that a newer version had set made this one take the newer superblock for damaged and go by the older one: it opened the
//! image as it had been before, and replayed a session of the past over it. And it kept the mark of a feature whose
//! content it had just overwritten with zeros.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cowvhd::vhd::{DiskType, DynamicHeader, Footer, Timestamp, UniqueId};
use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions, Result};
use std::fs;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;
const COPIES: [usize; 2] = [4096, 8192];

struct Image {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn image() -> Image {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    CreateOptions::new(64 * MIB).create(&path).unwrap();
    let disk = open(&path, false).unwrap();
    disk.write_at(&[1; 4096], 0).unwrap();
    disk.close().unwrap();
    Image { _dir: dir, path }
}

fn open(path: &Path, read_only: bool) -> Result<Disk> {
    OpenOptions::new().read_only(read_only).open(path)
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The copies, the current one first.
fn copies(bytes: &[u8]) -> [usize; 2] {
    let [a, b] = COPIES;
    if number(bytes, a + 8) > number(bytes, b + 8) { [a, b] } else { [b, a] }
}

/// Changes a superblock, with the right CRC.
fn change(bytes: &mut [u8], copy: usize, at: usize, value: &[u8]) {
    bytes[copy + at..copy + at + value.len()].copy_from_slice(value);
    let crc = bytes[copy..copy + 4092].iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 != 0 { 0xedb8_8320 } else { 0 })
    });
    bytes[copy + 4092..copy + 4096].copy_from_slice(&(!crc).to_be_bytes());
}

#[test]
fn what_a_newer_version_wrote_is_refused_in_either_copy() {
    let image = image();
    let clean = fs::read(&image.path).unwrap();
    let disk = open(&image.path, false).unwrap();
    disk.write_at(&[2; 4096], 4 * MIB).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let dirty = fs::read(&image.path).unwrap();
    for bytes in [&clean, &dirty] {
        let fields: [(&str, usize, u32); 5] = [
            ("incompatible features", 32, 1 << 31),
            ("incompatible features", 36, 2),
            ("state", 56, 3),
            ("flags", 60, 4),
            ("flags", 60, 1 << 31 | 1),
        ];
        for (field, at, value) in fields {
            for copy in copies(bytes) {
                let mut bytes = bytes.clone();
                change(&mut bytes, copy, at, &value.to_be_bytes());
                for front_lost in [false, true] {
                    if front_lost {
                        bytes[..4096].fill(0xaa);
                    }
                    fs::write(&image.path, &bytes).unwrap();
                    for read_only in [true, false] {
                        let error = open(&image.path, read_only).unwrap_err();
                        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
                        let text = error.to_string();
                        assert!(text.contains(field) && text.contains("newer version"), "{text}");
                    }
                    assert!(fs::read(&image.path).unwrap() == bytes, "the file was changed: {field}");
                }
            }
        }
    }
}

#[test]
fn a_superblock_of_another_disk_is_none() {
    let image = image();
    let mut bytes = fs::read(&image.path).unwrap();
    let [_, older] = copies(&bytes);
    change(&mut bytes, older, 60, &4u32.to_be_bytes());
    change(&mut bytes, older, 16, &[0x77; 16]);
    fs::write(&image.path, &bytes).unwrap();
    open(&image.path, false).unwrap().close().unwrap();
}

#[test]
fn an_unknown_compatible_feature_is_cleared_by_whoever_writes() {
    let image = image();
    let mut bytes = fs::read(&image.path).unwrap();
    for copy in COPIES {
        change(&mut bytes, copy, 48, &0x8000_0000_0000_0001u64.to_be_bytes());
        change(&mut bytes, copy, 3000, b"what it stands for");
    }
    fs::write(&image.path, &bytes).unwrap();
    open(&image.path, true).unwrap();
    assert!(fs::read(&image.path).unwrap() == bytes);
    open(&image.path, false).unwrap().close().unwrap();
    let after = fs::read(&image.path).unwrap();
    for copy in COPIES {
        assert_eq!(number(&after, copy + 48), 0);
        assert!(after[copy + 176..copy + 4092].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn an_unknown_read_only_compatible_feature_can_be_read() {
    let image = image();
    let mut bytes = fs::read(&image.path).unwrap();
    for copy in COPIES {
        change(&mut bytes, copy, 40, &(1u64 << 63).to_be_bytes());
    }
    fs::write(&image.path, &bytes).unwrap();
    open(&image.path, true).unwrap();
    let error = open(&image.path, false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("read-only"), "{error}");
    assert!(fs::read(&image.path).unwrap() == bytes);
}

#[test]
fn places_out_of_bounds_are_refused_before_anything_is_written() {
    let image = image();
    let good = fs::read(&image.path).unwrap();
    let fields: [(&str, usize, &[u64]); 3] = [
        // Behind the table and no further than its room, also where a sparse file is as long as it claims.
        (
            "slot origin",
            136,
            &[0, 3 * MIB, 7 * MIB + 512, 20 * MIB, 1 << 41, 1 << 42, 1 << 63, u64::MAX - 4095],
        ),
        ("ring offset", 80, &[0, 4096, 12288, 300_000, 1 << 63, u64::MAX - 4095]),
        ("ring bytes", 88, &[0, 4096, 131_073, 3 * MIB, 17 * MIB, 1 << 63, u64::MAX - 4095]),
    ];
    for (field, at, values) in fields {
        for &value in values {
            let mut bytes = good.clone();
            for copy in COPIES {
                change(&mut bytes, copy, at, &value.to_be_bytes());
            }
            fs::write(&image.path, &bytes).unwrap();
            for read_only in [true, false] {
                let error = open(&image.path, read_only).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{field} {value}");
                let text = error.to_string();
                assert!(text.contains(field) || text.contains("ring"), "{field} {value}: {text}");
            }
            assert!(fs::read(&image.path).unwrap() == bytes, "the file was changed: {field} {value}");
        }
    }
}

/// The same of the temporary journal of an image made elsewhere, which was not closed.
#[test]
fn places_of_a_temporary_journal_out_of_bounds_are_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    let id = UniqueId::from_bytes([5; 16]);
    let mut footer = Footer::new(DiskType::Dynamic, 256 << 10, id, Timestamp::from_unix_seconds(1 << 30));
    footer.creator_app = *b"test";
    let footer = footer.to_bytes();
    let header = DynamicHeader::new(1536, 64, 4096).to_bytes();
    fs::write(&path, [&footer[..], &header, &[0xff; 512], &footer].concat()).unwrap();
    let disk = open(&path, false).unwrap();
    disk.write_at(&[3; 4096], 0).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let good = fs::read(&path).unwrap();
    // Where the dirty header says that it is.
    let head = number(&good, 512 + 8) as usize;
    assert!(head.is_multiple_of(4096) && head < good.len(), "{head}");
    let ring = number(&good, head + COPIES[0] + 80);
    let far = [0, 1 << 63, u64::MAX - 4095];
    for (field, at, wrong) in [
        ("ring bytes", 88, [4096, 131_073, 17 * MIB]),
        ("ring offset", 80, [4096, ring + 512, ring - 4096]),
        ("slot origin", 136, [1024, 8192 + 512, ring + 4096]),
    ] {
        for value in wrong.into_iter().chain(far) {
            let mut bytes = good.clone();
            for copy in COPIES {
                change(&mut bytes, head + copy, at, &value.to_be_bytes());
            }
            fs::write(&path, &bytes).unwrap();
            for read_only in [true, false] {
                let error = open(&path, read_only).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{field} {value}");
                let words = format!("superblock: field {field} (byte {at}) is {value}, expected ");
                assert!(error.to_string().contains(&words), "{error}");
            }
            assert!(fs::read(&path).unwrap() == bytes, "the file was changed: {field} {value}");
        }
    }
    fs::write(&path, &good).unwrap();
    let disk = open(&path, false).unwrap();
    let mut found = [0; 4096];
    disk.read_at(&mut found, 0).unwrap();
    assert_eq!(found, [3; 4096]);
}
