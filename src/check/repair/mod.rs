//! Repairing an image: in steps, each of which leaves it no worse, with every replaced byte saved first.
//!
//! ```text
//! examine ──▶ the first kind of step that applies ──▶ its bytes saved, then written, synced ──▶ examine again ──▶ …
//! ```
//!
//! Before all that a snapshot that was cut is finished or taken away, as any open for writing does.
//!
//! Kinds, in this order: a journal that somebody has switched off · copies of footer and header · superblocks, and a journal that is
//! damaged or holds what comes next · the table · block pages · the mark of a failed sync · an ordinary open and close, which recovers,
//! writes all copies again and gives space back. Each step starts from what
//! the file holds, so a repair that was cut goes on when it is run again. To show what would be done, the same runs over
//! a view of the file in memory.

mod clone;
mod copies;
mod guarded;
mod one_file;
mod pages;
mod relink;
mod replay;
mod salvage;
mod seal;
mod superblocks;
mod table;
mod undo;

use super::code::Code;
use super::image::{self, Examined};
use super::report::Report;
use super::shadow::Shadow;
use super::unfinished;
use crate::chain;
use crate::error::{Error, Result};
use crate::journal::zero_range;
use crate::layer::{self, Condition, Image, LockedImage};
use crate::sync::Arc;
use crate::vfs::{Access, File, FileExt, Vfs};
use crate::vhd::UniqueId;
pub use relink::relink;
pub use salvage::{Salvaged, salvage};

use guarded::GuardedFile;
use one_file::OneFile;
use std::ops::Range;
use std::path::Path;

/// How far a repair may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consent {
    /// Steps that lose nothing.
    Safe,
    /// All steps.
    All,
}

/// One step of a repair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What is done, and to what.
    pub what: String,
    /// It loses nothing, whatever the truth is.
    pub safe: bool,
}

/// What a repair did, or would do.
#[derive(Debug, Clone)]
pub struct Repair {
    /// What was found before.
    pub before: Report,
    /// The steps, in order.
    pub steps: Vec<Step>,
    /// What is found afterwards.
    pub after: Report,
}

impl Repair {
    /// Whether anything was changed, or would be.
    pub fn changes(&self) -> bool {
        !self.steps.is_empty()
    }

    /// Whether nothing worse than leaks is left.
    pub fn is_sound(&self) -> bool {
        self.after.is_sound()
    }
}

/// Says what a repair of the image at `path` would do, without changing it.
///
/// Takes the lock of a writer: what is planned for an image that somebody changes means nothing.
pub fn plan(vfs: Arc<dyn Vfs>, path: &Path, consent: Consent) -> Result<Repair> {
    let file = lock(&*vfs, path)?;
    let mut plan = plan_locked(vfs, path, &file, consent)?;
    if is_unfinished(&plan.before) {
        plan.steps.insert(0, snapshot_step());
        plan.after.take_out(Code::SnapshotUnfinished);
    }
    Ok(plan)
}

/// Repairs the image at `path`. What is replaced is saved in the new file `undo` first, durably; nothing is made where there is
/// nothing to do. Where a repair of this image was cut and left `undo` unfinished, what it has changed must be taken back
/// first ([`undo`]), which the error says ([`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt)): what was being written may be
/// gone. Any other file of that name is an error as well ([`ErrorKind::Exists`](crate::ErrorKind::Exists)).
pub fn repair(vfs: Arc<dyn Vfs>, path: &Path, consent: Consent, undo: &Path) -> Result<Repair> {
    let found = super::check(Arc::clone(&vfs), path)?;
    let finished = is_unfinished(&found) && finish_snapshot(&vfs, path)?;
    let mut repaired = repair_file(vfs, path, consent, undo)?;
    if finished {
        repaired.before = found;
        repaired.steps.insert(0, snapshot_step());
    }
    Ok(repaired)
}

/// A snapshot was cut before its end.
fn is_unfinished(report: &Report) -> bool {
    report.count(Code::SnapshotUnfinished) > 0
}

fn snapshot_step() -> Step {
    Step { what: "finish the snapshot that was cut, or take away what there is of it".into(), safe: true }
}

/// Does with a snapshot that was cut what any open does; false where the file has to be repaired first.
fn finish_snapshot(vfs: &Arc<dyn Vfs>, path: &Path) -> Result<bool> {
    // Nothing is read of a parent.
    let open = || chain::open_leaf(vfs, Arc::clone(vfs), path, Access::ReadWrite)?.open(|_, _, _| Ok(()));
    match open() {
        Ok((Image::Dynamic(layer), ..)) => layer.close().map(|()| true),
        Ok((Image::Fixed(fixed), ..)) => fixed.close().map(|()| true),
        Err(error @ (Error::InUse { .. } | Error::Io { .. })) => Err(error),
        Err(_) => Ok(false),
    }
}

