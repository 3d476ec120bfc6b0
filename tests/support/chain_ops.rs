//! Operations on chains, cut by a crash at every step: what a power cut may leave is opened and judged.

use super::failing::left_by_any;
use cowvhd::check::{Code, Finding, Severity, check};
use cowvhd::convert::Progress;
use cowvhd::sim::{Bounds, CrashPoint, CrashState, FileSystem, History, Rng, SimVfs, Underway};
use cowvhd::snapshot::SnapshotName;
use cowvhd::vfs::{Access, Vfs};
use cowvhd::vhd::{DiskType, Footer};
use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions};
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

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
    must_be_no_worse(vfs, path, Severity::Note)
}

fn must_be_no_worse(vfs: &SimVfs, path: &Path, allowed: Severity) -> Result<(), String> {
    let report = check(Arc::new(vfs.clone()), path).map_err(|error| error.to_string())?;
    // A sync that failed is remembered.
    let bad = |finding: &&Finding| finding.severity() > allowed && finding.code != Code::SyncFailed;
    match report.findings().iter().find(bad) {
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

/// Judges the states that crash points leave, each of them once; and of some those that their recovery leaves when it is cut, or when
/// `again`, which goes on where the crash came, fails at one of its operations and is cut then.
pub fn explore(
    points: &[CrashPoint],
    bounds: &Bounds,
    again: &dyn Fn(&SimVfs),
    judge: &Judge<'_>,
) -> Result<u64, String> {
    let mut seen = HashSet::new();
    for (number, point) in points.iter().enumerate() {
        let mut result = Ok(());
        point.for_each_state(number as u64, bounds, |state| {
            if !seen.insert((state.hash, point.clock())) {
                return true;
            }
            let mut rng = Rng::new(state.hash);
            let mut judge_all = |next: &CrashPoint, seed: u64, what: &str| {
                let mut result = Ok(());
                next.for_each_state(seed, &Bounds::sample(6), |state| {
                    seen.insert((state.hash, point.clock()));
                    result = judge(&state, point.clock())
                        .map(drop)
                        .map_err(|error| format!("{what}, {}: {error}", state.fates()));
                    result.is_ok()
                });
                result
            };
            result = judge(&state, point.clock())
                .and_then(|recovery| match recovery.is_empty() || !rng.one_in(4) {
                    true => Ok(()),
                    false => {
                        let cut = &recovery[rng.below(recovery.len() as u64) as usize];
                        judge_all(cut, rng.next_u64(), "recovery cut")
                    }
                })
                .and_then(|()| match rng.one_in(4).then(|| left_by_any(&state, again, &mut rng)).flatten() {
                    Some((failing, left)) => judge_all(&left, rng.next_u64(), &format!("error {failing}")),
                    None => Ok(()),
                })
                .map_err(|what| format!("crash point {number}, {}: {what}", state.fates()));
            result.is_ok()
        });
        result?;
    }
    Ok(seen.len() as u64)
}

/// Makes a closed image shorter, as another program does.
pub fn shrink(vfs: &SimVfs, path: &Path, size: u64) {
    let bytes = vfs.content(path).unwrap();
    let end = bytes.len() - Footer::SIZE;
    for at in [0, end] {
        let mut footer = Footer::parse(&bytes[at..at + Footer::SIZE]).unwrap();
        footer.current_size = size;
        vfs.foreign_write(path, at as u64, &footer.to_bytes());
    }
}

/// A chain from the root up, with what its top shows: layers `/vm@N.vhd` and `/vm.vhd` on top. Some layers are shorter than those
/// beneath them, so that they hide those with zeros; the root may be a fixed disk; the top may have been left without closing it. With
/// an odd seed files cannot share space.
pub struct Chain {
    pub vfs: SimVfs,
    pub layers: Vec<PathBuf>,
    pub content: Vec<u8>,
}

/// Whether the root of this random chain is a fixed disk.
pub fn has_fixed_root(seed: u64) -> bool {
    seed % 5 == 3
}

impl Chain {
    pub fn random(seed: u64, most: u64) -> Self {
        let mut rng = Rng::new(seed);
        let vfs = SimVfs::new(seed);
        vfs.set_kind(FileSystem { no_clones: seed % 2 == 1, ..FileSystem::default() });
        let depth = 2 + rng.below(most - 1) as usize;
        let mut layers: Vec<PathBuf> = Vec::new();
        let mut content = vec![0; SIZE as usize];
        for number in 0..depth {
            let top = number + 1 == depth;
            let path = PathBuf::from(if top { "/vm.vhd".into() } else { format!("/vm@{number}.vhd") });
            match number == 0 && has_fixed_root(seed) {
                true => CreateOptions::new(SIZE).fixed().vfs(Arc::new(vfs.clone())).create(&path).unwrap(),
                false => create(&vfs, &path, layers.last().map(PathBuf::as_path)),
            }
            let requests = rng.below(6);
            change_closed(&vfs, &path, &mut content, &mut rng, requests);
            layers.push(path);
        }
        for layer in layers.iter().take(depth - 1).skip(1) {
            if rng.one_in(4) {
                shrink(&vfs, layer, (1 + rng.below(SIZE / 512 - 1)) * 512);
            }
        }
        let disk = Path::new("/vm.vhd");
        if rng.one_in(2) {
            let open = options(&vfs).open(disk).unwrap();
            change(&open, &mut content, &mut rng, 3);
            open.flush().unwrap();
        }
        let content = read(&options(&vfs).read_only(true), disk).unwrap();
        Chain { vfs, layers, content }
    }

    pub fn disk(&self) -> &Path {
        Path::new("/vm.vhd")
    }

    /// The layers beneath the disk: nothing may change them.
    pub fn parents(&self) -> Vec<(PathBuf, Option<u64>)> {
        let below = &self.layers[..self.layers.len() - 1];
        below.iter().map(|path| (path.clone(), sealed_hash(&self.vfs, path))).collect()
    }
}

/// A hash of all of a sealed image but its registry of children and the dead journal, whose holes need not be durable.
fn sealed_hash(vfs: &SimVfs, path: &Path) -> Option<u64> {
    vfs.content_hash_without(path, 65536..262_144 + (128 << 10))
}

/// Judges a state in the middle of an operation that keeps what the disk shows and changes no parent.
fn keeps_the_view(
    state: &CrashState,
    disk: &Path,
    content: &[u8],
    parents: &[(PathBuf, Option<u64>)],
) -> Result<Vec<CrashPoint>, String> {
    let vfs = state.to_vfs(state.hash);
    let options = options(&vfs);
    must_hold(&options.clone().read_only(true), disk, content)?;
    vfs.record(true);
    must_hold(&options, disk, content)?;
    let points = vfs.take_crash_points();
    vfs.record(false);
    options.open(disk).and_then(|disk| disk.close()).map_err(|error| error.to_string())?;
    must_be_sound(&vfs, disk)?;
    match parents.iter().find(|(path, hash)| sealed_hash(&vfs, path) != *hash) {
        Some((path, _)) => Err(format!("{} was changed", path.display())),
        None => Ok(points),
    }
}

/// Layers are merged into the disk over them, cut at every step, and the merge is done again.
pub fn merged(seed: u64, bounds: &Bounds) -> Result<u64, String> {
    let chain = Chain::random(seed, 5);
    let mut rng = Rng::new(seed ^ 0x5eed);
    let below = chain.layers.len() - 1;
    // How many layers stay; the next one up is the last that goes.
    let stay = rng.below(below as u64) as usize;
    let until = stay.checked_sub(1).map(|layer| chain.layers[layer].clone());
    let (disk, content, parents) = (chain.disk(), &chain.content, chain.parents());
    let go_on = &mut |_| ControlFlow::Continue(());
    chain.vfs.record(true);
    let merge = |vfs: &SimVfs, progress: &mut dyn FnMut(Progress) -> ControlFlow<()>| {
        cowvhd::snapshot::merge(&options(vfs), disk, until.as_deref(), progress)
    };
    let done = merge(&chain.vfs, go_on).map_err(|error| error.to_string())?;
    let gone: Vec<PathBuf> = chain.layers[stay..below].iter().rev().cloned().collect();
    if done.layers != gone {
        return Err(format!("{:?} were merged, not {gone:?}", done.layers));
    }
    let returned = chain.vfs.tick();
    let mut points = chain.vfs.take_crash_points();
    points.push(chain.vfs.crash_now());
    let again = |vfs: &SimVfs| drop(merge(vfs, &mut |_| ControlFlow::Continue(())));
    explore(&points, bounds, &again, &|state, clock| {
        let points = keeps_the_view(state, disk, content, &parents)?;
        let vfs = state.to_vfs(state.hash);
        if clock < returned {
            // Done again, it comes to its end, unless it had.
            match merge(&vfs, &mut |_| ControlFlow::Continue(())) {
                Ok(_) => {}
                Err(error) if [ErrorKind::NotFound, ErrorKind::InvalidInput].contains(&error.kind()) => {}
                Err(error) => return Err(format!("merging again: {error}")),
            }
        }
        gone.iter().for_each(|layer| vfs.remove(layer).unwrap());
        must_hold(&options(&vfs), disk, content)
            .map_err(|error| format!("without what was merged: {error}"))?;
        Ok(points)
    })
}

/// A guest of a running disk, whose requests come in the middle of other work.
struct Guest {
    vfs: SimVfs,
    disk: Disk,
    history: Mutex<History>,
    rng: Mutex<Rng>,
}

impl Guest {
    fn change(&self) {
        let rng = &mut *self.rng.lock().unwrap();
        let sectors = SIZE / 512;
        let per_block = u64::from(BLOCK) / 512;
        let (first, count) = match rng.below(3) {
            // A whole block, which may be given back.
            0 => (rng.below(sectors / per_block) * per_block, per_block),
            _ => (rng.below(sectors), 1 + rng.below(24)),
        };
        let count = count.min(sectors - first);
        let (zero, offset) = (rng.one_in(2), first * 512);
        let mut history = self.history.lock().unwrap();
        let value = if zero { 0 } else { history.new_value() };
        let submitted = history.submit(self.vfs.tick(), first, count, value);
        if zero {
            self.disk.discard(offset, count * 512).unwrap();
        } else {
            let mut buf = vec![0; (count * 512) as usize];
            History::fill(value, &mut buf);
            self.disk.write_at(&buf, offset).unwrap();
        }
        history.completed(submitted, self.vfs.tick(), first, count);
    }

    fn flush(&self) {
        let called = self.vfs.tick();
        self.disk.flush().unwrap();
        self.history.lock().unwrap().flushed(called, self.vfs.tick());
    }

    fn check(&self) -> Result<(), String> {
        let mut content = vec![0xee; SIZE as usize];
        self.disk.read_at(&mut content, 0).map_err(|error| error.to_string())?;
        self.history.lock().unwrap().check_current(0, &content).map_err(|error| format!("running: {error}"))
    }
}

/// Opens the disk of a chain for a guest, whose requests also come in the middle of syncs and of durable writes; not of plain ones,
/// which may be copies that it would wait for.
fn start_guest(vfs: &SimVfs, content: &[u8], rng: Rng) -> Result<Arc<Guest>, String> {
    let mut history = History::default();
    history.continue_from(0, content);
    vfs.record(true);
    let disk = options(vfs).open(Path::new("/vm.vhd")).map_err(|error| error.to_string())?;
    let guest =
        Arc::new(Guest { vfs: vfs.clone(), disk, history: Mutex::new(history), rng: Mutex::new(rng) });
    let (weak, busy) = (Arc::downgrade(&guest), AtomicBool::new(false));
    vfs.set_hook(Some(Box::new(move |underway| {
        let Some(guest) = weak.upgrade().filter(|_| !matches!(underway, Underway::Read | Underway::Write))
        else {
            return;
        };
        if !busy.swap(true, Ordering::SeqCst) {
            if guest.rng.lock().unwrap().one_in(3) {
                guest.change();
            }
            busy.store(false, Ordering::SeqCst);
        }
    })));
    Ok(guest)
}

impl Guest {
    /// What it does beside long work.
    fn beside(&self) -> Result<(), String> {
        let choice = self.rng.lock().unwrap().below(6);
        match choice {
            0 | 1 => self.change(),
            2 => self.flush(),
            _ => {}
        }
        self.check()
    }

    /// What it does after it; the crash points of all.
    fn end(&self) -> Result<Vec<CrashPoint>, String> {
        for _ in 0..6 {
            self.change();
            self.check()?;
        }
        self.flush();
        self.vfs.set_hook(None);
        let mut points = self.vfs.take_crash_points();
        points.push(self.vfs.crash_now());
        Ok(points)
    }
}

/// Layers are merged into a running disk, beside a guest; the power fails at every step.
pub fn merged_running(seed: u64, bounds: &Bounds) -> Result<u64, String> {
    let Chain { vfs, layers, content } = Chain::random(seed, 6);
    let below = layers.len() - 1;
    let mut rng = Rng::new(seed ^ 0x11fe);
    // How many layers stay; without any the disk needs no parent.
    let stay = if below < 2 || rng.one_in(4) { 0 } else { 1 + rng.below(below as u64 - 1) as usize };
    let (disk, until) = (Path::new("/vm.vhd"), stay.checked_sub(1).map(|last| layers[last].clone()));
    let hashes = |vfs: &SimVfs| layers[..below].iter().map(|path| sealed_hash(vfs, path)).collect::<Vec<_>>();
    let before = hashes(&vfs);
    let guest = start_guest(&vfs, &content, rng)?;
    let mut wrong = Ok(());
    let merged = cowvhd::snapshot::merge_running(&guest.disk, until.as_deref(), &mut |_| {
        wrong = std::mem::replace(&mut wrong, Ok(())).and_then(|()| guest.beside());
        ControlFlow::Continue(())
    });
    merged.map_err(|error| error.to_string())?;
    wrong?;
    let expected = if stay == 0 { DiskType::Dynamic } else { DiskType::Differencing };
    if guest.disk.disk_type() != expected {
        return Err(format!("it is a {} disk", guest.disk.disk_type()));
    }
    let returned = vfs.tick();
    let points = guest.end()?;
    let history = guest.history.lock().unwrap();
    let again = |vfs: &SimVfs| drop(options(vfs).open(disk));
    explore(&points, bounds, &again, &|state, clock| {
        let judge = |vfs: &SimVfs, options: &OpenOptions| {
            let content = read(options, disk)?;
            // What is under a write in flight may be garbage.
            history.check(clock, 0, &content, true).map_err(|error| error.to_string())?;
            if hashes(vfs) != before {
                return Err("a parent was changed".to_string());
            }
            Ok(())
        };
        let vfs = state.to_vfs(state.hash);
        judge(&vfs, &options(&vfs).read_only(true))?;
        vfs.record(true);
        judge(&vfs, &options(&vfs))?;
        let points = vfs.take_crash_points();
        options(&vfs).open(disk).and_then(|disk| disk.close()).map_err(|error| error.to_string())?;
        must_be_sound(&vfs, disk)?;
        if clock >= returned {
            layers[stay..below].iter().for_each(|layer| vfs.remove(layer).unwrap());
            let content = read(&options(&vfs), disk).map_err(|error| format!("without layers: {error}"))?;
            history.check(clock, 0, &content, true).map_err(|error| format!("without layers: {error}"))?;
        }
        Ok(points)
    })
}

/// A snapshot of a running disk is deleted, beside a guest: right beneath its leaf, or in the middle of its chain. The power fails at
/// every step.
pub fn deleted_running(seed: u64, bounds: &Bounds) -> Result<u64, String> {
    let Chain { vfs, layers, content } = Chain::random(seed, 6);
    let below = layers.len() - 1;
    let mut rng = Rng::new(seed ^ 0xde1e7e);
    let number = rng.below(below as u64) as usize;
    let (disk, name) = (Path::new("/vm.vhd"), SnapshotName::new(&number.to_string()).unwrap());
    let gone = layers[number].clone();
    let stays = number == 0 && has_fixed_root(seed);
    let kept: Vec<&PathBuf> = layers[..below].iter().filter(|path| stays || **path != gone).collect();
    let shown = |vfs: &SimVfs| -> Result<Vec<Vec<u8>>, String> {
        kept.iter().map(|path| read(&options(vfs).read_only(true), path)).collect()
    };
    let before = shown(&vfs)?;
    let guest = start_guest(&vfs, &content, rng)?;
    let mut wrong = Ok(());
    let deleted = cowvhd::snapshot::delete_running(&guest.disk, &name, &mut |_| {
        wrong = std::mem::replace(&mut wrong, Ok(())).and_then(|()| guest.beside());
        ControlFlow::Continue(())
    });
    let deleted = deleted.map_err(|error| error.to_string())?;
    assert_eq!(deleted.kept.is_some(), stays);
    wrong?;
    let returned = vfs.tick();
    let points = guest.end()?;
    let history = guest.history.lock().unwrap();
    let delete = |vfs: &SimVfs| {
        cowvhd::snapshot::delete(&options(vfs), disk, &name, &mut |_| ControlFlow::Continue(()))
    };
    let again = |vfs: &SimVfs| drop(delete(vfs));
    explore(&points, bounds, &again, &|state, clock| {
        let vfs = state.to_vfs(state.hash);
        if state.has(&gone) != stays && clock >= returned {
            return Err("the snapshot is still there".into());
        }
        // That recovers a layer that was being changed, too.
        vfs.record(true);
        let content = read(&options(&vfs), disk)?;
        history.check(clock, 0, &content, true).map_err(|error| error.to_string())?;
        match delete(&vfs) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound && !state.has(&gone) => {}
            Err(error) if error.kind() == ErrorKind::Unsupported && stays => {}
            Err(error) => return Err(format!("deleting again: {error}")),
        }
        let points = vfs.take_crash_points();
        vfs.record(false);
        let content = read(&options(&vfs).read_only(true), disk)?;
        history.check(clock, 0, &content, true).map_err(|error| format!("without it: {error}"))?;
        if shown(&vfs)? != before {
            return Err("another snapshot shows something else".into());
        }
        // Of two superblocks a crash may have spoiled one, which the next session writes anew.
        kept.iter().try_for_each(|path| must_be_no_worse(&vfs, path, Severity::Risk))?;
        Ok(points)
    })
}

/// A snapshot is deleted, cut at every step, and the deletion is done again: what every other layer shows stays the same.
pub fn deleted(seed: u64, bounds: &Bounds) -> Result<u64, String> {
    let chain = Chain::random(seed, 5);
    let mut rng = Rng::new(seed ^ 0xde1e);
    let below = chain.layers.len() - 1;
    let number = rng.below(below as u64) as usize;
    let name = SnapshotName::new(&number.to_string()).unwrap();
    let vfs = &chain.vfs;
    let gone = chain.layers[number].clone();
    // A foreign disk over another layer, and one over the layer itself, which has to be away first.
    let foreign = PathBuf::from("/foreign.vhd");
    let over = (number + 1 + rng.below(below as u64) as usize) % chain.layers.len();
    if over < below && over != number {
        create(vfs, &foreign, Some(&chain.layers[over]));
    }
    let delete = |vfs: &SimVfs| {
        cowvhd::snapshot::delete(&options(vfs), chain.disk(), &name, &mut |_| ControlFlow::Continue(()))
    };
    let stays = number == 0 && has_fixed_root(seed);
    let kept: Vec<PathBuf> = vfs.paths().into_iter().filter(|path| stays || *path != gone).collect();
    let shown = |vfs: &SimVfs| -> Result<Vec<Vec<u8>>, String> {
        kept.iter().map(|path| read(&options(vfs).read_only(true), path)).collect()
    };
    let before = shown(vfs)?;
    vfs.record(true);
    let deleted = delete(vfs).map_err(|error| error.to_string())?;
    assert_eq!(deleted.kept.is_some(), stays);
    let returned = vfs.tick();
    let mut points = vfs.take_crash_points();
    points.push(vfs.crash_now());
    let same = |vfs: &SimVfs| match shown(vfs)?.iter().zip(&before).position(|(now, before)| now != before) {
        None => Ok(()),
        Some(at) => Err(format!("{} shows something else", kept[at].display())),
    };
    let again = |vfs: &SimVfs| drop(delete(vfs));
    explore(&points, bounds, &again, &|state, clock| {
        let vfs = state.to_vfs(state.hash);
        if state.has(&gone) != stays && clock >= returned {
            return Err("the snapshot is still there".into());
        }
        // That recovers a layer that was being changed, too.
        vfs.record(true);
        must_hold(&options(&vfs), chain.disk(), &chain.content)?;
        match delete(&vfs) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound && !state.has(&gone) => {}
            Err(error) if error.kind() == ErrorKind::Unsupported && stays => {}
            Err(error) => return Err(format!("deleting again: {error}")),
        }
        let points = vfs.take_crash_points();
        vfs.record(false);
        same(&vfs)?;
        // Of two superblocks a crash may have spoiled one, which the next session writes anew.
        kept.iter().try_for_each(|path| must_be_no_worse(&vfs, path, Severity::Risk))?;
        Ok(points)
    })
}

