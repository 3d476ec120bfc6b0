//! What is said on the control socket: one JSON object a line.

use super::work::WorkStatus;
use crate::failure::{Code, Failure};
use crate::progress;
use crate::snapshot::Part;
use cowvhd::convert::{Phase, Progress};
use cowvhd::snapshot::Participant;
use cowvhd::state::ManifestDisk;
use cowvhd::vhd::UniqueId;
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
    /// The disk is to take part in a checkpoint of several, which this connection leads; the steps of it follow.
    GroupJoin {
        name: String,
        /// The files of the state are called after this disk.
        #[serde(default)]
        keeps_state: bool,
    },
    /// Makes the file that is to take the guest's changes.
    GroupPrepare {},
    /// Holds the guest's changes.
    GroupHold {
        /// How long at most; the server's own limit without.
        #[serde(default)]
        limit_ms: Option<u64>,
    },
    /// Lets changes go on, into the new file, and seals the old one, while flushes wait.
    GroupSeal {
        /// File name of the manifest.
        manifest: String,
        digest: Digits,
        /// How long flushes wait for the commit at most; the server's own limit without.
        #[serde(default)]
        limit_ms: Option<u64>,
    },
    /// The manifest has its name: the rest.
    GroupCommit {},
    /// It failed after a seal, and it is unknown whether it is committed: stops the disk.
    GroupFail { cause: String },
    /// It is given up.
    GroupLeave {},
}

/// Bytes in hexadecimal digits.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Digits(String);

impl Digits {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Digits(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// `None` if it is not of so many bytes.
    pub(crate) fn bytes<const N: usize>(&self) -> Option<[u8; N]> {
        let digits = self.0.as_bytes();
        let mut bytes = [0; N];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            let pair =
                std::str::from_utf8(pair).ok().filter(|pair| pair.bytes().all(|c| c.is_ascii_hexdigit()))?;
            *byte = u8::from_str_radix(pair, 16).ok()?;
        }
        (digits.len() == 2 * N).then_some(bytes)
    }
}

/// The answer to a request to take part.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Joined {
    disk_id: Digits,
    seal_id: Digits,
    /// Of the disk, without its folder.
    file_name: String,
    /// As a path without links.
    folder: String,
}

impl Joined {
    /// What the leader has to know of a disk.
    pub(crate) fn of(member: &impl Participant) -> Result<Self, Failure> {
        let disk = member.disk();
        let folder = member.folder();
        let words = (String::from_utf8(disk.file_name.clone()).ok(), folder.to_str());
        let (Some(file_name), Some(folder)) = words else {
            return Err(Failure::new(format!(
                "{}: a disk whose path is not UTF-8 cannot be in a snapshot of several disks while it is served",
                folder.display()
            )));
        };
        Ok(Joined {
            disk_id: Digits::of(disk.disk_id.as_bytes()),
            seal_id: Digits::of(&disk.seal_id),
            file_name,
            folder: folder.into(),
        })
    }

    /// The disk and its folder.
    pub(crate) fn to_disk(&self) -> Result<(ManifestDisk, PathBuf), String> {
        match (self.disk_id.bytes(), self.seal_id.bytes()) {
            (Some(disk_id), Some(seal_id)) => {
                let file_name = self.file_name.clone().into_bytes();
                let disk = ManifestDisk { disk_id: UniqueId::from_bytes(disk_id), seal_id, file_name };
                Ok((disk, self.folder.clone().into()))
            }
            _ => Err("an id has 32 hexadecimal digits".into()),
        }
    }
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
    /// From the root, without links.
    pub(crate) path: String,
    pub(crate) virtual_size: u64,
    /// Where NBD clients connect.
    pub(crate) nbd: String,
    /// Clients connected now.
    pub(crate) clients: usize,
    /// The work under way that takes long.
    pub(crate) work: Option<WorkStatus>,
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
    fn digits_are_of_so_many_bytes_or_none() {
        assert_eq!(Digits::of(&[0, 0xaf]).bytes(), Some([0, 0xaf]));
        for bad in ["", "0", "00af0", "00a", "00ag", "00+1", "00aff0", "é0"] {
            assert_eq!(Digits(bad.into()).bytes::<2>(), None, "{bad}");
        }
    }

    #[test]
    fn failures_keep_their_code() {
        let failure =
            Answer::of(Err(Failure::with_code(Code::Usage, "no".into()))).into_result().unwrap_err();
        assert_eq!((failure.code(), failure.to_string()), (Code::Usage, "no".to_string()));
    }
}
