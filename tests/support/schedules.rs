//! Small programs of a few threads on one disk, each run under many schedules, on the simulated medium.
//!
//! shuttle decides at every lock, atomic and operation of the medium which thread runs on. Four kinds of schedules: any
//! thread at each point; the same thread as a rule, another now and then; the same, with one thread that is held up for long soon after
//! it began; by priorities that change at few points (PCT).
//! What is checked: each read while it runs, the disk when all threads are done, and one state that a power cut during or after the
//! program may leave, by all oracles of `crash.rs`.

use crate::crash::{Explorer, PATH, SECTOR, Shape, check_content, create, read_hot};
use cowvhd::check::{Severity, check};
use cowvhd::sim::{Bounds, CrashPoint, CrashState, FaultPlan, History, Rng, SimVfs, Underway};
use cowvhd::snapshot::{SnapshotName, merge_running};
use cowvhd::{Disk, ErrorKind, OpenOptions, Result};
use shuttle::scheduler::{PctScheduler, Schedule, Scheduler, Task, TaskId};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};
use std::fmt;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// One thread of a program.
pub type Thread = fn(&World);

/// A program, and the disk it starts with.
pub struct Program {
    pub name: &'static str,
    pub shape: Shape,
    /// Fills the disk, once; it is closed then.
    pub image: Thread,
    /// Runs before the threads, in every schedule.
    pub before: Thread,
    pub threads: &'static [Thread],
    /// Operations that fail while the threads run. Requests may then fail; without, only after a close.
    pub faults: Option<fn(&mut Rng) -> FaultPlan>,
}

/// What the threads of one schedule share.
pub struct World {
    vfs: SimVfs,
    disk: Disk,
    history: Mutex<History>,
    wrong: Mutex<Vec<String>>,
    faults: bool,
    closed: Mutex<bool>,
    snapshots: Mutex<Vec<Snapshot>>,
    held: Arc<Held>,
}

/// A snapshot that was acknowledged.
#[derive(Debug, Clone)]
struct Snapshot {
    path: PathBuf,
    called: u64,
    returned: u64,
}

/// A read that begins when a snapshot is about to end, and is held in the middle of its first operation on the medium until others are done.
#[derive(Debug, Default)]
struct Held {
    state: shuttle::sync::Mutex<HeldState>,
    changed: shuttle::sync::Condvar,
}

#[derive(Debug, Default)]
struct HeldState {
    /// The thread whose read it is.
    reader: Option<usize>,
    /// Of the child's name, and of the exchange of names: then changes go into the child, and the end of the snapshot is near.
    directory_syncs: usize,
    is_held: bool,
    may_go: bool,
}

impl Held {
    fn change(&self, change: impl FnOnce(&mut HeldState)) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }

    fn wait(&self, until: impl Fn(&HeldState) -> bool) {
        let mut state = self.state.lock().unwrap();
        while !until(&state) {
            state = self.changed.wait(state).unwrap();
        }
    }

    /// In the middle of an operation of the medium.
    fn hook(&self, underway: Underway) {
        match underway {
            Underway::DirectorySync => self.change(|state| state.directory_syncs += 1),
            Underway::Read => {
                let mut holds = false;
                self.change(|state| {
                    holds =
                        !state.is_held && state.directory_syncs >= 2 && state.reader == Some(this_thread());
                    state.is_held |= holds;
                });
                if holds {
                    self.wait(|state| state.may_go);
                }
            }
            _ => {}
        }
    }
}

fn this_thread() -> usize {
    shuttle::current::me().into()
}

impl World {
    fn new(vfs: SimVfs, shape: Shape, history: History, faults: bool) -> Self {
        let options = OpenOptions::new().test_geometry(shape.block_bytes, shape.ring_bytes);
        let disk = options.vfs(Arc::new(vfs.clone())).open(Path::new(PATH)).unwrap();
        let (history, wrong) = (Mutex::new(history), Mutex::default());
        let (snapshots, held) = Default::default();
        World { vfs, disk, history, wrong, faults, closed: Mutex::new(false), snapshots, held }
    }

    /// Takes a snapshot, beside whatever runs.
    pub fn snapshot(&self, name: &str) {
        let called = self.vfs.tick();
        match self.disk.snapshot(&SnapshotName::new(name).unwrap()) {
            Ok(path) => {
                let returned = self.vfs.tick();
                self.snapshots.lock().unwrap().push(Snapshot { path, called, returned });
            }
            Err(error) => self.failed("a snapshot", error),
        }
    }

