//! `tree`: every layer that hangs together with a disk, also while it is served; and what is missing.

#![allow(clippy::unwrap_used, reason = "helpers are test code too")]

mod tool_support;

use std::fs;
use tool_support::Bench;

/// Each line's graph and name, and its kind; without times and sizes.
fn tree(bench: &Bench, file: &str) -> Vec<String> {
    let text = bench.cowvhd(&["tree", file]).must_be(0).to_string();
    let mut lines = text.lines();
    let head = lines.next().unwrap();
    assert!(head.starts_with("LAYER"), "{text}");
    let characters = |word: &str| head.find(word).unwrap();
    let (kind, changed) = (characters("KIND"), characters("CHANGED"));
    let part = |line: &str, from, to| line.chars().skip(from).take(to - from).collect::<String>();
    lines
        .map(|line| format!("{}: {}", part(line, 0, kind).trim_end(), part(line, kind, changed).trim_end()))
        .collect()
}

#[test]
fn a_tree_of_snapshots_clones_and_what_is_missing() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "vm.vhd", "64M"]).must_be(0);
    assert_eq!(tree(&bench, "vm.vhd"), ["@ vm.vhd: disk"]);
    let serving = bench.serve(&["vm.vhd"]);
    for name in ["a", "b", "c"] {
        bench.cowvhd(&["snapshot", "create", "vm.vhd", name]).must_be(0);
    }
    bench.cowvhd(&["clone", "vm@a.vhd", "clone.vhd"]).must_be(0);
    bench.cowvhd(&["clone", "vm@b.vhd", "gone.vhd"]).must_be(0);
    fs::remove_file(bench.path("gone.vhd")).unwrap();
    fs::create_dir(bench.path("below")).unwrap();
    assert_eq!(bench.cowvhd(&["clone", "vm@b.vhd", "below/x.vhd"]).code, 0);
    bench.cowvhd(&["export-delta", "vm.vhd", "delta.vhd", "--from", "a", "--to", "b"]).must_be(0);
    // All that is no image is passed over.
    fs::write(bench.path("notes.txt"), "not a disk").unwrap();
    let expected = [
        "* vm@a.vhd: snapshot a",
        "├─* clone.vhd: disk",
        "├─* delta.vhd: disk, not registered",
        "* vm@b.vhd: snapshot b",
        "├─* gone.vhd: missing",
        "├─* below/x.vhd: disk",
        "* vm@c.vhd: snapshot c",
        "@ vm.vhd: disk",
    ];
    assert_eq!(tree(&bench, "vm.vhd"), expected);
    serving.terminate();
    assert_eq!(tree(&bench, "vm.vhd"), expected);
    // From another disk of it.
    assert_eq!(
        tree(&bench, "clone.vhd")[..3],
        ["* vm@a.vhd: snapshot a", "├─* vm@b.vhd: snapshot b", "│ ├─* gone.vhd: missing"]
    );

    let ended = bench.cowvhd(&["tree", "vm.vhd", "--json"]);
    let found: serde_json::Value = serde_json::from_str(ended.must_be(0)).unwrap();
    let layers = found["layers"].as_array().unwrap();
    assert_eq!((&found["schema"], layers.len()), (&1.into(), 8));
    assert_eq!(
        (&layers[0]["filename"], &layers[0]["parent"], &layers[0]["sealed"]),
        (&"vm@a.vhd".into(), &serde_json::Value::Null, &true.into())
    );
    for layer in &layers[1..] {
        let parent = &layers[layer["parent"].as_u64().unwrap() as usize];
        assert_eq!(parent["sealed"], true, "{layer}");
    }
    let of = |name: &str| layers.iter().find(|layer| layer["filename"] == name).unwrap();
    assert_eq!((&of("vm.vhd")["this"], &of("vm.vhd")["registered"]), (&true.into(), &true.into()));
    assert_eq!(
        (&of("vm@c.vhd")["snapshot"], &of("vm@c.vhd")["virtual-size"]),
        (&"c".into(), &(64 << 20).into())
    );
    assert!(of("gone.vhd")["missing"].as_str().unwrap().contains("does not exist"));
    assert_eq!(of("delta.vhd")["registered"], false);

    // A chain without its root is shown as far as it goes.
    fs::rename(bench.path("vm@a.vhd"), bench.path("below/elsewhere.vhd")).unwrap();
    let lines = tree(&bench, "vm.vhd");
    assert!(lines[0].starts_with("* id ") && lines[0].ends_with(": missing"), "{lines:?}");
    assert_eq!(lines.last().unwrap(), "@ vm.vhd: disk");
    bench.cowvhd(&["tree", "none.vhd"]).must_say(1, &["none.vhd"]);
}

