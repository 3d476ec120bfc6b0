//! `cowvhd check` and `cowvhd repair`: their exit codes and its JSON are what docs/tool.md says.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers are test code too")]

mod tool_support;

use serde_json::Value;
use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use tool_support::Bench;

fn damaged(offset: u64, bytes: &[u8]) -> Bench {
    let bench = Bench::new();
    bench.cowvhd(&["create", "vm.vhd", "1G"]).must_be(0);
    let file = fs::OpenOptions::new().write(true).open(bench.path("vm.vhd")).unwrap();
    file.write_all_at(bytes, offset).unwrap();
    bench
}

#[test]
fn exit_codes_are_those_of_fsck_or_of_qemu() {
    let sound = damaged(0, &[]);
    assert!(sound.cowvhd(&["check", "vm.vhd"]).must_be(0).ends_with("in order\n"));
    let broken = damaged(12288, &[0; 512]);
    for (arguments, code) in [
        (&["check", "vm.vhd"][..], 4),
        (&["check", "--strict", "vm.vhd"], 4),
        (&["check", "--exit-code=qemu", "vm.vhd"], 2),
        (&["check", "--exit-code=qemu", "none.vhd"], 1),
        (&["check", "none.vhd"], 8),
        (&["check"], 16),
    ] {
        assert_eq!(broken.cowvhd(arguments).code, code, "{arguments:?}");
    }
    let said = broken.cowvhd(&["check", "vm.vhd"]);
    assert!(said.stdout.starts_with("risk: backup-damaged: header backup at offset 12288: "), "{said:?}");
    assert_eq!(said.stderr, "");
}

