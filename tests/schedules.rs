//! Small programs of a few threads, each under many schedules: nothing is lost, nobody sees what is not his, and every call ends.
//!
//! `COWVHD_SCHEDULES` says how many schedules are run. The locks and atomics of the library are those of a schedule checker here
//! (feature `schedules`), and each seeded defect that only threads can show has to be noticed.

#![cfg(all(feature = "schedules", feature = "defects"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/crash.rs"]
#[allow(dead_code, reason = "shared with the other tests of crashes")]
mod crash;
#[path = "support/failing.rs"]
mod failing;
#[path = "support/schedules.rs"]
mod schedules;
#[path = "support/strict_vhd.rs"]
mod strict_vhd;
#[path = "support/summary.rs"]
mod summary;

use cowvhd::defect::{self, Defect};
use cowvhd::sim::{Fault, FaultPlan, Operation};
use crash::{CHILD, SMALL, Shape};
use schedules::{BATCH, Batch, Program, World, Wrong, batch};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Schedules of a run of the test command.
const SCHEDULES: u64 = 20_000;
/// At most so many batches of schedules are tried for one defect.
const BATCHES_OF_DEFECT: u64 = 2000;

/// Four blocks of four pages: two freed slots wait for their reuse, a third brings them back.
const FOUR_BLOCKS: Shape = Shape { size: 4 * (16 << 10), hot_blocks: &[0..2, 2..4], ..SMALL };
const FOUR_BLOCKS_CHILD: Shape = Shape { child: true, ..FOUR_BLOCKS };
const FOUR_BLOCKS_FIXED: Shape = Shape { fixed: true, ..FOUR_BLOCKS };
/// Sectors of a block.
const BLOCK: u64 = 32;

fn nothing(_: &World) {}