    /// Merges all layers into the disk, beside whatever runs.
    pub fn merge(&self) {
        if let Err(error) = merge_running(&self.disk, None, &mut |_| ControlFlow::Continue(())) {
            self.failed("a merge", error);
        }
    }

    /// Waits until a snapshot is about to end; then reads, and stays in the middle of that until somebody calls [`World::let_go`].
    pub fn read_held(&self, first: u64, count: u64) {
        let held = Arc::clone(&self.held);
        self.vfs.set_hook(Some(Box::new(move |underway| held.hook(underway))));
        self.held.change(|state| state.reader = Some(this_thread()));
        self.held.wait(|state| state.directory_syncs >= 2);
        self.read(first, count);
        self.vfs.set_hook(None);
    }

    /// Waits until somebody is about to call [`World::read_held`].
    pub fn wait_for_reader(&self) {
        self.held.wait(|state| state.reader.is_some());
    }

    /// Waits until that read is held.
    pub fn wait_for_held(&self) {
        self.held.wait(|state| state.is_held);
    }

    /// Lets the read that is held go on.
    pub fn let_go(&self) {
        self.held.change(|state| state.may_go = true);
    }

    fn wrong(&self, what: String) {
        self.wrong.lock().unwrap().push(what);
    }

    /// What a request may fail of.
    fn failed(&self, what: &str, error: cowvhd::Error) {
        let closed = *self.closed.lock().unwrap() && error.kind() == ErrorKind::InvalidInput;
        if !self.faults && !closed {
            self.wrong(format!("{what} failed without reason: {error}"));
        }
    }

    fn request(&self, what: &str, first: u64, count: u64, value: u64, call: impl FnOnce() -> Result<()>) {
        let submitted = self.history.lock().unwrap().submit(self.vfs.tick(), first, count, value);
        match call() {
            Ok(()) => self.history.lock().unwrap().completed(submitted, self.vfs.tick(), first, count),
            Err(error) => self.failed(what, error),
        }
    }

    /// Writes a new value to `count` sectors from `first` on.
    pub fn write(&self, first: u64, count: u64) {
        let value = self.history.lock().unwrap().new_value();
        let mut buf = vec![0; (count * SECTOR) as usize];
        History::fill(value, &mut buf);
        self.request("a write", first, count, value, || self.disk.write_at(&buf, first * SECTOR));
    }

    pub fn discard(&self, first: u64, count: u64) {
        self.request("a discard", first, count, 0, || self.disk.discard(first * SECTOR, count * SECTOR));
    }

    /// Reads, and looks whether what is read may be there.
    pub fn read(&self, first: u64, count: u64) {
        let called = self.vfs.tick();
        let mut buf = vec![0xee; (count * SECTOR) as usize];
        match self.disk.read_at(&mut buf, first * SECTOR) {
            Ok(()) => {
                let returned = self.vfs.tick();
                if let Err(violation) = self.history.lock().unwrap().check_read(called, returned, first, &buf)
                {
                    self.wrong(format!("O7: a read: {violation}"));
                }
            }
            Err(error) => self.failed("a read", error),
        }
    }

    pub fn flush(&self) {
        let called = self.vfs.tick();
        let result = self.disk.flush();
        let mut history = self.history.lock().unwrap();
        match result {
            Ok(()) => history.flushed(called, self.vfs.tick()),
            Err(error) => {
                // A disk that goes on still owes all of it to the next flush.
                if matches!(self.disk.discard(0, 0), Err(error) if error.kind() == ErrorKind::Poisoned) {
                    history.flush_failed(self.vfs.tick());
                }
                drop(history);
                self.failed("a flush", error);
            }
        }
    }

    /// Closes the disk: what was written by anybody who was told so is in the file, and everything later fails.
    pub fn close(&self) {
        *self.closed.lock().unwrap() = true;
        let result = self.disk.close();
        if let Err(error) = result {
            self.failed("a close", error);
        } else if self.disk.write_at(&[0; 512], 0).is_ok() {
            self.wrong("a write after the close succeeds".into());
        }
    }

