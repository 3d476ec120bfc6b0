//! `convert`, `map` and fixed disks on real input: a file system made from a real directory tree, read by other programs.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers are test code too")]

mod tool_support;

use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use tool_support::{Bench, Serving, Signal};

const MIB: u64 = 1 << 20;
/// More than 1 GiB, and no multiple of a block of 2 MiB nor of a page.
const FILE_SYSTEM_BYTES: u64 = (1 << 30) + 5 * 512;
/// What is taken of the directory tree.
const TREE_BYTES: u64 = 64 * MIB;
const TREE_FILES: usize = 1500;

const READ_ALL_WITH_PYVHDI: &str = "
import sys, pyvhdi
image = pyvhdi.file()
image.open(sys.argv[1])
left = image.get_media_size()
while left:
    piece = image.read_buffer(min(left, 1 << 20))
    left -= len(piece)
    sys.stdout.buffer.write(piece)
";

/// Copies files of a tree, in the order of their names, until there are enough.
fn copy_tree(from: &Path, to: &Path, bytes: &mut u64, files: &mut usize) {
    let mut entries: Vec<_> = fs::read_dir(from).unwrap().map(|entry| entry.unwrap()).collect();
    entries.sort_by_key(|entry| entry.file_name());
    for entry in entries {
        if *bytes > TREE_BYTES || *files > TREE_FILES {
            return;
        }
        let (kind, target) = (entry.file_type().unwrap(), to.join(entry.file_name()));
        if kind.is_dir() {
            fs::create_dir(&target).unwrap();
            copy_tree(&entry.path(), &target, bytes, files);
        } else if kind.is_file() && entry.metadata().unwrap().len() < TREE_BYTES / 4 {
            *bytes += fs::copy(entry.path(), &target).unwrap();
            *files += 1;
        }
    }
}

/// A sparse raw disk with an ext4 file system of real files.
fn file_system(bench: &Bench, name: &str) {
    let tree = bench.path("tree");
    fs::create_dir(&tree).unwrap();
    let (mut bytes, mut files) = (0, 0);
    copy_tree(Path::new("/usr/share"), &tree, &mut bytes, &mut files);
    assert!(bytes > 8 * MIB, "/usr/share has only {bytes} bytes");
    File::create(bench.path(name)).unwrap().set_len(FILE_SYSTEM_BYTES).unwrap();
    run(bench.command("/sbin/mkfs.ext4").args(["-q", "-F", "-d", "tree", name]));
    fs::remove_dir_all(tree).unwrap();
    // Behind the file system, in the part of the disk that fills no page.
    let file = File::options().write(true).open(bench.path(name)).unwrap();
    file.write_all_at(b"the very end", FILE_SYSTEM_BYTES - 12).unwrap();
}

fn missing(command: &Command, error: &std::io::Error) -> ! {
    panic!("{:?}: {error}; scripts/install-test-tools installs what the tests need", command.get_program())
}

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| missing(command, &error));
    assert!(output.status.success(), "{command:?}: {output:?}");
    output.stdout
}

/// What a program prints is the content of `file`, byte for byte.
fn must_print(command: &mut Command, file: &Path) {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap_or_else(|error| missing(command, &error));
    must_equal(child.stdout.take().unwrap(), File::open(file).unwrap(), &format!("{command:?}"));
    assert!(child.wait().unwrap().success(), "{command:?}");
}

fn must_equal(mut found: impl Read, mut expected: impl Read, what: &str) {
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    loop {
        let count = expected.read(&mut b).unwrap();
        found.read_exact(&mut a[..count]).unwrap_or_else(|error| panic!("{what}: after byte {at}: {error}"));
        assert!(a[..count] == b[..count], "{what}: differs behind byte {at}");
        if count == 0 {
            assert_eq!(found.read(&mut a).unwrap(), 0, "{what}: it is longer than {at} bytes");
            return;
        }
        at += count;
    }
}

fn same(bench: &Bench, a: &str, b: &str) {
    must_equal(File::open(bench.path(a)).unwrap(), File::open(bench.path(b)).unwrap(), a);
}

fn occupied(bench: &Bench, name: &str) -> u64 {
    fs::metadata(bench.path(name)).unwrap().blocks() * 512
}

/// Every other reader finds the bytes of `raw` in `vhd`.
fn readers_agree(bench: &Bench, raw: &str, vhd: &str) {
    run(bench.command("qemu-img").args(["compare", "-f", "raw", "-F", "vpc", raw, vhd]));
    must_print(bench.command("7zz").args(["e", "-tvhd", "-so", vhd]), &bench.path(raw));
    must_print(bench.command("/usr/bin/python3").args(["-c", READ_ALL_WITH_PYVHDI, vhd]), &bench.path(raw));
}

