//! `cowvhd snapshot`: snapshots of disks, and the states of virtual machines that belong to them.

mod create;
mod delete;
mod list;
mod revert;
mod state;
mod take;

pub(crate) use take::{Part, take};

use crate::failure::Failure;
use clap::Subcommand;

/// Takes snapshots, with the state of a virtual machine or without, and gives such states back.
#[derive(Debug, clap::Args)]
#[command(disable_help_subcommand = true)]
pub(crate) struct Snapshot {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Create(create::Create),
    List(list::List),
    Delete(delete::Delete),
    Revert(revert::Revert),
    State(state::StateOf),
    Resumable(state::Resumable),
}

impl Snapshot {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        match &self.what {
            What::Create(create) => create.run(),
            What::List(list) => list.run(),
            What::Delete(delete) => delete.run(),
            What::Revert(revert) => revert.run(),
            What::State(state) => state.run(),
            What::Resumable(resumable) => resumable.run(),
        }
    }
}
