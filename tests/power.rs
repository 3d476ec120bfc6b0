//! The simulator's power: every seeded defect must be noticed, or the silence of `crash_states` means nothing.

#![cfg(feature = "defects")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/campaign.rs"]
#[allow(dead_code, reason = "shared with the search for states")]
mod campaign;
#[path = "support/chain_ops.rs"]
#[allow(dead_code, reason = "shared with the other tests of chains")]
mod chain_ops;
#[path = "support/checkpoints.rs"]
#[allow(dead_code, reason = "shared with the test of checkpoints")]
mod checkpoints;
#[path = "support/crash.rs"]
#[allow(dead_code, reason = "shared with the other tests of crashes")]
mod crash;
#[path = "support/failing.rs"]
mod failing;
#[path = "support/groups.rs"]
mod groups;
#[path = "support/snapshots.rs"]
#[allow(dead_code, reason = "shared with the test of snapshots")]
mod snapshots;
#[path = "support/strict_vhd.rs"]
mod strict_vhd;
#[path = "support/summary.rs"]
mod summary;
#[path = "support/turned_back.rs"]
#[allow(dead_code, reason = "shared with the test of cookies that are turned back")]
mod turned_back;

use campaign::{Case, PLANS, Weather, Wrong};
use cowvhd::defect::{self, Defect};
use cowvhd::sim::{Bounds, History, SimVfs};
use cowvhd::vfs::Vfs;
use cowvhd::{CreateOptions, OpenOptions};
use crash::{ALIGNED, Explorer, FOREIGN_CHILD, PATH, Segment, Workload, create};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// At most so many workloads are tried for one defect.
const SEEDS: u64 = 240;

/// What has noticed a defect that others rarely do, and is tried first: a workload, or the seed of an operation. When it no longer
/// does, the search finds another one; then that belongs here.
const KNOWN: &[(Defect, &str)] = &[
    (Defect::ReuseBeforePunchIsDurable, "packed-busy:9"),
    (Defect::RecoveryKeepsTail, "small-faulty:16"),
    (Defect::SpaceByMemoryTails, "child:32"),
    (Defect::FailedFlushForgetsData, "packed-faulty:30"),
    (Defect::FailedWriteTakesSlot, "small-faulty:88"),
    (Defect::RecoveryWithoutImages, "packed-busy:9"),
    (Defect::CloseCookieFirst, "wide-busy:3"),
    (Defect::CloseWithoutSync, "wide-busy:3"),
    (Defect::LeaveBeforeTable, "packed:8"),
    (Defect::JournalOverLeftover, "packed-busy:45"),
    (Defect::MarkBeforeJournal, "packed:8"),
    (Defect::FirstPageNotKept, "packed-faulty:10"),
    (Defect::UpgradeWithoutSync, "packed:8"),
    (Defect::JournalOutlivesUpgrade, "foreign-child:104"),
    (Defect::NoCopyUp, "child:4"),
    (Defect::BitsNotJournaled, "child:4"),
    (Defect::ZerosDoNotHide, "child:4"),
    (Defect::DiscardShowsParent, "child:4"),
    (Defect::BitmapWithoutImage, "child-busy:5"),
    (Defect::MergeForgetsShortLayers, "12"),
    (Defect::MergeLetsBlocksGo, "55"),
];

fn known(defect: Defect) -> Option<&'static str> {
    KNOWN.iter().find(|(known, _)| *known == defect).map(|&(_, first)| first)
}

/// Workloads that may show a defect: those on disks with a journal.
fn cases(defect: Defect) -> impl Iterator<Item = Case> {
    let first = known(defect).map(|case| case.parse().expect("a workload"));
    // Nothing else can show what a failure leaves behind.
    let faulty = matches!(
        defect,
        Defect::FailedFlushForgetsData
            | Defect::FailedWriteTakesSlot
            | Defect::FailedWriteStaysMapped
            | Defect::SoiledSlotIsReused
    );
    let plans: Vec<_> = PLANS
        .iter()
        .filter(|(_, shape, weather, _)| !shape.fixed && (!faulty || *weather == Weather::Faulty))
        .collect();
    let others = (0..SEEDS).map(move |seed| Case { plan: plans[(seed % plans.len() as u64) as usize], seed });
    first.into_iter().chain(others)
}

/// Defects of snapshots, which other workloads do not take.
const OF_SNAPSHOTS: [Defect; 8] = [
    Defect::FixedChildNotNoted,
    Defect::FixedChildGoesFirst,
    Defect::FixedStaysWritable,
    Defect::NameNotDurable,
    Defect::ChildNotAside,
    Defect::RenameBeforeLink,
    Defect::CommitBeforeSeal,
    Defect::SealFromCache,
];

/// Takes snapshots under the defect until a state is judged wrong; says what is.
fn kill_snapshot(defect: Defect) -> Option<String> {
    defect::seed(Some(defect));
    let of_fixed = format!("{defect:?}").starts_with("Fixed");
    let stages = || snapshots::stages().filter(|(root, _)| !of_fixed || *root == snapshots::Root::Fixed);
    let cut = || stages().find_map(|stage| snapshots::cut_anywhere(stage, 24).err());
    let kill = || stages().find_map(|stage| snapshots::kill_anywhere(stage, 8).err());
    let killed = kill().or_else(cut);
    defect::seed(None);
    killed
}

