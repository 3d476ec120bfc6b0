//! Dynamic images made elsewhere, opened for reading: blocks anywhere, of any size, with partial bitmaps, the size the footer
//! says. Judged by qemu-img, by a strict reader that shares no code with the library, and by images laid out by hand.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/qemu.rs"]
mod qemu;
#[path = "support/strict_vhd.rs"]
mod strict_vhd;

use cowvhd::convert::ConvertOptions;
use cowvhd::vfs::HostVfs;
use cowvhd::vhd::{DiskType, DynamicHeader, Footer, Timestamp, UniqueId, bat_bytes, bitmap, bitmap_bytes};
use cowvhd::{Disk, ErrorKind, ExtentKind, OpenOptions, upgrade};
use qemu::qemu_img;
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use strict_vhd::{Guest, StrictVhd};

const MIB: u64 = 1 << 20;

fn open(path: &Path) -> Disk {
    OpenOptions::new().read_only(true).open(path).unwrap()
}

fn content(disk: &Disk) -> Vec<u8> {
    let mut content = vec![0xee; disk.size() as usize];
    disk.read_at(&mut content, 0).unwrap();
    content
}

/// Data here and there, and long runs of zeros.
fn sample(size: u64) -> Vec<u8> {
    let mut content = vec![0; size as usize];
    for (number, chunk) in content.chunks_mut(100_000).enumerate() {
        if number % 7 == 0 || (number / 40) % 2 == 1 {
            for (i, byte) in chunk.iter_mut().enumerate() {
                *byte = (i * 31 + number) as u8;
            }
        }
    }
    content
}

#[test]
fn what_qemu_makes_reads_right() {
    let dir = tempfile::tempdir().unwrap();
    let name = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (raw, vhd) = (name("raw"), name("disk.vhd"));
    for (size, options) in [
        (10 * MIB, "subformat=dynamic,force_size"),
        (10 * MIB + 512, "subformat=dynamic,force_size"),
        (7 * MIB + 5 * 512, "subformat=dynamic,force_size"),
        (7 * MIB + 5 * 512, "subformat=dynamic"),
        (34 * MIB, "subformat=dynamic"),
    ] {
        let expected = sample(size);
        fs::write(&raw, &expected).unwrap();
        qemu_img(&["convert", "-f", "raw", "-O", "vpc", "-o", options, &raw, &vhd]);
        let before = fs::read(&vhd).unwrap();
        let disk = open(Path::new(&vhd));
        // Without force_size QEMU rounds up to whole cylinders; with it, the size is exact.
        assert!(disk.size() >= size, "{options}");
        assert!(!options.contains("force_size") || disk.size() == size);
        let found = content(&disk);
        assert!(found[..size as usize] == expected, "{size} {options}");
        assert!(found[size as usize..].iter().all(|&byte| byte == 0));
        let mut strict = StrictVhd::from_bytes(&before).unwrap();
        let mut theirs = vec![0; strict.size() as usize];
        strict.read_at(0, &mut theirs).unwrap();
        assert!(theirs == found);
        for extent in disk.extents(0, disk.size()).unwrap() {
            let range = extent.offset as usize..(extent.offset + extent.length) as usize;
            assert!(extent.kind == ExtentKind::Data || found[range].iter().all(|&byte| byte == 0));
        }
        drop(disk);
        assert!(fs::read(&vhd).unwrap() == before);
    }
}

/// An image laid out by hand.
struct Layout {
    size: u64,
    block_bytes: u32,
    table_at: u64,
    /// File offsets of the blocks that are allocated.
    blocks: Vec<Option<u64>>,
    footer_bytes: usize,
}

impl Layout {
    fn footer(&self) -> Footer {
        let id = UniqueId::from_bytes([5; 16]);
        let mut footer = Footer::new(DiskType::Dynamic, self.size, id, Timestamp::from_unix_seconds(1 << 30));
        footer.creator_app = *b"vpc ";
        footer
    }

