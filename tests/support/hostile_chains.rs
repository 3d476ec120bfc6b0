//! Chains that are broken, or made to do harm, built by code: each with what a check must find and what a repair can do.
//!
//! docs/check.md has them as a table.

use cowvhd::check::Code;
use cowvhd::vhd::{DiskType, DynamicHeader, Footer, ParentLocator, PlatformCode, Timestamp, UniqueId};
use cowvhd::{CreateOptions, OpenOptions};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

const SIZE: u64 = 1 << 20;
const BLOCK: u32 = 64 << 10;
const TABLE: u64 = 1536;
const LOCATORS: u64 = 4096;
const FIRST_BLOCK: u64 = 16384;

/// What a repair can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is wrong.
    Sound,
    /// `repair --relink` mends it.
    Relinked,
    /// Nothing here mends it: no file is touched.
    Refused,
}
use Outcome::{Refused, Relinked, Sound};

/// One chain.
pub struct Case {
    /// What is wrong with it, as in docs/check.md.
    pub name: &'static str,
    /// Makes it in a folder: the disk is `disks/disk.vhd`; `outside` beside that folder is none where parents may lie.
    pub build: Box<dyn Fn(&Path)>,
    /// What a check finds, among other things perhaps.
    pub code: Code,
    /// In which layer: 0 is the disk.
    pub layer: usize,
    pub outcome: Outcome,
}

/// An image as other programs make them, with one block.
struct Image {
    id: u8,
    parent: Option<(u8, Vec<(PlatformCode, String)>)>,
    size: u64,
    stamp: u32,
}

impl Image {
    fn root(id: u8) -> Self {
        Image { id, parent: None, size: SIZE, stamp: 0 }
    }

    /// A child whose only locator is a relative path.
    fn over(id: u8, parent: u8, path: &str) -> Self {
        Self::with_locators(id, parent, &[(PlatformCode::W2ru, path)])
    }

    fn with_locators(id: u8, parent: u8, locators: &[(PlatformCode, &str)]) -> Self {
        let locators = locators.iter().map(|&(platform, path)| (platform, path.to_string())).collect();
        Image { parent: Some((parent, locators)), ..Self::root(id) }
    }

    fn write(&self, path: &Path) {
        self.write_as([self.id; 16], [self.parent.as_ref().map_or(0, |parent| parent.0); 16], path);
    }

    fn write_as(&self, id: [u8; 16], parent: [u8; 16], path: &Path) {
        let disk_type = if self.parent.is_some() { DiskType::Differencing } else { DiskType::Dynamic };
        let footer = Footer::new(disk_type, self.size, UniqueId::from_bytes(id), Timestamp(700_000_000));
        let mut header = DynamicHeader::new(TABLE, (self.size / u64::from(BLOCK)) as u32, BLOCK);
        let file = File::create(path).unwrap();
        if let Some((_, locators)) = &self.parent {
            header.parent_unique_id = UniqueId::from_bytes(parent);
            header.parent_timestamp = Timestamp(self.stamp);
            for (index, (platform, path)) in locators.iter().enumerate() {
                let payload: Vec<u8> = match *platform {
                    PlatformCode::MacX => path.clone().into_bytes(),
                    _ => path.encode_utf16().flat_map(u16::to_le_bytes).collect(),
                };
                let at = LOCATORS + index as u64 * 512;
                header.locators[index] = ParentLocator::new(*platform, at, 512, payload.len() as u32);
                file.write_all_at(&payload, at).unwrap();
            }
        }
        let mut table = vec![0xff; 512];
        table[..4].copy_from_slice(&((FIRST_BLOCK / 512) as u32).to_be_bytes());
        file.write_all_at(&footer.to_bytes(), 0).unwrap();
        file.write_all_at(&header.to_bytes(), 512).unwrap();
        file.write_all_at(&table, TABLE).unwrap();
        // Only its first half was written.
        file.write_all_at(&[0xff; 8], FIRST_BLOCK).unwrap();
        file.write_all_at(&[self.id; 4096], FIRST_BLOCK + 512).unwrap();
        file.write_all_at(&footer.to_bytes(), FIRST_BLOCK + 512 + u64::from(BLOCK)).unwrap();
    }
}

/// So many layers, of which the last lacks its parent; the disk is `disk.vhd`.
pub fn layers(folder: &Path, count: u32) {
    layers_of(folder, count, BLOCK.into());
}

/// The same of disks of 64 blocks, each of which is said to be far behind the end of its file.
pub fn damaged_layers(folder: &Path, count: u32) {
    for path in layers_of(folder, count, 64 * u64::from(BLOCK)) {
        File::options().write(true).open(path).unwrap().write_all_at(&[0x7f; 4 * 64], TABLE).unwrap();
    }
}

