//! `cowvhd verify`: whether the data of sealed layers is still what was sealed.

use crate::check::{Checked, exit, fsck_code};
use crate::failure::{Code, Failure};
use crate::long_work::long_work;
use crate::output;
use crate::parents::Parents;
use crate::progress::Style;
use cowvhd::ErrorKind;
use cowvhd::check::verify;
use cowvhd::convert::{Phase, Progress};
use std::path::PathBuf;
use std::process::ExitCode;

/// Checks a disk and all its parents, and compares the data of its sealed layers with their CRCs.
///
/// Reads all data of the snapshots and parents beneath the disk, and the VM states that belong to them; also while the disk over
/// them is in use, if a snapshot is named. Changes nothing; with --seal CRCs that are missing are written. Exit codes are those of
/// "check": 0 in order, 4 for damage, 8 if it could not be done, 16 for wrong usage, 32 cancelled.
#[derive(Debug, clap::Args)]
pub(crate) struct Verify {
    /// The disk's file, or that of one of its snapshots.
    file: PathBuf,
    /// Writes CRCs where there are none, or none that count, from the data as it is now.
    #[arg(long)]
    seal: bool,
    #[command(flatten)]
    parents: Parents,
    /// Prints one JSON object, as "check --chain --json" does, and more.
    #[arg(long)]
    json: bool,
    /// How progress is shown; "auto" draws a bar on a terminal and nothing elsewhere.
    #[arg(long, value_name = "STYLE", default_value = "auto")]
    progress: Style,
}

impl Verify {
    pub(crate) fn run(&self) -> ExitCode {
        let code = self.verify().unwrap_or_else(|failure| {
            output::say(&failure);
            match failure.code() {
                Code::Failed => exit::OPERATIONAL,
                code => code as u8,
            }
        });
        ExitCode::from(code)
    }

    fn verify(&self) -> Result<u8, Failure> {
        let options = self.parents.options();
        let verified = long_work(self.progress, |report| {
            let mut progress =
                |done, total| report(Progress { phase: Phase::Verify, done, total, copied: 0 });
            verify(&options, &self.file, self.seal, &mut progress)
        })?;
        let checked = Checked::Data(verified.map_err(|error| match error.kind() {
            // Whether the file can be checked is no matter of the command line.
            ErrorKind::InvalidInput => Failure::new(error.to_string()),
            _ => error.into(),
        })?);
        checked.print(self.json)?;
        Ok(fsck_code(checked.worst(), false))
    }
}
