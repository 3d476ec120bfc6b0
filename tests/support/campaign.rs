//! Many workloads of all kinds, on all cores, until enough states were judged; and one state of one of them again.

use crate::crash::{
    ALIGNED, CHILD, Explorer, FIXED, FOREIGN_CHILD, Failure, PACKED, SMALL, Segment, Shape, StatePath, USED,
    WIDE, Workload,
};
use cowvhd::sim::Bounds;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;
use std::sync::Mutex;

/// What happens beside the requests of a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weather {
    Calm,
    /// Requests arrive in the middle of others.
    Busy,
    /// Operations fail, too.
    Faulty,
}

/// A kind of workload: its name, its disk, what happens beside it, and its steps.
pub type Plan = (&'static str, Shape, Weather, usize);

pub const PLANS: &[Plan] = &[
    ("small", SMALL, Weather::Calm, 60),
    ("small-busy", SMALL, Weather::Busy, 60),
    ("small-faulty", SMALL, Weather::Faulty, 60),
    ("wide-busy", WIDE, Weather::Busy, 120),
    ("child", CHILD, Weather::Calm, 60),
    ("child-busy", CHILD, Weather::Busy, 60),
    ("child-faulty", CHILD, Weather::Faulty, 60),
    ("used-busy", USED, Weather::Busy, 60),
    ("packed", PACKED, Weather::Calm, 60),
    ("packed-busy", PACKED, Weather::Busy, 60),
    ("packed-faulty", PACKED, Weather::Faulty, 60),
    ("aligned", ALIGNED, Weather::Calm, 60),
    ("aligned-busy", ALIGNED, Weather::Busy, 60),
    ("aligned-faulty", ALIGNED, Weather::Faulty, 60),
    ("foreign-child", FOREIGN_CHILD, Weather::Calm, 60),
    ("fixed", FIXED, Weather::Calm, 60),
    ("fixed-busy", FIXED, Weather::Busy, 60),
    ("fixed-faulty", FIXED, Weather::Faulty, 60),
];

/// One workload. As text, such as `small-busy:17`, it replays.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub plan: &'static Plan,
    pub seed: u64,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.plan.0, self.seed)
    }
}

impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (name, seed) = text.split_once(':')?;
            let plan = PLANS.iter().find(|plan| plan.0 == name)?;
            Some(Case { plan, seed: seed.parse().ok()? })
        };
        parse()
            .ok_or_else(|| format!("'{text}' is no workload: expected a name and a seed, such as small:17"))
    }
}

/// What was done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    pub workloads: u64,
    pub injected: u64,
    pub points: u64,
    pub states: u64,
    pub of_recoveries: u64,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} distinct states ({} of them of recoveries that were cut), {} crash points, {} workloads, {} injected errors",
            self.states, self.of_recoveries, self.points, self.workloads, self.injected
        )
    }
}

/// A case that went wrong: in the workload itself, or in a state it may leave.
#[derive(Debug, Clone)]
pub struct Wrong {
    pub case: Case,
    pub path: Option<StatePath>,
    pub what: String,
}

impl Wrong {
    /// The value of `COWVHD_REPLAY` that shows it again.
    pub fn replay(&self) -> String {
        match &self.path {
            Some(path) => format!("{}/{path}", self.case),
            None => self.case.to_string(),
        }
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.case, self.what)
    }
}

impl Case {
    /// The workload's crash points, and how many errors were injected.
    fn run(&self) -> (Vec<Segment>, u64) {
        let &(_, shape, weather, steps) = self.plan;
        let mut workload = Workload::new(shape, self.seed, weather == Weather::Faulty);
        if weather != Weather::Calm {
            workload.interleave();
        }
        workload.run(steps);
        if weather != Weather::Faulty {
            workload.check_live();
        }
        let injected = workload.injected;
        (workload.finish(), injected)
    }

    /// Runs the workload and judges the states it may leave. A panic counts as a failure.
    pub fn explore(&self, bounds: &Bounds) -> Result<Tally, Wrong> {
        self.caught(|| {
            let (segments, injected) = self.run();
            let points = segments.iter().map(|segment| segment.points.len() as u64).sum();
            let mut explorer = Explorer::new(self.plan.1);
            explorer.explore(&segments, self.seed, bounds)?;
            let Explorer { states, of_recoveries, .. } = explorer;
            Ok(Tally { workloads: 1, injected, points, states, of_recoveries })
        })
    }

    /// Runs the workload and judges one state.
    fn explore_one(&self, path: Option<&StatePath>) -> Result<(), Wrong> {
        self.caught(|| {
            let (segments, _) = self.run();
            path.map_or(Ok(()), |path| Explorer::new(self.plan.1).replay(&segments, path))
        })
    }

    fn caught<T>(&self, run: impl FnOnce() -> Result<T, Failure>) -> Result<T, Wrong> {
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(result) => {
                result.map_err(|failure| Wrong { case: *self, path: Some(failure.path), what: failure.what })
            }
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
                let what = format!("the workload itself failed: {}", text.unwrap_or_default());
                Err(Wrong { case: *self, path: None, what })
            }
        }
    }
}

/// Judges again what [`Wrong::replay`] names.
pub fn replay(text: &str) -> Result<(), Wrong> {
    let (case, path) = match text.split_once('/') {
        Some((case, path)) => (case, Some(path.parse().expect("the way to a state"))),
        None => (text, None),
    };
    let case: Case = case.parse().expect("a workload");
    case.explore_one(path.as_ref())
}

/// Explores workloads of all kinds, seeded from `first_seed` on, on all cores, until `states` distinct states were judged or
/// one is wrong. `progress` hears of every finished workload.
pub fn run(
    first_seed: u64,
    states: u64,
    bounds: &Bounds,
    progress: impl Fn(&Tally) + Sync,
) -> Result<Tally, Wrong> {
    struct Progress {
        next: u64,
        tally: Tally,
        wrong: Option<Wrong>,
    }
    let shared = Mutex::new(Progress { next: first_seed, tally: Tally::default(), wrong: None });
    let work = || {
        loop {
            let case = {
                let mut shared = shared.lock().unwrap();
                if shared.wrong.is_some() || shared.tally.states >= states {
                    return;
                }
                shared.next += 1;
                let seed = shared.next - 1;
                Case { plan: &PLANS[(seed % PLANS.len() as u64) as usize], seed }
            };
            let result = case.explore(bounds);
            let mut shared = shared.lock().unwrap();
            match result {
                Ok(done) => {
                    let tally = &mut shared.tally;
                    tally.workloads += done.workloads;
                    tally.injected += done.injected;
                    tally.points += done.points;
                    tally.states += done.states;
                    tally.of_recoveries += done.of_recoveries;
                    progress(tally);
                }
                Err(wrong) => shared.wrong = Some(wrong),
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(work);
        }
    });
    let shared = shared.into_inner().unwrap();
    match shared.wrong {
        Some(wrong) => Err(wrong),
        None => Ok(shared.tally),
    }
}
