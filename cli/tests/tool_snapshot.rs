//! `snapshot`: of a file, of one that is served, of several at one point; and the VM states that belong to them.

#![allow(clippy::unwrap_used, reason = "helpers are test code too")]

mod tool_support;

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use tool_support::Bench;

fn write(bench: &Bench, file: &str, commands: &[&str]) {
    let serving = bench.serve(&[file]);
    let said = bench.qemu_io(serving.uri(), commands);
    assert!(!said.contains("failed") && said.contains("wrote"), "{said}");
    serving.terminate();
}

fn holds(bench: &Bench, file: &str, commands: &[&str]) {
    let serving = bench.serve(&[file, "--read-only"]);
    let said = bench.qemu_io_with(&["-r"], serving.uri(), commands);
    assert!(!said.contains("failed") && said.contains("read "), "{file}: {said}");
    serving.terminate();
}

fn state(bench: &Bench, arguments: &[&str]) -> serde_json::Value {
    let ended = bench.cowvhd(&[&["snapshot"], arguments, &["--json"]].concat());
    serde_json::from_str(ended.must_be(0)).unwrap()
}

#[test]
fn a_file_and_a_served_one() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "vm.vhd", "1G"]).must_be(0);
    write(&bench, "vm.vhd", &["write -P 1 0 1M"]);
    assert_eq!(bench.cowvhd(&["snapshot", "create", "vm.vhd", "first"]).must_be(0).lines().count(), 1);
    let serving = bench.serve(&["vm.vhd"]);
    let said = bench.qemu_io(serving.uri(), &["write -P 2 0 64k"]);
    assert!(said.contains("wrote"), "{said}");
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "second"]).must_be(0);
    let said =
        bench.qemu_io(serving.uri(), &["read -P 2 0 64k", "read -P 1 64k 64k", "write -P 3 0 64k", "flush"]);
    assert!(said.contains("wrote") && !said.contains("failed"), "{said}");
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "second"]).must_say(1, &["vm@second.vhd", "exists"]);
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "a/b"]).must_say(16, &["a/b"]);
    serving.terminate();
    assert_eq!(bench.names(), ["vm.vhd", "vm@first.vhd", "vm@second.vhd"]);
    holds(&bench, "vm.vhd", &["read -P 3 0 64k", "read -P 1 64k 960k"]);
    holds(&bench, "vm@second.vhd", &["read -P 2 0 64k", "read -P 1 64k 960k"]);
    holds(&bench, "vm@first.vhd", &["read -P 1 0 1M"]);
    bench.cowvhd(&["snapshot", "state", "vm.vhd", "first"]).must_say(1, &["no VM state"]);
}

#[test]
fn a_state_belongs_to_its_snapshot() {
    let bench = Bench::new();
    let serving = bench.serve(&["vm.vhd", "--create", "1G"]);
    let said = bench.qemu_io(serving.uri(), &["write -P 1 0 1M"]);
    assert!(said.contains("wrote"), "{said}");
    let mut ram = vec![7; 5 << 20];
    ram[4096..3 << 20].fill(0);
    fs::write(bench.path("ram.bin"), &ram).unwrap();
    fs::write(bench.path("dev.bin"), "devices").unwrap();
    let parts = ["--state", "ram=ram.bin", "--state", "devices=dev.bin"];
    let create = |name| [&["snapshot", "create", "vm.vhd", name][..], &parts[..]].concat();
    bench.cowvhd(&create("one")).must_be(0);
    // What cannot be read leaves nothing.
    bench
        .cowvhd(&["snapshot", "create", "vm.vhd", "two", "--state", "ram=ram.bin", "--state", "x=missing"])
        .must_say(1, &["missing"]);
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "two", "--state", "ram"]).must_say(16, &["PART=FILE"]);
    assert!(!bench.names().iter().any(|name| name.contains("@two")), "{:?}", bench.names());
    bench.cowvhd(&["snapshot", "resumable", "vm.vhd"]).must_say(1, &["in use"]);
    serving.terminate();

    let found = state(&bench, &["resumable", "vm.vhd", "--verify"]);
    assert_eq!((&found["schema"], &found["verified"]), (&1.into(), &true.into()));
    assert_eq!(found["disks"][0]["filename"], "vm.vhd");
    assert_eq!(found["parts"][0]["name"], "ram");
    assert_eq!(found["parts"][0]["file-size"], 5 << 20);
    assert!(found["parts"][0]["actual-size"].as_u64().unwrap() <= 3 << 20, "{found}");
    let out = bench
        .command(env!("CARGO_BIN_EXE_cowvhd"))
        .args(["snapshot", "state", "vm.vhd", "one", "ram"])
        .output();
    assert!(out.unwrap().stdout == ram);
    write(&bench, "vm.vhd", &["write -P 9 1M 64k"]);
    bench.cowvhd(&["snapshot", "resumable", "vm.vhd"]).must_say(1, &["vm.vhd", "was written to", "clone"]);
    // The snapshot itself is as it was.
    state(&bench, &["state", "vm.vhd", "one", "--verify"]);

    let path = bench.path("vm@one+ram.vmstate");
    assert!(fs::metadata(&path).unwrap().permissions().readonly());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let mut file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.seek(SeekFrom::Start(1 << 20)).unwrap();
    file.write_all(b"x").unwrap();
    bench.cowvhd(&["snapshot", "state", "vm.vhd", "one", "--verify"]).must_say(1, &["vm@one+ram", "changed"]);
    bench.cowvhd(&["snapshot", "state", "vm.vhd", "one", "ram"]).must_say(1, &["vm@one+ram", "changed"]);
    bench.cowvhd(&["snapshot", "state", "vm.vhd", "one", "devices"]).code.eq(&0).then_some(()).unwrap();
    file.set_len(1 << 20).unwrap();
    bench
        .cowvhd(&["snapshot", "state", "vm.vhd", "one"])
        .must_say(1, &["it has 1048576 bytes, and had 5242880"]);
    bench.cowvhd(&["snapshot", "state", "vm.vhd", "one", "disk"]).must_be(1);
}

