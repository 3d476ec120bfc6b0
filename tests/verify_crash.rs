//! CRCs that are written while the power fails: whatever is left of them calls no sound data damaged, changes nothing else of the
//! sealed layer, and is completed by the next attempt.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use cowvhd::check::{Code, Severity, verify};
use cowvhd::sim::{Bounds, SimVfs};
use cowvhd::snapshot::SnapshotName;
use cowvhd::vfs::{Access, Vfs};
use cowvhd::{CreateOptions, OpenOptions};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

const BLOCK: u64 = 512 << 10;
const RING: std::ops::Range<usize> = (256 << 10)..(384 << 10);
const LEAF: &str = "/vm.vhd";
const SEALED: &str = "/vm@one.vhd";

fn options(vfs: &SimVfs) -> OpenOptions {
    OpenOptions::new().vfs(Arc::new(vfs.clone()))
}

/// A disk of 12 blocks, most of which are in its snapshot, so that their CRCs take two pages.
fn image() -> SimVfs {
    let vfs = SimVfs::new(3);
    CreateOptions::new(12 * BLOCK)
        .test_geometry(BLOCK as u32, 128 << 10)
        .vfs(Arc::new(vfs.clone()))
        .create(Path::new(LEAF))
        .unwrap();
    let disk = options(&vfs).open(Path::new(LEAF)).unwrap();
    for block in (0..12).filter(|block| block % 5 != 2) {
        disk.write_at(&[block as u8 + 1; 5120], block * BLOCK + 3072 * block).unwrap();
    }
    disk.snapshot(&SnapshotName::new("one").unwrap()).unwrap();
    disk.write_at(&[99; 512], 0).unwrap();
    disk.close().unwrap();
    vfs
}

#[test]
fn crcs_that_were_cut_prove_nothing_wrong() {
    let vfs = image();
    let before = vfs.content(Path::new(SEALED)).unwrap();
    let go = |vfs: &SimVfs, seal: bool| {
        verify(&options(vfs), Path::new(LEAF), seal, &mut |_, _| ControlFlow::Continue(())).unwrap()
    };
    vfs.record(true);
    assert_eq!(go(&vfs, true).coverage()[1].written_pages, 2);
    let mut points = vfs.take_crash_points();
    points.push(vfs.crash_now());
    assert_eq!(vfs.crash_now().pending(), 0, "what was written is on the medium");
    let after = vfs.content(Path::new(SEALED)).unwrap();
    let end = before.len() - 512;
    assert!(
        before[end - 8192..end].iter().all(|&byte| byte == 0) && before[..end - 8192] == after[..end - 8192]
    );
    let (mut states, mut partly) = (0, 0);
    for (seed, point) in (0..).zip(&points) {
        point.for_each_state(seed, &Bounds::sample(60), |state| {
            states += 1;
            let vfs = state.to_vfs(state.hash);
            let found = go(&vfs, false);
            let worst = found.chain().worst();
            let codes = found.chain().codes();
            assert!(
                worst <= Some(Severity::Note)
                    || codes.keys().all(|&c| matches!(c, Code::CrcsDamaged | Code::CrcsMissing)),
                "{codes:?}"
            );
            partly +=
                u32::from(found.coverage()[1].compared_bytes > 0 && found.coverage()[1].unproven_bytes > 0);
            let done = go(&vfs, true);
            assert_eq!(done.coverage()[1].unproven_bytes, 0);
            assert_eq!(go(&vfs, false).chain().codes().get(&Code::CrcsDamaged), None);
            let mut content = vfs.content(Path::new(SEALED)).unwrap();
            // That the ring was punched need not be durable.
            content[RING].fill(0);
            let differs = content.iter().zip(&after).position(|(one, other)| one != other);
            assert_eq!((content.len(), differs), (after.len(), None), "{}", end - 8192);
            true
        });
    }
    println!("{states} states, of {partly} a part was there");
    assert!(states > 20 && partly > 0, "{states}, {partly}");
    // And the medium that it is for.
    let file = vfs.open(Path::new(SEALED), Access::ReadOnly).unwrap();
    assert_eq!(file.length().unwrap(), after.len() as u64);
    drop(file);
    vfs.corrupt(Path::new(SEALED), (end - 8192 - 4096) as u64, &[1]);
    assert_eq!(go(&vfs, false).chain().codes().get(&Code::DataDamaged), Some(&1));
}
