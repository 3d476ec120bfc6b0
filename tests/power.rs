//! The simulator's power: every seeded defect must be noticed, or the silence of `crash_states` means nothing.

#![cfg(feature = "defects")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/crash.rs"]
mod crash;
#[path = "support/strict_vhd.rs"]
mod strict_vhd;

use cowvhd::defect::{self, Defect};
use crash::{Explorer, SMALL, WIDE, Workload};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// At most so many workloads are tried for one defect.
const SEEDS: u64 = 160;

/// Runs workloads under the defect until one of them is judged wrong; says which oracle did it.
fn kill(defect: Defect) -> Option<(u64, String)> {
    defect::seed(Some(defect));
    // One seed in four stands for a workload whose operations fail; nothing else can show what a failure leaves behind.
    let step = if matches!(defect, Defect::FailedFlushForgetsData) { 4 } else { 1 };
    let killed = (0..SEEDS).map(|n| n * step + step / 4).find_map(|seed| Some((seed, violation(seed)?)));
    defect::seed(None);
    killed
}

fn violation(seed: u64) -> Option<String> {
    let run = || {
        let shape = if seed % 4 == 3 { WIDE } else { SMALL };
        let mut workload = Workload::new(shape, seed, seed % 4 == 1);
        if !seed.is_multiple_of(4) {
            workload.interleave();
        }
        workload.run(if seed % 4 == 3 { 120 } else { 60 });
        if seed % 4 != 1 {
            workload.check_live();
        }
        Explorer::new(shape).explore(&workload.finish(), seed, 30)
    };
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.err(),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            Some(format!("the workload itself failed: {}", text.unwrap_or_default()))
        }
    }
}

fn report(defect: Defect, killed: &Option<(u64, String)>) {
    let verdict = match killed {
        Some((seed, error)) => format!("killed (seed {seed}): {error}"),
        None => format!("SURVIVED {SEEDS} workloads"),
    };
    println!("{defect:?}: {} {verdict}", defect.description());
}

#[test]
fn every_seeded_defect_is_noticed() {
    std::panic::set_hook(Box::new(|_| {}));
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                while let Some(&defect) = Defect::ALL.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let killed = kill(defect);
                    report(defect, &killed);
                    results.lock().unwrap().push((defect, killed.is_some()));
                }
            });
        }
    });
    let _ = std::panic::take_hook();
    let results = results.into_inner().unwrap();
    let survivors: Vec<_> = results.iter().filter(|(_, killed)| !killed).map(|(d, _)| d).collect();
    println!("defects: {} killed / {} seeded", results.len() - survivors.len(), results.len());
    assert!(survivors.is_empty(), "not noticed: {survivors:?}");
}
