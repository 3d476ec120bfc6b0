//! The control socket of a server: who can reach it, and what it answers.

#![allow(clippy::unwrap_used, reason = "helpers are test code too")]

mod tool_support;

use serde_json::json;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use tool_support::{Bench, Signal, Talk, listens};

#[test]
fn the_server_tells_its_status() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "vm.vhd", "1G"]).must_be(0);
    bench.cowvhd(&["status", "vm.vhd"]).must_say(1, &["vm.vhd", "no server"]);
    let serving = bench.serve(&["vm.vhd"]);
    let socket = fs::metadata(bench.path("vm.vhd.ctl")).unwrap();
    assert!(socket.file_type().is_socket());
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);

    let ended = bench.cowvhd(&["status", "vm.vhd", "--json"]);
    let status: serde_json::Value = serde_json::from_str(ended.must_be(0)).unwrap();
    assert_eq!(status["schema"], 1);
    assert_eq!(status["filename"], "vm.vhd");
    assert_eq!(status["pid"], serving.id());
    assert_eq!(status["virtual-size"], 1 << 30);
    assert_eq!(status["nbd"], serving.uri());
    assert_eq!(status["clients"], 0);
    let client = UnixStream::connect(bench.path("vm.vhd.sock")).unwrap();
    let mut greeting = BufReader::new(client);
    assert!(!greeting.fill_buf().unwrap().is_empty());
    let ended = bench.cowvhd(&["status", "vm.vhd"]);
    assert!(ended.must_be(0).contains("vm.vhd (1 GiB)") && ended.stdout.contains("to 1 client"), "{ended:?}");
    serving.terminate();
    assert_eq!(bench.names(), ["vm.vhd"]);
}

