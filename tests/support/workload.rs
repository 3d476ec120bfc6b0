//! Random requests to a disk on a simulated medium, with the history of what was asked and flushed.

use cowvhd::sim::{CrashPoint, Fault, FaultPlan, History, Rng, SimVfs, Underway};
use cowvhd::vfs::Vfs;
use cowvhd::vhd::{DiskType, DynamicHeader, Footer, ParentLocator, PlatformCode, Timestamp, UniqueId};
use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions, ZeroMode};
use std::path::Path;
use std::sync::{Arc, Mutex};

pub const PATH: &str = "/disk.vhd";
pub const PARENT_PATH: &str = "/parent.vhd";
pub const SECTOR: u64 = 512;

/// What a workload works on.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub block_bytes: u32,
    pub ring_bytes: u64,
    pub size: u64,
    /// Requests go to these ranges of blocks.
    pub hot_blocks: &'static [std::ops::Range<u64>],
    /// A fixed disk: the sizes of blocks and ring only shape the requests.
    pub fixed: bool,
    /// A differencing disk, over a parent that holds data here and there.
    pub child: bool,
    /// An image that another program made.
    pub elsewhere: Option<Elsewhere>,
    /// All blocks once held canaries; another program took them out of the table, and left them in the file.
    pub canaries: bool,
}

/// How another program lays an image out. Its table starts at once behind the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elsewhere {
    /// Blocks follow each other without gaps, from the end of the table on, as QEMU does it; else their data is aligned to pages, with
    /// a gap in front.
    pub packed: bool,
    /// Bytes of the footer at the end.
    pub footer_bytes: usize,
}

/// A few blocks of four pages and the smallest ring: checkpoints and reuse come often.
pub const SMALL: Shape = Shape {
    block_bytes: 16 << 10,
    ring_bytes: 128 << 10,
    size: 8 * (16 << 10) - 1024,
    hot_blocks: &[0..4, 4..8],
    fixed: false,
    child: false,
    elsewhere: None,
    canaries: false,
};
/// The same requests on a fixed disk. Its size is whole physical sectors: where the footer shares one with the guest, a drive
/// that leaves garbage in it takes the footer, too.
#[allow(dead_code, reason = "the power test has none: the defects are those of the journal")]
pub const FIXED: Shape = Shape { fixed: true, size: 8 * (16 << 10) - 4096, ..SMALL };
/// The small disk with a parent, part of whose data shows through.
#[allow(dead_code, reason = "not every test has one")]
pub const CHILD: Shape = Shape { child: true, ..SMALL };
/// The small disk in a file full of what the guest does not own.
#[allow(dead_code, reason = "not every test has one")]
pub const USED: Shape = Shape { canaries: true, ..SMALL };
/// The small disk as QEMU lays it out: footer, header, table and the first block share pages.
#[allow(dead_code, reason = "not every test has one")]
pub const PACKED: Shape = Shape { elsewhere: Some(Elsewhere { packed: true, footer_bytes: 512 }), ..SMALL };
/// The small disk with data aligned to pages, as blktap and Windows lay it out, and with the footer of old programs.
#[allow(dead_code, reason = "not every test has one")]
pub const ALIGNED: Shape = Shape { elsewhere: Some(Elsewhere { packed: false, footer_bytes: 511 }), ..SMALL };
/// The small disk with a parent, made by another program: nothing but one locator, far from the headers, says where the parent is.
#[allow(dead_code, reason = "not every test has one")]
pub const FOREIGN_CHILD: Shape =
    Shape { child: true, elsewhere: Some(Elsewhere { packed: false, footer_bytes: 512 }), ..SMALL };
/// Blocks spread over many pages of the block table, more than may wait for an image.
pub const WIDE: Shape = Shape {
    block_bytes: 4 << 10,
    ring_bytes: 128 << 10,
    size: 14 * 1024 * (4 << 10),
    hot_blocks: &[
        0..2,
        1023..1025,
        2047..2049,
        3071..3073,
        4095..4097,
        5119..5121,
        6143..6145,
        7167..7169,
        8191..8193,
        9215..9217,
        10239..10241,
        11263..11265,
    ],
    fixed: false,
    child: false,
    elsewhere: None,
    canaries: false,
};

