//! Chains of differencing disks made here, read by others: 7-Zip, which finds parents by name, and libvhdi, which is told them.
//!
//! Blocks are present in part, zeros hide what a parent holds, and the size is no multiple of a block.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use cowvhd::snapshot::{export_delta, merge, rebase};
use cowvhd::{CreateOptions, ExtentKind, OpenOptions, ZeroMode};
use std::fs;
use std::path::{Path, PathBuf};
use support::process::{output, printed, tool};
use support::random::{Random, seed};
use support::readers::{must_be_installed, must_equal};

const SIZE: usize = (13 << 20) + 3 * 512;
const SECTOR: usize = 512;

/// Reads a chain with libvhdi, which takes the parents from its caller, root last.
const READ_CHAIN_WITH_PYVHDI: &str = "
import sys, pyvhdi
images = []
for path in sys.argv[1:]:
    image = pyvhdi.file()
    image.open(path)
    images.append(image)
for child, parent in zip(images, images[1:]):
    child.set_parent(parent)
left = images[0].get_media_size()
while left:
    piece = images[0].read_buffer(min(left, 1 << 20))
    left -= len(piece)
    sys.stdout.buffer.write(piece)
";

/// Random requests to an open disk, and to the model of its content.
fn change(disk: &cowvhd::Disk, content: &mut [u8], random: &mut Random, requests: usize) {
    for _ in 0..requests {
        let first = random.between(0, (SIZE / SECTOR) as u64) as usize;
        let count = (random.between(1, 301) as usize).min(SIZE / SECTOR - first);
        let range = first * SECTOR..(first + count) * SECTOR;
        match random.between(0, 4) {
            0 => {
                content[range.clone()].fill(0);
                disk.write_zeroes(range.start as u64, range.len() as u64, ZeroMode::MayPunch).unwrap();
            }
            _ => {
                content[range.clone()].copy_from_slice(&random.bytes(range.len()));
                disk.write_at(&content[range.clone()], range.start as u64).unwrap();
            }
        }
    }
}

fn libvhdi(chain: &[PathBuf]) -> Vec<u8> {
    let mut command = std::process::Command::new("/usr/bin/python3");
    command.args(["-c", READ_CHAIN_WITH_PYVHDI]).args(chain.iter().rev());
    let read = output(&mut command);
    assert!(read.status.success(), "libvhdi: {}", printed(&read));
    read.stdout
}

fn seven_zip(leaf: &Path) -> Vec<u8> {
    let read = output(tool("7zz").args(["e", "-tvhd", "-so"]).arg(leaf));
    assert!(read.status.success(), "7zz: {}", printed(&read));
    read.stdout
}

/// Makes a chain of `depth` images over `root`, which holds `content`, and compares what everybody reads at some depths.
fn chain(root: PathBuf, mut content: Vec<u8>, depth: usize, random: &mut Random) {
    let folder = root.parent().unwrap().to_path_buf();
    let mut images = vec![root];
    while images.len() < depth {
        let path = folder.join(format!("layer {}.vhd", images.len()));
        CreateOptions::child_of(images.last().unwrap()).create(&path).unwrap();
        let disk = OpenOptions::new().open(&path).unwrap();
        let requests = 12;
        change(&disk, &mut content, random, requests);
        disk.close().unwrap();
        images.push(path);
        if ![2, 3, depth].contains(&images.len()) {
            continue;
        }
        let leaf = images.last().unwrap();
        let disk = OpenOptions::new().read_only(true).open(leaf).unwrap();
        let mut found = vec![0xee; SIZE];
        disk.read_at(&mut found, 0).unwrap();
        must_equal("cowvhd", &found, &content);
        for extent in disk.extents(0, SIZE as u64).unwrap() {
            let range = extent.offset as usize..(extent.offset + extent.length) as usize;
            assert!(extent.kind == ExtentKind::Data || found[range].iter().all(|&byte| byte == 0));
        }
        must_equal("7zz", &seven_zip(leaf), &content);
        must_equal("libvhdi", &libvhdi(&images), &content);
        delta(&images, &content);
    }
    without_layers(&images, &content);
}

/// Layers are merged into the top one, then it gets another parent, then none: read by everybody after each.
fn without_layers(images: &[PathBuf], content: &[u8]) {
    let (root, leaf) = (&images[0], images.last().unwrap());
    let go_on = || |_| std::ops::ControlFlow::Continue(());
    let read = |what: &str, chain: &[PathBuf]| {
        must_equal(&format!("7zz, {what}"), &seven_zip(leaf), content);
        must_equal(&format!("libvhdi, {what}"), &libvhdi(chain), content);
    };
    // Nothing is left of what is not needed any more.
    let remove = |layers: &[PathBuf]| layers.iter().for_each(|layer| fs::remove_file(layer).unwrap());
    merge(&OpenOptions::new(), leaf, Some(&images[1]), &mut go_on()).unwrap();
    remove(&images[2..images.len() - 1]);
    read("merged", &[root.clone(), images[1].clone(), leaf.clone()]);
    rebase(&OpenOptions::new(), leaf, root, &mut go_on()).unwrap();
    remove(&images[1..2]);
    read("rebased", &[root.clone(), leaf.clone()]);
    merge(&OpenOptions::new(), leaf, None, &mut go_on()).unwrap();
    remove(&images[..1]);
    read("on its own", std::slice::from_ref(leaf));
}