#[test]
fn another_disks_state_is_refused() {
    let bench = Bench::new();
    fs::write(bench.path("ram.bin"), "ram").unwrap();
    for disk in ["a.vhd", "b.vhd"] {
        bench.cowvhd(&["create", disk, "1G"]).must_be(0);
        bench.cowvhd(&["snapshot", "create", disk, "one", "--state", "ram=ram.bin"]).must_be(0);
    }
    for end in [".vmstate", "+ram.vmstate"] {
        fs::remove_file(bench.path(&format!("a@one{end}"))).unwrap();
        fs::copy(bench.path(&format!("b@one{end}")), bench.path(&format!("a@one{end}"))).unwrap();
    }
    bench.cowvhd(&["snapshot", "state", "a.vhd", "one"]).must_say(1, &["a@one.vmstate", "not the one"]);
    bench.cowvhd(&["snapshot", "state", "b.vhd", "one"]).code.eq(&0).then_some(()).unwrap();
}

#[test]
fn they_are_listed_with_their_states() {
    let bench = Bench::new();
    fs::write(bench.path("ram.bin"), vec![1; 8192]).unwrap();
    let serving = bench.serve(&["vm.vhd", "--create", "1G"]);
    assert_eq!(bench.cowvhd(&["snapshot", "list", "vm.vhd"]).must_be(0), "");
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "one", "--state", "ram=ram.bin"]).must_be(0);
    let said = bench.qemu_io(serving.uri(), &["write -P 1 0 1M", "flush"]);
    assert!(said.contains("wrote"), "{said}");
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "two"]).must_be(0);
    // Neither of these is a snapshot of this disk.
    fs::copy(bench.path("vm@one.vhd"), bench.path("vm@copy.vhd")).unwrap();
    bench.cowvhd(&["create", "vm@other.vhd", "1G"]).must_be(0);
    let found = state(&bench, &["list", "vm.vhd"]);
    let snapshots = found["snapshots"].as_array().unwrap();
    assert_eq!(snapshots.len(), 2, "{found}");
    let one = snapshots.iter().find(|entry| entry["name"] == "one").unwrap();
    let two = snapshots.iter().find(|entry| entry["name"] == "two").unwrap();
    assert_eq!((&one["depth"], &two["depth"]), (&2.into(), &1.into()));
    assert_eq!(one["vm-state"]["parts"][0]["file-size"], 8192);
    assert!(two["vm-state"].is_null() && two["actual-size"].as_u64().unwrap() >= 1 << 20, "{found}");
    let documented = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/tool.md")).unwrap();
    for key in one.as_object().unwrap().keys() {
        assert!(documented.contains(&format!("`{key}`")), "{key}");
    }
    serving.terminate();

    fs::remove_file(bench.path("vm@one+ram.vmstate")).unwrap();
    let said = bench.cowvhd(&["snapshot", "list", "vm.vhd"]);
    assert!(said.must_be(0).contains("VM state that cannot be used"), "{said:?}");
    assert!(said.stdout.lines().any(|line| line.starts_with("two  2")), "{said:?}");
}

