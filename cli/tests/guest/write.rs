//! The writing half of the workload: a step counts as durable, and is said to be, only after its fsync has returned.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::plan::{self, BLOCK, BLOCKS, Random, Step};

unsafe extern "C" {
    fn ioctl(fd: i32, request: u64, ...) -> i32;
}

const FITRIM: u64 = 0xc018_5879;
const TCSBRK: u64 = 0x5409;
const NOISE_BYTES: u64 = 4 << 20;

pub fn run(places: &[(&Path, u64)], durable: u64) -> Result<(), String> {
    let open = |&(dir, seed): &(_, _)| Writer::open(dir, seed, durable);
    let writers: std::io::Result<Vec<Writer>> = places.iter().map(open).collect();
    let mut writers = writers.map_err(|error| format!("opening: {error}"))?;
    for n in durable + 1.. {
        let done = writers.iter_mut().try_for_each(|writer| writer.step(n));
        done.map_err(|error| format!("step {n}: {error}"))?;
        say_durable(n).map_err(|error| format!("the console: {error}"))?;
    }
    Ok(())
}

struct Writer<'a> {
    dir: &'a Path,
    seed: u64,
    records: File,
    records_end: u64,
    blocks: File,
    noise: File,
}

impl<'a> Writer<'a> {
    fn open(dir: &'a Path, seed: u64, durable: u64) -> std::io::Result<Self> {
        let open = |name| {
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(dir.join(name))
        };
        fs::create_dir_all(dir.join("files"))?;
        let (records, blocks, noise) = (open("records")?, open("blocks")?, open("noise")?);
        let records_end = records_end(seed, durable);
        // What steps after the durable one left behind is done again.
        records.set_len(records_end)?;
        blocks.set_len(BLOCKS * BLOCK as u64)?;
        for file in [&records, &blocks] {
            file.sync_all()?;
        }
        File::open(dir.join("files"))?.sync_all()?;
        File::open(dir)?.sync_all()?;
        Ok(Writer { dir, seed, records, records_end, blocks, noise })
    }

    fn step(&mut self, n: u64) -> std::io::Result<()> {
        self.unflushed_noise(n)?;
        match plan::step(self.seed, n) {
            Step::Batch { records, blocks } => {
                for block in blocks {
                    self.blocks.write_all_at(&plan::block(self.seed, block, n), block * BLOCK as u64)?;
                }
                let appended: Vec<u8> = records.iter().flat_map(|r| r.bytes(self.seed, n)).collect();
                self.records.write_all_at(&appended, self.records_end)?;
                self.records_end += appended.len() as u64;
                self.blocks.sync_data()?;
                self.records.sync_data()
            }
            Step::Create { sectors } => {
                let mut file = File::create(self.file(n))?;
                file.write_all(&plan::file(self.seed, n, sectors))?;
                file.sync_all()?;
                self.sync_files_dir()
            }
            Step::Delete { created } => {
                match fs::remove_file(self.file(created)) {
                    // An earlier boot may have got that far without saying so.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    done => done?,
                }
                self.sync_files_dir()
            }
            Step::Trim => {
                let mut range = [0_u64, u64::MAX, 0];
                // SAFETY: FITRIM takes a struct fstrim_range, three u64, that lives through the call.
                let done = unsafe { ioctl(self.blocks.as_raw_fd(), FITRIM, range.as_mut_ptr()) };
                if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
            }
        }
    }

    fn file(&self, step: u64) -> std::path::PathBuf {
        self.dir.join("files").join(step.to_string())
    }

    fn sync_files_dir(&self) -> std::io::Result<()> {
        File::open(self.dir.join("files"))?.sync_all()
    }

    /// Writes that no flush waits for, so that some are always under way.
    fn unflushed_noise(&self, n: u64) -> std::io::Result<()> {
        let mut random = Random::new(&[self.seed, n, 7]);
        let length = random.below(32 << 10);
        self.noise.write_all_at(&vec![n as u8; length as usize], random.below(NOISE_BYTES - length))
    }
}

pub fn records_end(seed: u64, durable: u64) -> u64 {
    let length = |n| match plan::step(seed, n) {
        Step::Batch { records, .. } => records.iter().map(|record| record.len() as u64).sum(),
        _ => 0,
    };
    (1..=durable).map(length).sum()
}

/// Waits until the line has left the serial port: what the harness knows is at most a step behind.
fn say_durable(n: u64) -> std::io::Result<()> {
    let mut console = std::io::stdout().lock();
    console.write_all(format!("durable {n} .\n").as_bytes())?;
    console.flush()?;
    // SAFETY: TCSBRK with a non-zero argument only waits for the output queue to drain.
    let done = unsafe { ioctl(1, TCSBRK, 1_u64) };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