    /// When the threads are done: what the disk shows, and what a power cut may have left.
    fn judge(&self, shape: Shape, rng: &mut Rng) {
        let history = self.history.lock().unwrap().clone();
        let closed = *self.closed.lock().unwrap();
        if !closed && !self.faults {
            for (first, content) in read_hot(&self.disk, shape).unwrap() {
                if let Err(violation) = history.check_current(first, &content) {
                    self.wrong(format!("O2: {violation}"));
                }
            }
        }
        let mut points: Vec<CrashPoint> = self.vfs.take_crash_points();
        points.push(self.vfs.crash_now());
        let number = match rng.one_in(2) {
            true => points.len() - 1,
            false => rng.below(points.len() as u64) as usize,
        };
        let snapshots = self.snapshots.lock().unwrap().clone();
        for snapshot in &snapshots {
            if let Err(what) = snapshot.judge(&self.vfs, shape, &history) {
                self.wrong(what);
            }
        }
        if let Some(state) = any_state(&points[number], rng) {
            let fates = state.fates().to_string();
            let clock = points[number].clock();
            let judged = match snapshots.is_empty() {
                true => Explorer::new(shape).judge_one(&history, clock, state),
                false => judge_chain(&snapshots, shape, &history, clock, &state),
            };
            if let Err(what) = judged {
                self.wrong(format!("{what} (crash point {number}: {fates})"));
            }
        }
        if closed && !self.faults {
            self.judge_closed(shape, &history);
        }
    }

    /// A closed file holds every write that succeeded, whenever that was.
    fn judge_closed(&self, shape: Shape, history: &History) {
        let mut history = history.clone();
        let now = self.vfs.tick();
        history.flushed(now, now);
        let kept = self.vfs.crash_now();
        if kept.pending() > 0 {
            self.wrong(format!("{} changes are pending after a close", kept.pending()));
        }
        let disk = OpenOptions::new().read_only(true).vfs(Arc::new(self.vfs.clone())).open(Path::new(PATH));
        match disk {
            Ok(disk) => {
                self.disk
                    .notices()
                    .iter()
                    .chain(&disk.notices())
                    .for_each(|notice| self.wrong(notice.clone()));
                let parts = read_hot(&disk, shape).unwrap();
                if let Err(what) = check_content(&history, self.vfs.tick(), &parts, false) {
                    self.wrong(format!("after the close: {what}"));
                }
            }
            Err(error) => self.wrong(format!("after the close: {error}")),
        }
    }
}

impl Snapshot {
    /// It holds what the disk held at moments of the call.
    fn judge(&self, vfs: &SimVfs, shape: Shape, history: &History) -> std::result::Result<(), String> {
        let name = self.path.display();
        let options = OpenOptions::new().read_only(true).vfs(Arc::new(vfs.clone()));
        let disk = options.open(&self.path).map_err(|error| format!("O8: snapshot {name}: {error}"))?;
        for (first, content) in read_hot(&disk, shape).map_err(|error| format!("O8: {name}: {error}"))? {
            history
                .check_read(self.called, self.returned, first, &content)
                .map_err(|violation| format!("O8: snapshot {name}: {violation}"))?;
        }
        Ok(())
    }
}

/// Judges what a power cut has left of a disk with snapshots: it opens with all that was flushed, and those that were acknowledged are there.
fn judge_chain(
    snapshots: &[Snapshot],
    shape: Shape,
    history: &History,
    clock: u64,
    state: &CrashState,
) -> std::result::Result<(), String> {
    let vfs = state.to_vfs(state.hash);
    let options = OpenOptions::new().vfs(Arc::new(vfs.clone()));
    let found = check(Arc::new(vfs.clone()), Path::new(PATH)).map_err(|error| format!("O4: {error}"))?;
    if found.worst() > Some(Severity::Risk) {
        return Err(format!("O4: {:?}", found.findings()));
    }
    for read_only in [true, false] {
        let disk = options.clone().read_only(read_only).open(Path::new(PATH));
        let disk = disk.map_err(|error| format!("O1: read-only {read_only}: {error}"))?;
        let parts = read_hot(&disk, shape).map_err(|error| format!("O2: reading: {error}"))?;
        check_content(history, clock, &parts, state.garbage)?;
        disk.close().map_err(|error| format!("O1: closing: {error}"))?;
    }
    let mut acknowledged = snapshots.iter().filter(|snapshot| snapshot.returned <= clock);
    acknowledged.try_for_each(|snapshot| snapshot.judge(&vfs, shape, history))
}

