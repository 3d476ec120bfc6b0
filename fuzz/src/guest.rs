//! A guest on an image that means harm: opens it, follows a script, and looks whether what it was told was true.
//!
//! Whatever the image:
//!
//! * nothing panics, hangs, or takes memory without bound (the fuzzer's limits see to these);
//! * a check and an opening for reading change no byte, and neither does an opening for writing that is refused; nothing ever
//!   changes a parent;
//! * what the checker calls sound can be opened, and is sound after a guest has worked on it;
//! * what can be opened for writing can be opened for reading, and shows the same;
//! * a sector keeps what was read from it, and has what was written to it, until it is written again; a flush keeps it
//!   through a kill or a power cut that loses what was not synced, and a close keeps it, too;
//! * no write shows up in another sector;
//! * a repair does what its plan says, and undoing it restores every byte; what can be repaired can be opened, a safe repair takes
//!   nothing away from what could be opened, and there is nothing to do for the next one.

use crate::input::Input;
use cowvhd::check::Consent;
use cowvhd::sim::{Bounds, SimVfs};
use cowvhd::vfs::{Access, Vfs};
use cowvhd::vhd::DiskType;
use cowvhd::{Disk, ErrorKind, OpenOptions, ZeroMode, check};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Where the image is.
pub const PATH: &str = "/disk.vhd";
/// Where its parent is, if it has one.
pub const PARENT: &str = "/parent.vhd";
const SECTOR: u64 = 512;
const STEPS: usize = 48;

/// What each sector is known to hold.
#[derive(Default)]
struct Known {
    sectors: BTreeMap<u64, Vec<u8>>,
    /// What a crash may also leave, of sectors written since the last flush.
    unflushed: BTreeMap<u64, Vec<Vec<u8>>>,
}

impl Known {
    /// Compares what was read with what is known, and learns the rest.
    fn read(&mut self, first: u64, bytes: &[u8], when: &str) {
        for (sector, found) in (first..).zip(bytes.chunks(SECTOR as usize)) {
            let known = self.sectors.entry(sector).or_insert_with(|| found.to_vec());
            assert!(known == found, "sector {sector} {when}: {:02x?}, not {:02x?}", &found[..8], &known[..8]);
        }
    }

    fn write(&mut self, first: u64, bytes: &[u8]) {
        for (sector, new) in (first..).zip(bytes.chunks(SECTOR as usize)) {
            if let Some(old) = self.sectors.insert(sector, new.to_vec()) {
                self.unflushed.entry(sector).or_default().push(old);
            } else {
                // Nobody has looked what was there: anything, after a crash.
                self.unflushed.entry(sector).or_default().push(Vec::new());
            }
        }
    }

    /// A write or zeroing failed half-way: its sectors hold anything now.
    fn forget(&mut self, first: u64, count: u64) {
        for sector in first..first + count {
            self.sectors.remove(&sector);
            self.unflushed.entry(sector).or_default().push(Vec::new());
        }
    }

    /// Judges what is found after a kill or a power cut, and goes on from there.
    fn after_crash(&mut self, mut read: impl FnMut(u64) -> Option<Vec<u8>>) {
        let unflushed = std::mem::take(&mut self.unflushed);
        for (&sector, olds) in &unflushed {
            let Some(found) = read(sector) else {
                self.sectors.remove(&sector);
                continue;
            };
            let last = self.sectors.insert(sector, found.clone());
            let allowed = last.is_none_or(|last| last == found)
                || olds.iter().any(|old| old.is_empty() || *old == found);
            assert!(allowed, "sector {sector} after a crash: {:02x?}", &found[..8]);
        }
        for (&sector, known) in self.sectors.iter().filter(|(sector, _)| !unflushed.contains_key(sector)) {
            if let Some(found) = read(sector) {
                assert!(*known == found, "sector {sector} after a crash: {:02x?}", &found[..8]);
            }
        }
    }
}

