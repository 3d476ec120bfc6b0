//! Any tool that reads VHD files reads ours, as long as we have closed them; and refuses the ones we have not.
//!
//! A VHD reader that opens an image with a journal to replay would serve old or torn data without knowing. So an image
//! in use carries a mark that makes every reader refuse it, and a clean close takes the mark away. The readers here are
//! QEMU's, 7-Zip's (the strictest on structure) and libvhdi's.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use support::nbd::{self, Model};
use support::process::{output, printed, run, tool};
use support::random::{Random, seed};
use support::readers::{READERS, must_be_installed, must_equal};
use support::server::Server;

const GIB: u64 = 1 << 30;
/// No multiple of VHD's block of 2 MiB, nor of a page.
const ODD_SIZE: usize = (67 << 20) + 5 * 512;

#[test]
fn a_new_disk_is_exact_small_and_accepted() {
    must_be_installed();
    let server = Server::under_test();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("d.vhd");
    server.create(&image, "10G");

    let info = server.info(&image);
    assert_eq!(info["virtual-size"], 10 * GIB, "{info}");
    assert_eq!(info["filename"], image.to_str().unwrap(), "{info}");
    if server == Server::Cowvhd {
        assert!(info["schema"].is_number(), "{info}");
    }
    let on_disk = fs::metadata(&image).unwrap().blocks() * 512;
    assert_eq!(info["actual-size"], on_disk, "{info}");
    assert!(on_disk < 4 << 20, "{on_disk} bytes on disk");

    // QEMU is not told the format: it must recognise it.
    let theirs = run(tool("qemu-img").args(["info", "--output=json"]).arg(&image));
    let theirs: serde_json::Value = serde_json::from_str(&theirs).unwrap();
    assert_eq!(theirs["format"], "vpc", "{theirs}");
    assert_eq!(theirs["virtual-size"], 10 * GIB, "{theirs}");
    for reader in READERS {
        let said = reader.must_accept(&image);
        assert!(said.contains(&(10 * GIB).to_string()), "{reader:?} says nothing of the size: {said}");
    }
}

#[test]
fn what_nbd_clients_write_reads_the_same_everywhere() {
    must_be_installed();
    let server = Server::under_test();
    let mut random = Random::new(seed("readers"));
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("d.vhd");
    server.create(&image, &ODD_SIZE.to_string());

    // The second session finds what the first one left.
    let mut model = Model::new(ODD_SIZE);
    for session in 0..2 {
        let serving = server.serve(&image);
        let writes = model.random_writes(&mut random, 40);
        nbd::write(&serving, &writes, true);
        model.apply(&writes);
        must_equal("nbdcopy", &nbd::copy_out(&serving), &model.bytes);
        serving.close();
        for reader in READERS {
            reader.must_accept(&image);
            must_equal(&format!("{reader:?}, session {session}"), &reader.content(&image), &model.bytes);
        }
    }
}

#[test]
fn a_whole_disk_copied_in_reads_the_same_everywhere() {
    must_be_installed();
    let server = Server::under_test();
    let mut random = Random::new(seed("copied_in"));
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::new(ODD_SIZE);
    let writes = model.random_writes(&mut random, 60);
    model.apply(&writes);
    let raw = dir.path().join("source");
    fs::write(&raw, &model.bytes).unwrap();

    let image = dir.path().join("d.vhd");
    server.create(&image, &ODD_SIZE.to_string());
    let serving = server.serve(&image);
    nbd::copy_in(&serving, &raw);
    serving.close();
    for reader in READERS {
        reader.must_accept(&image);
        must_equal(&format!("{reader:?}"), &reader.content(&image), &model.bytes);
    }
}

#[test]
fn a_dirty_image_is_refused_until_it_is_recovered() {
    must_be_installed();
    let server = Server::under_test();
    let mut random = Random::new(seed("dirty"));
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("d.vhd");
    server.create(&image, &ODD_SIZE.to_string());

    let mut flushed = Model::new(ODD_SIZE);
    let mut serving = server.serve(&image);
    let writes = flushed.random_writes(&mut random, 40);
    nbd::write(&serving, &writes, true);
    flushed.apply(&writes);
    let mut submitted = Model { bytes: flushed.bytes.clone() };
    let writes = submitted.random_writes_apart(&mut random, 20);
    nbd::write(&serving, &writes, false);
    submitted.apply(&writes);
    serving.kill();

    for reader in READERS {
        reader.must_refuse(&image);
    }
    // Nor may QEMU take it for a raw disk when it is left to guess.
    let guessed = output(tool("qemu-img").arg("info").arg(&image));
    assert!(!guessed.status.success(), "{}", printed(&guessed));

    let started = Instant::now();
    let serving = server.serve(&image);
    println!("recovered and served after {:.0?}", started.elapsed());
    let recovered = nbd::copy_out(&serving);
    must_be_between(&recovered, &flushed.bytes, &submitted.bytes);
    serving.close();
    for reader in READERS {
        reader.must_accept(&image);
        must_equal(&format!("{reader:?}"), &reader.content(&image), &recovered);
    }
}

/// What was flushed, or in its place what was submitted after: sector by sector.
fn must_be_between(found: &[u8], flushed: &[u8], submitted: &[u8]) {
    assert_eq!(found.len(), flushed.len(), "the size");
    let sectors = found.chunks(512).zip(flushed.chunks(512)).zip(submitted.chunks(512));
    for (index, ((found, flushed), submitted)) in sectors.enumerate() {
        assert!(
            found == flushed || found == submitted,
            "sector {index} is neither the flushed nor a later one"
        );
    }
}
