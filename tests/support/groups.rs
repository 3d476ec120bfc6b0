//! A checkpoint of two disks that are open in a process each, which a third process leads. Processes end at any step of it, and
//! whatever the others do then, both disks and the state are all old or all new; a disk that is not stopped loses nothing.

use crate::checkpoints::{BLOBS, DISKS, MANIFEST, SNAPSHOTS, Story, blob, judge, name, options};
use cowvhd::sim::{Bounds, Fault, FaultPlan};
use cowvhd::snapshot::{Member, Participant, StateRef};
use cowvhd::state::{Draft, StateNames};
use cowvhd::vfs::Vfs;
use cowvhd::{Disk, Error};
use std::collections::HashSet;
use std::mem;
use std::path::Path;
use std::sync::Arc;

/// What the leader does, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Save,
    WriteManifest,
    Prepare(usize),
    Hold(usize),
    Switch(usize),
    Seal(usize),
    /// The manifest has its name in the cache.
    Name,
    Publish,
    Commit(usize),
}

const STEPS: [Step; 14] = [
    Step::Save,
    Step::WriteManifest,
    Step::Prepare(0),
    Step::Prepare(1),
    Step::Hold(0),
    Step::Hold(1),
    Step::Switch(0),
    Step::Switch(1),
    Step::Seal(0),
    Step::Seal(1),
    Step::Name,
    Step::Publish,
    Step::Commit(0),
    Step::Commit(1),
];

/// Who ends before a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The leader is killed. One disk after the other notices, the first one first, or last.
    Leader { reversed: bool },
    /// A disk's process is killed. Another one opens the disk before the leader goes on, or much later.
    Disk { number: usize, opened: bool },
    /// The same, and the leader with it.
    Both { number: usize },
    /// When a disk is sealed this operation fails, and may be seen in the cache all the same; its process and the leader are killed.
    Sealing { number: usize, operation: u64 },
}

impl End {
    /// The disk whose process is killed.
    fn disk(self) -> Option<usize> {
        match self {
            End::Leader { .. } => None,
            End::Disk { number, .. } | End::Both { number } | End::Sealing { number, .. } => Some(number),
        }
    }
}

type Members<'a> = [Option<Member<'a>>; 2];

/// The leader's side.
struct Leader {
    draft: Option<Draft>,
    names: StateNames,
    state: Option<StateRef>,
    vfs: Arc<dyn Vfs>,
}

fn ended(what: &str) -> Error {
    Error::Invalid { what: what.into() }
}

impl Leader {
    fn new(vfs: Arc<dyn Vfs>) -> Self {
        let names = StateNames::new(Path::new(DISKS[0]), name().as_str()).unwrap();
        Leader { draft: Some(Draft::new(Arc::clone(&vfs), names.clone()).unwrap()), names, state: None, vfs }
    }

    fn step(&mut self, step: Step, members: &mut Members<'_>) -> Result<(), Error> {
        fn member<'m, 'a>(members: &'m mut Members<'a>, number: usize) -> Result<&'m mut Member<'a>, Error> {
            members[number].as_mut().ok_or_else(|| ended("its process is gone"))
        }
        let draft = || self.draft.as_ref().ok_or_else(|| ended("it was published"));
        match step {
            Step::Save => BLOBS.into_iter().enumerate().try_for_each(|(index, (name, _))| {
                let (part, bytes) = (draft()?.blob(name)?, blob(index));
                bytes.chunks(4096).zip(0..).try_for_each(|(piece, n)| part.write_at(piece, n * 4096))
            }),
            Step::WriteManifest => {
                let disks = (0..2).map(|number| Ok(member(members, number)?.disk().clone()));
                let digest = draft()?.write_manifest(disks.collect::<Result<_, Error>>()?)?;
                self.state = Some(StateRef::new(self.names.manifest().file_name().unwrap(), digest)?);
                Ok(())
            }
            Step::Prepare(number) => member(members, number)?.prepare(),
            Step::Hold(number) => member(members, number)?.hold(),
            Step::Switch(number) => member(members, number)?.switch(self.state.as_ref().unwrap()),
            Step::Seal(number) => member(members, number)?.seal(),
            Step::Name => {
                // From here on its files are not the leader's to take away.
                mem::forget(self.draft.take());
                let temporary = Path::new(DISKS[0]).with_file_name("a@one+~manifest.vmstate");
                self.vfs.rename(&temporary, Path::new(MANIFEST)).map_err(|_| ended("somebody ended it"))
            }
            Step::Publish => self.vfs.sync_dir(Path::new("/")).map_err(|_| ended("it cannot be durable")),
            Step::Commit(number) => member(members, number)?.commit().map(drop),
        }
    }

    /// What is left to do; as [`cowvhd::snapshot::Checkpoint::commit`] does it.
    fn go_on(&mut self, from: usize, members: &mut Members<'_>) -> bool {
        for &step in &STEPS[from..] {
            let result = self.step(step, members);
            if step <= Step::Publish && result.is_err() {
                members.iter_mut().flatten().for_each(|member| member.fail("another disk failed"));
                return false;
            }
        }
        true
    }
}

