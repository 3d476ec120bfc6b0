//! The control socket of a server: how the other verbs reach a disk that is being served.
//!
//! A Unix socket beside the image, for its owner alone. A request is a line of JSON, an answer too (`protocol`); docs/tool.md has
//! the contract.

mod client;
mod crcs;
mod listener;
mod member;
mod participant;
mod protocol;
mod server;
mod sockets;
mod talks;
mod work;

pub(crate) use client::Client;
pub(crate) use crcs::CrcWriter;
pub(crate) use participant::ServedDisk;
pub(crate) use protocol::{Request, Status};
pub(crate) use server::{Control, Served};
pub(crate) use sockets::Sockets;
pub(crate) use work::{Board, WorkStatus};

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// `FILE.ctl`, beside the image.
pub(crate) fn socket_of(file: &Path) -> PathBuf {
    let mut name = OsString::from(file);
    name.push(".ctl");
    name.into()
}
