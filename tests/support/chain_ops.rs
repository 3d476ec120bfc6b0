//! Operations on chains, cut by a crash at every step: what a power cut may leave is opened and judged.

use cowvhd::check::{Severity, check};
use cowvhd::sim::{Bounds, CrashPoint, CrashState, Rng, SimVfs};
use cowvhd::vfs::{Access, Vfs};
use cowvhd::{CreateOptions, Disk, OpenOptions};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

pub const BLOCK: u32 = 16 << 10;
pub const SIZE: u64 = 8 * BLOCK as u64 - 1024;

pub fn options(vfs: &SimVfs) -> OpenOptions {
    OpenOptions::new().vfs(Arc::new(vfs.clone()))
}

pub fn create(vfs: &SimVfs, path: &Path, parent: Option<&Path>) {
    let options = match parent {
        None => CreateOptions::new(SIZE),
        Some(parent) => CreateOptions::child_of(parent),
    };
    let options = options.test_geometry(BLOCK, 128 << 10).vfs(Arc::new(vfs.clone()));
    options.create(path).unwrap();
}

/// Random writes and zeroes, and what the disk holds afterwards.
pub fn change(disk: &Disk, content: &mut [u8], rng: &mut Rng, requests: u64) {
    for _ in 0..requests {
        let sectors = SIZE / 512;
        let first = rng.below(sectors);
        let count = (1 + rng.below(24)).min(sectors - first);
        let (start, end) = (first * 512, (first + count) * 512);
        let range = start as usize..end as usize;
        if rng.one_in(4) {
            content[range].fill(0);
            disk.discard(start, end - start).unwrap();
        } else {
            content[range.clone()].fill(1 + rng.below(255) as u8);
            disk.write_at(&content[range], start).unwrap();
        }
    }
}

/// Opens a disk for a moment and changes it.
pub fn change_closed(vfs: &SimVfs, path: &Path, content: &mut [u8], rng: &mut Rng, requests: u64) {
    let disk = options(vfs).open(path).unwrap();
    change(&disk, content, rng, requests);
    disk.close().unwrap();
}

/// Copies a file, as another program does that syncs it.
pub fn copy(vfs: &SimVfs, from: &Path, to: &Path) {
    let bytes = vfs.content(from).unwrap();
    let file = vfs.create_new(to).unwrap();
    assert_eq!(file.write_at(&bytes, 0).unwrap(), bytes.len());
    file.sync_data().unwrap();
    vfs.sync_dir(to.parent().unwrap()).unwrap();
}

/// What a disk holds, opened in this way.
pub fn read(options: &OpenOptions, path: &Path) -> Result<Vec<u8>, String> {
    let disk = options.open(path).map_err(|error| format!("opening {}: {error}", path.display()))?;
    let mut content = vec![0xee; disk.size() as usize];
    disk.read_at(&mut content, 0).map_err(|error| format!("reading {}: {error}", path.display()))?;
    // A disk that was open for writing is left as a kill leaves it.
    Ok(content)
}

pub fn must_hold(options: &OpenOptions, path: &Path, content: &[u8]) -> Result<(), String> {
    let found = read(options, path)?;
    match found.iter().zip(content).position(|(a, b)| a != b) {
        _ if found.len() != content.len() => Err(format!("{}: {} bytes", path.display(), found.len())),
        None => Ok(()),
        Some(at) => Err(format!("{}: byte {at} is {}, not {}", path.display(), found[at], content[at])),
    }
}

/// Whether the checker finds nothing worse than a note.
pub fn must_be_sound(vfs: &SimVfs, path: &Path) -> Result<(), String> {
    let report = check(Arc::new(vfs.clone()), path).map_err(|error| error.to_string())?;
    match report.findings().iter().find(|finding| finding.severity() > Severity::Note) {
        Some(finding) => Err(format!("{}: {finding:?}", path.display())),
        None => Ok(()),
    }
}

