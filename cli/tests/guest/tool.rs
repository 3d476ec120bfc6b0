//! The one program that runs inside the test guests, beside busybox: compiled by the harness with plain rustc into a
//! static binary, so it uses nothing but std and a few declared C functions.
//!
//! - `write DIRS SEED DURABLE`: goes on with the workload after step DURABLE, for ever, and says `durable N .` on the
//!   console once step N is on stable storage. DIRS are one or more, with colons between: each step is done in all of them.
//! - `verify DIRS SEED DURABLE`: says whether everything up to step DURABLE is there and intact.
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
        ["write", dirs, seed, durable] => write::run(&places(dirs, seed), number(durable)),
        ["verify", dirs, seed, durable] => verify::run(&places(dirs, seed), number(durable)),
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

/// The directories, with a seed for each, so that none of them holds what another does.
fn places<'a>(dirs: &'a str, seed: &str) -> Vec<(&'a Path, u64)> {
    dirs.split(':').map(Path::new).zip(number(seed)..).collect()
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|_| panic!("not a number: {text:?}"))
}