/// Nothing in an image makes the tool open a file outside of the allowed folders.
#[test]
fn children_elsewhere_are_looked_at_when_that_is_allowed() {
    let bench = Bench::new();
    fs::create_dir_all(bench.path("vms")).unwrap();
    fs::create_dir_all(bench.path("clones")).unwrap();
    bench.cowvhd(&["create", "vms/vm.vhd", "64M"]).must_be(0);
    bench.cowvhd(&["snapshot", "create", "vms/vm.vhd", "a"]).must_be(0);
    let ended = bench.cowvhd(&["clone", "vms/vm@a.vhd", "clones/x.vhd"]);
    assert_eq!(ended.code, 0, "{ended:?}");
    let text = bench.cowvhd(&["tree", "vms/vm.vhd"]).must_be(0).to_string();
    assert!(
        text.contains("x.vhd") && text.contains("missing") && text.contains("outside the folders"),
        "{text}"
    );
    let text = bench.cowvhd(&["tree", "vms/vm.vhd", "--allow-parents-in", "clones"]).must_be(0).to_string();
    assert!(text.contains("x.vhd") && !text.contains("missing"), "{text}");
}

/// `info` of each layer, and what the verbs that make them say to programs.
#[test]
fn layers_say_what_they_are() {
    let bench = Bench::new();
    let json = |arguments: &[&str]| -> serde_json::Value {
        serde_json::from_str(bench.cowvhd(arguments).must_be(0)).unwrap()
    };
    bench.cowvhd(&["create", "vm.vhd", "64M"]).must_be(0);
    let info = bench.info("vm.vhd");
    assert_eq!((&info["sealed"], &info["children"]), (&false.into(), &serde_json::json!([])));
    assert_eq!(
        (&info["backing-filename"], &info["snapshot"]),
        (&serde_json::Value::Null, &serde_json::Value::Null)
    );
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "a"]).must_be(0);
    let cloned = json(&["clone", "vm@a.vhd", "clone.vhd", "--json"]);
    assert_eq!(cloned, serde_json::json!({ "schema": 1, "filename": "clone.vhd", "snapshot": "vm@a.vhd" }));
    let reverted = json(&["snapshot", "revert", "vm.vhd", "a", "--json"]);
    assert_eq!((&reverted["filename"], &reverted["name"]), (&"vm.vhd".into(), &"a".into()));
    let (disk, snapshot, clone) = (bench.info("vm.vhd"), bench.info("vm@a.vhd"), bench.info("clone.vhd"));
    assert_eq!((&snapshot["sealed"], &snapshot["snapshot"]), (&true.into(), &"a".into()));
    let mut children: Vec<_> = snapshot["children"].as_array().unwrap().clone();
    children.sort_by_key(|child| child["filename"].to_string());
    let expected = |filename: &str, info: &serde_json::Value| serde_json::json!({ "filename": filename, "unique-id": info["unique-id"] });
    assert_eq!(children, [expected("clone.vhd", &clone), expected("vm.vhd", &disk)]);
    for child in [&disk, &clone] {
        assert_eq!(child["backing-filename"], "vm@a.vhd");
        assert_eq!(child["parent-unique-id"], snapshot["unique-id"]);
        assert_eq!(child["sealed"], false);
    }
    let text = bench.cowvhd(&["info", "vm@a.vhd"]).must_be(0).to_string();
    assert!(text.contains("sealed: as snapshot \"a\"") && text.contains("child: clone.vhd"), "{text}");
    let text = bench.cowvhd(&["info", "vm.vhd"]).must_be(0).to_string();
    assert!(text.contains("backing file: vm@a.vhd"), "{text}");
}