    /// Builds the image; `fill` gives the bitmap and the data of a block.
    fn build(&self, path: &Path, fill: impl Fn(usize, &mut [u8], &mut [u8])) {
        let file = fs::File::create(path).unwrap();
        let footer = self.footer().to_bytes();
        let header = DynamicHeader::new(self.table_at, self.blocks.len() as u32, self.block_bytes);
        let mut table = vec![0xff; bat_bytes(self.blocks.len() as u32) as usize];
        let mut end = self.table_at + table.len() as u64;
        for (number, at) in self.blocks.iter().enumerate().filter_map(|(n, at)| Some((n, (*at)?))) {
            table[number * 4..][..4].copy_from_slice(&((at / 512) as u32).to_be_bytes());
            let (mut bits, mut data) =
                (vec![0; bitmap_bytes(self.block_bytes) as usize], vec![0; self.block_bytes as usize]);
            fill(number, &mut bits, &mut data);
            file.write_all_at(&bits, at).unwrap();
            // Sparse, so that an image of many blocks is quickly made.
            if data.iter().any(|&byte| byte != 0) {
                file.write_all_at(&data, at + bits.len() as u64).unwrap();
            }
            end = end.max(at + bits.len() as u64 + u64::from(self.block_bytes));
        }
        file.write_all_at(&footer, 0).unwrap();
        file.write_all_at(&header.to_bytes(), 512).unwrap();
        file.write_all_at(&table, self.table_at).unwrap();
        file.write_all_at(&footer[..self.footer_bytes], end).unwrap();
    }
}

#[test]
fn blocks_of_any_size_anywhere_with_partial_bitmaps() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    for block_bytes in [512, 1024, 4096, 16 << 10, 512 << 10, 2 << 20, 16 << 20] {
        let stride = u64::from(block_bytes + bitmap_bytes(block_bytes));
        // In front of the table and behind it, out of order, with gaps that align to nothing.
        let layout = Layout {
            size: u64::from(block_bytes) * 3 + 512,
            block_bytes,
            table_at: 2048 + stride + 512,
            blocks: vec![Some(2048 + 2 * stride + 5 * 512), Some(2048), None, Some(8192 + 3 * stride + 512)],
            footer_bytes: 511 + usize::from(block_bytes > 4096),
        };
        let sectors = block_bytes / 512;
        // The data under clear bits is not zero: it is not part of the disk.
        layout.build(&path, |number, bits, data| {
            data.fill(number as u8 + 1);
            for sector in (0..sectors).filter(|sector| number != 0 || sector % 3 == 1 || *sector > 40) {
                bitmap::set(bits, sector, true);
            }
        });
        let disk = open(&path);
        let found = content(&disk);
        assert_eq!(found.len() as u64, layout.size);
        for (index, sector) in found.chunks(512).enumerate() {
            let (block, within) = (index as u32 / sectors, index as u32 % sectors);
            let expected = match block {
                0 if within % 3 == 1 || within > 40 => 1,
                1 => 2,
                3 => 4,
                _ => 0,
            };
            assert!(sector.iter().all(|&byte| byte == expected), "block size {block_bytes}, sector {index}");
        }
        let map = disk.map(0, layout.size).unwrap();
        assert_eq!(map.iter().map(|extent| extent.extent.length).sum::<u64>(), layout.size);
        let file = fs::File::open(&path).unwrap();
        for extent in map {
            if let (ExtentKind::Data, Some(at)) = (extent.extent.kind, extent.file_offset) {
                let mut stored = vec![0; extent.extent.length as usize];
                file.read_exact_at(&mut stored, at).unwrap();
                assert!(stored == found[extent.extent.offset as usize..][..stored.len()]);
            }
        }
        let error = OpenOptions::new().read_only(true).open(&path).map(drop);
        assert!(error.is_ok());
    }
}

/// Blocks made elsewhere follow each other without the gaps of ours: after a hundred or so (with blocks of 2 MiB after 8 GiB)
/// one stands where one of ours would, and the one before it ends where ours would have its page.
#[test]
fn many_blocks_without_gaps_do_not_seem_to_overlap() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    let (count, block_bytes) = (1000, 64 << 10);
    let start = 1536 + bat_bytes(count);
    let layout = Layout {
        size: u64::from(count * block_bytes),
        block_bytes,
        table_at: 1536,
        blocks: (0..count).map(|block| Some(start + u64::from(block * (block_bytes + 512)))).collect(),
        footer_bytes: 512,
    };
    layout.build(&path, |_, bits, _| bits.fill(0xff));
    let disk = open(&path);
    let mut buf = [1; 512];
    disk.read_at(&mut buf, layout.size - 512).unwrap();
    assert_eq!(buf, [0; 512]);
}

