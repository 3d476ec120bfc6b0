//! Runs the tool, for the `tool_*` tests. Nothing here sleeps: a server is ready when it says so.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers are test code too")]

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Output, Stdio};
use tempfile::TempDir;

pub use rustix::process::Signal;

/// A directory that the tool runs in.
pub struct Bench {
    dir: TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Bench { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn exists(&self, name: &str) -> bool {
        fs::symlink_metadata(self.path(name)).is_ok()
    }

    /// The names in the directory, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// A command that runs in the directory.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    /// Runs `cowvhd` to its end.
    pub fn cowvhd(&self, arguments: &[&str]) -> Ended {
        Ended::of(self.command(env!("CARGO_BIN_EXE_cowvhd")).args(arguments))
    }

    /// Runs another program to its end.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Ended {
        Ended::of(self.command(program).args(arguments))
    }

    /// `info --json` of a file.
    pub fn info(&self, file: &str) -> serde_json::Value {
        let ended = self.cowvhd(&["info", "--json", file]);
        serde_json::from_str(ended.must_be(0)).unwrap()
    }

    /// Starts `cowvhd serve` with these arguments and waits until clients can connect.
    pub fn serve(&self, arguments: &[&str]) -> Serving {
        let mut command = self.command(env!("CARGO_BIN_EXE_cowvhd"));
        command.arg("serve").args(arguments);
        Serving::start(&mut command)
    }

    /// Runs commands of `qemu-io` on what listens at an NBD URI. Whether they succeeded is in its output alone.
    pub fn qemu_io(&self, uri: &str, commands: &[&str]) -> String {
        self.qemu_io_with(&[], uri, commands)
    }

    pub fn qemu_io_with(&self, arguments: &[&str], uri: &str, commands: &[&str]) -> String {
        let mut command = self.command("qemu-io");
        command.args(["-f", "raw"]).args(arguments).arg(uri);
        for text in commands {
            command.args(["-c", text]);
        }
        let ended = Ended::of(&mut command);
        format!("{}{}", ended.stdout, ended.stderr)
    }
}

/// How a program ended, and what it said.
#[derive(Debug)]
pub struct Ended {
    /// -1 for one that a signal ended.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap_or_else(|error| {
            panic!(
                "{:?}: {error}; scripts/install-test-tools installs what the tests need",
                command.get_program()
            )
        });
        output.into()
    }

    /// Checks the exit code and that an error, and only an error, was reported; returns what was printed.
    pub fn must_be(&self, code: i32) -> &str {
        assert_eq!(self.code, code, "{self:?}");
        if code == 0 {
            assert_eq!(self.stderr, "");
        } else {
            assert_eq!(self.stdout, "");
            assert!(self.stderr.starts_with("cowvhd: "), "{self:?}");
        }
        &self.stdout
    }

    /// The same, and what was said must contain all of `words`.
    pub fn must_say(&self, code: i32, words: &[&str]) {
        self.must_be(code);
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not in {:?}", self.stderr);
        }
    }
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Ended {
            code: output.status.code().unwrap_or(-1),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }
}

/// A server that clients can connect to; killed when dropped.
pub struct Serving {
    child: Option<Child>,
    stdout: BufReader<ChildStdout>,
    stderr: BufReader<ChildStderr>,
    /// The line it printed.
    pub ready: String,
}

impl Serving {
    /// Starts a command that ends up serving.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let mut ready = String::new();
        stdout.read_line(&mut ready).unwrap();
        let mut serving = Serving { child: Some(child), stdout, stderr, ready };
        if !serving.ready.ends_with('\n') {
            let ended = serving.end();
            panic!("{command:?} did not serve: {ended:?}");
        }
        serving
    }

    /// The next line it says on standard error.
    pub fn said(&mut self) -> String {
        let mut line = String::new();
        self.stderr.read_line(&mut line).unwrap();
        line
    }

    /// The URI of the ready line.
    pub fn uri(&self) -> &str {
        self.ready.trim_end().rsplit(' ').next().unwrap()
    }

    pub fn id(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = rustix::process::Pid::from_child(self.child.as_ref().unwrap());
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for its end; the output is what nobody has read yet.
    pub fn end(&mut self) -> Ended {
        let (mut stdout, mut stderr) = (String::new(), String::new());
        // It writes far less than a pipe holds: one after the other will do.
        self.stdout.read_to_string(&mut stdout).unwrap();
        self.stderr.read_to_string(&mut stderr).unwrap();
        let status = self.child.take().unwrap().wait().unwrap();
        Ended { code: status.code().unwrap_or(-1), stdout, stderr }
    }

    /// SIGTERM, which must be obeyed in order. Returns what it said.
    pub fn terminate(mut self) -> String {
        self.signal(Signal::TERM);
        let ended = self.end();
        assert_eq!((ended.code, ended.stdout.as_str()), (0, ""), "{ended:?}");
        ended.stderr
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.signal(Signal::KILL);
        assert_eq!(self.end().code, -1);
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A connection to a control socket, that says lines and reads answers.
pub struct Talk(pub BufReader<UnixStream>);

impl Talk {
    pub fn to(path: &Path) -> Self {
        Talk(BufReader::new(UnixStream::connect(path).unwrap()))
    }

    pub fn ask(&mut self, line: &str) -> serde_json::Value {
        writeln!(self.0.get_mut(), "{line}").unwrap();
        self.answer().unwrap()
    }

    /// `None` when the server has closed the connection.
    pub fn answer(&mut self) -> Option<serde_json::Value> {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        (!line.is_empty()).then(|| serde_json::from_str(&line).unwrap())
    }
}

/// Whether a path is a socket that somebody listens on.
pub fn listens(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}
