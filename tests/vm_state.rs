//! The files of a VM's state: made, given back, and refused where they are not what the seal says.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cowvhd::state::{Digest, Draft, ManifestDisk, StateNames, VmState};
use cowvhd::vfs::HostVfs;
use cowvhd::vhd::UniqueId;
use cowvhd::{ErrorKind, Result};
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const DISK: UniqueId = UniqueId::from_bytes([1; 16]);
const SEAL: [u8; 16] = [2; 16];

struct Saved {
    dir: tempfile::TempDir,
    digest: Digest,
}

impl Saved {
    fn names(&self, name: &str) -> StateNames {
        StateNames::new(&self.dir.path().join("vm.vhd"), name).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn open(&self) -> Result<VmState> {
        self.open_as(DISK, SEAL, self.digest)
    }

    fn open_as(&self, disk: UniqueId, seal: [u8; 16], digest: Digest) -> Result<VmState> {
        VmState::open(&HostVfs, &self.names("a"), disk, seal, digest)
    }

    /// Opens a blob as somebody does who gets past its permissions.
    fn tamper(&self) -> fs::File {
        let path = self.path("vm@a+ram.vmstate");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::OpenOptions::new().write(true).open(&path).unwrap()
    }

    /// Fails with this, and names the file.
    fn refuses(&self, result: Result<impl std::fmt::Debug>, says: &str) {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StateMismatch, "{error}");
        let text = error.to_string();
        assert!(text.contains(says) && text.contains("vm@a"), "{text}");
    }
}

fn disk() -> ManifestDisk {
    ManifestDisk { disk_id: DISK, seal_id: SEAL, file_name: b"vm.vhd".to_vec() }
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}

/// A state with 9 MiB of RAM, of which some is there, and a little about devices.
fn saved() -> Saved {
    let dir = tempfile::tempdir().unwrap();
    let names = StateNames::new(&dir.path().join("vm.vhd"), "a").unwrap();
    let draft = Draft::new(Arc::new(HostVfs), names).unwrap();
    let ram = draft.blob("ram").unwrap();
    ram.set_len(9 << 20).unwrap();
    std::thread::scope(|scope| {
        for part in 0..4_u64 {
            let ram = &ram;
            scope.spawn(move || ram.write_at(&[part as u8 + 1; 4096], part << 20).unwrap());
        }
    });
    ram.write_at(&[9; 8192], 8 << 20).unwrap();
    ram.punch_hole(8 << 20, 4096).unwrap();
    assert_eq!(draft.blob("ram").unwrap_err().kind(), ErrorKind::Exists);
    // As a hypervisor does that is handed the descriptor.
    let devices = draft.blob("devices").unwrap();
    let mut file = fs::File::from(devices.as_fd().unwrap().try_clone_to_owned().unwrap());
    file.write_all(b"a virtual machine").unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let digest = draft.write_manifest(vec![disk()]).unwrap();
    draft.publish().unwrap();
    Saved { dir, digest }
}

#[test]
fn a_state_comes_back() {
    let saved = saved();
    assert_eq!(names_in(saved.dir.path()), ["vm@a+devices.vmstate", "vm@a+ram.vmstate", "vm@a.vmstate"]);
    for name in ["vm@a+devices.vmstate", "vm@a+ram.vmstate"] {
        assert!(fs::metadata(saved.path(name)).unwrap().permissions().readonly());
    }
    let state = saved.open().unwrap();
    assert_eq!(state.disks(), [disk()]);
    state.verify().unwrap();
    let ram = state.blob("ram").unwrap();
    assert_eq!(ram.length(), 9 << 20);
    let mut page = [0; 4096];
    for (page_at, value) in [(0, 1), (1 << 20, 2), (3 << 20, 4), (8 << 20, 0), ((8 << 20) + 4096, 9)] {
        ram.read_at(&mut page, page_at).unwrap();
        assert_eq!(page, [value; 4096], "at {page_at}");
    }
    assert_eq!(ram.next_data(4096).unwrap(), Some(1 << 20..(1 << 20) + 4096));
    assert_eq!(ram.next_data((8 << 20) + 8192).unwrap(), None);
    assert!(ram.read_at(&mut page, (9 << 20) - 1).is_err());
    assert_eq!(ram.map_private().unwrap().length(), 9 << 20);
    let devices = state.blob("devices").unwrap();
    let mut text = [0; 17];
    devices.read_at(&mut text, 0).unwrap();
    assert_eq!(&text, b"a virtual machine");
    assert!(devices.as_fd().is_some_and(|fd| fd.as_fd().try_clone_to_owned().is_ok()));
    let error = state.blob("disk").unwrap_err().to_string();
    assert!(error.contains("ram, devices"), "{error}");
}

#[test]
fn a_draft_that_is_dropped_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let names = || StateNames::new(&dir.path().join("vm.vhd"), "a").unwrap();
    let draft = Draft::new(Arc::new(HostVfs), names()).unwrap();
    draft.blob("ram").unwrap().write_at(&[1; 4096], 0).unwrap();
    draft.write_manifest(vec![disk()]).unwrap();
    assert_eq!(names_in(dir.path()), ["vm@a+ram.vmstate", "vm@a+~manifest.vmstate"]);
    assert_eq!(Draft::new(Arc::new(HostVfs), names()).unwrap_err().kind(), ErrorKind::Exists);
    drop(draft);
    assert!(names_in(dir.path()).is_empty());
}