fn fill_all(world: &World) {
    (0..4).for_each(|block| world.write(block * BLOCK, BLOCK));
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

static PROGRAMS: &[Program] = &[
    Program {
        name: "flush-allocation",
        shape: FOUR_BLOCKS,
        image: nothing,
        before: nothing,
        threads: &[
            |world| {
                world.write(3, 2);
                world.flush();
            },
            |world| world.write(4, 9),
            |world| {
                world.flush();
                world.write(20, 1);
                world.flush();
            },
        ],
        faults: None,
    },
    Program {
        name: "read-reuse",
        shape: FOUR_BLOCKS,
        image: fill_all,
        before: nothing,
        threads: &[
            |world| {
                (0..3).for_each(|block| world.discard(block * BLOCK, BLOCK));
                world.flush();
                world.write(2 * BLOCK + 8, 8);
                world.write(BLOCK, 4);
                world.flush();
            },
            |world| (0..3).for_each(|block| world.read(block * BLOCK + 6, 12)),
            |world| {
                world.write(10, 3);
                world.read(8, 8);
            },
        ],
        faults: None,
    },
    Program {
        name: "same-slot-again",
        shape: FOUR_BLOCKS,
        image: fill_all,
        before: |world| (1..3).for_each(|block| world.discard(block * BLOCK, BLOCK)),
        threads: &[
            |world| {
                world.discard(0, BLOCK);
                world.flush();
                world.write(4, 8);
            },
            |world| world.read(6, 4),
        ],
        faults: None,
    },
    Program {
        name: "slot-of-another",
        shape: FOUR_BLOCKS,
        image: fill_all,
        before: |world| (1..3).for_each(|block| world.discard(block * BLOCK, BLOCK)),
        threads: &[
            |world| {
                world.discard(0, BLOCK);
                world.flush();
                world.write(BLOCK + 8, 8);
                world.flush();
            },
            |world| world.write(10, 3),
        ],
        faults: None,
    },
    Program {
        name: "flush-discard",
        shape: FOUR_BLOCKS,
        image: |world| world.write(0, BLOCK),
        before: |world| {
            world.write(BLOCK, 4);
            world.write(2, 8);
        },
        threads: &[World::flush, |world| world.discard(0, BLOCK)],
        faults: None,
    },
    Program {
        name: "write-discard",
        shape: FOUR_BLOCKS,
        image: nothing,
        before: nothing,
        threads: &[
            |world| {
                world.write(0, 5);
                world.write(2, 8);
            },
            |world| {
                world.discard(0, BLOCK);
                world.write(16, 4);
                world.read(0, BLOCK);
                world.flush();
            },
            |world| {
                world.write(8, 2);
                world.flush();
                world.discard(0, BLOCK);
            },
        ],
        faults: None,
    },
    Program {
        name: "checkpoint-write",
        shape: FOUR_BLOCKS,
        image: |world| world.write(0, BLOCK),
        before: |world| {
            world.write(BLOCK, 4);
            world.flush();
            (0..2).for_each(|block| world.discard(block * BLOCK, BLOCK));
        },
        threads: &[
            |world| {
                world.discard(BLOCK, BLOCK);
                world.write(2 * BLOCK, BLOCK);
                world.discard(2 * BLOCK, BLOCK);
                world.flush();
            },
            |world| {
                world.write(3 * BLOCK, 8);
                world.flush();
            },
            |world| {
                world.write(4, 9);
                world.read(0, BLOCK);
            },
        ],
        faults: None,
    },
    Program {
        name: "units",
        shape: FOUR_BLOCKS_CHILD,
        image: nothing,
        before: nothing,
        threads: &[
            |world| {
                world.write(1, 1);
                world.write(BLOCK + 7, 2);
            },
            |world| {
                world.write(3, 2);
                world.write(BLOCK + 9, 1);
                world.flush();
            },
            |world| {
                world.read(0, 16);
                world.write(6, 9);
                world.flush();
            },
        ],
        faults: None,
    },
    Program {
        name: "units-zeroed",
        shape: CHILD,
        image: |world| world.write(2, 4),
        before: nothing,
        threads: &[
            |world| {
                world.write(1, 12);
                world.flush();
            },
            |world| {
                world.discard(0, 24);
                world.read(0, BLOCK);
            },
            |world| {
                world.write(9, 1);
                world.flush();
            },
        ],
        faults: None,
    },
    Program {
        name: "small-flush",
        shape: FOUR_BLOCKS,
        image: |world| world.write(0, BLOCK),
        before: |world| world.write(BLOCK, 2),
        threads: &[
            |world| {
                world.write(2, 1);
                world.write(BLOCK + 2, 5);
            },
            |world| {
                world.write(2 * BLOCK, 3);
                world.flush();
            },
            |world| {
                world.write(BLOCK + 6, 3);
                world.flush();
            },
        ],
        faults: None,
    },
    Program {
        name: "failed-flush",
        shape: FOUR_BLOCKS,
        image: |world| world.write(0, BLOCK),
        before: nothing,
        threads: &[
            |world| {
                world.write(2, 6);
                world.flush();
            },
            |world| {
                world.write(BLOCK, 6);
                world.flush();
            },
            |world| {
                world.write(11, 1);
                world.flush();
                world.write(12, 1);
                world.flush();
            },
        ],
        faults: Some(|rng| {
            let operation = if rng.one_in(2) { Operation::Sync } else { Operation::DurableWrite };
            let error = if rng.one_in(3) { ENOSPC } else { EIO };
            FaultPlan::new(Fault::Error(error), rng.below(2), 1).only(operation)
        }),
    },
    Program {
        name: "close",
        shape: FOUR_BLOCKS,
        image: |world| world.write(0, BLOCK),
        before: nothing,
        threads: &[
            |world| {
                world.write(3, 8);
                world.write(BLOCK, 2);
                world.write(2 * BLOCK, 2);
            },
            |world| {
                world.discard(0, BLOCK);
                world.flush();
                world.write(BLOCK + 1, 3);
            },
            |world| {
                world.read(0, BLOCK);
                world.close();
            },
            World::close,
        ],
        faults: None,
    },
    Program {
        name: "close-units",
        shape: FOUR_BLOCKS_CHILD,
        image: nothing,
        before: nothing,
        threads: &[
            |world| {
                world.write(3, 3);
                world.write(BLOCK, 2);
            },
            |world| {
                world.write(5, 3);
                world.discard(0, 8);
            },
            World::close,
        ],
        faults: None,
    },
    // What a layer holds is copied up, or shared, while a guest writes to the same units, and to blocks that are taken whole in the end.
    Program {
        name: "merge-writes",
        shape: FOUR_BLOCKS_CHILD,
        image: nothing,
        before: |world| world.write(3, 9),
        threads: &[
            World::merge,
            |world| (0..4).for_each(|block| world.write(block * BLOCK + 5, 6)),
            |world| {
                world.flush();
                world.write(2 * BLOCK + 1, 20);
                world.flush();
            },
        ],
        faults: None,
    },
    // Blocks that are discarded meanwhile show nothing of the layers, also when these are gone.
    Program {
        name: "merge-discards",
        shape: FOUR_BLOCKS_CHILD,
        image: nothing,
        before: |world| (0..2).for_each(|block| world.write(block * BLOCK, BLOCK)),
        threads: &[
            |world| {
                world.merge();
                world.flush();
            },
            |world| {
                (0..3).for_each(|block| world.discard(block * BLOCK, BLOCK));
                world.write(BLOCK + 8, 8);
            },
            |world| (0..4).for_each(|block| world.read(block * BLOCK + 6, 12)),
        ],
        faults: None,
    },
    // A fixed disk, whose changes go to its file, gets blocks over it in the middle of them.
    Program {
        name: "snapshot-of-fixed",
        shape: FOUR_BLOCKS_FIXED,
        image: |world| world.write(0, BLOCK),
        before: nothing,
        threads: &[
            |world| {
                world.write(BLOCK, 4);
                world.snapshot("one");
                world.write(2, 2);
                world.read(0, 16);
            },
            |world| (0..6).for_each(|_| world.write(2, 4)),
            |world| {
                world.write(3, 2);
                world.flush();
                world.read(0, 8);
                world.discard(BLOCK, BLOCK);
                world.flush();
            },
        ],
        faults: None,
    },
    // Changes of two threads to one place, in the leaf that was and in the one that comes.
    Program {
        name: "snapshot-writes",
        shape: FOUR_BLOCKS,
        image: |world| world.write(0, BLOCK),
        before: nothing,
        threads: &[
            |world| {
                world.write(BLOCK, 4);
                world.snapshot("one");
                world.write(2, 2);
            },
            |world| (0..6).for_each(|_| world.write(2, 4)),
            |world| {
                world.write(3, 2);
                world.flush();
                world.write(3, 1);
                world.discard(BLOCK, BLOCK);
                world.flush();
            },
        ],
        faults: None,
    },
    // First touches of blocks beneath the leaf, while what was the leaf is folded into the map of the chain.
    Program {
        name: "snapshot-reads",
        shape: FOUR_BLOCKS_CHILD,
        image: nothing,
        before: |world| (0..4).for_each(|block| world.write(block * BLOCK + 3, 9)),
        threads: &[
            |world| {
                world.snapshot("one");
                world.read(0, BLOCK);
            },
            |world| (0..4).for_each(|block| world.read(block * BLOCK, 16)),
            |world| {
                (0..4).for_each(|block| world.write(block * BLOCK + 17, 2));
                world.flush();
            },
        ],
        faults: None,
    },
    // A read that takes long keeps no change waiting, however many leaves come in meanwhile.
    Program {
        name: "snapshot-held-read",
        shape: FOUR_BLOCKS,
        image: fill_all,
        before: nothing,
        threads: &[
            |world| {
                world.wait_for_reader();
                world.snapshot("one");
                world.snapshot("two");
            },
            |world| world.read_held(0, 8),
            |world| {
                world.wait_for_held();
                (0..16).for_each(|_| world.write(BLOCK, BLOCK));
                world.let_go();
            },
        ],
        faults: None,
    },
];

/// The last of the programs, which take snapshots.
const OF_SNAPSHOTS: usize = 3;
/// Nothing else can show these.
const SNAPSHOT_DEFECTS: [Defect; 3] =
    [Defect::ChangesInTwoLeaves, Defect::ReadLockNotRechecked, Defect::FlushOfNamelessLeaf];

/// Runs batches on all cores, numbered from `first` on, until `count` have run or one goes wrong.
fn run(first: u64, count: u64) -> Result<(), Wrong> {
    let next = AtomicU64::new(first);
    let wrong = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                while wrong.lock().unwrap().is_none() {
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    if number >= first + count {
                        break;
                    }
                    if let Err(found) = batch(number, PROGRAMS).run() {
                        *wrong.lock().unwrap() = Some(found);
                    }
                }
            });
        }
    });
    wrong.into_inner().unwrap().map_or(Ok(()), Err)
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn every_schedule_keeps_what_was_flushed() {
    let batches = variable("COWVHD_SCHEDULES").unwrap_or(SCHEDULES).div_ceil(BATCH as u64);
    match run(variable("COWVHD_SEED").unwrap_or(0), batches) {
        Ok(()) => summary::add(&format!(
            "schedules: {} of {} programs, each with a power cut, 0 violations",
            batches * BATCH as u64,
            PROGRAMS.len()
        )),
        Err(wrong) => panic!("{wrong}\nreplay with\n{}", replay_command(None, &wrong)),
    }
}

