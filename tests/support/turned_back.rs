//! Cookies that somebody turns back by hand: what a crash left is made to look closed, and perhaps written to by another program.
//! Whatever was flushed is shown, or it is said that it may be missing; nothing of it, and nothing of the other program's, goes away
//! unless it is asked for.

use cowvhd::check::{Code, Consent, check, plan, repair, undo};
use cowvhd::sim::{Bounds, CrashState, Rng, SimVfs};
use cowvhd::vfs::{Access, Vfs};
use cowvhd::vhd::{DiskType, DynamicHeader, Footer, HeaderCookie, Timestamp, UniqueId};
use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions};
use std::path::Path;
use std::sync::Arc;

const IMAGE: &str = "/disk.vhd";
const UNDO: &str = "/disk.vhd.undo";
const BLOCK: u64 = 16 << 10;
const BLOCKS: u64 = 8;
const SIZE: u64 = BLOCKS * BLOCK;
/// What another program writes; nobody else does.
const FOREIGN: u8 = 0xf0;

fn path() -> &'static Path {
    Path::new(IMAGE)
}

fn options(vfs: &SimVfs) -> OpenOptions {
    OpenOptions::new().vfs(Arc::new(vfs.clone()))
}

fn read(disk: &Disk) -> Result<Vec<u8>, String> {
    let mut content = vec![0xee; SIZE as usize];
    disk.read_at(&mut content, 0).map_err(|error| format!("reading: {error}")).map(|()| content)
}

fn shown(vfs: &SimVfs) -> Shown {
    options(vfs).read_only(true).open(path()).map_err(|error| error.to_string()).and_then(|disk| read(&disk))
}

/// A disk that another program made: its table behind the header, two blocks behind that, without gaps.
fn make_elsewhere(vfs: &SimVfs) {
    let footer = Footer::new(DiskType::Dynamic, SIZE, UniqueId::from_bytes([7; 16]), Timestamp(700_000_000));
    let header = DynamicHeader::new(1536, BLOCKS as u32, BLOCK as u32);
    let mut bytes = [footer.to_bytes().as_slice(), &header.to_bytes(), &[0xff; 512]].concat();
    for (block, fill) in [(2, 11_u8), (5, 12)] {
        let entry = (bytes.len() / 512) as u32;
        bytes[1536 + 4 * block..][..4].copy_from_slice(&entry.to_be_bytes());
        bytes.extend([0xff; 512]);
        bytes.extend(vec![fill; BLOCK as usize]);
    }
    bytes.extend(footer.to_bytes());
    let file = vfs.create_new(path()).unwrap();
    assert_eq!(file.write_at(&bytes, 0).unwrap(), bytes.len());
    file.sync_data().unwrap();
    vfs.sync_dir(Path::new("/")).unwrap();
}

fn change(disk: &Disk, rng: &mut Rng, requests: u64) {
    for _ in 0..requests {
        let first = rng.below(SIZE / 512);
        let count = (1 + rng.below(24)).min(SIZE / 512 - first);
        match rng.below(8) {
            0 => disk.discard(rng.below(BLOCKS) * BLOCK, BLOCK).unwrap(),
            1 => disk.discard(first * 512, count * 512).unwrap(),
            _ => disk.write_at(&vec![1 + rng.below(200) as u8; count as usize * 512], first * 512).unwrap(),
        }
        if rng.one_in(3) {
            disk.flush().unwrap();
        }
    }
}

/// A medium on which a disk was used, and closed once; the disk itself.
fn used(seed: u64, elsewhere: bool) -> (SimVfs, Disk, Rng) {
    let (vfs, mut rng) = (SimVfs::new(seed), Rng::new(seed));
    let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
    match elsewhere {
        true => make_elsewhere(&vfs),
        false => {
            let create = CreateOptions::new(SIZE).test_geometry(BLOCK as u32, 128 << 10).vfs(shared);
            create.create(path()).unwrap();
        }
    }
    let disk = options(&vfs).open(path()).unwrap();
    let requests = rng.below(12);
    change(&disk, &mut rng, requests);
    disk.close().unwrap();
    drop(disk);
    let disk = options(&vfs).open(path()).unwrap();
    (vfs, disk, rng)
}