#[test]
fn a_file_becomes_a_blob_without_its_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let names = StateNames::new(&dir.path().join("vm.vhd"), "a").unwrap();
    let (source, length) = (dir.path().join("saved"), (5 << 20) + 77);
    let mut bytes = vec![0_u8; length];
    bytes[..10].fill(1);
    bytes[(2 << 20) - 1..(2 << 20) + 1].fill(2);
    *bytes.last_mut().unwrap() = 3;
    fs::write(&source, &bytes).unwrap();
    let draft = Draft::new(Arc::new(HostVfs), names).unwrap();
    let blob = draft.blob_from("ram", &source).unwrap();
    assert_eq!(fs::read(blob.path()).unwrap(), bytes);
    let space = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(blob.path()).unwrap()) * 512;
    assert!(space <= 6 * 4096, "{space}");
    assert!(draft.blob_from("no", &dir.path().join("nothing")).is_err());
    assert!(!dir.path().join("vm@a+no.vmstate").exists());
}

#[test]
fn exactly_the_files_of_one_state_are_removed() {
    let saved = saved();
    let others = ["vm@ab.vmstate", "vm@ab+ram.vmstate", "vm@a.vhd", "vm@a+notes.txt", "wm@a+ram.vmstate"];
    for name in others {
        fs::write(saved.path(name), "").unwrap();
    }
    fs::create_dir(saved.path("vm@a+folder.vmstate")).unwrap();
    std::os::unix::fs::symlink("vm@a.vhd", saved.path("vm@a+link.vmstate")).unwrap();
    fs::write(saved.path("vm@a+~manifest.vmstate"), "half").unwrap();
    assert_eq!(saved.names("a").remove_all(&HostVfs).unwrap(), 4);
    let mut left = others.to_vec();
    left.extend(["vm@a+folder.vmstate", "vm@a+link.vmstate"]);
    left.sort();
    assert_eq!(names_in(saved.dir.path()), left);
    assert_eq!(saved.names("a").remove_all(&HostVfs).unwrap(), 0);
}

#[test]
fn a_state_of_another_disk_or_moment_is_refused() {
    let saved = saved();
    saved
        .refuses(saved.open_as(UniqueId::from_bytes([7; 16]), SEAL, saved.digest), "does not belong to disk");
    saved.refuses(saved.open_as(DISK, [7; 16], saved.digest), "as it was sealed");
    let other = self::saved();
    let draft = Draft::new(Arc::new(HostVfs), other.names("b")).unwrap();
    draft.blob("ram").unwrap().set_len(9 << 20).unwrap();
    draft.write_manifest(vec![disk()]).unwrap();
    draft.publish().unwrap();
    fs::copy(other.path("vm@b.vmstate"), saved.path("vm@a.vmstate")).unwrap();
    saved.refuses(saved.open(), "not the one that the disk was sealed with");
    fs::remove_file(saved.path("vm@a.vmstate")).unwrap();
    saved.refuses(saved.open(), "missing");
}

#[test]
fn a_blob_that_was_changed_is_refused() {
    let write = |saved: &Saved, offset: u64, bytes: &[u8]| {
        let mut file = saved.tamper();
        file.seek(SeekFrom::Start(offset)).unwrap();
        file.write_all(bytes).unwrap();
    };
    for (offset, bytes) in [(0, &[2][..]), (5 << 20, &[1]), ((9 << 20) - 1, &[1])] {
        let saved = saved();
        write(&saved, offset, bytes);
        saved.refuses(saved.open().unwrap().verify(), "was changed");
    }
    let saved = saved();
    write(&saved, 9 << 20, &[0]);
    saved.refuses(saved.open(), "it has 9437185 bytes, and had 9437184");
    saved.tamper().set_len(0).unwrap();
    saved.refuses(saved.open(), "it has 0 bytes");
    fs::remove_file(saved.path("vm@a+ram.vmstate")).unwrap();
    saved.refuses(saved.open(), "missing");
}

/// Blobs of two states of the same disk, each of which is whole.
#[test]
fn a_blob_of_another_state_is_refused() {
    let saved = saved();
    let names = StateNames::new(&saved.path("vm.vhd"), "b").unwrap();
    let draft = Draft::new(Arc::new(HostVfs), names).unwrap();
    draft.blob("ram").unwrap().write_at(&[5; 4096], (9 << 20) - 4096).unwrap();
    draft.write_manifest(vec![disk()]).unwrap();
    draft.publish().unwrap();
    let other = fs::read(saved.path("vm@b+ram.vmstate")).unwrap();
    let ram = saved.path("vm@a+ram.vmstate");
    assert_eq!(fs::metadata(&ram).unwrap().len(), other.len() as u64);
    fs::remove_file(&ram).unwrap();
    fs::write(&ram, other).unwrap();
    let state = saved.open().unwrap();
    saved.refuses(state.verify(), "exchanged for another");
    saved.refuses(state.blob("ram").unwrap().verify(), "vm@a+ram.vmstate");
    state.blob("devices").unwrap().verify().unwrap();
}

#[test]
fn a_damaged_manifest_is_called_so() {
    let saved = saved();
    let path = saved.path("vm@a.vmstate");
    let good = fs::read(&path).unwrap();
    for at in (0..good.len()).step_by(7) {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&path, bad).unwrap();
        let error = saved.open().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "byte {at}: {error}");
    }
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    assert_eq!(saved.open().unwrap_err().kind(), ErrorKind::Corrupt);
}
