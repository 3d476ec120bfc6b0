//! `serve`: what it says, who may share what, and how it ends.

#![allow(clippy::unwrap_used, reason = "helpers are test code too")]

mod tool_support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use tool_support::{Bench, Serving, Signal, listens};

#[test]
fn the_ready_line_says_where() {
    let bench = Bench::new();
    let serving = bench.serve(&["vm.vhd", "--create", "64G"]);
    assert_eq!(serving.ready, "serving vm.vhd (64 GiB) at nbd+unix:///?socket=vm.vhd.sock\n");
    assert!(fs::metadata(bench.path("vm.vhd.sock")).unwrap().file_type().is_socket());
    assert_eq!(bench.names(), ["vm.vhd", "vm.vhd.ctl", "vm.vhd.sock"]);

    let served = bench.info("vm.vhd");
    assert_eq!((&served["journal"], &served["dirty-flag"]), (&"dirty".into(), &true.into()));

    let said = serving.terminate();
    assert_eq!(said, "cowvhd: ending: finishing requests, then closing the disk\n");
    assert_eq!(bench.names(), ["vm.vhd"]);
    let closed = bench.info("vm.vhd");
    assert_eq!((&closed["journal"], &closed["dirty-flag"]), (&"clean".into(), &false.into()));
}

#[test]
fn what_was_written_is_there_after_a_restart() {
    let bench = Bench::new();
    let serving = bench.serve(&["vm.vhd", "--create", "1G"]);
    let said = bench.qemu_io(
        serving.uri(),
        &["write -P 7 1M 3M", "write -P 9 1073741312 512", "discard 2M 1M", "write -z 3M 64k", "flush"],
    );
    assert!(!said.contains("failed"), "{said}");
    serving.terminate();

    let serving = bench.serve(&["vm.vhd"]);
    let said = bench.qemu_io(
        serving.uri(),
        &[
            "read -P 0 0 1M",
            "read -P 7 1M 1M",
            "read -P 0 3M 64k",
            "read -P 7 3136k 960k",
            "read -P 9 1073741312 512",
        ],
    );
    assert!(!said.contains("failed") && said.matches("read ").count() == 5, "{said}");
}

/// What was flushed survives SIGKILL, the next open says what it did, and the socket left behind is replaced.
#[test]
fn a_killed_servers_disk_is_recovered_and_its_socket_replaced() {
    let bench = Bench::new();
    let serving = bench.serve(&["vm.vhd", "--create", "1G"]);
    let said = bench.qemu_io(serving.uri(), &["write -P 7 1M 3M", "flush"]);
    assert!(!said.contains("failed"), "{said}");
    serving.kill();
    assert!(bench.exists("vm.vhd.sock"));
    assert_eq!(bench.info("vm.vhd")["journal"], "dirty");

    let serving = bench.serve(&["vm.vhd"]);
    let said = bench.qemu_io(serving.uri(), &["read -P 7 1M 3M"]);
    assert!(!said.contains("failed") && said.contains("read "), "{said}");
    let said = serving.terminate();
    assert!(said.starts_with("cowvhd: vm.vhd: recovered from its journal"), "{said}");
    assert_eq!(bench.names(), ["vm.vhd"]);
}

#[test]
fn a_disk_has_one_writer() {
    let bench = Bench::new();
    let serving = bench.serve(&["vm.vhd", "--create", "1G"]);
    for arguments in [
        &["serve", "vm.vhd"][..],
        &["serve", "vm.vhd", "--read-only"],
        &["serve", "vm.vhd", "--nbd", "other.sock"],
    ] {
        bench.cowvhd(arguments).must_say(1, &["vm.vhd", "in use"]);
    }
    // The failed attempts left the first server and its socket alone.
    assert_eq!(bench.names(), ["vm.vhd", "vm.vhd.ctl", "vm.vhd.sock"]);
    let said = bench.qemu_io(serving.uri(), &["write 0 64k"]);
    assert!(said.contains("wrote"), "{said}");

    let their_info = || bench.command("qemu-img").args(["info", "-f", "vpc", "vm.vhd"]).output().unwrap();
    let theirs = their_info();
    assert!(!theirs.status.success());
    assert!(String::from_utf8_lossy(&theirs.stderr).contains("lock"), "{theirs:?}");
    serving.terminate();
    assert!(their_info().status.success());
}

#[test]
fn a_live_socket_and_what_is_no_socket_stay() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "vm.vhd", "1G"]).must_be(0);
    let other = UnixListener::bind(bench.path("live.sock")).unwrap();
    fs::write(bench.path("file"), "data").unwrap();
    for taken in ["live.sock", "file"] {
        bench.cowvhd(&["serve", "vm.vhd", "--nbd", taken]).must_say(1, &[taken, "--nbd"]);
    }
    assert!(listens(&bench.path("live.sock")));
    drop(other);
    assert_eq!(fs::read(bench.path("file")).unwrap(), b"data");
    // The disk was closed again.
    assert_eq!(bench.info("vm.vhd")["journal"], "clean");

    // Now nobody listens there any more.
    assert!(bench.exists("live.sock"));
    let serving = bench.serve(&["vm.vhd", "--nbd", "live.sock"]);
    assert!(listens(&bench.path("live.sock")));
    serving.terminate();
    assert!(!bench.exists("live.sock"));
}