/// A file system that holds these bytes as the image.
pub fn file_of(bytes: &[u8]) -> SimVfs {
    let vfs = SimVfs::new(1);
    if let Ok(file) = vfs.create_new(Path::new(PATH)) {
        let durable = || file.sync_data().and_then(|()| vfs.sync_dir(Path::new("/")));
        let _ = file.set_len(bytes.len() as u64).and_then(|()| durable());
    }
    vfs.corrupt(Path::new(PATH), 0, bytes);
    vfs
}

fn options(vfs: &SimVfs) -> OpenOptions {
    OpenOptions::new().vfs(Arc::new(vfs.clone()))
}

/// The image and its parent, as two numbers.
fn hash(vfs: &SimVfs) -> [Option<u64>; 2] {
    [PATH, PARENT].map(|path| vfs.content_hash(Path::new(path)))
}

/// Whether the checker finds nothing worse than leaks, and whether the image needs a parent.
fn checked(vfs: &SimVfs) -> (bool, bool) {
    match check::check(Arc::new(vfs.clone()), Path::new(PATH)) {
        Ok(report) => (report.is_sound(), report.disk_type == Some(DiskType::Differencing)),
        Err(_) => (false, false),
    }
}

/// Length of a file; 0 if there is none.
pub(crate) fn length(vfs: &SimVfs, path: &Path) -> u64 {
    vfs.open(path, Access::ReadOnly).and_then(|file| file.length()).unwrap_or(0)
}

/// Sectors worth a look: the first ones, the last ones, and those around a boundary that the script names.
fn places(disk: &Disk, script: &mut Input) -> Vec<(u64, u64)> {
    let sectors = disk.size() / SECTOR;
    let near = u64::from(script.u16()) * 8 % sectors.max(1);
    [0, sectors.saturating_sub(24), near].map(|first| (first, (sectors - first).min(24))).to_vec()
}

/// Opens the image and follows the script.
pub fn exercise(vfs: SimVfs, script: &[u8]) {
    let mut vfs = vfs;
    let mut script = Input(script);
    let before = hash(&vfs);
    let (sound, has_parent) = checked(&vfs);
    assert!(hash(&vfs) == before, "checking changed the file");
    let mut known = Known::default();
    let mut opened_for_reading = false;
    if let Ok(disk) = options(&vfs).read_only(true).open(Path::new(PATH)) {
        opened_for_reading = true;
        for (first, count) in places(&disk, &mut script.clone()) {
            let mut buf = vec![0xee; (count * SECTOR) as usize];
            if disk.read_at(&mut buf, first * SECTOR).is_ok() {
                known.read(first, &buf, "read-only");
            }
        }
        check_extents(&disk, &mut script.clone());
        assert!(disk.write_at(&[1; 512], 0).is_err(), "a read-only disk takes writes");
        let _ = (disk.notices(), disk.close());
    }
    assert!(hash(&vfs) == before, "opening for reading changed the file");
    // What the checker says of a child says nothing of its parent.
    assert!(opened_for_reading || !sound || has_parent, "it is sound, and does not open");

    let disk = match options(&vfs).open(Path::new(PATH)) {
        Ok(disk) => disk,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            if error.kind() == ErrorKind::Sealed {
                // A seal whose writing was cut is finished first. Once.
                let sealed = hash(&vfs);
                assert!(options(&vfs).open(Path::new(PATH)).is_err(), "a sealed image opens the second time");
                assert!(hash(&vfs) == sealed, "opening a sealed image again changed it");
            } else {
                assert!(hash(&vfs) == before, "an opening that was refused changed the file: {error}");
                let repaired =
                    repair(&vfs, if before[0].unwrap_or(0) & 1 == 0 { Consent::All } else { Consent::Safe });
                let opens = options(&vfs).read_only(true).open(Path::new(PATH)).is_ok();
                // Its type may have come to light only now.
                let has_parent = checked(&vfs).1;
                assert!(opens || !repaired || has_parent, "it was repaired, and does not open");
            }
            return;
        }
    };
    assert!(opened_for_reading, "it can be opened for writing, and not for reading");
    let mut disk = Some(disk);
    for (first, count) in disk.as_ref().map_or(Vec::new(), |disk| places(disk, &mut script)) {
        let mut buf = vec![0xee; (count * SECTOR) as usize];
        if disk.as_ref().is_some_and(|disk| disk.read_at(&mut buf, first * SECTOR).is_ok()) {
            known.read(first, &buf, "opened for writing");
        }
    }
    for step in 0..STEPS {
        if script.is_empty() {
            break;
        }
        let Some(open) = &disk else { break };
        if !step_of(open, &mut known, &mut script, step) {
            // A kill or a power cut, or a close.
            let kind = script.u8();
            if kind % 4 == 0 && open.close().is_ok() {
                known.unflushed.clear();
            }
            drop(disk.take());
            if kind % 4 == 1 {
                vfs = cut(&vfs, u64::from(kind), step as u64);
            }
            if kind % 8 == 7 {
                repair(&vfs, Consent::Safe);
            }
            let reopened = options(&vfs).open(Path::new(PATH));
            let reopened =
                reopened.unwrap_or_else(|error| panic!("what was open cannot be opened again: {error}"));
            let read = |sector: u64| {
                let mut buf = vec![0xee; SECTOR as usize];
                reopened.read_at(&mut buf, sector * SECTOR).is_ok().then_some(buf)
            };
            known.after_crash(read);
            disk = Some(reopened);
        }
    }
    let Some(disk) = disk else { return };
    if disk.close().is_err() {
        return;
    }
    drop(disk);
    let disk = options(&vfs).read_only(true).open(Path::new(PATH));
    let disk = disk.unwrap_or_else(|error| panic!("what was closed cannot be opened: {error}"));
    for (&sector, bytes) in &known.sectors {
        let mut buf = vec![0xee; SECTOR as usize];
        if disk.read_at(&mut buf, sector * SECTOR).is_ok() {
            assert!(buf == *bytes, "sector {sector} after the close");
        }
    }
    drop(disk);
    if sound {
        match check::check(Arc::new(vfs.clone()), Path::new(PATH)) {
            Ok(report) => assert!(report.is_sound(), "it was sound, and is no more: {:?}", report.findings()),
            Err(error) => panic!("it was sound, and cannot be checked any more: {error}"),
        }
    }
    assert!(hash(&vfs)[1] == before[1], "the parent has changed");
    assert!(length(&vfs, Path::new(PATH)) < 1 << 45, "the file has grown beyond reason");
}

