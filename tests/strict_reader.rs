//! The strict reader of `support/strict_vhd.rs` on trial: it reads what qemu-img writes as qemu-img meant it, it reads
//! images laid out by hand here, and it refuses every damaged variant, saying why.
//!
//! Shares no code with the library either.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers are test code too")]

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

#[path = "support/strict_vhd.rs"]
mod strict_vhd;

use strict_vhd::{Guest, Kind, StrictVhd};

const ID: [u8; 16] = *b"0123456789abcdef";
const PARENT_ID: [u8; 16] = *b"fedcba9876543210";

// Images laid out by hand.

/// An image of blocks of `block_size` bytes: header at 512, locator at 1536, BAT at 2048, blocks in order behind it.
struct Layout {
    kind: u32,
    size: u64,
    block_size: u32,
    /// For each block its bitmap's first bytes and its data, where allocated.
    blocks: Vec<Option<(Vec<u8>, Vec<u8>)>>,
}

impl Layout {
    /// Two whole blocks and one sector; the first and the last are allocated, the first half of the first is present.
    fn small(kind: u32, block_size: u32) -> Self {
        let sectors = block_size / 512;
        let present: Vec<bool> = (0..sectors).map(|sector| sector < sectors.div_ceil(2)).collect();
        let data =
            (0..block_size).map(|i| if present[i as usize / 512] { (i / 7) as u8 | 1 } else { 0 }).collect();
        let last = (0..block_size).map(|i| if i < 512 { i as u8 | 1 } else { 0 }).collect();
        Layout {
            kind,
            size: u64::from(block_size) * 2 + 512,
            block_size,
            blocks: vec![Some((bitmap(&present), data)), None, Some((bitmap(&[true]), last))],
        }
    }

    fn build(&self) -> Vec<u8> {
        let bitmap_bytes = (self.block_size as usize / 512).div_ceil(8).next_multiple_of(512);
        let table_bytes = (self.blocks.len() * 4).next_multiple_of(512);
        let mut image = vec![0; 2048];
        image.extend(vec![0xFF; table_bytes]);
        for (number, (bitmap, data)) in
            self.blocks.iter().enumerate().filter_map(|(number, block)| Some((number, block.as_ref()?)))
        {
            let sector = image.len() as u32 / 512;
            put(&mut image, 2048 + number * 4, &sector.to_be_bytes());
            let bitmap_at = image.len();
            image.resize(bitmap_at + bitmap_bytes, 0);
            put(&mut image, bitmap_at, bitmap);
            image.extend(data);
        }

        put(&mut image, 512, b"cxsparse\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\0\0\0\0\0\0\x08\0\0\x01\0\0");
        put(&mut image, 512 + 28, &(self.blocks.len() as u32).to_be_bytes());
        put(&mut image, 512 + 32, &self.block_size.to_be_bytes());
        if self.kind == 4 {
            put(&mut image, 512 + 40, &PARENT_ID);
            put(&mut image, 512 + 64, b"\0p\0.\0v\0h\0d");
            put(&mut image, 512 + 576, b"W2ru\0\0\x02\0\0\0\0\x0E\0\0\0\0\0\0\0\0\0\0\x06\0");
            put(&mut image, 1536, b".\0\\\0p\0.\0v\0h\0d\0");
        }
        seal(&mut image, 512, 1024, 36);

        put(&mut image, 0, &footer(self.kind, self.size, ID));
        let footer = image[..512].to_vec();
        image.extend(footer);
        image
    }
}

fn bitmap(bits: &[bool]) -> Vec<u8> {
    bits.chunks(8)
        .map(|byte| byte.iter().enumerate().fold(0, |sum, (i, &bit)| sum | u8::from(bit) << (7 - i)))
        .collect()
}

/// A footer by creator `test`, whose geometry nobody asks for.
fn footer(kind: u32, size: u64, id: [u8; 16]) -> Vec<u8> {
    let mut footer = vec![0; 512];
    put(&mut footer, 0, b"conectix\0\0\0\x02\0\x01\0\0");
    put(&mut footer, 16, &if kind == 2 { u64::MAX } else { 512 }.to_be_bytes());
    put(&mut footer, 28, b"test");
    put(&mut footer, 40, &size.to_be_bytes());
    put(&mut footer, 48, &size.to_be_bytes());
    put(&mut footer, 60, &kind.to_be_bytes());
    put(&mut footer, 68, &id);
    seal(&mut footer, 0, 512, 64);
    footer
}