/// Makes a dirty cookie normal, as somebody does who wants another program to open the file. False where it was not dirty.
fn turn_back(vfs: &SimVfs, keep_offset: bool) -> bool {
    let mut bytes = [0; DynamicHeader::SIZE];
    let file = vfs.open(path(), Access::ReadOnly).unwrap();
    if file.read_at(&mut bytes, 512).unwrap() < bytes.len() {
        return false;
    }
    let Ok(header) = DynamicHeader::parse(&bytes) else { return false };
    let data_offset = if keep_offset { header.data_offset } else { u64::MAX };
    let normal = DynamicHeader { cookie: HeaderCookie::Normal, data_offset, ..header.clone() };
    vfs.corrupt(path(), 512, &normal.to_bytes());
    header.cookie == HeaderCookie::Dirty
}

/// Another program adds a block at the end of those that the table of the file names, off any grid, in a file of ours. It says
/// which.
fn add_block(vfs: &SimVfs, rng: &mut Rng) -> Option<u64> {
    let bytes = vfs.content(path())?;
    let header = DynamicHeader::parse(&bytes[512..1536]).ok()?;
    let entry = |block: u64| {
        let at = (header.table_offset + 4 * block) as usize;
        u64::from(u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]))
    };
    let absent: Vec<u64> = (0..BLOCKS).filter(|&block| entry(block) == u64::from(u32::MAX)).collect();
    let present = (0..BLOCKS).map(entry).filter(|&entry| entry != u64::from(u32::MAX));
    let end = present.map(|entry| entry * 512 + 512 + BLOCK).max();
    let end = end.unwrap_or((header.table_offset + 4 * BLOCKS).next_multiple_of(512));
    let block = *absent.get(rng.below(absent.len().max(1) as u64) as usize)?;
    let data = [&[0xff; 512], vec![FOREIGN; BLOCK as usize].as_slice(), &bytes[..512]].concat();
    let file = vfs.open(path(), Access::ReadWrite).ok()?;
    file.set_len(file.length().ok()?.max(end + data.len() as u64)).ok()?;
    file.sync_data().ok()?;
    vfs.corrupt(path(), end, &data);
    let place = ((end / 512) as u32).to_be_bytes();
    vfs.corrupt(path(), header.table_offset + 4 * block, &place);
    Some(block)
}

/// What the disk shows, if it opens.
type Shown = Result<Vec<u8>, String>;

/// What a repair with this consent does to a copy of what is on the medium, and what it shows then.
fn repaired(vfs: &SimVfs, consent: Consent) -> Result<(bool, bool, Shown), String> {
    let copy = copy(vfs);
    let before = copy.content(path());
    let shared: Arc<dyn Vfs> = Arc::new(copy.clone());
    plan(Arc::clone(&shared), path(), consent).map_err(|error| format!("planning: {error}"))?;
    if copy.content(path()) != before {
        return Err("a plan changed the file".into());
    }
    let done = repair(Arc::clone(&shared), path(), consent, Path::new(UNDO));
    let done = done.map_err(|error| format!("repairing: {error}"))?;
    let content = shown(&copy);
    if done.changes() {
        undo(shared, Path::new(UNDO), path(), false).map_err(|error| format!("undoing: {error}"))?;
    }
    if copy.content(path()) != before {
        return Err(format!("{:?}, and undone: the file is not what it was", done.steps));
    }
    Ok((done.changes(), done.is_sound(), content))
}

/// The same bytes on a medium of their own, nothing pending.
fn copy(vfs: &SimVfs) -> SimVfs {
    let mut copies = Vec::new();
    vfs.open(path(), Access::ReadWrite).unwrap().sync_data().unwrap();
    vfs.crash_now().for_each_state(0, &Bounds::sample(1), |state| {
        copies.push(state.to_vfs(1));
        false
    });
    copies.pop().unwrap()
}