#[test]
fn several_disks_at_one_point() {
    let bench = Bench::new();
    fs::write(bench.path("ram.bin"), "ram").unwrap();
    for disk in ["a.vhd", "b.vhd"] {
        bench.cowvhd(&["create", disk, "1G"]).must_be(0);
    }
    write(&bench, "b.vhd", &["write -P 5 0 64k"]);
    bench.cowvhd(&["snapshot", "create", "a.vhd", "a.vhd", "--group", "g"]).must_say(1, &["a.vhd", "in use"]);
    let said =
        bench.cowvhd(&["snapshot", "create", "a.vhd", "b.vhd", "--group", "g", "--state", "ram=ram.bin"]);
    assert_eq!(said.must_be(0).lines().count(), 2);
    assert_eq!(
        bench.names(),
        ["a.vhd", "a@g+ram.vmstate", "a@g.vhd", "a@g.vmstate", "b.vhd", "b@g.vhd", "ram.bin"]
    );
    for disk in ["a.vhd", "b.vhd"] {
        let found = state(&bench, &["state", disk, "g", "--verify"]);
        assert_eq!(found["disks"].as_array().unwrap().len(), 2);
        state(&bench, &["resumable", disk]);
    }
    holds(&bench, "b@g.vhd", &["read -P 5 0 64k"]);
    // Without a state, too.
    bench.cowvhd(&["snapshot", "create", "a.vhd", "b.vhd", "--group", "h"]).must_be(0);
    assert_eq!(state(&bench, &["state", "b.vhd", "h"])["parts"].as_array().unwrap().len(), 0);
    bench.cowvhd(&["snapshot", "create", "a.vhd", "b.vhd", "c"]).must_say(16, &["--group"]);
}

#[test]
fn a_revert_says_which_state_goes_with_the_disk() {
    let bench = Bench::new();
    fs::write(bench.path("ram.bin"), vec![1; 8192]).unwrap();
    bench.cowvhd(&["create", "vm.vhd", "1G"]).must_be(0);
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "one", "--state", "ram=ram.bin"]).must_be(0);
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "two"]).must_be(0);
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "three", "--state", "cpu=ram.bin"]).must_be(0);
    // The disk goes on from the last one, whose state it loses.
    let said = bench.cowvhd(&["snapshot", "revert", "vm.vhd", "two"]);
    assert!(
        said.must_be(0).contains("restored: no VM state")
            && said.stdout.contains("dropped: VM state: cpu 8 KiB"),
        "{said:?}"
    );
    assert!(said.stdout.contains("vm@three.vmstate"), "{said:?}");
    let said = bench.cowvhd(&["snapshot", "revert", "vm.vhd", "one"]);
    assert_eq!(said.must_be(0), "restored: VM state: ram 8 KiB\n");
    state(&bench, &["resumable", "vm.vhd"]);
    // Again the same: nothing is lost.
    let found = state(&bench, &["revert", "vm.vhd", "one"]);
    assert_eq!(found["restored-state"]["parts"][0]["name"], "ram");
    assert_eq!(found["restored-state"]["parts"][0]["file-size"], 8192);
    assert!(found["restored-state"]["error"].is_null() && found["dropped-state"].is_null(), "{found}");
    let found = state(&bench, &["revert", "vm.vhd", "three"]);
    assert_eq!(found["dropped-state"]["parts"][0]["name"], "ram");
    assert!(found["dropped-state"]["filename"].as_str().unwrap().ends_with("vm@one.vmstate"), "{found}");
    // What was written to could not be resumed anyway.
    write(&bench, "vm.vhd", &["write -P 1 0 64k"]);
    fs::remove_file(bench.path("vm@one+ram.vmstate")).unwrap();
    let found = state(&bench, &["revert", "vm.vhd", "one"]);
    assert!(found["restored-state"]["error"].as_str().unwrap().contains("missing"), "{found}");
    assert!(found["dropped-state"].is_null(), "{found}");
}

