//! `cowvhd status`: what the server of a disk says about itself.

use crate::control::{Request, Sockets, Status, WorkStatus};
use crate::failure::Failure;
use crate::output;
use crate::size::Human;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Tells whether a server has a disk open, where it serves it, to how many clients, and how far a merge or a deletion has come.
///
/// Asks the server through its control socket. Fails where there is none.
#[derive(Debug, clap::Args)]
pub(crate) struct StatusOf {
    /// The disk's file.
    file: PathBuf,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sockets: Sockets,
}

impl StatusOf {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let Some(mut client) = self.sockets.connect(&self.file)? else {
            return Err(Failure::new(format!(
                "{}: no server has it open; one that was started with --control is found by the same option",
                self.file.display()
            )));
        };
        let status = client.ask(&Request::Status {})?;
        if self.json {
            return output::print_json(&status);
        }
        let unreadable = |error| Failure::new(format!("the server's answer cannot be understood: {error}"));
        let status: Status = serde_json::from_value(status).map_err(unreadable)?;
        output::print(&format!(
            "{} ({}) is served at {} by cowvhd {} (pid {}), to {} clients\n{}",
            status.filename,
            Human(status.virtual_size),
            status.nbd,
            status.version,
            status.pid,
            status.clients,
            status.work.map(|work| describe(&work)).unwrap_or_default()
        ))
    }
}

/// A line on work under way.
fn describe(work: &WorkStatus) -> String {
    let names = work.layers.iter().map(|layer| {
        Path::new(layer).file_name().map_or_else(|| layer.clone(), |name| name.to_string_lossy().into_owned())
    });
    let names = names.collect::<Vec<_>>().join(", ");
    let doing = match work.request.as_str() {
        "merge" => format!("merging {names} into it"),
        "snapshot-delete" => format!("deleting {names}"),
        other => other.to_string(),
    };
    let percent = if work.total == 0 { 100 } else { u128::from(work.done) * 100 / u128::from(work.total) };
    let per_second = (work.copied_bytes as f64 / work.elapsed.max(0.001)) as u64;
    let mut line = format!(
        "{doing}: {percent} %, {} copied in {:.0} s ({} a second",
        Human(work.copied_bytes),
        work.elapsed,
        Human(per_second)
    );
    if let Some(rate) = work.rate {
        // Writing to a string does not fail.
        let _ = write!(line, ", at most {}", Human(rate.get()));
    }
    line + ")\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_told_in_a_line() {
        let mut work = WorkStatus {
            request: "merge".into(),
            layers: vec!["/vms/vm@b.vhd".into(), "/vms/vm@a.vhd".into()],
            phase: "copy".into(),
            done: 1 << 30,
            total: 4 << 30,
            copied_bytes: 100 << 20,
            elapsed: 2.0,
            rate: None,
        };
        assert_eq!(
            describe(&work),
            "merging vm@b.vhd, vm@a.vhd into it: 25 %, 100 MiB copied in 2 s (50 MiB a second)\n"
        );
        work.request = "snapshot-delete".into();
        work.layers.pop();
        (work.rate, work.total, work.elapsed) = (std::num::NonZeroU64::new(64 << 20), 0, 0.0);
        assert!(describe(&work).starts_with("deleting vm@b.vhd: 100 %, "), "{}", describe(&work));
        assert!(describe(&work).ends_with(", at most 64 MiB)\n"), "{}", describe(&work));
    }
}