#[test]
fn a_disk_in_use_is_not_checked() {
    let bench = damaged(0, &[]);
    let serving = bench.serve(&["vm.vhd"]);
    let ended = bench.cowvhd(&["check", "vm.vhd"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (8, ""));
    assert!(ended.stderr.contains("in use"), "{ended:?}");
    serving.terminate();
}

#[test]
fn every_key_of_the_json_is_documented() {
    let bench = damaged(12288, &[0; 512]);
    let ended = bench.cowvhd(&["check", "--json", "vm.vhd"]);
    let json: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(json["schema"], 1);
    assert_eq!(json["codes"]["backup-damaged"], 1);
    let finding = &json["findings"][0];
    assert_eq!((&finding["code"], &finding["offset"]), (&Value::from("backup-damaged"), &Value::from(12288)));
    let document = include_str!("../../docs/tool.md");
    for key in json.as_object().unwrap().keys().chain(finding.as_object().unwrap().keys()) {
        assert!(document.contains(&format!("`{key}`")), "{key}");
    }
}

#[test]
fn a_repair_is_planned_done_and_undone() {
    let bench = damaged(12288, &[0; 512]);
    let before = fs::read(bench.path("vm.vhd")).unwrap();
    let read = || fs::read(bench.path("vm.vhd")).unwrap();
    for arguments in [&["repair", "vm.vhd"][..], &["repair", "-n", "vm.vhd"]] {
        let planned = bench.cowvhd(arguments);
        assert_eq!(planned.code, 4, "{planned:?}");
        assert!(planned.stdout.contains("\nwould do (-p): "), "{planned:?}");
        assert!(read() == before && bench.names() == ["vm.vhd"]);
    }
    let done = bench.cowvhd(&["repair", "-p", "vm.vhd"]);
    assert_eq!((done.code, done.stderr.as_str()), (1, ""), "{done:?}");
    assert!(
        done.stdout.contains("\nsaved in vm.vhd.undo\n") && done.stdout.ends_with("in order\n"),
        "{done:?}"
    );
    assert_eq!(bench.cowvhd(&["repair", "-y", "vm.vhd"]).code, 0);
    assert_eq!(bench.names(), ["vm.vhd", "vm.vhd.undo"]);
    bench.cowvhd(&["repair", "--undo-apply", "vm.vhd.undo", "vm.vhd"]).must_be(0);
    assert!(read() == before);

    let again = bench.cowvhd(&["repair", "-y", "--json", "vm.vhd"]);
    assert_eq!(again.code, 1);
    let json: Value = serde_json::from_str(&again.stdout).unwrap();
    assert_eq!((&json["changed"], &json["undo"]), (&Value::from(true), &Value::from("vm.vhd.undo-2")));
    let document = include_str!("../../docs/tool.md");
    for key in json.as_object().unwrap().keys() {
        assert!(document.contains(&format!("`{key}`")), "{key}");
    }
    assert_eq!(bench.cowvhd(&["repair", "-n", "-y", "vm.vhd"]).code, 16);
    assert_eq!(bench.cowvhd(&["repair", "-y", "none.vhd"]).code, 8);
}

#[test]
fn going_back_over_later_changes_is_refused() {
    let bench = damaged(12288, &[0; 512]);
    assert_eq!(bench.cowvhd(&["repair", "-p", "vm.vhd"]).code, 1);
    let repaired = fs::read(bench.path("vm.vhd")).unwrap();
    fs::write(bench.path("vm.vhd"), &repaired).unwrap();
    let undo = ["repair", "--undo-apply", "vm.vhd.undo", "vm.vhd"];
    bench.cowvhd(&undo).must_say(8, &["changed after the repair", "--force"]);
    assert_eq!(bench.cowvhd(&[&undo[..], &["--force"]].concat()).code, 0);
}

/// What is lost is listed by its place on the disk, and the exit code says that something is; so it does where a part of the journal is,
/// though nothing tells what was in it.
#[test]
fn a_salvage_says_what_it_saves_and_what_is_lost() {
    let bench = damaged(12288, &[0; 512]);
    let serving = bench.serve(&["vm.vhd"]);
    bench.qemu_io(serving.uri(), &["write -P 7 0 4M", "flush"]);
    serving.terminate();
    let saved = bench.cowvhd(&["repair", "--salvage", "whole.vhd", "vm.vhd"]);
    assert_eq!((saved.code, saved.stdout.as_str()), (0, "whole.vhd: 4194304 bytes of data saved, 0 lost\n"));

    let serving = bench.serve(&["vm.vhd"]);
    bench.qemu_io(
        serving.uri(),
        &["write -P 8 8M 4k", "flush", "write -P 8 12M 4k", "flush", "write -P 8 16M 4k", "flush"],
    );
    serving.kill();
    // An entry with a wrong CRC in the middle of the journal, which starts where the superblock says (FORMAT.md, 4.1).
    let image = fs::read(bench.path("vm.vhd")).unwrap();
    let number = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let ring = number(4096 + 80);
    let file = fs::OpenOptions::new().write(true).open(bench.path("vm.vhd")).unwrap();
    file.write_all_at(&[0xff; 16], ring + 40).unwrap();
    let saved = bench.cowvhd(&["repair", "--salvage", "part.vhd", "vm.vhd"]);
    assert_eq!(saved.code, 4, "{saved:?}");
    assert!(saved.stdout.contains("\nlost: a part of the journal; "), "{saved:?}");
    assert!(saved.stdout.ends_with("part.vhd: 4202496 bytes of data saved, 0 lost\n"), "{saved:?}");

    // The second block loses its end.
    fs::copy(bench.path("whole.vhd"), bench.path("cut.vhd")).unwrap();
    let file = fs::OpenOptions::new().write(true).open(bench.path("cut.vhd")).unwrap();
    file.set_len(file.metadata().unwrap().len() - 512 - (1 << 20)).unwrap();
    let saved = bench.cowvhd(&["repair", "--salvage", "rest.vhd", "cut.vhd"]);
    assert_eq!(saved.code, 4, "{saved:?}");
    assert!(saved.stdout.contains("\nlost: 1048576 bytes at offset 3145728 of the disk\n"), "{saved:?}");
    let said = bench.cowvhd(&["repair", "--salvage", "rest.vhd", "cut.vhd"]);
    assert_eq!(said.code, 8, "{said:?}");
    assert!(said.stderr.contains("rest.vhd") && said.stderr.contains("exists"), "{said:?}");
}

/// The findings of a chain name their files; a parent that has moved is found, named, and the naming undone.
#[test]
fn a_chain_is_checked_and_linked_again() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "base.vhd", "64M"]).must_be(0);
    bench.cowvhd(&["create", "middle.vhd", "--parent", "base.vhd"]).must_be(0);
    bench.cowvhd(&["create", "vm.vhd", "--parent", "middle.vhd"]).must_be(0);
    let said = bench.cowvhd(&["check", "--chain", "vm.vhd"]);
    assert!(said.must_be(0).ends_with("vm.vhd: chain of 3 layers: in order\n"), "{said:?}");

    fs::create_dir(bench.path("elsewhere")).unwrap();
    fs::rename(bench.path("base.vhd"), bench.path("elsewhere/moved.vhd")).unwrap();
    assert_eq!(bench.cowvhd(&["check", "vm.vhd"]).code, 0);
    let ended = bench.cowvhd(&["check", "--chain", "--json", "vm.vhd"]);
    assert_eq!(ended.code, 4);
    let json: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(json["findings"][0]["code"], "parent-moved");
    assert_eq!(json["findings"][0]["filename"], json["layers"][1]["filename"]);
    assert!(json["layers"][1]["filename"].as_str().unwrap().ends_with("middle.vhd"), "{json}");
    assert!(json["parent-candidates"][0].as_str().unwrap().ends_with("elsewhere/moved.vhd"), "{json}");
    let document = include_str!("../../docs/tool.md");
    for key in json.as_object().unwrap().keys().chain(json["layers"][0].as_object().unwrap().keys()) {
        assert!(document.contains(&format!("`{key}`")), "{key}");
    }

    let before = fs::read(bench.path("middle.vhd")).unwrap();
    assert_eq!(bench.cowvhd(&["repair", "--relink", "middle.vhd"]).code, 4);
    assert!(fs::read(bench.path("middle.vhd")).unwrap() == before);
    let ended = bench.cowvhd(&["repair", "--relink", "-p", "middle.vhd"]);
    assert!(ended.code == 1 && ended.stdout.contains("elsewhere/moved.vhd"), "{ended:?}");
    assert_eq!(bench.cowvhd(&["check", "--chain", "middle.vhd"]).code, 0);
    assert_eq!(bench.cowvhd(&["repair", "--relink", "-p", "middle.vhd"]).code, 0);
    bench.cowvhd(&["repair", "--undo-apply", "middle.vhd.undo", "middle.vhd"]).must_be(0);
    assert!(fs::read(bench.path("middle.vhd")).unwrap() == before);
    // What needs another option is not silently ignored.
    assert_eq!(bench.cowvhd(&["check", "--parent", "x.vhd", "vm.vhd"]).code, 16);
    assert_eq!(bench.cowvhd(&["repair", "-p", "--parent", "x.vhd", "vm.vhd"]).code, 16);
}

