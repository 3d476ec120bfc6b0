//! Merging layers of a disk, and deleting its snapshots, while it is being served.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers are test code too")]

mod tool_support;

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Stdio};
use tool_support::{Bench, Ended, Serving, Signal};

/// What a guest says and is told; everything has to succeed.
fn guest(bench: &Bench, serving: &Serving, commands: &[&str]) {
    let said = bench.qemu_io(serving.uri(), commands);
    assert!(!said.contains("failed") && !said.contains("rror"), "{commands:?}: {said}");
}

fn json(ended: &Ended) -> serde_json::Value {
    serde_json::from_str(ended.must_be(0)).unwrap()
}

/// A served disk with the snapshots a, b and c, and a pattern before each of them and after the last.
fn served(bench: &Bench) -> Serving {
    let serving = bench.serve(&["vm.vhd", "--create", "64M"]);
    for (number, name) in ["a", "b", "c"].iter().enumerate() {
        let write = format!("write -P {} {}M 8M", number + 1, 2 * number);
        guest(bench, &serving, &[&write]);
        bench.cowvhd(&["snapshot", "create", "vm.vhd", name]).must_be(0);
    }
    guest(bench, &serving, &["write -P 4 30M 64k", "write -zu 0 1M"]);
    serving
}

/// What that disk holds: the ends of three overlapping writes, and what was written last.
const HOLDS: [&str; 5] =
    ["read -P 0 0 1M", "read -P 1 1M 1M", "read -P 2 2M 2M", "read -P 3 4M 8M", "read -P 4 30M 64k"];