/// The layers, the disk first.
fn layers_of(folder: &Path, count: u32, size: u64) -> Vec<PathBuf> {
    let id = |depth: u32| {
        let mut id = [1; 16];
        id[..4].copy_from_slice(&depth.to_be_bytes());
        id
    };
    let write = |depth| {
        let path = folder.join(if depth == 0 { "disk.vhd".into() } else { format!("{depth}.vhd") });
        let image = Image { size, ..Image::over(1, 1, &format!("{}.vhd", depth + 1)) };
        image.write_as(id(depth), id(depth + 1), &path);
        path
    };
    (0..count).map(write).collect()
}

/// `disk.vhd` of another program over `base.vhd` of any, which it saw change at `stamp`.
pub fn child_made_elsewhere(folder: &Path, stamp: Timestamp) {
    let base = fs::read(folder.join("base.vhd")).unwrap();
    let parent = Footer::parse(&base[base.len() - Footer::SIZE..]).unwrap();
    let child = Image { size: parent.current_size, stamp: stamp.0, ..Image::over(9, 1, r".\base.vhd") };
    child.write_as([9; 16], *parent.unique_id.as_bytes(), &folder.join("disk.vhd"));
}

/// A disk of cowvhd over another.
fn ours(folder: &Path) {
    CreateOptions::new(8 << 20).create(&folder.join("base.vhd")).unwrap();
    fs::copy(folder.join("base.vhd"), folder.join("../before")).unwrap();
    CreateOptions::child_of(&folder.join("base.vhd")).create(&folder.join("disk.vhd")).unwrap();
    let disk = OpenOptions::new().open(&folder.join("disk.vhd")).unwrap();
    disk.write_at(&[7; 4096], 4096).unwrap();
    disk.close().unwrap();
}

/// Where the table of an image of cowvhd starts.
const OUR_TABLE: u64 = 3 << 20;

/// Another program, which is not stopped by modes, puts a block where the footer is.
pub fn add_block(path: &Path) {
    make_writable(path);
    let file = File::options().read(true).write(true).open(path).unwrap();
    let end = file.metadata().unwrap().len() - 512;
    let mut footer = [0; 512];
    file.read_exact_at(&mut footer, end).unwrap();
    file.write_all_at(&[0xff; 512], end).unwrap();
    file.write_all_at(&footer, end + 512 + (2 << 20)).unwrap();
    file.write_all_at(&((end / 512) as u32).to_be_bytes(), OUR_TABLE).unwrap();
}

fn make_writable(path: &Path) {
    let mut permissions = fs::metadata(path).unwrap().permissions();
    #[allow(clippy::permissions_set_readonly_false, reason = "a file of this test alone")]
    permissions.set_readonly(false);
    fs::set_permissions(path, permissions).unwrap();
}

/// The parent gives way to what it was before it was sealed, written to since.
fn written_copy(folder: &Path, closed: bool) {
    let path = folder.join("base.vhd");
    fs::remove_file(&path).unwrap();
    fs::copy(folder.join("../before"), &path).unwrap();
    let parent = OpenOptions::new().open(&path).unwrap();
    parent.write_at(&[3; 512], 0).unwrap();
    match closed {
        true => parent.close().unwrap(),
        false => parent.flush().unwrap(),
    }
}

fn case(
    name: &'static str,
    code: Code,
    layer: usize,
    outcome: Outcome,
    build: impl Fn(&Path) + 'static,
) -> Case {
    let build = Box::new(move |dir: &Path| {
        fs::create_dir_all(dir.join("outside")).unwrap();
        fs::create_dir_all(dir.join("disks/below")).unwrap();
        build(&dir.join("disks"));
    });
    Case { name, build, code, layer, outcome }
}

/// A disk whose parent is said to be somewhere by one locator, and a right parent outside the folder.
fn claims(platform: PlatformCode, path: &'static str) -> impl Fn(&Path) {
    move |folder: &Path| {
        Image::root(1).write(&folder.join("../outside/base.vhd"));
        Image::with_locators(9, 1, &[(platform, path)]).write(&folder.join("disk.vhd"));
    }
}

