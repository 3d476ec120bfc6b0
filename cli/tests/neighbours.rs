//! The same guests on QEMU's formats and on ours, with the power cut: what each disk shows afterwards.
//!
//! QEMU's writes to its image are logged by its `blklogwrites` driver, ours by a `Vfs`; from either log states of the file
//! are made that a power cut may leave, and each state is opened by the program that made it. What it shows is compared with
//! what had been flushed. `scripts/neighbours` prints the table of docs/crash-safety.md; as a test only a sample is made, in
//! which ours must be right every time.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../src/sim/history.rs"]
#[allow(dead_code, reason = "the simulator's own judge; a part of it is used here")]
mod history;
#[path = "neighbours/medium.rs"]
mod medium;
#[path = "../../export/tests/nbd/raw.rs"]
#[allow(dead_code, reason = "a part of it is used here")]
mod raw;
#[path = "neighbours/subject.rs"]
mod subject;
mod support;
#[path = "neighbours/workload.rs"]
mod workload;

use medium::Medium;
use subject::Subject;
use support::random::{Random, seed};
use workload::{Guest, Verdict, Workload};

/// Writes to the file that are failed in turn.
const NO_SPACE_AT: std::ops::RangeInclusive<u64> = 1..=12;

/// States of each disk under each guest: a few, or as `COWVHD_TEST_STATES` says.
fn limit() -> usize {
    match std::env::var("COWVHD_TEST_STATES") {
        Ok(text) => text.parse().expect("COWVHD_TEST_STATES is a number"),
        Err(_) => 8,
    }
}

/// A row of the table.
#[derive(Default)]
struct Row {
    states: u64,
    unopenable: u64,
    lost: u64,
    foreign: u64,
    /// States that a kill leaves while the power stays on.
    kills: u64,
    wrong_kills: u64,
    errors: u64,
    example: Option<String>,
}

impl Row {
    fn count(&mut self, result: Result<Verdict, String>, killed: bool) {
        self.states += 1;
        self.kills += u64::from(killed);
        let right = result == Ok(Verdict::Right);
        self.wrong_kills += u64::from(killed && !right);
        let (counter, example) = match result {
            Ok(Verdict::Right) => return,
            Ok(Verdict::Lost(what)) => (&mut self.lost, what),
            Ok(Verdict::Foreign(what)) => (&mut self.foreign, what),
            Err(what) => (&mut self.unopenable, what),
        };
        *counter += 1;
        self.example.get_or_insert(example);
    }
}

fn explore(subject: Subject, workload: Workload, limit: usize, random: &mut Random) -> Row {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    // Syncs cost nothing in memory, and mean nothing for a state.
    let states_dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let mut row = Row::default();
    let runs: Vec<Option<u64>> = match workload {
        Workload::NoSpace => NO_SPACE_AT.map(Some).collect(),
        _ => vec![None],
    };
    let share = limit.div_ceil(runs.len());
    for no_space in runs {
        let _ = std::fs::remove_file(&image);
        subject.create(&image);
        let before = Medium::load(&image);
        let mut record = None;
        let log = subject.record(&image, no_space, |socket, position| {
            let mut guest = Guest::connect(socket, position);
            workload.run(&mut guest, random);
            record = Some(guest.into_record());
        });
        let record = record.unwrap();
        row.errors += record.errors;
        let final_length = std::fs::metadata(&image).unwrap().len();
        let killed = log.killed();
        let states = log.states(&record.acknowledged, share.saturating_sub(1), random);
        for state in std::iter::once(&killed).chain(&states) {
            let mut medium = log.medium(&before, state);
            let read = subject.read_back(&mut medium, final_length, states_dir.path());
            row.count(read.map(|content| record.judge(state.position, &content)), state.is_kill());
        }
    }
    row
}

#[test]
fn neighbours_and_we_after_power_cuts() {
    let seed = seed("neighbours");
    let mut random = Random::new(seed);
    let limit = limit();
    let mut table = String::from(
        "| guest | disk | states | cannot be opened | flushed data lost | other data shown | wrong after a kill |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for workload in Workload::ALL {
        for subject in Subject::ALL {
            let row = explore(subject, workload, limit, &mut random);
            let Row { states, unopenable, lost, foreign, kills, wrong_kills, errors, .. } = row;
            let (guest, disk) = (workload.name(), subject.name());
            table += &format!(
                "| {guest} | {disk} | {states} | {unopenable} | {lost} | {foreign} | {wrong_kills} of {kills} |\n"
            );
            if let Some(example) = row.example {
                println!("{guest}, {disk}: e.g. {example}");
            }
            if errors > 0 {
                println!("{guest}, {disk}: {errors} requests failed");
            }
            if subject == Subject::Cowvhd {
                assert_eq!(unopenable + lost + foreign, 0, "{guest}: ours is wrong");
            }
        }
    }
    println!("{table}");
}
