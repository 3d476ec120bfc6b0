//! A guest lives on a disk of ours while server and hypervisor are killed again and again.
//!
//! The guest has ext4 on the disk, over NBD. It appends records, rewrites blocks, makes and deletes files, trims, and
//! says on its console which steps are durable. In each cycle server and QEMU get SIGKILL at a random moment and are
//! started again on the same image; the guest then replays its journal and must find every durable step.
//!
//! A killed process leaves the page cache alive: what this test guards is recovery, the order of writes to the image as
//! a process crash sees it, and discards. Flushes are the business of `guest_power_cut`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::{Duration, Instant};

use support::guest::{Disk, System};
use support::random::{Random, cycles, seed};
use support::server::Server;

#[test]
fn what_the_guest_flushed_survives_sigkill() {
    let server = Server::under_test();
    let seed = seed("guest_sigkill");
    let mut random = Random::new(seed);
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.vhd");
    server.create(&image, "2G");
    let system = System::build(dir.path(), &[], "");

    let mut durable = 0;
    for cycle in 0..cycles(5) {
        let started = Instant::now();
        let mut serving = server.serve(&image);
        let fresh = u8::from(cycle == 0);
        let parameters = format!("test.seed={seed} test.durable={durable} test.fresh={fresh}");
        let mut guest = system.boot(&Disk::Nbd(serving.socket().into()), &parameters);
        guest.must_be_intact(durable);
        let verified = started.elapsed();
        let target = durable + random.between(20, 300);
        durable = guest.wait_until_durable(target);
        // The moment between two flushes is part of what is random.
        std::thread::sleep(Duration::from_micros(random.between(0, 20_000)));
        if random.between(0, 2) == 0 {
            serving.kill();
            durable = guest.kill().unwrap_or(durable);
        } else {
            durable = guest.kill().unwrap_or(durable);
            serving.kill();
        }
        println!(
            "cycle {cycle}: verified in {verified:.1?}, killed at {durable} after {:.1?}",
            started.elapsed()
        );
    }

    let serving = server.serve(&image);
    let parameters = format!("test.seed={seed} test.durable={durable} test.then=check");
    let mut guest = system.boot(&Disk::Nbd(serving.socket().into()), &parameters);
    guest.must_be_intact(durable);
    guest.checked();
    serving.close();
}
