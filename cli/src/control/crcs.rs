//! The CRCs of snapshots that a server has taken: written in the background, one snapshot after the other, at half speed, so that
//! guests come first.

use crate::output;
use cowvhd::ErrorKind;
use cowvhd::check::write_crcs;
use cowvhd::vfs::HostVfs;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Writes CRCs until it is dropped; what is not done by then is left out.
pub(crate) struct CrcWriter {
    snapshots: Option<Sender<PathBuf>>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl CrcWriter {
    pub(crate) fn start() -> io::Result<Self> {
        let (snapshots, paths) = channel::<PathBuf>();
        let (stop, stopped) = channel();
        let thread = std::thread::Builder::new().name("data CRCs".into()).spawn(move || {
            for path in paths {
                if write(&path, &stopped).is_break() {
                    return;
                }
            }
        })?;
        Ok(CrcWriter { snapshots: Some(snapshots), stop: Some(stop), thread: Some(thread) })
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

/// Writes those of one snapshot. Breaks where the server ends.
fn write(path: &Path, stopped: &Receiver<()>) -> ControlFlow<()> {
    let mut since = Instant::now();
    let result = write_crcs(Arc::new(HostVfs), path, &mut |_, _| {
        let stop = pause(stopped, since.elapsed());
        since = Instant::now();
        stop
    });
    match result {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::Cancelled => return ControlFlow::Break(()),
        // It was deleted meanwhile, or is being changed: nothing is missed that `verify --seal` could not do.
        Err(error) => output::say(format_args!("no CRCs for the data of a snapshot: {error}")),
    }
    pause(stopped, Duration::ZERO)
}

/// Waits, unless the server ends.
fn pause(stopped: &Receiver<()>, time: Duration) -> ControlFlow<()> {
    match stopped.recv_timeout(time) {
        Err(RecvTimeoutError::Timeout) => ControlFlow::Continue(()),
        Ok(()) | Err(RecvTimeoutError::Disconnected) => ControlFlow::Break(()),
    }
}
