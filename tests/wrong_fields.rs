//! Every field of every structure with a value that it must not have, and a right checksum: an error that names file, structure,
//! field, byte, what is there and what was expected, or the right content. Then every structure damaged, of which there is another
//! copy: the right content, and a notice that says so. The file is not changed where it is read or refused.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/hostile.rs"]
#[allow(dead_code, reason = "shared with the other tests of hostile images")]
mod hostile;

use cowvhd::{Disk, OpenOptions};
use hostile::images;
use std::fs;
use std::path::PathBuf;

const MIB: u64 = 1 << 20;
const BACKUP: u64 = 12288;
const RING: u64 = 256 << 10;
const TABLE: u64 = 3 * MIB;

/// What comes of a field of ones.
enum Gives {
    /// The right content, also for writing.
    Reads,
    /// The right content, and an error for whoever wants to write.
    ReadsOnly(&'static str),
    /// This error.
    Error(&'static str),
    /// Of a closed image the right content, of one that was not closed this error.
    ErrorIfDirty(&'static str),
    /// The journal ends before the entry, as if that had never been written.
    EntryIsNone,
}
use Gives::{EntryIsNone, Error, ErrorIfDirty, Reads, ReadsOnly};

/// Byte offset in the structure, bytes, and what comes of it.
type Field = (usize, usize, Gives);

const FOOTER: &[Field] = &[
    (
        0,
        8,
        Error(
            "at offset 0: footer: field cookie (byte 0) is \"\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff\", expected \"conectix\"",
        ),
    ),
    (8, 4, Reads), // features
    (12, 4, Error("at offset 0: footer: field version (byte 12) is 0xffffffff, expected 0x00010000")),
    (
        16,
        8,
        Error(
            "at offset 0: footer: field data offset (byte 16) is 18446744073709551615, expected a dynamic header inside",
        ),
    ),
    (24, 4, Reads), // time stamp
    (28, 4, Reads), // creator application
    (32, 4, Reads), // creator version
    (36, 4, Reads), // creator host OS
    (40, 8, Reads), // original size
    (
        48,
        8,
        Error(
            "at offset 0: footer: field current size (byte 48) is 18446744073709551615 bytes, expected a multiple of 512",
        ),
    ),
    (56, 4, Reads), // geometry
    (
        60,
        4,
        Error(
            "at offset 0: footer: field disk type (byte 60) is 4294967295, expected 2 (fixed), 3 (dynamic) or 4",
        ),
    ),
    (68, 16, Reads),  // unique id
    (84, 1, Reads),   // saved state
    (85, 427, Reads), // reserved
];

const HEADER: &[Field] = &[
    (
        0,
        8,
        Error(
            "at offset 512: dynamic header: field cookie (byte 0) is \"\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff\", expected \"cxsparse\"",
        ),
    ),
    (8, 8, Reads), // data offset
    (
        16,
        8,
        Error(
            "at offset 512: dynamic header: field table offset (byte 16) is 18446744073709551615, expected a multiple of 512",
        ),
    ),
    (
        24,
        4,
        Error("at offset 512: dynamic header: field version (byte 24) is 0xffffffff, expected 0x00010000"),
    ),
    // Where a table of so many entries ends.
    (
        28,
        4,
        Error(
            "at offset 512: dynamic header: field table offset (byte 16) is 3145728 to 17183014912, expected a table inside",
        ),
    ),
    (
        32,
        4,
        Error(
            "at offset 512: dynamic header: field block size (byte 32) is 4294967295, expected a power of two from 512",
        ),
    ),
    (40, 16, Reads),   // parent unique id
    (56, 4, Reads),    // parent time stamp
    (60, 4, Reads),    // reserved
    (64, 512, Reads),  // parent name
    (576, 192, Reads), // parent locators
    (768, 256, Reads), // reserved
];

const SUPERBLOCK: &[Field] = &[
    (
        0,
        8,
        ErrorIfDirty(
            "at offset 4096: superblock: field magic (byte 0) is [ff, ff, ff, ff, ff, ff, ff, ff], expected cowvhdSB",
        ),
    ),
    (
        8,
        8,
        ErrorIfDirty(
            "at offset 4096: superblock: field sequence (byte 8) is 18446744073709551615, expected at most 2^63 - 1",
        ),
    ),
    (
        16,
        16,
        ErrorIfDirty(
            "at offset 4096: superblock: field disk id (byte 16) is ffffffff-ffff-ffff-ffff-ffffffffffff, expected",
        ),
    ),
    (
        32,
        8,
        Error(
            "at offset 4096: superblock: field incompatible features (byte 32) is 0xfffffffffffffffe, expected none that",
        ),
    ),
    (
        40,
        8,
        ReadsOnly(
            "the image uses features this version cannot write (bits 0xfffffffffffffffe): open it read-only",
        ),
    ),
    (48, 8, Reads), // compatible features
    (
        56,
        4,
        Error(
            "at offset 4096: superblock: field state (byte 56) is 4294967295, expected 1 (clean) or 2 (dirty)",
        ),
    ),
    (
        60,
        4,
        Error("at offset 4096: superblock: field flags (byte 60) is 0xffffffff, expected only bits 0 and 1"),
    ),
    (
        80,
        8,
        Error(
            "superblock: field ring offset (byte 80) is 18446744073709551615, expected a page behind the header backup",
        ),
    ),
    (
        88,
        8,
        Error(
            "superblock: field ring bytes (byte 88) is 18446744073709551615, expected whole pages, from 128 KiB to 16 MiB",
        ),
    ),
    (96, 16, Reads),  // meta tail
    (112, 16, Reads), // data tail
    (
        128,
        8,
        ErrorIfDirty(
            "at offset 4096: superblock: field next allocation (byte 128) is 18446744073709551615, expected at most",
        ),
    ),
    (
        136,
        8,
        Error(
            "superblock: field slot origin (byte 136) is 18446744073709551615, expected a page behind the block table",
        ),
    ),
    (144, 32, Reads), // fingerprint
    (
        176,
        696,
        Error(
            "at offset 4096: superblock: field lineage: flags (byte 576) is 0xffffffff, expected only bit 0",
        ),
    ),
    (872, 12, Reads),   // data CRCs
    (884, 3208, Reads), // reserved
];

/// Of the newest entry, and of its first record, an alloc.
const ENTRY: &[Field] = &[
    (0, 8, EntryIsNone),   // magic
    (8, 4, EntryIsNone),   // length
    (12, 4, EntryIsNone),  // kind
    (16, 16, EntryIsNone), // session id
    (
        32,
        8,
        Error("journal ring: field sequence (byte 24576) is 18446744073709551615, expected at most 2^63 - 1"),
    ),
    (40, 8, EntryIsNone), // place
    (
        48,
        8,
        Error(
            "journal ring: field meta tail (byte 24576) is 18446744073709551615, expected at most its own sequence, 3",
        ),
    ),
    (
        56,
        8,
        Error(
            "journal ring: field meta tail (byte 24576) is 18446744073709551615, expected a page of the ring of 2097152",
        ),
    ),
    (
        64,
        8,
        Error(
            "journal ring: field data tail (byte 24576) is 18446744073709551615, expected at most its own sequence, 3",
        ),
    ),
    (
        72,
        8,
        Error(
            "journal ring: field data tail (byte 24576) is 18446744073709551615, expected a page of the ring of 2097152",
        ),
    ),
    (80, 4, EntryIsNone), // record bytes
    (
        84,
        4,
        Error(
            "journal ring: field entry (byte 24576) is no valid entry that follows the one before, expected entry 3",
        ),
    ),
    (88, 4, Reads), // reserved
    (96, 2, Error("journal entry: field record type (byte 96) is 65535, expected 1 to 6")),
    (98, 2, Reads), // flags
    (
        100,
        4,
        Error(
            "journal entry: field record length (byte 100) is 4294967295, expected 32 to the end of the entry",
        ),
    ),
    (104, 4, Error("journal record: field block (byte 8) is 4294967295, expected below 8")),
    (
        108,
        4,
        Error("journal record: field slot (byte 12) is 4294967295, expected the sector of a slot's bitmap"),
    ),
    (
        112,
        8,
        Error(
            "journal entry: field record allocation sequence (byte 112) is 18446744073709551615, expected at most 2^63 - 1",
        ),
    ),
    (120, 8, Reads), // first sector and sectors, which an alloc has not
];

struct Bench {
    _dir: tempfile::TempDir,
    path: PathBuf,
    clean: Vec<u8>,
    dirty: Vec<u8>,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.vhd");
        let made = |make: fn(&std::path::Path)| {
            make(&path);
            let bytes = fs::read(&path).unwrap();
            fs::remove_file(&path).unwrap();
            bytes
        };
        let (clean, dirty) = (made(images::ours), made(images::ours_dirty));
        Bench { _dir: dir, path, clean, dirty }
    }

    fn ones(&self, image: &[u8], fields: &[Field], patch: impl Fn(usize, &[u8])) {
        let is_dirty = image == self.dirty;
        for (at, length, gives) in fields {
            fs::write(&self.path, image).unwrap();
            patch(*at, &vec![0xff; *length]);
            self.judge(&format!("byte {at}, dirty: {is_dirty}"), gives, is_dirty);
        }
    }

    fn judge(&self, what: &str, gives: &Gives, is_dirty: bool) {
        let before = fs::read(&self.path).unwrap();
        for read_only in [true, false] {
            let opened = OpenOptions::new().read_only(read_only).open(&self.path);
            if opened.is_err() || read_only {
                assert!(fs::read(&self.path).unwrap() == before, "{what}: the file was changed");
            }
            let refused = match gives {
                Error(text) => Some(text),
                ErrorIfDirty(text) if is_dirty => Some(text),
                ReadsOnly(text) if !read_only => Some(text),
                _ => None,
            };
            match (opened, refused) {
                (Ok(disk), None) => right(what, &disk, !matches!(gives, EntryIsNone)),
                (Ok(_), Some(text)) => panic!("{what}: it opened, expected: {text}"),
                (Err(error), None) => panic!("{what}: {error}"),
                (Err(error), Some(text)) => {
                    let said = error.to_string();
                    assert!(said.contains(text), "{what}: {said}, expected: {text}");
                    assert!(said.contains(self.path.to_str().unwrap()), "{what}: no path in {said}");
                }
            }
        }
    }

    /// An image with a damaged structure opens with the right content and says `notice`.
    fn says(&self, what: &str, notice: &str) {
        let before = fs::read(&self.path).unwrap();
        for read_only in [true, false] {
            let opened = OpenOptions::new().read_only(read_only).open(&self.path);
            let disk = opened.unwrap_or_else(|error| panic!("{what}: {error}"));
            right(what, &disk, true);
            assert!(disk.notices().iter().any(|said| said.contains(notice)), "{what}: {:?}", disk.notices());
            assert!(!read_only || fs::read(&self.path).unwrap() == before, "{what}: the file was changed");
            if !read_only {
                disk.close().unwrap();
            }
        }
        // Closed once, it is whole.
        let disk = OpenOptions::new().read_only(true).open(&self.path).unwrap();
        assert_eq!(disk.notices(), [""; 0], "{what}");
    }
}

/// The disk's content, without or with what the newest entry of the journal tells of.
fn right(what: &str, disk: &Disk, with_newest: bool) {
    let mut found = vec![0xee; disk.size() as usize];
    disk.read_at(&mut found, 0).unwrap();
    let mut right = vec![0; 16 * MIB as usize];
    for block in [0, 1, 3].into_iter().filter(|&block| block != 3 || with_newest) {
        right[block * 2 * MIB as usize + 4096..][..8192].fill(block as u8 + 1);
    }
    assert!(found == right, "{what}: other content");
}

#[test]
fn a_field_of_ones_is_named_or_of_no_matter() {
    let bench = Bench::new();
    let path = &bench.path;
    let end = bench.clean.len() as u64 - 512;
    bench.ones(&bench.clean, FOOTER, |at, ones| {
        [0, BACKUP, end].iter().for_each(|&footer| images::patch::<512>(path, footer, at, ones, 64));
    });
    bench.ones(&bench.clean, HEADER, |at, ones| {
        [512, BACKUP + 512].iter().for_each(|&header| images::patch::<1024>(path, header, at, ones, 36));
    });
    for image in [&bench.clean, &bench.dirty] {
        bench.ones(image, SUPERBLOCK, |at, ones| {
            [4096, 8192].iter().for_each(|&superblock| images::patch_superblock(path, superblock, at, ones));
        });
    }
    bench.ones(&bench.dirty, ENTRY, |at, ones| {
        let newest = *images::places(path).last().unwrap();
        images::patch_entry(path, newest, |entry| entry[at..at + ones.len()].copy_from_slice(ones));
    });
    // Entries of the block table, whose one value of ones means that there is no block.
    fs::write(path, &bench.clean).unwrap();
    images::write(path, &0xffff_fffe_u32.to_be_bytes(), TABLE + 4 * 5);
    let text = "block table entry 5 is sector 4294967294: the block ends at";
    bench.judge("the block table", &Error(text), false);
}

/// A few bytes of what has a copy, of a closed image and of one that was not closed.
#[test]
fn a_copy_that_stands_in_is_told_of() {
    let bench = Bench::new();
    let end = bench.clean.len() - 512;
    let (superblock, front) = ("is not valid (superblock: field", "the start of the file was unreadable");
    let told = [
        (&bench.clean, 0..1536, front),
        (&bench.dirty, 0..1536, front),
        (&bench.clean, 4096..8192, superblock),
        (&bench.dirty, 4096..8192, superblock),
        (&bench.clean, 8192..12288, superblock),
        (&bench.dirty, 8192..12288, superblock),
        (&bench.clean, end..end + 512, "the footer at the end is not valid (footer: field"),
    ];
    for (image, range, notice) in told {
        let step = if range.len() == 4096 { 1024 } else { 256 };
        for at in range.step_by(step) {
            let mut bad = image.clone();
            bad[at] ^= 0x40;
            fs::write(&bench.path, &bad).unwrap();
            bench.says(&format!("byte {at}, dirty: {}", *image == bench.dirty), notice);
        }
    }
    // The ring's entries have no copy: an earlier one that is damaged is missed by the newest.
    let mut bad = bench.dirty.clone();
    bad[RING as usize + 40] ^= 1;
    fs::write(&bench.path, &bad).unwrap();
    bench.judge("the first entry", &Error("journal ring: field entry (byte 0) is no valid entry"), true);
}
