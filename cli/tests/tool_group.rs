//! Snapshots of several disks that servers have open: through the tool, and with a leader that goes away in the middle.

#![allow(clippy::unwrap_used, reason = "helpers are test code too")]

mod tool_support;

use cowvhd::state::{Draft, ManifestDisk, StateNames};
use cowvhd::vfs::HostVfs;
use cowvhd::vhd::UniqueId;
use serde_json::{Value, json};
use std::fs;
use std::sync::Arc;
use tool_support::{Bench, Serving, Talk};

const DISKS: [&str; 2] = ["a.vhd", "b.vhd"];

/// Both disks, each in a server of its own.
fn serve(bench: &Bench) -> [Serving; 2] {
    DISKS.map(|disk| bench.serve(&[disk, "--create", "1G"]))
}

/// A guest writes and flushes, and is answered.
fn goes_on(bench: &Bench, serving: &Serving) {
    let said = bench.qemu_io(serving.uri(), &["write -P 7 1M 64k", "flush"]);
    assert!(said.contains("wrote") && !said.contains("failed"), "{said}");
}

fn holds(bench: &Bench, file: &str, command: &str) {
    let serving = bench.serve(&[file, "--read-only"]);
    let said = bench.qemu_io_with(&["-r"], serving.uri(), &[command]);
    assert!(!said.contains("failed") && said.contains("read "), "{file}: {said}");
    serving.terminate();
}

#[test]
fn served_disks_and_one_that_is_not() {
    let bench = Bench::new();
    fs::write(bench.path("ram.bin"), "ram").unwrap();
    let servers = serve(&bench);
    bench.cowvhd(&["create", "c.vhd", "1G"]).must_be(0);
    for (serving, byte) in servers.iter().zip(["1", "2"]) {
        let said = bench.qemu_io(serving.uri(), &[&format!("write -P {byte} 0 64k")]);
        assert!(said.contains("wrote"), "{said}");
    }
    let create = |name| {
        let words =
            ["snapshot", "create", "a.vhd", "b.vhd", "c.vhd", "--state", "ram=ram.bin", "--group", name];
        bench.cowvhd(&words)
    };
    assert_eq!(create("g").must_be(0).lines().count(), 3);
    for serving in &servers {
        let said = bench.qemu_io(serving.uri(), &["write -P 9 0 64k", "flush", "read -P 9 0 64k"]);
        assert!(said.contains("wrote") && !said.contains("failed"), "{said}");
    }
    // The same name again is refused, and so is one that one disk alone has; nobody notices.
    create("g").must_say(1, &["a@g.vhd", "exists"]);
    bench.cowvhd(&["snapshot", "create", "b.vhd", "h"]).must_be(0);
    create("h").must_say(1, &["b@h.vhd", "exists"]);
    create("a/b").must_say(16, &["a/b"]);
    servers.iter().for_each(|serving| goes_on(&bench, serving));
    // One that is served first, and one that is not.
    bench.cowvhd(&["snapshot", "create", "c.vhd", "a.vhd", "--group", "i"]).must_be(0);
    servers.into_iter().for_each(|serving| drop(serving.terminate()));
    let names: Vec<String> = bench.names().into_iter().filter(|name| name.contains('@')).collect();
    assert_eq!(
        names,
        [
            "a@g+ram.vmstate",
            "a@g.vhd",
            "a@g.vmstate",
            "a@i.vhd",
            "b@g.vhd",
            "b@h.vhd",
            "c@g.vhd",
            "c@i.vhd",
            "c@i.vmstate"
        ]
    );
    for (disk, read) in [("a@g.vhd", "read -P 1 0 64k"), ("b@g.vhd", "read -P 2 0 64k")] {
        holds(&bench, disk, read);
    }
    for disk in ["a.vhd", "b.vhd", "c.vhd"] {
        let found = bench.cowvhd(&["snapshot", "state", disk, "g", "--verify", "--json"]);
        let found: Value = serde_json::from_str(found.must_be(0)).unwrap();
        assert_eq!(found["disks"].as_array().unwrap().len(), 3, "{found}");
    }
}

