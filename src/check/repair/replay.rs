//! A cookie that somebody turned back over a journal: the journal is made to count again, where it fits the file as it stands.
//!
//! Nobody knows whether another program wrote in between; so it is no safe step, and none at all where it would show: where blocks
//! contradict each other after the replay, or a block that another program has placed would be gone. What an open then does,
//! which is the next step, is the same as after a crash.

use super::superblocks::next_superblock;
use super::{Target, Work};
use crate::check::code::Code;
use crate::check::image::{self, Image};
use crate::check::report::Report;
use crate::check::shadow::Shadow;
use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::layer::{self, Condition};
use crate::sync::Arc;
use crate::vfs::{File, FileExt};
use crate::vhd::{self, DynamicHeader, HeaderCookie};

/// What can be done about it.
pub(super) fn works(image: &Image, report: &Report, target: &Target<'_>) -> Result<Vec<Work>> {
    let decision = &image.inspection.decision;
    let (Some(unreplayed), Ok((footer, header))) = (&decision.unreplayed, &image.inspection.headers.front)
    else {
        return Ok(Vec::new());
    };
    if footer.data_offset != layer::HEADER_OFFSET || report.count(Code::FootersDiffer) > 0 {
        return Ok(Vec::new());
    }
    let data_offset = if unreplayed.base == 0 { header.data_offset } else { unreplayed.base };
    let dirty = DynamicHeader { cookie: HeaderCookie::Dirty, data_offset, ..header.clone() };
    let Some(replayed) = replayed(target, &dirty)? else { return Ok(Vec::new()) };

    let off_grid =
        |image: &Image, entry: u32| entry != vhd::UNALLOCATED && image.place().slot_index(entry).is_none();
    let mut works = Vec::new();
    // Until somebody else wrote to it, one made here has no block off the grid, or says so.
    let alone = decision.superblock.is_some_and(|(superblock, _)| !superblock.foreign_blocks);
    // As they stand in the file: that the headers of the last close prove another table is no evidence against who came later.
    let entries = || vhd::bat::entries(&image.inspection.table);
    if alone && entries().any(|entry| off_grid(image, entry)) {
        let is_kept = |(before, &after): (u32, &u32)| !off_grid(image, before) || before == after;
        let all = entries().zip(&replayed.entries).all(is_kept);
        if !all && !defect::active(Defect::ReplayOverOthers) {
            return Ok(Vec::new());
        }
        works.push(Work {
            what: "note in the superblock that another program has placed blocks".into(),
            writes: next_superblock(image, |superblock| superblock.foreign_blocks = true),
            ..Work::default()
        });
    }
    works.push(Work {
        what: format!("turn the cookie to dirty again, so that the journal counts ({})", unreplayed.what),
        writes: vec![(layer::HEADER_OFFSET, dirty.to_bytes().to_vec())],
        ..Work::default()
    });
    Ok(works)
}

/// The image as it would be with this header, if that is one that an open recovers, or a repair if its journal has a gap.
fn replayed(target: &Target<'_>, dirty: &DynamicHeader) -> Result<Option<Image>> {
    let io = |error| Error::io(target.path, "looking at the image", error);
    let view: Arc<dyn File> = Arc::new(Shadow::new(Arc::clone(&target.file)).map_err(io)?);
    view.write_all_at(&dirty.to_bytes(), layer::HEADER_OFFSET).map_err(io)?;
    let examined = image::examine(Arc::clone(&target.vfs), view, target.path)?;
    Ok(examined.image.filter(|image| {
        let has_gap = image.inspection.journal.is_some();
        image.inspection.decision.condition == Condition::Dirty
            && image.bad_entries.is_empty()
            && image.bad_pages.is_empty()
            && (!has_gap || image.place().temporary.is_none())
    }))
}