/// One of the states of a crash point.
fn any_state(point: &CrashPoint, rng: &mut Rng) -> Option<CrashState> {
    let mut skip = rng.below(16);
    let mut chosen = None;
    point.for_each_state(rng.next_u64(), &Bounds::sample(16), |state| {
        chosen = Some(state);
        skip = skip.saturating_sub(1);
        skip > 0
    });
    chosen
}

/// How the next thread is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Any thread, at every point.
    Any,
    /// The same one again, and at one point in eight any.
    Runs,
    /// By priorities, two of which change.
    Pct,
    /// As in `Runs`; one thread does not get on from one of its first points, for long.
    HeldUp,
}

const KINDS: [(Kind, &str); 4] =
    [(Kind::Any, "any"), (Kind::Runs, "runs"), (Kind::Pct, "pct"), (Kind::HeldUp, "held-up")];

/// Schedules that belong to one seed.
pub const BATCH: usize = 50;

/// A batch of schedules of one program. As text, such as `flush-allocation:pct:7`, it replays.
#[derive(Clone, Copy)]
pub struct Batch {
    pub program: &'static Program,
    pub kind: Kind,
    pub seed: u64,
}

impl fmt::Display for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = KINDS.iter().find(|(kind, _)| *kind == self.kind).unwrap().1;
        write!(f, "{}:{name}:{}", self.program.name, self.seed)
    }
}

impl FromStr for Batch {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parse = || {
            let mut parts = text.split(':');
            let name = parts.next()?;
            let program = crate::PROGRAMS.iter().find(|program| program.name == name)?;
            let kind = parts.next()?;
            let kind = KINDS.iter().find(|(_, name)| *name == kind)?.0;
            Some(Batch { program, kind, seed: parts.next()?.parse().ok()? })
        };
        parse().ok_or_else(|| {
            format!("'{text}' is no batch of schedules: expected such as flush-allocation:pct:7")
        })
    }
}

/// Every number below [`u64::MAX`], each batch another: programs and kinds in turn.
pub fn batch(number: u64, programs: &'static [Program]) -> Batch {
    let count = programs.len() as u64;
    let program = &programs[(number % count) as usize];
    let kind = KINDS[(number / count % KINDS.len() as u64) as usize].0;
    Batch { program, kind, seed: number }
}

/// A schedule that went wrong.
#[derive(Debug, Clone)]
pub struct Wrong {
    /// What [`Batch`] replays.
    pub batch: String,
    pub what: String,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.batch, self.what)
    }
}

/// The disk a program starts with.
#[derive(Debug)]
struct Start {
    state: CrashState,
    history: History,
}

impl Batch {
    /// Runs all schedules of the batch, or up to one that goes wrong; how many points with a choice there were.
    pub fn run(&self) -> std::result::Result<(), Wrong> {
        let Batch { program, kind, seed } = *self;
        let number = Arc::new(AtomicU64::new(0));
        let of_schedule = Arc::clone(&number);
        let start = Arc::new(Mutex::new(None));
        let result = catch_unwind(AssertUnwindSafe(|| {
            let made = Arc::clone(&start);
            Runner::new(Walk::new(seed, 0, 1), config())
                .run(move || *made.lock().unwrap() = Some(prepare(program)));
            let start = start.lock().unwrap().take().unwrap();
            let run = move || {
                let number = of_schedule.fetch_add(1, Ordering::SeqCst);
                run_once(program, &start, &mut Rng::new(seed ^ number << 32));
            };
            match kind {
                Kind::Any => Runner::new(Walk::new(seed, 1, BATCH), config()).run(run),
                Kind::Runs => Runner::new(Walk::new(seed, 8, BATCH), config()).run(run),
                Kind::HeldUp => Runner::new(Walk::holding_up(seed, 8, BATCH), config()).run(run),
                Kind::Pct => Runner::new(PctScheduler::new_from_seed(seed, 3, BATCH), config()).run(run),
            }
        }));
        result.map(drop).map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            let number = number.load(Ordering::SeqCst);
            Wrong {
                batch: self.to_string(),
                what: format!("schedule {number}: {}", text.unwrap_or_default()),
            }
        })
    }
}

fn config() -> Config {
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    config.silence_warnings = true;
    config.failure_persistence = FailurePersistence::None;
    config.max_steps = MaxSteps::FailAfter(1_000_000);
    config.ungraceful_shutdown_config.immediately_return_on_panic = true;
    config
}