fn repair_file(vfs: Arc<dyn Vfs>, path: &Path, consent: Consent, undo: &Path) -> Result<Repair> {
    let file = lock(&*vfs, path)?;
    let plan = plan_locked(Arc::clone(&vfs), path, &file, consent)?;
    if !plan.changes() {
        return Ok(plan);
    }
    let disk_id = disk_id(&*file, path)?;
    let guarded = GuardedFile::new(&*vfs, undo, (file, path), disk_id)?;
    let target = Target { vfs, path, file: Arc::clone(&guarded) as Arc<dyn File>, guard: Some(&guarded) };
    let repaired = target.run(consent)?;
    guarded.finish()?;
    Ok(repaired)
}

/// Restores the image at `path` to what it was before the repair that wrote `undo`, bit by bit; may be repeated. Fails if the
/// image was changed after the repair, unless `force` says that those changes may be lost.
pub fn undo(vfs: Arc<dyn Vfs>, undo: &Path, path: &Path, force: bool) -> Result<()> {
    undo::apply(&*vfs, undo, path, force)
}

fn lock(vfs: &dyn Vfs, path: &Path) -> Result<Arc<dyn File>> {
    let opening = |error| Error::io(path, "opening the image", error);
    let file = match vfs.open(path, Access::ReadWrite) {
        // A sealed image: its mode stays.
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            let readable = vfs.open(path, Access::ReadOnly).map_err(opening)?;
            layer::open_read_only_file(vfs, path, &*readable).map_err(opening)?
        }
        file => file.map_err(opening)?,
    };
    layer::lock(&*file, path, Access::ReadWrite)?;
    Ok(file)
}

fn plan_locked(vfs: Arc<dyn Vfs>, path: &Path, file: &Arc<dyn File>, consent: Consent) -> Result<Repair> {
    let shadow =
        Shadow::new(Arc::clone(file)).map_err(|error| Error::io(path, "looking at the image", error))?;
    Target { vfs, path, file: Arc::new(shadow), guard: None }.run(consent)
}

/// The id by which an undo file knows its image.
fn disk_id(file: &dyn File, path: &Path) -> Result<UniqueId> {
    let headers = layer::Headers::read(file, path)?;
    Ok(headers.decide(path).map_or(UniqueId::default(), |decision| decision.footer.unique_id))
}

/// What is to be written, in order. What stands in one piece of work is synced before the next is begun.
#[derive(Debug, Default)]
struct Work {
    what: String,
    safe: bool,
    /// Copies within the file, made and synced before the writes: (from, to, length).
    copies: Vec<(u64, u64, u64)>,
    writes: Vec<(u64, Vec<u8>)>,
    /// Ranges that become zeros and give their space back.
    punches: Vec<Range<u64>>,
    /// The image is opened and closed.
    reopen: bool,
}

impl Work {
    /// What it changes, but for an open.
    fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let writes = self.writes.iter().map(|(at, bytes)| *at..at + bytes.len() as u64);
        let copies = self.copies.iter().map(|&(_, to, length)| to..to + length);
        self.punches.iter().cloned().chain(writes).chain(copies)
    }
}

/// Whether the journal says what a block page holds that a range meets.
fn is_replayed(image: &image::Image, range: &Range<u64>) -> bool {
    let mut pages = image.inspection.pages.keys();
    pages.any(|&at| at < range.end && range.start < at + crate::ext::PAGE_BYTES)
}

/// A file that is repaired, or a view of it.
struct Target<'a> {
    vfs: Arc<dyn Vfs>,
    path: &'a Path,
    file: Arc<dyn File>,
    guard: Option<&'a GuardedFile>,
}

/// More rounds than any repair needs: each kind of step once, and again where one brings another to light.
const MAX_ROUNDS: usize = 16;

