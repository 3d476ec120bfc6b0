//! What is asked of an image that it cannot do, or must not, or not now: the error names the file, says why and what to do instead;
//! no file has changed, and none has come.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use cowvhd::sim::SimVfs;
use cowvhd::snapshot::{SnapshotName, rebase};
use cowvhd::vfs::{Access, File, FileIdentity, FileTime, Vfs};
use cowvhd::vhd::{DiskType, DynamicHeader, Footer, Timestamp, UniqueId};
use cowvhd::{CreateOptions, ErrorKind, OpenOptions, Result, upgrade};
use std::ffi::{OsStr, OsString};
use std::fmt::Debug;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const BLOCK: u32 = 16 << 10;
const SIZE: u64 = 8 * BLOCK as u64;

fn options(vfs: &SimVfs) -> OpenOptions {
    OpenOptions::new().vfs(Arc::new(vfs.clone()))
}

fn create_by(vfs: Arc<dyn Vfs>, options: CreateOptions, path: &str) -> Result<()> {
    options.test_geometry(BLOCK, 128 << 10).vfs(vfs).create(Path::new(path))
}

fn create(vfs: &SimVfs, path: &str) {
    create_by(Arc::new(vfs.clone()), CreateOptions::new(SIZE), path).unwrap();
}

fn create_child(vfs: &SimVfs, path: &str, parent: &str) -> Result<()> {
    create_by(Arc::new(vfs.clone()), CreateOptions::child_of(Path::new(parent)), path)
}

fn write(vfs: &SimVfs, path: &str, byte: u8) {
    let disk = options(vfs).open(Path::new(path)).unwrap();
    disk.write_at(&[byte; 4096], 0).unwrap();
    disk.close().unwrap();
}

fn first_byte(vfs: &SimVfs, path: &str) -> u8 {
    let mut byte = [0];
    options(vfs).read_only(true).open(Path::new(path)).unwrap().read_at(&mut byte, 0).unwrap();
    byte[0]
}

/// All files, and what they hold.
fn files(vfs: &SimVfs) -> Vec<(PathBuf, Option<u64>)> {
    vfs.paths().into_iter().map(|path| (path.clone(), vfs.content_hash(&path))).collect()
}

#[track_caller]
fn refused<T: Debug>(result: Result<T>, kind: ErrorKind, words: &[&str]) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    for words in words {
        assert!(error.to_string().contains(words), "{words:?} is not in: {error}");
    }
}

/// The same, and it changed nothing.
#[track_caller]
fn refused_unchanged<T: Debug>(
    vfs: &SimVfs,
    work: impl FnOnce() -> Result<T>,
    kind: ErrorKind,
    words: &[&str],
) {
    let before = files(vfs);
    refused(work(), kind, words);
    assert_eq!(files(vfs), before);
}

/// An image as another program makes it.
fn made_elsewhere(vfs: &SimVfs, path: &str, parent: Option<&str>, size: u64) {
    let table_entries = (size / u64::from(BLOCK)) as u32;
    let kind = if parent.is_some() { DiskType::Differencing } else { DiskType::Dynamic };
    let mut footer = Footer::new(kind, size, UniqueId::from_bytes([7; 16]), Timestamp(700_000_000));
    footer.creator_app = *b"test";
    let mut header = DynamicHeader::new(1536, table_entries, BLOCK);
    if let Some(parent) = parent {
        let bytes = vfs.content(Path::new(parent)).unwrap();
        header.parent_unique_id = Footer::parse(&bytes[..512]).unwrap().unique_id;
        let name = parent.rsplit('/').next().unwrap();
        header.set_parent_name(&name.encode_utf16().collect::<Vec<_>>()).unwrap();
    }
    let table = vec![0xff; (table_entries as usize * 4).next_multiple_of(512)];
    let footer = footer.to_bytes();
    let file = vfs.create_new(Path::new(path)).unwrap();
    let image = [&footer[..], &header.to_bytes(), &table, &footer].concat();
    assert_eq!(file.write_at(&image, 0).unwrap(), image.len());
    file.sync_data().unwrap();
}

/// A child says of its parent more than its id: in which state it was made over it.
#[test]
fn a_parent_in_another_state() {
    let vfs = SimVfs::new(1);
    create(&vfs, "/base.vhd");
    write(&vfs, "/base.vhd", 1);
    let unsealed = vfs.content(Path::new("/base.vhd")).unwrap();
    create_child(&vfs, "/child.vhd", "/base.vhd").unwrap();
    let open = |path: &str| options(&vfs).open(Path::new(path));
    open("/child.vhd").unwrap().close().unwrap();

    // Somebody brings the state back that it had before, and makes another child over that.
    vfs.remove(Path::new("/base.vhd")).unwrap();
    let file = vfs.create_new(Path::new("/base.vhd")).unwrap();
    assert_eq!(file.write_at(&unsealed, 0).unwrap(), unsealed.len());
    file.sync_data().unwrap();
    drop(file);
    let hint = "bring the file back that was the parent";
    let words = ["/child.vhd", "its parent /base.vhd is not in the state", "it is not sealed any more", hint];
    refused_unchanged(&vfs, || open("/child.vhd"), ErrorKind::Corrupt, &words);
    create_child(&vfs, "/second.vhd", "/base.vhd").unwrap();
    let words = ["/child.vhd", "its parent /base.vhd is not in the state", "it was sealed anew since", hint];
    refused_unchanged(&vfs, || open("/child.vhd"), ErrorKind::Corrupt, &words);
    assert_eq!(first_byte(&vfs, "/second.vhd"), 1);
}