/// What lies in slots that another program has freed.
const CANARY: u64 = 0xca9a_7e57_ca9a_7e57;

const EIO: i32 = 5;
const EINTR: i32 = 4;
const ENOSPC: i32 = 28;
const FAULTS: [Fault; 4] = [Fault::Error(EIO), Fault::Error(ENOSPC), Fault::Error(EINTR), Fault::Short];

/// Crash points with the history they are to be judged by.
pub struct Segment {
    pub history: History,
    pub points: Vec<CrashPoint>,
}

/// A disk with its history, and what has been recorded of it.
pub struct Workload {
    pub vfs: SimVfs,
    shape: Shape,
    shared: Arc<Shared>,
    rng: Rng,
    segments: Vec<Segment>,
    pub injected: u64,
}

/// What requests from within a sync share with the main thread of requests.
struct Shared {
    vfs: SimVfs,
    shape: Shape,
    disk: Mutex<Option<Arc<Disk>>>,
    history: Mutex<History>,
    /// The block of the request under way on the main thread of requests, if it is a write.
    writing: Mutex<Option<u64>>,
    /// The sectors of that request. On the same thread nobody may wait for the 4 KiB units that it brings.
    busy: Mutex<std::ops::Range<u64>>,
    faults: bool,
}

impl Shared {
    fn disk(&self) -> Arc<Disk> {
        Arc::clone(self.disk.lock().unwrap().as_ref().expect("the disk is open"))
    }

    fn hot_block(&self, rng: &mut Rng) -> u64 {
        let hot = &self.shape.hot_blocks[rng.below(self.shape.hot_blocks.len() as u64) as usize];
        hot.start + rng.below(hot.end - hot.start)
    }

    /// A random range, mostly within `block`: (first sector, sectors).
    fn range(&self, rng: &mut Rng, block: u64) -> (u64, u64) {
        let sectors_per_block = u64::from(self.shape.block_bytes) / SECTOR;
        let total = self.shape.size / SECTOR;
        let (first, count) = match rng.below(8) {
            0 => (0, sectors_per_block),
            1 | 2 => (rng.below(sectors_per_block / 8) * 8, 8),
            _ => (rng.below(sectors_per_block), 1 + rng.below(12)),
        };
        let first = (block * sectors_per_block + first).min(total - 1);
        (first, count.min(total - first))
    }

    fn write(&self, rng: &mut Rng, block: u64) {
        let (first, count) = self.range(rng, block);
        let value = self.history.lock().unwrap().new_value();
        let mut buf = vec![0; (count * SECTOR) as usize];
        History::fill(value, &mut buf);
        self.request(first, count, value, |disk| disk.write_at(&buf, first * SECTOR));
    }

    fn zero(&self, rng: &mut Rng, mode: ZeroMode) {
        let block = self.hot_block(rng);
        let (first, count) = self.range(rng, block);
        self.request(first, count, 0, |disk| disk.write_zeroes(first * SECTOR, count * SECTOR, mode));
    }

    fn discard_block(&self, rng: &mut Rng) {
        let sectors_per_block = u64::from(self.shape.block_bytes) / SECTOR;
        let first = self.hot_block(rng) * sectors_per_block;
        let count = sectors_per_block.min(self.shape.size / SECTOR - first);
        self.request(first, count, 0, |disk| disk.discard(first * SECTOR, count * SECTOR));
    }

    fn request(&self, first: u64, count: u64, value: u64, call: impl FnOnce(&Disk) -> cowvhd::Result<()>) {
        let range = first..first + count;
        let outer = {
            let mut busy = self.busy.lock().unwrap();
            let unit = |range: &std::ops::Range<u64>| range.start / 8..range.end.div_ceil(8);
            let (outer, inner) = (unit(&busy), unit(&range));
            if self.shape.child && outer.start < inner.end && inner.start < outer.end {
                return;
            }
            std::mem::replace(&mut *busy, range)
        };
        let submitted = self.history.lock().unwrap().submit(self.vfs.tick(), first, count, value);
        match call(&self.disk()) {
            Ok(()) => self.history.lock().unwrap().completed(submitted, self.vfs.tick(), first, count),
            Err(error) => assert!(self.faults, "a request failed without reason: {error}"),
        }
        *self.busy.lock().unwrap() = outer;
    }

