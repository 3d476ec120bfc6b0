//! The registry of an image's children, and the seal that goes with having any.

use super::code::Code;
use super::image::Image;
use super::report::Report;
use crate::chain::{Children, RegistryState};
use crate::error::Result;
use crate::layer::Condition;
use crate::vfs::File;
use std::path::Path;

/// Checks the registry of an image that has one.
pub(super) fn check(report: &mut Report, file: &dyn File, path: &Path, image: &mut Image) -> Result<()> {
    let decision = &image.inspection.decision;
    let Some((superblock, _)) = decision.superblock else { return Ok(()) };
    let Ok(registry) = Children::of(file, path) else { return Ok(()) };
    let state = registry.state()?;
    let children = match &state {
        RegistryState::Sound(children) => children.len(),
        RegistryState::Damaged(at, registry) => {
            report.add(Code::RegistryDamaged, "registry of children", *at, "this copy of two cannot be read");
            registry.children.len()
        }
        RegistryState::Lost([at, _]) => {
            report.add(Code::RegistryLost, "registry of children", *at, "neither copy can be read");
            0
        }
    };
    let lineage = &superblock.lineage;
    if decision.condition == Condition::Clean
        && children > 0
        && !lineage.is_sealed()
        && !lineage.has_snapshot_under_way()
    {
        let what = format!("{children} disks were made over it, and it is not sealed");
        report.add(Code::SealLost, "superblock", crate::ext::SUPERBLOCK_OFFSETS[0], what);
    }
    image.registry = Some(state);
    Ok(())
}
