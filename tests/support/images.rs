//! Images made here and by other programs, and the hands that damage them.

#![allow(dead_code, reason = "each test binary uses its part")]

use cowvhd::vhd::{DiskType, DynamicHeader, Footer, ParentLocator, Timestamp, UniqueId, checksum};
use cowvhd::{CreateOptions, OpenOptions};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

pub const MIB: u64 = 1 << 20;
/// Blocks of the images that are laid out by hand.
pub const BLOCK: u64 = 64 << 10;
/// Their table stands behind the header, with room up to the first block.
pub const TABLE: u64 = 1536;
pub const FIRST_BLOCK: u64 = 8192;
pub const STRIDE: u64 = BLOCK + 512;
pub const SIZE: u64 = 8 * BLOCK;
pub const RING: u64 = 256 << 10;
/// Where the table of an image made here stands.
pub const OUR_TABLE: u64 = 3 * MIB;

pub fn write(path: &Path, bytes: &[u8], at: u64) {
    File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

pub fn read<const N: usize>(path: &Path, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    bytes
}

pub fn length(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

pub fn set_length(path: &Path, bytes: u64) {
    File::options().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

/// Changes bytes of a VHD structure and makes its checksum right.
pub fn patch<const N: usize>(path: &Path, structure: u64, field: usize, bytes: &[u8], checksum_at: usize) {
    let mut whole: [u8; N] = read(path, structure);
    whole[field..field + bytes.len()].copy_from_slice(bytes);
    let sum = checksum(&whole, checksum_at);
    whole[checksum_at..checksum_at + 4].copy_from_slice(&sum.to_be_bytes());
    write(path, &whole, structure);
}

pub fn patch_header(path: &Path, field: usize, bytes: &[u8]) {
    patch::<1024>(path, 512, field, bytes, 36);
}

/// Both footers.
pub fn patch_footers(path: &Path, field: usize, bytes: &[u8]) {
    patch::<512>(path, 0, field, bytes, 64);
    patch::<512>(path, length(path) - 512, field, bytes, 64);
}

/// A disk of eight blocks, of which 0, 1 and 3 are there, out of order, as other programs make them.
pub fn foreign(path: &Path) {
    foreign_of(path, DiskType::Dynamic, &[]);
}

pub fn foreign_of(path: &Path, disk_type: DiskType, locators: &[(ParentLocator, Vec<u8>)]) {
    let id = UniqueId::from_bytes([7; 16]);
    let mut footer = Footer::new(disk_type, SIZE, id, Timestamp(700_000_000));
    footer.creator_app = *b"test";
    let mut header = DynamicHeader::new(TABLE, 8, BLOCK as u32);
    if disk_type == DiskType::Differencing {
        header.parent_unique_id = UniqueId::from_bytes([9; 16]);
        header.set_parent_name(&"base.vhd".encode_utf16().collect::<Vec<_>>()).unwrap();
    }
    let file = File::create(path).unwrap();
    for (index, (locator, payload)) in locators.iter().enumerate() {
        header.locators[index] = *locator;
        if locator.data_offset < MIB && locator.data_offset >= 2560 {
            file.write_all_at(payload, locator.data_offset).unwrap();
        }
    }
    let mut table = vec![0xff; 512];
    for (block, slot) in [(0, 1), (1, 0), (3, 2)] {
        let at = FIRST_BLOCK + slot * STRIDE;
        table[block * 4..][..4].copy_from_slice(&((at / 512) as u32).to_be_bytes());
        file.write_all_at(&[0xff; 16], at).unwrap();
        file.write_all_at(&vec![block as u8 + 1; BLOCK as usize], at + 512).unwrap();
    }
    file.write_all_at(&footer.to_bytes(), 0).unwrap();
    file.write_all_at(&header.to_bytes(), 512).unwrap();
    file.write_all_at(&table, TABLE).unwrap();
    file.write_all_at(&footer.to_bytes(), FIRST_BLOCK + 3 * STRIDE).unwrap();
}

/// An image of cowvhd, closed, of eight blocks with 0, 1 and 3 there.
pub fn ours(path: &Path) {
    make_ours(path, true);
}

/// The same, with flushed data in its journal.
pub fn ours_dirty(path: &Path) {
    make_ours(path, false);
}

/// The same with its blocks in place from an earlier session, and block 5 in the journal of the last.
pub fn ours_reopened(path: &Path) {
    ours(path);
    let disk = OpenOptions::new().open(path).unwrap();
    disk.write_at(&[6; 4096], 5 * 2 * MIB).unwrap();
    disk.flush().unwrap();
}

fn make_ours(path: &Path, closed: bool) {
    CreateOptions::new(16 * MIB).create(path).unwrap();
    let disk = OpenOptions::new().open(path).unwrap();
    for block in [1, 0, 3] {
        disk.write_at(&vec![block as u8 + 1; 8192], block * 2 * MIB + 4096).unwrap();
        disk.flush().unwrap();
    }
    if closed {
        disk.close().unwrap();
    }
}

/// Changes bytes of a superblock and makes its CRC right.
pub fn patch_superblock(path: &Path, at: u64, field: usize, bytes: &[u8]) {
    let mut page: [u8; 4096] = read(path, at);
    page[field..field + bytes.len()].copy_from_slice(bytes);
    let crc = crc32fast::hash(&page[..4092]);
    page[4092..].copy_from_slice(&crc.to_be_bytes());
    write(path, &page, at);
}

/// Moves the empty table of an image of cowvhd, and where its slots begin.
pub fn move_table(path: &Path, table: u64, slots: u64) {
    let bytes: [u8; 512] = read(path, OUR_TABLE);
    let footer: [u8; 512] = read(path, 0);
    write(path, &bytes, table);
    for header in [512, 12288 + 512] {
        patch::<1024>(path, header, 16, &table.to_be_bytes(), 36);
    }
    for superblock in [4096, 8192] {
        patch_superblock(path, superblock, 136, &slots.to_be_bytes());
    }
    write(path, &footer, slots);
}

/// Changes the bytes of the entry at a place of the ring and makes its CRC right.
pub fn patch_entry(path: &Path, place: u64, change: impl Fn(&mut [u8])) {
    let head: [u8; 12] = read(path, RING + place);
    let bytes = u32::from_be_bytes([head[8], head[9], head[10], head[11]]) as usize;
    let mut entry = vec![0; bytes];
    File::open(path).unwrap().read_exact_at(&mut entry, RING + place).unwrap();
    change(&mut entry);
    let mut hasher = crc32fast::Hasher::new();
    for part in [&entry[16..32], &entry[..92], &[0; 4], &entry[96..]] {
        hasher.update(part);
    }
    let crc = hasher.finalize().to_be_bytes();
    entry[92..96].copy_from_slice(&crc);
    write(path, &entry, RING + place);
}

/// The places of the entries in the ring, in order.
pub fn places(path: &Path) -> Vec<u64> {
    let mut places = Vec::new();
    let mut place = 0;
    loop {
        let head: [u8; 12] = read(path, RING + place);
        if head[..8] != *b"cowvhdJE" {
            return places;
        }
        places.push(place);
        place += u64::from(u32::from_be_bytes([head[8], head[9], head[10], head[11]]));
    }
}

/// Adds a block to an image made here, as another program does: at an offset in the file, with data where the others have it.
pub fn add_block(path: &Path, block: u64, at: u64) {
    write(path, &[0xff; 512], at);
    write(path, &vec![0; 2 * MIB as usize], at + 512);
    write(path, &vec![block as u8 + 1; 8192], at + 512 + 4096);
    write(path, &((at / 512) as u32).to_be_bytes(), OUR_TABLE + 4 * block);
}

/// The same of a closed image: where its footer is, which comes to stand behind.
pub fn append_block(path: &Path, block: u64) {
    let (end, footer) = (length(path) - 512, read::<512>(path, 0));
    add_block(path, block, end);
    write(path, &footer, end + 512 + 2 * MIB);
}
