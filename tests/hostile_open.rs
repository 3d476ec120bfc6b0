//! What opening a broken or hostile image says, for each image of `support/hostile.rs`: the field with its value, or the content
//! that is right. docs/hostile-input.md lists the cases.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/hostile.rs"]
#[allow(dead_code, reason = "what a check finds is judged elsewhere")]
mod hostile;

use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions, ZeroMode};
use hostile::images;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

const MIB: u64 = 1 << 20;

/// What opening for reading gives.
enum Opening {
    /// Refused; the error says this.
    Refused(&'static str),
    /// Reads; of blocks 0 to 3 each is absent (0) or filled with a byte.
    Reads([u8; 4]),
    /// Opens; reading block 1 fails with this, the others are as by the last part.
    ReadsNot(&'static str, [u8; 4]),
    /// A fixed disk: the file's own bytes.
    ReadsAsItStands,
}
use Opening::{Reads, ReadsAsItStands, ReadsNot, Refused};

const ALL: Opening = Reads([1, 2, 0, 4]);

fn expected(name: &str) -> Opening {
    match name {
        "block size 0" => Refused("at offset 512: dynamic header: field block size (byte 32) is 0, expected"),
        "block size 1" => Refused("field block size (byte 32) is 1, expected a power of two from 512"),
        "block size 511" => Refused("field block size (byte 32) is 511, expected a power of two"),
        "block size 3 MiB" => Refused("field block size (byte 32) is 3145728, expected a power of two"),
        "block size 2^31" => Refused("field block size (byte 32) is 2147483648, expected"),
        "block size 2^32 - 1" => Refused("field block size (byte 32) is 4294967295, expected"),
        "0 table entries" => {
            Refused("dynamic header: field max table entries (byte 28) is 0, expected at least 1")
        }
        "0x40000001 table entries" => {
            Refused("field table offset (byte 16) is 1536 to 4294969344, expected a table inside the file")
        }
        "2^32 - 1 table entries" => Refused("is 1536 to 17179870720, expected a table inside the file"),
        "fewer table entries than blocks" => Refused(
            "at offset 512: dynamic header: field max table entries (byte 28) is 7, expected at least 8",
        ),
        "more table entries than blocks" => ALL,
        "table at 0" => Refused("field table offset (byte 16) is 0, expected a multiple of 512 above zero"),
        "table over the header" => {
            Refused("field table offset (byte 16) is 1024, expected a table clear of the dynamic header")
        }
        "table at an odd place" => {
            Refused("field table offset (byte 16) is 1537, expected a multiple of 512")
        }
        "table past the end" => Refused(
            "field table offset (byte 16) is 1073741824 to 1073742336, expected a table inside the file",
        ),
        "table above 2^63" => {
            Refused("field table offset (byte 16) is 9223372036854776320, expected a table that ends within")
        }
        "header named at the footer itself" => Refused(
            "at offset 0: dynamic header: field cookie (byte 0) is \"conectix\", expected \"cxsparse\"",
        ),
        "header named past the end" => {
            Refused("footer: field data offset (byte 16) is 1099511627776, expected")
        }
        "header named at 2^32 - 1" => Refused("footer: field data offset (byte 16) is 4294967295, expected"),
        "header named at all ones" => {
            Refused("footer: field data offset (byte 16) is 18446744073709551615, expected")
        }
        next if next.starts_with("a next structure") => ALL,
        "wrong checksum of the header" => Refused(
            "at offset 512: dynamic header: field checksum (byte 36) is 0xfffff48e, expected 0xfffff48d",
        ),
        "wrong checksum of the header, ours" => ALL,

        "entry 0" => Refused("block 5 is at offset 0, over the footer copy"),
        "entry 1" => Refused("block 5 is at offset 512, over the dynamic header"),
        "entry 2" => Refused("block 5 is at offset 1024, over the dynamic header"),
        "entry 3, the table itself" => Refused("block 5 is at offset 1536, over the block table"),
        "entry used twice" | "entry used three times" => Refused("block 5 at offset 8192 overlaps block 1"),
        "an entry past the end, and one used twice" => {
            Refused("block 6 is at offset 536870912 and ends at 536936960, past the file's")
        }
        "entry one sector into a block" => Refused("block 5 at offset 8704 overlaps block 1"),
        "entry one sector before the end of a block" => Refused("block 5 at offset 73728 overlaps block 1"),
        "entry past the end" => {
            Refused("block 5 is at offset 536870912 and ends at 536936960, past the file's")
        }
        "entry 0xFFFFFFFE" => {
            Refused("block 5 is at offset 2199023254528 and ends at 2199023320576, past the")
        }
        "entry in the private area" => {
            Refused("block table entry 5 is sector 1000 (offset 512000), inside the metadata below 3146240")
        }
        "entry used twice, ours" => Refused("block table entry 5 is sector 14343, as is another entry"),
        "entry past the end, ours" => Refused("block table entry 5 is sector 4294967294: the block ends at"),
        "an entry past the end, and one that was lost beside it" => {
            Refused("block table entry 6 is sector 4294967294: the block ends at")
        }
        "an entry one sector into a block of ours, and another program's block" => {
            Refused("block 6 overlaps another block of the table")
        }
        "entries behind the end of the disk" => ALL,
        "a sparse table of 4 GiB of zeros" => Refused("block 0 is at offset 0, over the footer copy"),

        "geometry 0/0/0" | "geometry 65535/255/255" | "geometry below the size" => ALL,
        "size 0" => Refused("footer: field current size (byte 48) is 0 bytes, expected at least one sector"),
        "size not a multiple of 512" => {
            Refused("field current size (byte 48) is 524287 bytes, expected a multiple")
        }
        "size above 2040 GiB" => {
            Refused("field current size (byte 48) is 2190433321472 bytes, expected at most")
        }
        "size 2^64 - 1" => Refused("field current size (byte 48) is 18446744073709551615 bytes, expected"),
        "disk type 0" => Refused("at offset 0: footer: field disk type (byte 60) is 0, expected 2 (fixed)"),
        "disk type 1" => Refused("footer: field disk type (byte 60) is 1, expected 2 (fixed)"),
        "disk type 5" => Refused("footer: field disk type (byte 60) is 5, expected 2 (fixed)"),
        "disk type 6" => Refused("footer: field disk type (byte 60) is 6, expected 2 (fixed)"),
        "saved state 1" | "reserved bytes of the footer" | "reserved bytes of the header" => ALL,
        "a backup of something else" => ALL,
        "footers that disagree, each with a right checksum" => ALL,
        "the copy at the start does not fit the file" => ALL,
        "wrong checksum of the footer" | "wrong checksum of the footer, ours" => ALL,
        "wrong checksum of the footer copy" => ALL,
        "both footers damaged" => Refused(
            "field checksum (byte 64) is 0xfffff7c6, expected 0xfffff7c5; the last sector holds no footer",
        ),
        "a footer of 511 bytes, and the copy damaged" => Refused(
            "footer: field checksum (byte 64) is 0xfffff7c6, expected 0xfffff7c5; the last sector holds",
        ),
        "start, footer of the backup and superblocks damaged" => {
            Refused("footer: field cookie (byte 0) is \"\\x00\\x00")
        }
        lost if lost.starts_with("both headers damaged, ") => {
            Refused("at offset 512: dynamic header: field checksum (byte 36) is 0x")
        }
        "a damaged start, and a backup of something else" => ALL,
        "footer of 511 bytes" => ALL,
        "blocks out of order" | "a hole between two blocks" | "some sectors between two blocks" => ALL,
        "a table right behind the blocks" => ALL,
        "no blocks at all" => Reads([0; 4]),
        "blocks in front of all others that nobody names" => Reads([0, 0, 0, 4]),

        "an empty file" => {
            Refused("footer: field length (byte 0) is a file of 0 bytes, expected at least the 512")
        }
        "a file of 511 bytes" => {
            Refused("footer: field length (byte 0) is a file of 511 bytes, expected at least")
        }
        "a sparse file of 2 TiB" => Refused("footer: field cookie (byte 0) is \"\\x00\\x00"),
        "a fixed disk with a VHD of the guest at its start" => ReadsAsItStands,
        "a fixed disk with a footer of 511 bytes" => ReadsAsItStands,
        named if named.starts_with("a fixed disk that names a header") => ReadsAsItStands,
        "a fixed disk with junk behind its footer" | "a fixed disk that was cut" => {
            Refused("expected \"conectix\"; the last sector holds no footer either")
        }
        "junk behind the footer" | "junk between the last block and the footer" => ALL,
        "a block that nobody names" => Reads([0, 2, 0, 4]),

        "a bitmap cut by the end of the file" => {
            Refused("block 3 is at offset 140288 and ends at 206336, past the")
        }
        "a block of ours cut by the end of the file" => {
            Refused("block table entry 3 is sector 22551: the block ends at 13643776, past the file")
        }
        "a block cut behind its bitmap"
        | "a block cut by the end of the file"
        | "a block cut by the end of the file, and an entry past that"
        | "a block cut by the end of the file, and an entry into it" => {
            Refused("block 3 is at offset 140288 and ends at 206336, past the")
        }
        "a bitmap of zeros over data" => Reads([1, 0, 0, 4]),
        "a bitmap of zeros over data, ours" => ReadsNot(
            "the sector bitmap of block 1 at offset 7343616 has bits that are clear, in a block that was allocated with",
            [1, 2, 0, 4],
        ),
        "bits for sectors behind the end of the disk" => ALL,
        "wrong CRC of a block header" => {
            ReadsNot("at offset 7340032: block header: field CRC (byte 60) is 0x", [1, 2, 0, 4])
        }
        "a differencing disk of which all bits are set" => Refused("its parent (id 09090909-"),

        "a locator with a huge data space" => Refused(
            "locator W2ru: parent locator: field data length (byte 8) is 4294966784, expected 1 to 65536 bytes",
        ),
        "a locator without data space" => Refused(
            "locator W2ru: parent locator: field data length (byte 8) is 20, expected 0 bytes, as its data space",
        ),
        "a locator over the table" | "a locator past the end" => Refused(
            "locator W2ru: parent locator: field payload (byte 0) is \"\", expected a path that names a file",
        ),
        "a locator over a block" | "a locator over the last sector of a block" => {
            Refused("locator W2ru \"\u{202}\u{202}")
        }
        "eight locators of one kind"
        | "locators in reverse, one right behind the other"
        | "a locator in a notation that nobody reads" => Refused("locator W2ru \"base.vhd\": "),
        "W2ku and W2ru that disagree" => {
            Refused("locator W2ku \"C:/other.x\": it is a path of Windows, whose folders mean nothing here")
        }
        "unpaired surrogates" => Refused("locator W2ru \"\\xed\\xa0\\x80A\": "),
        "an odd number of bytes" => {
            Refused("field payload (byte 0) is 19 bytes, expected whole UTF-16 units")
        }
        "a URL of another scheme" => {
            Refused("is \"http://host/base\", expected a URL that starts with file://")
        }
        "no parent id" => Refused("its parent (id 00000000-0000-0000-0000-000000000000) was not found"),

        "both superblocks bad" | "one superblock bad" | "superblocks of one sequence" => ALL,
        "one superblock of another disk" | "both superblocks of another disk" => ALL,
        "a disk with a new unique id" => ALL,
        "a slot origin inside the table" => Refused(
            "at offset 4096: superblock: field slot origin (byte 136) is 3145728, expected a page behind",
        ),
        "a ring of 2^63 bytes" => Refused(
            "at offset 4096: superblock: field ring bytes (byte 88) is 9223372036854775808, expected whole pages",
        ),
        "the mark of a failed sync" | "an allocation above the superblock's count" => ALL,
        "both superblocks lost, and the page of a block of zeros"
        | "both superblocks lost, and the header elsewhere" => ALL,
        "both superblocks lost, and another program's block" => Reads([1, 2, 3, 4]),
        "both superblocks lost, and blocks of 32 MiB" => Reads([0; 4]),
        "a bitmap of zeros in a file that was not closed" => {
            ReadsNot("the sector bitmap of block 1 at offset 7343616 has bits that are clear", [1, 0, 0, 4])
        }
        "a block page lost in a file that was not closed" => {
            ReadsNot("the header of block 1 in the page at offset 7340032 is missing", [1, 0, 0, 4])
        }
        "superblocks lost in a file that was not closed" => {
            Refused("a journal is ahead of the file, but neither superblock is valid")
        }

        "a journal to be replayed" => ALL,
        "a journal entry with a wrong CRC" | "a journal with a gap behind a block with clear bits" => {
            Refused(
                "journal ring: field entry (byte 12288) is no valid entry that follows the one before, expected entry 2",
            )
        }
        // What was flushed last is lost: it stood there alone.
        "the newest journal entry cut" => Reads([1, 2, 0, 0]),
        "journal tails behind the newest entry" => Refused(
            "journal ring: field meta tail (byte 24576) is 18446744073709551615, expected at most its own",
        ),
        "a journal sequence of 2^64 - 1" => Refused(
            "journal ring: field sequence (byte 24576) is 18446744073709551615, expected at most 2^63 - 1",
        ),
        "a journal record longer than its entry" => Refused(
            "journal entry: field record length (byte 100) is 4294967295, expected 32 to the end of the entry",
        ),
        "a journal image aimed at guest data" => Refused(
            "journal record: field image (byte 8) is 4096 bytes at 7344128, expected a page of the BAT",
        ),
        "a journal image aimed behind all slots" => Refused(
            "journal record: field image (byte 8) is 4096 bytes at 2310346608848404480, expected a page of the BAT",
        ),
        "a journal image aimed at a superblock" => {
            Refused("journal record: field image (byte 8) is 4096 bytes at 4096, expected a page of the BAT")
        }
        // Nothing of the session that the superblocks name is in the ring: it had not flushed anything.
        "a journal of another session" => Reads([0; 4]),
        // A journal under a normal cookie is never replayed.
        "a dirty cookie turned back by hand" | "a cookie turned back, and footers that differ" => {
            Reads([0; 4])
        }
        "a cookie turned back, and another place for a block of the journal" => Reads([0, 0, 0, 4]),
        "a cookie turned back, and a block added behind the table" => Reads([0, 0, 3, 0]),
        "a cookie turned back, and a block added over the journal's" => Reads([0, 0, 3, 0]),
        "a cookie turned back in an image made elsewhere" => ALL,
        other => panic!("what opening \"{other}\" gives is not written down"),
    }
}

/// What opening for writing says of an image that can only be read.
fn read_only_because(name: &str) -> Option<&'static str> {
    match name {
        "both superblocks lost, and the header elsewhere" => Some(
            "its dynamic header is at offset 2048; this version writes only to images that have it at 512",
        ),
        "both superblocks lost, and blocks of 32 MiB" => {
            Some("field block size (byte 32) is 33554432, expected 4 KiB to 8 MiB")
        }
        "a sparse table of 4 GiB of zeros" => Some("its block table is too long to be written to"),
        "a damaged start, and a backup of something else" => Some(
            "the start of the file is lost, and its backup may be out of date: it is not what the last close",
        ),
        "footers that disagree, each with a right checksum" => {
            Some("the footers at the start and at the end differ (current size), that at the start counts")
        }
        "the copy at the start does not fit the file" => {
            Some("the footers at the start and at the end differ (current size), that at the end counts")
        }
        "wrong checksum of the footer copy" => {
            Some("the start of the file is damaged (footer: field checksum (byte 64) is 0xfffff7c6, expected")
        }
        "a cookie turned back in an image made elsewhere" => {
            Some("but its journal was never brought in place (1 records), so what was flushed last may be")
        }
        turned if turned.contains("cookie turned back") => {
            Some("but its journal was never brought in place (6 records), so what was flushed last may be")
        }
        _ => None,
    }
}

/// Bytes and time of change: what any write would alter. Huge files are sparse and seen by their length and time alone.
fn fingerprint(path: &Path) -> (u64, std::time::SystemTime, Vec<u8>) {
    let metadata = fs::metadata(path).unwrap();
    let bytes = if metadata.len() < 64 * MIB { fs::read(path).unwrap() } else { Vec::new() };
    (metadata.len(), metadata.modified().unwrap(), bytes)
}

/// The disk's bytes, by which of its first four blocks are there. Images of cowvhd hold 8 KiB in each, others whole blocks.
fn content(size: u64, blocks: [u8; 4]) -> Vec<u8> {
    let mut content = vec![0; size as usize];
    let ours = size > MIB;
    for (block, fill) in (0..).zip(blocks) {
        let (start, length) =
            if ours { (block * 2 * MIB + 4096, 8192) } else { (block * images::BLOCK, images::BLOCK) };
        let end = (start + length).min(size);
        if start < end {
            content[start as usize..end as usize].fill(fill);
        }
    }
    content
}

fn judge_content(name: &str, disk: &Disk, opening: &Opening, file: &[u8]) {
    let mut found = vec![0xee; disk.size() as usize];
    match opening {
        Refused(_) => panic!("{name}: it was to be refused"),
        Reads(blocks) => {
            disk.read_at(&mut found, 0).unwrap();
            // Of a disk that was cut to one sector of its last block only that is left.
            assert!(found == content(disk.size(), *blocks), "{name}: other content");
        }
        ReadsNot(text, blocks) => {
            let expected = content(disk.size(), *blocks);
            let error = disk.read_at(&mut found[..4096], 2 * MIB).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error}");
            assert!(error.to_string().contains(text), "{name}: {error}");
            for block in [0, 2, 3, 4] {
                let range = (block * 2 * MIB) as usize..((block + 1) * 2 * MIB) as usize;
                disk.read_at(&mut found[range.clone()], range.start as u64).unwrap();
                assert!(found[range.clone()] == expected[range], "{name}: block {block}");
            }
        }
        ReadsAsItStands => {
            disk.read_at(&mut found, 0).unwrap();
            assert!(found == file[..found.len()], "{name}: not the file's bytes");
        }
    }
}

