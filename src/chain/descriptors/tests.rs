//! A thousand layers in a process that may have 1024 files open; what a parent's file is by the time it is opened again.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::disk::{CreateOptions, Disk, OpenOptions};
use crate::error::ErrorKind;
use crate::ext::Name;
use crate::layer::{self, CreateParameters, ParentLink, Seal};
use crate::sim::SimVfs;
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

const BASE: &str = "/base.vhd";

/// A sealed image in the pool.
fn pooled() -> (SimVfs, PooledFile) {
    let vfs = SimVfs::new(1);
    let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
    let create = |options: CreateOptions, path: &str| {
        options.test_geometry(16 << 10, 128 << 10).vfs(Arc::clone(&shared)).create(Path::new(path)).unwrap();
    };
    create(CreateOptions::new(1 << 20), BASE);
    create(CreateOptions::child_of(Path::new(BASE)), "/child.vhd");
    let file = vfs.open(Path::new(BASE), Access::ReadOnly).unwrap();
    let parent = ParentImage::open(Arc::clone(&file), Path::new(BASE)).unwrap();
    assert!(parent.seal_id().is_some());
    let pooled = PooledFile::new(&shared, &parent, file).unwrap();
    (vfs, pooled)
}

fn close(pooled: &PooledFile) {
    assert!(pooled.slot.file.lock().take().is_some(), "it was open");
}

/// The same file, and not what it was.
#[test]
fn a_parent_that_became_another_one_while_it_was_closed_is_not_read() {
    let (vfs, pooled) = pooled();
    let path = Path::new(BASE);
    let sound = vfs.content(path).unwrap();
    let mut other_seal = sound.clone();
    for page in [4096, 8192] {
        other_seal[page + 176] ^= 1;
        let crc = crc32fast::hash(&other_seal[page..page + 4092]);
        other_seal[page + 4092..page + 4096].copy_from_slice(&crc.to_be_bytes());
    }
    let mut other_disk = sound.clone();
    for footer in [0, 12288, sound.len() - 512] {
        let mut changed = crate::vhd::Footer::parse(&sound[footer..footer + 512]).unwrap();
        changed.unique_id = UniqueId::from_bytes([9; 16]);
        other_disk[footer..footer + 512].copy_from_slice(&changed.to_bytes());
    }
    for (bytes, words) in [
        (other_seal, "it lost its seal or got another one since the disk was opened"),
        (other_disk, "it has become another disk since the disk was opened"),
    ] {
        close(&pooled);
        vfs.corrupt(path, 0, &bytes);
        let mut buf = [0xee; 16];
        let error = pooled.read_at(&mut buf, 0).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(buf, [0xee; 16]);
        vfs.corrupt(path, 0, &sound);
        assert_eq!(pooled.read_at(&mut buf, 0).unwrap(), 16);
        assert_eq!(buf, sound[..16]);
    }
}

/// What can be asked of a file can be asked of one that is closed; nothing changes it, or what the lock of its handle is.
#[test]
fn the_file_of_a_parent_is_read_and_nothing_else() {
    let (vfs, pooled) = pooled();
    let before = vfs.content_hash(Path::new(BASE));
    let direct = vfs.open(Path::new(BASE), Access::ReadOnly).unwrap();
    for _ in 0..2 {
        assert_eq!(pooled.length().unwrap(), direct.length().unwrap());
        close(&pooled);
        assert_eq!(pooled.next_data(0).unwrap(), direct.next_data(0).unwrap());
        close(&pooled);
        assert_eq!(pooled.allocated_bytes().unwrap(), direct.allocated_bytes().unwrap());
        close(&pooled);
        assert_eq!(pooled.modified().unwrap(), direct.modified().unwrap());
        close(&pooled);
        pooled.forget_cached(4096).unwrap();
        close(&pooled);
        assert_eq!(pooled.identity().unwrap(), direct.identity().unwrap());
        assert!(pooled.slot.file.lock().is_none(), "who it is does not have to be looked up");
        pooled.length().unwrap();
    }
    for result in [
        pooled.write_at(&[0; 512], 0).map(drop),
        pooled.write_durable_at(&[0; 512], 0),
        pooled.sync_data(),
        pooled.set_len(0),
        pooled.punch_hole(0, 4096),
        pooled.set_modified(FileTime::default()),
        pooled.lock(LockMode::Exclusive),
        pooled.unlock(),
    ] {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::Unsupported);
    }
    assert_eq!(vfs.content_hash(Path::new(BASE)), before);
}
