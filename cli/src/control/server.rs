//! The server's side: a thread that accepts clients, and one for each of them.
//!
//! What one client asks is done one after the other; of all clients so are snapshots. A merge or a deletion goes on beside that, one at
//! a time, and stops when its client leaves or the server is to end; and so does a checkpoint of several disks (`member`). The end waits for what is being done, so that the disk is not
//! closed under it.

use super::crcs::CrcWriter;
use super::listener::Listener;
use super::member::take_part;
use super::protocol::{Answer, Request, Status, receive, send};
use super::talks::{Attention, Talks};
use super::work::{Board, Work};
use crate::failure::{Code, Failure};
use crate::merge::Merged;
use crate::output;
use crate::snapshot;
use cowvhd::Disk;
use cowvhd::snapshot::{SnapshotName, delete_running, layers_to_merge, merge_running, snapshot_path};
use cowvhd_export::{PrivateSocket, ShutdownHandle};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The pause after the system refused to accept a client, for lack of descriptors as a rule.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// So long a client may leave what it is told unread.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is served.
pub(crate) struct Served {
    pub(crate) file: PathBuf,
    /// The same from the root, without links.
    pub(crate) path: PathBuf,
    pub(crate) disk: Arc<Disk>,
    pub(crate) nbd: String,
    pub(crate) server: ShutdownHandle,
    pub(crate) crcs: CrcWriter,
    pub(crate) one_snapshot: Mutex<()>,
    pub(crate) one_deletion: Mutex<()>,
    pub(crate) board: Board,
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
        let served = Arc::new(served);
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

fn accept(socket: &PrivateSocket, stopped: &UnixStream, served: &Arc<Served>) {
    let mut talks = Talks::default();
    let mut failing = false;
    loop {
        match socket.accept(stopped) {
            Ok(Some(stream)) => {
                failing = false;
                let served = Arc::clone(served);
                talks.begin(stream, move |stream, attention| talk_to(stream, attention, &served));
            }
            Ok(None) => break,
            Err(error) => {
                if !failing {
                    let file = served.file.display();
                    output::say(format_args!("{file}: control socket: cannot accept clients: {error}"));
                }
                failing = true;
                pause(stopped);
            }
        }
    }
    talks.end();
}

/// Waits a moment, or until the end.
fn pause(stopped: &UnixStream) {
    let moment = Timespec { tv_sec: 0, tv_nsec: ACCEPT_PAUSE.subsec_nanos().into() };
    let _ = poll(&mut [PollFd::new(stopped, PollFlags::IN)], Some(&moment));
}

/// What a client says, until a time if that is due.
pub(super) type Lines<'a> = BufReader<Incoming<'a>>;

/// A socket that is read from.
pub(super) struct Incoming<'a> {
    stream: &'a UnixStream,
    /// Reading fails then.
    pub(super) until: Option<Instant>,
}

impl Read for Incoming<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.until.map(|until| until.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(left)?;
        (&mut &*self.stream).read(buf)
    }
}

/// Answers one client until it leaves or says what cannot be understood.
fn talk_to(stream: &UnixStream, attention: &Attention, served: &Served) {
    // Nobody who does not read what he is told keeps work from going on, or the server from ending.
    if stream.set_write_timeout(Some(PATIENCE)).is_err() {
        return;
    }
    let mut reader = BufReader::new(Incoming { stream, until: None });
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
        if !attention.work() {
            return;
        }
        let result = match serde_json::from_str(&line) {
            Ok(Request::GroupJoin { name, keeps_state }) => {
                match take_part(stream, &mut reader, &served.disk, &name, keeps_state) {
                    Ok(taken) => {
                        taken.into_iter().for_each(|path| served.crcs.add(path));
                        attention.wait();
                        continue;
                    }
                    Err(_) => return,
                }
            }
            Ok(request) => served.execute(request, stream),
            Err(error) => {
                let what = format!("a request that cannot be understood: {error}");
                Err(Failure::with_code(Code::Usage, what))
            }
        };
        if send(&mut &*stream, &Answer::of(result)).is_err() {
            return;
        }
        attention.wait();
    }
}

impl Served {
    fn execute(&self, request: Request, client: &UnixStream) -> Result<Value, Failure> {
        let answer = match request {
            Request::Status {} => serde_json::to_value(self.status()),
            Request::SnapshotCreate { name, state } => {
                let _one_after_the_other = self.one_snapshot.lock();
                let paths = snapshot::take(&[&self.disk], &SnapshotName::new(&name)?, &state)?;
                paths.iter().for_each(|path| self.crcs.add(path.clone()));
                serde_json::to_value(json!({"snapshot": paths.first()}))
            }
            Request::Merge { until, rate } => {
                let layers = layers_to_merge(&self.disk, until.as_deref())?;
                let mut listener =
                    Listener::new(client, &self.board, Work { request: "merge", layers, rate });
                let merged =
                    merge_running(&self.disk, until.as_deref(), &mut |progress| listener.hear(progress))?;
                let layers = merged.layers.iter().map(std::path::absolute);
                let layers = layers.collect::<io::Result<Vec<PathBuf>>>();
                let layers =
                    layers.map_err(|error| Failure::new(format!("the working directory: {error}")))?;
                serde_json::to_value(Merged { copied_bytes: merged.copied, layers })
            }
            Request::SnapshotDelete { name, rate } => {
                let layers = snapshot_path(&self.file, &name).into_iter().collect();
                let work = Work { request: "snapshot-delete", layers, rate };
                let (name, mut listener) =
                    (SnapshotName::new(&name)?, Listener::new(client, &self.board, work));
                let Some(_one_at_a_time) = self.one_deletion.try_lock() else {
                    let file = self.file.display();
                    let what = format!("{file}: another snapshot of it is being deleted: try again later");
                    return Err(Failure::new(what));
                };
                let _files = self.crcs.keep_closed();
                let deleted = delete_running(&self.disk, &name, &mut |progress| listener.hear(progress))?;
                serde_json::to_value(json!({"copied-bytes": deleted.copied, "kept": deleted.kept}))
            }
            Request::GroupJoin { .. }
            | Request::GroupPrepare {}
            | Request::GroupHold { .. }
            | Request::GroupSeal { .. }
            | Request::GroupCommit {}
            | Request::GroupFail { .. }
            | Request::GroupLeave {} => {
                return Err(Failure::usage(
                    "the disk takes part in no checkpoint that this connection leads",
                ));
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
            path: self.path.to_string_lossy().into_owned(),
            virtual_size: self.disk.size(),
            nbd: self.nbd.clone(),
            clients: self.server.connections(),
            work: self.board.status(),
        }
    }
}
