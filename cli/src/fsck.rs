//! `fsck.vhd`: check and repair under the name and with the options by which fsck(8) calls the checker of a file system.
//!
//! The tool is this when it is called so: a link of that name leads to it. It does what `check` and `repair` do.

use crate::check::Check;
use crate::repair::Repair;
use clap::Parser;
use cowvhd::check::Consent;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The name by which the tool is this.
const NAME: &str = "fsck.vhd";

/// Checks a VHD disk file and repairs it.
///
/// Without -n, -p or -y it prints what is to be done and asks, on a terminal; elsewhere it only prints. What is replaced is
/// saved first, in FILE.undo ("cowvhd repair --undo-apply").
#[derive(Debug, Parser)]
#[command(name = NAME, version, after_help = EXIT_CODES)]
pub(crate) struct Fsck {
    /// The disk's file.
    file: PathBuf,
    /// Only checks; changes nothing.
    #[arg(short = 'n', group = "consent")]
    none: bool,
    /// Does what loses nothing, without asking.
    #[arg(short = 'p', short_alias = 'a', group = "consent")]
    preen: bool,
    /// Does everything, without asking.
    #[arg(short = 'y', group = "consent")]
    yes: bool,
    /// Asks, as it does anyway.
    #[arg(short = 'r', group = "consent")]
    interactive: bool,
    /// Checks also what seems to be in order, as it does anyway.
    #[arg(short = 'f')]
    force: bool,
    /// Says more: all is said anyway.
    #[arg(short = 'v')]
    verbose: bool,
    /// Where to show progress: there is none to show.
    #[arg(short = 'C', value_name = "DESCRIPTOR")]
    progress: Option<i32>,
}

const EXIT_CODES: &str = "\
-a is the same as -p.
Exit codes: 0 in order, 1 repaired, 4 errors left, 8 could not be done, 16 used wrongly.";

impl Fsck {
    /// Whether the tool is called by this name.
    pub(crate) fn is_called(program: Option<&OsStr>) -> bool {
        program.and_then(|program| Path::new(program).file_name()) == Some(OsStr::new(NAME))
    }

    pub(crate) fn run(self) -> ExitCode {
        let consent = match (self.none, self.preen, self.yes) {
            (true, _, _) => return Check::of(self.file).run(),
            (_, true, _) => Some(Consent::Safe),
            (_, _, true) => Some(Consent::All),
            _ => None,
        };
        Repair::of(self.file, consent).run()
    }
}
