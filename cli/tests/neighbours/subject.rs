//! The disks that are compared: QEMU's formats behind its storage daemon, and ours behind its server. Each is driven over
//! NBD, and what it writes to its image file is recorded.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use cowvhd::vfs::{Access, File, FileIdentity, FileTime, HostVfs, LockMode, Vfs};
use cowvhd::{CreateOptions, OpenOptions};
use cowvhd_export::{NbdAddress, Server, ServerOptions};

use super::medium::{Change, Log, Medium};
use super::workload::SIZE;
use crate::support::process::{Process, output, printed, run, tool};

const ENOSPC: i32 = 28;
const SECTOR: usize = 512;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// One of QEMU's drivers, with its options for `qemu-img create`.
    Qemu(&'static str, &'static str),
    Cowvhd,
}

/// Where an operation on the file stands among the others, for a guest that wants to know what was done by now.
pub type Position<'a> = &'a dyn Fn() -> u64;

impl Subject {
    pub const ALL: [Subject; 4] = [
        Subject::Qemu("vpc", "subformat=dynamic,force_size=on"),
        Subject::Qemu("vhdx", "block_size=2M,log_size=1M"),
        Subject::Qemu("qcow2", "cluster_size=64k"),
        Subject::Cowvhd,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Subject::Qemu(format, _) => format,
            Subject::Cowvhd => "cowvhd",
        }
    }

    pub fn create(self, image: &Path) {
        match self {
            Subject::Qemu(format, options) => {
                let size = SIZE.to_string();
                run(tool("qemu-img")
                    .args(["create", "-q", "-f", format, "-o", options])
                    .arg(image)
                    .arg(size));
            }
            Subject::Cowvhd => CreateOptions::new(SIZE).create(image).expect("an image"),
        }
    }

    /// Serves the image while `guest` works on it, kills the server, and returns what was written. The write number
    /// `no_space` of those to the file, from 1, fails with `ENOSPC`.
    pub fn record(self, image: &Path, no_space: Option<u64>, guest: impl FnOnce(&Path, Position)) -> Log {
        match self {
            Subject::Qemu(format, _) => record_qemu(format, image, no_space, guest),
            Subject::Cowvhd => record_cowvhd(image, no_space, guest),
        }
    }

    /// Opens an image after a crash, with its own recovery, and reads all of it.
    pub fn read_back(self, medium: &mut Medium, final_length: u64, dir: &Path) -> Result<Vec<u8>, String> {
        let image = dir.join("state");
        match self {
            Subject::Qemu(format, _) => {
                // VHDX files grow by truncation, which the log does not show: the longest is always safe.
                if format == "vhdx" {
                    medium.extend(final_length);
                }
                medium.store(&image);
                let raw = dir.join("raw");
                if format == "vhdx" {
                    // Its log is replayed only by those who may write.
                    succeed(
                        tool("qemu-io").args(["-t", "unsafe", "-f", format, "-c", "read 0 512"]).arg(&image),
                    )?;
                }
                succeed(tool("qemu-img").args(["convert", "-f", format, "-O", "raw"]).arg(&image).arg(&raw))?;
                fs::read(&raw).map_err(|error| error.to_string())
            }
            Subject::Cowvhd => {
                let _ = fs::remove_file(&image);
                medium.store(&image);
                let disk = OpenOptions::new().open(&image).map_err(|error| error.to_string())?;
                let mut content = vec![0xee; SIZE as usize];
                disk.read_at(&mut content, 0).map_err(|error| error.to_string())?;
                Ok(content)
            }
        }
    }
}

fn succeed(command: &mut Command) -> Result<(), String> {
    let output = output(command);
    let said = printed(&output);
    // qemu-io says so and succeeds.
    let failed = !output.status.success() || said.contains("read failed");
    if failed { Err(said.trim().to_string()) } else { Ok(()) }
}

