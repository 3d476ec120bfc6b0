//! What is said on the control socket: one JSON object a line.

use crate::failure::{Code, Failure};
use crate::progress;
use crate::snapshot::Part;
use cowvhd::convert::{Phase, Progress};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::{self, BufRead, Read, Write};
use std::num::NonZeroU64;
use std::path::PathBuf;

/// Bytes of the longest line.
pub(crate) const MAX_LINE_BYTES: u64 = 64 << 10;

/// What a client asks for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", rename_all_fields = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// What the server serves, and to how many.
    Status {},
    /// A snapshot of the disk, with these parts of the VM's state; their files are named by absolute paths.
    SnapshotCreate {
        name: String,
        #[serde(default)]
        state: Vec<Part>,
    },
    /// The disk takes over what the layers above a point hold; without a point, all layers. A point is the name of a snapshot or the
    /// absolute path of a layer.
    Merge {
        #[serde(default)]
        until: Option<PathBuf>,
        /// Bytes that are copied in a second, at most.
        #[serde(default)]
        rate: Option<NonZeroU64>,
    },
    /// A snapshot of the disk goes.
    SnapshotDelete {
        name: String,
        #[serde(default)]
        rate: Option<NonZeroU64>,
    },
}

/// What it is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub(crate) enum Answer {
    /// How far work has come that takes long; the answer proper follows.
    Progress {
        phase: String,
        /// Bytes of the disk.
        done: u64,
        total: u64,
        copied: u64,
    },
    /// It was done; what there is to say about it.
    Done(Value),
    /// It was not done.
    Failed {
        /// The exit code of a verb that fails like this.
        exit_code: u8,
        /// Why, and what to do next.
        message: String,
    },
}

/// The answer to a request for the status.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Status {
    pub(crate) schema: u32,
    pub(crate) version: String,
    pub(crate) pid: u32,
    pub(crate) filename: String,
    pub(crate) virtual_size: u64,
    /// Where NBD clients connect.
    pub(crate) nbd: String,
    /// Clients connected now.
    pub(crate) clients: usize,
}

impl Answer {
    /// The answer for what was done or not.
    pub(crate) fn of(result: Result<Value, Failure>) -> Self {
        match result {
            Ok(value) => Answer::Done(value),
            Err(failure) => Answer::Failed { exit_code: failure.code() as u8, message: failure.to_string() },
        }
    }

    /// How far work has come.
    pub(crate) fn progress(progress: Progress) -> Self {
        let Progress { phase, done, total, copied } = progress;
        Answer::Progress { phase: progress::name(phase).into(), done, total, copied }
    }

    /// What was done or not, on the other side.
    pub(crate) fn into_result(self) -> Result<Said, Failure> {
        match self {
            Answer::Progress { phase, done, total, copied } => {
                let phase = if phase == progress::name(Phase::Sync) { Phase::Sync } else { Phase::Copy };
                Ok(Said::Progress(Progress { phase, done, total, copied }))
            }
            Answer::Done(value) => Ok(Said::Done(value)),
            Answer::Failed { exit_code, message } => {
                let codes = [Code::Usage, Code::Cancelled];
                let code = codes.into_iter().find(|&code| code as u8 == exit_code).unwrap_or(Code::Failed);
                Err(Failure::with_code(code, message))
            }
        }
    }
}

/// What a client hears.
#[derive(Debug)]
pub(crate) enum Said {
    /// How far it has come.
    Progress(Progress),
    /// It was done.
    Done(Value),
}

/// Writes a line.
pub(crate) fn send(to: &mut impl Write, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_string(what)?;
    line.push('\n');
    to.write_all(line.as_bytes())?;
    to.flush()
}

/// Reads a line; `None` at the end. One that is too long, or was not ended, is an error.
pub(crate) fn receive(from: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    from.take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
    match line.pop() {
        None => Ok(None),
        Some(b'\n') => String::from_utf8(line)
            .map(Some)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the line is not UTF-8")),
        Some(_) => {
            let what = format!("a line without end, or longer than {MAX_LINE_BYTES} bytes");
            Err(io::Error::new(io::ErrorKind::InvalidData, what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_and_have_an_end() {
        let receive = |bytes: &[u8]| receive(&mut io::BufReader::new(bytes));
        assert_eq!(receive(b"").unwrap(), None);
        assert_eq!(receive(b"{}\nmore").unwrap().as_deref(), Some("{}"));
        assert!(receive(b"{}").is_err());
        assert!(receive(b"\xff\n").is_err());
        assert!(receive(&vec![b'x'; MAX_LINE_BYTES as usize + 1]).is_err());
    }

    #[test]
    fn failures_keep_their_code() {
        let failure =
            Answer::of(Err(Failure::with_code(Code::Usage, "no".into()))).into_result().unwrap_err();
        assert_eq!((failure.code(), failure.to_string()), (Code::Usage, "no".to_string()));
    }
}
