//! The server's side: a thread that accepts clients, and one for each of them.
//!
//! Requests are done one after the other, whoever asks. The end waits for the one that is being done, so that the disk is not
//! closed under it.

use super::crcs::CrcWriter;
use super::protocol::{Answer, Request, Status, receive, send};
use crate::failure::{Code, Failure};
use crate::snapshot;
use cowvhd::Disk;
use cowvhd::snapshot::SnapshotName;
use cowvhd_export::{PrivateSocket, ShutdownHandle};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::io::{self, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Clients at once; others wait.
const MAX_CLIENTS: usize = 8;

/// What is served.
pub(crate) struct Served {
    pub(crate) file: PathBuf,
    pub(crate) disk: Arc<Disk>,
    pub(crate) nbd: String,
    pub(crate) server: ShutdownHandle,
    pub(crate) crcs: CrcWriter,
}

/// Answers requests until it is dropped.
pub(crate) struct Control {
    stop: UnixStream,
    acceptor: Option<JoinHandle<()>>,
}

impl Control {
    /// Listens at `path`.
    pub(crate) fn start(path: &Path, served: Served) -> io::Result<Self> {
        let socket = PrivateSocket::bind(path, true)?;
        let (stop, stopped) = UnixStream::pair()?;
        let served = Arc::new(Mutex::new(served));
        let acceptor = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || accept(&socket, &stopped, &served))?;
        Ok(Control { stop, acceptor: Some(acceptor) })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = self.stop.write(&[0]);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// A client that is being talked to.
struct Talk {
    stream: UnixStream,
    thread: JoinHandle<()>,
}

fn accept(socket: &PrivateSocket, stopped: &UnixStream, served: &Arc<Mutex<Served>>) {
    let mut talks: Vec<Talk> = Vec::new();
    while let Ok(Some(stream)) = socket.accept(stopped) {
        talks.retain(|talk| !talk.thread.is_finished());
        if talks.len() >= MAX_CLIENTS {
            let busy = format!("{MAX_CLIENTS} clients are connected to the control socket; try again later");
            let _ = send(&mut &stream, &Answer::of(Err(Failure::new(busy))));
            continue;
        }
        let served = Arc::clone(served);
        let talk = stream.try_clone().and_then(|own| {
            let thread = std::thread::Builder::new().name("control client".into());
            let talk = move || {
                talk_to(&own, &served);
                // The acceptor has a copy of the socket.
                let _ = own.shutdown(Shutdown::Both);
            };
            Ok(Talk { stream, thread: thread.spawn(talk)? })
        });
        // Without a thread the client sees its connection end.
        talks.extend(talk);
    }
    for talk in talks {
        // What is being done is finished and answered; nothing further is read.
        let _ = talk.stream.shutdown(Shutdown::Read);
        let _ = talk.thread.join();
    }
}

/// Answers one client until it leaves or says what cannot be understood.
fn talk_to(stream: &UnixStream, served: &Mutex<Served>) {
    let mut reader = BufReader::new(stream);
    loop {
        let line = match receive(&mut reader) {
            Ok(Some(line)) => line,
            Ok(None) => return,
            Err(error) => {
                let what = format!("a request that cannot be understood: {error}");
                let _ = send(&mut &*stream, &Answer::of(Err(Failure::with_code(Code::Usage, what))));
                return;
            }
        };
        let result = match serde_json::from_str(&line) {
            Ok(request) => served.lock().execute(request),
            Err(error) => {
                let what = format!("a request that cannot be understood: {error}");
                Err(Failure::with_code(Code::Usage, what))
            }
        };
        if send(&mut &*stream, &Answer::of(result)).is_err() {
            return;
        }
    }
}

impl Served {
    fn execute(&self, request: Request) -> Result<Value, Failure> {
        let answer = match request {
            Request::Status {} => serde_json::to_value(self.status()),
            Request::SnapshotCreate { name, state } => {
                let paths = snapshot::take(&[&self.disk], &SnapshotName::new(&name)?, &state)?;
                paths.iter().for_each(|path| self.crcs.add(path.clone()));
                serde_json::to_value(json!({"snapshot": paths.first()}))
            }
        };
        answer.map_err(|error| Failure::new(format!("cannot write JSON: {error}")))
    }

    fn status(&self) -> Status {
        Status {
            schema: 1,
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            filename: self.file.to_string_lossy().into_owned(),
            virtual_size: self.disk.size(),
            nbd: self.nbd.clone(),
            clients: self.server.connections(),
        }
    }
}
