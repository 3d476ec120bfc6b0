//! `cowvhd completions`: scripts that let a shell complete the command line.

use crate::failure::Failure;
use crate::{Arguments, output};
use clap::CommandFactory;
use clap_complete::Shell;

/// Prints the completion script for a shell.
///
/// For example: cowvhd completions bash > /etc/bash_completion.d/cowvhd
#[derive(Debug, clap::Args)]
pub(crate) struct Completions {
    /// The shell.
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Arguments::command(), "cowvhd", &mut script);
        output::print(&String::from_utf8_lossy(&script))
    }
}
