//! `upgrade` of images made elsewhere: what a guest sees stays, a power cut at any moment leaves the image as it was or upgraded,
//! and once upgraded it is an image like those made here.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/crash.rs"]
#[allow(dead_code, reason = "shared with the other tests of crashes")]
mod crash;
#[path = "support/failing.rs"]
mod failing;
#[path = "support/qemu.rs"]
mod qemu;
#[path = "support/strict_vhd.rs"]
mod strict_vhd;

use cowvhd::check::{Severity, check};
use cowvhd::sim::{Bounds, History, SimVfs};
use cowvhd::vfs::{HostVfs, Vfs};
use cowvhd::vhd::{DynamicHeader, ParentLocator, PlatformCode};
use cowvhd::{CreateOptions, DiskInfo, ErrorKind, JournalState, OpenOptions, upgrade};
use crash::{
    ALIGNED, Explorer, FOREIGN_CHILD, LOCATOR, PACKED, PATH, Segment, Shape, check_content, create, read_hot,
};
use qemu::qemu_img;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use strict_vhd::StrictVhd;

/// Whether an image has superblocks of its own.
fn is_ours(image: &[u8]) -> bool {
    image[4096..].starts_with(b"cowvhdSB") && image[512..].starts_with(b"cxsparse")
}

fn image(shape: Shape, seed: u64) -> (SimVfs, History) {
    let vfs = SimVfs::new(seed);
    let mut history = History::default();
    create(&vfs, shape, seed, &mut history);
    (vfs, history)
}

/// An upgraded image, with the locator that it had.
fn is_upgraded(vfs: &SimVfs, shape: Shape) -> bool {
    let content = vfs.content(Path::new(PATH)).unwrap();
    if shape.child {
        let strict = StrictVhd::from_bytes(&content).unwrap();
        let payloads: Vec<&[u8]> = strict.locators().iter().map(|locator| &*locator.payload).collect();
        assert_eq!(payloads, [LOCATOR.2]);
    }
    is_ours(&content)
}

/// Every crash point of an upgrade: the state opens as ever, and upgrading it again goes through.
#[test]
fn a_power_cut_leaves_the_image_as_it_was_or_upgraded() {
    let mut upgraded = 0;
    for (shape, seed) in
        [(PACKED, 1), (PACKED, 2), (ALIGNED, 3), (ALIGNED, 4), (FOREIGN_CHILD, 5), (FOREIGN_CHILD, 6)]
    {
        let (vfs, history) = image(shape, seed);
        vfs.record(true);
        assert!(upgrade(Arc::new(vfs.clone()), Path::new(PATH)).unwrap());
        let mut points = vfs.take_crash_points();
        points.push(vfs.crash_now());
        vfs.record(false);
        assert!(is_upgraded(&vfs, shape));
        assert!(!upgrade(Arc::new(vfs.clone()), Path::new(PATH)).unwrap());
        let bounds = Bounds { spared: shape.spared(), ..Bounds::sample(60) };
        for point in &points {
            point.for_each_state(seed, &bounds, |state| {
                let vfs = state.to_vfs(seed);
                let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
                // Closed in between, or not.
                let options = OpenOptions::new().vfs(Arc::clone(&shared));
                if state.hash % 3 == 0 {
                    options.open(Path::new(PATH)).unwrap().close().unwrap();
                }
                let again = upgrade(Arc::clone(&shared), Path::new(PATH));
                let again = again.unwrap_or_else(|error| panic!("seed {seed}, {}: {error}", state.fates()));
                upgraded += u64::from(!again);
                assert!(is_upgraded(&vfs, shape), "{}", state.fates());
                let disk = options.open(Path::new(PATH)).unwrap();
                let parts = read_hot(&disk, shape).unwrap();
                check_content(&history, u64::MAX, &parts, false)
                    .unwrap_or_else(|what| panic!("seed {seed}, {}: {what}", state.fates()));
                disk.close().unwrap();
                true
            });
        }
        let mut explorer = Explorer::new(shape);
        if let Err(error) = explorer.explore(&[Segment { history, points }], seed, &Bounds::sample(60)) {
            panic!("seed {seed}: {error}");
        }
        println!("{} distinct states: no violation", explorer.states);
    }
    assert!(upgraded > 0);
}