/// Defects of checkpoints.
const OF_CHECKPOINTS: [Defect; 7] = [
    Defect::ExchangeWithoutManifest,
    Defect::ExchangeBeforeManifest,
    Defect::ManifestNameNotDurable,
    Defect::ManifestNotSynced,
    Defect::StateNotNoted,
    Defect::UnlinkBeforeUnseal,
    Defect::BlobNotSynced,
];

/// The same with checkpoints of two disks and of one.
fn kill_checkpoint(defect: Defect) -> Option<String> {
    defect::seed(Some(defect));
    let killed = [2, 1].into_iter().find_map(|disks| checkpoints::cut_anywhere(disks, 24).err());
    defect::seed(None);
    killed
}

/// Defects of checkpoints whose disks are open in several processes.
const OF_GROUPS: [Defect; 3] =
    [Defect::UndecidedCheckpoint, Defect::CommitFromCache, Defect::CommitBeforeDurableSeals];

/// The same with processes that end in the middle.
fn kill_group(defect: Defect) -> Option<String> {
    defect::seed(Some(defect));
    let killed = groups::end_anywhere(6).err();
    defect::seed(None);
    killed
}

/// Runs workloads under the defect until one of them is judged wrong.
fn kill(defect: Defect) -> Option<Wrong> {
    defect::seed(Some(defect));
    let killed = cases(defect).find_map(|case| case.explore(&Bounds::sample(30)).err());
    defect::seed(None);
    killed
}

/// An operation on a chain, by its seed, with the states that a crash in it may leave.
type ChainOperation = fn(u64, &Bounds) -> Result<u64, String>;

/// New blocks, some of which are discarded: every write succeeds, and no slot is handed out that somebody has. What the blocks
/// hold is not looked at: the guards are to notice by themselves.
fn new_blocks(seed: u64, _: &Bounds) -> Result<u64, String> {
    let vfs: Arc<dyn Vfs> = Arc::new(SimVfs::new(seed));
    let (path, block) = (Path::new("/vm.vhd"), 64 << 10);
    let create = CreateOptions::new(64 * block).vfs(Arc::clone(&vfs));
    create.test_geometry(block as u32, 128 << 10).create(path).unwrap();
    let disk = OpenOptions::new().vfs(vfs).open(path).unwrap();
    for number in 0..64 {
        disk.write_at(&[1; 4096], (number * 5 + seed) % 64 * block).map_err(|error| error.to_string())?;
        if number % 7 == 6 {
            disk.discard((number * 5 + seed) % 64 * block, block).unwrap();
            disk.flush().unwrap();
        }
    }
    disk.close().map(|()| 1).map_err(|error| error.to_string())
}

/// Recoveries of an image made elsewhere whose first page was spoiled.
fn lost_start(seed: u64, _: &Bounds) -> Result<u64, String> {
    let mut workload = Workload::new(ALIGNED, seed, false);
    workload.run(4);
    let mut explorer = Explorer::new(ALIGNED);
    explorer.explore_lost_starts(&workload.finish(), seed, 16).map(|()| explorer.states)
}

/// An upgrade of a differencing image that another program made.
fn upgraded_child(seed: u64, bounds: &Bounds) -> Result<u64, String> {
    let vfs = SimVfs::new(seed);
    let mut history = History::default();
    create(&vfs, FOREIGN_CHILD, seed, &mut history);
    vfs.record(true);
    cowvhd::upgrade(Arc::new(vfs.clone()), Path::new(PATH)).map_err(|error| error.to_string())?;
    let points = vfs.take_crash_points();
    let mut explorer = Explorer::new(FOREIGN_CHILD);
    let explored = explorer.explore(&[Segment { history, points }], seed, bounds);
    explored.map(|()| explorer.states).map_err(|failure| failure.to_string())
}

/// The operation on a chain that a defect is in, if it is in one.
fn chain_operation(defect: Defect) -> Option<ChainOperation> {
    match defect {
        Defect::RepointBeforeLocators | Defect::RepointCopiesAtOnce => Some(chain_ops::relinked),
        Defect::RepointWithoutImages => Some(chain_ops::torn_header),
        Defect::RepointWithoutFlush => Some(chain_ops::rebased),
        Defect::MergeLetsBlocksGo | Defect::MergeTakesPartialBlocks => Some(chain_ops::merged_running),
        Defect::OpenLayerHasNoEnd => Some(chain_ops::deleted_running),
        Defect::LiveSlotIsHandedOut | Defect::GuestWritesToMetadata => Some(new_blocks),
        Defect::HeadersBeforeFirstPage => Some(lost_start),
        Defect::UpgradeKeepsLocators => Some(upgraded_child),
        Defect::TurnedBackCookieCounts | Defect::ReplayOverOthers => Some(turned_back::turned_back),
        Defect::MergeForgetsShortLayers | Defect::MergeOverwrites | Defect::MergeSharesUnitsInPart => {
            Some(chain_ops::merged)
        }
        _ => None,
    }
}

