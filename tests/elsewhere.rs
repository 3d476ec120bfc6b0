//! Dynamic images made elsewhere, written to: other programs read what was written here, and refuse the file until it is closed;
//! what they write in turn is found here. Judged by qemu-img and by a strict reader that shares no code with the library.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/qemu.rs"]
mod qemu;
#[path = "support/strict_vhd.rs"]
mod strict_vhd;

use cowvhd::check::check;
use cowvhd::vfs::HostVfs;
use cowvhd::vhd::{
    DiskType, DynamicHeader, Footer, ParentLocator, PlatformCode, Timestamp, UniqueId, bat_bytes,
};
use cowvhd::{CreateOptions, Disk, DiskInfo, ErrorKind, JournalState, OpenOptions, upgrade};
use qemu::{qemu_img, qemu_io};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use strict_vhd::{Guest, StrictVhd};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 << 20;

fn open(path: &Path) -> Disk {
    OpenOptions::new().open(path).unwrap()
}

fn open_read_only(path: &Path) -> Disk {
    OpenOptions::new().read_only(true).open(path).unwrap()
}

/// A disk and what it should hold.
struct Model {
    dir: tempfile::TempDir,
    path: PathBuf,
    content: Vec<u8>,
}

impl Model {
    /// An image of QEMU's with data here and there.
    fn of_qemu(size: u64, options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.vhd");
        let mut content = vec![0; size as usize];
        for (number, chunk) in content.chunks_mut(700_000).enumerate().filter(|(number, _)| number % 5 < 2) {
            chunk.fill(number as u8 + 1);
        }
        let raw = dir.path().join("raw");
        fs::write(&raw, &content).unwrap();
        let names = [raw.to_str().unwrap(), path.to_str().unwrap()];
        qemu_img(&["convert", "-f", "raw", "-O", "vpc", "-o", options, names[0], names[1]]);
        content.resize(open_read_only(&path).size() as usize, 0);
        Model { dir, path, content }
    }

    fn write(&mut self, disk: &Disk, offset: u64, length: u64, byte: u8) {
        let end = (offset + length).min(self.content.len() as u64);
        let range = offset as usize..end as usize;
        self.content[range.clone()].fill(byte);
        if byte == 0 {
            disk.discard(offset, end - offset).unwrap();
        } else {
            disk.write_at(&self.content[range], offset).unwrap();
        }
    }

    /// Small and large, over present blocks and absent ones, and whole blocks discarded.
    fn some_writes(&mut self, disk: &Disk, seed: u64) {
        let size = self.content.len() as u64;
        let blocks = size / BLOCK;
        for number in 0..14 {
            let byte = (seed * 20 + number + 1) as u8 | 1;
            let at = (seed * 7919 + number * 104_729) * 512 % size;
            match number % 7 {
                0 => self.write(disk, at, 512, byte),
                1 => self.write(disk, at / 4096 * 4096, 4096, byte),
                2 => self.write(disk, at, 300 * 512, byte),
                3 => self.write(disk, (at / BLOCK) % blocks * BLOCK, BLOCK, 0),
                4 => self.write(disk, at, 3 * 512, 0),
                5 => disk.flush().unwrap(),
                _ => self.write(disk, size - 512, 512, byte),
            }
        }
    }

    #[track_caller]
    fn check_disk(&self, disk: &Disk) {
        let mut found = vec![0xee; self.content.len()];
        disk.read_at(&mut found, 0).unwrap();
        let wrong = found.iter().zip(&self.content).position(|(found, right)| found != right);
        assert_eq!(wrong.map(|at| (at, found[at], self.content[at])), None);
    }

    /// Other programs read the closed image right.
    fn check_closed(&self) {
        let bytes = fs::read(&self.path).unwrap();
        let mut strict = StrictVhd::from_bytes(&bytes).unwrap();
        let mut theirs = vec![0; strict.size() as usize];
        strict.read_at(0, &mut theirs).unwrap();
        assert!(theirs == self.content);
        let raw = self.dir.path().join("back");
        let names = [self.path.to_str().unwrap(), raw.to_str().unwrap()];
        qemu_img(&["convert", "-f", "vpc", "-O", "raw", names[0], names[1]]);
        assert!(fs::read(&raw).unwrap() == self.content);
        assert!(check(Arc::new(HostVfs), &self.path).unwrap().is_sound());
    }
}

