//! Bugs that other programs had with disk images, each by the name it had there: what went wrong, and that it does not here.
//! docs/hostile-input.md lists them.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/strict_vhd.rs"]
mod strict_vhd;

use cowvhd::check::{Code, Severity, check};
use cowvhd::convert::{ConvertOptions, Format};
use cowvhd::sim::{Bounds, Fault, FaultPlan, Operation, Rng, SimVfs};
use cowvhd::snapshot::merge;
use cowvhd::vfs::HostVfs;
use cowvhd::vhd::{DiskType, DynamicHeader, Footer, Timestamp, UniqueId, bat_bytes};
use cowvhd::{CreateOptions, Disk, ErrorKind, ExtentKind, OpenOptions, ZeroMode};
use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use strict_vhd::{Guest, StrictVhd};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn disk(&self, size: u64) -> Disk {
        CreateOptions::new(size).create(&self.path("disk.vhd")).unwrap();
        OpenOptions::new().open(&self.path("disk.vhd")).unwrap()
    }
}

fn read(disk: &Disk, offset: u64, length: u64) -> Vec<u8> {
    let mut buf = vec![0xee; length as usize];
    disk.read_at(&mut buf, offset).unwrap();
    buf
}

fn strict(path: &Path) -> Vec<u8> {
    let bytes = fs::read(path).unwrap();
    let mut strict = StrictVhd::from_bytes(&bytes).unwrap();
    let mut content = vec![0; strict.size() as usize];
    strict.read_at(0, &mut content).unwrap();
    content
}

const SIM_BLOCK: u64 = 16 << 10;

fn sim_disk(vfs: &SimVfs, blocks: u64) -> Disk {
    let path = Path::new("/disk.vhd");
    let options = CreateOptions::new(blocks * SIM_BLOCK).test_geometry(SIM_BLOCK as u32, 128 << 10);
    options.vfs(Arc::new(vfs.clone())).create(path).unwrap();
    OpenOptions::new().vfs(Arc::new(vfs.clone())).open(path).unwrap()
}

/// Cloud Hypervisor, 2026: the first write to a block, at an offset within it, landed at the block's start.
#[test]
fn cloud_hypervisor_the_first_write_at_an_offset_of_a_new_block() {
    let folder = Folder::new();
    let disk = folder.disk(8 * MIB);
    let mut expected = vec![0; 8 << 20];
    for (block, within, length) in
        [(0, 512, 512), (1, MIB + 1536, 1024), (2, BLOCK - 512, 512), (3, 4096, 4096)]
    {
        let at = block * BLOCK + within;
        expected[at as usize..(at + length) as usize].fill(block as u8 + 1);
        disk.write_at(&vec![block as u8 + 1; length as usize], at).unwrap();
        assert!(read(&disk, 0, 8 * MIB) == expected, "block {block}");
    }
    disk.close().unwrap();
    assert!(strict(&folder.path("disk.vhd")) == expected);
}

/// Cloud Hypervisor #7665: each queue had its own copy of the block table, and did not see what others had allocated.
#[test]
fn cloud_hypervisor_7665_a_block_allocated_on_one_thread_is_there_on_all() {
    let folder = Folder::new();
    let disk = folder.disk(64 * MIB);
    let (to_other, from_one) = channel();
    let (to_one, from_other) = channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for block in from_one {
                let at = block * BLOCK;
                assert_eq!(read(&disk, at, 512), [1; 512], "block {block}");
                disk.write_at(&[2; 512], at + 512).unwrap();
                to_one.send(block).unwrap();
            }
        });
        for block in 0..32 {
            disk.write_at(&[1; 512], block * BLOCK).unwrap();
            to_other.send(block).unwrap();
            from_other.recv().unwrap();
            assert_eq!(read(&disk, block * BLOCK, 1536), [[1; 512], [2; 512], [0; 512]].concat());
        }
        drop(to_other);
    });
    // Nor is there a second table in another opener.
    let error = OpenOptions::new().open(&folder.path("disk.vhd")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    disk.close().unwrap();
    assert_eq!(fs::metadata(folder.path("disk.vhd")).unwrap().len(), 7 * MIB + 32 * (BLOCK + 4096) + 512);
}