/// The storage daemon with the format's driver over blkdebug, which fails writes, over blklogwrites, which logs them.
fn record_qemu(
    format: &str,
    image: &Path,
    no_space: Option<u64>,
    guest: impl FnOnce(&Path, Position),
) -> Log {
    let beside = |suffix: &str| PathBuf::from(format!("{}.{suffix}", image.display()));
    let (log, socket) = (beside("log"), beside("sock"));
    fs::write(&log, []).expect("a log");
    let mut failing = String::new();
    if let Some(number) = no_space {
        // From 1 each write adds one to the state, and does no more beyond the one that fails.
        let states: Vec<_> = (1..=number)
            .map(|n| format!(r#"{{"event":"pwritev","state":{n},"new_state":{}}}"#, n + 1))
            .collect();
        failing = format!(
            r#","set-state":[{}],"inject-error":[{{"event":"pwritev","state":{number},"errno":{ENOSPC},"once":true}}]"#,
            states.join(",")
        );
    }
    let mut command = tool("qemu-storage-daemon");
    for node in [
        format!(r#"{{"driver":"file","node-name":"image","filename":"{}"}}"#, image.display()),
        format!(r#"{{"driver":"file","node-name":"log","filename":"{}"}}"#, log.display()),
        r#"{"driver":"blklogwrites","node-name":"logged","file":"image","log":"log","log-sector-size":512}"#
            .to_string(),
        format!(r#"{{"driver":"blkdebug","node-name":"failing","image":"logged"{failing}}}"#),
        format!(r#"{{"driver":"{format}","node-name":"disk","file":"failing"}}"#),
    ] {
        command.args(["--blockdev", &node]);
    }
    command.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())]);
    command.args(["--export", "type=nbd,id=export,node-name=disk,name=,writable=on"]);
    // Options take effect in their order: the monitor greets when clients can connect.
    command.args(["--chardev", "stdio,id=monitor", "--monitor", "chardev=monitor"]);
    let mut daemon = Process::spawn(&command);
    daemon.wait_for("a greeting", |line| line.contains("\"QMP\"").then_some(()));
    let sectors = || fs::metadata(&log).map_or(0, |log| log.len() / SECTOR as u64);
    guest(&socket, &sectors);
    daemon.kill();
    parse(&fs::read(&log).expect("the log"))
}

/// Reads a log of the format of dm-log-writes, little-endian: a superblock, then entries of one sector with their data.
fn parse(bytes: &[u8]) -> Log {
    const FLUSH: u64 = 1;
    const FUA: u64 = 2;
    const DISCARD: u64 = 4;
    let mut log = Log::default();
    let mut at = SECTOR;
    // The count in the superblock is as old as the last flush: what follows the last entry is the end of the file.
    while at + SECTOR <= bytes.len() {
        let (words, _) = bytes[at..at + 24].as_chunks::<8>();
        let [sector, sectors, flags] = [0, 1, 2].map(|word| u64::from_le_bytes(words[word]));
        at += SECTOR;
        let data = if flags & DISCARD == 0 { sectors as usize * SECTOR } else { 0 };
        // A kill may cut the log.
        let Some(data) = bytes.get(at..at + data) else { break };
        at += data.len();
        let covers = log.changes.len();
        let offset = sector * SECTOR as u64;
        if flags & FLUSH != 0 {
            // Generous: a write may have completed while this flush was under way.
            log.changes.push(Change::Sync { covers });
            log.positions.push((at / SECTOR) as u64);
        }
        if !data.is_empty() {
            let durable = flags & FUA != 0;
            log.changes.push(Change::Write { offset, bytes: data.to_vec(), durable });
            log.positions.push((at / SECTOR) as u64);
        }
    }
    log
}

fn record_cowvhd(image: &Path, no_space: Option<u64>, guest: impl FnOnce(&Path, Position)) -> Log {
    let recorder = Recorder { shared: Arc::default() };
    let disk = OpenOptions::new().vfs(Arc::new(recorder.clone())).open(image).expect("the image opens");
    {
        let mut shared = recorder.shared.lock().expect("no panics");
        (shared.writes, shared.no_space) = (0, no_space);
    }
    let socket = PathBuf::from(format!("{}.sock", image.display()));
    let address = NbdAddress::Unix(socket.clone());
    let server = Server::bind(&address, Arc::new(disk), ServerOptions::default()).expect("a server");
    let handle = server.shutdown_handle();
    let thread = std::thread::spawn(move || server.run());
    guest(&socket, &|| recorder.shared.lock().expect("no panics").log.changes.len() as u64);
    // The kill: what the file sees from now on does not count.
    let log = std::mem::take(&mut recorder.shared.lock().expect("no panics").log);
    handle.shutdown();
    thread.join().expect("the server's thread").expect("the server");
    log
}

/// The host's files, with what is written to them recorded.
#[derive(Debug, Clone)]
struct Recorder {
    shared: Arc<Mutex<Recorded>>,
}

#[derive(Default)]
struct Recorded {
    log: Log,
    writes: u64,
    no_space: Option<u64>,
}

impl std::fmt::Debug for Recorded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Recorded")
    }
}

impl Recorder {
    fn push(&self, change: Change) {
        let mut shared = self.shared.lock().expect("no panics");
        shared.log.changes.push(change);
        let position = shared.log.changes.len() as u64;
        shared.log.positions.push(position);
    }

    /// Counts a write, and fails it if it is to fail.
    fn count_write(&self) -> io::Result<()> {
        let mut shared = self.shared.lock().expect("no panics");
        shared.writes += 1;
        if shared.no_space == Some(shared.writes) {
            return Err(io::Error::from_raw_os_error(ENOSPC));
        }
        Ok(())
    }

    fn wrap(&self, file: io::Result<Arc<dyn File>>) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(RecordedFile { file: file?, recorder: self.clone() }))
    }
}

