//! Chains that are broken, or made to read what they must not: parents that are missing, others, elsewhere, no disks; chains
//! without end; locators that lie. docs/hostile-input.md lists the cases.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/hostile.rs"]
#[allow(dead_code, reason = "shared with the tests of single images")]
mod hostile;

use cowvhd::sim::SimVfs;
use cowvhd::snapshot::SnapshotName;
use cowvhd::vfs::Vfs;
use cowvhd::vhd::{
    DiskType, DynamicHeader, Footer, ParentLocator, PlatformCode, Timestamp, UniqueId, bat_bytes,
    bitmap_bytes, locator,
};
use cowvhd::{CreateOptions, ErrorKind, OpenOptions};
use hostile::images;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

const BLOCK: usize = 4096;
const BLOCKS: usize = 4;
const SIZE: usize = BLOCK * BLOCKS;

/// A small image by hand.
struct Image {
    id: [u8; 16],
    size: usize,
    parent: Option<([u8; 16], String)>,
    locators: Vec<(PlatformCode, Vec<u8>)>,
    /// What each block is filled with, where it is there; all of its bits are set.
    blocks: Vec<Option<u8>>,
}

fn id(number: u8) -> [u8; 16] {
    [number; 16]
}

impl Image {
    fn root(number: u8, fill: u8) -> Self {
        Image {
            id: id(number),
            size: SIZE,
            parent: None,
            locators: Vec::new(),
            blocks: vec![Some(fill); BLOCKS],
        }
    }

    /// A child that holds its first block alone.
    fn child(number: u8, parent: u8, name: &str) -> Self {
        let mut blocks = vec![None; BLOCKS];
        blocks[0] = Some(number);
        Image { parent: Some((id(parent), name.into())), blocks, ..Image::root(number, 0) }
    }

    fn locator(mut self, platform: PlatformCode, payload: Vec<u8>) -> Self {
        self.locators.push((platform, payload));
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let kind = if self.parent.is_some() { DiskType::Differencing } else { DiskType::Dynamic };
        let mut footer =
            Footer::new(kind, self.size as u64, UniqueId::from_bytes(self.id), Timestamp(700_000_000));
        footer.data_offset = 512;
        let entries = self.blocks.len() as u32;
        let table_at = 8192;
        let mut header = DynamicHeader::new(table_at as u64, entries, BLOCK as u32);
        let mut image = vec![0; table_at];
        if let Some((parent, name)) = &self.parent {
            header.parent_unique_id = UniqueId::from_bytes(*parent);
            header.set_parent_name(&name.encode_utf16().collect::<Vec<_>>()).unwrap();
        }
        for (index, (platform, payload)) in self.locators.iter().enumerate() {
            let at = 2048 + 512 * index;
            header.locators[index] = ParentLocator::new(*platform, at as u64, 512, payload.len() as u32);
            image[at..at + payload.len()].copy_from_slice(payload);
        }
        image[..512].copy_from_slice(&footer.to_bytes());
        image[512..1536].copy_from_slice(&header.to_bytes());
        let mut table = vec![0xff; bat_bytes(entries) as usize];
        let mut data = Vec::new();
        for (block, fill) in self.blocks.iter().enumerate().filter_map(|(at, fill)| Some((at, (*fill)?))) {
            let sector = (table_at + table.len() + data.len()) / 512;
            table[block * 4..][..4].copy_from_slice(&(sector as u32).to_be_bytes());
            data.extend(vec![0xff; bitmap_bytes(BLOCK as u32) as usize]);
            data.extend(vec![fill; BLOCK]);
        }
        image.extend(table);
        image.extend(data);
        image.extend(footer.to_bytes());
        image
    }

    fn write(&self, path: &Path) {
        fs::write(path, self.bytes()).unwrap();
    }
}

/// A folder with a child in a folder of its own, so that there is an outside.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("vm")).unwrap();
        Place { dir }
    }

    fn outside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn inside(&self, name: &str) -> PathBuf {
        self.dir.path().join("vm").join(name)
    }

    /// What opening the child says, whichever way it is opened; it is not changed, nor is the parent.
    fn refused(&self, child: &Image, kind: ErrorKind, text: &str) {
        let path = self.inside("child.vhd");
        child.write(&path);
        let before = fs::read(&path).unwrap();
        for read_only in [true, false] {
            let error = OpenOptions::new().read_only(read_only).open(&path).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(text), "{error}, without: {text}");
        }
        assert!(fs::read(&path).unwrap() == before);
    }

    fn read(&self, child: &Image) -> Vec<u8> {
        let path = self.inside("child.vhd");
        child.write(&path);
        content(OpenOptions::new(), &path)
    }
}