fn judge(case: &hostile::Case) {
    let name = case.name;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    (case.build)(&path);
    let opening = expected(name);
    let before = fingerprint(&path);
    match OpenOptions::new().read_only(true).open(&path) {
        Ok(disk) => judge_content(name, &disk, &opening, &before.2),
        Err(error) => {
            let Refused(text) = opening else { panic!("{name}: {error}") };
            assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::ParentMissing), "{name}: {error}");
            assert!(error.to_string().contains(text), "{name}: {error}");
            assert!(error.to_string().contains(path.to_str().unwrap()), "{name}: no path in {error}");
        }
    }
    assert!(fingerprint(&path) == before, "{name}: opening it for reading changed it");
    let refusal = match &opening {
        Refused(text) => read_only_because(name).or(Some(*text)),
        _ => read_only_because(name),
    };
    match (OpenOptions::new().open(&path), refusal) {
        // What the image is when it opens, is the same as for reading.
        (Ok(disk), None) => judge_content(name, &disk, &opening, &before.2),
        (Ok(_), Some(_)) => panic!("{name}: it was opened for writing"),
        (Err(error), refusal) => {
            assert!(fingerprint(&path) == before, "{name}: it was refused, and changed");
            let text = refusal.unwrap_or_else(|| panic!("{name}: not opened for writing: {error}"));
            assert!(error.to_string().contains(text), "{name}: {error}");
            assert!(error.to_string().contains(path.to_str().unwrap()), "{name}: no path in {error}");
        }
    }
}

