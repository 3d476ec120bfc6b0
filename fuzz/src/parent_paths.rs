//! Target `parent_paths`: whatever a child says of its parent, no file outside its folder is opened.
//!
//! An input is the parent's name in the header and up to three locators with their payloads; the header's checksum is made
//! right. Files with the right unique id lie in the child's folder, below it, and beside it; only the first two may be found. A
//! parent that is found shows its own content, so that the test knows which it was.

use crate::Seed;
use crate::input::Input;
use cowvhd::sim::{Bounds, SimVfs};
use cowvhd::vfs::{Access, File, FileIdentity, FileTime, Vfs};
use cowvhd::vhd::{DynamicHeader, HeaderCookie, ParentLocator, PlatformCode, locator};
use cowvhd::{CreateOptions, OpenOptions};
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Component, Path};
use std::sync::{Arc, OnceLock};

const FOLDER: &str = "/vm";
const CHILD: &str = "/vm/child.vhd";
/// The parent's copies: those in the folder, and one that is somebody else's.
const PARENTS: [&str; 2] = ["/vm/parent.vhd", "/vm/base/parent.vhd"];
const SECRET: &str = "/secret/parent.vhd";
const CODES: [PlatformCode; 3] = [PlatformCode::W2ru, PlatformCode::W2ku, PlatformCode::MacX];

/// A file system that sees what is opened.
#[derive(Debug)]
struct Watched(SimVfs);

impl Vfs for Watched {
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        assert!(path == Path::new(CHILD), "{} is opened", path.display());
        self.0.open(path, access)
    }
    fn open_beneath(&self, folder: &Path, path: &Path) -> io::Result<Arc<dyn File>> {
        assert!(folder == Path::new(FOLDER), "{} is searched", folder.display());
        let plain = path.components().all(|component| matches!(component, Component::Normal(_)));
        assert!(plain, "{} is opened in it", path.display());
        self.0.open_beneath(folder, path)
    }
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.0.create_new(path)
    }
    fn identity(&self, path: &Path) -> io::Result<FileIdentity> {
        self.0.identity(path)
    }
    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.link(from, to)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        self.0.exchange(one, other)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.remove(path)
    }
    fn files(&self, directory: &Path, prefix: &OsStr) -> io::Result<Vec<OsString>> {
        self.0.files(directory, prefix)
    }
    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        self.0.sync_dir(directory)
    }
    fn random_id(&self) -> io::Result<[u8; 16]> {
        self.0.random_id()
    }
    fn now(&self) -> FileTime {
        self.0.now()
    }
}

/// A child and its parent in all places.
fn files() -> Option<SimVfs> {
    static STATE: OnceLock<Option<cowvhd::sim::CrashState>> = OnceLock::new();
    let state = STATE.get_or_init(|| {
        let vfs = SimVfs::new(21);
        let shared = || Arc::new(vfs.clone());
        CreateOptions::new(1 << 20)
            .test_geometry(16 << 10, 128 << 10)
            .vfs(shared())
            .create(Path::new(SECRET))
            .ok()?;
        let parent = OpenOptions::new().vfs(shared()).open(Path::new(SECRET)).ok()?;
        parent.write_at(&[0x5e; 4096], 0).ok()?;
        parent.close().ok()?;
        drop(parent);
        CreateOptions::child_of(Path::new(SECRET))
            .allow_parents_in(Path::new("/secret"))
            .vfs(shared())
            .create(Path::new(CHILD))
            .ok()?;
        for copy in PARENTS {
            copy_file(&vfs, copy)?;
        }
        let mut state = None;
        vfs.crash_now().for_each_state(1, &Bounds::sample(1), |found| {
            state = Some(found);
            true
        });
        state
    });
    Some(state.as_ref()?.to_vfs(1))
}

/// The parent in another place, with other content in the same sectors.
fn copy_file(vfs: &SimVfs, to: &str) -> Option<()> {
    let mut bytes = vfs.content(Path::new(SECRET))?;
    let data = bytes.chunks_mut(4096).find(|page| page.iter().all(|&byte| byte == 0x5e))?;
    data.fill(0x11);
    let file = vfs.create_new(Path::new(to)).ok()?;
    file.write_at(&bytes, 0).ok()?;
    file.sync_data().ok()
}