/// The content of a disk; its files are not changed by reading it.
fn content(options: OpenOptions, path: &Path) -> Vec<u8> {
    let disk = options.read_only(true).open(path).unwrap();
    let mut content = vec![0xee; disk.size() as usize];
    disk.read_at(&mut content, 0).unwrap();
    content
}

/// By block.
fn filled(fills: &[u8]) -> Vec<u8> {
    fills.iter().flat_map(|&fill| vec![fill; BLOCK]).collect()
}

fn units(path: &str) -> Vec<u8> {
    locator::encode_units(&path.encode_utf16().collect::<Vec<_>>())
}

fn relative(path: &str) -> Vec<u8> {
    locator::encode_relative(PlatformCode::W2ru, path.as_bytes()).unwrap()
}

#[test]
fn an_image_that_is_its_own_parent_is_refused() {
    let place = Place::new();
    let child = Image::child(1, 1, "child.vhd");
    place.refused(&child, ErrorKind::Corrupt, "its chain of parents is a loop: ");
    let by_locator = Image::child(1, 1, "other.vhd").locator(PlatformCode::W2ru, relative("child.vhd"));
    place.refused(&by_locator, ErrorKind::Corrupt, "its chain of parents is a loop");
}

#[test]
fn a_chain_that_comes_back_to_itself_is_refused() {
    for length in 2..6 {
        let place = Place::new();
        for number in 2..=length {
            let next = if number == length { 1 } else { number + 1 };
            let name = if number == length { "child.vhd".into() } else { format!("{next}.vhd") };
            Image::child(number, next, &name).write(&place.inside(&format!("{number}.vhd")));
        }
        place.refused(&Image::child(1, 2, "2.vhd"), ErrorKind::Corrupt, "its chain of parents is a loop");
        // The loop need not hold the image that is opened.
        Image::child(1, 2, "2.vhd").write(&place.inside("1.vhd"));
        Image::child(length, 1, "1.vhd").write(&place.inside(&format!("{length}.vhd")));
        place.refused(&Image::child(99, 2, "2.vhd"), ErrorKind::Corrupt, "its chain of parents is a loop");
    }
}

/// A chain of `count` children, `/0.vhd` the uppermost, over a root full of sevens.
fn long_chain(count: u32) -> SimVfs {
    let vfs = SimVfs::new(1);
    let chain_id = |number: u32| {
        let mut id = [5; 16];
        id[..4].copy_from_slice(&number.to_be_bytes());
        id
    };
    let write = |number: u32, image: &Image| {
        let path = format!("/{number}.vhd");
        let file = vfs.create_new(Path::new(&path)).unwrap();
        file.write_at(&image.bytes(), 0).unwrap();
        file.sync_data().unwrap();
    };
    for number in 0..count {
        let parent = Some((chain_id(number + 1), format!("{}.vhd", number + 1)));
        write(number, &Image { id: chain_id(number), parent, ..Image::child(0, 0, "") });
    }
    write(count, &Image { id: chain_id(count), ..Image::root(0, 7) });
    vfs
}

fn last_block(vfs: &SimVfs, path: &str) -> cowvhd::Result<[u8; BLOCK]> {
    let disk = OpenOptions::new().vfs(Arc::new(vfs.clone())).read_only(true).open(Path::new(path))?;
    let mut last = [0xee; BLOCK];
    disk.read_at(&mut last, (SIZE - BLOCK) as u64)?;
    Ok(last)
}

/// Ten thousand images, each over the next: neither the stack nor the time grows with what the file claims.
#[test]
fn a_chain_without_end_is_refused() {
    let vfs = long_chain(10_000);
    let error = last_block(&vfs, "/0.vhd").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains("its chain has more than 4096 layers"), "{error}");
    assert!(last_block(&vfs, &format!("/{}.vhd", 10_000 - 4096)).is_err());
    assert_eq!(last_block(&vfs, &format!("/{}.vhd", 10_000 - 4095)).unwrap(), [7; BLOCK]);
}

