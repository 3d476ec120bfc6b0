//! What others keep of an image: its registry of children from its other copy or from the children, its seal from the CRCs behind
//! its blocks or from a child. And the copies in a sealed image, which no ordinary open writes again.

use super::Work;
use super::superblocks::next_superblock;
use crate::chain::{self, NearbyChild, RegistryState, SnapshotName};
use crate::check::code::Code;
use crate::check::image::Image;
use crate::check::report::Report;
use crate::error::Result;
use crate::ext::{
    Child, CrcPage, DataCrcs, HEADER_BACKUP_OFFSET, Lineage, Name, PAGE_BYTES, Registry, SUPERBLOCK_OFFSETS,
    SealId, Superblock,
};
use crate::layer::{self, Condition, Headers};
use crate::state::StateNames;
use crate::vfs::{File, FileExt, Vfs};
use crate::vhd::{self, DiskType};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What can be done about the registry and the seal.
pub(super) fn works(
    image: &Image,
    report: &Report,
    vfs: &dyn Vfs,
    file: &dyn File,
    path: &Path,
) -> Result<Vec<Work>> {
    let decision = &image.inspection.decision;
    let disk_id = decision.footer.unique_id;
    let mut works = Vec::new();
    let mut add = |safe, what: &str, registry: &Registry, places: &[u64]| {
        // One that is read fits.
        let Some(bytes) = registry.to_bytes(disk_id) else { return };
        works.push(Work {
            what: what.into(),
            safe,
            writes: places.iter().map(|&at| (at, bytes.clone())).collect(),
            ..Work::default()
        });
    };
    match &image.registry {
        Some(RegistryState::Damaged(at, registry)) => {
            add(
                true,
                "write the copy of the registry of children again from the other one",
                registry,
                &[*at],
            );
        }
        Some(RegistryState::Lost(places)) => {
            let children = chain::children_of(vfs, chain::folder(path), disk_id);
            let child = |child: NearbyChild| Child {
                id: child.id,
                path: child.path.into_os_string().into_encoded_bytes(),
            };
            let registry = Registry { sequence: 1, children: children.into_iter().map(child).collect() };
            let what = format!("register {} disks that name it as their parent", registry.children.len());
            add(false, &what, &registry, places);
        }
        _ => {}
    }
    if works.is_empty()
        && report.count(Code::SealLost) > 0
        && image.bad_entries.is_empty()
        && let Some((lineage, data_crcs)) = lost_seal(image, vfs, file, path)
    {
        // Both copies, each a step of its own: losing one of them must not unseal the image.
        let Some((superblock, index)) = decision.superblock else { return Ok(works) };
        for (step, which) in [(1, "one"), (2, "the other")] {
            let sequence = superblock.sequence.saturating_add(step);
            let sealed = Superblock { sequence, lineage, data_crcs, ..superblock };
            let at = SUPERBLOCK_OFFSETS.get((index + step as usize) % 2).copied().unwrap_or_default();
            let what = format!("write the seal {} into {which} superblock", lineage.seal_id);
            works.push(Work { what, writes: vec![(at, sealed.to_bytes().to_vec())], ..Work::default() });
        }
    }
    Ok(works)
}

/// The copies of headers and superblocks in a sealed, closed image that are not as they are to be.
pub(super) fn copies(image: &Image, report: &Report) -> Vec<Work> {
    let decision = &image.inspection.decision;
    let mut works = Vec::new();
    if report.count(Code::BackupDamaged) > 0 {
        works.push(Work {
            what: "write the backup of the headers again from the start of the file".into(),
            safe: true,
            writes: vec![(
                HEADER_BACKUP_OFFSET,
                layer::pair_bytes(&decision.footer, &decision.header).to_vec(),
            )],
            ..Work::default()
        });
    }
    if report.count(Code::SuperblockDamaged) + report.count(Code::SuperblockSequence) > 0 {
        works.push(Work {
            what: "write the other superblock again".into(),
            safe: true,
            writes: next_superblock(image, |_| ()),
            ..Work::default()
        });
    }
    works
}

