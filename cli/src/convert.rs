//! `cowvhd convert`: copies a disk into a new image of another kind.

use crate::failure::Failure;
use crate::long_work::long_work;
use crate::output;
use crate::parents::Parents;
use crate::progress::Style;
use cowvhd::convert::{ConvertOptions, Format};
use cowvhd::{Error, ErrorKind};
use std::path::{Path, PathBuf};

/// Copies a disk into a new image of another kind.
///
/// The new image appears under its name only when it is complete and safe on the disk; ^C leaves nothing of it behind.
/// Zeros take no space in it. A name that ends in .vhd stands for a dynamic VHD (as a source: for any VHD), every other
/// one for a raw disk.
#[derive(Debug, clap::Args)]
pub(crate) struct Convert {
    /// The disk to copy; it is not changed.
    source: PathBuf,
    /// The image to make.
    destination: PathBuf,
    /// What the source is, whatever its name.
    #[arg(long, value_name = "FORMAT")]
    from: Option<FormatName>,
    /// What the new image is to be, whatever its name.
    #[arg(long, value_name = "FORMAT")]
    to: Option<FormatName>,
    /// Replaces the destination if it exists and nobody has it in use.
    #[arg(long)]
    force: bool,
    /// Copies what the disk held at this snapshot of it (NAME is vm@NAME.vhd beside vm.vhd), also while it is in use.
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
    /// How progress is shown; "auto" draws a bar on a terminal and nothing elsewhere.
    #[arg(long, value_name = "STYLE", default_value = "auto")]
    progress: Style,
    #[command(flatten)]
    parents: Parents,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum FormatName {
    Raw,
    Dynamic,
    Fixed,
}

impl From<FormatName> for Format {
    fn from(name: FormatName) -> Self {
        match name {
            FormatName::Raw => Format::Raw,
            FormatName::Dynamic => Format::Dynamic,
            FormatName::Fixed => Format::Fixed,
        }
    }
}

impl Convert {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let mut options = ConvertOptions::new().replace(self.force).open_source_with(self.parents.options());
        if let Some(from) = self.from {
            options = options.from(from.into());
        }
        if let Some(to) = self.to {
            options = options.to(to.into());
        }
        let source = match &self.snapshot {
            None => self.source.clone(),
            Some(name) => snapshot(&self.source, name)?,
        };
        let result = long_work(self.progress, |progress| options.run(&source, &self.destination, progress))?;
        let converted = result.map_err(|error| self.failure(error))?;
        if converted.padding > 0 {
            output::say(format_args!(
                "{}: its size is no multiple of 512: the new disk has {} more bytes, which are zero",
                source.display(),
                converted.padding
            ));
        }
        Ok(())
    }

    fn failure(&self, error: Error) -> Failure {
        let replaceable = !self.force && error.kind() == ErrorKind::Exists;
        match replaceable {
            true => Failure::new(format!("{error}, or replace it with --force")),
            false => error.into(),
        }
    }
}

/// The file of a snapshot.
fn snapshot(disk: &Path, name: &str) -> Result<PathBuf, Failure> {
    cowvhd::snapshot::snapshot_path(disk, name).ok_or_else(|| {
        let what = "names of snapshots have 1 to 64 letters, digits, dots, underscores and dashes";
        Failure::usage(format!("\"{name}\" is no name of a snapshot: {what}"))
    })
}
