//! `create` and `info`: exit codes, sizes, messages, and the shape of the JSON that scripts rely on.

#![allow(clippy::unwrap_used, reason = "helpers are test code too")]

mod tool_support;

use serde_json::Value;
use std::fs;
use std::os::unix::fs::MetadataExt;
use tool_support::Bench;

#[test]
fn a_new_disk_has_exactly_the_size_asked_for() {
    let bench = Bench::new();
    for (file, size, bytes) in [
        ("a.vhd", "10G", 10737418240u64),
        ("b.vhd", "10737418240", 10737418240),
        ("c.vhd", "512", 512),
        ("d.vhd", "64g", 64 << 30),
        ("e.vhd", "1T", 1 << 40),
        ("f.vhd", "2040G", 2040 << 30),
        ("g.vhd", "104858112", 104858112),
    ] {
        assert_eq!(bench.cowvhd(&["create", file, size]).must_be(0), "");
        assert_eq!(bench.info(file)["virtual-size"], bytes, "{size}");
    }
    let occupied = fs::metadata(bench.path("a.vhd")).unwrap().blocks() * 512;
    assert!(occupied < 4 << 20, "{occupied}");
    // Nothing else is left behind.
    assert_eq!(bench.names().len(), 7, "{:?}", bench.names());
}

#[test]
fn a_size_that_cannot_be_is_a_wrong_use() {
    let bench = Bench::new();
    for (size, words) in [
        ("10Q", &["10Q", "suffix"][..]),
        ("64GB", &["64GB", "1024"]),
        ("1.5G", &["1.5G", "1536M"]),
        ("99999999999999999999", &["larger"]),
        ("0", &["multiple of 512"]),
        ("513", &["multiple of 512"]),
        ("2041G", &["2040 GiB"]),
        ("", &["expected"]),
    ] {
        bench.cowvhd(&["create", "a.vhd", size]).must_say(16, words);
    }
    assert_eq!(bench.names().len(), 0);
}

#[test]
fn an_existing_file_is_never_replaced() {
    let bench = Bench::new();
    fs::write(bench.path("precious"), "data").unwrap();
    bench.cowvhd(&["create", "precious", "1G"]).must_say(1, &["precious", "exists"]);
    assert_eq!(fs::read(bench.path("precious")).unwrap(), b"data");
    assert_eq!(bench.names(), ["precious"]);
}

#[test]
fn a_missing_place_is_named() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "no/such/dir/a.vhd", "1G"]).must_say(1, &["no/such/dir"]);
    bench.cowvhd(&["info", "missing.vhd"]).must_say(1, &["missing.vhd", "No such file"]);
    bench.cowvhd(&["serve", "missing.vhd"]).must_say(1, &["missing.vhd", "No such file"]);
    assert_eq!(bench.names().len(), 0);
}

#[test]
fn what_is_no_vhd_is_refused() {
    let bench = Bench::new();
    fs::write(bench.path("noise"), vec![0x5a; 100_000]).unwrap();
    fs::write(bench.path("empty"), "").unwrap();
    for file in ["noise", "empty"] {
        bench.cowvhd(&["info", file]).must_say(1, &[file]);
        bench.cowvhd(&["serve", file]).must_say(1, &[file]);
    }
    assert_eq!(fs::read(bench.path("noise")).unwrap(), vec![0x5a; 100_000]);
    assert_eq!(bench.names(), ["empty", "noise"]);
}

/// Keys and kinds of values may be added to; none may go or change without a new schema number.
#[test]
fn the_json_of_info_keeps_its_shape() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "a.vhd", "10G"]).must_be(0);
    let printed = bench.cowvhd(&["info", "a.vhd", "--json"]);
    let keys: Vec<&str> = printed
        .must_be(0)
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix('"')?.split_once('"'))
        .map(|(key, _)| key)
        .collect();
    let expected = [
        "schema",
        "filename",
        "format",
        "vhd-type",
        "virtual-size",
        "actual-size",
        "file-size",
        "cluster-size",
        "dirty-flag",
        "journal",
        "sync-failed",
        "foreign-changes",
        "doubt",
        "in-use-by",
        "unique-id",
        "created",
        "sealed",
        "snapshot",
        "backing-filename",
        "parent-unique-id",
        "children",
    ];
    assert_eq!(keys, expected);

    let info = bench.info("a.vhd");
    assert_eq!(info["schema"], 1);
    assert_eq!(info["filename"], "a.vhd");
    assert_eq!(info["format"], "vpc");
    assert_eq!(info["vhd-type"], "dynamic");
    assert_eq!(info["virtual-size"], 10737418240u64);
    let file = fs::metadata(bench.path("a.vhd")).unwrap();
    assert_eq!(info["actual-size"], file.blocks() * 512);
    assert_eq!(info["file-size"], file.len());
    assert_eq!(info["cluster-size"], 2 << 20);
    assert_eq!(info["dirty-flag"], false);
    assert_eq!(info["journal"], "clean");
    assert_eq!(info["sync-failed"], false);
    assert_eq!(info["unique-id"].as_str().unwrap().len(), 36);
    let created = info["created"].as_str().unwrap();
    assert!(created.starts_with("20") && created.ends_with('Z') && created.len() == 20, "{created}");
}