fn judge(state: &CrashState, rng: &mut Rng) -> Result<bool, String> {
    let medium = || state.to_vfs(state.hash);
    // What recovery shows.
    let right = shown(&medium()).map_err(|error| format!("the state itself: {error}"))?;
    let turned = medium();
    if !turn_back(&turned, rng.one_in(2)) {
        return Ok(false);
    }
    let report = check(Arc::new(turned.clone()), path()).map_err(|error| error.to_string())?;
    let found = report.count(Code::JournalNotReplayed) > 0;
    match shown(&turned) {
        Ok(content) if content != right && !found => return Err("flushed data is missing, silently".into()),
        _ => {}
    }
    let before = turned.content(path());
    match options(&turned).open(path()) {
        Ok(disk) if found || read(&disk)? != right => {
            return Err("opened for writing, and data is gone".into());
        }
        Err(error) if error.kind() != ErrorKind::Corrupt => return Err(format!("refused, but: {error}")),
        Err(_) if turned.content(path()) != before => return Err("refused, and changed".into()),
        _ => {}
    }
    if !found {
        return Ok(false);
    }
    let turned = copy(&turned);
    match repaired(&turned, Consent::Safe)? {
        (false, false, _) => {}
        other => return Err(format!("a repair of what is safe: {:?}", (other.0, other.1))),
    }
    match repaired(&turned, Consent::All)? {
        (true, true, Ok(content)) if content == right => {}
        (changes, sound, content) => {
            let same = content.map(|content| content == right);
            return Err(format!("a whole repair: changes {changes}, sound {sound}, right {same:?}"));
        }
    }
    Ok(true)
}

/// What another program has added since stays, or nothing is done.
fn judge_with_foreign(state: &CrashState, rng: &mut Rng) -> Result<bool, String> {
    let medium = state.to_vfs(state.hash);
    let right = shown(&medium).map_err(|error| format!("the state itself: {error}"))?;
    if !turn_back(&medium, false) {
        return Ok(false);
    }
    let medium = copy(&medium);
    let Some(block) = add_block(&medium, rng) else { return Ok(false) };
    let found = check(Arc::new(medium.clone()), path()).map_err(|error| error.to_string())?;
    if found.count(Code::JournalNotReplayed) == 0 {
        return Ok(false);
    }
    let range = (block * BLOCK) as usize..((block + 1) * BLOCK) as usize;
    let is_theirs = |content: &[u8]| content[range.clone()].iter().all(|&byte| byte == FOREIGN);
    let is_ours = |content: &[u8]| {
        (0..).zip(content.iter().zip(&right)).all(|(at, (a, b)): (usize, _)| range.contains(&at) || a == b)
    };
    let (changes, sound, content) = repaired(&medium, Consent::All)?;
    match (changes, content) {
        (false, _) if !sound => Ok(false),
        (true, Ok(content)) if sound && is_theirs(&content) && is_ours(&content) => Ok(true),
        (_, content) => {
            let content = content.map(|content| (is_theirs(&content), is_ours(&content)));
            Err(format!("with a block of another program: changes {changes}, sound {sound}, {content:?}"))
        }
    }
}

/// One disk, left by crashes at several moments, its cookie turned back; how many states showed what the journal alone held.
pub fn turned_back(seed: u64, bounds: &Bounds) -> Result<u64, String> {
    let elsewhere = seed % 3 == 2;
    let (vfs, disk, mut rng) = used(seed, elsewhere);
    let mut states = 0;
    for _ in 0..4 {
        let requests = 1 + rng.below(8);
        change(&disk, &mut rng, requests);
        let mut result = Ok(());
        vfs.crash_now().for_each_state(rng.next_u64(), bounds, |state| {
            let judged = judge(&state, &mut rng).and_then(|found| match elsewhere {
                true => Ok(found),
                false => judge_with_foreign(&state, &mut rng).map(|kept| found || kept),
            });
            result = judged.map(|found| states += u64::from(found));
            result = result.clone().map_err(|what| format!("{}: {what}", state.fates()));
            result.is_ok()
        });
        result?;
    }
    Ok(states)
}

/// A disk that was closed, or opened and closed in part: nothing is wrong with its cookie, also if a superblock is lost.
pub fn closed(seed: u64) -> Result<(), String> {
    let (vfs, disk, mut rng) = used(seed, seed % 3 == 2);
    change(&disk, &mut rng, 10);
    disk.close().unwrap();
    drop(disk);
    for superblock in [None, Some(4096), Some(8192)] {
        let medium = copy(&vfs);
        if let Some(at) = superblock.filter(|_| seed % 3 != 2) {
            medium.corrupt(path(), at, &[0; 4096]);
        }
        let report = check(Arc::new(medium.clone()), path()).map_err(|error| error.to_string())?;
        if report.count(Code::JournalNotReplayed) > 0 {
            return Err(format!("without superblock {superblock:?}: {:?}", report.findings()));
        }
        options(&medium).open(path()).map_err(|error| format!("without {superblock:?}: {error}"))?;
    }
    Ok(())
}