    /// Whether a failed sync has stopped the disk. Asks with a request that changes nothing.
    fn is_stopped(&self) -> bool {
        matches!(self.disk().discard(0, 0), Err(error) if error.kind() == ErrorKind::Poisoned)
    }

    fn flush(&self) -> cowvhd::Result<()> {
        let called = self.vfs.tick();
        let result = self.disk().flush();
        let mut history = self.history.lock().unwrap();
        match &result {
            Ok(()) => history.flushed(called, self.vfs.tick()),
            Err(error) => {
                assert!(self.faults, "a flush failed without reason: {error}");
                // A disk that goes on still owes all of it to the next flush.
                if self.is_stopped() {
                    history.flush_failed(self.vfs.tick());
                }
            }
        }
        result
    }
}

impl Workload {
    /// A new disk; crash points are recorded from its first open on. With `faults` operations fail now and then: errors, a
    /// lack of space, short transfers, interruptions.
    pub fn new(shape: Shape, seed: u64, faults: bool) -> Self {
        let vfs = SimVfs::new(seed);
        let mut history = History::default();
        create(&vfs, shape, seed, &mut history);
        vfs.record(true);
        let shared = Shared {
            vfs: vfs.clone(),
            shape,
            disk: Mutex::default(),
            history: Mutex::new(history),
            writing: Mutex::default(),
            busy: Mutex::default(),
            faults,
        };
        let workload = Workload {
            vfs,
            shape,
            shared: Arc::new(shared),
            rng: Rng::new(seed),
            segments: Vec::new(),
            injected: 0,
        };
        workload.open();
        workload
    }

    fn open(&self) {
        let disk = OpenOptions::new().vfs(Arc::new(self.vfs.clone())).open(Path::new(PATH)).unwrap();
        *self.shared.disk.lock().unwrap() = Some(Arc::new(disk));
    }

    /// Requests arrive in the middle of about one operation in four.
    pub fn interleave(&self) {
        let faults = self.shared.faults;
        let shared = Arc::downgrade(&self.shared);
        let rng = Mutex::new(self.rng.clone());
        let busy = std::sync::atomic::AtomicBool::new(false);
        self.vfs.set_hook(Some(Box::new(move |underway| {
            let Some(shared) = shared.upgrade().filter(|_| underway != Underway::Read) else { return };
            if busy.swap(true, std::sync::atomic::Ordering::SeqCst) {
                return;
            }
            let mut rng = rng.lock().unwrap();
            let idle = shared.disk.lock().unwrap().is_none();
            // With faults a request may have to flush to find space: not from within a flush on the same thread, which a
            // request under way may run as well, after its first write.
            let mut under_way = shared.writing.lock().unwrap();
            let writing = if faults { under_way.take() } else { *under_way };
            drop(under_way);
            let allowed = !faults || (underway == Underway::Write && writing.is_some());
            if !idle && allowed && rng.one_in(if faults { 2 } else { 4 }) {
                let block = writing.filter(|_| !rng.one_in(3)).unwrap_or_else(|| shared.hot_block(&mut rng));
                match rng.below(4) {
                    0 => shared.discard_block(&mut rng),
                    // Whoever writes to a block of another program may have to move it, one at a time: within such a move, on the
                    // same thread, that would wait for itself.
                    _ if shared.shape.elsewhere.is_some() => shared.discard_block(&mut rng),
                    _ => shared.write(&mut rng, block),
                }
            }
            busy.store(false, std::sync::atomic::Ordering::SeqCst);
        })));
    }