/// Whether two repairs take the same steps. How many bytes of unused space they give back the medium tells: where zeros were written the
/// simulated one has a hole, and a view of it, as most file systems, has data.
fn are_same(some: &[check::Step], others: &[check::Step]) -> bool {
    let words = |step: &check::Step| match step.what.strip_prefix("give back ") {
        Some(rest) => rest.trim_start_matches(|digit: char| digit.is_ascii_digit()).to_string(),
        None => step.what.clone(),
    };
    some.iter().map(|step| (words(step), step.safe)).eq(others.iter().map(|step| (words(step), step.safe)))
}

/// Repairs the image: as planned, with an undoing that restores it, and until nothing is left to do. Whether it is sound now.
fn repair(vfs: &SimVfs, consent: Consent) -> bool {
    let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
    let (path, undo) = (Path::new(PATH), Path::new("/undo"));
    let before = hash(vfs);
    let plan = check::plan(Arc::clone(&shared), path, consent);
    assert!(hash(vfs) == before, "planning a repair changed the file");
    let Ok(plan) = plan else { return false };
    let run = || match check::repair(Arc::clone(&shared), path, consent, undo) {
        Ok(repair) => repair,
        Err(error) => panic!("it cannot be repaired as planned: {error}; {:?}", plan.steps),
    };
    let first = run();
    assert!(are_same(&first.steps, &plan.steps), "planned {:?}, done {:?}", plan.steps, first.steps);
    if first.changes() {
        let undone = check::undo(Arc::clone(&shared), undo, path, false);
        assert!(undone.is_ok() && hash(vfs) == before, "undoing {:?}: {undone:?}", first.steps);
        // Durably: a power cut to come would bring it back.
        let remove = || vfs.remove(undo).and_then(|()| vfs.sync_dir(Path::new("/")));
        assert!(remove().is_ok() && are_same(&run().steps, &plan.steps), "repaired again, with other steps");
        let _ = remove();
    }
    let again = run();
    assert!(!again.changes(), "after {:?} there is {:?} to do", plan.steps, again.steps);
    assert!(hash(vfs)[1] == before[1], "repairing has changed the parent");
    again.is_sound()
}