/// The cookie of its dynamic header says that it is complete.
#[allow(dead_code, reason = "not every test looks")]
pub fn looks_clean(vfs: &SimVfs, path: &Path) -> bool {
    let mut cookie = [0; 8];
    let file = vfs.open(path, Access::ReadOnly).unwrap();
    file.read_at(&mut cookie, 512).is_ok() && cookie == *b"cxsparse"
}

/// Judges one state, left by a crash at a time; returns the crash points of what recovered it.
pub type Judge<'a> = dyn Fn(&CrashState, u64) -> Result<Vec<CrashPoint>, String> + 'a;

/// Judges the states that crash points leave, each of them once; and of some the states that their recovery leaves when it is
/// cut.
pub fn explore(points: &[CrashPoint], bounds: &Bounds, judge: &Judge<'_>) -> Result<u64, String> {
    let mut seen = HashSet::new();
    for (number, point) in points.iter().enumerate() {
        let mut result = Ok(());
        point.for_each_state(number as u64, bounds, |state| {
            if !seen.insert((state.hash, point.clock())) {
                return true;
            }
            result = (|| {
                let recovery = judge(&state, point.clock())?;
                let mut rng = Rng::new(state.hash);
                if recovery.is_empty() || !rng.one_in(4) {
                    return Ok(());
                }
                let again = &recovery[rng.below(recovery.len() as u64) as usize];
                let mut inner = Ok(());
                again.for_each_state(rng.next_u64(), &Bounds::sample(6), |state| {
                    seen.insert((state.hash, point.clock()));
                    inner = judge(&state, point.clock())
                        .map(drop)
                        .map_err(|what| format!("recovery cut, {}: {what}", state.fates()));
                    inner.is_ok()
                });
                inner
            })()
            .map_err(|what| format!("crash point {number}, {}: {what}", state.fates()));
            result.is_ok()
        });
        result?;
    }
    Ok(seen.len() as u64)
}

/// A parent has moved; the child is told where it is, and a crash comes in between.
pub fn relinked(seed: u64, bounds: &Bounds) -> Result<u64, String> {
    let mut rng = Rng::new(seed);
    let vfs = SimVfs::new(seed);
    let (disk, old) = (Path::new("/vm.vhd"), Path::new("/old/root.vhd"));
    let new = Path::new(["/new/root.vhd", "/new/a longer name.vhd", "/r.vhd"][rng.below(3) as usize]);
    let mut content = vec![0; SIZE as usize];
    create(&vfs, old, None);
    change_closed(&vfs, old, &mut content, &mut rng, 6);
    create(&vfs, disk, Some(old));
    change_closed(&vfs, disk, &mut content, &mut rng, 6);
    if rng.one_in(2) {
        // Not closed: with a journal that is recovered first.
        let open = options(&vfs).open(disk).unwrap();
        change(&open, &mut content, &mut rng, 4);
        open.flush().unwrap();
    }
    copy(&vfs, old, new);
    vfs.record(true);
    cowvhd::snapshot::relink(&options(&vfs), disk, new).map_err(|error| error.to_string())?;
    let returned = vfs.tick();
    let mut points = vfs.take_crash_points();
    points.push(vfs.crash_now());
    explore(&points, bounds, &|state, clock| {
        let opens_with = |gone: &Path| {
            let vfs = state.to_vfs(state.hash);
            // In a recovery that was cut it may be gone already.
            let _ = vfs.remove(gone);
            let options = options(&vfs);
            must_hold(&options.clone().read_only(true), disk, &content)?;
            vfs.record(true);
            must_hold(&options, disk, &content)?;
            let points = vfs.take_crash_points();
            options.open(disk).and_then(|disk| disk.close()).map_err(|error| error.to_string())?;
            must_be_sound(&vfs, disk)?;
            Ok(points)
        };
        match opens_with(old) {
            Ok(points) => Ok(points),
            Err(why) if clock >= returned => Err(format!("not relinked: {why}")),
            Err(with_new) => {
                opens_with(new).map_err(|with_old: String| format!("new: {with_new}; old: {with_old}"))
            }
        }
    })
}