/// Longhorn #10308: the limit of a chain was met only when it was opened: the snapshot too many was made, and the volume lost.
#[test]
fn longhorn_10308_a_layer_too_many_is_refused_when_it_is_made() {
    let vfs = long_chain(4095);
    let create = |over: &str| {
        CreateOptions::child_of(Path::new(over)).vfs(Arc::new(vfs.clone())).create(Path::new("/new.vhd"))
    };
    let error = create("/0.vhd").unwrap_err();
    assert!(error.to_string().contains("its chain has 4096 layers already"), "{error}");
    assert!(vfs.content(Path::new("/new.vhd")).is_none());
    assert_eq!(last_block(&vfs, "/0.vhd").unwrap(), [7; BLOCK]);
    // The last one that can be made can be opened.
    create("/1.vhd").unwrap();
    assert_eq!(last_block(&vfs, "/new.vhd").unwrap(), [7; BLOCK]);
    // And while it is written to no snapshot is made of it; it goes on.
    let open = || OpenOptions::new().vfs(Arc::new(vfs.clone())).open(Path::new("/new.vhd"));
    let disk = open().unwrap();
    disk.write_at(&[8; 512], 0).unwrap();
    let error = disk.snapshot(&SnapshotName::new("one").unwrap()).unwrap_err();
    assert!(error.to_string().contains("its chain has 4096 layers already"), "{error}");
    assert!(vfs.content(Path::new("/new@one.vhd")).is_none());
    disk.write_at(&[9; 512], 512).unwrap();
    disk.flush().unwrap();
    disk.close().unwrap();
    drop(disk);
    let disk = open().unwrap();
    let mut start = [0xee; 1024];
    disk.read_at(&mut start, 0).unwrap();
    assert_eq!(start, [[8; 512], [9; 512]].concat()[..]);
}

#[test]
fn a_parent_that_is_not_there_is_named_with_its_id_and_every_place_that_was_looked_at() {
    let place = Place::new();
    let child = Image::child(1, 2, "base.vhd")
        .locator(PlatformCode::W2ru, relative("one.vhd"))
        .locator(PlatformCode::W2ku, units(r"C:\two.vhd"));
    for text in [
        "its parent (id 02020202-0202-0202-0202-020202020202) was not found",
        "locator W2ru \"one.vhd\": ",
        "/vm/one.vhd does not exist",
        "locator W2ku \"C:/two.vhd\": it is a path of Windows",
        "parent name \"base.vhd\": ",
        "name the parent's path yourself (--parent)",
    ] {
        place.refused(&child, ErrorKind::ParentMissing, text);
    }
}

#[test]
fn a_disk_with_another_unique_id_is_not_the_parent() {
    let place = Place::new();
    Image::root(3, 0xbb).write(&place.inside("base.vhd"));
    let child = Image::child(1, 2, "base.vhd");
    let text = "base.vhd is another disk (id 03030303-0303-0303-0303-030303030303)";
    place.refused(&child, ErrorKind::ParentMissing, text);
    // The caller's own word does not make it one, either.
    let error =
        OpenOptions::new().parent(&place.inside("base.vhd")).open(&place.inside("child.vhd")).unwrap_err();
    assert!(error.to_string().contains(text), "{error}");
    // The right one is found where another stands in the better place.
    Image::root(2, 0xcc).write(&place.inside("right.vhd"));
    let child = Image::child(1, 2, "right.vhd").locator(PlatformCode::W2ru, relative("base.vhd"));
    assert!(place.read(&child) == filled(&[1, 0xcc, 0xcc, 0xcc]));
}

/// The time in the child says when its parent was last changed. Copying the parent changes its time: it proves nothing.
#[test]
fn a_parent_of_another_time_is_read() {
    let place = Place::new();
    Image::root(2, 0xbb).write(&place.inside("base.vhd"));
    let (path, mut child) = (place.inside("child.vhd"), Image::child(1, 2, "base.vhd").bytes());
    let mut header = DynamicHeader::parse(&child[512..1536]).unwrap();
    for stamp in [0, 1, 699_999_999, u32::MAX] {
        header.parent_timestamp = Timestamp(stamp);
        child[512..1536].copy_from_slice(&header.to_bytes());
        fs::write(&path, &child).unwrap();
        assert!(content(OpenOptions::new(), &path) == filled(&[1, 0xbb, 0xbb, 0xbb]), "{stamp}");
    }
}

