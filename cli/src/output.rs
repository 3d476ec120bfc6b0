//! Standard output and standard error, which may be closed, full or a pipe that nobody reads any more.

use crate::failure::Failure;
use serde::Serialize;
use std::fmt;
use std::io::{self, Write};

/// Writes a result to standard output.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| Failure::new(format!("cannot write to standard output: {error}")))
}

/// One JSON object as it is printed.
pub(crate) fn json(object: &impl Serialize) -> Result<String, Failure> {
    let json = serde_json::to_string_pretty(object);
    let json = json.map_err(|error| Failure::new(format!("cannot write JSON: {error}")))?;
    Ok(format!("{json}\n"))
}

/// Writes one JSON object to standard output.
pub(crate) fn print_json(object: &impl Serialize) -> Result<(), Failure> {
    print(&json(object)?)
}

/// Says something on standard error. If that cannot be done there is nobody left to tell.
pub(crate) fn say(message: impl fmt::Display) {
    // One write, so that lines of several threads and processes do not mix.
    let _ = io::stderr().lock().write_all(format!("cowvhd: {message}\n").as_bytes());
}