/// Layers that would be beneath themselves.
#[test]
fn a_parent_that_is_made_over_its_child() {
    let vfs = SimVfs::new(3);
    create(&vfs, "/base.vhd");
    create_child(&vfs, "/middle.vhd", "/base.vhd").unwrap();
    create(&vfs, "/other.vhd");
    create_child(&vfs, "/top.vhd", "/middle.vhd").unwrap();
    let rebase = |disk: &str, parent: &str| {
        rebase(&options(&vfs), Path::new(disk), Path::new(parent), &mut |_| ControlFlow::Continue(()))
    };
    let words = "it cannot be the parent of a disk that it is made over itself, or is";
    for (disk, parent) in [("/middle.vhd", "/top.vhd"), ("/top.vhd", "/top.vhd"), ("/base.vhd", "/top.vhd")] {
        refused_unchanged(&vfs, || rebase(disk, parent), ErrorKind::InvalidInput, &[parent, words]);
    }
    // A copy of the disk is another file, and the same disk.
    let copy = vfs.content(Path::new("/top.vhd")).unwrap();
    let file = vfs.create_new(Path::new("/copy.vhd")).unwrap();
    assert_eq!(file.write_at(&copy, 0).unwrap(), copy.len());
    drop(file);
    refused(rebase("/top.vhd", "/copy.vhd"), ErrorKind::InvalidInput, &["/copy.vhd", words]);
    rebase("/top.vhd", "/other.vhd").unwrap();
    assert_eq!(first_byte(&vfs, "/top.vhd"), 0);
}

