//! Work on what a crash left, of which one operation fails, and what that leaves for the next crash.

#![allow(dead_code, reason = "each test uses its part")]

use cowvhd::sim::{CrashPoint, CrashState, Fault, FaultPlan, Rng, SimVfs};
use std::fmt;
use std::str::FromStr;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// The operation that fails, and with which error. As text, such as `5@12`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failing {
    pub errno: i32,
    pub operation: u64,
}

impl fmt::Display for Failing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.errno, self.operation)
    }
}

impl FromStr for Failing {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (errno, operation) = text.split_once('@').unwrap_or((text, ""));
        Ok(Failing { errno: errno.parse()?, operation: operation.parse()? })
    }
}

/// A crash right behind `work` on the state, and how many operations that had. `None` where the operation was not there to fail, or
/// cannot fail so.
pub fn left_by(state: &CrashState, failing: Failing, work: impl Fn(&SimVfs)) -> (u64, Option<CrashPoint>) {
    let vfs = state.to_vfs(state.hash);
    vfs.set_faults(FaultPlan::new(Fault::Error(failing.errno), failing.operation, 1));
    work(&vfs);
    (vfs.fallible_operations(), (vfs.injected_faults() > 0).then(|| vfs.crash_now()))
}

/// The same for each operation of the work in its turn, as long as `visit` returns true.
pub fn left_by_each(
    state: &CrashState,
    work: impl Fn(&SimVfs),
    mut visit: impl FnMut(Failing, &CrashPoint) -> bool,
) {
    for operation in 0.. {
        for errno in [EIO, ENOSPC] {
            let failing = Failing { errno, operation };
            match left_by(state, failing, &work) {
                (operations, _) if operations <= operation => return,
                (_, Some(left)) if !visit(failing, &left) => return,
                _ => {}
            }
        }
    }
}

/// The same for one operation that `rng` picks.
pub fn left_by_any(
    state: &CrashState,
    work: impl Fn(&SimVfs),
    rng: &mut Rng,
) -> Option<(Failing, CrashPoint)> {
    let none = Failing { errno: EIO, operation: u64::MAX };
    let (operations, _) = left_by(state, none, &work);
    let errno = if rng.one_in(2) { EIO } else { ENOSPC };
    let failing = Failing { errno, operation: rng.below(operations.max(1)) };
    Some((failing, left_by(state, failing, work).1?))
}
