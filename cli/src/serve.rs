//! `cowvhd serve`: gives a disk to virtual machines over NBD until it is told to end.

use crate::control::{self, Board, Control, CrcWriter, Served};
use crate::failure::Failure;
use crate::io_log::IoLog;
use crate::output;
use crate::parents::Parents;
use crate::pid_file::PidFile;
use crate::shutdown::Shutdown;
use crate::size::{self, Human};
use cowvhd::{CreateOptions, Disk, Error};
use cowvhd_export::{Backend, NbdAddress, Server, ServerOptions};
use parking_lot::Mutex;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Serves a disk to virtual machines over NBD.
///
/// Prints one line when clients can connect. SIGTERM and ^C end it: requests under way are finished, the disk is flushed and
/// closed, and the exit code is 0. A second ^C gives up on that with exit code 32; the next open then recovers the disk.
#[derive(Debug, clap::Args)]
pub(crate) struct Serve {
    /// The disk's file.
    file: PathBuf,
    /// Makes the disk if the file is missing; if it exists, it must be of this size.
    #[arg(long, value_name = "SIZE", value_parser = size::parse, conflicts_with = "read_only")]
    create: Option<u64>,
    /// Where to listen: unix:PATH, tcp:HOST:PORT or a path [default: unix:FILE.sock]
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address)]
    nbd: Option<NbdAddress>,
    /// Lets other machines reach a TCP address; there is neither password nor encryption.
    #[arg(long)]
    allow_remote: bool,
    /// Refuses all writes and does not change the file; several servers may share it then.
    #[arg(long)]
    read_only: bool,
    /// Bypasses the page cache of this machine (O_DIRECT), so that the virtual machine's is the only one.
    #[arg(long)]
    direct: bool,
    /// Where other cowvhd commands reach the server [default: FILE.ctl]
    #[arg(long, value_name = "PATH", conflicts_with = "read_only")]
    control: Option<PathBuf>,
    /// Writes the process id here once clients can connect, and removes it at the end.
    #[arg(long, value_name = "PATH")]
    pid_file: Option<PathBuf>,
    #[command(flatten)]
    parents: Parents,
}

fn parse_address(text: &str) -> Result<NbdAddress, String> {
    NbdAddress::parse(text).map_err(|error| error.to_string())
}