/// A command whose progress is read.
struct Working {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Working {
    /// Starts it and waits until it says that something was copied.
    fn start(bench: &Bench, arguments: &[&str]) -> Self {
        let mut command = bench.command(env!("CARGO_BIN_EXE_cowvhd"));
        command.args(arguments).args(["--progress", "json"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        assert!(line.contains(r#""phase":"copy""#), "{line:?}");
        Working { child, lines }
    }

    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end.
    fn end(mut self) -> Ended {
        (&mut self.lines).lines().for_each(|line| assert!(line.unwrap().contains("phase")));
        self.child.wait_with_output().unwrap().into()
    }
}

#[test]
fn snapshots_go_while_their_disk_is_served() {
    let bench = Bench::new();
    let serving = served(&bench);
    // In the middle of the chain, at its bottom, and last the only one, after which the disk needs no parent.
    for (name, copied) in [("b", 2 << 20), ("a", 2 << 20), ("c", 0)] {
        let deleted = json(&bench.cowvhd(&["snapshot", "delete", "vm.vhd", name, "--json"]));
        assert_eq!((&deleted["schema"], &deleted["name"]), (&1.into(), &name.into()));
        assert!(copied == 0 || deleted["copied-bytes"] == copied, "{deleted}");
        assert!(!bench.exists(&format!("vm@{name}.vhd")));
        guest(&bench, &serving, &HOLDS);
        guest(&bench, &serving, &["write -P 5 40M 4k", "flush", "read -P 5 40M 4k"]);
    }
    bench.cowvhd(&["snapshot", "delete", "vm.vhd", "c"]).must_say(1, &["no snapshot \"c\""]);
    bench.cowvhd(&["merge", "vm.vhd"]).must_say(16, &["no parent"]);
    // It gets new ones.
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "d"]).must_be(0);
    guest(&bench, &serving, &["write -P 6 41M 4k"]);
    let found = json(&bench.cowvhd(&["snapshot", "list", "vm.vhd", "--json"]));
    assert_eq!(found["snapshots"].as_array().unwrap().len(), 1, "{found}");
    bench.cowvhd(&["snapshot", "delete", "vm.vhd", "d"]).must_be(0);
    guest(&bench, &serving, &HOLDS);
    serving.terminate();
    assert_eq!(bench.names(), ["vm.vhd"]);
    let info = bench.info("vm.vhd");
    assert_eq!((&info["vhd-type"], &info["journal"]), (&"dynamic".into(), &"clean".into()));
    bench.cowvhd(&["check", "vm.vhd", "--strict"]).must_be(0);
    let serving = bench.serve(&["vm.vhd"]);
    guest(&bench, &serving, &HOLDS);
    guest(&bench, &serving, &["read -P 5 40M 4k", "read -P 6 41M 4k"]);
    serving.terminate();
}

/// ^C and a kill stop the work and not the server, whose guest and other commands go on meanwhile.
#[test]
fn a_merge_stops_and_goes_on() {
    let bench = Bench::new();
    let serving = served(&bench);
    let slow = ["merge", "vm.vhd", "--until", "a", "--rate", "1M"];
    let layer = |name: &str| bench.path(name).canonicalize().unwrap().to_str().unwrap().to_string();
    for signal in [Signal::INT, Signal::KILL] {
        let working = Working::start(&bench, &slow);
        guest(&bench, &serving, &["write -P 7 50M 64k", "flush", "read -P 7 50M 64k"]);
        let work = json(&bench.cowvhd(&["status", "vm.vhd", "--json"]))["work"].take();
        assert_eq!((&work["request"], &work["rate"]), (&"merge".into(), &(1 << 20).into()));
        assert_eq!(work["layers"], serde_json::json!([layer("vm@c.vhd"), layer("vm@b.vhd")]));
        let (done, copied) = (work["done"].as_u64().unwrap(), work["copied-bytes"].as_u64().unwrap());
        assert!(work["phase"] == "copy" && work["total"] == 64 << 20 && done < 64 << 20, "{work}");
        assert!(copied < 10 << 20 && work["elapsed"].as_f64().unwrap() > 0.0, "{work}");
        let told = bench.cowvhd(&["status", "vm.vhd"]);
        assert!(told.must_be(0).contains("\nmerging vm@c.vhd, vm@b.vhd into it: "), "{told:?}");
        assert!(told.stdout.ends_with("at most 1 MiB)\n"), "{told:?}");
        bench.cowvhd(&["merge", "vm.vhd"]).must_say(1, &["in use by a merge that is under way"]);
        bench.cowvhd(&["snapshot", "delete", "vm.vhd", "a"]).must_say(1, &["in use by a merge"]);
        working.signal(signal);
        let ended = working.end();
        match signal {
            Signal::INT => ended.must_say(32, &["goes on where it was"]),
            _ => assert_eq!(ended.code, -1),
        }
        guest(&bench, &serving, &HOLDS);
    }
    let merged = loop {
        // The one that was killed ends when its server notices.
        let ended = bench.cowvhd(&["merge", "vm.vhd", "--until", "a", "--json"]);
        if !ended.stderr.contains("under way") {
            break json(&ended);
        }
    };
    assert_eq!(json(&bench.cowvhd(&["status", "vm.vhd", "--json"]))["work"], serde_json::Value::Null);
    assert_eq!(merged["layers"], serde_json::json!([layer("vm@c.vhd"), layer("vm@b.vhd")]));
    guest(&bench, &serving, &HOLDS);

    // A server that is to end does not wait for the rest.
    let working = Working::start(&bench, &["merge", "vm.vhd", "--rate", "64k"]);
    serving.terminate();
    working.end().must_say(32, &["goes on where it was"]);
    bench.cowvhd(&["merge", "vm.vhd"]).must_be(0);
    let serving = bench.serve(&["vm.vhd"]);
    guest(&bench, &serving, &HOLDS);
    guest(&bench, &serving, &["read -P 7 50M 64k"]);
    serving.terminate();
}

/// A snapshot that is taken meanwhile ends a merge, and the next one goes on; what others read stays.
#[test]
fn a_snapshot_ends_a_merge() {
    let bench = Bench::new();
    let serving = served(&bench);
    let working = Working::start(&bench, &["merge", "vm.vhd", "--rate", "1M"]);
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "d"]).must_be(0);
    working.end().must_say(1, &["a snapshot was taken during the merge", "start it again"]);
    guest(&bench, &serving, &HOLDS);
    bench.cowvhd(&["clone", "vm@b.vhd", "clone.vhd"]).must_be(0);
    bench.cowvhd(&["snapshot", "delete", "vm.vhd", "b"]).must_say(1, &["clone.vhd"]);
    let other = bench.serve(&["clone.vhd"]);
    bench.cowvhd(&["snapshot", "delete", "vm.vhd", "a"]).must_say(1, &["vm@b.vhd", "in use by"]);
    guest(&bench, &serving, &HOLDS);
    other.terminate();
    bench.cowvhd(&["snapshot", "delete", "vm.vhd", "a"]).must_be(0);
    guest(&bench, &serving, &HOLDS);
    bench.cowvhd(&["snapshot", "delete", "vm.vhd", "c"]).must_be(0);
    bench.cowvhd(&["snapshot", "delete", "vm.vhd", "d"]).must_be(0);
    bench.cowvhd(&["merge", "vm.vhd"]).must_be(0);
    guest(&bench, &serving, &HOLDS);
    serving.terminate();
    assert_eq!(bench.names(), ["clone.vhd", "vm.vhd", "vm@b.vhd"]);
}
