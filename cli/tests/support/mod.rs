//! What the tests with real guests and real readers share. They drive programs, not our library: a server process, QEMU
//! as a client, other people's readers.
//!
//! - `process`: child processes that never outlive their test, and their output line by line;
//! - `server`: the server under test, behind what the tests need of one;
//! - `guest`: a Linux guest that boots in seconds;
//! - `nbd`: NBD clients, and a model of what they wrote;
//! - `readers`: other readers of VHD files;
//! - `random`: seeded choices.

// Each test binary uses its part of this.
#![allow(dead_code)]

pub mod guest;
pub mod nbd;
pub mod process;
pub mod random;
pub mod readers;
pub mod server;