impl Serve {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let shutdown = Shutdown::install()?;
        let disk = Arc::new(self.open()?);
        for notice in disk.notices() {
            output::say(format_args!("{}: {notice}", self.file.display()));
        }
        let served = self.serve(&shutdown, &disk);
        // Also after a failure, so that other tools can open the file.
        let closed = disk.close().map_err(Failure::from);
        served.and(closed)
    }

    fn open(&self) -> Result<Disk, Failure> {
        let Some(size) = self.create else {
            return Ok(self
                .parents
                .options()
                .read_only(self.read_only)
                .direct(self.direct)
                .open(&self.file)?);
        };
        // Anything else that is wrong with the file, opening it will say.
        if fs::symlink_metadata(&self.file).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            match CreateOptions::new(size).create(&self.file) {
                // Whoever was faster wanted the same.
                Ok(()) | Err(Error::Exists { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let disk = self.parents.options().direct(self.direct).open(&self.file)?;
        if disk.size() == size {
            return Ok(disk);
        }
        let found = disk.size();
        disk.close()?;
        Err(Failure::new(format!(
            "{}: the disk has {found} bytes ({}) and not {size} ({}) as --create says; leave --create out to serve it as it is",
            self.file.display(),
            Human(found),
            Human(size),
        )))
    }

    fn serve(&self, shutdown: &Shutdown, disk: &Arc<Disk>) -> Result<(), Failure> {
        let address = self.nbd.clone().unwrap_or_else(|| NbdAddress::Unix(default_socket(&self.file)));
        let log = IoLog::start(&self.file)
            .map_err(|error| Failure::new(format!("cannot start the log: {error}")))?;
        let options = ServerOptions {
            allow_remote: self.allow_remote,
            // The disk is open: its lock keeps other servers of it away.
            replace_stale_socket: true,
            observer: Some(log.observer()),
            ..ServerOptions::default()
        };
        let server = Server::bind(&address, backend(disk), options)?;
        shutdown.attach(server.shutdown_handle());
        let control = self.control(disk, &server)?;
        let pid_file = self.pid_file.as_deref().map(PidFile::write).transpose()?;
        let ready = format!(
            "serving {} ({}) at {}\n",
            self.file.display(),
            Human(disk.size()),
            Uri(server.local_address())
        );
        if let Err(failure) = output::print(&ready) {
            // A guest can do without somebody who reads along.
            output::say(failure);
        }
        let summary = server.run();
        // Before the disk is closed: a request that is being done is finished.
        drop(control);
        let summary = summary?;
        drop(pid_file);
        if summary.cut > 0 {
            output::say(format_args!(
                "connections cut because their requests took too long: {}",
                summary.cut
            ));
        }
        if summary.unfinished > 0 {
            output::say(format_args!("requests the disk has not finished, waiting: {}", summary.unfinished));
        }
        Ok(())
    }
}

/// The control socket.
impl Serve {
    /// A server that changes nothing has none: there may be several of one file, and nothing to ask of them.
    fn control(&self, disk: &Arc<Disk>, server: &Server) -> Result<Option<Control>, Failure> {
        if self.read_only {
            return Ok(None);
        }
        let path = self.file.canonicalize();
        let served = Served {
            file: self.file.clone(),
            path: path.map_err(|error| Failure::new(format!("{}: {error}", self.file.display())))?,
            disk: Arc::clone(disk),
            nbd: Uri(server.local_address()).to_string(),
            server: server.shutdown_handle(),
            crcs: CrcWriter::start()
                .map_err(|error| Failure::new(format!("cannot start a thread: {error}")))?,
            one_snapshot: Mutex::new(()),
            one_deletion: Mutex::new(()),
            board: Board::default(),
        };
        let path = self.control.clone().unwrap_or_else(|| control::socket_of(&self.file));
        match Control::start(&path, served) {
            Ok(control) => Ok(Some(control)),
            // The guest comes first, and chose a folder in which there can be no such socket.
            Err(error) if self.control.is_none() && no_place_for_sockets(&error) => {
                output::say(format_args!(
                    "{}: no control socket ({error}): other cowvhd commands cannot reach this server",
                    path.display()
                ));
                Ok(None)
            }
            Err(error) => Err(Failure::new(format!(
                "cannot listen on {}: {error}; choose another place with --control",
                path.display()
            ))),
        }
    }
}

fn no_place_for_sockets(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::InvalidFilename | io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
    )
}

#[cfg(not(feature = "test-faults"))]
fn backend(disk: &Arc<Disk>) -> Arc<dyn Backend> {
    Arc::clone(disk) as Arc<dyn Backend>
}

#[cfg(feature = "test-faults")]
fn backend(disk: &Arc<Disk>) -> Arc<dyn Backend> {
    crate::ignore_flush::wrap(Arc::clone(disk) as Arc<dyn Backend>)
}

/// `FILE.sock`, beside the image.
fn default_socket(file: &Path) -> PathBuf {
    let mut name = OsString::from(file);
    name.push(".sock");
    name.into()
}

/// An address as NBD clients take it.
struct Uri<'a>(&'a NbdAddress);

impl fmt::Display for Uri<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            NbdAddress::Tcp(address) => write!(f, "nbd://{address}"),
            NbdAddress::Unix(path) => {
                f.write_str("nbd+unix:///?socket=")?;
                for &byte in path.as_os_str().as_bytes() {
                    match byte {
                        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'_' | b'~' | b'-' => {
                            write!(f, "{}", char::from(byte))?;
                        }
                        _ => write!(f, "%{byte:02X}")?,
                    }
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_become_uris() {
        let uri = |text| Uri(&NbdAddress::parse(text).unwrap()).to_string();
        assert_eq!(uri("vm.vhd.sock"), "nbd+unix:///?socket=vm.vhd.sock");
        assert_eq!(uri("/run/a b&c%.sock"), "nbd+unix:///?socket=/run/a%20b%26c%25.sock");
        assert_eq!(uri("tcp:127.0.0.1:10809"), "nbd://127.0.0.1:10809");
        assert_eq!(uri("tcp:[::1]:10809"), "nbd://[::1]:10809");
    }

    #[test]
    fn the_default_socket_is_beside_the_image() {
        assert_eq!(default_socket(Path::new("/vms/a.vhd")), Path::new("/vms/a.vhd.sock"));
    }
}