/// A leader that does one step after the other, as the tool does.
struct Leader {
    talks: Vec<Talk>,
    /// Its files are the servers' to take away.
    draft: std::mem::ManuallyDrop<Draft>,
    disks: Vec<ManifestDisk>,
}

impl Leader {
    fn join(bench: &Bench) -> Self {
        let mut talks: Vec<Talk> =
            DISKS.iter().map(|disk| Talk::to(&bench.path(&format!("{disk}.ctl")))).collect();
        let id = |value: &Value| u128::from_str_radix(value.as_str().unwrap(), 16).unwrap().to_be_bytes();
        let disks = talks.iter_mut().zip([true, false]).map(|(talk, keeps)| {
            let request = json!({"request": "group-join", "name": "g", "keeps-state": keeps});
            let answer = talk.ask(&request.to_string());
            let joined = &answer["done"];
            ManifestDisk {
                disk_id: UniqueId::from_bytes(id(&joined["disk-id"])),
                seal_id: id(&joined["seal-id"]),
                file_name: joined["file-name"].as_str().unwrap().into(),
            }
        });
        let disks = disks.collect();
        let draft = Draft::new(Arc::new(HostVfs), Self::names(bench)).unwrap();
        draft.blob("ram").unwrap().write_at(b"ram", 0).unwrap();
        Leader { talks, draft: std::mem::ManuallyDrop::new(draft), disks }
    }

    fn names(bench: &Bench) -> StateNames {
        StateNames::new(&fs::canonicalize(bench.path(".")).unwrap().join("a.vhd"), "g").unwrap()
    }

    fn ask(&mut self, number: usize, request: Value) {
        let answer = self.talks[number].ask(&request.to_string());
        assert!(answer["done"].is_object(), "{request}: {answer}");
    }

    fn prepare(&mut self) {
        (0..2).for_each(|number| self.ask(number, json!({"request": "group-prepare"})));
    }

    fn hold(&mut self) {
        (0..2).for_each(|number| self.ask(number, json!({"request": "group-hold"})));
    }

    fn seal(&mut self, count: usize) {
        let digest = self.draft.write_manifest(self.disks.clone()).unwrap().to_string();
        for number in 0..count {
            self.ask(number, json!({"request": "group-seal", "manifest": "a@g.vmstate", "digest": digest}));
        }
    }

    /// Is killed.
    fn die(self) {
        let Leader { talks, .. } = self;
        drop(talks);
    }
}

/// Ends the servers and tells which disks have the snapshot; nothing else is left of it.
fn snapshots(bench: &Bench, servers: [Serving; 2]) -> Vec<String> {
    servers.into_iter().for_each(|serving| drop(serving.terminate()));
    bench.names().into_iter().filter(|name| name.contains('@')).collect()
}

const ALL: [&str; 4] = ["a@g+ram.vmstate", "a@g.vhd", "a@g.vmstate", "b@g.vhd"];

#[test]
fn a_leader_dies_before_the_disks_are_switched() {
    for steps in 0..3 {
        let bench = Bench::new();
        let servers = serve(&bench);
        let mut leader = Leader::join(&bench);
        if steps > 0 {
            leader.prepare();
        }
        if steps > 1 {
            leader.hold();
        }
        // Nobody else takes a snapshot meanwhile, and other questions are answered.
        bench.cowvhd(&["snapshot", "create", "a.vhd", "x"]).must_say(1, &["checkpoint"]);
        bench.cowvhd(&["status", "a.vhd"]).must_be(0);
        leader.die();
        servers.iter().for_each(|serving| goes_on(&bench, serving));
        assert_eq!(snapshots(&bench, servers), [""; 0], "after {steps} steps");
    }
}