#[test]
fn a_smaller_parent_is_zeros_behind_its_end_and_a_larger_one_is_cut() {
    let place = Place::new();
    let small = Image { size: 2 * BLOCK - 512, blocks: vec![Some(0xbb); 2], ..Image::root(2, 0) };
    small.write(&place.inside("base.vhd"));
    let mut expected = filled(&[1, 0xbb, 0, 0]);
    expected[2 * BLOCK - 512..2 * BLOCK].fill(0);
    assert!(place.read(&Image::child(1, 2, "base.vhd")) == expected);
    // What the parent's own parent has there is not the disk's.
    Image::root(3, 0xdd).write(&place.inside("root.vhd"));
    let middle =
        Image { size: 2 * BLOCK - 512, blocks: vec![None, Some(0xbb)], ..Image::child(2, 3, "root.vhd") };
    middle.write(&place.inside("base.vhd"));
    assert!(place.read(&Image::child(1, 2, "base.vhd")) == expected);
    let large = Image { size: 2 * SIZE, blocks: vec![Some(0xbb); 2 * BLOCKS], ..Image::root(2, 0) };
    large.write(&place.inside("base.vhd"));
    assert!(place.read(&Image::child(1, 2, "base.vhd")) == filled(&[1, 0xbb, 0xbb, 0xbb]));
}

/// While somebody writes to a parent, which only one made elsewhere allows, nobody reads through it; one that was not closed is told so.
#[test]
fn a_parent_that_is_being_written_to_or_was_not_closed_is_refused() {
    let place = Place::new();
    let (base, child) = (place.inside("base.vhd"), place.inside("child.vhd"));
    Image::root(2, 0xbb).write(&base);
    Image::child(1, 2, "base.vhd").write(&child);
    let disk = OpenOptions::new().open(&base).unwrap();
    let error = OpenOptions::new().open(&child).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    disk.write_at(&[7; 4096], 0).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let error = OpenOptions::new().open(&child).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains("it is the parent of another image, and was not closed"), "{error}");
}

/// Of a parent; the second file is what it was before it got its child.
type Change = fn(&Path, &Path);

/// What a parent held when it got its child, its seal says, and of a fixed disk its length.
#[test]
fn a_parent_that_was_changed_after_the_snapshot_is_refused() {
    let size = 8 << 20;
    let changes: [(&str, bool, Change); 4] = [
        ("it is not sealed any more", false, |base, before| {
            replace(base, before);
            let disk = OpenOptions::new().open(base).unwrap();
            disk.write_at(&[3; 512], 0).unwrap();
            disk.close().unwrap();
        }),
        ("it was sealed anew since", false, |base, before| {
            replace(base, before);
            CreateOptions::child_of(base).create(&base.with_extension("other")).unwrap();
        }),
        ("another program has placed blocks in it since it was sealed", false, |base, _| {
            make_writable(base);
            let file = fs::File::options().read(true).write(true).open(base).unwrap();
            let end = file.metadata().unwrap().len() - 512;
            let footer = fs::read(base).unwrap()[..512].to_vec();
            file.write_all_at(&[0xff; 512], end).unwrap();
            file.write_all_at(&footer, end + 512 + (2 << 20)).unwrap();
            file.write_all_at(&((end / 512) as u32).to_be_bytes(), 3 << 20).unwrap();
        }),
        ("has 8389632 bytes, and had 8389120 when the image was made over it", true, |base, _| {
            make_writable(base);
            let mut bytes = fs::read(base).unwrap();
            let mut footer = Footer::parse(&bytes[bytes.len() - 512..]).unwrap();
            footer.current_size += 512;
            bytes.extend(footer.to_bytes());
            fs::write(base, bytes).unwrap();
        }),
    ];
    for (text, fixed, change) in changes {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let options = CreateOptions::new(size);
        if fixed { options.fixed() } else { options }.create(&at("base.vhd")).unwrap();
        fs::copy(at("base.vhd"), at("before")).unwrap();
        CreateOptions::child_of(&at("base.vhd")).create(&at("disk.vhd")).unwrap();
        change(&at("base.vhd"), &at("before"));
        let before = [fs::read(at("base.vhd")).unwrap(), fs::read(at("disk.vhd")).unwrap()];
        for read_only in [true, false] {
            let error = OpenOptions::new().read_only(read_only).open(&at("disk.vhd")).map(drop).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            assert!(error.to_string().contains(text), "{error}, without: {text}");
        }
        assert!([fs::read(at("base.vhd")).unwrap(), fs::read(at("disk.vhd")).unwrap()] == before);
    }
}