/// A disk gets another parent with other content, and keeps what it shows.
pub fn rebased(seed: u64, bounds: &Bounds) -> Result<u64, String> {
    let chain = Chain::random(seed, 3);
    let mut rng = Rng::new(seed ^ 0xba5e);
    let (disk, content, vfs) = (chain.disk(), &chain.content, &chain.vfs);
    // Made of the old parent, or of nothing; over one of the old layers, or not.
    let new = PathBuf::from("/new parent.vhd");
    let mut other = vec![0; SIZE as usize];
    match rng.below(3) {
        0 => create(vfs, &new, None),
        1 => create(vfs, &new, Some(&chain.layers[0])),
        _ => {
            create(vfs, &new, None);
            other.copy_from_slice(content);
            let open = options(vfs).open(&new).unwrap();
            open.write_at(content, 0).unwrap();
            open.close().unwrap();
        }
    }
    let requests = rng.below(5);
    change_closed(vfs, &new, &mut other, &mut rng, requests);
    let mut parents = chain.parents();
    // So that it is sealed already.
    create(vfs, Path::new("/sibling.vhd"), Some(&new));
    parents.push((new.clone(), sealed_hash(vfs, &new)));
    vfs.record(true);
    let go_on = &mut |_| ControlFlow::Continue(());
    cowvhd::snapshot::rebase(&options(vfs), disk, &new, go_on).map_err(|error| error.to_string())?;
    let returned = vfs.tick();
    let mut points = vfs.take_crash_points();
    points.push(vfs.crash_now());
    let again = |vfs: &SimVfs| {
        let _ = cowvhd::snapshot::rebase(&options(vfs), disk, &new, &mut |_| ControlFlow::Continue(()));
    };
    explore(&points, bounds, &again, &|state, clock| {
        let points = keeps_the_view(state, disk, content, &parents)?;
        if clock >= returned {
            let vfs = state.to_vfs(state.hash);
            chain.layers[1..chain.layers.len() - 1].iter().for_each(|layer| vfs.remove(layer).unwrap());
            must_hold(&options(&vfs), disk, content)
                .map_err(|error| format!("over the new parent: {error}"))?;
        }
        Ok(points)
    })
}

