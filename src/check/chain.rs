//! A disk with all that is beneath it: each layer checked by itself, and whether each is what the one above says of it.
//!
//! From the top down, in a loop: depth costs no stack, one layer's table is in memory at a time, and no more than two files are
//! open. Parents are looked for where an open would look; one that is not there is looked for nearby, by its unique id. The
//! walk ends at the root, or where it cannot go on.

use super::code::{Code, Severity};
use super::image::{self, Examined, Image};
use super::report::{Finding, Report};
use super::unfinished;
use super::unreadable::Readable;
use crate::chain::{self, MAX_DEPTH, ParentPolicy};
use crate::disk::OpenOptions;
use crate::error::{Error, Result};
use crate::ext::Lineage;
use crate::layer::{self, Condition, Foreign, Headers};
use crate::sync::Arc;
use crate::vfs::{Access, File, FileTime, Vfs};
use crate::vhd::{DiskType, DynamicHeader, Footer, Timestamp, UniqueId};
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

/// From here on a chain is called deep.
const DEEP: usize = 100;
/// So many findings are kept for all layers together; the others are counted.
const KEPT_FINDINGS: usize = 2000;

/// The result of checking a chain.
#[derive(Debug, Clone)]
pub struct ChainReport {
    layers: Vec<Report>,
    parent_candidates: Vec<PathBuf>,
}

impl ChainReport {
    /// The layers that were found, the disk itself first, its root last. What is wrong between a layer and its parent is among the
    /// findings of the layer, except that the parent was not closed.
    pub fn layers(&self) -> &[Report] {
        &self.layers
    }

    pub(super) fn layers_mut(&mut self) -> &mut [Report] {
        &mut self.layers
    }

    /// Where a parent was found that is not where the last of [`ChainReport::layers`] says.
    pub fn parent_candidates(&self) -> &[PathBuf] {
        &self.parent_candidates
    }

    /// The codes found in all layers, each with how often.
    pub fn codes(&self) -> BTreeMap<Code, u64> {
        let mut codes = BTreeMap::new();
        for (code, count) in self.layers.iter().flat_map(Report::codes) {
            *codes.entry(code).or_default() += count;
        }
        codes
    }

    /// The worst severity found; `None` where there is nothing to say.
    pub fn worst(&self) -> Option<Severity> {
        self.layers.iter().filter_map(Report::worst).max()
    }

    /// Whether nothing worse than leaks was found.
    pub fn is_sound(&self) -> bool {
        self.worst() <= Some(Severity::Leak)
    }
}

/// Checks the disk at `path` and all of its parents without changing them. `options` say where parents may lie.
///
/// Damage, and a parent that is missing, are in the report. An error means that the check could not be made, as of
/// [`check`](super::check).
pub fn check_chain(options: &OpenOptions, path: &Path) -> Result<ChainReport> {
    walk(options, path, &mut |_, _, _, _| Ok(()))
}

/// Looks further at a layer: its report, its file and path, and the image, `None` of a fixed disk and of what cannot be read.
pub(super) type Look<'a> = dyn FnMut(&mut Report, &Arc<dyn File>, &Path, Option<&Image>) -> Result<()> + 'a;

