//! The side of the verbs.

use super::protocol::{Answer, Request, Said, receive, send};
use crate::failure::Failure;
use crate::long_work::{LOOK, Steps};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;
use std::io::{self, BufReader};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// A connection to the server of a disk.
#[derive(Debug)]
pub(crate) struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the server that listens at `path`; `None` where there is none.
    pub(super) fn connect(path: &Path) -> Result<Option<Self>, Failure> {
        match UnixStream::connect(path) {
            Ok(stream) => Ok(Some(Client { path: path.to_path_buf(), stream: BufReader::new(stream) })),
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
        self.send(request)?;
        self.answer()
    }

    /// Waits for the answer to what was asked, as long as it takes.
    pub(crate) fn answer(&mut self) -> Result<Value, Failure> {
        loop {
            if let Said::Done(value) = self.hear()? {
                return Ok(value);
            }
        }
    }

    /// Asks for work that takes long, and shows how far it has come. ^C makes the server stop it.
    pub(crate) fn work(&mut self, request: &Request, steps: &Steps) -> Result<Value, Failure> {
        steps.watch(|report, is_cancelled| {
            self.send(request)?;
            let mut asked_to_stop = false;
            loop {
                if is_cancelled() && !asked_to_stop {
                    asked_to_stop = true;
                    // The server takes it for the wish to stop, and says how that ended.
                    let stopped = self.stream.get_ref().shutdown(Shutdown::Write);
                    stopped.map_err(|error| self.broken(&error))?;
                }
                if !self.says_something().map_err(|error| self.broken(&error))? {
                    continue;
                }
                match self.hear()? {
                    Said::Progress(progress) => report(progress),
                    Said::Done(value) => return Ok(value),
                }
            }
        })
    }

    /// Waits a moment for the server to say something.
    fn says_something(&self) -> io::Result<bool> {
        if !self.stream.buffer().is_empty() {
            return Ok(true);
        }
        let mut fds = [PollFd::new(self.stream.get_ref(), PollFlags::IN)];
        let moment = Timespec { tv_sec: 0, tv_nsec: LOOK.subsec_nanos().into() };
        match poll(&mut fds, Some(&moment)) {
            Err(rustix::io::Errno::INTR) => Ok(false),
            result => Ok(result? > 0),
        }
    }

    /// Asks for something; [`Client::answer`] is due.
    pub(crate) fn send(&mut self, request: &Request) -> Result<(), Failure> {
        send(self.stream.get_mut(), request).map_err(|error| self.broken(&error))
    }

    fn hear(&mut self) -> Result<Said, Failure> {
        let answer = receive(&mut self.stream).and_then(|line| match line {
            Some(line) => Ok(serde_json::from_str::<Answer>(&line)?),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        });
        answer.map_err(|error| self.broken(&error))?.into_result()
    }

    fn broken(&self, error: &io::Error) -> Failure {
        Failure::new(format!(
            "{}: the server did not answer: {error}; whether it did what was asked is unknown: look at the disk",
            self.path.display()
        ))
    }
}