/// CRCs are written and told of; damage is told with its place, and exits with 4.
#[test]
fn data_is_verified() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "vm.vhd", "64M"]).must_be(0);
    let disk = cowvhd::OpenOptions::new().open(&bench.path("vm.vhd")).unwrap();
    disk.write_at(&[7; 8192], 4 << 20).unwrap();
    disk.close().unwrap();
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "one"]).must_be(0);
    let said = bench.cowvhd(&["verify", "vm.vhd"]);
    assert!(said.must_be(0).contains("\n  0 bytes of data proven, 2097152 not proven\n"), "{said:?}");
    let said = bench.cowvhd(&["verify", "--seal", "--progress=json", "vm.vhd"]);
    assert!(
        said.must_be(0).starts_with("{\"phase\":\"verify\",\"done\":2097152,\"total\":2097152,"),
        "{said:?}"
    );
    assert!(
        said.stdout.contains("\n  2097152 bytes of data proven, 0 not proven, 1 pages of CRCs written\n"),
        "{said:?}"
    );
    let said = bench.cowvhd(&["verify", "vm@one.vhd"]);
    assert!(said.must_be(0).ends_with("vm@one.vhd: chain of 1 layer: in order\n"), "{said:?}");

    let path = bench.path("vm@one.vhd");
    let mut bytes = fs::read(&path).unwrap();
    let at = (7 << 20) + 4096 + 4096 + 5;
    bytes[at] = 0;
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, bytes).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    let said = bench.cowvhd(&["verify", "--json", "vm.vhd"]);
    assert_eq!(said.code, 4, "{said:?}");
    let json: Value = serde_json::from_str(&said.stdout).unwrap();
    let finding = &json["findings"][0];
    assert_eq!(finding["code"], "data-damaged");
    assert_eq!(
        (&finding["guest-offset"], &finding["guest-length"]),
        (&Value::from((4 << 20) + 4096), &Value::from(4096))
    );
    assert_eq!(finding["offset"], (7 << 20) + 8192);
    assert_eq!(json["layers"][1]["proven-bytes"], 2097152);
    let document = include_str!("../../docs/tool.md");
    for key in json["layers"][1].as_object().unwrap().keys().chain(finding.as_object().unwrap().keys()) {
        assert!(document.contains(&format!("`{key}`")), "{key}");
    }
    assert_eq!(bench.cowvhd(&["verify", "none.vhd"]).code, 8);
    assert_eq!(bench.cowvhd(&["verify", "--what", "vm.vhd"]).code, 16);
}

