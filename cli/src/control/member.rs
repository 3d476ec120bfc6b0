//! The server's part in a checkpoint of several disks, which another process leads over one connection.
//!
//! Each request is a step of [`Member`]; the connection is what keeps the server in the checkpoint. A leader that goes away, or that
//! keeps the guest waiting for longer than [`HOLD`] or [`SEALED`] allow, has lost it: before the switch the disk goes on as if
//! nothing had been asked, after it what is on the medium decides. So no guest waits for a process that is dead or stopped.

use super::protocol::{Answer, Digits, Joined, Request, receive, send};
use super::server::Lines;
use crate::failure::{Code, Failure};
use cowvhd::Disk;
use cowvhd::snapshot::{Member, Participant, SnapshotName, StateRef};
use cowvhd::state::Digest;
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a guest's changes are held at most before the leader lets them go on.
const HOLD: Duration = Duration::from_secs(5);
/// How long a guest's flushes wait at most, when its disk is sealed, for the other disks and the commit.
const SEALED: Duration = Duration::from_secs(20);

/// What the next request may be, and until when.
enum Due {
    Anything,
    Seal,
    Commit,
}

/// Takes part until the end of the checkpoint, and returns the snapshot where the leader committed it; the connection goes on. An
/// error ends it.
pub(super) fn take_part(
    stream: &UnixStream,
    lines: &mut Lines<'_>,
    disk: &Disk,
    name: &str,
    keeps_state: bool,
) -> io::Result<Option<PathBuf>> {
    let answer = |result: Result<Value, Failure>| send(&mut &*stream, &Answer::of(result));
    let joined = SnapshotName::new(name)
        .and_then(|name| Member::begin(disk, &name, keeps_state))
        .map_err(Failure::from)
        .and_then(|member| Ok((json!(Joined::of(&member)?), member)));
    let mut member = match joined {
        Ok((joined, member)) => {
            answer(Ok(joined))?;
            member
        }
        Err(failure) => return answer(Err(failure)).map(|()| None),
    };
    let mut due = Due::Anything;
    loop {
        let line = match receive(lines) {
            Ok(Some(line)) => line,
            result => {
                // First the guest.
                drop(member);
                let late = |error: &io::Error| {
                    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
                };
                return match result {
                    Err(error) if late(&error) => {
                        let waited = match due {
                            Due::Commit => "flushes",
                            Due::Anything | Due::Seal => "writes",
                        };
                        let what = format!("the guest's {waited} have waited for too long: the server left");
                        answer(Err(Failure::new(what)))?;
                        Err(error)
                    }
                    Err(error) => Err(error),
                    Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        };
        lines.get_mut().until = None;
        let request = serde_json::from_str(&line)
            .map_err(|error| Failure::with_code(Code::Usage, format!("cannot be understood: {error}")));
        let result = match request {
            Ok(Request::GroupPrepare {}) => member.prepare().map_err(Failure::from),
            Ok(Request::GroupHold { limit_ms }) => member.hold().map_err(Failure::from).inspect(|()| {
                due = Due::Seal;
                lines.get_mut().until = until(limit_ms, HOLD);
            }),
            Ok(Request::GroupSeal { manifest, digest, limit_ms }) => {
                let sealed = state(&manifest, &digest)
                    .and_then(|state| Ok(member.switch(&state).and_then(|()| member.seal())?));
                sealed.inspect(|()| {
                    due = Due::Commit;
                    lines.get_mut().until = until(limit_ms, SEALED);
                })
            }
            Ok(Request::GroupCommit {}) => {
                let path = member.commit().map_err(Failure::from);
                let taken = path.as_ref().ok().cloned();
                return answer(path.map(|path| json!({ "snapshot": path }))).map(|()| taken);
            }
            Ok(Request::GroupFail { cause }) => {
                member.fail(&cause);
                drop(member);
                return answer(Ok(json!({}))).map(|()| None);
            }
            Ok(Request::GroupLeave {}) => {
                drop(member);
                return answer(Ok(json!({}))).map(|()| None);
            }
            Ok(_) => Err(Failure::usage("not while the disk takes part in a checkpoint")),
            Err(failure) => Err(failure),
        };
        match result {
            Ok(()) => answer(Ok(json!({})))?,
            Err(failure) => {
                drop(member);
                return answer(Err(failure)).map(|()| None);
            }
        }
    }
}

fn state(manifest: &str, digest: &Digits) -> Result<StateRef, Failure> {
    let digest = digest.bytes().ok_or_else(|| Failure::usage("a digest has 64 hexadecimal digits"))?;
    Ok(StateRef::new(OsStr::new(manifest), Digest(digest))?)
}

fn until(limit_ms: Option<u64>, most: Duration) -> Option<Instant> {
    Some(Instant::now() + limit_ms.map_or(most, Duration::from_millis).min(most))
}