/// The file system after a power cut that loses all that was not synced, or some of it.
fn cut(vfs: &SimVfs, seed: u64, step: u64) -> SimVfs {
    let mut after = None;
    vfs.crash_now().for_each_state(seed, &Bounds::sample(1 + (seed / 4 % 4) as usize), |state| {
        after = (!state.garbage).then(|| state.to_vfs(seed << 8 | 0x10_0000 | step)).or(after.take());
        true
    });
    after.unwrap_or_else(|| vfs.clone())
}

/// One step; false if the disk is to be left.
fn step_of(disk: &Disk, known: &mut Known, script: &mut Input, number: usize) -> bool {
    let kind = script.u8();
    let sectors = disk.size() / SECTOR;
    let from_end = kind & 0x80 != 0;
    let place = u64::from(script.u16());
    let first = if from_end { sectors.saturating_sub(1 + place) } else { place.min(sectors - 1) };
    let count = (1 + u64::from(script.u8()) * u64::from(kind >> 4 & 7)).min(sectors - first);
    let (offset, length) = (first * SECTOR, count * SECTOR);
    match kind & 15 {
        0..=4 => {
            let mut bytes = vec![number as u8 + 1; length as usize];
            // Each sector knows its place.
            for (sector, chunk) in (first..).zip(bytes.chunks_mut(SECTOR as usize)) {
                chunk[..8].copy_from_slice(&sector.to_be_bytes());
            }
            match disk.write_at(&bytes, offset) {
                Ok(()) => known.write(first, &bytes),
                Err(_) => known.forget(first, count),
            }
        }
        5 | 6 => {
            let mut buf = vec![0xee; length as usize];
            if disk.read_at(&mut buf, offset).is_ok() {
                known.read(first, &buf, "read");
            }
        }
        7 => {
            let mode = if from_end { ZeroMode::KeepAllocated } else { ZeroMode::MayPunch };
            zero(disk, known, first, count, mode);
        }
        8 => {
            // Whole blocks of any size are among these.
            let count = (u64::from(script.u16()) * 8).min(sectors - first);
            if count <= 1 << 14 {
                zero(disk, known, first, count, ZeroMode::MayPunch);
            }
        }
        9..=11 => match disk.flush() {
            Ok(()) => known.unflushed.clear(),
            Err(error) => {
                let stopped = error.kind() == ErrorKind::Poisoned;
                assert!(!stopped || disk.write_at(&[0; 512], 0).is_err(), "it has stopped, and goes on");
            }
        },
        12 => check_extents(disk, script),
        13 => {
            let end = disk.size();
            assert!(disk.write_at(&[0; 512], end).is_err() && disk.read_at(&mut [0; 1], end).is_err());
            assert!(disk.write_at(&[0; 512], u64::MAX - 511).is_err());
            assert!(disk.write_at(&[0; 511], 0).is_err() && disk.discard(1, 512).is_err());
        }
        _ => return false,
    }
    true
}

fn zero(disk: &Disk, known: &mut Known, first: u64, count: u64, mode: ZeroMode) {
    match disk.write_zeroes(first * SECTOR, count * SECTOR, mode) {
        Ok(()) => known.write(first, &vec![0; (count * SECTOR) as usize]),
        Err(_) => known.forget(first, count),
    }
}

/// Extents cover what was asked for, in order, without gaps.
fn check_extents(disk: &Disk, script: &mut Input) {
    let start = u64::from(script.u16()) * SECTOR % disk.size().max(1);
    let length = (disk.size() - start).min(1 << 24);
    if let Ok(extents) = disk.map(start, length) {
        let mut at = start;
        for extent in extents {
            assert!(extent.extent.offset == at && extent.extent.length > 0);
            at += extent.extent.length;
        }
        assert!(at == start + length);
    }
}
