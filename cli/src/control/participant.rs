//! A disk of a checkpoint that a server has open, as its leader sees it: each step is a request.

use super::protocol::{Digits, Joined, Request};
use super::{Client, socket_of};
use crate::failure::Failure;
use cowvhd::snapshot::{Participant, SnapshotName, StateRef};
use cowvhd::state::ManifestDisk;
use cowvhd::{Error, Result};
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};

/// A server's disk.
#[derive(Debug)]
pub(crate) struct ServedDisk {
    file: PathBuf,
    client: Client,
    disk: ManifestDisk,
    folder: PathBuf,
    /// The server has been told to seal, and has not answered yet.
    sealing: bool,
    /// The server takes part no more.
    ended: bool,
}

impl ServedDisk {
    /// Lets the server of `file` take part in the checkpoint `name`.
    pub(crate) fn join(
        mut client: Client,
        file: &Path,
        name: &SnapshotName,
        keeps_state: bool,
    ) -> std::result::Result<Self, Failure> {
        let answer = client.ask(&Request::GroupJoin { name: name.to_string(), keeps_state })?;
        let joined: std::result::Result<Joined, _> = serde_json::from_value(answer);
        let joined = joined.map_err(|error| error.to_string()).and_then(|joined| joined.to_disk());
        let (disk, folder) = joined.map_err(|what| {
            let socket = socket_of(file);
            Failure::new(format!("{}: the server's answer cannot be understood: {what}", socket.display()))
        })?;
        Ok(ServedDisk { file: file.to_path_buf(), client, disk, folder, sealing: false, ended: false })
    }

    fn ask(&mut self, request: &Request) -> Result<Value> {
        let answer = self.client.ask(request);
        self.failing(answer)
    }

    /// What fails has ended the server's part.
    fn failing<T>(&mut self, answer: std::result::Result<T, Failure>) -> Result<T> {
        self.ended |= answer.is_err();
        answer.map_err(|failure| Error::Io {
            path: self.file.clone(),
            operation: "its server's part of the snapshot".into(),
            source: io::Error::other(failure.to_string()),
        })
    }

    /// Ends the server's part, and waits until it has.
    fn end(&mut self, request: &Request) {
        if self.sealing && !self.ended {
            let _ = self.seal();
        }
        if !self.ended {
            // A server that is gone has no part any more.
            let _ = self.ask(request);
        }
        self.ended = true;
    }
}

impl Participant for ServedDisk {
    fn disk(&self) -> &ManifestDisk {
        &self.disk
    }

    fn folder(&self) -> &Path {
        &self.folder
    }

    fn prepare(&mut self) -> Result<()> {
        self.ask(&Request::GroupPrepare {}).map(drop)
    }

    fn hold(&mut self) -> Result<()> {
        self.ask(&Request::GroupHold { limit_ms: None }).map(drop)
    }

    /// All servers are told before the first one is waited for: they seal their disks at the same time.
    fn switch(&mut self, state: &StateRef) -> Result<()> {
        let manifest = state.manifest().to_str().map(ToString::to_string).ok_or_else(|| Error::Invalid {
            what: format!(
                "{}: a name that is not UTF-8 cannot be told to a server",
                state.manifest().display()
            ),
        })?;
        let request = Request::GroupSeal { manifest, digest: Digits::of(&state.digest().0), limit_ms: None };
        let told = self.client.send(&request);
        self.failing(told)?;
        self.sealing = true;
        Ok(())
    }

    fn seal(&mut self) -> Result<()> {
        self.sealing = false;
        let answer = self.client.answer();
        self.failing(answer).map(drop)
    }

    fn commit(&mut self) -> Result<PathBuf> {
        let answer = self.ask(&Request::GroupCommit {})?;
        self.ended = true;
        Ok(answer.get("snapshot").and_then(Value::as_str).unwrap_or_default().into())
    }

    fn fail(&mut self, cause: &str) {
        self.end(&Request::GroupFail { cause: cause.into() });
    }
}

impl Drop for ServedDisk {
    fn drop(&mut self) {
        self.end(&Request::GroupLeave {});
    }
}