fn prepare(program: &Program) -> Start {
    let vfs = SimVfs::new(1);
    let mut history = History::default();
    create(&vfs, program.shape, 1, &mut history);
    let world = World::new(vfs, program.shape, history, false);
    (program.image)(&world);
    let content = read_hot(&world.disk, program.shape).unwrap();
    world.disk.close().unwrap();
    let mut history = world.history.lock().unwrap().clone();
    history.restart();
    content.iter().for_each(|(first, bytes)| history.continue_from(*first, bytes));
    let mut last = None;
    world.vfs.crash_now().for_each_state(1, &Bounds::full(), |state| {
        last = Some(state);
        false
    });
    assert!(world.wrong.lock().unwrap().is_empty());
    Start { state: last.unwrap(), history }
}

fn run_once(program: &'static Program, start: &Start, rng: &mut Rng) {
    let vfs = start.state.to_vfs(rng.next_u64());
    let world = World::new(vfs.clone(), program.shape, start.history.clone(), program.faults.is_some());
    (program.before)(&world);
    vfs.record(true);
    if let Some(faults) = program.faults {
        vfs.set_faults(faults(rng));
    }
    let world = Arc::new(world);
    let threads: Vec<_> = program
        .threads
        .iter()
        .map(|thread| {
            let world = Arc::clone(&world);
            shuttle::thread::spawn(move || thread(&world))
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    vfs.set_faults(FaultPlan::default());
    world.judge(program.shape, rng);
    let wrong = world.wrong.lock().unwrap().join("; ");
    assert!(wrong.is_empty(), "{wrong}");
}

/// Stays with a thread as long as it can, and lets any go on at one point in `choice` (never for 0).
#[derive(Debug)]
struct Walk {
    rng: Rng,
    choice: u64,
    left: usize,
    /// Whether in each schedule one thread is held up.
    holds_up: bool,
    slow: Slow,
}

/// A thread that is held up.
#[derive(Debug, Default)]
struct Slow {
    thread: usize,
    /// After so many points of its own.
    after: u64,
    /// For so many points of others.
    points: u64,
}

/// A thread is held up at one of so many points that it comes to first.
const FIRST_POINTS: u64 = 24;
/// For fewer points of others than this: two snapshots take some 400.
const MOST_POINTS: u64 = 500;

impl Walk {
    fn new(seed: u64, choice: u64, schedules: usize) -> Self {
        Walk { rng: Rng::new(seed), choice, left: schedules, holds_up: false, slow: Slow::default() }
    }

    fn holding_up(seed: u64, choice: u64, schedules: usize) -> Self {
        Walk { holds_up: true, ..Walk::new(seed, choice, schedules) }
    }

    /// Who may run on: all, or all but the one that is held up.
    fn candidates(&mut self, runnable: &[&Task]) -> Vec<TaskId> {
        let all = runnable.iter().map(|task| task.id());
        if !self.holds_up || self.slow.after > 0 || self.slow.points == 0 {
            return all.collect();
        }
        let others: Vec<TaskId> = all.clone().filter(|&task| usize::from(task) != self.slow.thread).collect();
        self.slow.points -= 1;
        if others.is_empty() { all.collect() } else { others }
    }
}

impl Scheduler for Walk {
    fn new_execution(&mut self) -> Option<Schedule> {
        self.left = self.left.checked_sub(1)?;
        // The first thread prepares the others and waits for them.
        let (thread, after) = (1 + self.rng.below(3) as usize, self.rng.below(FIRST_POINTS));
        self.slow = Slow { thread, after, points: self.rng.below(MOST_POINTS) };
        Some(Schedule::new(0))
    }

    fn next_task(&mut self, runnable: &[&Task], current: Option<TaskId>, yielding: bool) -> Option<TaskId> {
        let candidates = self.candidates(runnable);
        let chosen = match current.filter(|current| candidates.contains(current)) {
            Some(current) if candidates.len() == 1 => Some(current),
            Some(current) if !yielding && (self.choice == 0 || !self.rng.one_in(self.choice)) => {
                Some(current)
            }
            _ => candidates.get(self.rng.below(candidates.len() as u64) as usize).copied(),
        };
        if chosen.is_some_and(|task| usize::from(task) == self.slow.thread) {
            self.slow.after = self.slow.after.saturating_sub(1);
        }
        chosen
    }

    fn next_u64(&mut self) -> u64 {
        self.rng.next_u64()
    }
}
