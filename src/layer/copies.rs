//! Structures that were not valid while another copy of them was, in words for whoever opens the image.

use super::headers::{Condition, Decision, Headers};
use crate::error::FormatError;
use crate::ext::{SUPERBLOCK_OFFSETS, Superblock, SuperblockError};
use crate::vfs::{File, FileExt};
use crate::vhd::Footer;

/// What was taken from another copy than usual. That the start of the file was is told elsewhere.
pub(super) fn stand_ins(file: &dyn File, headers: &Headers, decision: &Decision) -> Vec<String> {
    let mut told = Vec::new();
    // A footer is at the end of a closed image alone.
    if decision.condition == Condition::Clean
        && let (Ok((front, _)), Err(error)) = (&headers.front, &headers.end)
        && !ends_short(file, headers.file_bytes, front)
    {
        told.push(format!("the footer at the end is not valid ({error}): its copy at the start counts"));
    }
    // The superblocks of a session that begins are not what was found.
    let found = decision
        .superblock
        .filter(|(superblock, _)| !(superblock.is_temporary() && decision.condition == Condition::Clean));
    match found {
        Some((_, index)) => {
            let [current, other] = [index.min(1), 1 - index.min(1)];
            let [current_at, other_at] =
                [current, other].map(|i| headers.superblock_offsets().get(i).copied());
            if let (Some(current_at), Some(other_at)) = (current_at, other_at)
                && let Some(error) = headers.superblocks.get(other).and_then(|s| misfit(s, &decision.footer))
            {
                told.push(format!("the superblock at offset {other_at} is not valid ({error}): the one at {current_at} counts"));
            }
        }
        None if headers.superblocks.iter().any(stands_there) => {
            let what = both_misfits(headers, &decision.footer, SUPERBLOCK_OFFSETS);
            told.push(format!(
                "neither superblock is valid ({what}): it is taken for an image made elsewhere"
            ));
        }
        None => {}
    }
    told
}

/// Why neither superblock, at these offsets, is one of the disk that `footer` describes.
pub(super) fn both_misfits(headers: &Headers, footer: &Footer, offsets: [u64; 2]) -> String {
    let misfits = headers
        .superblocks
        .iter()
        .zip(offsets)
        .filter_map(|(superblock, at)| Some(format!("at offset {at}: {}", misfit(superblock, footer)?)));
    misfits.collect::<Vec<_>>().join("; ")
}

/// What is wrong with a superblock.
fn misfit(superblock: &Result<Superblock, SuperblockError>, footer: &Footer) -> Option<FormatError> {
    match superblock {
        Ok(superblock) if superblock.disk_id == footer.unique_id => None,
        Ok(superblock) => {
            let (found, expected) = (superblock.disk_id, footer.unique_id);
            Some(FormatError::new("superblock", "disk id", 16, found, expected))
        }
        Err(SuperblockError::Invalid(error) | SuperblockError::Newer { error, .. }) => Some(error.clone()),
    }
}

/// Whether there was a superblock at some time.
fn stands_there(superblock: &Result<Superblock, SuperblockError>) -> bool {
    !matches!(superblock, Err(SuperblockError::Invalid(error)) if error.field == "magic")
}

/// Whether the file ends with a footer that lacks its last byte, as Virtual PC wrote before 2004.
pub(crate) fn ends_short(file: &dyn File, file_bytes: u64, front: &Footer) -> bool {
    let mut bytes = [0; Footer::SIZE];
    let at = file_bytes.saturating_sub(Footer::SIZE as u64 - 1);
    file.read_or_zero_at(&mut bytes, at).is_ok() && bytes == front.to_bytes()
}