#[test]
fn what_it_does_not_understand_it_says() {
    let bench = Bench::new();
    let serving = bench.serve(&["vm.vhd", "--create", "1G"]);
    let mut talk = Talk::to(&bench.path("vm.vhd.ctl"));
    for line in [r#"{"request":"explode"}"#, "{}", "[]", "nonsense", r#"{"request":"status","more":1}"#, ""] {
        let answer = talk.ask(line);
        assert_eq!(answer["failed"]["exit-code"], 16, "{line}: {answer}");
    }
    assert_eq!(talk.ask(r#"{"request":"status"}"#)["done"]["filename"], "vm.vhd");
    // More than a line may have ends the connection, and nothing else.
    let mut hostile = Talk::to(&bench.path("vm.vhd.ctl"));
    let _ = hostile.0.get_mut().write_all(&vec![b'x'; 1 << 20]);
    let mut first = String::new();
    if hostile.0.read_line(&mut first).is_ok_and(|count| count > 0) {
        assert!(first.contains("failed"), "{first}");
    }
    assert_eq!(talk.ask(r#"{"request":"status"}"#)["done"]["filename"], "vm.vhd");
    // Nobody who stays connected keeps the server from ending.
    serving.terminate();
    assert_eq!(talk.answer(), None);
}

/// Requests that are understood and mean harm or nonsense: each is refused in its turn, and nothing is made or changed by it.
#[test]
fn requests_that_make_no_sense_change_nothing() {
    let bench = Bench::new();
    let serving = bench.serve(&["vm.vhd", "--create", "1G"]);
    bench.run("mkfifo", &["fifo"]).must_be(0);
    fs::create_dir(bench.path("folder")).unwrap();
    let before = bench.names();
    let mut talk = Talk::to(&bench.path("vm.vhd.ctl"));
    let nested = "[".repeat(60_000);
    let state = |file: &str| {
        let part = json!({"name": "ram", "file": file});
        json!({"request": "snapshot-create", "name": "one", "state": [part]}).to_string()
    };
    for line in [
        nested.as_str(),
        &format!("{{\"request\":{nested}"),
        "{\"request\":\"status\"\0}",
        r#"{"request":"snapshot-create","name":"../one"}"#,
        r#"{"request":"snapshot-create","name":""}"#,
        r#"{"request":"snapshot-create","name":"a\u0000b"}"#,
        &json!({"request": "snapshot-create", "name": "n".repeat(60_000)}).to_string(),
        // Files that would be waited for, or that have no end.
        &state(bench.path("fifo").to_str().unwrap()),
        &state("/dev/zero"),
        &state(bench.path("folder").to_str().unwrap()),
        &state("/nothing"),
        r#"{"request":"snapshot-delete","name":"none"}"#,
        r#"{"request":"snapshot-delete","name":"../../etc"}"#,
        r#"{"request":"merge","until":"/etc/passwd"}"#,
        r#"{"request":"merge","rate":0}"#,
        r#"{"request":"merge","rate":-1}"#,
        r#"{"request":"group-commit"}"#,
        r#"{"request":"group-seal","manifest":"x","digest":""}"#,
        r#"{"request":"group-hold","limit-ms":18446744073709551615}"#,
        r#"{"request":"group-join","name":"../one"}"#,
    ] {
        let answer = talk.ask(line);
        assert!(answer["failed"]["message"].is_string(), "{}: {answer}", &line[..line.len().min(100)]);
    }
    // The longest that a guest can be made to wait is the server's own limit, whatever is asked for.
    assert!(talk.ask(r#"{"request":"group-join","name":"one"}"#)["done"].is_object());
    assert!(talk.ask(r#"{"request":"group-prepare"}"#)["done"].is_object());
    assert!(talk.ask(r#"{"request":"group-hold","limit-ms":18446744073709551615}"#)["done"].is_object());
    assert!(talk.ask(r#"{"request":"group-leave"}"#)["done"].is_object());
    assert_eq!(talk.ask(r#"{"request":"status"}"#)["done"]["filename"], "vm.vhd");
    assert_eq!(bench.names(), before);
    // Bytes that are no text end the connection.
    talk.0.get_mut().write_all(b"\xff\xfe\n").unwrap();
    assert_eq!(talk.answer().unwrap()["failed"]["exit-code"], 16);
    assert_eq!(talk.answer(), None);
    serving.terminate();
}

/// So many are connected at once; those that ask for nothing keep nobody out.
#[test]
fn silent_clients_give_way() {
    let bench = Bench::new();
    let serving = bench.serve(&["vm.vhd", "--create", "1G"]);
    let path = bench.path("vm.vhd.ctl");
    let mut talks: Vec<Talk> = (0..8).map(|_| Talk::to(&path)).collect();
    for talk in &mut talks {
        assert_eq!(talk.ask(r#"{"request":"status"}"#)["done"]["schema"], 1);
    }
    let mut ninth = Talk::to(&path);
    assert_eq!(ninth.ask(r#"{"request":"status"}"#)["done"]["schema"], 1);
    let dismissed = talks[0].answer().unwrap();
    assert_eq!(dismissed["failed"]["exit-code"], 1, "{dismissed}");
    assert_eq!(talks[0].answer(), None);
    for talk in &mut talks[1..] {
        assert_eq!(talk.ask(r#"{"request":"status"}"#)["done"]["schema"], 1);
    }
    let threads = || fs::read_dir(format!("/proc/{}/task", serving.id())).unwrap().count();
    let before = threads();
    let crowd: Vec<UnixStream> = (0..1000).map(|_| UnixStream::connect(&path).unwrap()).collect();
    bench.cowvhd(&["status", "vm.vhd"]).must_be(0);
    assert!(threads() <= before + 1, "{} threads, {before} before", threads());
    drop(crowd);
    bench.cowvhd(&["status", "vm.vhd"]).must_be(0);
    serving.terminate();
}

/// While the server may open nothing more it can accept nobody. Both of its sockets outlive that.
#[test]
fn a_server_out_of_descriptors_accepts_again_when_it_has_some() {
    use rustix::process::{Pid, Resource, Rlimit, prlimit};
    let bench = Bench::new();
    let mut serving = bench.serve(&["vm.vhd", "--create", "1G"]);
    let pid = Pid::from_raw(serving.id() as i32);
    let few = |maximum| Rlimit { current: Some(3), maximum };
    for (socket, words) in [("vm.vhd.ctl", "control socket: cannot accept"), ("vm.vhd.sock", "cannot accept")]
    {
        let before =
            prlimit(pid, Resource::Nofile, few(rustix::process::getrlimit(Resource::Nofile).maximum))
                .unwrap();
        let client = UnixStream::connect(bench.path(socket)).unwrap();
        let said = serving.said();
        assert!(said.contains(words), "{said}");
        prlimit(pid, Resource::Nofile, before).unwrap();
        let mut client = BufReader::new(client);
        if socket.ends_with("sock") {
            assert!(!client.fill_buf().unwrap().is_empty());
        } else {
            assert_eq!(Talk(client).ask(r#"{"request":"status"}"#)["done"]["schema"], 1);
        }
    }
    serving.signal(Signal::TERM);
    assert_eq!(serving.end().code, 0);
}

#[test]
fn the_socket_lies_where_it_is_told() {
    let bench = Bench::new();
    let serving = bench.serve(&["vm.vhd", "--create", "1G", "--control", "other.ctl"]);
    assert!(listens(&bench.path("other.ctl")) && !bench.exists("vm.vhd.ctl"));
    // A killed server's is replaced.
    serving.kill();
    let serving = bench.serve(&["vm.vhd", "--control", "other.ctl"]);
    assert!(listens(&bench.path("other.ctl")));
    serving.terminate();
    fs::write(bench.path("vm.vhd.ctl"), "a file").unwrap();
    bench.cowvhd(&["serve", "vm.vhd"]).must_say(1, &["vm.vhd.ctl", "--control"]);
    assert_eq!(bench.info("vm.vhd")["journal"], "clean");
    fs::remove_file(bench.path("vm.vhd.ctl")).unwrap();
    // Those that change nothing have none.
    let serving = bench.serve(&["vm.vhd", "--read-only"]);
    assert_eq!(bench.names(), ["vm.vhd", "vm.vhd.sock"]);
    serving.terminate();
    bench.cowvhd(&["serve", "vm.vhd", "--read-only", "--control", "x"]).must_say(16, &["--control"]);
}

/// Every verb that asks a server finds one that was told where to listen, by the same option, and is told so when it does not.
#[test]
fn a_server_elsewhere_is_asked_by_the_same_option() {
    let bench = Bench::new();
    let serving = bench.serve(&["vm.vhd", "--create", "64M", "--control", "elsewhere"]);
    let other = bench.serve(&["other.vhd", "--create", "64M", "--control", "other.ctl"]);
    let verbs: [&[&str]; 4] = [
        &["snapshot", "create", "vm.vhd", "a"],
        &["snapshot", "create", "vm.vhd", "other.vhd", "--group", "g"],
        &["snapshot", "delete", "vm.vhd", "g"],
        &["merge", "vm.vhd"],
    ];
    for verb in verbs {
        bench.cowvhd(verb).must_say(1, &["in use by", "--control"]);
        let asked = |sockets: &[&str]| bench.cowvhd(&[verb, sockets].concat());
        if verb.contains(&"--group") {
            asked(&["--control", "other.ctl", "--control", "elsewhere"]).must_be(0);
        } else {
            // Whatever is asked is done to the disk that was named, or not at all.
            asked(&["--control", "other.ctl"]).must_say(16, &["other.vhd open, not vm.vhd"]);
            asked(&["--control", "elsewhere"]).must_be(0);
        }
    }
    bench.cowvhd(&["merge", "vm.vhd", "--control", "nowhere"]).must_say(1, &["nowhere", "no server listens"]);
    bench.cowvhd(&["status", "vm.vhd"]).must_say(1, &["no server", "--control"]);
    let ended = bench.cowvhd(&["status", "vm.vhd", "--control", "elsewhere", "--json"]);
    let status: serde_json::Value = serde_json::from_str(ended.must_be(0)).unwrap();
    assert_eq!(status["pid"], serving.id());
    assert_eq!(status["path"], bench.path("vm.vhd").canonicalize().unwrap().to_str().unwrap());
    serving.terminate();
    other.terminate();
    assert_eq!(bench.names(), ["other.vhd", "other@g.vhd", "vm.vhd", "vm@a.vhd", "vm@g.vmstate"]);
}

/// The path of a socket is short; that of an image need not be.
#[test]
fn a_disk_deep_down_is_served_without() {
    let bench = Bench::new();
    let deep = ["d".repeat(100), "vm.vhd".into()].join("/");
    fs::create_dir(bench.path(&"d".repeat(100))).unwrap();
    let mut serving = bench.serve(&[&deep, "--create", "1G", "--nbd", "s.sock"]);
    let said = serving.said();
    assert!(said.contains("no control socket"), "{said}");
    bench.cowvhd(&["status", &deep]).must_say(1, &["no server"]);
    serving.terminate();
}

/// The server writes CRCs for the data of a snapshot that it took; a small one's also if it ends at once.
#[test]
fn snapshots_of_a_server_get_crcs() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "vm.vhd", "64M"]).must_be(0);
    let disk = cowvhd::OpenOptions::new().open(&bench.path("vm.vhd")).unwrap();
    disk.write_at(&[7; 8192], 4 << 20).unwrap();
    disk.close().unwrap();
    let serving = bench.serve(&["vm.vhd"]);
    bench.cowvhd(&["snapshot", "create", "vm.vhd", "one"]).must_be(0);
    serving.terminate();
    let said = bench.cowvhd(&["verify", "vm@one.vhd"]);
    assert!(said.must_be(0).contains("\n  2097152 bytes of data proven, 0 not proven\n"), "{said:?}");
}