/// Checks each layer and calls `look` with it, from the top down.
pub(super) fn walk(options: &OpenOptions, path: &Path, look: &mut Look<'_>) -> Result<ChainReport> {
    let (vfs, policy) = (Arc::clone(&options.vfs), &options.policy);
    let file =
        vfs.open(path, Access::ReadOnly).map_err(|error| Error::io(path, "opening the image", error))?;
    layer::lock(&*file, path, Access::ReadOnly)?;
    let mut walk = Walk {
        vfs: &*vfs,
        policy,
        leaf_folder: chain::folder(path),
        seen: HashSet::new(),
        chain: ChainReport { layers: Vec::new(), parent_candidates: Vec::new() },
    };
    let mut next = Some(Candidate { file, path: path.to_path_buf() });
    let mut child: Option<Child> = None;
    let mut kept = KEPT_FINDINGS;
    while let Some(Candidate { file, path }) = next.take() {
        let modified = file.modified().map_err(|error| Error::io(&path, "asking for its time", error))?;
        let (Examined { mut report, image }, readable) =
            image::examine_readable(Arc::clone(&vfs), Arc::clone(&file), &path)?;
        if walk.chain.layers.is_empty() {
            unfinished::check(&mut report, &*vfs, &*readable, &path, image.as_ref());
        }
        let this = image.as_ref().map(|image| {
            let decision = &image.inspection.decision;
            Child {
                footer: decision.footer.clone(),
                header: decision.header.clone(),
                closed: decision.condition == Condition::Clean && decision.unreplayed.is_none(),
                left_by_us: decision.superblock.is_some() && image.inspection.foreign == Foreign::Untouched,
                restructured: image.inspection.foreign == Foreign::StructureChanged,
                lineage: decision.lineage(),
            }
        });
        look(&mut report, &file, &path, image.as_ref())?;
        drop(image);
        if let (Some(child), Some(above)) = (&child, walk.chain.layers.last_mut()) {
            compare(above, child, &mut report, this.as_ref(), modified);
        }
        report.keep_findings(kept);
        kept -= report.findings().len();
        walk.chain.layers.push(report);
        if let Some(this) = &this
            && this.footer.disk_type == DiskType::Differencing
        {
            next = walk.parent(this, &*readable, &path)?;
        }
        child = this;
    }
    let depth = walk.chain.layers.len();
    if let Some(leaf) = walk.chain.layers.first_mut()
        && depth > DEEP
    {
        leaf.push(about_parent(Code::ChainDeep, format!("it has {depth} layers")));
    }
    Ok(walk.chain)
}

/// Where the parent of the differencing image at `path` is now, if it is not where the image says: every file nearby that is that
/// disk. `None` where the parent is in its place.
pub(super) fn moved_parent(
    vfs: &dyn Vfs,
    policy: &ParentPolicy,
    path: &Path,
    file: &dyn File,
    (footer, header): (&Footer, &DynamicHeader),
) -> Result<Option<Vec<PathBuf>>> {
    if footer.disk_type != DiskType::Differencing {
        let what = format!("{}: it is no differencing disk: it has no parent", path.display());
        return Err(Error::Invalid { what });
    }
    let leaf_folder = chain::folder(path);
    let mut open = |file: Arc<dyn File>, path: &Path| Ok((identify(&*file, path)?, ()));
    match policy.find_parent(vfs, leaf_folder, (path, file, header), false, &mut open) {
        Ok(()) => Ok(None),
        Err(Error::ParentMissing { .. }) => {
            Ok(Some(policy.look_nearby(vfs, leaf_folder, path, header.parent_unique_id).found))
        }
        Err(error) => Err(error),
    }
}

/// A file that is, or may be, the next layer.
struct Candidate {
    file: Arc<dyn File>,
    path: PathBuf,
}

/// What a layer says of itself and of its parent.
struct Child {
    footer: Footer,
    header: DynamicHeader,
    closed: bool,
    /// Nothing has touched the file since it was closed here.
    left_by_us: bool,
    /// Another program has changed its structure.
    restructured: bool,
    lineage: Lineage,
}

struct Walk<'a> {
    vfs: &'a dyn Vfs,
    policy: &'a ParentPolicy,
    leaf_folder: &'a Path,
    seen: HashSet<UniqueId>,
    chain: ChainReport,
}

