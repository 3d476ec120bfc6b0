//! `cowvhd snapshot create`.

use super::take::{Part, commit, take};
use crate::control::{Client, Request, ServedDisk, Sockets};
use crate::failure::Failure;
use crate::output;
use crate::parents::Parents;
use cowvhd::Disk;
use cowvhd::snapshot::{Checkpoint, Member, Participant, SnapshotName};
use cowvhd::vfs::HostVfs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Takes a snapshot of a disk, or of several at one point.
///
/// The snapshot NAME of vm.vhd is the file vm@NAME.vhd, which never changes from then on; vm.vhd goes on under its name. A disk
/// that is being served goes on being served: its server takes the snapshot.
///
/// With --state the saved state of the virtual machine becomes a part of the snapshot, all or nothing. The machine has to stand
/// still from before it was saved until the snapshot is taken.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "cowvhd snapshot create [OPTIONS] FILE NAME\n       cowvhd snapshot create [OPTIONS] FILE... --group NAME"
)]
pub(crate) struct Create {
    /// The disk's file, and the snapshot's name: 1 to 64 of A-Z a-z 0-9 . _ -
    #[arg(required = true, value_names = ["FILE", "NAME"], num_args = 1..)]
    words: Vec<PathBuf>,
    /// Takes the snapshot of several disks at one point: of all of them or of none. They lie in one folder; those that are served
    /// go on being served.
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// A part of the VM's state, such as ram=saved.bin: the snapshot gets all that the file holds. May be given several times.
    #[arg(long, value_name = "PART=FILE")]
    state: Vec<Part>,
    #[command(flatten)]
    sockets: Sockets,
    #[command(flatten)]
    parents: Parents,
}

impl Create {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let (files, name) = match (&self.group, &self.words[..]) {
            (Some(name), files) => (files, name.as_str()),
            (None, [_, name]) => {
                let name = name.to_str().ok_or_else(|| Failure::usage("the snapshot's name is not UTF-8"))?;
                (self.words.get(..1).unwrap_or_default(), name)
            }
            (None, _) => {
                return Err(Failure::usage(
                    "a file and a name are needed, or several files and --group NAME",
                ));
            }
        };
        let name = SnapshotName::new(name)?;
        let paths = match files {
            [file] => match self.sockets.connect(file)? {
                Some(client) => self.ask(client, &name)?,
                None => self.take(files, &name)?,
            },
            _ => self.take(files, &name)?,
        };
        output::print(&paths.iter().map(|path| format!("{}\n", path.display())).collect::<String>())
    }

    fn ask(&self, mut client: Client, name: &SnapshotName) -> Result<Vec<PathBuf>, Failure> {
        let absolute = |part: &Part| {
            let file = std::path::absolute(&part.file);
            let file = file.map_err(|error| Failure::new(format!("{}: {error}", part.file.display())))?;
            Ok(Part { name: part.name.clone(), file })
        };
        let state = self.state.iter().map(absolute).collect::<Result<_, Failure>>()?;
        let answer = client.ask(&Request::SnapshotCreate { name: name.as_str().into(), state })?;
        let path = answer.get("snapshot").and_then(|path| path.as_str()).unwrap_or_default();
        Ok(vec![path.into()])
    }

    fn take(&self, files: &[PathBuf], name: &SnapshotName) -> Result<Vec<PathBuf>, Failure> {
        // Each is in one of the two.
        let (mut disks, mut clients) = (Vec::new(), Vec::new());
        let paths: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
        for (file, client) in files.iter().zip(self.sockets.connect_all(&paths)?) {
            let client = client.filter(|_| files.len() > 1);
            disks.push(match client {
                Some(_) => None,
                None => {
                    let disk = self.parents.options().open(file);
                    Some(disk.map_err(|error| Failure::from(error).without_server())?)
                }
            });
            clients.push((file, client));
        }
        let taken = self.take_from(&disks, clients, name);
        // Also after a failure, so that other tools can open the files.
        let closed = disks.iter().flatten().try_for_each(|disk| disk.close().map_err(Failure::from));
        let paths = taken?;
        closed?;
        Ok(paths)
    }

    fn take_from(
        &self,
        disks: &[Option<Disk>],
        clients: Vec<(&PathBuf, Option<Client>)>,
        name: &SnapshotName,
    ) -> Result<Vec<PathBuf>, Failure> {
        if clients.iter().all(|(_, client)| client.is_none()) {
            return take(&disks.iter().flatten().collect::<Vec<_>>(), name, &self.state);
        }
        let mut participants: Vec<Box<dyn Participant + '_>> = Vec::new();
        for (number, (disk, (file, client))) in disks.iter().zip(clients).enumerate() {
            match (disk, client) {
                (_, Some(client)) => {
                    participants.push(Box::new(ServedDisk::join(client, file, name, number == 0)?));
                }
                (Some(disk), None) => participants.push(Box::new(Member::begin(disk, name, number == 0)?)),
                (None, None) => {}
            }
        }
        commit(Checkpoint::of(Arc::new(HostVfs), participants, name)?, &self.state)
    }
}
