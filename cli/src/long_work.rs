//! Work that takes long: it shows how far it has come, and ends at the first ^C.

use crate::failure::{Code, Failure};
use crate::progress::{Reporter, Style};
use cowvhd::convert::Progress;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Does `work`, which reports its progress and ends when it is told to break: after ^C, SIGTERM or SIGHUP, or when progress
/// cannot be shown. Returns what `work` does, unless showing its progress failed.
pub(crate) fn long_work<T>(
    style: Style,
    work: impl FnOnce(&mut dyn FnMut(Progress) -> ControlFlow<()>) -> cowvhd::Result<T>,
) -> Result<cowvhd::Result<T>, Failure> {
    let cancelled = cancelled_by_signals()?;
    let mut reporter = Reporter::new(style);
    let mut unreported = None;
    let result = work(&mut |progress| {
        unreported = reporter.report(progress).err();
        match cancelled.load(Ordering::Relaxed) || unreported.is_some() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    reporter.end();
    match unreported {
        Some(failure) => Err(failure),
        None => Ok(result),
    }
}

/// Set by the first ^C, SIGTERM or SIGHUP. A second one ends the process at once and may leave a temporary file.
fn cancelled_by_signals() -> Result<Arc<AtomicBool>, Failure> {
    let cancelled = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        flag::register_conditional_shutdown(signal, Code::Cancelled as i32, Arc::clone(&cancelled))
            .and_then(|_| flag::register(signal, Arc::clone(&cancelled)))
            .map_err(|error| Failure::new(format!("cannot handle signals: {error}")))?;
    }
    Ok(cancelled)
}