#[test]
fn every_image_is_refused_in_so_many_words_or_reads_right() {
    let failed: Vec<&str> = hostile::cases()
        .iter()
        .filter(|case| std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| judge(case))).is_err())
        .map(|case| case.name)
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

/// Nothing is waited for, and nothing is read: what is no regular file is refused by its kind.
#[test]
fn what_is_no_regular_file_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (fifo, socket) = (dir.path().join("fifo"), dir.path().join("socket"));
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let _listener = UnixListener::bind(&socket).unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("/dev/zero", &link).unwrap();
    for (path, kind) in [
        (fifo.as_path(), "it is a FIFO, expected a regular file"),
        (Path::new("/dev/zero"), "it is a device, expected a regular file"),
        (&link, "it is a device, expected a regular file"),
    ] {
        for read_only in [true, false] {
            let error = OpenOptions::new().read_only(read_only).open(path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io);
            assert!(error.to_string().contains(kind), "{error}");
        }
    }
    let error = OpenOptions::new().read_only(true).open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("it is a folder, expected a regular file"), "{error}");
    // The kernel itself refuses these.
    for (path, why) in [(dir.path(), "Is a directory"), (&socket, "No such device or address")] {
        let error = OpenOptions::new().open(path).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    // Block devices, as far as this machine has any; the kernel itself may refuse us a look.
    for name in fs::read_dir("/sys/class/block").unwrap().map(|entry| entry.unwrap().file_name()) {
        let path = Path::new("/dev").join(name);
        let refused = File::open(&path).is_err();
        let error = OpenOptions::new().read_only(true).open(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io, "{error}");
        let kind = error.to_string().contains("it is a device, expected a regular file");
        assert!(kind || refused, "{error}");
    }
}