/// Where qemu-img has a key of the same name it says the same.
#[test]
fn info_agrees_with_qemu_img() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "a.vhd", "10G"]).must_be(0);
    let output = bench.command("qemu-img").args(["info", "--output=json", "a.vhd"]).output().unwrap();
    let theirs: Value = serde_json::from_slice(&output.stdout).unwrap();
    let ours = bench.info("a.vhd");
    for key in ["filename", "format", "virtual-size", "actual-size", "cluster-size", "dirty-flag"] {
        assert!(!theirs[key].is_null(), "{key}");
        assert_eq!(ours[key], theirs[key], "{key}");
    }
}

#[test]
fn info_for_people_has_the_same_facts() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "a.vhd", "10G"]).must_be(0);
    let ended = bench.cowvhd(&["info", "a.vhd"]);
    let text = ended.must_be(0);
    for line in [
        "image: a.vhd\n",
        "file format: vpc (VHD, dynamic)\n",
        "virtual size: 10 GiB (10737418240 bytes)\n",
        "cluster_size: 2097152\n",
        "journal: clean\n",
    ] {
        assert!(text.contains(line), "{line:?} is not in {text}");
    }
}

/// Two footers that differ are named, and what follows from it.
#[test]
fn info_tells_of_footers_that_differ() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "a.vhd", "1G"]).must_be(0);
    assert_eq!(bench.info("a.vhd")["doubt"], Value::Null);
    let mut bytes = fs::read(bench.path("a.vhd")).unwrap();
    let end = bytes.len() - 512;
    // Saved state: part of the checksum, which is the inverted sum of all bytes.
    bytes[end + 84] = 1;
    let checksum = u32::from_be_bytes(bytes[end + 64..end + 68].try_into().unwrap()) - 1;
    bytes[end + 64..end + 68].copy_from_slice(&checksum.to_be_bytes());
    fs::write(bench.path("a.vhd"), &bytes).unwrap();
    let doubt = bench.info("a.vhd")["doubt"].clone();
    assert!(doubt.as_str().unwrap().contains("saved state"), "{doubt}");
    let ended = bench.cowvhd(&["info", "a.vhd"]);
    assert!(
        ended.must_be(0).contains("footers at the start and at the end differ (saved state)"),
        "{ended:?}"
    );
}

#[test]
fn wrong_use_is_16_and_help_is_0() {
    let bench = Bench::new();
    for arguments in [
        &["frobnicate"][..],
        &["create"],
        &["create", "a.vhd"],
        &["create", "a.vhd", "1G", "surplus"],
        &["info"],
        &["info", "a.vhd", "--frobnicate"],
        &["serve", "a.vhd", "--create", "1G", "--read-only"],
        &["serve", "a.vhd", "--create", "many"],
        &["serve", "a.vhd", "--nbd", "tcp:nowhere"],
        &["completions", "cobol"],
        &["man", "frobnicate"],
    ] {
        bench.cowvhd(arguments).must_be(16);
    }
    let nothing = bench.cowvhd(&[]);
    assert_eq!((nothing.code, nothing.stdout.as_str()), (16, ""));
    assert!(nothing.stderr.contains("Usage: cowvhd"));
    assert_eq!(bench.names().len(), 0);

    for arguments in [&["--help"][..], &["serve", "--help"], &["--version"]] {
        assert!(bench.cowvhd(arguments).must_be(0).contains("cowvhd"));
    }
}

#[test]
fn manual_pages_and_completions_are_printed() {
    let bench = Bench::new();
    for arguments in [&["man"][..], &["man", "create"], &["man", "info"], &["man", "serve"]] {
        assert!(bench.cowvhd(arguments).must_be(0).contains(".TH cowvhd"));
    }
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        assert!(bench.cowvhd(&["completions", shell]).must_be(0).contains("serve"));
    }
}

/// A full device, or a reader that has left, is an error and no panic.
#[test]
fn output_that_cannot_be_written_is_a_failure() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "a.vhd", "1G"]).must_be(0);
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = bench.command(env!("CARGO_BIN_EXE_cowvhd"));
    let output = command.args(["info", "a.vhd"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("No space left"), "{output:?}");
}
