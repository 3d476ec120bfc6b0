//! The `cowvhd` command: crash-safe VHD disks for virtual machines, from the shell.
//!
//! Each verb has a file of its own: its arguments, and what it does. Standard output carries results alone, everything
//! else goes to standard error as `cowvhd: ...`. The exit codes are those of [`failure::Code`].

mod check;
mod clone;
mod completions;
mod control;
mod convert;
mod create;
mod diff;
mod export_delta;
mod failure;
mod fsck;
#[cfg(feature = "test-faults")]
mod ignore_flush;
mod info;
mod io_log;
mod long_work;
mod man;
mod map;
mod merge;
mod output;
mod parents;
mod pid_file;
mod progress;
mod rebase;
mod repair;
mod serve;
mod shutdown;
mod size;
mod snapshot;
mod status;
mod tree;
mod upgrade;
mod verify;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use failure::Code;
use std::process::ExitCode;

/// Crash-safe VHD disks for virtual machines.
#[derive(Debug, Parser)]
#[command(name = "cowvhd", version, after_help = EXIT_CODES, arg_required_else_help = true)]
#[command(disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed, 16 used wrongly, 32 cancelled; check, repair and verify have those of fsck.
Sizes: bytes, or with a binary suffix: 512M, 64G, 1T.";

#[derive(Debug, Subcommand)]
enum Verb {
    Create(create::Create),
    Convert(convert::Convert),
    Info(info::Info),
    Map(map::Map),
    Tree(tree::Tree),
    Diff(diff::Diff),
    ExportDelta(export_delta::ExportDelta),
    Clone(clone::Clone),
    Merge(merge::Merge),
    Rebase(rebase::Rebase),
    Check(check::Check),
    Repair(repair::Repair),
    Verify(verify::Verify),
    Snapshot(snapshot::Snapshot),
    Upgrade(upgrade::Upgrade),
    Serve(serve::Serve),
    Status(status::StatusOf),
    Completions(completions::Completions),
    Man(man::Man),
}

fn main() -> ExitCode {
    if fsck::Fsck::is_called(std::env::args_os().next().as_deref()) {
        return match fsck::Fsck::try_parse() {
            Ok(fsck) => fsck.run(),
            Err(error) => refuse(&error),
        };
    }
    let verb = match Arguments::try_parse() {
        Ok(arguments) => arguments.verb,
        Err(error) => return refuse(&error),
    };
    let done = match verb {
        Verb::Create(create) => create.run(),
        Verb::Convert(convert) => convert.run(),
        Verb::Info(info) => info.run(),
        Verb::Map(map) => map.run(),
        Verb::Tree(tree) => tree.run(),
        Verb::Diff(diff) => diff.run(),
        Verb::ExportDelta(export) => export.run(),
        Verb::Clone(clone) => clone.run(),
        Verb::Merge(merge) => merge.run(),
        Verb::Rebase(rebase) => rebase.run(),
        Verb::Check(check) => return check.run(),
        Verb::Repair(repair) => return repair.run(),
        Verb::Verify(verify) => return verify.run(),
        Verb::Snapshot(snapshot) => snapshot.run(),
        Verb::Upgrade(upgrade) => upgrade.run(),
        Verb::Serve(serve) => serve.run(),
        Verb::Status(status) => status.run(),
        Verb::Completions(completions) => completions.run(),
        Verb::Man(man) => man.run(),
    };
    match done {
        Ok(()) => Code::Done.into(),
        Err(failure) => {
            output::say(&failure);
            failure.code().into()
        }
    }
}

/// What clap has to say instead of arguments: help and version, which were asked for, or why they cannot be used.
fn refuse(error: &clap::Error) -> ExitCode {
    let asked = !error.use_stderr();
    if asked || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return match error.print() {
            Ok(()) if asked => Code::Done.into(),
            Ok(()) => Code::Usage.into(),
            Err(_) => Code::Failed.into(),
        };
    }
    let text = error.render().to_string();
    output::say(text.strip_prefix("error: ").unwrap_or(&text).trim_end());
    Code::Usage.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_contradicts_itself_nowhere() {
        Arguments::command().debug_assert();
        fsck::Fsck::command().debug_assert();
    }

    #[test]
    fn every_verb_has_a_manual_page() {
        let verbs =
            Arguments::command().get_subcommands().map(|verb| verb.get_name().to_owned()).collect::<Vec<_>>();
        assert_eq!(verbs, man::VERBS);
    }
}
