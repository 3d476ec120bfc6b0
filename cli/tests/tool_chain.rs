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