/// All is there that the commit needs: the servers do the rest.
#[test]
fn a_leader_dies_after_all_disks_are_sealed() {
    let bench = Bench::new();
    let servers = serve(&bench);
    let mut leader = Leader::join(&bench);
    leader.prepare();
    leader.hold();
    leader.seal(2);
    leader.die();
    servers.iter().for_each(|serving| goes_on(&bench, serving));
    assert_eq!(snapshots(&bench, servers), ALL);
    bench.cowvhd(&["snapshot", "state", "b.vhd", "g", "--verify"]).must_be(0);
}

/// One server is killed when its disk is sealed, then the leader: the other server commits for both.
#[test]
fn a_server_dies_after_its_disk_is_sealed() {
    let bench = Bench::new();
    let [first, second] = serve(&bench);
    let mut leader = Leader::join(&bench);
    leader.prepare();
    leader.hold();
    leader.seal(2);
    first.kill();
    leader.die();
    goes_on(&bench, &second);
    let first = bench.serve(&["a.vhd"]);
    goes_on(&bench, &first);
    assert_eq!(snapshots(&bench, [first, second]), ALL);
}

/// Where one disk is not sealed nobody can commit: a disk that was switched stops, instead of waiting for ever.
#[test]
fn a_leader_dies_between_two_seals() {
    let bench = Bench::new();
    let [first, second] = serve(&bench);
    let mut leader = Leader::join(&bench);
    leader.prepare();
    leader.hold();
    leader.seal(1);
    leader.die();
    goes_on(&bench, &second);
    let said = bench.qemu_io(first.uri(), &["write -P 7 1M 64k", "flush"]);
    assert!(said.contains("Input/output error"), "{said}");
    first.kill();
    let first = bench.serve(&["a.vhd"]);
    goes_on(&bench, &first);
    assert_eq!(snapshots(&bench, [first, second]), [""; 0]);
}

/// A leader that is stopped keeps no guest waiting: the servers have limits of their own.
#[test]
fn a_leader_that_is_too_slow_is_left() {
    let bench = Bench::new();
    let servers = serve(&bench);
    let mut leader = Leader::join(&bench);
    leader.prepare();
    leader.ask(1, json!({"request": "group-hold", "limit-ms": 1}));
    let said = leader.talks[1].answer().unwrap().to_string();
    assert!(said.contains("writes have waited for too long"), "{said}");
    servers.iter().for_each(|serving| goes_on(&bench, serving));
    drop(leader);
    assert_eq!(snapshots(&bench, servers), [""; 0]);

    let servers = serve(&bench);
    let mut leader = Leader::join(&bench);
    leader.prepare();
    leader.hold();
    let digest = leader.draft.write_manifest(leader.disks.clone()).unwrap().to_string();
    let seal = json!({"request": "group-seal", "manifest": "a@g.vmstate", "digest": digest, "limit-ms": 1});
    // The second one's limit runs when the first is sealed.
    leader.ask(0, json!({"request": "group-seal", "manifest": "a@g.vmstate", "digest": digest}));
    leader.ask(1, seal);
    let said = leader.talks[1].answer().unwrap().to_string();
    assert!(said.contains("flushes have waited for too long"), "{said}");
    goes_on(&bench, &servers[1]);
    // It has committed for both.
    assert!(bench.exists("a@g.vmstate") && !bench.exists("a@g+~manifest.vmstate"));
    leader.ask(0, json!({"request": "group-commit"}));
    drop(leader);
    assert_eq!(snapshots(&bench, servers), ALL);
}

