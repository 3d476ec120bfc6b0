//! A real power cut: the server runs inside a guest, with its image on that guest's own ext4, and the guest's QEMU gets
//! SIGKILL. What server and kernel there had not flushed is gone with the guest's memory.
//!
//! In the same guest the kernel's NBD client is on our disk, with ext4 and the workload on top. After each cut the
//! guest boots again: the outer file system replays its journal, the server recovers the image, the inner file system
//! replays its journal, and every durable step must be there. How much of the unflushed data reaches the outer disk by
//! itself, and in what order, changes from cycle to cycle.
//!
//! The second test cuts the power of the same machine with a server whose flushes do nothing. There durable steps must
//! be lost: or else the first test could not fail.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use support::guest::{Disk, Guest, System};
use support::process::{run, tool};
use support::random::{Random, cycles, seed};
use support::server::Server;
use tempfile::TempDir;

/// On the outer file system.
const IMAGE: &str = "disk.vhd";
/// No write-back but what a flush asks for.
const NEVER: (u32, u32) = (0, 60_000);

#[test]
fn what_was_flushed_survives_a_power_cut() {
    let mut machine = Machine::new(seed("guest_power_cut"));
    for cycle in 0..cycles(5) {
        let started = Instant::now();
        let mut guest = machine.boot(&format!("test.fresh={}", u8::from(cycle == 0)));
        guest.must_be_intact(machine.durable);
        let verified = started.elapsed();
        machine.cut_power(guest);
        let durable = machine.durable;
        println!(
            "cycle {cycle}: verified in {verified:.1?}, cut at {durable} after {:.1?}",
            started.elapsed()
        );
    }
    let mut guest = machine.boot("test.then=check");
    guest.must_be_intact(machine.durable);
    guest.checked();
    machine.other_readers_accept_the_image();
}

#[test]
fn without_flushes_a_power_cut_loses_data() {
    let mut machine = Machine::new(seed("without_flushes"));
    // The file systems and the image are made with an honest server.
    let mut guest = machine.boot("test.fresh=1");
    guest.must_be_intact(machine.durable);
    machine.cut_power(guest);

    let mut guest = machine.boot_with(NEVER, 600, "test.server=without-flush");
    guest.must_be_intact(machine.durable);
    let honest = machine.durable;
    machine.cut_power(guest);

    let mut guest = machine.boot("");
    match guest.verdict(machine.durable) {
        Ok(()) => {
            panic!("steps {honest} to {} survived without a flush: this test is blind", machine.durable)
        }
        Err(lost) => println!("as it must be: {lost}"),
    }
}

/// The guest with its disk, and what is known to be durable there.
struct Machine {
    seed: u64,
    random: Random,
    durable: u64,
    system: System,
    disk: PathBuf,
    // Last: removed after all that use it.
    dir: TempDir,
}

impl Machine {
    fn new(seed: u64) -> Self {
        let server = Server::under_test();
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("outer.raw");
        File::create(&disk).and_then(|file| file.set_len(4 << 30)).unwrap();
        run(tool("mkfs.ext4").arg("-q").arg(&disk));
        let script = server.guest_script(&Path::new("/outer").join(IMAGE), "2G");
        let system = System::build(dir.path(), &server.programs(), &script);
        Machine { seed, random: Random::new(seed), durable: 0, system, disk, dir }
    }

    fn boot(&mut self, parameters: &str) -> Guest {
        // From "nothing by itself" to "almost at once", in hundredths of a second.
        let intervals = [NEVER, (5, 1), (20, 50), (100, 300)];
        let interval = intervals[self.random.between(0, intervals.len() as u64) as usize];
        let commit = [1, 600][self.random.between(0, 2) as usize];
        self.boot_with(interval, commit, parameters)
    }

    /// Boots with these intervals of write-back, and seconds between the outer file system's own commits.
    fn boot_with(&self, (writeback, expire): (u32, u32), commit: u32, parameters: &str) -> Guest {
        let Machine { seed, durable, .. } = self;
        let parameters = format!(
            "test.place=nested test.seed={seed} test.durable={durable} test.outer=commit={commit} \
             test.writeback={writeback} test.expire={expire} {parameters}"
        );
        println!("boots with {parameters}");
        self.system.boot(&Disk::Raw(self.disk.clone()), &parameters)
    }

    fn cut_power(&mut self, mut guest: Guest) {
        let target = self.durable + self.random.between(20, 200);
        let durable = guest.wait_until_durable(target);
        // The moment between two flushes is part of what is random.
        std::thread::sleep(Duration::from_micros(self.random.between(0, 20_000)));
        self.durable = guest.kill().unwrap_or(durable);
    }

    /// Once closed, the image is a VHD file like any other.
    fn other_readers_accept_the_image(&self) {
        let image = self.dir.path().join(IMAGE);
        run(tool("debugfs").arg("-R").arg(format!("dump {IMAGE} {}", image.display())).arg(&self.disk));
        run(tool("qemu-img").args(["info", "-f", "vpc"]).arg(&image));
        run(tool("7zz").args(["t", "-tvhd"]).arg(&image));
        run(tool("vhdiinfo").arg(&image));
    }
}
