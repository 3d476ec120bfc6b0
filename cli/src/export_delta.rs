//! `cowvhd export-delta`: the changes between two points of a chain, as a file of its own.

use crate::failure::Failure;
use crate::long_work::long_work;
use crate::parents::Parents;
use crate::progress::Style;
use cowvhd::snapshot::export_delta;
use std::path::PathBuf;

/// Writes the changes between two points of a chain into a new differencing disk.
///
/// The new disk has the older point's layer as its parent, and shows what the disk held at the newer point: a backup of what
/// changed. A point is the name of a snapshot (NAME is vm@NAME.vhd beside vm.vhd) or the path of a layer. Beside a copy of the
/// older point elsewhere, open it with "--parent COPY".
#[derive(Debug, clap::Args)]
pub(crate) struct ExportDelta {
    /// The disk's file; it is not changed.
    file: PathBuf,
    /// The file to make; it must not exist.
    out: PathBuf,
    /// The older point.
    #[arg(long, value_name = "POINT")]
    from: PathBuf,
    /// The newer point; without it, the disk as it is now.
    #[arg(long, value_name = "POINT")]
    to: Option<PathBuf>,
    /// How progress is shown; "auto" draws a bar on a terminal and nothing elsewhere.
    #[arg(long, value_name = "STYLE", default_value = "auto")]
    progress: Style,
    #[command(flatten)]
    parents: Parents,
}

impl ExportDelta {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let options = self.parents.options();
        let to = self.to.as_deref();
        let done = long_work(self.progress, |progress| {
            export_delta(&options, &self.file, &self.from, to, &self.out, progress)
        })?;
        Ok(done?)
    }
}
