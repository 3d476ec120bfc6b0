//! Standard output and standard error, which may be closed, full or a pipe that nobody reads any more.

use crate::failure::Failure;
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

/// Says something on standard error. If that cannot be done there is nobody left to tell.
pub(crate) fn say(message: impl fmt::Display) {
    // One write, so that lines of several threads and processes do not mix.
    let _ = io::stderr().lock().write_all(format!("cowvhd: {message}\n").as_bytes());
}
