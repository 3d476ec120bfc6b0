//! How far long work has come: a bar for people, lines of JSON for programs.

use crate::failure::Failure;
use crate::output;
use cowvhd::convert::{Phase, Progress};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

/// Time between two lines of JSON.
const INTERVAL: Duration = Duration::from_millis(250);

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Style {
    /// A bar on a terminal, nothing elsewhere.
    Auto,
    /// Lines of JSON on standard output: phase, done, total (bytes), elapsed (seconds).
    Json,
    /// Nothing.
    None,
}

/// Shows progress.
pub(crate) struct Reporter {
    started: Instant,
    show: Show,
}

enum Show {
    Nothing,
    Bar(ProgressBar),
    Json { last: Option<(Instant, Phase)> },
}

/// A line of JSON.
#[derive(Serialize)]
struct Line {
    phase: &'static str,
    done: u64,
    total: u64,
    elapsed: f64,
}

impl Reporter {
    pub(crate) fn new(style: Style) -> Self {
        let show = match style {
            Style::Json => Show::Json { last: None },
            Style::Auto if io::stderr().is_terminal() => Show::Bar(bar()),
            Style::Auto | Style::None => Show::Nothing,
        };
        Reporter { started: Instant::now(), show }
    }

    /// Shows a step; now and then one is left out.
    pub(crate) fn report(&mut self, progress: Progress) -> Result<(), Failure> {
        let name = name(progress.phase);
        match &mut self.show {
            Show::Nothing => {}
            Show::Bar(bar) => {
                bar.set_message(name);
                bar.set_length(progress.total);
                bar.set_position(progress.done);
            }
            Show::Json { last } => {
                let now = Instant::now();
                if last.is_none_or(|(at, phase)| phase != progress.phase || now - at >= INTERVAL) {
                    *last = Some((now, progress.phase));
                    let elapsed = (now - self.started).as_secs_f64();
                    let line = Line { phase: name, done: progress.done, total: progress.total, elapsed };
                    let json = serde_json::to_string(&line)
                        .map_err(|error| Failure::new(format!("cannot write JSON: {error}")))?;
                    output::print(&format!("{json}\n"))?;
                }
            }
        }
        Ok(())
    }

    /// Takes the bar away.
    pub(crate) fn end(&self) {
        if let Show::Bar(bar) = &self.show {
            bar.finish_and_clear();
        }
    }
}

/// A phase, for programs.
pub(crate) fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::Copy => "copy",
        Phase::Sync => "sync",
        Phase::Verify => "verify",
    }
}

fn bar() -> ProgressBar {
    let template = "{msg} {wide_bar} {percent}% {binary_bytes_per_sec}, {eta} left";
    // A template that cannot be read would show the plain bar instead.
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style)
}