#[test]
fn create_opens_a_disk_of_that_size_and_no_other() {
    let bench = Bench::new();
    bench.serve(&["vm.vhd", "--create", "1G"]).terminate();
    let id = bench.info("vm.vhd")["unique-id"].clone();
    bench.serve(&["vm.vhd", "--create", "1024M"]).terminate();
    assert_eq!(bench.info("vm.vhd")["unique-id"], id);

    bench
        .cowvhd(&["serve", "vm.vhd", "--create", "2G"])
        .must_say(1, &["vm.vhd", "1 GiB", "2 GiB", "--create"]);
    let info = bench.info("vm.vhd");
    assert_eq!(
        (&info["unique-id"], &info["virtual-size"], &info["journal"]),
        (&id, &(1 << 30).into(), &"clean".into())
    );
    bench.cowvhd(&["serve", "new.vhd", "--create", "3T"]).must_say(16, &["2040 GiB"]);
    assert_eq!(bench.names(), ["vm.vhd"]);
}

#[test]
fn read_only_serves_several_and_changes_nothing() {
    let bench = Bench::new();
    let serving = bench.serve(&["vm.vhd", "--create", "1G"]);
    bench.qemu_io(serving.uri(), &["write -P 7 0 64k", "flush"]);
    // A dirty file: reading it must not recover it.
    serving.kill();
    let before = fs::read(bench.path("vm.vhd")).unwrap();

    let first = bench.serve(&["vm.vhd", "--read-only"]);
    let second = bench.serve(&["vm.vhd", "--read-only", "--nbd", "unix:second.sock"]);
    assert_eq!(second.uri(), "nbd+unix:///?socket=second.sock");
    for serving in [&first, &second] {
        let said = bench.qemu_io_with(&["-r"], serving.uri(), &["read -P 7 0 64k"]);
        assert!(!said.contains("failed") && said.contains("read "), "{said}");
        let said = bench.qemu_io(serving.uri(), &["write 0 64k"]);
        assert!(!said.contains("wrote"), "{said}");
    }
    bench.cowvhd(&["serve", "vm.vhd", "--nbd", "third.sock"]).must_say(1, &["in use"]);
    first.terminate();
    second.terminate();
    assert!(fs::read(bench.path("vm.vhd")).unwrap() == before, "the file has changed");
}

#[test]
fn a_signal_ends_it_in_order() {
    let bench = Bench::new();
    for signal in [Signal::TERM, Signal::INT] {
        let mut serving = bench.serve(&["vm.vhd", "--create", "1G", "--pid-file", "vm.pid"]);
        assert_eq!(fs::read_to_string(bench.path("vm.pid")).unwrap(), format!("{}\n", serving.id()));
        // An idle client does not hold it up.
        let client = UnixStream::connect(bench.path("vm.vhd.sock")).unwrap();
        serving.signal(signal);
        let ended = serving.end();
        assert_eq!(ended.code, 0, "{ended:?}");
        drop(client);
        assert_eq!(bench.names(), ["vm.vhd"]);
        assert_eq!(bench.info("vm.vhd")["journal"], "clean");
    }
}

/// A client that fetches no answers holds the end up for a while; whoever cannot wait interrupts again.
#[test]
fn a_second_interrupt_gives_up() {
    let bench = Bench::new();
    let mut serving = bench.serve(&["vm.vhd", "--create", "1G"]);
    let client = client_that_fetches_nothing(&bench.path("vm.vhd.sock"));
    serving.signal(Signal::INT);
    assert!(serving.said().contains("ending"));
    serving.signal(Signal::INT);
    let ended = serving.end();
    ended.must_say(32, &["interrupted again", "recovers"]);
    drop(client);
    assert_eq!(bench.info("vm.vhd")["journal"], "dirty");
    let said = bench.serve(&["vm.vhd"]).terminate();
    assert!(said.contains("recovered"), "{said}");
}

/// Negotiates, asks for more than any socket buffers, and reads none of it.
fn client_that_fetches_nothing(socket: &Path) -> UnixStream {
    let mut client = UnixStream::connect(socket).unwrap();
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).unwrap();
    // Fixed newstyle without padding; the option that names the export, by its empty name.
    client.write_all(&[0, 0, 0, 3]).unwrap();
    client.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    let mut export = [0; 10];
    client.read_exact(&mut export).unwrap();
    assert_eq!(export[..8], (1u64 << 30).to_be_bytes());
    for _ in 0..4 {
        let mut request = [0; 28];
        request[..4].copy_from_slice(&0x25609513u32.to_be_bytes());
        request[24..].copy_from_slice(&(8u32 << 20).to_be_bytes());
        client.write_all(&request).unwrap();
    }
    // The first answer has begun.
    client.read_exact(&mut [0]).unwrap();
    client
}