fn replay_command(defect: Option<Defect>, wrong: &Wrong) -> String {
    let defect = defect.map_or(String::new(), |defect| format!("COWVHD_DEFECT={defect:?} "));
    format!(
        "{defect}COWVHD_REPLAY='{}' cargo test --release --features defects,schedules --test schedules replay -- --exact \
         --nocapture",
        wrong.batch
    )
}

/// Runs schedules under the defect until one of them is wrong.
fn kill(defect: Defect) -> Option<Wrong> {
    defect::seed(Some(defect));
    let first = if SNAPSHOT_DEFECTS.contains(&defect) { PROGRAMS.len() - OF_SNAPSHOTS } else { 0 };
    let programs = &PROGRAMS[first..];
    let killed = (0..BATCHES_OF_DEFECT).find_map(|number| batch(number, programs).run().err());
    defect::seed(None);
    killed
}

#[test]
fn every_defect_of_threads_is_noticed() {
    std::panic::set_hook(Box::new(|_| {}));
    let defects = Defect::OF_THREADS;
    let next = AtomicU64::new(0);
    let survivors = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                while let Some(&defect) = defects.get(next.fetch_add(1, Ordering::SeqCst) as usize) {
                    let description = defect.description();
                    match kill(defect) {
                        Some(wrong) => println!("{defect:?}: {description} killed by {wrong}"),
                        None => {
                            println!("{defect:?}: {description} SURVIVED");
                            survivors.lock().unwrap().push(defect);
                        }
                    }
                }
            });
        }
    });
    let _ = std::panic::take_hook();
    let survivors = survivors.into_inner().unwrap();
    let killed = defects.len() - survivors.len();
    summary::add(&format!("schedules: defects killed {killed} / {} seeded", defects.len()));
    assert!(survivors.is_empty(), "not noticed: {survivors:?}");
}

