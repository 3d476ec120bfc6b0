//! The NBD server against a client of these tests' own, which can do what no honest client does, and against real ones.

// Helpers of tests are tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod concurrency;
mod disk;
mod handshake;
mod hostile;
#[path = "../../../fuzz/src/input.rs"]
#[allow(dead_code, reason = "shared by all fuzz targets")]
mod input;
mod interop;
#[path = "../../../fuzz/src/nbd_bytes.rs"]
mod nbd_bytes;
mod raw;
mod requests;
mod serving;

/// An input of the fuzz target `nbd_bytes` to start from: a name, and its bytes.
type Seed = (&'static str, Vec<u8>);
