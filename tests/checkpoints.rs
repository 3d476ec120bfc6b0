//! Checkpoints of a simulated VM: the power is cut, or an operation fails, at every step. Afterwards disks and state are all old or
//! all new, and a state is opened for the disks that it belongs to alone.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/checkpoints.rs"]
mod support;

use cowvhd::sim::{Bounds, Fault, FaultPlan};
use support::{Story, cut_anywhere, judge};

/// How many states are made of a crash point; more with `COWVHD_SNAPSHOT_STATES`, a factor.
fn bound(states: usize) -> usize {
    let factor = std::env::var("COWVHD_SNAPSHOT_STATES").ok().and_then(|factor| factor.parse().ok());
    states * factor.unwrap_or(1usize)
}

#[test]
fn a_power_cut_at_any_step() {
    let judged = [1, 2].map(|count| cut_anywhere(count, bound(12)).unwrap_or_else(|what| panic!("{what}")));
    println!("{judged:?} distinct states: no violation");
    assert!(judged[0] > 100 && judged[1] > 200, "{judged:?}");
}

/// An operation fails: the disks go on as they were, or are stopped; then the power is cut.
#[test]
fn a_failure_at_any_step() {
    for (count, errno) in [(1, 5), (2, 5), (2, 28)] {
        for step in 0.. {
            let mut story = Story::new(1, count);
            story.write_some(2);
            story.flush();
            story.vfs.set_faults(FaultPlan::new(Fault::Error(errno), step, 1));
            let result = story.checkpoint();
            let injected = story.vfs.injected_faults() > 0;
            story.vfs.set_faults(FaultPlan::default());
            story.write_some(1);
            story.flush();
            let point = story.vfs.crash_now();
            point.for_each_state(step, &Bounds::sample(bound(4)), |state| {
                judge(&story, &state, point.clock(), 0, step % 2 == 0).unwrap_or_else(|what| {
                    panic!("{count} disks, {errno} at {step} ({result:?}), {}: {what}", state.fates())
                });
                true
            });
            if !injected {
                assert!(result.is_ok(), "{result:?}");
                break;
            }
        }
    }
}