impl Walk<'_> {
    /// The parent of a layer, locked for reading; or `None`, and a finding that says why.
    fn parent(&mut self, child: &Child, file: &dyn File, path: &Path) -> Result<Option<Candidate>> {
        let wanted = child.header.parent_unique_id;
        self.seen.insert(child.footer.unique_id);
        let is_leaf = self.chain.layers.len() == 1;
        if self.seen.contains(&wanted) {
            let what = match wanted == child.footer.unique_id {
                true => "its parent is itself".to_string(),
                false => format!("its parent (id {wanted}) is a disk that lies over it"),
            };
            self.find(Code::ParentLoop, what);
            return Ok(None);
        }
        if self.chain.layers.len() >= MAX_DEPTH {
            self.find(Code::ChainTooDeep, format!("it has more than {MAX_DEPTH} layers"));
            return Ok(None);
        }
        // A file in the right place that cannot say which disk it is: the next best.
        let mut unknown: Option<Candidate> = None;
        let mut open = |file: Arc<dyn File>, path: &Path| {
            layer::lock(&*file, path, Access::ReadOnly)?;
            let candidate = Candidate { file: Arc::clone(&file), path: path.to_path_buf() };
            let found = match identify(&*file, path) {
                Err(Error::Io { .. }) => identify(&*Readable::new(file, path)?.file, path),
                found => found,
            };
            match found {
                Ok(found) => Ok((found, candidate)),
                Err(error) => {
                    unknown = Some(candidate);
                    Err(error)
                }
            }
        };
        let links = (path, file, &child.header);
        match self.policy.find_parent(self.vfs, self.leaf_folder, links, is_leaf, &mut open) {
            Ok(parent) => return Ok(Some(parent)),
            Err(error @ (Error::InUse { .. } | Error::Unsupported { .. })) => return Err(error),
            // The caller's own path is wrong.
            Err(error @ Error::Io { .. }) => return Err(error),
            Err(error) if unknown.is_some() => self.find(Code::ParentMissing, error.to_string()),
            Err(error) => {
                let nearby = self.policy.look_nearby(self.vfs, self.leaf_folder, path, wanted);
                let mut what = error.to_string();
                if nearby.cut_short {
                    what.push_str("; there were more files nearby than were looked at");
                }
                let code = match nearby.found.first() {
                    Some(found) => {
                        what = format!("it is at {} now: {what}", found.display());
                        Code::ParentMoved
                    }
                    None => Code::ParentMissing,
                };
                self.find(code, what);
                self.chain.parent_candidates = nearby.found;
            }
        }
        Ok(unknown)
    }

    fn find(&mut self, code: Code, what: String) {
        if let Some(report) = self.chain.layers.last_mut() {
            report.push(about_parent(code, what));
        }
    }
}

fn about_parent(code: Code, what: String) -> Finding {
    Finding { code, structure: "parent", offset: None, block: None, guest: None, what }
}

/// Which disk a file is, whatever else is wrong with it.
pub(super) fn identify(file: &dyn File, path: &Path) -> Result<UniqueId> {
    if let Some(footer) = layer::fixed_footer(file, path)? {
        return Ok(footer.unique_id);
    }
    Ok(Headers::read(file, path)?.decide(path)?.footer.unique_id)
}

/// Judges a parent by what its child says of it. `parent` is `None` for a fixed disk, and for one that cannot be read.
fn compare(
    above: &mut Report,
    child: &Child,
    below: &mut Report,
    parent: Option<&Child>,
    modified: FileTime,
) {
    if let Some(size) = below.virtual_size.filter(|&size| size != child.footer.current_size) {
        let what = format!("it has {size} bytes, and this disk {}", child.footer.current_size);
        above.push(about_parent(Code::ParentSize, what));
    }
    if parent.is_some_and(|parent| !parent.closed) {
        let what = "a disk lies over this file, and it was not closed".to_string();
        below.push(Finding { structure: "dynamic header", ..about_parent(Code::ParentNotClosed, what) });
        return;
    }
    let changed = |what: String| about_parent(Code::ParentChanged, what);
    let lineage = &child.lineage;
    let known = lineage.parent_id == child.header.parent_unique_id;
    let seconds = |time: FileTime| Timestamp::from_unix_seconds(time.seconds);
    let noted = lineage.fixed_parent;
    if known && noted.file_bytes != 0 && parent.is_none() {
        let (length, had) = (below.file_bytes, noted.file_bytes);
        if length != had {
            above
                .push(changed(format!("its file has {length} bytes, and had {had} when this disk was made")));
        } else if !noted.has_time(modified) {
            let what = format!(
                "it was copied or written to at {}, and had the time {} when this disk was made: a fixed disk has nothing else that would \
                 tell; if it was written to, what this disk shows is wrong",
                seconds(modified),
                seconds(noted.modified)
            );
            above.push(about_parent(Code::ParentTime, what));
        }
        return;
    }
    if let Some(parent) = parent.filter(|_| known && lineage.parent_seal.is_some()) {
        if parent.lineage.seal_id != lineage.parent_seal {
            above.push(changed("it has not the seal that it had when this disk was made".into()));
        } else if parent.restructured {
            above.push(changed("another program has changed its structure since it was sealed".into()));
        }
        return;
    }
    let (noted, modified) = (child.header.parent_timestamp, seconds(modified));
    if noted.0 == 0 || noted == modified {
        return;
    }
    let what = format!("it was changed at {modified}; this disk noted {noted}");
    // A copy is younger, too. But then it is not as a close here left it, and nobody has moved its blocks.
    let is_written = parent.is_some_and(|parent| parent.left_by_us || parent.restructured);
    let code = if modified > noted && is_written { Code::ParentChanged } else { Code::ParentTime };
    above.push(about_parent(code, what));
}
