//! The NBD server against a client of these tests' own, which can do what no honest client does, and against real ones.

mod concurrency;
mod disk;
mod handshake;
mod hostile;
mod interop;
mod raw;
mod requests;
mod serving;