/// What a checkpoint leaves that is cut is told by a check, and taken away by a repair as by any open.
#[test]
fn a_check_finds_what_was_cut_and_a_repair_takes_it_away() {
    for sealed in [false, true] {
        let bench = Bench::new();
        let servers = serve(&bench);
        let mut leader = Leader::join(&bench);
        leader.prepare();
        if sealed {
            leader.hold();
            leader.seal(2);
        }
        servers.into_iter().for_each(Serving::kill);
        leader.die();
        let before = bench.names();
        for (disk, child) in [("a.vhd", "a@g.vhd"), ("b.vhd", "b@g.vhd")] {
            let said = bench.cowvhd(&["check", disk]);
            let said = said.must_be(0);
            assert!(said.contains("note: snapshot-unfinished") && said.contains(child), "{said}");
            assert_eq!(said.contains("a@g+ram.vmstate"), disk == "a.vhd", "{said}");
            let said = bench.cowvhd(&["repair", "-n", disk]);
            assert!(said.stdout.contains("would do (-p): finish the snapshot"), "{said:?}");
            assert!(!said.stdout.contains("then left: note: snapshot"), "{said:?}");
        }
        let gone = |name: &String| !["vhd", "sock", "ctl"].iter().any(|end| name.ends_with(end));
        assert!(before.iter().any(gone));
        assert_eq!(bench.names(), before, "a check and a plan change nothing");
        for disk in DISKS {
            let said = bench.cowvhd(&["repair", "-p", disk]);
            assert!(said.code == 1 && said.stdout.contains("done (-p): finish the snapshot"), "{said:?}");
            let said = bench.cowvhd(&["check", disk]);
            assert!(!said.must_be(0).contains("snapshot-unfinished"), "{said:?}");
            assert_eq!(bench.info(disk)["journal"], "clean");
        }
        let left: Vec<String> = bench.names().into_iter().filter(|name| name.contains('@')).collect();
        assert_eq!(left, [""; 0], "sealed: {sealed}");
    }
}

#[test]
fn a_check_tells_of_names_that_no_disk_notes() {
    let bench = Bench::new();
    fs::write(bench.path("ram.bin"), "ram").unwrap();
    bench.cowvhd(&["create", "vm.vhd", "1G"]).must_be(0);
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "one", "--state", "ram=ram.bin"]).must_be(0);
    let said = bench.cowvhd(&["check", "vm.vhd"]);
    assert!(!said.must_be(0).contains("note"), "{said:?}");
    fs::remove_file(bench.path("vm@one.vmstate")).unwrap();
    fs::write(bench.path("vm.vhd~new"), "").unwrap();
    // The files of another disk.
    fs::write(bench.path("vm2@one+ram.vmstate"), "").unwrap();
    let said = bench.cowvhd(&["check", "vm.vhd"]);
    let said = said.must_be(0);
    assert!(said.contains("note: revert-unfinished") && said.contains("vm.vhd~new"), "{said}");
    assert!(said.contains("note: state-incomplete") && said.contains("\"one\""), "{said}");
    assert!(said.contains("vm@one+ram.vmstate") && !said.contains("vm2"), "{said}");
    let names = bench.names();
    bench.cowvhd(&["repair", "-p", "vm.vhd"]).must_be(0);
    assert_eq!(bench.names(), names);
}

#[test]
fn requests_out_of_turn_end_it() {
    let bench = Bench::new();
    let serving = bench.serve(&["a.vhd", "--create", "1G"]);
    let path = bench.path("a.vhd.ctl");
    let join = r#"{"request":"group-join","name":"g","keeps-state":true}"#;
    for line in [
        r#"{"request":"group-hold"}"#,
        r#"{"request":"group-commit"}"#,
        r#"{"request":"group-seal","manifest":"a@g.vmstate","digest":""}"#,
        r#"{"request":"group-seal","manifest":"../a@g.vmstate","digest":"00"}"#,
        r#"{"request":"status"}"#,
        join,
        "nonsense",
    ] {
        let mut talk = Talk::to(&path);
        let answer = talk.ask(line);
        // Not while it takes part in none, but for two.
        assert_eq!(answer["failed"].is_null(), line == join || line.contains("status"), "{line}: {answer}");
        if line != join {
            assert!(talk.ask(join)["done"].is_object());
        }
        let answer = talk.ask(line);
        assert_eq!(answer["failed"]["exit-code"], 16, "{line}: {answer}");
        // The disk takes part no more, and the connection can be used.
        assert_eq!(talk.ask(r#"{"request":"status"}"#)["done"]["filename"], "a.vhd");
    }
    goes_on(&bench, &serving);
    serving.terminate();
    assert_eq!(bench.names(), ["a.vhd"]);
}