fn make_writable(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
}

fn replace(path: &Path, by: &Path) {
    fs::remove_file(path).unwrap();
    fs::copy(by, path).unwrap();
    make_writable(path);
}

#[test]
fn a_parent_of_another_format_is_no_parent() {
    let place = Place::new();
    let base = place.inside("base.vhd");
    let child = Image::child(1, 2, "base.vhd");
    let mut qcow2 = b"QFI\xfb\0\0\0\x03".to_vec();
    qcow2.resize(8192, 0);
    let vhdx = [&b"vhdxfile"[..], &[0; 8184]].concat();
    for (bytes, found) in [
        (qcow2, "\"QFI\\xfb\\x00\\x00\\x00\\x03\""),
        (vhdx, "\"vhdxfile\""),
        (b"root:$6$salt$hash:19000:0:99999:7:::\n".to_vec(), "a file of 37 bytes"),
        (vec![0x41; 4096], "\"AAAAAAAA\""),
        (Vec::new(), "a file of 0 bytes"),
    ] {
        fs::write(&base, &bytes).unwrap();
        place.refused(&child, ErrorKind::ParentMissing, "footer: field");
        place.refused(&child, ErrorKind::ParentMissing, found);
        assert!(fs::read(&base).unwrap() == bytes);
    }
}

#[test]
fn a_parent_that_is_no_regular_file_is_refused_at_once() {
    let place = Place::new();
    let base = place.inside("base.vhd");
    let child = Image::child(1, 2, "base.vhd");
    assert!(Command::new("mkfifo").arg(&base).status().unwrap().success());
    place.refused(&child, ErrorKind::ParentMissing, "it is a FIFO, expected a regular file");
    fs::remove_file(&base).unwrap();
    fs::create_dir(&base).unwrap();
    place.refused(&child, ErrorKind::ParentMissing, "it is a folder, expected a regular file");
    fs::remove_dir(&base).unwrap();
    // Even if the caller names it.
    let error =
        OpenOptions::new().parent(Path::new("/dev/zero")).open(&place.inside("child.vhd")).unwrap_err();
    assert!(error.to_string().contains("it is a device"), "{error}");
    std::os::unix::fs::symlink("/dev/zero", &base).unwrap();
    place.refused(&child, ErrorKind::ParentMissing, "a link on its path leads out of the allowed folder");
}

