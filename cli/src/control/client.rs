//! The side of the verbs.

use super::protocol::{Answer, Request, receive, send};
use super::socket_of;
use crate::failure::Failure;
use serde_json::Value;
use std::io::{self, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// A connection to the server of a disk.
pub(crate) struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the server of the disk at `file`; `None` where nobody serves it, as far as its socket tells.
    pub(crate) fn connect(file: &Path) -> Result<Option<Self>, Failure> {
        let path = socket_of(file);
        match UnixStream::connect(&path) {
            Ok(stream) => Ok(Some(Client { path, stream: BufReader::new(stream) })),
            // None, or one that a killed server left; or no server can have one there.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::ConnectionRefused
                        | io::ErrorKind::InvalidInput
                        | io::ErrorKind::InvalidFilename
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(Failure::new(format!(
                "{}: cannot reach the server that has the disk open: {error}; run this as the server's user",
                path.display()
            ))),
        }
    }

    /// Asks for something and waits for the answer, as long as it takes.
    pub(crate) fn ask(&mut self, request: &Request) -> Result<Value, Failure> {
        let answer = send(self.stream.get_mut(), request).and_then(|()| receive(&mut self.stream));
        let answer = answer.and_then(|line| match line {
            Some(line) => Ok(serde_json::from_str::<Answer>(&line)?),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        });
        let broken = |error: io::Error| {
            Failure::new(format!(
                "{}: the server did not answer: {error}; whether it did what was asked is unknown: look at the disk",
                self.path.display()
            ))
        };
        answer.map_err(broken)?.into_result()
    }
}