fn is_refused_by_qemu(path: &Path) {
    let output =
        Command::new("qemu-img").args(["info", "-f", "vpc", path.to_str().unwrap()]).output().unwrap();
    assert!(!output.status.success(), "{output:?}");
}

#[test]
fn images_of_qemu_take_writes() {
    for (size, options) in [
        (30 * MIB + 5 * 512, "subformat=dynamic,force_size"),
        (34 * MIB, "subformat=dynamic"),
        (3 * MIB, "subformat=dynamic,force_size"),
    ] {
        let mut model = Model::of_qemu(size, options);
        let identity = fs::read(&model.path).unwrap()[..512].to_vec();
        for session in 0..4 {
            let disk = open(&model.path);
            model.check_disk(&disk);
            model.some_writes(&disk, session);
            model.check_disk(&disk);
            if session % 2 == 1 {
                disk.flush().unwrap();
                drop(disk);
                // After a crash.
                is_refused_by_qemu(&model.path);
                model.check_disk(&open_read_only(&model.path));
                let disk = open(&model.path);
                assert_eq!(disk.notices().len(), 1, "{:?}", disk.notices());
                model.check_disk(&disk);
                disk.close().unwrap();
            } else {
                disk.close().unwrap();
            }
            model.check_closed();
            let bytes = fs::read(&model.path).unwrap();
            assert!(bytes[..512] == identity && bytes[bytes.len() - 512..] == identity);
            // The journal is gone.
            let most = size.next_multiple_of(BLOCK) * 2 + 4 * BLOCK;
            assert!((bytes.len() as u64) < most, "{} bytes for {size}", bytes.len());
            let occupied = fs::metadata(&model.path).unwrap().blocks() * 512;
            assert!(occupied < size.next_multiple_of(BLOCK) + 3 * MIB, "{occupied}");
            // QEMU writes in between.
            let at = (session * 5 + 3) * BLOCK % (model.content.len() as u64 - BLOCK) / 4096 * 4096;
            qemu_io(&model.path, &[format!("write -P {} {at} 4096", 200 + session)]);
            model.content[at as usize..at as usize + 4096].fill(200 + session as u8);
            model.check_closed();
        }
    }
}

/// Nothing is lost of space between two sessions: what one has freed the next one uses.
#[test]
fn a_disk_that_is_rewritten_does_not_grow_for_ever() {
    let mut model = Model::of_qemu(16 * MIB, "subformat=dynamic,force_size");
    let mut lengths = Vec::new();
    for session in 0..6 {
        let disk = open(&model.path);
        for block in 0..8 {
            model.write(&disk, block * BLOCK, BLOCK, 0);
            disk.flush().unwrap();
            model.write(&disk, block * BLOCK, BLOCK, session + 1);
        }
        disk.close().unwrap();
        model.check_closed();
        lengths.push(fs::metadata(&model.path).unwrap().len());
    }
    assert!(lengths.iter().all(|&length| length <= 2 * 16 * MIB + 4 * BLOCK), "{lengths:?}");
    assert!(lengths[5] <= lengths[3], "{lengths:?}");
}

/// Blocks of other programs follow each other without gaps; a few of them come to stand where one of ours would, with the block
/// before them in what would be their page.
#[test]
fn blocks_that_stand_where_ours_would_by_coincidence() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    let (count, block_bytes) = (300u64, 64u64 << 10);
    let start = 1536 + bat_bytes(count as u32);
    let size = count * block_bytes;
    let footer = Footer::new(DiskType::Dynamic, size, UniqueId::from_bytes([5; 16]), Timestamp(1)).to_bytes();
    let header = DynamicHeader::new(1536, count as u32, block_bytes as u32).to_bytes();
    let file = fs::File::create(&path).unwrap();
    let mut content = Vec::new();
    for block in 0..count {
        let at = start + block * (block_bytes + 512);
        let data = vec![block as u8 | 1; block_bytes as usize];
        file.write_all_at(&((at / 512) as u32).to_be_bytes(), 1536 + 4 * block).unwrap();
        file.write_all_at(&[0xff; 512], at).unwrap();
        file.write_all_at(&data, at + 512).unwrap();
        content.extend(data);
    }
    file.write_all_at(&vec![0xff; (start - 1536 - 4 * count) as usize], 1536 + 4 * count).unwrap();
    file.write_all_at(&footer, 0).unwrap();
    file.write_all_at(&header, 512).unwrap();
    file.write_all_at(&footer, start + count * (block_bytes + 512)).unwrap();
    let mut model = Model { dir, path, content };
    for session in 0..3 {
        let disk = open(&model.path);
        for block in (session..count).step_by(2) {
            let at = block * block_bytes;
            if block % 6 < 3 {
                model.write(&disk, at, block_bytes, 0);
            } else {
                model.write(&disk, at + 512 * (block % 100), 4096, 77);
            }
        }
        disk.flush().unwrap();
        model.check_disk(&disk);
        if session == 1 {
            drop(disk);
            model.check_disk(&open_read_only(&model.path));
            open(&model.path).close().unwrap();
        } else {
            disk.close().unwrap();
        }
        model.check_closed();
    }
}

