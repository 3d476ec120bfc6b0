//! Work that takes long: it shows how far it has come, keeps to a rate, and ends at the first ^C.

use crate::failure::{Code, Failure};
use crate::progress::{Reporter, Style};
use crate::size;
use cowvhd::convert::{Pace, Progress};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use std::num::NonZeroU64;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The longest time between two looks at whether the work is to end.
pub(crate) const LOOK: Duration = Duration::from_millis(50);

/// Options of work that takes long and is done in steps.
#[derive(Debug, clap::Args)]
pub(crate) struct Steps {
    /// How progress is shown; "auto" draws a bar on a terminal and nothing elsewhere.
    #[arg(long, value_name = "STYLE", default_value = "auto")]
    pub(crate) progress: Style,
    /// Copies at most so many bytes in a second, such as 50M, to leave the medium to others.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub(crate) rate: Option<NonZeroU64>,
}

fn parse_rate(text: &str) -> Result<NonZeroU64, String> {
    NonZeroU64::new(size::parse(text)?).ok_or_else(|| "it has to be more than 0".into())
}

impl Steps {
    /// Does `work` here.
    pub(crate) fn run<T>(
        &self,
        work: impl FnOnce(&mut dyn FnMut(Progress) -> ControlFlow<()>) -> cowvhd::Result<T>,
    ) -> Result<T, Failure> {
        let cancelled = cancelled_by_signals()?;
        let mut pace = self.rate.map(Pace::new);
        let is_cancelled = || cancelled.load(Ordering::Relaxed);
        let result = reported(self.progress, |report| {
            work(&mut |progress| {
                report(progress)?;
                keep_pace(pace.as_mut(), progress, &is_cancelled)
            })
        })?;
        Ok(result?)
    }

    /// Lets somebody else do it, who keeps to the rate.
    pub(crate) fn watch<T>(
        &self,
        work: impl FnOnce(&mut dyn FnMut(Progress), &dyn Fn() -> bool) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let cancelled = cancelled_by_signals()?;
        let unreported = AtomicBool::new(false);
        let is_cancelled = || cancelled.load(Ordering::Relaxed) || unreported.load(Ordering::Relaxed);
        reported(self.progress, |report| {
            let report = &mut |progress| unreported.store(report(progress).is_break(), Ordering::Relaxed);
            work(report, &is_cancelled)
        })?
    }
}

/// Waits as long as the rate asks for; breaks when the work is to end.
pub(crate) fn keep_pace(
    pace: Option<&mut Pace>,
    progress: Progress,
    is_cancelled: &dyn Fn() -> bool,
) -> ControlFlow<()> {
    let mut wait = pace.map_or(Duration::ZERO, |pace| pace.wait(progress.copied));
    loop {
        if is_cancelled() {
            return ControlFlow::Break(());
        }
        if wait.is_zero() {
            return ControlFlow::Continue(());
        }
        let part = wait.min(LOOK);
        std::thread::sleep(part);
        wait -= part;
    }
}

/// Does `work`, which reports its progress and ends when it is told to break: after ^C, SIGTERM or SIGHUP, or when progress
/// cannot be shown. Returns what `work` does, unless showing its progress failed.
pub(crate) fn long_work<T>(
    style: Style,
    work: impl FnOnce(&mut dyn FnMut(Progress) -> ControlFlow<()>) -> cowvhd::Result<T>,
) -> Result<cowvhd::Result<T>, Failure> {
    let cancelled = cancelled_by_signals()?;
    reported(style, |report| {
        work(&mut |progress| {
            report(progress)?;
            match cancelled.load(Ordering::Relaxed) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })
    })
}

/// Does `work` with a way to show its progress, which breaks where that fails; then that failure is returned.
fn reported<T>(
    style: Style,
    work: impl FnOnce(&mut dyn FnMut(Progress) -> ControlFlow<()>) -> T,
) -> Result<T, Failure> {
    let mut reporter = Reporter::new(style);
    let mut unreported = None;
    let result = work(&mut |progress| match reporter.report(progress) {
        Ok(()) => ControlFlow::Continue(()),
        Err(failure) => {
            unreported = Some(failure);
            ControlFlow::Break(())
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
