//! The one program that runs inside the test guests, beside busybox: compiled by the harness with plain rustc into a
//! static binary, so it uses nothing but std and a few declared C functions.
//!
//! - `write DIR SEED DURABLE`: goes on with the workload after step DURABLE, for ever, and says `durable N .` on the
//!   console once step N is on stable storage.
//! - `verify DIR SEED DURABLE`: says whether everything up to step DURABLE is there and intact.
//! - `attach DEVICE SOCKET`: connects the kernel's NBD client to a server, and stays while it is connected.
//! - `without-flush COMMAND...`: runs a command whose fsync and fdatasync do nothing and report success.

mod attach;
mod plan;
mod verify;
mod without_flush;
mod write;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        ["write", dir, seed, durable] => write::run(Path::new(dir), number(seed), number(durable)),
        ["verify", dir, seed, durable] => verify::run(Path::new(dir), number(seed), number(durable)),
        ["attach", device, socket] => attach::run(device, socket),
        ["without-flush", command, rest @ ..] => without_flush::run(command, rest),
        _ => Err(format!("unknown arguments {args:?}")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            println!("\nFAILED {}: {what}", args.first().unwrap_or(&"tool"));
            ExitCode::FAILURE
        }
    }
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|_| panic!("not a number: {text:?}"))
}