/// Cloud Hypervisor, vhdx: a flush was answered without a sync.
#[test]
fn cloud_hypervisor_vhdx_a_flush_is_a_sync() {
    let vfs = SimVfs::new(1);
    let disk = sim_disk(&vfs, 8);
    for round in 1..20u8 {
        let at = u64::from(round % 8) * SIM_BLOCK;
        disk.write_at(&vec![round; 8192], at).unwrap();
        disk.flush().unwrap();
        // All that no sync has brought to the medium is lost.
        let mut states = 0;
        vfs.crash_now().for_each_state(round.into(), &Bounds::sample(1), |state| {
            states += 1;
            let after = state.to_vfs(7);
            let disk = OpenOptions::new().vfs(Arc::new(after)).open(Path::new("/disk.vhd")).unwrap();
            assert!(read(&disk, at, 8192) == vec![round; 8192], "round {round}");
            true
        });
        assert!(states > 0);
    }
}

/// Cloud Hypervisor #8606: after long runs the allocator gave out clusters that held live metadata. Here every block's place is
/// held against an owner map after each step of a long run.
#[test]
fn cloud_hypervisor_8606_no_block_is_given_space_that_has_an_owner() {
    let vfs = SimVfs::new(3);
    let (blocks, room_end) = (40, 5 * MIB);
    let mut disk = sim_disk(&vfs, blocks);
    let mut random = Rng::new(8606);
    for step in 0..4000 {
        let block = random.below(blocks);
        match random.below(16) {
            0..8 => disk.write_at(&[step as u8; 512], block * SIM_BLOCK + 512 * random.below(32)).unwrap(),
            8..12 => disk.discard(block * SIM_BLOCK, SIM_BLOCK).unwrap(),
            12 => disk.write_zeroes(block * SIM_BLOCK, SIM_BLOCK, ZeroMode::KeepAllocated).unwrap(),
            13 | 14 => disk.flush().unwrap(),
            _ if random.below(8) == 0 => {
                if random.below(2) == 0 {
                    disk.close().unwrap();
                }
                drop(disk);
                disk = OpenOptions::new().vfs(Arc::new(vfs.clone())).open(Path::new("/disk.vhd")).unwrap();
            }
            _ => {}
        }
        let mut owned: Vec<(u64, u64)> = disk
            .map(0, blocks * SIM_BLOCK)
            .unwrap()
            .iter()
            .filter_map(|extent| {
                // Each block has its page before it.
                let page = if extent.extent.offset.is_multiple_of(SIM_BLOCK) { 4096 } else { 0 };
                Some((extent.file_offset? - page, extent.extent.length + page))
            })
            .collect();
        owned.sort_unstable();
        // Headers, journal, table and its room are the first owner.
        let mut end = room_end;
        for (at, length) in owned {
            assert!(at >= end, "step {step}: the block at {at} lies in what ends at {end}");
            end = at + length;
        }
    }
    disk.close().unwrap();
    drop(disk);
    let report = check(Arc::new(vfs.clone()), Path::new("/disk.vhd")).unwrap();
    assert_eq!(report.worst(), None, "{:?}", report.findings());
}