/// A footer of 511 bytes, and none at all, are made whole by the close.
#[test]
fn footers_that_are_short_or_missing() {
    for cut in [1, 512, 0] {
        let mut model = Model::of_qemu(8 * MIB, "subformat=dynamic,force_size");
        let file = fs::OpenOptions::new().write(true).open(&model.path).unwrap();
        let length = file.metadata().unwrap().len();
        file.set_len(length - cut).unwrap();
        let disk = open(&model.path);
        model.check_disk(&disk);
        model.some_writes(&disk, 3);
        disk.close().unwrap();
        model.check_closed();
    }
}

/// What cannot be written to is refused before a byte is changed.
#[test]
fn what_speaks_against_writing_is_told_before_a_byte_changes() {
    let model = Model::of_qemu(8 * MIB, "subformat=dynamic,force_size");
    let good = fs::read(&model.path).unwrap();
    let refused = |bytes: &[u8], words: &str| {
        fs::write(&model.path, bytes).unwrap();
        let error = OpenOptions::new().open(&model.path).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert!(fs::read(&model.path).unwrap() == bytes, "{words}");
        error.kind()
    };
    // Another footer at the end.
    let mut bytes = good.clone();
    let end = bytes.len() - 512;
    let mut footer = Footer::parse(&good[..512]).unwrap();
    footer.saved_state = 1;
    bytes[end..].copy_from_slice(&footer.to_bytes());
    assert_eq!(refused(&bytes, "differ"), ErrorKind::Corrupt);
    // Two entries that are one.
    let mut bytes = good.clone();
    let entry = bytes[1536..1540].to_vec();
    bytes[1540..1544].copy_from_slice(&entry);
    assert_eq!(refused(&bytes, "overlaps"), ErrorKind::Corrupt);
    // A file that was not closed, and has been cut.
    fs::write(&model.path, &good).unwrap();
    let disk = open(&model.path);
    disk.flush().unwrap();
    drop(disk);
    let mut bytes = fs::read(&model.path).unwrap();
    bytes.truncate(bytes.len() - 4096);
    assert_eq!(refused(&bytes, "temporary journal"), ErrorKind::Corrupt);
}