/// The changes from the root to the leaf as one differencing disk: read beside the root, and beside a copy of it elsewhere.
fn delta(images: &[PathBuf], content: &[u8]) {
    let (root, leaf) = (&images[0], images.last().unwrap());
    let out = root.with_file_name("delta.vhd");
    let go_on = &mut |_| std::ops::ControlFlow::Continue(());
    export_delta(&OpenOptions::new(), leaf, root, None, &out, go_on).unwrap();
    must_equal("7zz, delta", &seven_zip(&out), content);
    must_equal("libvhdi, delta", &libvhdi(&[root.clone(), out.clone()]), content);
    let elsewhere = tempfile::tempdir().unwrap();
    let (copy, moved) = (elsewhere.path().join("copy of root.vhd"), elsewhere.path().join("moved.vhd"));
    fs::copy(root, &copy).unwrap();
    fs::rename(&out, &moved).unwrap();
    let disk = OpenOptions::new().parent(&copy).open(&moved).unwrap();
    let mut found = vec![0xee; SIZE];
    disk.read_at(&mut found, 0).unwrap();
    must_equal("cowvhd, delta elsewhere", &found, content);
    disk.close().unwrap();
}

#[test]
fn chains_over_a_dynamic_disk_read_the_same_everywhere() {
    must_be_installed();
    let mut random = Random::new(seed("chain readers"));
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root.vhd");
    let mut content = vec![0; SIZE];
    CreateOptions::new(SIZE as u64).create(&root).unwrap();
    let disk = OpenOptions::new().open(&root).unwrap();
    change(&disk, &mut content, &mut random, 30);
    disk.close().unwrap();
    chain(root, content, 30, &mut random);
}

#[test]
fn chains_over_a_fixed_disk_and_over_one_of_qemu_read_the_same_everywhere() {
    must_be_installed();
    let mut random = Random::new(seed("chain readers"));
    for (format, options) in [("fixed", "subformat=fixed,force_size=on"), ("dynamic", "force_size=on")] {
        let dir = tempfile::tempdir().unwrap();
        let (raw, root) = (dir.path().join("raw"), dir.path().join("root.vhd"));
        let mut content = vec![0; SIZE];
        content[3 << 20..5 << 20].copy_from_slice(&random.bytes(2 << 20));
        fs::write(&raw, &content).unwrap();
        let convert = ["convert", "-f", "raw", "-O", "vpc", "-o", options];
        let made = output(tool("qemu-img").args(convert).arg(&raw).arg(&root));
        assert!(made.status.success(), "{format}: {}", printed(&made));
        chain(root, content, 3, &mut random);
    }
}

/// A parent elsewhere than beside or below the image is opened for nobody who was not told to.
#[test]
fn a_parent_outside_the_folder_has_to_be_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let (above, folder) = (dir.path().join("root.vhd"), dir.path().join("vms"));
    fs::create_dir(&folder).unwrap();
    let child = folder.join("vm.vhd");
    CreateOptions::new(1 << 20).create(&above).unwrap();
    CreateOptions::child_of(&above).create(&child).unwrap();
    let error = OpenOptions::new().open(&child).unwrap_err();
    assert_eq!(error.kind(), cowvhd::ErrorKind::ParentMissing);
    assert!(error.to_string().contains("outside the folders allowed"), "{error}");
    OpenOptions::new().allow_parents_in(dir.path()).open(&child).unwrap().close().unwrap();
    OpenOptions::new().parent(&above).open(&child).unwrap().close().unwrap();

    // A link out of the folder does not help.
    let inside = folder.join("linked.vhd");
    std::os::unix::fs::symlink(&above, &inside).unwrap();
    let linked_child = folder.join("linked-child.vhd");
    CreateOptions::child_of(&inside).create(&linked_child).unwrap();
    let error = OpenOptions::new().open(&linked_child).unwrap_err();
    assert!(error.to_string().contains("leads out of the allowed folder"), "{error}");
    // An image is not its own parent, nor is another disk that lies in the parent's place.
    fs::remove_file(&inside).unwrap();
    CreateOptions::new(1 << 20).create(&inside).unwrap();
    let error = OpenOptions::new().open(&linked_child).unwrap_err();
    assert!(error.to_string().contains("is another disk"), "{error}");
    fs::remove_file(&inside).unwrap();
    fs::copy(&linked_child, &inside).unwrap();
    let error = OpenOptions::new().open(&linked_child).unwrap_err();
    assert!(error.to_string().contains("is another disk"), "{error}");
}