#[test]
fn a_file_system_goes_through_every_kind_of_image() {
    let bench = Bench::new();
    file_system(&bench, "fs.raw");
    assert_eq!(bench.cowvhd(&["convert", "fs.raw", "fs.vhd"]).must_be(0), "");
    assert_eq!(bench.info("fs.vhd")["virtual-size"], FILE_SYSTEM_BYTES);
    readers_agree(&bench, "fs.raw", "fs.vhd");
    // Whole blocks are taken where there is any data; within them zeros take no space.
    assert!(occupied(&bench, "fs.vhd") < occupied(&bench, "fs.raw") + 8 * MIB);

    bench.cowvhd(&["convert", "fs.vhd", "back.raw"]).must_be(0);
    same(&bench, "back.raw", "fs.raw");
    assert!(occupied(&bench, "back.raw") <= occupied(&bench, "fs.raw"));
    run(bench.command("/sbin/e2fsck").args(["-fn", "back.raw"]));

    bench.cowvhd(&["convert", "fs.vhd", "fixed.vhd", "--to", "fixed"]).must_be(0);
    readers_agree(&bench, "fs.raw", "fixed.vhd");
    assert!(occupied(&bench, "fixed.vhd") <= occupied(&bench, "fs.raw") + MIB);

    // ^C in the middle: nothing is left of the new image, and its old file is as it was.
    let mut command = bench.command(env!("CARGO_BIN_EXE_cowvhd"));
    command.args(["convert", "fs.raw", "fs.vhd", "--force", "--progress=json"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, Signal::INT).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(32), "{ended:?}");
    assert!(String::from_utf8_lossy(&ended.stderr).contains("cancelled"), "{ended:?}");
    assert_eq!(bench.names(), ["back.raw", "fixed.vhd", "fs.raw", "fs.vhd"]);
    let progress: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&progress["phase"], &progress["done"]), (&"copy".into(), &0.into()));
    assert_eq!(progress["total"], FILE_SYSTEM_BYTES);
    assert!(progress["elapsed"].is_number());
    run(bench.command("qemu-img").args(["compare", "-f", "raw", "-F", "vpc", "fs.raw", "fs.vhd"]));
}

/// Azure takes whole MiB and the footer, as a fixed disk.
#[test]
fn a_fixed_disk_for_azure() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "a.vhd", "100M", "--fixed"]).must_be(0);
    let metadata = fs::metadata(bench.path("a.vhd")).unwrap();
    assert_eq!(metadata.len(), 100 * MIB + 512);
    assert!(metadata.blocks() < 100);
    // QEMU has to be told: unasked it looks at the start of a file alone, which in a fixed disk is the guest's.
    let theirs = run(bench.command("qemu-img").args(["info", "--output=json", "-f", "vpc", "a.vhd"]));
    let theirs: Value = serde_json::from_slice(&theirs).unwrap();
    assert_eq!((&theirs["format"], &theirs["virtual-size"]), (&"vpc".into(), &(100 * MIB).into()));
    let ours = bench.info("a.vhd");
    assert_eq!((&ours["vhd-type"], &ours["virtual-size"]), (&"fixed".into(), &(100 * MIB).into()));
    assert_eq!((&ours["journal"], &ours["cluster-size"]), (&"none".into(), &Value::Null));
    assert!(bench.cowvhd(&["info", "a.vhd"]).must_be(0).contains("journal: none (a fixed disk has none)"));

    let serving = bench.serve(&["a.vhd"]);
    let said =
        bench.qemu_io(serving.uri(), &["write -P 7 1M 64k", "flush", "write -z 1M 4k", "discard 90M 10M"]);
    assert!(!said.contains("failed"), "{said}");
    serving.terminate();
    let said = run(bench.command("qemu-io").args(["-f", "vpc", "-c", "read -P 7 1028k 60k", "a.vhd"]));
    assert!(!String::from_utf8_lossy(&said).contains("failed"));
    assert_eq!(fs::metadata(bench.path("a.vhd")).unwrap().len(), 100 * MIB + 512);
    bench.cowvhd(&["create", "huge.vhd", "3T", "--fixed"]).must_be(0);
}

