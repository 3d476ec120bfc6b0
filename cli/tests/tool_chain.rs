//! The tool on chains of layers.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers are test code too")]

mod tool_support;

use tool_support::Bench;

/// `vm@a.vhd` under `vm@b.vhd` under `vm.vhd`, with a pattern written to each.
fn chain() -> Bench {
    let bench = Bench::new();
    bench.cowvhd(&["create", "vm@a.vhd", "64M"]).must_be(0);
    write(&bench, "vm@a.vhd", "write -P 1 0 4M");
    bench.cowvhd(&["create", "vm@b.vhd", "--parent", "vm@a.vhd"]).must_be(0);
    write(&bench, "vm@b.vhd", "write -P 2 1M 64k");
    bench.cowvhd(&["create", "vm.vhd", "--parent", "vm@b.vhd"]).must_be(0);
    write(&bench, "vm.vhd", "write -P 3 20M 4k");
    write(&bench, "vm.vhd", "write -zu 0 64k");
    bench
}

fn write(bench: &Bench, file: &str, command: &str) {
    let serving = bench.serve(&[file]);
    let said = bench.qemu_io(serving.uri(), &[command]);
    assert!(!said.contains("rror"), "{said}");
    serving.terminate();
}

fn json(bench: &Bench, arguments: &[&str]) -> serde_json::Value {
    serde_json::from_str(bench.cowvhd(arguments).must_be(0)).unwrap()
}

#[test]
fn diff_lists_what_changed() {
    let bench = chain();
    let found = json(&bench, &["diff", "vm.vhd", "--from", "a", "--json"]);
    let expected = serde_json::json!({
        "schema": 1, "filename": "vm.vhd", "from": "a", "to": null,
        "virtual-size-before": 64 << 20, "virtual-size": 64 << 20, "changed-bytes": 132 << 10,
        "extents": [
            { "start": 0, "length": 64 << 10, "zero": true, "data": false },
            { "start": 1 << 20, "length": 64 << 10, "zero": false, "data": true },
            { "start": 20 << 20, "length": 4 << 10, "zero": false, "data": true },
        ],
    });
    assert_eq!(found, expected);
    let text = bench.cowvhd(&["diff", "vm.vhd", "--from", "a", "--to", "vm@b.vhd"]);
    assert_eq!(
        text.must_be(0),
        "Offset          Length          Holds\n\
         0x100000        0x10000         data\n\
         1 changes: 64 KiB of data, 0 B of zeros\n"
    );
    bench.cowvhd(&["diff", "vm.vhd", "--from", "c"]).must_say(1, &["vm@c.vhd", "no point"]);
    bench.cowvhd(&["diff", "vm.vhd", "--from", "b", "--to", "a"]).must_say(16, &["older"]);

    // Between snapshots the disk may be in use.
    let serving = bench.serve(&["vm.vhd"]);
    let busy = json(&bench, &["diff", "vm.vhd", "--from", "a", "--to", "b", "--json"]);
    assert_eq!(busy["changed-bytes"], 64 << 10);
    bench.cowvhd(&["diff", "vm.vhd", "--from", "a"]).must_say(1, &["in use by"]);
    serving.terminate();
}

/// What the disk of [`chain`] holds at a point.
fn content(point: &str) -> Vec<u8> {
    let mut content = vec![0; 64 << 20];
    content[..4 << 20].fill(1);
    if point != "a" {
        content[1 << 20..(1 << 20) + (64 << 10)].fill(2);
    }
    if point == "vm" {
        content[20 << 20..(20 << 20) + (4 << 10)].fill(3);
        content[..64 << 10].fill(0);
    }
    content
}

