//! Where the verbs look for the server of a disk: beside it, or where they are told.

use super::protocol::{Request, Status};
use super::{Client, socket_of};
use crate::failure::Failure;
use std::path::{Path, PathBuf};

/// The control sockets of the disks' servers.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Sockets {
    /// The control socket of the disk's server, if that was started with --control [default: FILE.ctl]
    #[arg(long, value_name = "PATH")]
    control: Vec<PathBuf>,
}

impl Sockets {
    /// Connects to the server of the disk at `file`; `None` where nobody serves it, as far as its socket tells.
    pub(crate) fn connect(&self, file: &Path) -> Result<Option<Client>, Failure> {
        Ok(self.connect_all(&[file])?.pop().flatten())
    }

    /// The same for each of some disks. A socket that was named has to be that of the server of one of them.
    pub(crate) fn connect_all(&self, files: &[&Path]) -> Result<Vec<Option<Client>>, Failure> {
        let mut named: Vec<(PathBuf, Client)> = Vec::new();
        for socket in &self.control {
            named.push(connect_to(socket, files)?);
        }
        let mut clients = Vec::new();
        for &file in files {
            let own = resolved(file).and_then(|file| named.iter().position(|(served, _)| *served == file));
            clients.push(match own {
                Some(number) => Some(named.swap_remove(number).1),
                None => Client::connect(&socket_of(file))?,
            });
        }
        Ok(clients)
    }
}

/// Connects to the server whose socket this is, of one of these disks; with the path of that.
fn connect_to(socket: &Path, files: &[&Path]) -> Result<(PathBuf, Client), Failure> {
    let socket_name = socket.display();
    let Some(mut client) = Client::connect(socket)? else {
        return Err(Failure::new(format!("{socket_name}: no server listens there")));
    };
    let status = client.ask(&Request::Status {})?;
    let status: Status = serde_json::from_value(status).map_err(|error| {
        Failure::new(format!("{socket_name}: the server's answer cannot be understood: {error}"))
    })?;
    let served = PathBuf::from(&status.path);
    if files.iter().any(|file| resolved(file).as_deref() == Some(&served)) {
        return Ok((served, client));
    }
    let asked: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
    Err(Failure::usage(format!(
        "{socket_name}: the server that listens there has {} open, not {}",
        served.display(),
        asked.join(" or ")
    )))
}

/// The path of a disk from the root, without links, as servers tell it.
fn resolved(file: &Path) -> Option<PathBuf> {
    file.canonicalize().ok()
}
