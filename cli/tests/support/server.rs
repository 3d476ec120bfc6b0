//! The server under test, behind what these tests need of one.
//!
//! `COWVHD_TEST_SERVER=qemu-nbd` puts QEMU's server, with its VHD driver, in place of ours: a test that fails with both
//! has its fault in the harness.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::process::{PATIENCE, Process, find, run, tool};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    Cowvhd,
    QemuNbd,
}

impl Server {
    pub fn under_test() -> Self {
        match std::env::var("COWVHD_TEST_SERVER").as_deref() {
            Err(_) | Ok("cowvhd") => Server::Cowvhd,
            Ok("qemu-nbd") => Server::QemuNbd,
            Ok(other) => panic!("COWVHD_TEST_SERVER={other}: cowvhd or qemu-nbd"),
        }
    }

    /// Makes a dynamic disk.
    pub fn create(self, image: &Path, size: &str) {
        run(&mut self.create_command(image, size));
    }

    /// What `info` says of an image, as JSON.
    pub fn info(self, image: &Path) -> serde_json::Value {
        let text = match self {
            Server::Cowvhd => run(tool_under_test().arg("info").arg(image).arg("--json")),
            Server::QemuNbd => run(tool("qemu-img").args(["info", "-f", "vpc", "--output=json"]).arg(image)),
        };
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("info: {error}: {text}"))
    }

    /// Starts serving an image and waits until it can be used.
    pub fn serve(self, image: &Path) -> Serving {
        let socket = socket_of(image);
        if self == Server::QemuNbd {
            let _ = std::fs::remove_file(&socket);
        }
        let mut process = Process::spawn(&self.serve_command(image));
        match self {
            Server::Cowvhd => {
                process.wait_for("the ready line", |line| line.starts_with("serving").then_some(()))
            }
            Server::QemuNbd => wait_for_socket(&socket),
        }
        Serving { process, socket }
    }

    fn create_command(self, image: &Path, size: &str) -> Command {
        match self {
            Server::Cowvhd => {
                let mut command = tool_under_test();
                command.arg("create").arg(image).arg(size);
                command
            }
            Server::QemuNbd => {
                let mut command = tool("qemu-img");
                command.args(["create", "-q", "-f", "vpc", "-o", "subformat=dynamic,force_size"]);
                command.arg(image).arg(size);
                command
            }
        }
    }

    fn serve_command(self, image: &Path) -> Command {
        match self {
            Server::Cowvhd => {
                let mut command = tool_under_test();
                command.arg("serve").arg(image);
                command
            }
            Server::QemuNbd => {
                let mut command = tool("qemu-nbd");
                command.args(["-f", "vpc", "-t", "--discard=unmap", "-k"]).arg(socket_of(image)).arg(image);
                command
            }
        }
    }

    /// The programs a guest needs to create and serve an image.
    pub fn programs(self) -> Vec<PathBuf> {
        match self {
            Server::Cowvhd => vec![cowvhd()],
            Server::QemuNbd => vec![find("qemu-img"), find("qemu-nbd")],
        }
    }

    /// The part of a guest's init that knows this server (see `guest/init`).
    pub fn guest_script(self, image: &Path, size: &str) -> String {
        format!(
            "create_image() {{ {}; }}\nserve='{}'\nsocket='{}'\n",
            words(&self.create_command(image, size)),
            words(&self.serve_command(image)),
            socket_of(image).display()
        )
    }
}

/// The binary of this package.
fn cowvhd() -> PathBuf {
    env!("CARGO_BIN_EXE_cowvhd").into()
}

/// A command of the tool under test.
pub fn tool_under_test() -> Command {
    Command::new(cowvhd())
}

/// Where `serve` listens: beside the image.
pub fn socket_of(image: &Path) -> PathBuf {
    let mut socket = image.as_os_str().to_owned();
    socket.push(".sock");
    socket.into()
}

fn words(command: &Command) -> String {
    let words: Vec<_> = [command.get_program()].into_iter().chain(command.get_args()).collect();
    words.iter().map(|word| word.to_str().expect("plain words")).collect::<Vec<_>>().join(" ")
}

fn wait_for_socket(socket: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while UnixStream::connect(socket).is_err() {
        assert!(Instant::now() < deadline, "nobody listens on {}", socket.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A server that serves one image.
pub struct Serving {
    process: Process,
    socket: PathBuf,
}

impl Serving {
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// SIGTERM: it must end in order.
    pub fn close(mut self) {
        let status = self.process.terminate();
        if !status.success() {
            self.process.give_up(&format!("ended with {status} after SIGTERM"));
        }
    }
}
