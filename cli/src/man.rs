//! `cowvhd man`: manual pages.

use crate::failure::Failure;
use crate::{Arguments, output};
use clap::CommandFactory;
use clap::builder::PossibleValuesParser;

/// The verbs in the order of the help.
pub(crate) const VERBS: &[&str] = &[
    "create",
    "convert",
    "info",
    "map",
    "tree",
    "diff",
    "export-delta",
    "clone",
    "merge",
    "rebase",
    "check",
    "repair",
    "verify",
    "snapshot",
    "upgrade",
    "serve",
    "status",
    "completions",
    "man",
];

/// Prints a manual page.
///
/// For example: cowvhd man serve | man -l -
#[derive(Debug, clap::Args)]
pub(crate) struct Man {
    /// The verb to describe; without it, the command as a whole.
    #[arg(value_parser = PossibleValuesParser::new(VERBS))]
    verb: Option<String>,
}

impl Man {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let mut command = Arguments::command();
        command.build();
        let found = match &self.verb {
            None => Some(command),
            Some(verb) => command.find_subcommand(verb).cloned(),
        };
        let Some(command) = found else {
            return Err(Failure::new("there is no such verb"));
        };
        let mut page = Vec::new();
        clap_mangen::Man::new(command)
            .render(&mut page)
            .map_err(|error| Failure::new(format!("cannot write the manual page: {error}")))?;
        output::print(&String::from_utf8_lossy(&page))
    }
}