#[test]
fn any_point_becomes_an_image_of_its_own() {
    let bench = chain();
    // In use: its snapshots can be read all the same.
    let serving = bench.serve(&["vm.vhd"]);
    for point in ["a", "b"] {
        for (out, format) in [("raw", "raw"), ("fixed.vhd", "fixed"), ("dynamic.vhd", "dynamic")] {
            bench
                .cowvhd(&["convert", "vm.vhd", out, "--snapshot", point, "--to", format, "--force"])
                .must_be(0);
            let from = if format == "raw" { "raw" } else { "vpc" };
            bench.run("qemu-img", &["convert", "-f", from, "-O", "raw", out, "read"]).must_be(0);
            let read = std::fs::read(bench.path("read")).unwrap();
            assert!(read == content(point), "{point} as {format}");
            if format != "raw" {
                let kind = if format == "fixed" { "fixed" } else { "dynamic" };
                assert_eq!(bench.info(out)["vhd-type"], kind);
            }
        }
    }
    bench.cowvhd(&["convert", "vm.vhd", "x.raw"]).must_say(1, &["in use by"]);
    serving.terminate();
    bench.cowvhd(&["convert", "vm.vhd", "now.raw"]).must_be(0);
    assert!(std::fs::read(bench.path("now.raw")).unwrap() == content("vm"));
    bench.cowvhd(&["convert", "vm@b.vhd", "b.raw"]).must_be(0);
    assert!(std::fs::read(bench.path("b.raw")).unwrap() == content("b"));
    bench.cowvhd(&["convert", "vm.vhd", "x.raw", "--snapshot", "c"]).must_say(1, &["vm@c.vhd"]);
    bench
        .cowvhd(&["convert", "vm.vhd", "x.raw", "--snapshot", "a/b"])
        .must_say(16, &["no name of a snapshot"]);
}

#[test]
fn a_delta_shows_the_newer_point_over_the_older_one() {
    let bench = chain();
    let serving = bench.serve(&["vm.vhd"]);
    bench.cowvhd(&["export-delta", "vm.vhd", "delta.vhd", "--from", "a", "--to", "b"]).must_be(0);
    bench.cowvhd(&["export-delta", "vm.vhd", "x.vhd", "--from", "a"]).must_say(1, &["in use by"]);
    serving.terminate();
    assert_eq!(bench.info("delta.vhd")["vhd-type"], "differencing");
    let size = bench.info("delta.vhd")["actual-size"].as_u64().unwrap();
    assert!(size < 4 << 20, "{size} bytes for 64 KiB of changes");
    bench.cowvhd(&["convert", "delta.vhd", "delta.raw"]).must_be(0);
    assert!(std::fs::read(bench.path("delta.raw")).unwrap() == content("b"));
    let progress = bench.cowvhd(&["export-delta", "vm.vhd", "now.vhd", "--from", "a", "--progress", "json"]);
    let last: serde_json::Value = serde_json::from_str(progress.must_be(0).lines().last().unwrap()).unwrap();
    assert_eq!((&last["phase"], &last["done"]), (&"sync".into(), &(132u64 << 10).into()));
    bench.cowvhd(&["convert", "now.vhd", "now.raw"]).must_be(0);
    assert!(std::fs::read(bench.path("now.raw")).unwrap() == content("vm"));
    bench.cowvhd(&["export-delta", "vm.vhd", "now.vhd", "--from", "a"]).must_say(1, &["exists already"]);
}

#[test]
fn a_parent_that_moved_is_found_again() {
    let bench = chain();
    std::fs::create_dir(bench.path("store")).unwrap();
    std::fs::rename(bench.path("vm@b.vhd"), bench.path("store/b.vhd")).unwrap();
    bench.cowvhd(&["convert", "vm.vhd", "x.raw"]).must_say(1, &["was not found", "--parent"]);
    // Its own parent is not where it was, from there.
    bench
        .cowvhd(&["rebase", "vm.vhd", "--relink", "--parent", "store/b.vhd"])
        .must_say(1, &["store/b.vhd", "was not found"]);
    bench
        .cowvhd(&["rebase", "store/b.vhd", "--relink", "--parent", "vm@a.vhd", "--allow-parents-in", "."])
        .must_be(0);
    let allow = ["--allow-parents-in", "."];
    bench
        .cowvhd(&[&["rebase", "vm.vhd", "--relink", "--parent", "store/b.vhd"][..], &allow].concat())
        .must_be(0);
    bench.cowvhd(&["convert", "vm.vhd", "now.raw"]).must_be(0);
    assert!(std::fs::read(bench.path("now.raw")).unwrap() == content("vm"));
    bench.cowvhd(&["rebase", "vm.vhd", "--relink", "--parent", "vm@a.vhd"]).must_say(1, &["is another disk"]);
    bench.cowvhd(&["rebase", "vm@a.vhd", "--relink", "--parent", "vm.vhd"]).must_say(16, &["has no parent"]);
    let serving = bench.serve(&["vm.vhd"]);
    bench.cowvhd(&["rebase", "vm.vhd", "--relink", "--parent", "store/b.vhd"]).must_say(1, &["in use by"]);
    serving.terminate();
    let checked = bench.cowvhd(&["check", "vm.vhd"]);
    assert_eq!(checked.code, 0, "{checked:?}");
}