#[test]
fn an_image_of_qemu_becomes_one_of_ours() {
    let dir = tempfile::tempdir().unwrap();
    let [raw, path, back] = ["raw", "disk.vhd", "back"].map(|name| dir.path().join(name));
    let name = |path: &Path| path.to_str().unwrap().to_string();
    let mut content = vec![0; 33 << 20];
    for (number, chunk) in content.chunks_mut(900_000).enumerate().filter(|(number, _)| number % 3 != 1) {
        chunk.fill(number as u8 + 1);
    }
    fs::write(&raw, &content).unwrap();
    let options = "subformat=dynamic,force_size";
    qemu_img(&["convert", "-f", "raw", "-O", "vpc", "-o", options, &name(&raw), &name(&path)]);
    assert_eq!(DiskInfo::read(&path).unwrap().journal, JournalState::None);
    let id = DiskInfo::read(&path).unwrap().unique_id;
    assert!(upgrade(Arc::new(HostVfs), &path).unwrap());
    let info = DiskInfo::read(&path).unwrap();
    assert_eq!((info.journal, info.unique_id, info.virtual_size), (JournalState::Clean, id, 33 << 20));
    assert_eq!(info.foreign_changes, cowvhd::ForeignChanges::None);
    let agrees = |content: &[u8]| {
        qemu_img(&["convert", "-f", "vpc", "-O", "raw", &name(&path), &name(&back)]);
        assert!(fs::read(&back).unwrap() == content);
        let report = check(Arc::new(HostVfs), &path).unwrap();
        let worst = report.findings().iter().map(|finding| finding.severity()).max();
        assert!(worst.is_none_or(|worst| worst <= Severity::Leak), "{:?}", report.findings());
    };
    agrees(&content);
    let disk = OpenOptions::new().open(&path).unwrap();
    disk.write_at(&[7; 8192], 5 << 20).unwrap();
    content[5 << 20..][..8192].fill(7);
    disk.discard(2 << 20, 2 << 20).unwrap();
    content[2 << 20..4 << 20].fill(0);
    disk.flush().unwrap();
    drop(disk);
    OpenOptions::new().open(&path).unwrap().close().unwrap();
    agrees(&content);
    assert!(!upgrade(Arc::new(HostVfs), &path).unwrap());
}

/// Locators that are none, or that have more than the page which they would get.
#[test]
fn locators_that_cannot_move_are_refused_unchanged() {
    for (offset, length, words) in [
        (8192, 5000, "its parent locator 0 has 5000 bytes at offset 8192, expected at most 4096"),
        (1 << 40, 16, "its parent locator 0 has 16 bytes at offset 1099511627776, expected at most 4096"),
        (8192, 0, "at offset 1088: parent locator: field data length (byte 8) is 0, expected 1 to"),
    ] {
        let (vfs, _) = image(FOREIGN_CHILD, 1);
        let mut header = DynamicHeader::parse(&vfs.content(Path::new(PATH)).unwrap()[512..1536]).unwrap();
        header.locators[0] = ParentLocator::new(PlatformCode::W2ru, offset, 8192, length);
        vfs.foreign_write(Path::new(PATH), 512, &header.to_bytes());
        let before = vfs.content_hash(Path::new(PATH));
        let error = upgrade(Arc::new(vfs.clone()), Path::new(PATH)).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(PATH), "{error}");
        assert_eq!(vfs.content_hash(Path::new(PATH)), before);
    }
}

#[test]
fn what_cannot_be_upgraded_is_refused_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let [fixed, ours, in_use] = ["fixed.vhd", "ours.vhd", "in-use.vhd"].map(|name| dir.path().join(name));
    CreateOptions::new(1 << 20).fixed().create(&fixed).unwrap();
    let before = fs::read(&fixed).unwrap();
    let error = upgrade(Arc::new(HostVfs), &fixed).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(fs::read(&fixed).unwrap() == before);
    CreateOptions::new(1 << 20).create(&ours).unwrap();
    let before = fs::read(&ours).unwrap();
    assert!(!upgrade(Arc::new(HostVfs), &ours).unwrap());
    assert!(fs::read(&ours).unwrap() == before);
    let name = in_use.to_str().unwrap();
    qemu_img(&["create", "-f", "vpc", name, "8M"]);
    let disk = OpenOptions::new().open(&in_use).unwrap();
    assert_eq!(upgrade(Arc::new(HostVfs), &in_use).unwrap_err().kind(), ErrorKind::InUse);
    disk.close().unwrap();
    drop(disk);
    // An empty one.
    assert!(upgrade(Arc::new(HostVfs), &in_use).unwrap());
    OpenOptions::new().open(&in_use).unwrap().close().unwrap();
}