fn put(bytes: &mut [u8], offset: usize, new: &[u8]) {
    bytes[offset..offset + new.len()].copy_from_slice(new);
}

/// Makes the checksum right of the structure of `length` bytes at `offset`.
fn seal(bytes: &mut [u8], offset: usize, length: usize, checksum_at: usize) {
    put(bytes, offset + checksum_at, &[0; 4]);
    let sum: u32 = bytes[offset..offset + length].iter().map(|&byte| u32::from(byte)).sum();
    put(bytes, offset + checksum_at, &(!sum).to_be_bytes());
}

/// Changes both footers, with the right checksum.
fn change_footers(image: &mut [u8], offset: usize, new: &[u8]) {
    let end = image.len() - 512;
    for at in [0, end] {
        put(image, at + offset, new);
        seal(image, at, 512, 64);
    }
}

/// Changes the dynamic header, with the right checksum.
fn change_header(image: &mut [u8], offset: usize, new: &[u8]) {
    put(image, 512 + offset, new);
    seal(image, 512, 1024, 36);
}

fn refusal(image: &[u8]) -> String {
    match StrictVhd::from_bytes(image).and_then(|mut disk| disk.read_all()) {
        Ok(_) => "nothing was found wrong".into(),
        Err(refusal) => refusal,
    }
}

/// A parent that is known content.
struct Content(Vec<u8>, [u8; 16]);