/// A file system that is full, in the shape of a limit on the size of files.
#[test]
fn a_failed_request_is_logged_with_place_and_reason() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "vm.vhd", "1G"]).must_be(0);
    let mut command = bench.command("bash");
    // 25 is SIGXFSZ, which would end the server; ignored, writing past the limit fails. The limit is in KiB.
    command.args(["-c", "trap '' 25; ulimit -f 32768; exec \"$@\"", "-", env!("CARGO_BIN_EXE_cowvhd")]);
    let mut serving = Serving::start(command.args(["serve", "vm.vhd"]));
    let said = bench.qemu_io(serving.uri(), &["write -P 7 0 4M", "flush", "write 64M 32M", "read -P 7 0 4M"]);
    assert!(said.contains("No space left on device") && said.contains("read "), "{said}");
    let line = serving.said();
    for word in
        ["time=20", "event=io-error", "path=\"vm.vhd\"", "request=write offset=", "errno=28", "error=\""]
    {
        assert!(line.contains(word), "{word} is not in {line}");
    }
    serving.terminate();
    assert_eq!(bench.info("vm.vhd")["journal"], "clean");
}

#[test]
fn a_pid_file_that_cannot_be_written_ends_it_in_order() {
    let bench = Bench::new();
    bench
        .cowvhd(&["serve", "vm.vhd", "--create", "1G", "--pid-file", "no/dir/pid"])
        .must_say(1, &["no/dir/pid"]);
    assert_eq!(bench.names(), ["vm.vhd"]);
    assert_eq!(bench.info("vm.vhd")["journal"], "clean");
}

#[test]
fn tcp_is_for_this_machine_unless_told_otherwise() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "vm.vhd", "1G"]).must_be(0);
    bench
        .cowvhd(&["serve", "vm.vhd", "--nbd", "tcp:0.0.0.0:0"])
        .must_say(16, &["0.0.0.0", "other machines", "--allow-remote"]);

    let serving = bench.serve(&["vm.vhd", "--nbd", "tcp:127.0.0.1:0"]);
    assert!(serving.uri().starts_with("nbd://127.0.0.1:"), "{}", serving.ready);
    let said = bench.qemu_io(serving.uri(), &["write -P 7 0 64k", "read -P 7 0 64k"]);
    assert!(!said.contains("failed") && said.contains("read "), "{said}");
    assert_eq!(bench.names(), ["vm.vhd", "vm.vhd.ctl"]);
    serving.terminate();
}

#[test]
fn odd_names_make_good_uris() {
    let bench = Bench::new();
    let serving = bench.serve(&["my disk & co%.vhd", "--create", "1G"]);
    assert!(serving.uri().contains("my%20disk%20%26%20co%25.vhd.sock"), "{}", serving.ready);
    // QEMU decodes the query before it looks for "&" in it, and so cannot reach such a socket by URI.
    let size = bench.command("nbdinfo").arg("--size").arg(serving.uri()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&size.stdout), "1073741824\n", "{size:?}");
}

/// A service manager may give it no place to print to.
#[test]
fn a_closed_standard_output_does_not_stop_it() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "vm.vhd", "1G"]).must_be(0);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let (mut errors, errors_writer) = std::io::pipe().unwrap();
    let mut command = bench.command(env!("CARGO_BIN_EXE_cowvhd"));
    command.args(["serve", "vm.vhd"]).stdout(writer).stderr(errors_writer);
    let mut child = KillOnDrop(command.spawn().unwrap());
    drop(command);
    let mut first = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(&mut errors), &mut first).unwrap();
    assert!(first.contains("standard output"), "{first}");
    assert!(listens(&bench.path("vm.vhd.sock")));
    rustix::process::kill_process(rustix::process::Pid::from_child(&child.0), Signal::TERM).unwrap();
    assert_eq!(child.0.wait().unwrap().code(), Some(0));
}

/// The fault that tests can have put in is in no build that is not for them.
#[cfg(not(feature = "test-faults"))]
#[test]
fn the_tool_cannot_be_told_to_lose_data() {
    let binary = fs::read(env!("CARGO_BIN_EXE_cowvhd")).unwrap();
    assert!(!binary.windows(FAULT.len()).any(|bytes| bytes == FAULT.as_bytes()));
}

/// And where it is, the tests of crashes see it.
#[cfg(feature = "test-faults")]
#[test]
fn flushes_that_do_nothing_lose_data() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "vm.vhd", "1G"]).must_be(0);
    let mut command = bench.command(env!("CARGO_BIN_EXE_cowvhd"));
    let mut serving = Serving::start(command.args(["serve", "vm.vhd"]).env(FAULT, "1"));
    assert!(serving.said().contains(FAULT));
    let said = bench.qemu_io(serving.uri(), &["write -P 7 1M 3M", "flush", "write -f -P 7 8M 1M"]);
    assert!(!said.contains("failed"), "{said}");
    serving.kill();
    let serving = bench.serve(&["vm.vhd"]);
    let said = bench.qemu_io(serving.uri(), &["read -P 7 1M 3M", "read -P 7 8M 1M"]);
    assert_eq!(said.matches("Pattern verification failed").count(), 2, "{said}");
}

const FAULT: &str = "COWVHD_TEST_IGNORE_FLUSH";

struct KillOnDrop(std::process::Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
