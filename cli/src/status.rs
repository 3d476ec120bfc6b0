//! `cowvhd status`: what the server of a disk says about itself.

use crate::control::{Client, Request, Status};
use crate::failure::Failure;
use crate::output;
use crate::size::Human;
use std::path::PathBuf;

/// Tells whether a server has a disk open, where it serves it, and to how many clients.
///
/// Asks the server through its control socket, FILE.ctl. Fails where there is none.
#[derive(Debug, clap::Args)]
pub(crate) struct StatusOf {
    /// The disk's file.
    file: PathBuf,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
}

impl StatusOf {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let Some(mut client) = Client::connect(&self.file)? else {
            return Err(Failure::new(format!("{}: no server has it open", self.file.display())));
        };
        let status = client.ask(&Request::Status {})?;
        if self.json {
            return output::print_json(&status);
        }
        let unreadable = |error| Failure::new(format!("the server's answer cannot be understood: {error}"));
        let status: Status = serde_json::from_value(status).map_err(unreadable)?;
        output::print(&format!(
            "{} ({}) is served at {} by cowvhd {} (pid {}), to {} clients\n",
            status.filename,
            Human(status.virtual_size),
            status.nbd,
            status.version,
            status.pid,
            status.clients
        ))
    }
}