impl Target<'_> {
    fn examine(&self) -> Result<Examined> {
        let mut examined = image::examine(Arc::clone(&self.vfs), Arc::clone(&self.file), self.path)?;
        unfinished::check(&mut examined.report, &*self.vfs, &*self.file, self.path, examined.image.as_ref());
        Ok(examined)
    }

    fn run(&self, consent: Consent) -> Result<Repair> {
        let mut examined = self.examine()?;
        let before = examined.report.clone();
        let mut steps: Vec<Step> = Vec::new();
        let mut tried: Vec<String> = Vec::new();
        for _ in 0..MAX_ROUNDS {
            let works = self.works(&examined, consent, &tried)?;
            if works.is_empty() {
                break;
            }
            // All at once: where something cannot be saved, nothing of it is changed.
            let ranges: Vec<Range<u64>> = works.iter().flat_map(Work::ranges).collect();
            self.save(&ranges).map_err(|error| Error::io(self.path, "saving what is replaced", error))?;
            for work in works {
                tried.push(work.what.clone());
                if self.perform(&work, &examined)? {
                    steps.push(Step { what: work.what, safe: work.safe });
                }
            }
            examined = self.examine()?;
        }
        if !steps.is_empty() {
            self.keep_time(&examined)?;
        }
        Ok(Repair { before, steps, after: examined.report })
    }

    /// A sealed image keeps the time of its seal.
    fn keep_time(&self, examined: &Examined) -> Result<()> {
        let Some(image) = &examined.image else { return Ok(()) };
        match image.inspection.decision.superblock {
            Some((superblock, _)) if superblock.lineage.is_sealed() => self
                .file
                .set_modified(superblock.fingerprint.modified)
                .map_err(|error| Error::io(self.path, "setting the modification time", error)),
            _ => Ok(()),
        }
    }

    /// The work of the first kind that there is any of. Nothing is done twice in the same words.
    fn works(&self, examined: &Examined, consent: Consent, tried: &[String]) -> Result<Vec<Work>> {
        let allowed = |works: Vec<Work>| -> Vec<Work> {
            let new = |work: &Work| !tried.contains(&work.what);
            works.into_iter().filter(|work| (work.safe || consent == Consent::All) && new(work)).collect()
        };
        if let Some(image) = &examined.image
            && image.inspection.decision.unreplayed.is_some()
        {
            // Whatever else is done would take what the file lacks for what was never there.
            return Ok(allowed(replay::works(image, &examined.report, self)?));
        }
        if let Some(image) = &examined.image
            && image.place().temporary.is_some()
        {
            // Its structures lie elsewhere; what an open does not mend is left alone.
            return Ok(allowed(superblocks::reopen(image, &examined.report, &*self.file, self.path, false)?));
        }
        let copies = allowed(copies::works(examined, &*self.file, self.path)?);
        if !copies.is_empty() {
            return Ok(copies);
        }
        let superblocks = allowed(superblocks::works(examined, &*self.file, self.path)?);
        if !superblocks.is_empty() {
            return Ok(superblocks);
        }
        let Some(image) = &examined.image else { return Ok(Vec::new()) };
        for kind in [table::works, pages::works, superblocks::finish] {
            let mut works = allowed(kind(image, &examined.report, &*self.file, self.path)?);
            if image.inspection.decision.condition == Condition::Dirty && !works.is_empty() {
                // A replay would bring back what is changed in place, where the journal has it as well.
                let stays = |work: &Work| work.safe && !work.ranges().any(|range| is_replayed(image, &range));
                works.retain(stays);
                if works.is_empty() {
                    works = allowed(superblocks::give_up_journal(image));
                }
            }
            if !works.is_empty() {
                return Ok(works);
            }
        }
        let seal = allowed(seal::works(image, &examined.report, &*self.vfs, &*self.file, self.path)?);
        if !seal.is_empty() {
            return Ok(seal);
        }
        Ok(allowed(superblocks::reopen(image, &examined.report, &*self.file, self.path, !tried.is_empty())?))
    }

    /// Does a piece of work; false where it turned out that it cannot be done.
    fn perform(&self, work: &Work, examined: &Examined) -> Result<bool> {
        let io = |error| Error::io(self.path, format!("repairing ({})", work.what), error);
        if work.reopen {
            self.save_what_recovery_writes(examined).map_err(io)?;
            let vfs = OneFile {
                inner: Arc::clone(&self.vfs),
                path: self.path.to_path_buf(),
                file: Arc::clone(&self.file),
                others: Access::ReadOnly,
            };
            // Nothing is read of a parent: it need not be there.
            let open_and_close = |image: LockedImage| {
                if image.lineage().is_some_and(|lineage| lineage.is_sealed()) {
                    return image.finish_seal().map(drop);
                }
                match image.open(|_, _, _| Ok(()))?.0 {
                    Image::Dynamic(layer) => layer.close(),
                    Image::Fixed(fixed) => fixed.close(),
                }
            };
            let closed =
                LockedImage::new(Arc::new(vfs), self.path, Access::ReadWrite).and_then(open_and_close);
            return match closed {
                Ok(()) => Ok(true),
                // What is left of the damage is in the report that follows.
                Err(Error::Damaged { .. } | Error::Format { .. } | Error::Unsupported { .. }) => Ok(false),
                Err(error) => Err(error),
            };
        }
        for &(from, to, length) in &work.copies {
            clone::copy(&*self.file, from, to, length).map_err(io)?;
        }
        if !work.copies.is_empty() {
            self.file.sync_data().map_err(io)?;
        }
        for (at, bytes) in &work.writes {
            self.file.write_all_at(bytes, *at).map_err(io)?;
        }
        for range in work.punches.iter().filter(|range| !range.is_empty()) {
            zero_range(&*self.file, range.start, range.end - range.start).map_err(io)?;
        }
        self.file.sync_data().map_err(io)?;
        Ok(true)
    }

    fn save(&self, ranges: &[Range<u64>]) -> std::io::Result<()> {
        match self.guard {
            Some(guard) => guard.save(ranges),
            None => Ok(()),
        }
    }

    /// With one sync of the undo file instead of one for each page.
    fn save_what_recovery_writes(&self, examined: &Examined) -> std::io::Result<()> {
        let Some(image) = &examined.image else { return Ok(()) };
        let place = image.place();
        let mut ranges = Vec::new();
        ranges.push(0..place.slot_origin);
        ranges.extend(image.inspection.pages.keys().map(|&at| at..at + crate::ext::PAGE_BYTES));
        ranges.extend(image.inspection.overlay.sectors().map(|(at, sector)| at..at + sector.len() as u64));
        ranges.extend(image.gaps.iter().cloned());
        self.save(&ranges)
    }
}