    /// Runs `steps` random requests. Stops early when the disk has stopped after an injected fault.
    pub fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            let shared = Arc::clone(&self.shared);
            let rng = &mut self.rng;
            if shared.faults && rng.one_in(3) {
                let fault = FAULTS[rng.below(FAULTS.len() as u64) as usize];
                let count = if rng.one_in(3) { 100 } else { 1 };
                self.vfs.set_faults(FaultPlan::new(fault, rng.below(4), count));
            }
            match rng.below(64) {
                0..=29 => {
                    let block = shared.hot_block(rng);
                    *shared.writing.lock().unwrap() = Some(block);
                    shared.write(rng, block);
                    *shared.writing.lock().unwrap() = None;
                }
                30..=34 => shared.zero(rng, ZeroMode::MayPunch),
                35..=37 => shared.zero(rng, ZeroMode::KeepAllocated),
                38..=44 => shared.discard_block(rng),
                45..=61 => drop(shared.flush()),
                62 => self.restart(true),
                _ => self.restart(false),
            }
            self.injected += self.vfs.injected_faults();
            self.vfs.set_faults(FaultPlan::default());
            let stopped = shared.is_stopped();
            drop(shared);
            if stopped {
                self.restart(false);
            }
        }
    }

    /// Closes the disk (which may fail), or kills its process (the page cache survives that), and opens it again.
    fn restart(&mut self, cleanly: bool) {
        let called = self.vfs.tick();
        let disk = self.shared.disk.lock().unwrap().take().expect("the disk is open");
        let closed = cleanly && disk.close().is_ok();
        {
            let mut history = self.shared.history.lock().unwrap();
            match closed {
                true => history.flushed(called, self.vfs.tick()),
                false if self.shared.faults => history.flush_failed(self.vfs.tick()),
                false => {}
            }
        }
        drop(disk);
        self.injected += self.vfs.injected_faults();
        self.vfs.set_faults(FaultPlan::default());
        if closed && self.shape.elsewhere.is_some() && self.rng.one_in(2) {
            cowvhd::upgrade(Arc::new(self.vfs.clone()), Path::new(PATH)).unwrap();
        }
        self.open();
        let content = read_hot(&self.shared.disk(), self.shape).unwrap();
        let mut history = self.shared.history.lock().unwrap();
        check_content(&history, u64::MAX, &content, false).unwrap();
        let points = self.vfs.take_crash_points();
        self.segments.push(Segment { history: history.clone(), points });
        // After a failed sync the cache may show what the medium does not hold: then the history just goes on.
        if !self.shared.faults {
            history.restart();
            for (first, bytes) in content {
                history.continue_from(first, &bytes);
            }
        }
    }

    /// What the disk shows now is what was written last, whatever was flushed.
    pub fn check_live(&self) {
        let history = self.shared.history.lock().unwrap();
        for (first, content) in read_hot(&self.shared.disk(), self.shape).unwrap() {
            history.check_current(first, &content).unwrap();
        }
    }

    /// All crash points of the workload, the last one being this moment.
    pub fn finish(mut self) -> Vec<Segment> {
        self.vfs.set_hook(None);
        let mut points = self.vfs.take_crash_points();
        points.push(self.vfs.crash_now());
        let history = self.shared.history.lock().unwrap().clone();
        self.segments.push(Segment { history, points });
        self.segments
    }
}

/// Where the locator of [`FOREIGN_CHILD`] stands, its space, and what it says.
pub const LOCATOR: (u64, u32, &[u8]) = (8192, 512, b".\0\\\0p\0a\0r\0e\0n\0t\0.\0v\0h\0d\0");