/// A disk of the right id outside of the folder, and every way that an image can name it: no byte of it is shown. The same with
/// a file that is no disk.
#[test]
fn nothing_outside_the_folder_is_a_parent_however_it_is_named() {
    let place = Place::new();
    let secret = place.outside("secret.vhd");
    Image::root(2, 0x5e).write(&secret);
    std::os::unix::fs::symlink(&secret, place.inside("link.vhd")).unwrap();
    std::os::unix::fs::symlink(place.dir.path(), place.inside("folder")).unwrap();
    let outside = "is outside the folders allowed for layers; allow its folder if you trust the image";
    let url = |path: &Path| format!("file://{}", path.display()).into_bytes();
    let absolute = secret.to_str().unwrap();
    let up = "../".repeat(40);
    for (platform, payload, text) in [
        (PlatformCode::W2ru, relative("../secret.vhd"), outside),
        (PlatformCode::W2ru, units(r"..\secret.vhd"), outside),
        (PlatformCode::W2ru, units(r".\x\..\..\secret.vhd"), outside),
        (PlatformCode::W2ru, relative("link.vhd"), "a link on its path leads out of the allowed folder"),
        (
            PlatformCode::W2ru,
            relative("folder/secret.vhd"),
            "a link on its path leads out of the allowed folder",
        ),
        (PlatformCode::W2ru, relative(&format!("{up}etc/shadow")), outside),
        (PlatformCode::W2ku, units(absolute), outside),
        (PlatformCode::W2ku, units("/etc/shadow"), outside),
        (
            PlatformCode::W2ku,
            units(r"C:\secret.vhd"),
            "it is a path of Windows, whose folders mean nothing here",
        ),
        (PlatformCode::W2ku, units(r"\\host\share\secret.vhd"), "it is a path of Windows"),
        (PlatformCode::W2ku, units(r"\\?\C:\secret.vhd"), "it is a path of Windows"),
        (PlatformCode::W2ku, units(r"\\.\PhysicalDrive0"), "it is a path of Windows"),
        (PlatformCode::MacX, url(&secret), outside),
        (PlatformCode::MacX, b"file:///etc/shadow".to_vec(), outside),
        (PlatformCode::MacX, b"file://localhost/proc/self/mem".to_vec(), outside),
        (PlatformCode::MacX, b"http://host/secret.vhd".to_vec(), "expected a URL that starts with file://"),
        (PlatformCode::MacX, b"nbd://host:10809".to_vec(), "expected a URL that starts with file://"),
    ] {
        let child = Image::child(1, 2, "nothing.vhd").locator(platform, payload);
        place.refused(&child, ErrorKind::ParentMissing, text);
        // Nor may it be made so.
        let seen = OpenOptions::new().read_only(true).open(&place.inside("child.vhd"));
        assert!(seen.is_err());
    }
    // A parent's own parent is held to the folder of the image that is opened.
    let middle = Image::child(3, 2, "nothing.vhd").locator(PlatformCode::W2ru, relative("../../secret.vhd"));
    fs::create_dir(place.inside("sub")).unwrap();
    middle.write(&place.inside("sub/middle.vhd"));
    let child = Image::child(1, 3, "nothing.vhd").locator(PlatformCode::W2ru, relative("sub/middle.vhd"));
    place.refused(&child, ErrorKind::ParentMissing, outside);
    // Inside of it `..` is a path as any other.
    Image::root(2, 0xbb).write(&place.inside("base.vhd"));
    let middle = Image::child(3, 2, "nothing.vhd").locator(PlatformCode::W2ru, relative("../base.vhd"));
    middle.write(&place.inside("sub/middle.vhd"));
    assert!(place.read(&child) == filled(&[1, 0xbb, 0xbb, 0xbb]));
    // And with the caller's permission the secret is none.
    let child = Image::child(1, 2, "nothing.vhd").locator(PlatformCode::W2ru, relative("../secret.vhd"));
    child.write(&place.inside("child.vhd"));
    let options = OpenOptions::new().allow_parents_in(place.dir.path());
    assert!(content(options, &place.inside("child.vhd")) == filled(&[1, 0x5e, 0x5e, 0x5e]));
}

/// Locators that lie do not keep the parent from being found by another one or by its name.
#[test]
fn a_locator_that_lies_is_passed_over() {
    for case in hostile::locators().into_iter().filter(|case| case.name != "no parent id") {
        let dir = tempfile::tempdir().unwrap();
        let (path, base) = (dir.path().join("disk.vhd"), dir.path().join("base.vhd"));
        (case.build)(&path);
        let size = 8 * images::BLOCK as usize;
        Image { size, blocks: vec![Some(0xbb); size / BLOCK], ..Image::root(9, 0) }.write(&base);
        let mut expected = vec![0xbb; size];
        for block in [0, 1, 3] {
            expected[block * images::BLOCK as usize..][..images::BLOCK as usize].fill(block as u8 + 1);
        }
        let found = content(OpenOptions::new(), &path);
        if case.name == "a locator over a block" {
            // The payload stands in the block's data: they are one.
            assert!(found[images::BLOCK as usize * 2..] == expected[images::BLOCK as usize * 2..]);
        } else {
            assert!(found == expected, "{}", case.name);
        }
    }
}