/// Parents whose path no locator, or whose name no header can hold.
#[test]
fn paths_that_a_vhd_cannot_hold() {
    let long_name = format!("{}.vhd", "n".repeat(252));
    for (parent, words) in [
        (format!("/{}/base.vhd", "a/".repeat(1020)), "/base.vhd\" of the parent is too long"),
        (format!("/{long_name}"), "field parent name"),
        ("/back\\slash.vhd".to_owned(), "a path without backslashes"),
    ] {
        let vfs = SimVfs::new(4);
        create(&vfs, &parent);
        write(&vfs, &parent, 1);
        let error = create_child(&vfs, "/child.vhd", &parent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(vfs.identity(Path::new("/child.vhd")).is_err());
        assert_eq!(vfs.paths().len(), 1, "{:?}", vfs.paths());
        assert_eq!(first_byte(&vfs, &parent), 1);
    }
    let vfs = SimVfs::new(4);
    let parent = Path::new(OsStr::from_bytes(b"/\xff.vhd"));
    let of = |options: CreateOptions| options.test_geometry(BLOCK, 128 << 10).vfs(Arc::new(vfs.clone()));
    of(CreateOptions::new(SIZE)).create(parent).unwrap();
    let result = of(CreateOptions::child_of(parent)).create(Path::new("/child.vhd"));
    refused(result, ErrorKind::InvalidInput, &["is not UTF-8: a VHD cannot name it as a parent"]);
    assert_eq!(vfs.paths(), [parent]);
}

/// A parent notes its children in a place that has an end.
#[test]
fn a_registry_of_children_that_is_full() {
    let vfs = SimVfs::new(5);
    create(&vfs, "/base.vhd");
    write(&vfs, "/base.vhd", 9);
    let folder = |number: u32| format!("/{}/{number}", "f".repeat(3900));
    let mut number = 0;
    let error = loop {
        match create_child(&vfs, &format!("{}/child.vhd", folder(number)), "/base.vhd") {
            Ok(()) => number += 1,
            Err(error) => break error,
        }
        assert!(number < 100);
    };
    assert_eq!(number, 24, "96 KiB of children with paths of 3912 bytes");
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    let words = "/base.vhd: no space left: its registry of children is full: remove clones that nobody needs, or clone from a copy";
    assert!(error.to_string().contains(words), "{error}");
    let next = format!("{}/child.vhd", folder(number));
    let again = || create_child(&vfs, &next, "/base.vhd");
    refused_unchanged(&vfs, again, ErrorKind::NoSpace, &[]);
    // There is room for one that takes less, and those that are noted are there.
    create_child(&vfs, "/small.vhd", "/base.vhd").unwrap();
    assert_eq!(first_byte(&vfs, "/small.vhd"), 9);
    let parents = options(&vfs).allow_parents_in(Path::new("/"));
    for number in 0..24 {
        let path = format!("{}/child.vhd", folder(number));
        parents.clone().open(Path::new(&path)).unwrap().close().unwrap();
    }
}

/// What other programs made has no place for what VHD lacks, until it is upgraded.
#[test]
fn images_made_elsewhere_before_they_are_upgraded() {
    let vfs = SimVfs::new(6);
    create(&vfs, "/base.vhd");
    create(&vfs, "/other.vhd");
    made_elsewhere(&vfs, "/root.vhd", None, SIZE);
    made_elsewhere(&vfs, "/child.vhd", Some("/base.vhd"), SIZE);
    let name = SnapshotName::new("s1").unwrap();
    let hint = "run `cowvhd upgrade` on it first";
    let disk = options(&vfs).open(Path::new("/root.vhd")).unwrap();
    let before = vfs.paths();
    refused(disk.snapshot(&name), ErrorKind::Unsupported, &["/root.vhd", "made by another program", hint]);
    assert_eq!(vfs.paths(), before);
    disk.write_at(&[3; 4096], 0).unwrap();
    disk.close().unwrap();
    drop(disk);
    let to_other = || {
        let (disk, parent) = (Path::new("/child.vhd"), Path::new("/other.vhd"));
        rebase(&options(&vfs), disk, parent, &mut |_| ControlFlow::Continue(()))
    };
    let words = ["/child.vhd", "no room for other parent locators", hint];
    refused(to_other(), ErrorKind::Unsupported, &words);
    assert_eq!(first_byte(&vfs, "/child.vhd"), 0);
    // What the errors say helps.
    for path in ["/root.vhd", "/child.vhd"] {
        assert!(upgrade(Arc::new(vfs.clone()), Path::new(path)).unwrap());
    }
    to_other().unwrap();
    let disk = options(&vfs).open(Path::new("/root.vhd")).unwrap();
    disk.snapshot(&name).unwrap();
    disk.close().unwrap();
    assert_eq!(first_byte(&vfs, "/root@s1.vhd"), 3);
}

/// What an upgrade cannot make room for.
#[test]
fn images_that_cannot_be_upgraded() {
    let vfs = SimVfs::new(7);
    create_by(Arc::new(vfs.clone()), CreateOptions::new(SIZE).fixed(), "/fixed.vhd").unwrap();
    // 8 MiB of table.
    made_elsewhere(&vfs, "/long.vhd", None, 2 * 1024 * 1024 * u64::from(BLOCK));
    for (path, words) in [
        ("/fixed.vhd", "it is a fixed disk, which has no block table: convert it (`cowvhd convert`)"),
        (
            "/long.vhd",
            "its block table does not fit the room that one made here has: convert it (`cowvhd convert`)",
        ),
    ] {
        let work = || upgrade(Arc::new(vfs.clone()), Path::new(path));
        refused_unchanged(&vfs, work, ErrorKind::Unsupported, &[path, words]);
    }
}

/// A file system in which the file at one path is another one whenever somebody looks.
#[derive(Debug)]
struct Overtaken {
    inner: SimVfs,
    path: &'static str,
}

impl Vfs for Overtaken {
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        self.inner.open(path, access)
    }

    fn open_beneath(&self, folder: &Path, path: &Path) -> io::Result<Arc<dyn File>> {
        self.inner.open_beneath(folder, path)
    }

    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.inner.create_new(path)
    }

    fn identity(&self, path: &Path) -> io::Result<FileIdentity> {
        let identity = self.inner.identity(path)?;
        match path == Path::new(self.path) {
            true => Ok(FileIdentity { inode: identity.inode + 1000, ..identity }),
            false => Ok(identity),
        }
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.link(from, to)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.rename(from, to)
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        self.inner.exchange(one, other)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.inner.remove(path)
    }

    fn files(&self, directory: &Path, prefix: &OsStr) -> io::Result<Vec<OsString>> {
        self.inner.files(directory, prefix)
    }

    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        self.inner.sync_dir(directory)
    }

    fn random_id(&self) -> io::Result<[u8; 16]> {
        self.inner.random_id()
    }

    fn now(&self) -> FileTime {
        self.inner.now()
    }
}

/// A name that stands for another file by the time its file is locked: what would be written goes to nobody's disk.
#[test]
fn a_name_that_another_file_takes() {
    let vfs = SimVfs::new(8);
    create(&vfs, "/base.vhd");
    let overtaken = || Arc::new(Overtaken { inner: vfs.clone(), path: "/base.vhd" });
    let open = || OpenOptions::new().vfs(overtaken()).open(Path::new("/base.vhd"));
    let words = ["/base.vhd", "another file takes its name again and again: try later"];
    refused_unchanged(&vfs, open, ErrorKind::Unsupported, &words);
    // Of a parent that is sealed already, too.
    create_child(&vfs, "/first.vhd", "/base.vhd").unwrap();
    let child = || create_by(overtaken(), CreateOptions::child_of(Path::new("/base.vhd")), "/child.vhd");
    let words = ["/base.vhd", "another file took its name meanwhile: try again"];
    refused_unchanged(&vfs, child, ErrorKind::Unsupported, &words);
}