/// A request that ends past the disk, or beyond 2^64, never reaches the file, whatever the request.
#[test]
fn requests_past_the_end_are_refused_whatever_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let (dynamic, fixed) = (dir.path().join("dynamic.vhd"), dir.path().join("fixed.vhd"));
    CreateOptions::new(MIB).create(&dynamic).unwrap();
    CreateOptions::new(MIB).fixed().create(&fixed).unwrap();
    for path in [&dynamic, &fixed] {
        let disk = OpenOptions::new().open(path).unwrap();
        disk.write_at(&[7; 512], MIB - 512).unwrap();
        disk.flush().unwrap();
        let before = fs::read(path).unwrap();
        let last_sector = u64::MAX - 511;
        for (offset, length) in [
            (MIB, 512),
            (MIB - 512, 1024),
            (0, MIB + 512),
            (0, last_sector),
            (MIB - 512, last_sector),
            (last_sector, 512),
            (last_sector, last_sector),
            (u64::MAX / 512 * 512, 512),
            (1 << 63, 512),
        ] {
            let mut errors = vec![
                disk.write_zeroes(offset, length, ZeroMode::MayPunch).unwrap_err(),
                disk.write_zeroes(offset, length, ZeroMode::KeepAllocated).unwrap_err(),
                disk.discard(offset, length).unwrap_err(),
                disk.extents(offset, length).unwrap_err(),
                disk.map(offset, length).unwrap_err(),
            ];
            if length <= 2 * MIB {
                errors.push(disk.write_at(&vec![1; length as usize], offset).unwrap_err());
                errors.push(disk.read_at(&mut vec![1; length as usize], offset).unwrap_err());
            }
            for error in errors {
                assert_eq!(error.kind(), ErrorKind::InvalidInput);
                let said = format!(
                    "access of {length} bytes at offset {offset} does not fit a disk of 1048576 bytes"
                );
                assert!(error.to_string().contains(&said), "{error}");
            }
        }
        assert!(fs::read(path).unwrap() == before, "the file was changed");
        disk.close().unwrap();
    }
}