/// The lineage that a closed image had, as far as others tell, and the room for its CRCs; `None` where nothing tells its seal.
fn lost_seal(image: &Image, vfs: &dyn Vfs, file: &dyn File, path: &Path) -> Option<(Lineage, DataCrcs)> {
    let (decision, place) = (&image.inspection.decision, image.place());
    let disk_id = decision.footer.unique_id;
    let children = chain::children_of(vfs, chain::folder(path), disk_id);
    let blocks = image.entries.iter().filter(|&&entry| entry != vhd::UNALLOCATED);
    let end = blocks.clone().map(|&entry| place.block_end(entry)).max().unwrap_or(place.slot_origin);
    let slots = end.saturating_sub(place.slot_origin).div_ceil(place.slot_stride());
    let crcs = DataCrcs::new(place, blocks.count() as u64, place.slot_offset(slots));
    let fits = crcs.is_some() && crcs.end() + vhd::SECTOR == image.inspection.headers.file_bytes;
    let crcs = if fits { crcs } else { DataCrcs::default() };
    let seals = (0..crcs.pages.min(64)).filter_map(|page| seal_in(file, crcs.page_offset(page)));
    let named = children.iter().map(|child| &child.lineage).filter(|lineage| lineage.parent_id == disk_id);
    let mut seals: Vec<SealId> =
        seals.chain(named.map(|lineage| lineage.parent_seal)).filter(SealId::is_some).collect();
    seals.sort_unstable_by_key(|seal| seal.0);
    seals.dedup();
    // Two that differ: it was sealed anew, and nothing tells which was the last.
    let [seal_id] = seals[..] else { return None };
    let before = decision.lineage();
    let mut lineage = Lineage { seal_id, ..before };
    if let Some((leaf, name)) = names(path) {
        lineage.snapshot = Name::new(name.as_str().as_bytes()).unwrap_or_default();
        lineage.leaf_name = leaf.file_name().and_then(|leaf| Name::new(leaf.as_bytes())).unwrap_or_default();
        let successor = children.iter().find(|child| {
            let in_folder = child.path.parent() == Some(Path::new(""));
            in_folder && (Some(child.path.as_os_str()) == leaf.file_name() || names(&child.path).is_some())
        });
        lineage.child_id = successor.map(|child| child.id).unwrap_or_default();
        if let Some((digest, manifest)) = manifest(vfs, &leaf, &name, image, seal_id) {
            (lineage.state_digest, lineage.manifest) = (digest, manifest);
        }
    }
    if decision.footer.disk_type == DiskType::Differencing && lineage.parent_id.is_zero() {
        let parent = parent_seal(vfs, file, path, image);
        (lineage.parent_id, lineage.parent_seal) = parent.unwrap_or_default();
    }
    Some((lineage, crcs))
}

fn seal_in(file: &dyn File, at: u64) -> Option<SealId> {
    let mut page = [0; PAGE_BYTES as usize];
    file.read_or_zero_at(&mut page, at).ok()?;
    CrcPage::parse(&page).ok().flatten().map(|page| page.seal_id)
}

/// The leaf and the name of the snapshot whose file this is, by its path.
fn names(path: &Path) -> Option<(PathBuf, SnapshotName)> {
    let stem = path.file_stem()?.to_str()?;
    let (disk, name) = stem.rsplit_once('@')?;
    let mut leaf = std::ffi::OsString::from(disk);
    if let Some(extension) = path.extension() {
        leaf.push(".");
        leaf.push(extension);
    }
    Some((path.with_file_name(leaf), SnapshotName::new(name).ok()?))
}

/// The manifest of the VM state that belongs to the seal, if there is one.
fn manifest(
    vfs: &dyn Vfs,
    leaf: &Path,
    name: &SnapshotName,
    image: &Image,
    seal_id: SealId,
) -> Option<([u8; 32], Name<256>)> {
    let path = StateNames::new(leaf, name.as_str()).ok()?.manifest();
    let (digest, manifest) = crate::state::any_manifest(vfs, &path)?;
    let disk_id = image.inspection.decision.footer.unique_id;
    let belongs = manifest.disks.iter().any(|disk| disk.disk_id == disk_id && disk.seal_id == seal_id.0);
    let file_name = Name::new(path.file_name()?.as_bytes())?;
    belongs.then_some((digest.0, file_name))
}

/// The parent, and its seal as it is now.
fn parent_seal(
    vfs: &dyn Vfs,
    file: &dyn File,
    path: &Path,
    image: &Image,
) -> Option<(vhd::UniqueId, SealId)> {
    let header = &image.inspection.decision.header;
    let mut open = |file: crate::sync::Arc<dyn File>, path: &Path| {
        let decision = Headers::read(&*file, path)?.decide(path)?;
        let closed = decision.condition == Condition::Clean;
        let seal = decision.superblock.filter(|_| closed).map(|(superblock, _)| superblock.lineage.seal_id);
        Ok((decision.footer.unique_id, seal))
    };
    let policy = chain::ParentPolicy::default();
    let folder = chain::folder(path);
    let seal = policy.find_parent(vfs, folder, (path, file, header), false, &mut open).ok()??;
    seal.is_some().then_some((header.parent_unique_id, seal))
}