/// By the name fsck.vhd, with fsck's options.
#[test]
fn fsck_finds_a_checker_of_its_kind() {
    let bench = damaged(12288, &[0; 512]);
    symlink(env!("CARGO_BIN_EXE_cowvhd"), bench.path("fsck.vhd")).unwrap();
    let fsck = |arguments: &[&str]| bench.run("./fsck.vhd", arguments);
    let before = fs::read(bench.path("vm.vhd")).unwrap();
    // There is nobody to ask.
    for arguments in [&["vm.vhd"][..], &["-n", "vm.vhd"], &["-n", "-f", "vm.vhd"], &["-r", "vm.vhd"]] {
        let said = fsck(arguments);
        assert!(
            said.code == 4 && said.stdout.starts_with("risk: backup-damaged: "),
            "{arguments:?} {said:?}"
        );
        assert!(fs::read(bench.path("vm.vhd")).unwrap() == before && !bench.exists("vm.vhd.undo"));
    }
    for flag in ["-a", "-p", "-y"] {
        let said = fsck(&[flag, "-f", "-C", "0", "vm.vhd"]);
        assert!(said.code == 1 && said.stdout.contains("\nsaved in vm.vhd.undo\n"), "{flag} {said:?}");
        assert_eq!(fsck(&[flag, "vm.vhd"]).code, 0);
        assert_eq!(fsck(&["-n", "vm.vhd"]).code, 0);
        bench.cowvhd(&["repair", "--undo-apply", "vm.vhd.undo", "vm.vhd"]).must_be(0);
        fs::remove_file(bench.path("vm.vhd.undo")).unwrap();
        assert!(fs::read(bench.path("vm.vhd")).unwrap() == before);
    }
    // What only -y does, -a leaves.
    assert_eq!(fsck(&["-a", "vm.vhd"]).code, 1);
    fs::File::options()
        .write(true)
        .open(bench.path("vm.vhd"))
        .unwrap()
        .write_all_at(&[0; 8192], 4096)
        .unwrap();
    assert_eq!(fsck(&["-a", "vm.vhd"]).code, 4);
    assert_eq!(fsck(&["-y", "vm.vhd"]).code, 1);
    for (arguments, code) in [
        (&["-n", "none.vhd"][..], 8),
        (&["-a", "none.vhd"], 8),
        (&["-a", "-n", "vm.vhd"], 16),
        (&[], 16),
        (&["-x"], 16),
    ] {
        assert_eq!(fsck(arguments).code, code, "{arguments:?}");
    }
    let help = fsck(&["--help"]);
    assert!(help.code == 0 && help.stdout.contains("fsck.vhd"), "{help:?}");
    // As fsck(8) calls it.
    let path =
        std::env::join_paths([bench.path("").as_os_str(), "/usr/bin".as_ref(), "/bin".as_ref()]).unwrap();
    let fsck = bench
        .command("/usr/sbin/fsck")
        .env("PATH", path)
        .args(["-t", "vhd", "-a", "vm.vhd"])
        .output()
        .unwrap();
    assert_eq!(fsck.status.code(), Some(0), "{fsck:?}");
}