#[test]
fn a_merged_disk_needs_its_layers_no_more() {
    let bench = chain();
    // By a server that cannot be asked.
    let serving = bench.serve(&["vm.vhd", "--control", "elsewhere.ctl"]);
    bench.cowvhd(&["merge", "vm.vhd", "--until", "a"]).must_say(1, &["in use by"]);
    serving.terminate();
    bench.cowvhd(&["merge", "vm.vhd", "--until", "c"]).must_say(1, &["vm@c.vhd"]);
    let merged = json(&bench, &["merge", "vm.vhd", "--until", "a", "--json"]);
    assert_eq!(merged["copied-bytes"], 64 << 10);
    assert!(merged["layers"][0].as_str().unwrap().ends_with("vm@b.vhd"), "{merged}");
    std::fs::remove_file(bench.path("vm@b.vhd")).unwrap();
    bench.cowvhd(&["convert", "vm.vhd", "now.raw"]).must_be(0);
    assert!(std::fs::read(bench.path("now.raw")).unwrap() == content("vm"));
    let said = bench.cowvhd(&["merge", "vm.vhd"]);
    assert!(said.must_be(0).contains("no longer needed: ") && said.stdout.contains("vm@a.vhd"), "{said:?}");
    std::fs::remove_file(bench.path("vm@a.vhd")).unwrap();
    assert_eq!(bench.info("vm.vhd")["vhd-type"], "dynamic");
    bench.run("qemu-img", &["convert", "-f", "vpc", "-O", "raw", "vm.vhd", "now.raw"]).must_be(0);
    assert!(std::fs::read(bench.path("now.raw")).unwrap() == content("vm"));
    assert_eq!(bench.cowvhd(&["check", "vm.vhd"]).code, 0);
    bench.cowvhd(&["merge", "vm.vhd"]).must_say(16, &["has no parent"]);
}

#[test]
fn a_rebased_disk_shows_what_it_did() {
    let bench = chain();
    bench.cowvhd(&["create", "other.vhd", "64M"]).must_be(0);
    write(&bench, "other.vhd", "write -P 9 2M 4M");
    bench.cowvhd(&["rebase", "vm.vhd", "--parent", "other.vhd", "--progress", "none"]).must_be(0);
    for gone in ["vm@a.vhd", "vm@b.vhd"] {
        std::fs::remove_file(bench.path(gone)).unwrap();
    }
    bench.cowvhd(&["convert", "vm.vhd", "now.raw"]).must_be(0);
    assert!(std::fs::read(bench.path("now.raw")).unwrap() == content("vm"));
    bench.cowvhd(&["rebase", "vm.vhd", "--parent", "vm.vhd"]).must_say(16, &["made over itself, or is"]);
}

