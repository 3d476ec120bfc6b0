//! A thousand layers in a process that may have 1024 files open.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::disk::{Disk, OpenOptions};
use crate::error::ErrorKind;
use crate::ext::Name;
use crate::layer::{self, CreateParameters, ParentLink, Seal};
use crate::vfs::HostVfs;
use crate::vhd::Timestamp;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::path::Path;

const BLOCK: u64 = 64 << 10;
const UNIT: usize = 4096;
const LAYERS: u64 = 1100;
/// Each layer but the root writes one unit; the next layer its neighbour.
const UNITS: u64 = 3 * LAYERS;
const SEALED: u64 = 4;

fn name(folder: &Path, layer: u64) -> PathBuf {
    folder.join(format!("{layer}.vhd"))
}

/// Makes a layer and writes what it holds.
fn make(folder: &Path, layer: u64) {
    let path = name(folder, layer);
    let parent = layer.checked_sub(1).map(|parent| ParentLink {
        unique_id: id_of(&name(folder, parent)),
        modified: Timestamp::from_unix_seconds(1 << 30),
        path: name(Path::new(""), parent),
        seal_id: Default::default(),
        fixed: Default::default(),
    });
    let size = UNITS * UNIT as u64;
    let parameters = CreateParameters { size, block_bytes: BLOCK as u32, ring_bytes: 128 << 10, parent };
    layer::create(&HostVfs, &path, &parameters).unwrap();
    let opened = layer::open(Arc::new(HostVfs), &path, Access::ReadWrite, |_, _, _| Ok(())).unwrap().0;
    let layer::Image::Dynamic(image) = opened else { unreachable!() };
    let unit = unit_of(layer);
    let (block, offset) = (unit * UNIT as u64 / BLOCK, unit * UNIT as u64 % BLOCK);
    image.write_block(block as u32, offset, &content(layer), &layer::Nothing).unwrap();
    match layer {
        SEALED => image
            .seal(&Seal {
                id: SealId([7; 16]),
                child_id: UniqueId::default(),
                snapshot: Name::default(),
                leaf_name: Name::default(),
                modified: HostVfs.now(),
                state: Default::default(),
            })
            .unwrap(),
        _ => image.close().unwrap(),
    }
}

fn id_of(path: &Path) -> UniqueId {
    let file = HostVfs.open(path, Access::ReadOnly).unwrap();
    ParentImage::open(file, path).unwrap().unique_id()
}

/// Scattered, so that neighbours are in layers far from each other.
fn unit_of(layer: u64) -> u64 {
    layer * 1009 % LAYERS * 3
}

fn content(layer: u64) -> Vec<u8> {
    (layer + 1).to_le_bytes().repeat(UNIT / 8)
}

fn read(disk: &Disk, layer: u64) -> Result<()> {
    let mut found = vec![0xee; UNIT];
    disk.read_at(&mut found, unit_of(layer) * UNIT as u64)?;
    assert!(found == content(layer), "layer {layer}");
    Ok(())
}

fn descriptors_below(folder: &Path) -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    links
        .filter(|link| {
            let target = std::fs::read_link(link.as_ref().unwrap().path());
            target.is_ok_and(|target| target.starts_with(folder))
        })
        .count()
}

/// All layers are read right, by several threads, with fewer files open than there are layers. A file that is another one by the time
/// it is opened again is an error, and is read again when it is back.
#[test]
fn a_thousand_layers_in_a_thousand_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(1024), ..limit }).unwrap();
    // Where a sync costs nothing, if there is such a place: there are some thousands.
    let memory = Path::new("/dev/shm");
    let dir = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    let dir = dir.unwrap();
    let folder = &dir.path().canonicalize().unwrap();
    (0..LAYERS).for_each(|layer| make(folder, layer));

    let disk = OpenOptions::new().read_only(true).open(&name(folder, LAYERS - 1)).unwrap();
    let open = descriptors_below(folder);
    assert!(open <= 1024 / 2 + 1, "{open} descriptors after the open");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let disk = &disk;
            scope.spawn(move || {
                (0..LAYERS).for_each(|step| read(disk, (step * 7 + thread * 300) % LAYERS).unwrap());
            });
        }
    });
    let open = descriptors_below(folder);
    assert!(open <= 1024 / 2 + 1 + 4, "{open} descriptors after all layers were read");
    assert!(open < LAYERS as usize);

    // The layers near the root are in the pool; so many others read after it, and the first one is closed.
    let (victim, away) = (3, folder.join("away"));
    let close_victim = || (10..300).for_each(|layer| read(&disk, layer).unwrap());
    let path = name(folder, victim);
    close_victim();
    std::fs::rename(&path, &away).unwrap();
    let error = read(&disk, victim).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    // A copy has the same disk id and the same content, and yet is not the file that was opened.
    std::fs::copy(&away, &path).unwrap();
    let error = read(&disk, victim).unwrap_err();
    assert!(error.to_string().contains("another file has taken its place"), "{error}");
    std::fs::rename(&away, &path).unwrap();
    read(&disk, victim).unwrap();
    // Whoever writes to the same file while it is closed is noticed, too.
    close_victim();
    let writer = HostVfs.open(&path, Access::ReadWrite).unwrap();
    writer.lock(LockMode::Exclusive).unwrap();
    assert!(read(&disk, victim).unwrap_err().to_string().contains("in use"));
    let modified = writer.modified().unwrap();
    writer.set_modified(FileTime { seconds: modified.seconds + 1, ..modified }).unwrap();
    drop(writer);
    let error = read(&disk, victim).unwrap_err();
    assert!(error.to_string().contains("it was written to"), "{error}");

    // In a sealed one the registry of its children may have been changed: the seal is what counts.
    read(&disk, SEALED).unwrap();
    close_victim();
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(9);
    let sealed = std::fs::File::open(name(folder, SEALED)).unwrap();
    sealed.set_modified(later).unwrap();
    drop(sealed);
    read(&disk, SEALED).unwrap();

    drop(disk);
    assert_eq!(descriptors_below(folder), 0);
    setrlimit(Resource::Nofile, limit).unwrap();
}
