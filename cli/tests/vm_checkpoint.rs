//! A guest counts in its RAM and on two disks, each in a server of its own. Its RAM is saved with a snapshot of both disks, as one;
//! everything is killed; it goes on from that point, twice at once, each on clones of the disks: it counts on from what its RAM
//! knows, on file systems that are of that moment.
//!
//! The counter is the workload's own: the number of its last step stands in the guest's memory alone, and what the steps
//! wrote is on both disks. A guest one of whose disks were of another moment than its RAM would soon be told so by ext4, or by the
//! check at the end, which verifies every step on each disk and runs e2fsck.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::{Path, PathBuf};
use std::time::Instant;

use support::guest::{Disk, System};
use support::process::{output, printed, run, tool};
use support::random::seed;
use support::server::{Server, Serving, tool_under_test};

/// Steps that the guest goes beyond the point that it will be taken back to.
const BEYOND: u64 = 100;

struct Host {
    dir: tempfile::TempDir,
    system: System,
    seed: u64,
}

impl Host {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn cowvhd(&self, arguments: &[&str]) -> String {
        run(tool_under_test().args(arguments).current_dir(self.dir.path()))
    }

    /// What the tool says when it fails.
    fn refused(&self, arguments: &[&str], why: &str) {
        let ended = output(tool_under_test().args(arguments).current_dir(self.dir.path()));
        let said = printed(&ended);
        assert!(ended.status.code() == Some(1) && said.contains(why), "{arguments:?}: {said}");
    }

    fn serve(&self, name: &str) -> (Serving, Disk) {
        let serving = Server::Cowvhd.serve(&self.path(name));
        let disk = Disk::Nbd(serving.socket().into());
        (serving, disk)
    }

    /// Lets `examples/qemu-checkpoint` do what a host does.
    fn example(&self, arguments: &[&str]) {
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/qemu-checkpoint");
        let mut python = tool("python3");
        python.arg(example).args(arguments).current_dir(self.dir.path());
        run(python.env("COWVHD", tool_under_test().get_program()));
    }

    /// Serves two disks, by a server each.
    fn serve_two(&self, names: [&str; 2]) -> ([Serving; 2], Disk) {
        let servers = names.map(|name| Server::Cowvhd.serve(&self.path(name)));
        let disk = Disk::TwoNbd([0, 1].map(|number| servers[number].socket().into()));
        (servers, disk)
    }

    /// Boots afresh from disks that were written to up to step `durable`: all of it is there, and the file systems are in order.
    fn check(&self, names: [&str; 2], durable: u64) {
        let (servers, disk) = self.serve_two(names);
        let parameters =
            format!("test.disks=2 test.seed={} test.durable={durable} test.then=check", self.seed);
        let mut guest = self.system.boot(&disk, &parameters);
        guest.must_be_intact(durable);
        guest.checked();
        servers.into_iter().for_each(Serving::close);
    }
}

#[test]
fn a_machine_goes_on_from_a_checkpoint_and_so_do_its_clones() {
    let dir = tempfile::tempdir().unwrap();
    let system = System::build(dir.path(), &[], "");
    let host = Host { dir, system, seed: seed("vm_checkpoint") };
    let both = ["vm.vhd", "data.vhd"];
    both.iter().for_each(|name| Server::Cowvhd.create(&host.path(name), "2G"));
    let (mut servers, disk) = host.serve_two(both);
    let parameters = format!("test.disks=2 test.seed={} test.fresh=1", host.seed);
    let mut guest = host.system.boot_monitored(&disk, &parameters, &host.path("monitor"));
    guest.must_be_intact(0);
    let before = guest.wait_until_durable(20);
    host.example(&["monitor", "vm.vhd,data.vhd", "one"]);
    let lost = guest.wait_until_durable(before + BEYOND);
    servers.iter_mut().for_each(Serving::kill);
    guest.kill();

    let state = host.path("vm@one+ram.vmstate");
    // What the disks became is of no use to the machine that was saved, and it is told so.
    for name in both {
        Server::Cowvhd.serve(&host.path(name)).close();
        host.refused(&["snapshot", "resumable", name], "was written to");
    }
    let clones = [["c1.vhd", "d1.vhd"], ["c2.vhd", "d2.vhd"]].map(|names| {
        for (name, parent) in names.into_iter().zip(["vm@one.vhd", "data@one.vhd"]) {
            host.cowvhd(&["create", name, "--parent", parent]);
            let said = host.cowvhd(&["snapshot", "resumable", name, "--verify"]);
            assert!(said.contains("vm@one+ram.vmstate") && said.contains("all parts are"), "{said}");
        }
        let (servers, disk) = host.serve_two(names);
        (names, servers, host.system.resume(&disk, &state))
    });
    let reached = clones.map(|(names, servers, mut guest)| {
        let resumed = guest.wait_until_durable(1);
        assert!(
            before < resumed && resumed < lost,
            "{names:?} resumed at {resumed}; saved behind {before}, killed at {lost}"
        );
        let reached = guest.wait_until_durable(resumed + 50);
        let reached = guest.kill().unwrap_or(reached);
        servers.into_iter().for_each(Serving::close);
        (names, reached)
    });
    for (names, reached) in reached {
        host.check(names, reached);
        names.iter().for_each(|name| host.refused(&["snapshot", "resumable", name], "was written to"));
    }
}

/// Times of this machine, for docs/performance.md: from the start of QEMU to the guest's next step.
#[test]
#[ignore = "a measurement"]
fn how_long_resuming_takes() {
    for mib in [256, 2048] {
        let dir = tempfile::tempdir().unwrap();
        let system = System::build(dir.path(), &[], "");
        let host = Host { dir, system, seed: seed("vm_checkpoint") };
        Server::Cowvhd.create(&host.path("vm.vhd"), "2G");
        let (mut serving, disk) = host.serve("vm.vhd");
        let parameters = format!("test.seed={} test.fresh=1", host.seed);
        let ram = host.path("ram");
        let mut guest = host.system.boot_in_file(&disk, &parameters, &host.path("monitor"), (&ram, mib));
        guest.must_be_intact(0);
        guest.wait_until_durable(20);
        host.example(&["monitor", "vm.vhd", "one", "ram"]);
        guest.wait_until_durable(40);
        guest.kill();
        serving.kill();
        let saved = host.path("vm@one+ram.vmstate");
        for round in 0..3 {
            for copied in [false, true] {
                let name = format!("{round}{copied}.vhd");
                host.cowvhd(&["create", &name, "--parent", "vm@one.vhd"]);
                let (mut serving, disk) = host.serve(&name);
                let start = Instant::now();
                let used = if copied { host.path("copy") } else { saved.clone() };
                if copied {
                    std::fs::copy(&saved, &used).unwrap();
                }
                let monitor = format!("{name}.qmp");
                let mut guest = host.system.await_in_file(&disk, &host.path(&monitor), (&used, mib));
                host.example(&["--resume", &monitor, "vm@one+devices.vmstate"]);
                guest.wait_until_durable(1);
                println!(
                    "{mib} MiB, {}: {:.2?}",
                    if copied { "copied first" } else { "mapped" },
                    start.elapsed()
                );
                guest.kill();
                serving.kill();
            }
        }
    }
}