/// Makes a disk, with its parent if it has one. What the parent holds enters the history.
pub fn create(vfs: &SimVfs, shape: Shape, seed: u64, history: &mut History) {
    let options = CreateOptions::new(shape.size)
        .test_geometry(shape.block_bytes, shape.ring_bytes)
        .vfs(Arc::new(vfs.clone()));
    let options = if shape.fixed { options.fixed() } else { options };
    if shape.child {
        options.create(Path::new(PARENT_PATH)).unwrap();
        write_parent(vfs, shape, history, &mut Rng::new(seed));
    }
    if let Some(elsewhere) = shape.elsewhere {
        write_elsewhere(vfs, shape, elsewhere, history, &mut Rng::new(seed));
    } else if shape.child {
        CreateOptions::child_of(Path::new(PARENT_PATH))
            .test_geometry(shape.block_bytes, shape.ring_bytes)
            .vfs(Arc::new(vfs.clone()))
            .create(Path::new(PATH))
            .unwrap();
    } else {
        options.create(Path::new(PATH)).unwrap();
    }
    if shape.canaries {
        leave_canaries(vfs, shape);
    }
}

/// Fills parts of about half of the hot blocks of the parent, and closes it.
fn write_parent(vfs: &SimVfs, shape: Shape, history: &mut History, rng: &mut Rng) {
    let disk = OpenOptions::new().vfs(Arc::new(vfs.clone())).open(Path::new(PARENT_PATH)).unwrap();
    let in_block = u64::from(shape.block_bytes) / SECTOR;
    for block in shape.hot_blocks.iter().cloned().flatten().filter(|_| !rng.one_in(2)).collect::<Vec<_>>() {
        for _ in 0..2 {
            let first = (block * in_block + rng.below(in_block)).min(shape.size / SECTOR - 1);
            let count = (1 + rng.below(in_block)).min(shape.size / SECTOR - first);
            let mut buf = vec![0; (count * SECTOR) as usize];
            History::fill(history.new_value(), &mut buf);
            disk.write_at(&buf, first * SECTOR).unwrap();
            history.continue_from(first, &buf);
        }
    }
    disk.close().unwrap();
}

impl Shape {
    /// The part of the file where a guest's data shares physical sectors with metadata, and with other blocks: there a drive that
    /// leaves garbage is as bad as on the disk that the other program made.
    pub fn spared(&self) -> (u64, u64) {
        match self.elsewhere {
            Some(Elsewhere { packed: true, .. }) => {
                let blocks = self.size.div_ceil(self.block_bytes.into());
                (4096, 2048 + blocks * (512 + u64::from(self.block_bytes)))
            }
            _ => (0, 0),
        }
    }
}

/// Writes an image as another program would, with data in about half of its blocks, and clear bits in some.
#[allow(dead_code, reason = "not every test has one")]
pub fn write_elsewhere(
    vfs: &SimVfs,
    shape: Shape,
    elsewhere: Elsewhere,
    history: &mut History,
    rng: &mut Rng,
) {
    let in_block = u64::from(shape.block_bytes) / SECTOR;
    let blocks = shape.size.div_ceil(shape.block_bytes.into());
    let id = UniqueId::from_bytes([9; 16]);
    let disk_type = if shape.child { DiskType::Differencing } else { DiskType::Dynamic };
    let footer = Footer::new(disk_type, shape.size, id, Timestamp(1)).to_bytes();
    let mut header = DynamicHeader::new(1536, blocks as u32, shape.block_bytes);
    let mut table = vec![0xff; blocks.next_multiple_of(128) as usize * 4];
    let mut at = 1536 + table.len() as u64;
    let mut parts: Vec<(u64, Vec<u8>)> = Vec::new();
    if shape.child {
        let (offset, space, payload) = LOCATOR;
        header.parent_unique_id =
            Footer::parse(&vfs.content(Path::new(PARENT_PATH)).unwrap()[..512]).unwrap().unique_id;
        header.locators[0] = ParentLocator::new(PlatformCode::W2ru, offset, space, payload.len() as u32);
        parts.push((offset, payload.to_vec()));
        at = (offset + u64::from(space)).next_multiple_of(4096);
    }
    parts.extend([(0, footer.to_vec()), (512, header.to_bytes().to_vec())]);
    // In no order.
    for block in (0..blocks).rev().filter(|_| !rng.one_in(2)).collect::<Vec<_>>() {
        if !elsewhere.packed {
            at = (at + 512 + 4096 * rng.below(3)).next_multiple_of(4096) - 512;
        }
        let (mut bits, mut data) = (vec![0xff; 512], vec![0; shape.block_bytes as usize]);
        History::fill(history.new_value(), &mut data);
        if rng.one_in(3) {
            let first = rng.below(in_block);
            // Of a disk with a parent some of what is behind that shows through, in pieces of any size.
            let first_absent = if shape.child { first + rng.below(in_block - first) } else { in_block };
            data[(first * SECTOR) as usize..(first_absent * SECTOR) as usize].fill(0);
            for sector in first..first_absent {
                bits[sector as usize / 8] &= !(0x80 >> (sector % 8));
            }
        }
        let first = block * in_block;
        let sectors = in_block.min(shape.size / SECTOR - first);
        let is_present = |sector: u64| !shape.child || bits[sector as usize / 8] & 0x80 >> (sector % 8) != 0;
        for sector in (0..sectors).filter(|&sector| is_present(sector)) {
            let at = (sector * SECTOR) as usize;
            history.continue_from(first + sector, &data[at..at + SECTOR as usize]);
        }
        table[block as usize * 4..][..4].copy_from_slice(&((at / SECTOR) as u32).to_be_bytes());
        bits.extend(data);
        let length = bits.len() as u64;
        parts.push((at, bits));
        at += length;
    }
    parts.push((1536, table));
    parts.push((at, footer[..elsewhere.footer_bytes].to_vec()));
    let file = vfs.create_new(Path::new(PATH)).unwrap();
    for (at, bytes) in parts {
        assert_eq!(file.write_at(&bytes, at).unwrap(), bytes.len());
    }
    file.sync_data().unwrap();
    vfs.sync_dir(Path::new("/")).unwrap();
}