/// A differencing disk as blktap lays it out: its locators behind the table, in the page where that ends.
#[test]
fn a_differencing_disk_made_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let (parent, path) = (dir.path().join("parent.vhd"), dir.path().join("disk.vhd"));
    let size = 10 * BLOCK;
    CreateOptions::new(size).create(&parent).unwrap();
    let disk = open(&parent);
    disk.write_at(&vec![1; 5 * BLOCK as usize], 0).unwrap();
    disk.close().unwrap();
    let parent_footer = Footer::parse(&fs::read(&parent).unwrap()[..512]).unwrap();

    let footer =
        Footer::new(DiskType::Differencing, size, UniqueId::from_bytes([6; 16]), Timestamp(1)).to_bytes();
    let mut header = DynamicHeader::new(1536, 10, BLOCK as u32);
    header.parent_unique_id = parent_footer.unique_id;
    let name: Vec<u16> = "parent.vhd".encode_utf16().collect();
    header.set_parent_name(&name).unwrap();
    let payload: Vec<u8> = r".\parent.vhd".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let (locator_at, first) = (2048u64, 8192u64 - 512);
    header.locators[0] = ParentLocator::new(PlatformCode::W2ru, locator_at, 512, payload.len() as u32);
    let file = fs::File::create(&path).unwrap();
    file.write_all_at(&footer, 0).unwrap();
    file.write_all_at(&header.to_bytes(), 512).unwrap();
    file.write_all_at(&[0xff; 512], 1536).unwrap();
    file.write_all_at(&payload, locator_at).unwrap();
    // Blocks 1 and 6, in which every third sector is present.
    let mut content = vec![0; size as usize];
    content[..5 * BLOCK as usize].fill(1);
    for (number, block) in [1u64, 6].into_iter().enumerate() {
        let at = first + number as u64 * (BLOCK + 512);
        file.write_all_at(&((at / 512) as u32).to_be_bytes(), 1536 + 4 * block).unwrap();
        let (mut bits, mut data) = (vec![0u8; 512], vec![0; BLOCK as usize]);
        for sector in (0..4096usize).step_by(3) {
            bits[sector / 8] |= 0x80 >> (sector % 8);
            data[sector * 512..][..512].fill(2);
            content[block as usize * BLOCK as usize + sector * 512..][..512].fill(2);
        }
        file.write_all_at(&bits, at).unwrap();
        file.write_all_at(&data, at + 512).unwrap();
    }
    file.write_all_at(&footer, first + 2 * (BLOCK + 512)).unwrap();
    drop(file);

    let mut model = Model { dir, path, content };
    for session in 0..5 {
        if session == 3 {
            // Its payload gets a place of its own.
            assert!(upgrade(Arc::new(HostVfs), &model.path).unwrap());
            assert_eq!(DiskInfo::read(&model.path).unwrap().journal, JournalState::Clean);
        }
        let disk = open(&model.path);
        model.check_disk(&disk);
        model.some_writes(&disk, session);
        model.write(&disk, BLOCK + 700 * 512, 512, 9);
        model.write(&disk, 6 * BLOCK, BLOCK, 0);
        disk.flush().unwrap();
        model.check_disk(&disk);
        if session == 1 || session == 3 {
            drop(disk);
            model.check_disk(&open_read_only(&model.path));
            open(&model.path).close().unwrap();
        } else {
            disk.close().unwrap();
        }
        let [mut strict, parent] =
            [&model.path, &parent].map(|path| StrictVhd::open(fs::File::open(path).unwrap()).unwrap());
        assert_eq!(strict.locators()[0].payload, payload);
        strict = strict.with_parent(parent).unwrap();
        let mut theirs = vec![0; size as usize];
        strict.read_at(0, &mut theirs).unwrap();
        assert!(theirs == model.content);
        assert!(check(Arc::new(HostVfs), &model.path).unwrap().is_sound());
    }
    assert!(!upgrade(Arc::new(HostVfs), &model.path).unwrap());
}

/// blktap keeps a map of its blocks behind the table, and goes by it as long as it is there. Others have nothing of the kind.
#[test]
fn the_batmap_of_blktap_stays_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    // The header of the map is the sector behind the table; it says where the map is: in the way of the first block.
    let (header_at, map_at) = (2048, MIB);
    for (creator, stays) in [(*b"tap\0", true), (*b"vpc ", false)] {
        let id = UniqueId::from_bytes([5; 16]);
        let mut footer = Footer::new(DiskType::Dynamic, 8 * BLOCK, id, Timestamp::from_unix_seconds(1 << 30));
        footer.creator_app = creator;
        let footer = footer.to_bytes();
        let map = [0x5a; 1024];
        let mut map_header = [0; 512];
        map_header[..8].copy_from_slice(b"tdbatmap");
        map_header[8..16].copy_from_slice(&map_at.to_be_bytes());
        map_header[16..20].copy_from_slice(&2u32.to_be_bytes());
        let table = [0xff; 512];
        let start = [&footer[..], &DynamicHeader::new(1536, 8, BLOCK as u32).to_bytes(), &table, &map_header];
        fs::write(&path, start.concat()).unwrap();
        let file = fs::File::options().read(true).write(true).open(&path).unwrap();
        file.write_all_at(&[&map[..], &footer].concat(), map_at).unwrap();

        let disk = open(&path);
        disk.write_at(&vec![7; 3 * BLOCK as usize], BLOCK).unwrap();
        disk.close().unwrap();
        drop(disk);
        let mut found = ([0; 512], [0; 1024]);
        file.read_exact_at(&mut found.0, header_at).unwrap();
        file.read_exact_at(&mut found.1, map_at).unwrap();
        assert_eq!(found == (map_header, map), stays, "{creator:?}");
        let mut expected = vec![0; 8 * BLOCK as usize];
        expected[BLOCK as usize..4 * BLOCK as usize].fill(7);
        let image = fs::read(&path).unwrap();
        let mut strict = StrictVhd::from_bytes(&image).unwrap();
        let mut theirs = vec![0xee; expected.len()];
        strict.read_at(0, &mut theirs).unwrap();
        assert!(theirs == expected);
    }
}