/// A fixed disk becomes its own first snapshot, stopped or served, and goes on over it.
#[test]
fn fixed_disks() {
    let bench = Bench::new();
    for served in [false, true] {
        let (disk, snapshot) = if served { ("b.vhd", "b@s1.vhd") } else { ("a.vhd", "a@s1.vhd") };
        bench.cowvhd(&["create", disk, "64M", "--fixed"]).must_be(0);
        write(&bench, disk, &["write -P 1 0 1M", "write -P 2 63M 1M"]);
        let serving = served.then(|| bench.serve(&[disk]));
        let group = ["snapshot", "create", disk, "s1", "--state", "ram=ram.bin"];
        fs::write(bench.path("ram.bin"), "ram").unwrap();
        bench.cowvhd(&group).must_say(1, &["fixed disk", "alone"]);
        bench.cowvhd(&["snapshot", "create", disk, "s1"]).must_be(0);
        if let Some(serving) = serving {
            let said = bench.qemu_io(serving.uri(), &["read -P 1 0 1M", "write -P 3 0 64k", "flush"]);
            assert!(said.contains("wrote") && !said.contains("failed"), "{said}");
            serving.terminate();
        } else {
            write(&bench, disk, &["write -P 3 0 64k"]);
        }
        assert!(fs::metadata(bench.path(snapshot)).unwrap().permissions().readonly());
        let (old, new) = (bench.info(snapshot), bench.info(disk));
        assert_eq!((&old["vhd-type"], &old["sealed"]), (&"fixed".into(), &true.into()));
        assert_eq!((&new["vhd-type"], &new["sealed"]), (&"differencing".into(), &false.into()));
        holds(&bench, disk, &["read -P 3 0 64k", "read -P 1 64k 960k", "read -P 2 63M 1M"]);
        holds(&bench, snapshot, &["read -P 1 0 1M", "read -P 2 63M 1M"]);
        bench.cowvhd(&["serve", snapshot]).must_say(1, &["fixed disk", "cowvhd clone"]);
        let listed = state(&bench, &["list", disk]);
        assert_eq!(
            (&listed["snapshots"][0]["name"], &listed["snapshots"][0]["depth"]),
            (&"s1".into(), &1.into())
        );
        let tree = bench.cowvhd(&["tree", disk]).must_be(0).to_string();
        assert!(tree.contains("s1") && tree.contains(snapshot), "{tree}");
        bench.cowvhd(&["check", disk, "--chain"]).must_be(0);
        let at = fs::metadata(bench.path(snapshot)).unwrap().modified().unwrap();
        // As another program leaves it that writes to it.
        let file = fs::File::open(bench.path(snapshot)).unwrap();
        file.set_modified(at + std::time::Duration::from_secs(5)).unwrap();
        let said = bench.cowvhd(&["check", disk, "--chain"]).must_be(0).to_string();
        assert!(said.contains("parent-time") && said.contains("fixed disk"), "{said}");
        file.set_modified(at).unwrap();
        assert!(!bench.cowvhd(&["check", disk, "--chain"]).must_be(0).contains("parent-time"));
        // From the second one on there is a place for a state.
        bench.cowvhd(&["snapshot", "create", disk, "s2", "--state", "ram=ram.bin"]).must_be(0);
        bench.cowvhd(&["clone", snapshot, "clone.vhd"]).must_be(0);
        holds(&bench, "clone.vhd", &["read -P 1 0 1M", "read -P 2 63M 1M"]);
        fs::remove_file(bench.path("clone.vhd")).unwrap();
        bench.cowvhd(&["snapshot", "revert", disk, "s1"]).must_be(0);
        holds(&bench, disk, &["read -P 1 0 1M", "read -P 2 63M 1M"]);
        let deleted = bench.cowvhd(&["snapshot", "delete", disk, "s1"]);
        assert!(deleted.must_be(0).starts_with(&format!("kept: {snapshot}: ")), "{deleted:?}");
        assert_eq!(bench.info(disk)["vhd-type"], "dynamic");
        holds(&bench, snapshot, &["read -P 1 0 1M"]);
        bench
            .cowvhd(&["snapshot", "delete", disk, "s1"])
            .must_say(1, &["does not stand on it", "fixed disk"]);
        holds(&bench, &format!("{}@s2.vhd", &disk[..1]), &["read -P 3 0 64k", "read -P 1 64k 960k"]);
    }
}