impl Vfs for Recorder {
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        self.wrap(HostVfs.open(path, access))
    }
    fn open_beneath(&self, folder: &Path, path: &Path) -> io::Result<Arc<dyn File>> {
        self.wrap(HostVfs.open_beneath(folder, path))
    }
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.wrap(HostVfs.create_new(path))
    }
    fn identity(&self, path: &Path) -> io::Result<FileIdentity> {
        HostVfs.identity(path)
    }
    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        HostVfs.link(from, to)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        HostVfs.rename(from, to)
    }
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        HostVfs.exchange(one, other)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        HostVfs.remove(path)
    }
    fn files(&self, directory: &Path, prefix: &OsStr) -> io::Result<Vec<OsString>> {
        HostVfs.files(directory, prefix)
    }
    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        HostVfs.sync_dir(directory)
    }
    fn random_id(&self) -> io::Result<[u8; 16]> {
        HostVfs.random_id()
    }
    fn now(&self) -> FileTime {
        HostVfs.now()
    }
}

#[derive(Debug)]
struct RecordedFile {
    file: Arc<dyn File>,
    recorder: Recorder,
}

impl File for RecordedFile {
    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.recorder.count_write()?;
        let count = self.file.write_at(buf, offset)?;
        let bytes = buf[..count].to_vec();
        self.recorder.push(Change::Write { offset, bytes, durable: false });
        Ok(count)
    }
    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.recorder.count_write()?;
        self.file.write_durable_at(buf, offset)?;
        self.recorder.push(Change::Write { offset, bytes: buf.to_vec(), durable: true });
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        let covers = self.recorder.shared.lock().expect("no panics").log.changes.len();
        self.file.sync_data()?;
        self.recorder.push(Change::Sync { covers });
        Ok(())
    }
    fn forget_cached(&self, length: u64) -> io::Result<()> {
        self.file.forget_cached(length)
    }
    fn set_len(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)?;
        self.recorder.push(Change::SetLength(length));
        Ok(())
    }
    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.punch_hole(offset, length)?;
        self.recorder.push(Change::Punch { offset, length });
        Ok(())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.file.next_data(offset)
    }
    fn allocated_bytes(&self) -> io::Result<u64> {
        self.file.allocated_bytes()
    }
    fn modified(&self) -> io::Result<FileTime> {
        self.file.modified()
    }
    fn set_modified(&self, time: FileTime) -> io::Result<()> {
        self.file.set_modified(time)
    }
    fn lock(&self, mode: LockMode) -> io::Result<()> {
        self.file.lock(mode)
    }
    fn unlock(&self) -> io::Result<()> {
        self.file.unlock()
    }
    fn identity(&self) -> io::Result<FileIdentity> {
        self.file.identity()
    }
}
