//! Disks past the page cache (`O_DIRECT`), on the file system of cargo's target directory, against a model.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use cowvhd::{CreateOptions, Disk, ErrorKind, OpenOptions, ZeroMode};
use std::fs;
use std::path::Path;
use std::sync::Barrier;

const SIZE: u64 = 24 << 20;
const SECTOR: u64 = 512;

struct Rng(u64);

impl Rng {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    /// Sectors: whole pages, or anything; short, or over the end of a block.
    fn range(&mut self, first: u64, end: u64) -> (u64, u64) {
        let unit = if self.below(2) == 0 { 8 } else { 1 };
        let start = first + self.below((end - first) / unit) * unit;
        let most = if self.below(8) == 0 { 5000 } else { 40 };
        let count = ((1 + self.below(most) / unit) * unit).min(end - start);
        (start, count)
    }
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn open(path: &Path) -> Disk {
    OpenOptions::new().direct(true).open(path).unwrap()
}

/// Random requests to sectors `first..end`, and the same to a model of them; buffers lie anywhere.
fn work(disk: &Disk, rng: &mut Rng, model: &mut [u8], first: u64, end: u64, steps: usize) {
    let mut memory = vec![0u8; (6000 * SECTOR) as usize + 8192];
    for step in 0..steps {
        let (start, count) = rng.range(first, end);
        let at = ((start - first) * SECTOR) as usize;
        let length = (count * SECTOR) as usize;
        let place = match rng.below(3) {
            0 => memory.as_ptr().align_offset(4096),
            _ => rng.below(4096) as usize,
        };
        let buf = &mut memory[place..place + length];
        match rng.below(16) {
            0..7 => {
                buf.fill(rng.below(255) as u8 + 1);
                buf[0] = step as u8;
                disk.write_at(buf, start * SECTOR).unwrap();
                model[at..at + length].copy_from_slice(buf);
            }
            7 => {
                let mode = if rng.below(2) == 0 { ZeroMode::MayPunch } else { ZeroMode::KeepAllocated };
                disk.write_zeroes(start * SECTOR, count * SECTOR, mode).unwrap();
                model[at..at + length].fill(0);
            }
            8 => disk.flush().unwrap(),
            _ => {
                disk.read_at(buf, start * SECTOR).unwrap();
                assert!(buf == &model[at..at + length], "step {step}: sectors {start} + {count}");
            }
        }
    }
}

fn check(disk: &Disk, model: &[u8]) {
    let mut buf = vec![0; model.len()];
    disk.read_at(&mut buf, 0).unwrap();
    let differs = buf.chunks(512).zip(model.chunks(512)).position(|(found, expected)| found != expected);
    assert_eq!(differs, None);
}

#[test]
fn any_request_reads_and_writes_what_it_should() {
    let dir = directory();
    for fixed in [false, true] {
        let path = dir.path().join(format!("disk{fixed}.vhd"));
        // Neither whole blocks nor whole pages.
        let size = SIZE - 7 * SECTOR;
        let options = CreateOptions::new(size);
        if fixed { options.fixed() } else { options }.create(&path).unwrap();
        let mut model = vec![0; size as usize];
        let mut rng = Rng(0x2545_f491 + u64::from(fixed));
        for round in 0..3 {
            let disk = open(&path);
            work(&disk, &mut rng, &mut model, 0, size / SECTOR, 400);
            if round == 1 {
                // Killed: what the next open finds in the journal and in place is what was written.
                disk.flush().unwrap();
            } else {
                disk.close().unwrap();
            }
            drop(disk);
            let disk = OpenOptions::new().read_only(true).open(&path).unwrap();
            check(&disk, &model);
            drop(disk);
            check(&OpenOptions::new().read_only(true).direct(true).open(&path).unwrap(), &model);
        }
    }
}

/// One thread writes whole pages while another one writes a sector in each: the rest of the pages is what the first one wrote.
/// (Through the cache, a page with the old rest could be written back over the new one.)
#[test]
fn a_sector_never_brings_the_old_rest_of_its_page_back() {
    const PAGES: u64 = 16;
    let dir = directory();
    let path = dir.path().join("disk.vhd");
    CreateOptions::new(SIZE).create(&path).unwrap();
    let disk = open(&path);
    let (begin, done) = (Barrier::new(3), Barrier::new(3));
    let rounds = 1..=400u32;
    let value = |round: u32| (round % 250) as u8 + 1;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in rounds.clone() {
                begin.wait();
                (0..PAGES).for_each(|page| disk.write_at(&[value(round); 4096], page * 4096).unwrap());
                done.wait();
            }
        });
        scope.spawn(|| {
            for _ in rounds.clone() {
                begin.wait();
                (0..PAGES).for_each(|page| disk.write_at(&[255; 512], page * 4096 + 1024).unwrap());
                done.wait();
            }
        });
        for round in rounds.clone() {
            begin.wait();
            done.wait();
            let mut buf = vec![0; (PAGES * 4096) as usize];
            disk.read_at(&mut buf, 0).unwrap();
            for (page, bytes) in buf.chunks(4096).enumerate() {
                let wrong = bytes.iter().enumerate().find(|&(at, &byte)| {
                    byte != value(round) && !(byte == 255 && (1024..1536).contains(&at))
                });
                assert_eq!(wrong, None, "round {round}, page {page}, expected {}", value(round));
            }
        }
    });
    disk.close().unwrap();
}

#[test]
fn the_image_is_locked_and_given_back() {
    let dir = directory();
    let path = dir.path().canonicalize().unwrap().join("disk.vhd");
    CreateOptions::new(SIZE).create(&path).unwrap();
    let disk = open(&path);
    // By each descriptor: a transfer of a killed process may still be under way in one when the other one is gone.
    let descriptors = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap());
    let of_image: Vec<_> =
        descriptors.filter(|entry| fs::read_link(entry.path()).is_ok_and(|found| found == path)).collect();
    assert_eq!(of_image.len(), 2);
    for entry in of_image {
        let information = Path::new("/proc/self/fdinfo").join(entry.file_name());
        assert!(fs::read_to_string(information).unwrap().contains("OFDLCK"));
    }
    for direct in [false, true] {
        let second = OpenOptions::new().direct(direct).open(&path).unwrap_err();
        assert_eq!(second.kind(), ErrorKind::InUse, "{second}");
    }
    disk.close().unwrap();
    let other = OpenOptions::new().open(&path).unwrap();
    assert_eq!(OpenOptions::new().direct(true).open(&path).unwrap_err().kind(), ErrorKind::InUse);
    drop(other);
    drop(disk);
    drop(open(&path));
}

#[test]
fn where_there_is_no_way_past_the_cache_an_error_says_so() {
    // Files of /proc take no O_DIRECT.
    use cowvhd::vfs::{Access, DirectVfs, Vfs};
    let error = DirectVfs.open(Path::new("/proc/self/status"), Access::ReadOnly).unwrap_err();
    assert!(error.to_string().contains("O_DIRECT"), "{error}");
    #[cfg(feature = "sim")]
    {
        let vfs = std::sync::Arc::new(cowvhd::sim::SimVfs::new(1));
        let path = Path::new("/disk.vhd");
        CreateOptions::new(SIZE).vfs(vfs.clone()).create(path).unwrap();
        let error = OpenOptions::new().vfs(vfs).direct(true).open(path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
}
