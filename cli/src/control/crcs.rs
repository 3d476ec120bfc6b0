//! The CRCs of snapshots that a server has taken: written in the background, one snapshot after the other, at half speed, so that
//! guests come first. Whoever deletes a snapshot needs the files alone: meanwhile none is written.

use crate::output;
use cowvhd::ErrorKind;
use cowvhd::check::write_crcs;
use cowvhd::vfs::HostVfs;
use parking_lot::{Mutex, MutexGuard};
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Writes CRCs until it is dropped; what is not done by then is left out.
pub(crate) struct CrcWriter {
    snapshots: Option<Sender<PathBuf>>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    turn: Arc<Turn>,
}

/// Whose turn it is to have the files of snapshots open.
#[derive(Default)]
struct Turn {
    /// Held for the time of one snapshot, and while there is to be none.
    files: Mutex<()>,
    /// Somebody waits for it.
    wanted: AtomicBool,
}

impl CrcWriter {
    pub(crate) fn start() -> io::Result<Self> {
        let (snapshots, paths) = channel::<PathBuf>();
        let (stop, stopped) = channel();
        let turn = Arc::new(Turn::default());
        let own = Arc::clone(&turn);
        let thread = std::thread::Builder::new().name("data CRCs".into()).spawn(move || {
            for path in paths {
                // Again from the start where it had to stop.
                while let Some(again) = write(&path, &stopped, &own).break_value() {
                    if !again {
                        return;
                    }
                }
            }
        })?;
        Ok(CrcWriter { snapshots: Some(snapshots), stop: Some(stop), thread: Some(thread), turn })
    }

    /// Keeps the files of snapshots closed until the value is dropped.
    pub(crate) fn keep_closed(&self) -> MutexGuard<'_, ()> {
        self.turn.wanted.store(true, Ordering::SeqCst);
        let files = self.turn.files.lock();
        self.turn.wanted.store(false, Ordering::SeqCst);
        files
    }

    /// A snapshot was taken.
    pub(crate) fn add(&self, snapshot: PathBuf) {
        if let Some(snapshots) = &self.snapshots {
            // The thread ends with the server alone.
            let _ = snapshots.send(snapshot);
        }
    }
}

impl Drop for CrcWriter {
    fn drop(&mut self) {
        drop(self.snapshots.take());
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Writes those of one snapshot. Breaks where it had to stop: with false where the server ends, with true where it is to be done again.
fn write(path: &Path, stopped: &Receiver<()>, turn: &Turn) -> ControlFlow<bool> {
    let files = turn.files.lock();
    let mut since = Instant::now();
    let mut is_wanted = false;
    let result = write_crcs(Arc::new(HostVfs), path, &mut |_, _| {
        is_wanted = turn.wanted.load(Ordering::SeqCst);
        if is_wanted {
            return ControlFlow::Break(());
        }
        let stop = pause(stopped, since.elapsed());
        since = Instant::now();
        stop
    });
    match result {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::Cancelled => {
            MutexGuard::unlock_fair(files);
            return ControlFlow::Break(is_wanted);
        }
        // It is gone, or is being changed: nothing is missed that `verify --seal` could not do.
        Err(_) if !path.exists() => {}
        Err(error) => output::say(format_args!("no CRCs for the data of a snapshot: {error}")),
    }
    match pause(stopped, Duration::ZERO) {
        ControlFlow::Continue(()) => ControlFlow::Continue(()),
        ControlFlow::Break(()) => ControlFlow::Break(false),
    }
}

/// Waits, unless the server ends.
fn pause(stopped: &Receiver<()>, time: Duration) -> ControlFlow<()> {
    match stopped.recv_timeout(time) {
        Err(RecvTimeoutError::Timeout) => ControlFlow::Continue(()),
        Ok(()) | Err(RecvTimeoutError::Disconnected) => ControlFlow::Break(()),
    }
}