#[test]
fn map_says_what_qemu_img_says() {
    let bench = Bench::new();
    let raw = File::create(bench.path("a.raw")).unwrap();
    raw.set_len(11 * MIB + 512).unwrap();
    raw.write_all_at(&[1; 4096], 2 * MIB).unwrap();
    raw.write_all_at(&[1; 4096], 7 * MIB).unwrap();
    drop(raw);
    bench.cowvhd(&["convert", "a.raw", "dynamic.vhd"]).must_be(0);
    bench.cowvhd(&["convert", "a.raw", "fixed.vhd", "--to", "fixed"]).must_be(0);
    let keys = ["start", "length", "depth", "present", "zero", "offset"];
    for file in ["dynamic.vhd", "fixed.vhd"] {
        let parse = |bytes: &[u8]| serde_json::from_slice::<Vec<Value>>(bytes).unwrap();
        let theirs = parse(&run(bench.command("qemu-img").args(["map", "--output=json", "-f", "vpc", file])));
        let ours = parse(bench.cowvhd(&["map", "--json", file]).must_be(0).as_bytes());
        assert_eq!(ours.len(), theirs.len(), "{ours:?} {theirs:?}");
        for (ours, theirs) in ours.iter().zip(&theirs) {
            for key in keys {
                assert_eq!(ours[key], theirs[key], "{file}: {key} of {ours} and {theirs}");
            }
            // QEMU calls some holes of a fixed disk data that is zero.
            assert_eq!(ours["data"].as_bool(), ours["zero"].as_bool().map(|zero| !zero));
            assert!(file == "fixed.vhd" || ours["data"] == theirs["data"], "{ours} and {theirs}");
        }
        let theirs = run(bench.command("qemu-img").args(["map", "-f", "vpc", file]));
        assert_eq!(bench.cowvhd(&["map", file]).must_be(0).as_bytes(), theirs);
    }
}

#[test]
fn what_is_in_use_is_named_and_what_was_killed_is_read_with_its_journal() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "vm.vhd", "64M"]).must_be(0);
    fs::write(bench.path("a.raw"), vec![3; 1 << 20]).unwrap();
    let serving = bench.serve(&["vm.vhd"]);
    let said = bench.qemu_io(serving.uri(), &["write -P 5 3M 100k", "flush"]);
    assert!(!said.contains("failed"), "{said}");
    let holder = format!("cowvhd (pid {})", serving.id());
    let in_use = format!("in use by {holder}");
    bench.cowvhd(&["convert", "vm.vhd", "b.raw"]).must_say(1, &["vm.vhd", &in_use]);
    bench.cowvhd(&["convert", "a.raw", "vm.vhd", "--force"]).must_say(1, &["vm.vhd", &in_use]);
    bench.cowvhd(&["map", "vm.vhd"]).must_say(1, &[&in_use]);
    bench.cowvhd(&["serve", "vm.vhd", "--nbd", "other.sock"]).must_say(1, &[&in_use]);
    assert_eq!(bench.info("vm.vhd")["in-use-by"], holder);
    serving.kill();
    assert_eq!(bench.info("vm.vhd")["in-use-by"], Value::Null);
    let before = fs::read(bench.path("vm.vhd")).unwrap();
    bench.cowvhd(&["convert", "vm.vhd", "b.raw"]).must_be(0);
    assert!(fs::read(bench.path("vm.vhd")).unwrap() == before);
    let found = fs::read(bench.path("b.raw")).unwrap();
    assert_eq!(found.len(), 64 << 20);
    assert!(found[3 << 20..][..100 << 10].iter().all(|&byte| byte == 5));
}

#[test]
fn info_tells_of_what_another_program_did() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "a.vhd", "64M"]).must_be(0);
    assert_eq!(bench.info("a.vhd")["foreign-changes"], "none");
    let said = run(bench.command("qemu-io").args(["-f", "vpc", "-c", "write -P 9 1M 64k", "a.vhd"]));
    assert!(!String::from_utf8_lossy(&said).contains("failed"));
    assert_eq!(bench.info("a.vhd")["foreign-changes"], "structure");
    assert!(bench.cowvhd(&["info", "a.vhd"]).must_be(0).contains("another program has written to it"));
    Serving::terminate(bench.serve(&["a.vhd"]));
    assert_eq!(bench.info("a.vhd")["foreign-changes"], "none");
    let said = run(bench.command("qemu-io").args(["-f", "vpc", "-c", "write -P 8 1M 64k", "a.vhd"]));
    assert!(!String::from_utf8_lossy(&said).contains("failed"));
    assert_eq!(bench.info("a.vhd")["foreign-changes"], "time");
}

#[test]
fn wrong_use_and_padding_are_said() {
    let bench = Bench::new();
    fs::write(bench.path("a.raw"), vec![1; 1000]).unwrap();
    let ended = bench.cowvhd(&["convert", "a.raw", "a.vhd"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (0, ""));
    assert!(ended.stderr.contains("24 more bytes"), "{ended:?}");
    bench.cowvhd(&["convert", "a.raw", "a.vhd"]).must_say(1, &["exists", "--force"]);
    bench.cowvhd(&["convert", "a.vhd", "b.raw", "--from", "fixed"]).must_say(16, &["dynamic disk"]);
    bench.cowvhd(&["convert", "a.raw", "b.vhd", "--to", "qcow2"]).must_say(16, &["qcow2"]);
    bench.cowvhd(&["convert", "missing.vhd", "b.raw"]).must_say(1, &["missing.vhd"]);
    bench.cowvhd(&["map", "a.raw"]).must_say(1, &["a.raw"]);
    assert_eq!(bench.names(), ["a.raw", "a.vhd"]);
}