/// What a failure prints shows the same again.
#[test]
fn a_failure_replays() {
    std::panic::set_hook(Box::new(|_| {}));
    for defect in [Defect::UnitsWithoutOwner, Defect::CloseDoesNotWait] {
        let wrong = kill(defect).expect("the defect is noticed");
        println!("{wrong}\nreplay with\n{}", replay_command(Some(defect), &wrong));
        defect::seed(Some(defect));
        let again = wrong.batch.parse::<Batch>().unwrap().run().unwrap_err();
        defect::seed(None);
        assert_eq!(again.to_string(), wrong.to_string());
    }
    let _ = std::panic::take_hook();
}

/// Runs a batch again: what a failure printed stands in `COWVHD_REPLAY` and `COWVHD_DEFECT`.
#[test]
fn replay() {
    let Ok(text) = std::env::var("COWVHD_REPLAY") else { return };
    let name = std::env::var("COWVHD_DEFECT").unwrap_or_default();
    defect::seed(Defect::OF_THREADS.iter().copied().find(|defect| format!("{defect:?}") == name));
    let result = text.parse::<Batch>().unwrap().run();
    defect::seed(None);
    match result {
        Ok(()) => println!("{text}: no violation"),
        Err(wrong) => panic!("{wrong}"),
    }
}