/// A disk gets another parent, and the two halves of the headers, old and new, have the same sum: so a torn header passes.
pub fn torn_header(seed: u64, bounds: &Bounds) -> Result<u64, String> {
    let mut rng = Rng::new(seed);
    let vfs = SimVfs::new(seed);
    // The locators move by three pages: 144 in the sum of the bytes that say so. Their lengths make up for it: the path is 30 shorter
    // in two notations of two bytes and in one of one, which has two more for each of three spaces. The new parent is in a folder of
    // its own, where nobody finds it by its name.
    let old = PathBuf::from(format!("/{}.vhd", "x".repeat(37)));
    let (disk, new) = (Path::new("/vm.vhd"), Path::new("/s/ a b .vhd"));
    let mut content = vec![0; SIZE as usize];
    create(&vfs, &old, None);
    create(&vfs, new, None);
    create(&vfs, Path::new("/sibling.vhd"), Some(new));
    create(&vfs, disk, Some(&old));
    change_closed(&vfs, disk, &mut content, &mut rng, 2);
    vfs.record(true);
    let go_on = &mut |_| ControlFlow::Continue(());
    cowvhd::snapshot::rebase(&options(&vfs), disk, new, go_on).map_err(|error| error.to_string())?;
    let points = vfs.take_crash_points();
    let parents = [old.as_path(), new].map(|path| (path.to_path_buf(), sealed_hash(&vfs, path)));
    let again = |vfs: &SimVfs| {
        let _ = cowvhd::snapshot::rebase(&options(vfs), disk, new, &mut |_| ControlFlow::Continue(()));
    };
    explore(&points, bounds, &again, &|state, _| keeps_the_view(state, disk, &content, &parents))
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
    let again = |vfs: &SimVfs| drop(cowvhd::snapshot::relink(&options(vfs), disk, new));
    explore(&points, bounds, &again, &|state, clock| {
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