/// The body of the target.
pub fn run(data: &[u8]) {
    look(data);
}

/// Whether the child has found a parent.
fn look(data: &[u8]) -> bool {
    let Some(vfs) = files() else { unreachable!("the files can be made") };
    let mut input = Input(data);
    let Ok(file) = vfs.open(Path::new(CHILD), Access::ReadOnly) else { return false };
    let mut bytes = vec![0; DynamicHeader::SIZE];
    if file.read_at(&mut bytes, 512).is_err() {
        return false;
    }
    let Ok(mut header) = DynamicHeader::parse(&bytes) else { return false };
    header.cookie = HeaderCookie::Normal;
    header.parent_name.fill(0);
    let name = usize::from(input.u8());
    for (unit, pair) in header.parent_name.iter_mut().zip(input.bytes(name).chunks(2)) {
        *unit = pair.iter().fold(0, |unit, &byte| unit << 8 | u16::from(byte));
    }
    for (index, slot) in header.locators.iter_mut().enumerate() {
        *slot = ParentLocator::default();
        if index >= 3 || input.is_empty() {
            continue;
        }
        let code = CODES[usize::from(input.u8()) % 3];
        let length = usize::from(input.u16() % 4096);
        let payload = input.bytes(length);
        let place = 16384 + 4096 * index as u64;
        vfs.corrupt(Path::new(CHILD), place, payload);
        *slot = ParentLocator::new(code, place, 4096, payload.len() as u32);
    }
    vfs.corrupt(Path::new(CHILD), 512, &header.to_bytes());

    let options = OpenOptions::new().vfs(Arc::new(Watched(vfs.clone())));
    let mut found = false;
    for read_only in [true, false] {
        let Ok(disk) = options.clone().read_only(read_only).open(Path::new(CHILD)) else { continue };
        let mut buf = [0xee; 4096];
        if disk.read_at(&mut buf, 0).is_ok() {
            assert!(buf == [0x11; 4096], "it shows {:02x?}", &buf[..8]);
            found = true;
        }
        let _ = disk.close();
    }
    found
}

/// Inputs to start from: every notation, inside the folder and out of it.
pub fn seeds() -> Vec<Seed> {
    let wide = |path: &str| path.encode_utf16().flat_map(u16::to_be_bytes).collect::<Vec<u8>>();
    let input = |name: &str, locators: &[(u8, Vec<u8>)]| {
        let name = wide(name);
        let mut bytes = vec![name.len() as u8];
        bytes.extend(name);
        for (code, payload) in locators {
            bytes.push(*code);
            bytes.extend((payload.len() as u16).to_be_bytes());
            bytes.extend(payload);
        }
        bytes
    };
    let relative =
        |path: &str| locator::encode_relative(PlatformCode::W2ru, path.as_bytes()).unwrap_or_default();
    let units = |path: &str| locator::encode_units(&path.encode_utf16().collect::<Vec<_>>());
    let mac = |url: &str| url.as_bytes().to_vec();
    vec![
        ("name", input("parent.vhd", &[])),
        ("name-with-folder", input(r"..\secret\parent.vhd", &[])),
        ("inside", input("", &[(0, relative("base/parent.vhd"))])),
        (
            "upwards",
            input("", &[(0, units(r"..\secret\parent.vhd")), (0, units(r".\..\vm\base\parent.vhd"))]),
        ),
        ("absolute", input("", &[(2, mac("file:///secret/parent.vhd")), (2, mac("file:///vm/parent.vhd"))])),
        ("escaped", input("", &[(2, mac("file://localhost/vm/%2e%2e/secret/parent.vhd"))])),
        (
            "windows",
            input("", &[(1, units(r"C:\secret\parent.vhd")), (1, units(r"\\host\secret\parent.vhd"))]),
        ),
        ("itself", input("child.vhd", &[(0, relative("child.vhd"))])),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_in_the_folder_are_found_and_others_are_not() {
        for (name, seed) in seeds() {
            let inside = ["name", "name-with-folder", "inside", "upwards", "absolute"].contains(&name);
            assert_eq!(look(&seed), inside, "{name}");
        }
    }
}