impl Story {
    /// Saves the VM as [`Story::checkpoint`] does, with three processes, one of which ends before this step. Says what is wrong
    /// with a disk whose process lives on.
    fn checkpoint_apart(&mut self, before: usize, end: End) -> Result<(), String> {
        self.saved = self.contents.clone();
        let vfs: Arc<dyn Vfs> = Arc::new(self.vfs.clone());
        let disks = mem::take(&mut self.disks);
        let open = |number: usize| {
            let disk = options(&self.vfs).open(Path::new(DISKS[number]));
            disk.map_err(|error| format!("opening {} after its process was killed: {error}", DISKS[number]))
        };
        let mut opened: [Option<Disk>; 2] = [None, None];
        let member = |number: usize| Member::begin(&disks[number], &name(), number == 0).unwrap();
        let mut members = [Some(member(0)), Some(member(1))];
        let mut leader = Leader::new(vfs);
        STEPS[..before].iter().for_each(|&step| leader.step(step, &mut members).unwrap());

        self.vfs.record(true);
        if let End::Sealing { operation, .. } = end {
            self.vfs.set_faults(FaultPlan::new(Fault::Error(5), operation, 1));
            // Whether it was sealed or not: the process is killed, and does not say.
            let _ = leader.step(STEPS[before], &mut members);
            self.vfs.set_faults(FaultPlan::default());
        }
        if let Some(number) = end.disk() {
            members[number].take().unwrap().kill();
            [DISKS, SNAPSHOTS].iter().for_each(|paths| self.vfs.break_locks(Path::new(paths[number])));
        }
        match end {
            End::Disk { number, opened: now } => {
                if now {
                    opened[number] = Some(open(number)?);
                }
                if leader.go_on(before, &mut members) {
                    self.done = Some(self.vfs.tick());
                }
                drop(leader);
            }
            // It takes nothing away.
            End::Leader { .. } | End::Both { .. } | End::Sealing { .. } => mem::forget(leader.draft),
        }
        if end == (End::Leader { reversed: true }) {
            members.reverse();
        }
        members.into_iter().for_each(drop);

        // Before the first switch nothing happened to anybody; and what is sealed everywhere anybody commits, unless it was ended.
        // But that a disk is gone is not seen before its turn comes.
        let is_ended = before == END_OF_SEALS && matches!(end, End::Disk { opened: true, .. });
        let unseen = before == FIRST_SWITCH && matches!(end, End::Disk { number: 1, .. });
        let unharmed = before <= FIRST_SWITCH && !unseen || before >= END_OF_SEALS && !is_ended;
        for (number, old) in disks.into_iter().enumerate() {
            if end.disk() == Some(number) {
                mem::forget(old);
                let new = opened[number].take().map_or_else(|| open(number), Ok);
                self.disks.push(new?);
                continue;
            }
            let flushed = old.flush();
            self.disks.push(old);
            if unharmed && let Err(error) = flushed {
                return Err(format!("{} cannot go on: {error}", DISKS[number]));
            }
        }
        Ok(())
    }
}

const FIRST_SWITCH: usize = 6;
const END_OF_SEALS: usize = 10;

/// Every process ends before every step.
fn ends() -> impl Iterator<Item = (usize, End)> {
    assert_eq!((STEPS[FIRST_SWITCH], STEPS[END_OF_SEALS]), (Step::Switch(0), Step::Name));
    let whole = (0..=STEPS.len()).flat_map(|before| {
        let disks = [0, 1].into_iter().flat_map(|number| {
            [true, false].map(|opened| End::Disk { number, opened }).into_iter().chain([End::Both { number }])
        });
        disks.chain([true, false].map(|reversed| End::Leader { reversed })).map(move |end| (before, end))
    });
    let sealings = (0..2).flat_map(|number| {
        // The other disk is sealed already if this is the last one.
        let before = END_OF_SEALS - 2 + number;
        (0..12).map(move |operation| (before, End::Sealing { number, operation }))
    });
    whole.chain(sealings)
}

/// Lets each process end before each step, and cuts the power at every step of what follows, in so many ways each; how many
/// there were, or what is wrong with one.
pub fn end_anywhere(states: usize) -> Result<u64, String> {
    let (mut judged, mut seen) = (0, HashSet::new());
    for (before, end) in ends() {
        let mut story = Story::new(3, 2);
        story.write_some(2);
        story.flush();
        story.write_some(1);
        if end.disk().is_some() {
            // What was not flushed may be lost with its process, which the history does not know of.
            story.flush();
        }
        let said = |what: String| format!("{end:?} before step {before}: {what}");
        story.checkpoint_apart(before, end).map_err(said)?;
        story.write_some(1);
        story.flush();
        let mut points = story.vfs.take_crash_points();
        points.push(story.vfs.crash_now());
        story.vfs.record(false);
        for (p, point) in points.iter().enumerate() {
            let mut wrong = None;
            point.for_each_state(p as u64, &Bounds::sample(states), |state| {
                if seen.insert(state.hash ^ point.clock()) {
                    judged += 1;
                    wrong = judge(&story, &state, point.clock(), 0, judged % 2 == 0)
                        .err()
                        .map(|what| format!("point {p} of {}, {}: {what}", points.len(), state.fates()));
                }
                wrong.is_none()
            });
            if let Some(wrong) = wrong {
                return Err(said(wrong));
            }
        }
    }
    Ok(judged)
}