/// All chains.
pub fn cases() -> Vec<Case> {
    let over = |parent: &'static str| Image::over(9, 1, parent);
    let mut cases = vec![
        case("a disk that is its own parent", Code::ParentLoop, 0, Refused, |folder| {
            Image::over(9, 9, r".\disk.vhd").write(&folder.join("disk.vhd"));
        }),
        case("a cycle of three", Code::ParentLoop, 2, Refused, |folder| {
            Image::over(9, 1, r".\a.vhd").write(&folder.join("disk.vhd"));
            Image::over(1, 2, r".\b.vhd").write(&folder.join("a.vhd"));
            Image::over(2, 9, r".\disk.vhd").write(&folder.join("b.vhd"));
        }),
        case("a chain of 10,000", Code::ChainTooDeep, 4095, Refused, |folder| {
            layers(folder, 10_000);
        }),
        case("a parent that is missing", Code::ParentMissing, 0, Refused, move |folder| {
            over(r".\base.vhd").write(&folder.join("disk.vhd"));
        }),
        case("another disk in the parent's place", Code::ParentMissing, 0, Refused, move |folder| {
            Image::root(2).write(&folder.join("base.vhd"));
            over(r".\base.vhd").write(&folder.join("disk.vhd"));
        }),
        case("a parent that has moved", Code::ParentMoved, 0, Relinked, |folder| {
            ours(folder);
            fs::rename(folder.join("base.vhd"), folder.join("below/moved.x")).unwrap();
        }),
        case("a parent that has moved, and a copy of it", Code::ParentMoved, 0, Refused, |folder| {
            ours(folder);
            fs::copy(folder.join("base.vhd"), folder.join("below/copy.vhd")).unwrap();
            fs::rename(folder.join("base.vhd"), folder.join("below/moved.vhd")).unwrap();
        }),
        case(
            "a parent that has moved out of the allowed folders",
            Code::ParentMissing,
            0,
            Refused,
            |folder| {
                ours(folder);
                fs::rename(folder.join("base.vhd"), folder.join("../outside/base.vhd")).unwrap();
            },
        ),
        case("a parent with another time of change", Code::ParentTime, 0, Sound, move |folder| {
            Image::root(1).write(&folder.join("base.vhd"));
            Image { stamp: 700_000_001, ..over(r".\base.vhd") }.write(&folder.join("disk.vhd"));
        }),
        case("a smaller parent", Code::ParentSize, 0, Sound, move |folder| {
            Image { size: SIZE / 2, ..Image::root(1) }.write(&folder.join("base.vhd"));
            over(r".\base.vhd").write(&folder.join("disk.vhd"));
        }),
        case("a larger parent", Code::ParentSize, 0, Sound, move |folder| {
            Image { size: SIZE * 2, ..Image::root(1) }.write(&folder.join("base.vhd"));
            over(r".\base.vhd").write(&folder.join("disk.vhd"));
        }),
        case("a parent to which another program added a block", Code::ParentChanged, 0, Refused, |folder| {
            ours(folder);
            add_block(&folder.join("base.vhd"));
        }),
        case("a parent that was written to and has no seal", Code::ParentChanged, 0, Refused, |folder| {
            ours(folder);
            written_copy(folder, true);
        }),
        case("a parent that was not closed", Code::ParentNotClosed, 1, Refused, |folder| {
            ours(folder);
            written_copy(folder, false);
        }),
        case("a parent with a damaged table", Code::BatRange, 1, Refused, move |folder| {
            Image::root(1).write(&folder.join("base.vhd"));
            let parent = File::options().write(true).open(folder.join("base.vhd")).unwrap();
            parent.write_all_at(&[0x7f; 4], TABLE + 4).unwrap();
            over(r".\base.vhd").write(&folder.join("disk.vhd"));
        }),
        case("a parent whose footers and header are lost", Code::HeadersLost, 1, Refused, move |folder| {
            fs::write(folder.join("base.vhd"), vec![0x33; 100_000]).unwrap();
            over(r".\base.vhd").write(&folder.join("disk.vhd"));
        }),
        case("a chain of which all bits are set", Code::BitmapsAllSet, 0, Sound, move |folder| {
            Image::root(1).write(&folder.join("base.vhd"));
            over(r".\base.vhd").write(&folder.join("disk.vhd"));
            let disk = File::options().write(true).open(folder.join("disk.vhd")).unwrap();
            disk.write_all_at(&[0xff; 16], FIRST_BLOCK).unwrap();
        }),
        case("a parent that is a FIFO", Code::ParentMissing, 0, Refused, move |folder| {
            assert!(Command::new("mkfifo").arg(folder.join("base.vhd")).status().unwrap().success());
            over(r".\base.vhd").write(&folder.join("disk.vhd"));
        }),
        case("a parent that is a folder", Code::ParentMissing, 0, Refused, move |folder| {
            over(r".\below").write(&folder.join("disk.vhd"));
        }),
        case("a link that leads out", Code::ParentMissing, 0, Refused, move |folder| {
            Image::root(1).write(&folder.join("../outside/base.vhd"));
            symlink("../outside/base.vhd", folder.join("base.vhd")).unwrap();
            over(r".\base.vhd").write(&folder.join("disk.vhd"));
        }),
    ];
    for (name, platform, path) in [
        ("a parent by `..`", PlatformCode::W2ru, r"..\outside\base.vhd"),
        ("a device as parent", PlatformCode::W2ku, "/dev/zero"),
        ("/etc/shadow as parent", PlatformCode::MacX, "file:///etc/shadow"),
        ("an absolute path", PlatformCode::W2ku, r"\outside\base.vhd"),
        ("a drive of Windows", PlatformCode::W2ku, r"C:\outside\base.vhd"),
        ("a UNC path", PlatformCode::W2ku, r"\\host\outside\base.vhd"),
        ("a URL", PlatformCode::MacX, "http://host/base.vhd"),
    ] {
        cases.push(case(name, Code::ParentMissing, 0, Refused, claims(platform, path)));
    }
    cases
}