/// Of two locators that name different files the one to be looked at first is W2ru.
#[test]
fn w2ru_counts_before_w2ku_and_both_before_the_name() {
    let place = Place::new();
    for (name, fill) in [("one.vhd", 0x11), ("two.vhd", 0x22), ("name.vhd", 0x33)] {
        Image::root(2, fill).write(&place.inside(name));
    }
    let two = place.inside("two.vhd");
    let child = Image::child(1, 2, "name.vhd")
        .locator(PlatformCode::W2ku, units(two.to_str().unwrap()))
        .locator(PlatformCode::W2ru, relative("one.vhd"));
    assert!(place.read(&child) == filled(&[1, 0x11, 0x11, 0x11]));
    fs::remove_file(place.inside("one.vhd")).unwrap();
    assert!(place.read(&child) == filled(&[1, 0x22, 0x22, 0x22]));
    fs::remove_file(&two).unwrap();
    assert!(place.read(&child) == filled(&[1, 0x33, 0x33, 0x33]));
}

/// A parent's table is believed block by block: an entry over its headers, its table or its end is damage when the block is read, and
/// hides nothing else.
#[test]
fn an_entry_of_a_parent_that_points_at_no_block_is_damage() {
    const TABLE: usize = 8192;
    let place = Place::new();
    let parent = Image::root(1, 7).bytes();
    let child = Image::child(2, 1, "parent.vhd");
    let path = place.inside("child.vhd");
    child.write(&path);
    let past = (parent.len() / 512 - 1) as u32;
    for entry in [0, 1, 2, (TABLE / 512 - 1) as u32, (TABLE / 512) as u32, past, 0xffff_fffe] {
        let mut damaged = parent.clone();
        damaged[TABLE + 2 * 4..][..4].copy_from_slice(&entry.to_be_bytes());
        fs::write(place.inside("parent.vhd"), &damaged).unwrap();
        let disk = OpenOptions::new().read_only(true).open(&path).unwrap();
        let mut found = vec![0xee; SIZE];
        let (start, end) = (2 * BLOCK, 3 * BLOCK);
        let error = disk.read_at(&mut found[start..end], start as u64).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{entry}: {error}");
        let text =
            format!("parent.vhd: block table entry 2 is sector {entry}: the block would be at offset ");
        assert!(error.to_string().contains(&text), "{error}");
        found[start..end].fill(7);
        for (start, end) in [(0, start), (end, SIZE)] {
            disk.read_at(&mut found[start..end], start as u64).unwrap();
        }
        assert!(found == filled(&[2, 7, 7, 7]), "{entry}");
    }
}

/// A parent name that fills its field has no end mark.
#[test]
fn a_parent_name_without_end_is_read_to_the_end_of_its_field() {
    let place = Place::new();
    let child = Image::child(1, 2, "x").bytes();
    let mut header = DynamicHeader::parse(&child[512..1536]).unwrap();
    header.parent_name.fill(u16::from(b'a'));
    let path = place.inside("child.vhd");
    let mut bytes = child;
    bytes[512..1536].copy_from_slice(&header.to_bytes());
    fs::write(&path, &bytes).unwrap();
    let error = OpenOptions::new().read_only(true).open(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ParentMissing);
    assert!(error.to_string().contains(&format!("parent name \"{}\"", "a".repeat(256))), "{error}");
    // Controls in it do not reach a terminal.
    header.parent_name.fill(0x1b);
    bytes[512..1536].copy_from_slice(&header.to_bytes());
    fs::write(&path, &bytes).unwrap();
    let error = OpenOptions::new().read_only(true).open(&path).unwrap_err();
    assert!(!error.to_string().contains('\u{1b}'), "{error:?}");
}

/// QEMU writes to differencing disks as if they were dynamic ones: where it added a block every bit is set, and the parent's data
/// is hidden. What the file says is what is read; a check says what it looks like.
#[test]
fn where_every_bit_is_set_nothing_of_the_parent_shows() {
    let place = Place::new();
    Image::root(2, 0xbb).write(&place.inside("base.vhd"));
    let child = Image { blocks: vec![Some(0); BLOCKS], ..Image::child(1, 2, "base.vhd") };
    assert!(place.read(&child) == filled(&[0; BLOCKS]));
    let report = cowvhd::check::check(Arc::new(cowvhd::vfs::HostVfs), &place.inside("child.vhd")).unwrap();
    assert_eq!(report.count(cowvhd::check::Code::BitmapsAllSet), 1, "{:?}", report.findings());
}