/// Cloud Hypervisor #8311: the end of an access was not checked, only its start.
#[test]
fn cloud_hypervisor_8311_an_access_that_ends_past_the_disk() {
    let folder = Folder::new();
    let disk = folder.disk(3 * MIB);
    disk.write_at(&[1; 512], 3 * MIB - 512).unwrap();
    disk.flush().unwrap();
    let before = fs::read(folder.path("disk.vhd")).unwrap();
    for (offset, length) in
        [(3 * MIB - 512, 1024), (3 * MIB - 512, MIB as usize), (0, 4 << 20), (2 * MIB, 2 << 20)]
    {
        assert_eq!(disk.write_at(&vec![9; length], offset).unwrap_err().kind(), ErrorKind::InvalidInput);
        let mut buf = vec![0xee; length];
        assert_eq!(disk.read_at(&mut buf, offset).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert!(buf.iter().all(|&byte| byte == 0xee), "some of it was read");
    }
    assert!(fs::read(folder.path("disk.vhd")).unwrap() == before, "some of it was written");
}

/// QEMU #4033: a size of more than 32 bits was cut to 32, and what lay behind went over the heap.
#[test]
fn qemu_4033_sizes_above_32_bits_are_whole() {
    let folder = Folder::new();
    let four_gib = 4 << 30;
    for (name, fixed) in [("dynamic.vhd", false), ("fixed.vhd", true)] {
        let size = four_gib + 3 * MIB;
        let options = CreateOptions::new(size);
        if fixed { options.fixed() } else { options }.create(&folder.path(name)).unwrap();
        let disk = OpenOptions::new().open(&folder.path(name)).unwrap();
        assert_eq!(disk.size(), size);
        for (at, fill) in [(0, 1), (four_gib - 512, 2), (four_gib, 3), (size - 512, 4)] {
            disk.write_at(&[fill; 512], at).unwrap();
        }
        disk.close().unwrap();
        drop(disk);
        let disk = OpenOptions::new().read_only(true).open(&folder.path(name)).unwrap();
        assert_eq!(disk.size(), size);
        for (at, fill) in [(0, 1), (3 * MIB - 512, 0), (four_gib - 512, 2), (four_gib, 3), (size - 512, 4)] {
            assert_eq!(read(&disk, at, 512), [fill; 512], "{name} at {at}");
        }
        assert!(disk.read_at(&mut [0; 512], size).is_err());
    }
}

/// dosbox-x #4545: zeros that a guest wrote to a child, over data of the parent, were dropped: the parent's data came back.
#[test]
fn dosbox_x_4545_zeros_in_a_child_hide_the_parents_data() {
    let folder = Folder::new();
    let parent = folder.disk(8 * MIB);
    parent.write_at(&vec![0xbb; 8 << 20], 0).unwrap();
    parent.close().unwrap();
    let child = folder.path("child.vhd");
    CreateOptions::child_of(&folder.path("disk.vhd")).create(&child).unwrap();
    let mut expected = vec![0xbb; 8 << 20];
    let disk = OpenOptions::new().open(&child).unwrap();
    // Written as zeros, zeroed in part and in whole, kept and not, discarded.
    disk.write_at(&[0; 1536], 512).unwrap();
    expected[512..2048].fill(0);
    disk.write_at(&vec![0; 8192], 100 * 4096).unwrap();
    expected[100 * 4096..102 * 4096].fill(0);
    for (at, length, mode) in [
        (MIB + 512, 512, ZeroMode::MayPunch),
        (BLOCK, BLOCK, ZeroMode::MayPunch),
        (2 * BLOCK + 4096, 8192, ZeroMode::KeepAllocated),
        (3 * BLOCK, BLOCK, ZeroMode::KeepAllocated),
    ] {
        disk.write_zeroes(at, length, mode).unwrap();
        expected[at as usize..(at + length) as usize].fill(0);
    }
    assert!(read(&disk, 0, 8 * MIB) == expected);
    disk.flush().unwrap();
    drop(disk);
    // After a kill, and after a close.
    for close in [false, true, true] {
        let disk = OpenOptions::new().open(&child).unwrap();
        assert!(read(&disk, 0, 8 * MIB) == expected);
        if close {
            disk.close().unwrap();
        }
    }
}

/// azure-vhd-utils #39: the last block was written whole although the disk ends within it: 2 MiB too long, and the footer in the
/// wrong place.
#[test]
fn azure_vhd_utils_39_the_last_block_is_cut_to_the_disk_on_export() {
    let folder = Folder::new();
    let size = 3 * MIB + 512;
    let disk = folder.disk(size);
    disk.write_at(&[7; 1024], size - 1024).unwrap();
    disk.close().unwrap();
    drop(disk);
    let export = |name: &str, format: Format| {
        let options = ConvertOptions::new().to(format);
        let go_on = &mut |_| ControlFlow::Continue(());
        options.run(&folder.path("disk.vhd"), &folder.path(name), go_on).unwrap();
        fs::read(folder.path(name)).unwrap()
    };
    let mut expected = vec![0; size as usize];
    expected[size as usize - 1024..].fill(7);
    assert!(export("raw", Format::Raw) == expected);
    let fixed = export("fixed.vhd", Format::Fixed);
    assert_eq!(fixed.len() as u64, size + 512);
    assert!(fixed[..size as usize] == expected);
    let footer = Footer::parse(&fixed[size as usize..]).unwrap();
    assert_eq!((footer.disk_type, footer.current_size), (DiskType::Fixed, size));
    export("dynamic.vhd", Format::Dynamic);
    assert!(strict(&folder.path("dynamic.vhd")) == expected);
}

/// xapi sm #102: a merge that ran out of space ruined the footer of the parent. Whichever operation of a merge lacks space, the
/// layers beneath the disk are whole (their registry of children may have changed), and the disk shows what it showed.
#[test]
fn xapi_sm_102_no_space_in_a_merge_leaves_every_parent_as_it_was() {
    const SIZE: u64 = 8 * SIM_BLOCK;
    let paths = ["/base.vhd", "/middle.vhd", "/disk.vhd"].map(Path::new);
    let mut failed = 0;
    for number in 0.. {
        let vfs = SimVfs::new(number);
        let shared = || Arc::new(vfs.clone());
        let mut shows = vec![vec![0; SIZE as usize]];
        for (layer, path) in paths.into_iter().enumerate() {
            let options = match layer {
                0 => CreateOptions::new(SIZE).test_geometry(SIM_BLOCK as u32, 128 << 10),
                _ => CreateOptions::child_of(paths[layer - 1]),
            };
            options.vfs(shared()).create(path).unwrap();
            let disk = OpenOptions::new().vfs(shared()).open(path).unwrap();
            let mut content = shows[layer].clone();
            for block in 0..4 {
                let at = (block + layer as u64 * 2) * SIM_BLOCK + 4096;
                disk.write_at(&[layer as u8 + 1; 4096], at).unwrap();
                content[at as usize..at as usize + 4096].fill(layer as u8 + 1);
            }
            disk.close().unwrap();
            shows.push(content);
        }
        let footers = || {
            [0, 1].map(|layer: usize| {
                let bytes = vfs.content(paths[layer]).unwrap();
                (bytes[..512].to_vec(), bytes[bytes.len() - 512..].to_vec())
            })
        };
        let before = footers();
        vfs.set_faults(FaultPlan::new(Fault::Error(28), number, u64::MAX));
        let options = OpenOptions::new().vfs(shared());
        let merged = merge(&options, paths[2], None, &mut |_| ControlFlow::Continue(()));
        vfs.set_faults(FaultPlan::default());
        assert_eq!(footers(), before, "operation {number} lacked space");
        for (path, shown) in paths.into_iter().zip(&shows[1..]) {
            let disk = options.clone().read_only(true).open(path).unwrap();
            assert!(read(&disk, 0, SIZE) == *shown, "{path:?}: operation {number} lacked space");
            let report = check(shared(), path).unwrap();
            // A sync that lacked space leaves its mark in the disk.
            let mark = |code| code == Code::SyncFailed && path == paths[2];
            let damage = report.findings().iter().filter(|found| found.severity() > Severity::Leak);
            assert_eq!(damage.filter(|found| !mark(found.code)).count(), 0, "{path:?}: operation {number}");
        }
        if merged.is_ok() {
            break;
        }
        failed += 1;
    }
    println!("{failed} merges met the lack of space");
    assert!(failed > 100, "only {failed} merges met the lack of space");
}

/// A sparse image of blocks of 4 KiB, all of them there and empty, in an order that helps nobody.
fn scattered(path: &Path, bits: u32) -> (File, Vec<u8>) {
    let (entries, stride) = (1 << bits, 4096 + 512);
    let start = (2048 + bat_bytes(entries)).next_multiple_of(512);
    let size = u64::from(entries) * 4096;
    let mut footer = Footer::new(DiskType::Dynamic, size, UniqueId::from_bytes([7; 16]), Timestamp(1));
    footer.data_offset = 512;
    let file = File::create(path).unwrap();
    let entry = |block: u32| start + u64::from(block.reverse_bits() >> (32 - bits)) * stride;
    let table: Vec<u8> = (0..entries).flat_map(|block| ((entry(block) / 512) as u32).to_be_bytes()).collect();
    file.write_all_at(&footer.to_bytes(), 0).unwrap();
    file.write_all_at(&DynamicHeader::new(2048, entries, 4096).to_bytes(), 512).unwrap();
    file.write_all_at(&table, 2048).unwrap();
    file.write_all_at(&footer.to_bytes(), start + u64::from(entries) * stride).unwrap();
    (file, table)
}

/// blktap #20: each block was compared with each other one: minutes for a terabyte. With a million blocks a comparison of all
/// pairs would not end in the time of a test.
#[test]
fn blktap_20_blocks_are_checked_for_overlaps_without_comparing_all_pairs() {
    let folder = Folder::new();
    let path = folder.path("disk.vhd");
    let (file, table) = scattered(&path, 20);
    let disk = OpenOptions::new().read_only(true).open(&path).unwrap();
    assert_eq!(read(&disk, disk.size() - 512, 512), [0; 512]);
    drop(disk);
    // And one overlap among them is found.
    file.write_all_at(&table[..4], 2048 + 4 * 777).unwrap();
    let error = OpenOptions::new().read_only(true).open(&path).unwrap_err();
    assert!(error.to_string().contains("overlaps block"), "{error}");
    // The checker reads a bitmap of each block: fewer of them.
    let (file, table) = scattered(&path, 18);
    let report = check(Arc::new(HostVfs), &path).unwrap();
    assert!(report.is_sound(), "{:?}", report.findings());
    file.write_all_at(&table[..4], 2048 + 4 * 777).unwrap();
    let report = check(Arc::new(HostVfs), &path).unwrap();
    assert_eq!(report.count(Code::BatOverlap), 1, "{:?}", report.findings());
}

/// Cloud Hypervisor #7849: discard was offered on a format that could not do it, and Windows' viostor crashed over the errors.
/// Here a discard of any whole sectors succeeds, of every kind of disk, and reads as zeros.
#[test]
fn cloud_hypervisor_7849_every_discard_of_whole_sectors_succeeds() {
    let folder = Folder::new();
    let size = 6 * MIB + 512;
    CreateOptions::new(size).create(&folder.path("dynamic.vhd")).unwrap();
    CreateOptions::new(size).fixed().create(&folder.path("fixed.vhd")).unwrap();
    CreateOptions::new(size).create(&folder.path("base.vhd")).unwrap();
    let base = OpenOptions::new().open(&folder.path("base.vhd")).unwrap();
    base.write_at(&vec![0xbb; size as usize], 0).unwrap();
    base.close().unwrap();
    drop(base);
    CreateOptions::child_of(&folder.path("base.vhd")).create(&folder.path("child.vhd")).unwrap();
    for name in ["child.vhd", "dynamic.vhd", "fixed.vhd"] {
        let disk = OpenOptions::new().open(&folder.path(name)).unwrap();
        let mut expected = vec![0xaa; size as usize];
        disk.write_at(&expected, 0).unwrap();
        let ranges = [
            (0, 0),
            (0, 512),
            (512, 1024),
            (4096, 4096),
            (BLOCK - 512, 1024),
            (BLOCK, BLOCK),
            (BLOCK - 4096, 2 * BLOCK),
            (size - 512, 512),
            (size, 0),
            (0, size),
        ];
        for (at, length) in ranges {
            disk.discard(at, length).unwrap();
            expected[at as usize..(at + length) as usize].fill(0);
            assert!(read(&disk, 0, size) == expected, "{name}: {length} bytes at {at}");
        }
        disk.flush().unwrap();
        disk.discard(0, size).unwrap();
        disk.close().unwrap();
    }
}

/// Writes that end half-way, whatever step of them fails: the sectors hold the old bytes or the new ones, other sectors what they
/// held, and the disk works on; the same after a close.
#[test]
fn a_write_that_ends_half_way_leaves_a_disk_that_works() {
    let mut failed = 0;
    for number in 0..40 {
        for fault in [Fault::Short, Fault::Error(5)] {
            let vfs = SimVfs::new(number);
            let disk = sim_disk(&vfs, 8);
            disk.write_at(&vec![1; 2 * SIM_BLOCK as usize], 0).unwrap();
            disk.flush().unwrap();
            vfs.set_faults(FaultPlan::new(fault, number, 1).only(Operation::Write));
            // Over a block that is there, into two that are not.
            let result = disk.write_at(&vec![2; 3 * SIM_BLOCK as usize], SIM_BLOCK);
            failed += u32::from(result.is_err());
            vfs.set_faults(FaultPlan::default());
            let content = read(&disk, 0, 8 * SIM_BLOCK);
            for (sector, bytes) in content.chunks(512).enumerate() {
                let block = sector as u64 * 512 / SIM_BLOCK;
                let allowed: &[u8] = match block {
                    0 => &[1],
                    1 if result.is_err() => &[1, 2],
                    2 | 3 if result.is_err() => &[0, 2],
                    1..4 => &[2],
                    _ => &[0],
                };
                assert!(
                    allowed.contains(&bytes[0]) && bytes.iter().all(|&byte| byte == bytes[0]),
                    "sector {sector}"
                );
            }
            disk.write_at(&[3; 512], 2 * SIM_BLOCK + 512).unwrap();
            disk.flush().unwrap();
            disk.close().unwrap();
            drop(disk);
            let disk = OpenOptions::new()
                .vfs(Arc::new(vfs.clone()))
                .read_only(true)
                .open(Path::new("/disk.vhd"))
                .unwrap();
            assert_eq!(read(&disk, 2 * SIM_BLOCK + 512, 512), [3; 512]);
            assert!(read(&disk, 0, SIM_BLOCK) == vec![1; SIM_BLOCK as usize]);
            assert!(read(&disk, 4 * SIM_BLOCK, 4 * SIM_BLOCK).iter().all(|&byte| byte == 0));
        }
    }
    assert!(failed > 2, "only {failed} writes met their fault");
}

/// Sector numbers near the end of 64 bits: the product with 512 must not come round to a place within the disk.
#[test]
fn sector_numbers_near_the_end_of_64_bits_do_not_come_round() {
    let folder = Folder::new();
    let disk = folder.disk(8 * MIB);
    disk.write_at(&[7; 4096], 0).unwrap();
    for sector in
        [u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 55, (1 << 55) + 1, (1 << 32) + 1, 1 << 63]
    {
        for offset in [sector, sector.wrapping_mul(512), sector.saturating_mul(512) / 512 * 512] {
            if offset < 8 * MIB {
                continue;
            }
            assert_eq!(disk.write_at(&[9; 512], offset).unwrap_err().kind(), ErrorKind::InvalidInput);
            assert_eq!(disk.read_at(&mut [0; 512], offset).unwrap_err().kind(), ErrorKind::InvalidInput);
            assert_eq!(disk.discard(offset, 512).unwrap_err().kind(), ErrorKind::InvalidInput);
            assert_eq!(disk.map(offset, 512).unwrap_err().kind(), ErrorKind::InvalidInput);
        }
    }
    assert_eq!(read(&disk, 0, 4096), [7; 4096]);
    let extents = disk.extents(0, 8 * MIB).unwrap();
    assert_eq!(extents.iter().filter(|extent| extent.kind == ExtentKind::Data).count(), 1);
}