impl Guest for Content {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn unique_id(&self) -> [u8; 16] {
        self.1
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> strict_vhd::Result<()> {
        let start = offset as usize;
        buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
        Ok(())
    }
}

#[test]
fn reads_dynamic_disks_of_every_block_size() {
    for shift in 9..=22 {
        let layout = Layout::small(3, 1 << shift);
        let image = layout.build();
        let mut disk = StrictVhd::from_bytes(&image).unwrap();
        let mut expected = vec![0; layout.size as usize];
        let block_size = layout.block_size as usize;
        put(&mut expected, 0, &layout.blocks[0].as_ref().unwrap().1);
        put(&mut expected, 2 * block_size, &layout.blocks[2].as_ref().unwrap().1[..512]);

        assert_eq!((disk.kind(), disk.size(), disk.unique_id()), (Kind::Dynamic, layout.size, ID));
        assert_eq!(disk.block_size(), layout.block_size.into());
        assert_eq!(disk.allocated_blocks(), [0, 2]);
        assert!(disk.read_all().unwrap() == expected, "blocks of {block_size} bytes");

        let mut part = vec![0; block_size + 512];
        disk.read_at(block_size as u64, &mut part).unwrap();
        assert!(part == expected[block_size..]);
    }
}

#[test]
fn reads_fixed_disks() {
    let content: Vec<u8> = (0..5 * 512u32).map(|i| (i % 251) as u8).collect();
    let image = [&content[..], &footer(2, content.len() as u64, ID)].concat();
    let mut disk = StrictVhd::from_bytes(&image).unwrap();
    assert_eq!(disk.kind(), Kind::Fixed);
    assert_eq!(disk.read_all().unwrap(), content);
    assert_eq!(disk.allocated_blocks(), [0; 0]);
}

#[test]
fn reads_differencing_disks_sector_by_sector() {
    let mut layout = Layout::small(4, 8192);
    // Bits one by one, and zeros that hide what the parent has.
    layout.blocks[0] =
        Some((vec![0xA5, 0x80], (0..16).flat_map(|i| [i as u8 * u8::from(i != 2); 512]).collect()));
    let image = layout.build();
    let parent = vec![0xEE; 3 * 8192 - 4 * 512 - 4096];
    let mut expected = parent.clone();
    expected.resize(layout.size as usize, 0);
    for sector in [0, 2, 5, 7, 8] {
        let value = if sector == 2 { 0 } else { sector as u8 };
        expected[sector * 512..][..512].fill(value);
    }
    put(&mut expected, 2 * 8192, &layout.blocks[2].as_ref().unwrap().1[..512]);

    let disk = StrictVhd::from_bytes(&image).unwrap();
    assert_eq!(disk.kind(), Kind::Differencing);
    assert_eq!((disk.parent_unique_id(), disk.parent_name()), (PARENT_ID, "p.vhd"));
    assert_eq!(disk.locators()[0].code, *b"W2ru");
    assert_eq!(disk.locators()[0].payload, b".\0\\\0p\0.\0v\0h\0d\0");
    assert_eq!((disk.locators()[0].offset, disk.locators()[0].space), (1536, 512));
    let short = parent[..2 * 8192].to_vec();
    let mut disk = disk.with_parent(Content(short, PARENT_ID)).unwrap();
    let mut seen = disk.read_all().unwrap();
    expected[2 * 8192 + 512..].fill(0);
    assert!(seen == expected);

    // The image as the parent of another: its own id, its own content.
    seen[..512].fill(0x77);
    let mut child = Layout::small(4, 512);
    child.size = layout.size;
    child.blocks = vec![None; layout.size as usize / 512];
    child.blocks[0] = Some((vec![0x80], vec![0x77; 512]));
    let mut child = child.build();
    change_header(&mut child, 40, &ID);
    let mut chain = StrictVhd::from_bytes(&child).unwrap().with_parent(disk).unwrap();
    assert!(chain.read_all().unwrap() == seen);
}

#[test]
fn differencing_disk_wants_the_right_parent() {
    let layout = Layout::small(4, 4096);
    let image = layout.build();
    let size = layout.size as usize;
    assert!(refusal(&image).contains("lies in the parent, which was not given"));
    let with = |size, id| StrictVhd::from_bytes(&image).unwrap().with_parent(Content(vec![0; size], id));
    assert!(with(size, PARENT_ID).is_ok());
    assert!(with(size, ID).err().unwrap().starts_with("the parent has id"));
    assert!(with(size + 512, PARENT_ID).err().unwrap().contains("its child only"));
    let dynamic = Layout::small(3, 4096).build();
    let refused = StrictVhd::from_bytes(&dynamic).unwrap().with_parent(Content(vec![], PARENT_ID));
    assert_eq!(refused.err().unwrap(), "a Dynamic disk has no parent");
}

#[test]
fn refuses_reads_that_do_not_fit() {
    let image = Layout::small(3, 4096).build();
    let mut disk = StrictVhd::from_bytes(&image).unwrap();
    for (offset, length) in
        [(1, 512), (0, 100), (8704, 512), (8192, 1024), (u64::MAX - 511, 512), (1 << 40, 0)]
    {
        disk.read_at(offset, &mut vec![0; length]).unwrap_err();
    }
    disk.read_at(8704, &mut []).unwrap();
}

#[test]
fn refuses_every_damage_to_a_dynamic_disk() {
    type Damage = fn(&mut Vec<u8>);
    // Header at 512, BAT of 3 entries at 2048, blocks of 512 + 4096 bytes at 2560 and 7168, footer at 11776.
    let cases: [(&str, Damage); 53] = [
        ("has no room for a footer", |image| image.truncate(511)),
        ("file length", |image| image.truncate(11776 + 511)),
        ("cookie", |image| image.truncate(11776)),
        ("cookie", |image| image.extend([0; 512])),
        ("cookie", |image| change_footers(image, 0, b"conectiX")),
        ("footer: checksum", |image| image[11776 + 64] ^= 1),
        ("footer: checksum", |image| image[11776 + 511] ^= 1),
        ("footer copy differs from the footer in byte 64", |image| image[64] ^= 1),
        ("footer copy differs from the footer in byte 67", |image| {
            image[84] = 1;
            seal(image, 0, 512, 64);
        }),
        ("features", |image| change_footers(image, 8, &[0; 4])),
        ("features", |image| change_footers(image, 11, &[6])),
        ("version", |image| change_footers(image, 12, &[0, 1, 0, 1])),
        ("data offset", |image| change_footers(image, 16, &4096u64.to_be_bytes())),
        ("original size", |image| change_footers(image, 40, &1u64.to_be_bytes())),
        ("current size", |image| change_footers(image, 48, &0u64.to_be_bytes())),
        ("current size", |image| change_footers(image, 48, &1025u64.to_be_bytes())),
        ("2040 GiB", |image| change_footers(image, 48, &((2040u64 << 30) + 512).to_be_bytes())),
        ("larger than the disk", |image| change_footers(image, 56, &[0, 2, 4, 17])),
        ("geometry", |image| change_footers(image, 28, b"win \0\x0A\0\0Wi2k")),
        ("disk type 5", |image| change_footers(image, 60, &5u32.to_be_bytes())),
        ("unique id", |image| change_footers(image, 68, &[0; 16])),
        ("saved state", |image| change_footers(image, 84, &[2])),
        ("byte 85 is not zero", |image| change_footers(image, 85, &[1])),
        ("byte 511 is not zero", |image| change_footers(image, 511, &[1])),
        ("cookie is \"cowdirty\"", |image| change_header(image, 0, b"cowdirty")),
        ("dynamic header: checksum", |image| image[512 + 39] ^= 1),
        ("dynamic header: checksum", |image| image[512 + 1023] ^= 1),
        ("dynamic header: data offset", |image| change_header(image, 8, &[0; 8])),
        ("dynamic header: version", |image| change_header(image, 24, &[0, 1, 0, 1])),
        ("2 BAT entries for 3 blocks", |image| change_header(image, 28, &2u32.to_be_bytes())),
        ("4 BAT entries for 3 blocks", |image| change_header(image, 28, &4u32.to_be_bytes())),
        ("4294967295 BAT entries", |image| change_header(image, 28, &[0xFF; 4])),
        ("block size 0", |image| change_header(image, 32, &0u32.to_be_bytes())),
        ("block size 256", |image| change_header(image, 32, &256u32.to_be_bytes())),
        ("block size 3072", |image| change_header(image, 32, &3072u32.to_be_bytes())),
        ("cannot lie at 1", |image| change_header(image, 16, &1u64.to_be_bytes())),
        ("cannot lie at 2049", |image| change_header(image, 16, &2049u64.to_be_bytes())),
        ("cannot lie at 11776", |image| change_header(image, 16, &11_776u64.to_be_bytes())),
        ("cannot lie at 18446744073709551104", |image| {
            change_header(image, 16, &(u64::MAX - 511).to_be_bytes())
        }),
        ("BAT: byte 0 of the padding", |image| change_header(image, 16, &1024u64.to_be_bytes())),
        ("BAT: byte 499 of the padding", |image| image[2559] = 0),
        ("byte 40 is not zero", |image| change_header(image, 40, &[1])),
        ("byte 56 is not zero", |image| change_header(image, 56, &[1])),
        ("byte 60 is not zero", |image| change_header(image, 60, &[1])),
        ("byte 65 is not zero", |image| change_header(image, 65, b"p")),
        ("byte 583 is not zero", |image| change_header(image, 583, &[1])),
        ("byte 1023 is not zero", |image| change_header(image, 1023, &[1])),
        ("the footer copy (0..512) runs into block 1", |image| put(image, 2052, &[0; 4])),
        ("the footer copy (0..512) runs into", |image| put(image, 2052, &0u32.to_be_bytes())),
        ("block 0 (2560..7168) runs into block 1", |image| put(image, 2052, &5u32.to_be_bytes())),
        ("block 2 (7168..11776) runs into block 1 (10240..14848)", |image| {
            put(image, 2052, &20u32.to_be_bytes())
        }),
        ("runs into the footer", |image| put(image, 2056, &15u32.to_be_bytes())),
        ("block 1 (2199023254528..", |image| put(image, 2052, &0xFFFF_FFFEu32.to_be_bytes())),
    ];
    let good = Layout::small(3, 4096).build();
    assert_eq!(good.len(), 11776 + 512);
    for (number, (expected, damage)) in cases.into_iter().enumerate() {
        let mut image = good.clone();
        damage(&mut image);
        let refusal = refusal(&image);
        assert!(refusal.contains(expected), "case {number}: \"{refusal}\" does not say \"{expected}\"");
    }
}

#[test]
fn refuses_data_under_a_clear_bit() {
    let mut image = Layout::small(3, 4096).build();
    image[2560 + 512 + 2048 + 3] = 1;
    let mut disk = StrictVhd::from_bytes(&image).unwrap();
    disk.read_at(0, &mut [0; 2048]).unwrap();
    disk.read_at(2560, &mut [0; 1536]).unwrap();
    let refusal = disk.read_at(1536, &mut [0; 1024]).unwrap_err();
    assert_eq!(refusal, "block 0: byte 2051 of the disk is not zero, but its bit is clear");
}

#[test]
fn data_beyond_the_disk_is_not_looked_at() {
    let mut image = Layout::small(3, 4096).build();
    image[7168 + 512 + 512] = 1;
    StrictVhd::from_bytes(&image).unwrap().read_all().unwrap();
}

#[test]
fn refuses_every_damage_to_a_differencing_disk() {
    type Damage = fn(&mut Vec<u8>);
    let cases: [(&str, Damage); 20] = [
        ("the parent's id is zero", |image| change_header(image, 40, &[0; 16])),
        ("the parent name has no end", |image| change_header(image, 64, &[0x61; 512])),
        ("behind the end of the parent name", |image| change_header(image, 64 + 20, b"\0a")),
        ("unknown code OURJ", |image| change_header(image, 576, b"OURJ")),
        ("a second one of code W2ru", |image| {
            let first = image[512 + 576..][..24].to_vec();
            change_header(image, 600, &first);
        }),
        ("unused locator", |image| change_header(image, 576, &[0; 4])),
        ("unused locator", |image| change_header(image, 767, &[1])),
        ("reserved word of a locator", |image| change_header(image, 576 + 12, &[1])),
        ("space 0", |image| change_header(image, 576 + 4, &[0; 4])),
        ("space 513", |image| change_header(image, 576 + 4, &513u32.to_be_bytes())),
        ("0 bytes in a space of 512", |image| change_header(image, 576 + 8, &[0; 4])),
        ("513 bytes in a space of 512", |image| change_header(image, 576 + 8, &513u32.to_be_bytes())),
        ("is not in the file", |image| change_header(image, 576 + 16, &[0xFF; 8])),
        ("is not in the file", |image| change_header(image, 576 + 16, &11_776u64.to_be_bytes())),
        ("not UTF-16", |image| change_header(image, 576 + 8, &13u32.to_be_bytes())),
        ("not UTF-16", |image| change_header(image, 576 + 8, &16u32.to_be_bytes())),
        ("not a file URL", |image| change_header(image, 576, b"MacX")),
        ("runs into the payload of locator 0", |image| change_header(image, 576 + 16, &512u64.to_be_bytes())),
        ("the payload of locator 0 (1536..2560) runs into the BAT", |image| {
            change_header(image, 576 + 4, &2u32.to_be_bytes());
        }),
        ("neither parent name nor locator", |image| {
            change_header(image, 64, &[0; 10]);
            change_header(image, 576, &[0; 24]);
        }),
    ];
    let good = Layout::small(4, 4096).build();
    assert!(StrictVhd::from_bytes(&good).is_ok());
    for (number, (expected, damage)) in cases.into_iter().enumerate() {
        let mut image = good.clone();
        damage(&mut image);
        let refusal = refusal(&image);
        assert!(refusal.contains(expected), "case {number}: \"{refusal}\" does not say \"{expected}\"");
    }
}

#[test]
fn refuses_every_damage_to_a_fixed_disk() {
    let good = [&[1; 1024][..], &footer(2, 1024, ID)].concat();
    assert!(StrictVhd::from_bytes(&good).is_ok());
    assert!(
        refusal(&[&good[..512], &good].concat())
            .contains("a fixed disk of 1024 bytes has 1536 bytes of data")
    );
    assert!(refusal(&good[512..]).contains("has 512 bytes of data"));
    let mut image = good.clone();
    put(&mut image, 1024 + 16, &512u64.to_be_bytes());
    seal(&mut image, 1024, 512, 64);
    assert!(refusal(&image).contains("data offset"));
    // A guest may write a whole VHD into its disk: that is data.
    let mut inner = Layout::small(3, 512).build();
    inner.extend(footer(2, inner.len() as u64, PARENT_ID));
    assert_eq!(StrictVhd::from_bytes(&inner).unwrap().kind(), Kind::Fixed);
}

/// Overlaps are found by sorting: comparing each of these blocks with each other would take minutes.
#[test]
fn many_blocks_are_checked_fast() {
    let blocks = 1 << 18;
    let layout = Layout {
        kind: 3,
        size: 512 * blocks,
        block_size: 512,
        blocks: vec![Some((vec![0x80], vec![5; 512])); blocks as usize],
    };
    let mut image = layout.build();
    StrictVhd::from_bytes(&image).unwrap();
    let last = image[2048..2052].to_vec();
    put(&mut image, 2048 + 4 * (blocks as usize - 1), &last);
    assert!(refusal(&image).contains("runs into block"));
}

// Images by qemu-img.

fn qemu_img(arguments: &[&str], from: &Path, to: &Path) {
    let output = Command::new("qemu-img").arg("convert").args(arguments).args([from, to]).output();
    let output = output.expect("qemu-img is missing: apt-get install qemu-utils");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Bytes with a pattern that names its sector, zeros in between: some blocks are written, others never.
fn raw_content(sectors: u64) -> Vec<u8> {
    let mut content = vec![0; sectors as usize * 512];
    for (number, sector) in content.chunks_mut(512).enumerate() {
        let in_hole = number / 4096 % 3 == 1;
        let in_gap = number % 64 >= 40;
        if !in_hole && !in_gap {
            sector.fill((number % 255) as u8 + 1);
            put(sector, 0, &(number as u64).to_be_bytes());
        }
    }
    content
}

#[test]
fn reads_what_qemu_img_writes() {
    let folder = tempfile::tempdir().unwrap();
    let (raw, vhd) = (folder.path().join("disk.raw"), folder.path().join("disk.vhd"));
    for (sectors, kind, options) in [
        (20_483, Kind::Dynamic, "subformat=dynamic,force_size=on"),
        (16_384, Kind::Dynamic, "subformat=dynamic,force_size=on"),
        (20_483, Kind::Dynamic, "subformat=dynamic,force_size=off"),
        (20_483, Kind::Fixed, "subformat=fixed,force_size=on"),
        (20_483, Kind::Fixed, "subformat=fixed,force_size=off"),
    ] {
        let content = raw_content(sectors);
        fs::write(&raw, &content).unwrap();
        qemu_img(&["-f", "raw", "-O", "vpc", "-o", options], &raw, &vhd);

        let mut disk = StrictVhd::open(File::open(&vhd).unwrap()).unwrap();
        assert_eq!(disk.kind(), kind);
        let seen = disk.read_all().unwrap();
        let (seen, rounded) = seen.split_at(content.len());
        assert!(seen == content, "{sectors} sectors, {options}");
        assert!(rounded.iter().all(|&byte| byte == 0));
        if options.ends_with("on") {
            assert!(rounded.is_empty());
        }
        if kind == Kind::Dynamic {
            assert_eq!(disk.block_size(), 2 << 20);
            assert!(!disk.allocated_blocks().contains(&1), "a block of zeros takes no place");
        }
    }
}

#[test]
fn refuses_damage_to_what_qemu_img_writes() {
    let folder = tempfile::tempdir().unwrap();
    let (raw, vhd) = (folder.path().join("disk.raw"), folder.path().join("disk.vhd"));
    fs::write(&raw, raw_content(12_288)).unwrap();
    qemu_img(&["-f", "raw", "-O", "vpc", "-o", "force_size=on"], &raw, &vhd);
    let good = fs::read(&vhd).unwrap();
    StrictVhd::from_bytes(&good).unwrap().read_all().unwrap();

    // The footer copy, the dynamic header, and the BAT with its padding: no byte of them can change unseen.
    for offset in 0..2048 {
        let mut image = good.clone();
        image[offset] ^= 0x10;
        assert_ne!(refusal(&image), "nothing was found wrong", "byte {offset}");
    }
    for (expected, end) in
        [("footer", good.len() - 512), ("footer", good.len() - 4096), ("file length", good.len() - 1)]
    {
        assert!(refusal(&good[..end]).contains(expected));
    }
}

/// The other way round: what is laid out by hand above is an image to qemu-img too.
#[test]
fn qemu_img_reads_the_same_from_images_laid_out_by_hand() {
    let folder = tempfile::tempdir().unwrap();
    let (raw, vhd) = (folder.path().join("disk.raw"), folder.path().join("disk.vhd"));
    for block_size in [4096, 512 << 10, 2 << 20] {
        let image = Layout::small(3, block_size).build();
        fs::write(&vhd, &image).unwrap();
        qemu_img(&["-f", "vpc", "-O", "raw"], &vhd, &raw);
        let seen = StrictVhd::from_bytes(&image).unwrap().read_all().unwrap();
        assert!(fs::read(&raw).unwrap() == seen, "blocks of {block_size} bytes");
    }
}