/// The footer says where the dynamic header stands: behind the blocks, too. Such an image is read; for writing there is a copy.
#[test]
fn a_header_that_stands_elsewhere_is_found_and_the_image_not_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let [path, copy] = ["disk.vhd", "copy.vhd"].map(|name| dir.path().join(name));
    let layout = Layout {
        size: 3 * 4096 - 512,
        block_bytes: 4096,
        table_at: 1536,
        blocks: vec![Some(8192), None, Some(2048)],
        footer_bytes: 0,
    };
    layout.build(&path, |number, bits, data| {
        bits.fill(0xff);
        data.fill(number as u8 + 1);
    });
    let mut bytes = fs::read(&path).unwrap();
    let header = bytes[512..1536].to_vec();
    bytes[512..1536].fill(0);
    let footer = Footer { data_offset: bytes.len() as u64, ..layout.footer() }.to_bytes();
    bytes[..512].copy_from_slice(&footer);
    bytes.extend(header);
    bytes.extend(footer);
    fs::write(&path, &bytes).unwrap();

    let mut expected = vec![0; layout.size as usize];
    expected[..4096].fill(1);
    expected[8192..].fill(3);
    assert!(content(&open(&path)) == expected);
    let error = OpenOptions::new().open(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("offset 12800") && error.to_string().contains("convert"), "{error}");
    assert_eq!(upgrade(Arc::new(HostVfs), &path).unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(fs::read(&path).unwrap() == bytes);
    ConvertOptions::new().run(&path, &copy, &mut |_| ControlFlow::Continue(())).unwrap();
    let disk = OpenOptions::new().open(&copy).unwrap();
    assert!(content(&disk) == expected);
    disk.write_at(&[9; 512], 4096).unwrap();
    disk.close().unwrap();
}

#[test]
fn tables_that_cannot_be_are_refused_with_the_block() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    for (blocks, reason) in [
        (vec![Some(8192), Some(8192)], "overlaps"),
        (vec![Some(8192), Some(8704)], "overlaps"),
        (vec![Some(0)], "over the footer copy"),
        (vec![Some(1024)], "over the dynamic header"),
        (vec![Some(4096)], "over the block table"),
    ] {
        let size = blocks.len() as u64 * 4096;
        let layout = Layout { size, block_bytes: 4096, table_at: 4096, blocks, footer_bytes: 512 };
        layout.build(&path, |_, bits, _| bits.fill(0xff));
        let error = OpenOptions::new().read_only(true).open(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn a_differencing_disk_without_its_parent_is_refused_with_the_parent_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("child.vhd");
    let layout =
        Layout { size: MIB, block_bytes: 2 << 20, table_at: 1536, blocks: vec![None], footer_bytes: 512 };
    layout.build(&path, |_, _, _| {});
    let mut footer = layout.footer();
    footer.disk_type = DiskType::Differencing;
    let mut header = DynamicHeader::new(1536, 1, 2 << 20);
    header.parent_unique_id = UniqueId::from_bytes([0x5f; 16]);
    let name: Vec<u16> = r"C:\Projects\fat-parent.vhd".encode_utf16().collect();
    header.set_parent_name(&name).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let end = file.metadata().unwrap().len() - 512;
    file.write_all_at(&footer.to_bytes(), 0).unwrap();
    file.write_all_at(&header.to_bytes(), 512).unwrap();
    file.write_all_at(&footer.to_bytes(), end).unwrap();
    for read_only in [true, false] {
        let error = OpenOptions::new().read_only(read_only).open(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ParentMissing);
        for word in ["parent name \"fat-parent.vhd\"", "5f5f5f5f", "does not exist", "--parent"] {
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
