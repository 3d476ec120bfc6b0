//! The NBD server against a client of these tests' own, which can do what no honest client does, and against real ones.

// Helpers of tests are tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod concurrency;
mod disk;
mod handshake;
mod hostile;
mod interop;
mod raw;
mod requests;
mod serving;
