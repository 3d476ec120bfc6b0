//! Child processes that never outlive their test, and their output line by line.
//!
//! Each ends with its guard, and with the thread that started it should that be killed (`setpriv --pdeathsig`). Nothing
//! here sleeps: tests wait for a line, or for the end of the output, with a deadline far beyond what it should take.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// The path of a program the tests need. A missing one fails the test.
pub fn find(program: &str) -> PathBuf {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin"])
        .map(|dir| Path::new(dir).join(program))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| panic!("{program} is missing: run scripts/install-test-tools"))
}

/// A command for a program the tests need.
pub fn tool(program: &str) -> Command {
    Command::new(find(program))
}

/// Runs a command to its end, whatever that is.
pub fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    finish(command)
}

/// The same with stdin, stdout and stderr as they are set.
pub fn finish(command: &mut Command) -> Output {
    let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let pid = rustix::process::Pid::from_child(&child);
    let (sender, done) = channel();
    let waiter = thread::spawn(move || sender.send(child.wait_with_output()));
    let output = done.recv_timeout(PATIENCE).unwrap_or_else(|_| {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        panic!("{command:?}: no end in sight")
    });
    waiter.join().expect("the waiting thread").expect("somebody listens");
    output.unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Runs a command that must succeed, and returns what it prints on stdout.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, printed(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// All that a command printed, for failure messages.
pub fn printed(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A running program. Its stdout and stderr come as one stream of lines.
pub struct Process {
    name: String,
    child: Child,
    lines: Receiver<String>,
    reader: Option<JoinHandle<()>>,
    seen: Vec<String>,
}

impl Process {
    /// Takes the command's words and directory, not its other settings.
    pub fn spawn(command: &Command) -> Self {
        let name = format!("{command:?}");
        let mut bound = tool("setpriv");
        bound.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
        if let Some(dir) = command.get_current_dir() {
            bound.current_dir(dir);
        }
        let (output, writer) = std::io::pipe().expect("a pipe");
        bound.stdin(Stdio::null()).stdout(writer.try_clone().expect("a second end")).stderr(writer);
        let child = bound.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
        // The command holds the writing end: without it the output ends with the program.
        drop(bound);
        let (sender, lines) = channel();
        let reader = thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_string();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Process { name, child, lines, reader: Some(reader), seen: Vec::new() }
    }

    /// The next line, or `None` once the program has closed its output.
    fn line_before(&mut self, deadline: Instant) -> Option<String> {
        match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                self.seen.push(line.clone());
                Some(line)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => self.give_up("said nothing for too long"),
        }
    }

    /// Waits for a line that `wanted` turns into something.
    pub fn wait_for<T>(&mut self, what: &str, mut wanted: impl FnMut(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        while let Some(line) = self.line_before(deadline) {
            if let Some(found) = wanted(&line) {
                return found;
            }
        }
        self.give_up(&format!("ended without {what}"))
    }

    /// Ends it as a crash would, and returns the lines not yet read.
    pub fn kill(&mut self) -> Vec<String> {
        self.child.kill().unwrap_or_else(|error| panic!("killing {}: {error}", self.name));
        self.rest().1
    }

    /// Asks it to end, with SIGTERM.
    pub fn terminate(&mut self) -> ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)
            .unwrap_or_else(|error| panic!("SIGTERM to {}: {error}", self.name));
        self.rest().0
    }

    /// Waits for its end, and returns the lines not yet read.
    pub fn rest(&mut self) -> (ExitStatus, Vec<String>) {
        let deadline = Instant::now() + PATIENCE;
        let mut rest = Vec::new();
        while let Some(line) = self.line_before(deadline) {
            rest.push(line);
        }
        let status = self.child.wait().unwrap_or_else(|error| panic!("{}: {error}", self.name));
        (status, rest)
    }

    /// Fails the test with the program's last lines.
    pub fn give_up(&self, why: &str) -> ! {
        let from = self.seen.len().saturating_sub(60);
        panic!("{} {why}; its last lines:\n{}", self.name, self.seen[from..].join("\n"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Either fails if it has ended: then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        if thread::panicking() {
            // What nobody has waited for: most of a server's output.
            let unread: Vec<String> = self.lines.try_iter().collect();
            if !unread.is_empty() {
                let from = unread.len().saturating_sub(20);
                eprintln!("{} also said:\n{}", self.name, unread[from..].join("\n"));
            }
        }
    }
}