/// Fills the disk with a value that no request writes; then another program takes its blocks out of the table, and leaves
/// that value in their pages, too.
fn leave_canaries(vfs: &SimVfs, shape: Shape) {
    let path = Path::new(PATH);
    let disk = OpenOptions::new().vfs(Arc::new(vfs.clone())).open(path).unwrap();
    let mut canaries = vec![0; shape.size as usize];
    History::fill(CANARY, &mut canaries);
    disk.write_at(&canaries, 0).unwrap();
    disk.close().unwrap();
    let image = vfs.content(path).unwrap();
    let table = u64::from_be_bytes(image[512 + 16..512 + 24].try_into().unwrap());
    let blocks = shape.size.div_ceil(shape.block_bytes.into());
    for block in 0..blocks as usize {
        let entry = table as usize + 4 * block;
        let bitmap = u32::from_be_bytes(image[entry..entry + 4].try_into().unwrap());
        vfs.foreign_write(path, u64::from(bitmap) * SECTOR - 7 * SECTOR, &canaries[..8 * SECTOR as usize]);
    }
    vfs.foreign_write(path, table, &vec![0xff; 4 * blocks as usize]);
}

/// Reads the blocks that requests go to: (first sector, content).
pub fn read_hot(disk: &Disk, shape: Shape) -> cowvhd::Result<Vec<(u64, Vec<u8>)>> {
    hot_parts(shape, |at, buf| disk.read_at(buf, at))
}

pub fn hot_parts<E>(
    shape: Shape,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<Vec<(u64, Vec<u8>)>, E> {
    let mut parts = Vec::new();
    for blocks in shape.hot_blocks {
        // A write may reach into the block behind the last hot one.
        let start = blocks.start * u64::from(shape.block_bytes);
        let end = ((blocks.end + 1) * u64::from(shape.block_bytes)).min(shape.size);
        let mut content = vec![0xee; (end - start) as usize];
        read(start, &mut content)?;
        parts.push((start / SECTOR, content));
    }
    Ok(parts)
}

pub fn check_content(
    history: &History,
    at: u64,
    parts: &[(u64, Vec<u8>)],
    garbage: bool,
) -> Result<(), String> {
    for (first, content) in parts {
        history.check(at, *first, content, garbage).map_err(|violation| format!("O2: {violation}"))?;
    }
    Ok(())
}