/// Runs the operation under the defect until a state is judged wrong. A panic counts.
fn kill_operation(defect: Defect, operation: ChainOperation) -> Option<String> {
    // What is wrong without a crash, but in few chains, wants many of these rather than many states.
    let few = [
        Defect::MergeForgetsShortLayers,
        Defect::MergeLetsBlocksGo,
        Defect::MergeSharesUnitsInPart,
        Defect::MergeTakesPartialBlocks,
        Defect::OpenLayerHasNoEnd,
    ]
    .contains(&defect);
    let states = if few { 1 } else { 120 };
    let run = |seed| {
        defect::seed(Some(defect));
        let result = std::panic::catch_unwind(|| operation(seed, &Bounds::sample(states)));
        defect::seed(None);
        result.unwrap_or_else(|_| Err("a panic".into())).err().map(|what| format!("seed {seed}: {what}"))
    };
    let first = known(defect).map(|seed| seed.parse().expect("a seed"));
    first.into_iter().chain(0..SEEDS).find_map(run)
}

/// Runs what shows the defect, if anything does.
fn kill_in_its_place(defect: Defect) -> Option<String> {
    match chain_operation(defect) {
        Some(operation) => kill_operation(defect, operation),
        None if OF_SNAPSHOTS.contains(&defect) => kill_snapshot(defect),
        None if OF_CHECKPOINTS.contains(&defect) => kill_checkpoint(defect),
        None if OF_GROUPS.contains(&defect) => kill_group(defect),
        None => kill(defect).map(|wrong| wrong.to_string()),
    }
}

/// The command that shows again what was found.
fn replay_command(defect: Defect, wrong: &Wrong) -> String {
    format!(
        "COWVHD_DEFECT={defect:?} COWVHD_REPLAY='{}' cargo test --release --features defects --test power replay -- --exact",
        wrong.replay()
    )
}

fn report(defect: Defect, killed: &Option<String>, since: Instant) {
    let verdict = match killed {
        Some(wrong) => format!("killed by {wrong}"),
        None => "SURVIVED all workloads".into(),
    };
    println!("{defect:?}: {} {verdict} ({:.1} s)", defect.description(), since.elapsed().as_secs_f32());
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
                    let since = Instant::now();
                    let killed = kill_in_its_place(defect);
                    report(defect, &killed, since);
                    results.lock().unwrap().push((defect, killed.is_some()));
                }
            });
        }
    });
    let _ = std::panic::take_hook();
    let results = results.into_inner().unwrap();
    let survivors: Vec<_> = results.iter().filter(|(_, killed)| !killed).map(|(d, _)| d).collect();
    let killed = results.len() - survivors.len();
    summary::add(&format!("power: defects killed {killed} / {} seeded", results.len()));
    assert!(survivors.is_empty(), "not noticed: {survivors:?}");
}

/// Some defects alone: `COWVHD_DEFECT` is what their names contain.
#[test]
#[ignore = "a shorter way to a few of them: every_seeded_defect_is_noticed has them all"]
fn some_defects_are_noticed() {
    let name = std::env::var("COWVHD_DEFECT").unwrap_or_default();
    for &defect in Defect::ALL.iter().filter(|defect| format!("{defect:?}").contains(&name)) {
        let since = Instant::now();
        let killed = kill_in_its_place(defect);
        report(defect, &killed, since);
        assert!(killed.is_some(), "not noticed: {defect:?}");
    }
}

/// What a failure prints shows exactly that state again, in another process.
#[test]
fn a_failure_replays() {
    for defect in [Defect::FlushWithoutSync, Defect::RecoveryWithoutSync, Defect::FailedWriteStaysMapped] {
        let wrong = kill(defect).expect("the defect is noticed");
        assert!(wrong.path.is_some(), "a state is at fault");
        println!("{wrong}\nreplay with\n{}", replay_command(defect, &wrong));
        let replay = |defect: &str, state: &str| {
            let run = Command::new(std::env::current_exe().unwrap())
                .args(["replay", "--exact", "--nocapture"])
                .env("COWVHD_DEFECT", defect)
                .env("COWVHD_REPLAY", state)
                .output()
                .unwrap();
            String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr)
        };
        let said = replay(&format!("{defect:?}"), &wrong.replay());
        assert!(said.contains(&wrong.to_string()), "expected '{wrong}', the replay says: {said}");
    }
}

/// Judges one state again: what a failure printed stands in `COWVHD_DEFECT` and `COWVHD_REPLAY`.
#[test]
fn replay() {
    let Ok(state) = std::env::var("COWVHD_REPLAY") else { return };
    let name = std::env::var("COWVHD_DEFECT").unwrap_or_default();
    let defect = Defect::ALL.iter().copied().find(|defect| format!("{defect:?}") == name);
    defect::seed(defect);
    let result = campaign::replay(&state);
    defect::seed(None);
    match result {
        Ok(()) => println!("{state}: no violation"),
        Err(wrong) => panic!("{wrong}"),
    }
}
