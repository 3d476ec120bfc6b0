//! Real clients: QEMU's tools, libnbd's and fio. One that is missing fails its test and says how to install it.

use crate::serving::{MIB, Running, serve, serve_memory};
use cowvhd_export::MemoryBackend;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

fn package_of(tool: &str) -> &'static str {
    match tool {
        "qemu-io" | "qemu-img" => "qemu-utils",
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        "fio" => "fio",
        _ => "unknown",
    }
}

/// Runs a client and returns what it printed; its failure is the test's.
fn run(tool: &str, arguments: &[&str]) -> String {
    // Somewhere else than in the sources: fio leaves files where it runs.
    let directory = tempfile::tempdir().unwrap();
    let output = match Command::new(tool).args(arguments).current_dir(&directory).output() {
        Ok(output) => output,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            panic!("{tool} is not installed; run: apt-get install {}", package_of(tool))
        }
        Err(error) => panic!("{tool}: {error}"),
    };
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {arguments:?}: {}\n{text}", output.status);
    text
}

fn qemu_io(server: &Running, commands: &[&str]) -> String {
    let uri = server.uri();
    let mut arguments = vec!["-f", "raw"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(&uri);
    let text = run("qemu-io", &arguments);
    assert!(!text.contains("failed"), "{commands:?}: {text}");
    text
}

/// A file with data, long holes and zeros.
fn sparse_file(path: &Path, size: u64) -> Vec<u8> {
    let mut content = vec![0; size as usize];
    for (at, byte) in content.iter_mut().enumerate() {
        if (at >> 18) % 3 == 0 {
            *byte = (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(20) as u8;
        }
    }
    std::fs::write(path, &content).unwrap();
    content
}

#[test]
fn qemu_io_writes_reads_zeroes_and_discards() {
    let server = serve_memory(64 * MIB);
    qemu_io(
        &server,
        &[
            "write -P 0x11 0 1M",
            "write -P 0x22 512 512",
            "write -f -P 0x33 2M 64k",
            "write -z 4k 4k",
            "write -z -u 8k 4k",
            "aio_write -P 0x44 32M 8M",
            "aio_write -P 0x55 3M 128k",
            "aio_flush",
            "flush",
        ],
    );
    qemu_io(
        &server,
        &[
            "read -P 0x11 0 512",
            "read -P 0x22 512 512",
            "read -P 0x11 1k 3k",
            "read -P 0 4k 8k",
            "read -P 0x11 12k 1012k",
            "read -P 0x33 2M 64k",
            "read -P 0x55 3M 128k",
            "read -P 0x44 32M 8M",
            "read -P 0 48M 16M",
            "discard 32M 8M",
            "read -P 0 32M 8M",
        ],
    );
}

#[test]
fn qemu_io_is_refused_by_a_read_only_export() {
    let server = serve(Arc::new(MemoryBackend::new(MIB).into_read_only()));
    let uri = server.uri();
    run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 0 1M", &uri]);
    let output = Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 512", &uri]).output().unwrap();
    assert!(!output.status.success());
}

#[test]
fn qemu_img_copies_in_maps_and_compares() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source.raw");
    sparse_file(&source, 24 * MIB);
    let source = source.to_str().unwrap();
    let server = serve_memory(24 * MIB);
    let uri = server.uri();
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", source, &uri]);
    let same = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &uri]);
    assert!(same.contains("identical"), "{same}");
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    assert!(map.contains("\"data\": true") && map.contains("\"zero\": true"), "{map}");
    let copy = directory.path().join("copy.raw");
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, copy.to_str().unwrap()]);
    assert_eq!(std::fs::read(copy).unwrap(), std::fs::read(source).unwrap());
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    let server = serve_memory(64 * MIB);
    let text = run("nbdinfo", &[&server.uri()]);
    for line in [
        "newstyle-fixed without TLS, using structured packets",
        "export-size: 67108864",
        "base:allocation",
        "is_read_only: false",
        "can_cache: true",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_minimum: 512",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
    ] {
        assert!(text.contains(line), "{line} is missing from:\n{text}");
    }
    run("nbdinfo", &["--list", &server.uri()]);
    qemu_io(&server, &["write 16M 1M"]);
    let map = run("nbdinfo", &["--map", "--json", &server.uri()]);
    let types = map.matches("\"type\": 3").count();
    assert_eq!((types, map.matches("\"type\": 0").count()), (2, 1), "{map}");
}

#[test]
fn nbdcopy_copies_both_ways_over_several_connections() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source.raw");
    let content = sparse_file(&source, 40 * MIB);
    let copy = directory.path().join("copy.raw");
    let server = serve_memory(40 * MIB);
    let uri = server.uri();
    run("nbdcopy", &["--connections=4", "--flush", source.to_str().unwrap(), &uri]);
    run("nbdcopy", &["--connections=4", &uri, copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == content);
    let target = serve_memory(40 * MIB);
    run("nbdcopy", &["--destination-is-zero", &uri, &target.uri()]);
    run("nbdcopy", &[&target.uri(), copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == content);
}

#[test]
fn fio_verifies_what_it_wrote_at_depth() {
    let server = serve_memory(64 * MIB);
    let uri = format!("--uri={}", server.uri());
    let common = [
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bsrange=512-256k",
        "--blockalign=512",
        "--size=64m",
        "--iodepth=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--randseed=7",
    ];
    let text = run("fio", &common);
    assert!(text.contains("err= 0"), "{text}");
}

#[test]
fn fio_mixes_reads_and_writes_from_several_clients() {
    let server = serve_memory(64 * MIB);
    let uri = format!("--uri={}", server.uri());
    let common = [
        "--name=mixed",
        "--ioengine=nbd",
        &uri,
        "--rw=randrw",
        "--bs=4k",
        "--size=16m",
        "--offset_increment=16m",
        "--numjobs=4",
        "--thread=0",
        "--iodepth=16",
        "--fsync=64",
        "--verify=md5",
        "--verify_fatal=1",
    ];
    let text = run("fio", &common);
    assert!(!text.contains("verify:"), "{text}");
}