/// The last sector that an entry can name lies below 2 TiB: a block that would lie behind it is no block of the file.
#[test]
fn no_block_is_allocated_past_two_to_the_32_sectors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    CreateOptions::new(16 * MIB).create(&path).unwrap();
    // The table moves to just below 2 TiB, and the slots with it: there is room for one block and no more.
    let table = (2 << 40) - 8 * MIB;
    images::move_table(&path, table, table + 4 * MIB);
    let mut allocated = 0;
    let disk = OpenOptions::new().open(&path).unwrap();
    for block in 0..8 {
        match disk.write_at(&[block as u8 + 1; 512], block * 2 * MIB) {
            Ok(()) => allocated += 1,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                break;
            }
        }
    }
    assert!((1..=2).contains(&allocated), "{allocated} blocks");
    disk.close().unwrap();
    drop(disk);
    let file = File::open(&path).unwrap();
    assert!(file.metadata().unwrap().len() < (2 << 40) + 4 * MIB);
    let disk = OpenOptions::new().read_only(true).open(&path).unwrap();
    for block in 0..8 {
        let mut sector = [0xee; 512];
        disk.read_at(&mut sector, block * 2 * MIB).unwrap();
        assert_eq!(sector, [if block < allocated { block as u8 + 1 } else { 0 }; 512], "block {block}");
    }
    let mut entry = [0; 4];
    file.read_exact_at(&mut entry, table).unwrap();
    assert!(u64::from(u32::from_be_bytes(entry)) * 512 > table, "the first block lies behind the table");
}

/// A journal is replayed as often as the machine crashes, and each time gives the same.
#[test]
fn a_journal_that_is_replayed_twice_changes_nothing_the_second_time() {
    let dir = tempfile::tempdir().unwrap();
    let (path, again) = (dir.path().join("disk.vhd"), dir.path().join("again.vhd"));
    images::ours_dirty(&path);
    let dirty = fs::read(&path).unwrap();
    drop(OpenOptions::new().open(&path).unwrap());
    let recovered = fs::read(&path).unwrap();
    // The structures of the file before the recovery, over what the recovery has left: the same journal once more.
    fs::write(&again, &recovered).unwrap();
    images::write(&again, &dirty[..3 * MIB as usize], 0);
    for path in [&path, &again] {
        let disk = OpenOptions::new().open(path).unwrap();
        let mut found = vec![0xee; disk.size() as usize];
        disk.read_at(&mut found, 0).unwrap();
        assert!(found == content(disk.size(), [1, 2, 0, 4]), "{path:?}");
        disk.close().unwrap();
    }
}