/// The same states of a disk give the codes that `qemu-img check` gives for a qcow2 image.
#[test]
fn exit_codes_are_those_of_qemu_img() {
    const CLUSTER: u64 = 64 << 10;
    let bench = Bench::new();
    let qemu = |file: &str, format: &str| bench.run("qemu-img", &["check", "-f", format, file]).code;
    let ours = |file: &str| bench.cowvhd(&["check", "--exit-code=qemu", file]).code;
    let patch = |file: &str, bytes: &[u8], at: u64| {
        let file = fs::File::options().write(true).open(bench.path(file)).unwrap();
        file.write_all_at(bytes, at).unwrap();
    };
    let u64_at = |file: &str, at: u64| {
        let mut bytes = [0; 8];
        fs::File::open(bench.path(file)).unwrap().read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    for (file, format) in [("a.qcow2", "qcow2"), ("a.vhd", "vpc")] {
        assert_eq!(bench.run("qemu-img", &["create", "-f", format, file, "64M"]).code, 0);
        let io = |command: &str| bench.run("qemu-io", &["-f", format, "-c", command, file]).code;
        assert_eq!((io("write -P 1 0 64k"), io("write -P 2 8M 64k")), (0, 0));
    }
    let refcounts = u64_at("a.qcow2", u64_at("a.qcow2", 48));
    let table = u64_at("a.vhd", 512 + 16);
    let in_order = (qemu("a.qcow2", "qcow2"), ours("a.vhd"));

    let copy = |from: &str, to: &str| fs::copy(bench.path(from), bench.path(to)).map(drop).unwrap();
    // Space that nothing uses: a cluster that only its count knows; a block without an entry.
    copy("a.qcow2", "leak.qcow2");
    let end = fs::metadata(bench.path("leak.qcow2")).unwrap().len().next_multiple_of(CLUSTER);
    fs::File::options().write(true).open(bench.path("leak.qcow2")).unwrap().set_len(end + CLUSTER).unwrap();
    patch("leak.qcow2", &[0, 1], refcounts + end / CLUSTER * 2);
    copy("a.vhd", "leak.vhd");
    patch("leak.vhd", &[0xff; 4], table + 4 * 4);
    let leak = (qemu("leak.qcow2", "qcow2"), ours("leak.vhd"));

    // A cluster in use that is not counted; two blocks in one place.
    copy("a.qcow2", "bad.qcow2");
    patch("bad.qcow2", &[0, 0], refcounts);
    copy("a.vhd", "bad.vhd");
    let first = u64_at("a.vhd", table).to_be_bytes();
    patch("bad.vhd", &first[..4], table + 4);
    let corrupt = (qemu("bad.qcow2", "qcow2"), ours("bad.vhd"));

    // Damage beside a leak.
    fs::File::options()
        .write(true)
        .open(bench.path("leak.qcow2"))
        .unwrap()
        .write_all_at(&[0, 0], refcounts)
        .unwrap();
    patch("leak.vhd", &[0, 0, 0, 1], table + 4);
    let both = (qemu("leak.qcow2", "qcow2"), ours("leak.vhd"));

    // No such file; a format, or a version, that cannot be checked.
    let missing = (qemu("none.qcow2", "qcow2"), ours("none.vhd"));
    bench.cowvhd(&["create", "newer.vhd", "64M"]).must_be(0);
    let mut page = vec![0; 4096];
    fs::File::open(bench.path("newer.vhd")).unwrap().read_exact_at(&mut page, 4096).unwrap();
    page[39] = 0x40;
    let crc = crc32(&page[..4092]);
    page[4092..].copy_from_slice(&crc.to_be_bytes());
    patch("newer.vhd", &page, 4096);
    let unsupported = (qemu("newer.vhd", "raw"), ours("newer.vhd"));

    let pairs = [in_order, leak, corrupt, both, missing, unsupported];
    assert_eq!(pairs, [(0, 0), (3, 3), (2, 2), (2, 2), (1, 1), (63, 63)]);
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}