#[test]
fn a_deleted_snapshot_is_missed_by_nobody() {
    let bench = chain();
    // By a server that cannot be asked.
    let serving = bench.serve(&["vm.vhd", "--control", "elsewhere.ctl"]);
    bench.cowvhd(&["snapshot", "delete", "vm.vhd", "a"]).must_say(1, &["in use by"]);
    serving.terminate();
    bench.cowvhd(&["create", "other.vhd", "--parent", "vm@a.vhd"]).must_be(0);
    bench.cowvhd(&["snapshot", "delete", "vm.vhd", "a"]).must_say(1, &["other.vhd", "vm@a.vhd"]);
    assert!(bench.exists("vm@a.vhd"));
    // The older one, under a snapshot that stays; then that one.
    bench.cowvhd(&["rebase", "other.vhd", "--parent", "vm@b.vhd"]).must_be(0);
    bench.cowvhd(&["snapshot", "delete", "vm.vhd", "a"]).must_be(0);
    assert!(!bench.exists("vm@a.vhd"));
    for (file, point) in [("vm.vhd", "vm"), ("vm@b.vhd", "b"), ("other.vhd", "a")] {
        bench.cowvhd(&["convert", file, "read.raw", "--force"]).must_be(0);
        assert!(std::fs::read(bench.path("read.raw")).unwrap() == content(point), "{file}");
        assert_eq!(bench.cowvhd(&["check", file]).code, 0);
    }
    bench.cowvhd(&["snapshot", "delete", "vm.vhd", "b"]).must_say(1, &["other.vhd"]);
    bench.cowvhd(&["merge", "other.vhd"]).must_be(0);
    bench.cowvhd(&["snapshot", "delete", "vm.vhd", "b", "--progress", "none"]).must_be(0);
    bench.cowvhd(&["snapshot", "delete", "vm.vhd", "b"]).must_say(1, &["no snapshot"]);
    bench.cowvhd(&["snapshot", "delete", "vm.vhd", "a/b"]).must_say(16, &["name"]);
    for (file, point) in [("vm.vhd", "vm"), ("other.vhd", "a")] {
        bench.run("qemu-img", &["convert", "-f", "vpc", "-O", "raw", file, "read.raw"]).must_be(0);
        assert!(std::fs::read(bench.path("read.raw")).unwrap() == content(point), "{file}");
    }
}

#[test]
fn snapshots_are_taken_listed_cloned_and_gone_back_to() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "vm.vhd", "64M"]).must_be(0);
    write(&bench, "vm.vhd", "write -P 1 0 4M");
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "one"]).must_be(0);
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "one"]).must_say(1, &["vm@one.vhd", "exists already"]);
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "a/b"]).must_say(16, &["a/b"]);
    write(&bench, "vm.vhd", "write -P 2 0 1M");
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "two"]).must_be(0);
    let serving = bench.serve(&["vm.vhd"]);
    bench.cowvhd(&["snapshot", "revert", "vm.vhd", "one"]).must_say(1, &["in use by"]);
    let names = |list: serde_json::Value| {
        let snapshots = list["snapshots"].as_array().unwrap().clone();
        snapshots.iter().map(|s| (s["name"].to_string(), !s["depth"].is_null())).collect::<Vec<_>>()
    };
    let both = ["\"one\"", "\"two\""].map(String::from);
    let found = names(json(&bench, &["snapshot", "list", "vm.vhd", "--json"]));
    assert_eq!(found, [(both[0].clone(), true), (both[1].clone(), true)]);
    serving.terminate();

    // Sealed: read by anybody, written to by nobody.
    bench.cowvhd(&["serve", "vm@one.vhd"]).must_say(1, &["sealed as the snapshot \"one\"", "cowvhd clone"]);
    bench.cowvhd(&["snapshot", "revert", "vm.vhd", "none"]).must_say(1, &["no snapshot \"none\""]);
    bench.cowvhd(&["snapshot", "revert", "vm.vhd", "one"]).must_be(0);
    let found = names(json(&bench, &["snapshot", "list", "vm.vhd", "--json"]));
    assert_eq!(found, [(both[0].clone(), true), (both[1].clone(), false)]);
    bench.cowvhd(&["convert", "vm.vhd", "now.raw"]).must_be(0);
    assert!(std::fs::read(bench.path("now.raw")).unwrap()[..4 << 20].iter().all(|&byte| byte == 1));

    std::fs::create_dir(bench.path("clones")).unwrap();
    bench.cowvhd(&["clone", "vm.vhd", "x.vhd"]).must_say(16, &["take a snapshot of it first"]);
    let cloned = bench.cowvhd(&["clone", "vm@two.vhd", "clones/c.vhd"]);
    assert_eq!(cloned.code, 0, "{cloned:?}");
    assert!(cloned.stderr.contains("--allow-parents-in"), "{cloned:?}");
    bench.cowvhd(&["convert", "clones/c.vhd", "c.raw", "--allow-parents-in", "."]).must_be(0);
    assert!(std::fs::read(bench.path("c.raw")).unwrap()[..1 << 20].iter().all(|&byte| byte == 2));
    for file in ["vm.vhd", "vm@one.vhd", "vm@two.vhd"] {
        let checked = bench.cowvhd(&["check", file]);
        assert_eq!(checked.code, 0, "{checked:?}");
    }
}
