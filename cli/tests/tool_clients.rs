//! A served VHD and other people's clients: libnbd's, QEMU's and fio's, one after the other and at once.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers are test code too")]

mod tool_support;

use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, Stdio};
use tool_support::{Bench, Serving};

const MIB: u64 = 1 << 20;
/// No multiple of a block, nor of a page.
const SIZE: u64 = 97 * MIB + 3 * 512;
/// Where the raw disk holds data: (MiB, MiB).
const DATA: [(u64, u64); 3] = [(0, 1), (6, 5), (96, 1)];

fn raw_disk(bench: &Bench) {
    let raw = File::create(bench.path("a.raw")).unwrap();
    raw.set_len(SIZE).unwrap();
    for (at, length) in DATA {
        let piece: Vec<u8> = (at * MIB..(at + length) * MIB).map(|i| (i % 251) as u8 + 1).collect();
        raw.write_all_at(&piece, at * MIB).unwrap();
    }
}

fn succeeds(bench: &Bench, program: &str, arguments: &[&str]) -> String {
    let ended = bench.run(program, arguments);
    assert_eq!(ended.code, 0, "{program} {arguments:?}: {ended:?}");
    ended.stdout
}

/// `--map` of nbdinfo: (offset, length, type) of extents.
fn map_of_nbdinfo(bench: &Bench, uri: &str) -> Vec<(u64, u64, u64)> {
    let map: Vec<Value> =
        serde_json::from_str(&succeeds(bench, "nbdinfo", &["--map", "--json", uri])).unwrap();
    map.iter().map(|e| ["offset", "length", "type"].map(|key| e[key].as_u64().unwrap()).into()).collect()
}

#[test]
fn copies_go_both_ways_and_maps_and_comparisons_agree() {
    let bench = Bench::new();
    raw_disk(&bench);
    bench.cowvhd(&["create", "vm.vhd", &SIZE.to_string()]).must_be(0);
    let serving = bench.serve(&["vm.vhd"]);
    let uri = serving.uri().to_string();
    assert_eq!(map_of_nbdinfo(&bench, &uri), [(0, SIZE, 3)]);
    succeeds(&bench, "nbdcopy", &["--connections=4", "--flush", "--destination-is-zero", "a.raw", &uri]);
    // What was allocated, in blocks of 2 MiB; neighbours of one kind are one.
    let (data, hole) = (0, 3);
    assert_eq!(
        map_of_nbdinfo(&bench, &uri),
        [
            (0, 2 * MIB, data),
            (2 * MIB, 4 * MIB, hole),
            (6 * MIB, 6 * MIB, data),
            (12 * MIB, 84 * MIB, hole),
            (96 * MIB, SIZE - 96 * MIB, data)
        ]
    );
    let same = succeeds(&bench, "qemu-img", &["compare", "-f", "raw", "-F", "raw", "a.raw", &uri]);
    assert!(same.contains("identical"), "{same}");
    succeeds(&bench, "nbdcopy", &["--connections=4", &uri, "back.raw"]);
    assert!(fs::read(bench.path("back.raw")).unwrap() == fs::read(bench.path("a.raw")).unwrap());
    let [back, raw] =
        ["back.raw", "a.raw"].map(|name| fs::metadata(bench.path(name)).unwrap().blocks() * 512);
    assert!(back < raw + 8 * MIB, "{back} and {raw} bytes");

    // QEMU on the file itself, while it is served: somebody has it.
    for arguments in [&["info"][..], &["compare", "-f", "raw", "a.raw"], &["check", "-f", "vpc"]] {
        let ended = bench.run("qemu-img", &[arguments, &["vm.vhd"]].concat());
        assert!(ended.code != 0 && ended.stderr.contains("lock"), "{arguments:?}: {ended:?}");
    }
    serving.terminate();
    let same = succeeds(&bench, "qemu-img", &["compare", "-f", "raw", "-F", "vpc", "a.raw", "vm.vhd"]);
    assert!(same.contains("identical"), "{same}");
}

/// fio writes a part of the disk at random, flushes now and then, and reads all of it back.
fn fio(bench: &Bench, uri: &str, offset: u64, seed: u32) -> std::process::Child {
    // fio leaves files where it runs.
    let folder = bench.path(&format!("fio-{seed}"));
    fs::create_dir(&folder).unwrap();
    let socket = bench.path("vm.vhd.sock");
    let uri = uri.replace("socket=vm.vhd.sock", &format!("socket={}", socket.display()));
    let mut command = Command::new("fio");
    command.current_dir(folder).args([
        "--name=verify",
        "--ioengine=nbd",
        &format!("--uri={uri}"),
        "--rw=randwrite",
        "--bsrange=512-128k",
        "--blockalign=512",
        &format!("--offset={offset}"),
        "--size=40m",
        "--iodepth=16",
        "--fsync=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        &format!("--randseed={seed}"),
    ]);
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    spawned.unwrap_or_else(|error| panic!("fio: {error}; scripts/install-test-tools installs it"))
}

#[test]
fn two_clients_at_once_find_what_they_wrote_and_so_does_qemu() {
    let bench = Bench::new();
    let serving: Serving = bench.serve(&["vm.vhd", "--create", &SIZE.to_string()]);
    let uri = serving.uri().to_string();
    let clients = [(0, 1), (48 * MIB, 2)].map(|(offset, seed)| fio(&bench, &uri, offset, seed));
    for client in clients {
        let output = client.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && said.contains("err= 0"), "{output:?}");
    }
    succeeds(&bench, "nbdcopy", &[&uri, "copy.raw"]);
    serving.terminate();
    let same = succeeds(&bench, "qemu-img", &["compare", "-f", "raw", "-F", "vpc", "copy.raw", "vm.vhd"]);
    assert!(same.contains("identical"), "{same}");
}

/// The largest dynamic disk, with writes all over it: memory does not grow with its size.
#[test]
fn the_largest_disk_is_served_in_little_memory() {
    let bench = Bench::new();
    let serving = bench.serve(&["vm.vhd", "--create", "2040G"]);
    let writes: Vec<String> =
        (0..400).map(|i| format!("write -P {} {}M 4k", i % 250 + 1, i * 5221)).collect();
    let mut commands: Vec<&str> = writes.iter().map(String::as_str).collect();
    commands.extend(["flush", "read -P 250 1300029M 4k", "read -P 0 1300033M 4k"]);
    let said = bench.qemu_io(serving.uri(), &commands);
    assert!(!said.contains("failed") && said.matches("wrote").count() == 400, "{said}");
    let status = fs::read_to_string(format!("/proc/{}/status", serving.id())).unwrap();
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let most: u64 = most.trim().trim_end_matches(" kB").parse().unwrap();
    println!("{most} KiB at most");
    assert!(most < 32 << 10, "{most} KiB");
    serving.terminate();
}
