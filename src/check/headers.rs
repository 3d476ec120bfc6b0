//! The fixed structures: which copies are there, and whether they agree.

use super::code::Code;
use super::footer;
use super::report::Report;
use crate::ext::{HEADER_BACKUP_OFFSET, SUPERBLOCK_OFFSETS, SuperblockError};
use crate::layer::{Condition, Decision, Headers, ends_short};
use crate::vfs::{File, FileExt};
use crate::vhd::{DynamicHeader, Footer, HeaderCookie, SECTOR};

/// So far before the end of the file the footer is looked for.
const MAX_JUNK_BYTES: u64 = 64 << 10;

/// Judges what [`Headers::decide`] has chosen from.
pub(super) fn check(report: &mut Report, file: &dyn File, headers: &Headers, decision: &Decision) {
    check_copies(report, file, headers, decision);
    check_superblocks(report, headers, decision);
    if decision.condition != Condition::Clean {
        let what = match decision.condition {
            Condition::HalfClosed => "its close was cut short; nothing is missing",
            _ => "its journal is judged as if replayed",
        };
        report.add(Code::NotClosed, "dynamic header", decision.footer.data_offset, what);
    }
    if let Some(unreplayed) = &decision.unreplayed {
        let what = format!("it was never brought in place: {}", unreplayed.what);
        report.add(Code::JournalNotReplayed, "journal ring", unreplayed.ring_offset, what);
    }
    footer::check(report, &decision.footer, 0);
    let header = &decision.header;
    if header.reserved1 != 0 || header.reserved2.iter().any(|&byte| byte != 0) {
        report.add(Code::ReservedBytes, "dynamic header", decision.footer.data_offset, "they are not zero");
    }
    let blocks = decision.footer.current_size.div_ceil(header.block_size.max(1).into());
    if u64::from(header.max_table_entries) > blocks {
        let what = format!("{} entries for {blocks} blocks", header.max_table_entries);
        report.add(Code::ExtraEntries, "dynamic header", decision.footer.data_offset + 28, what);
    }
}

fn check_copies(report: &mut Report, file: &dyn File, headers: &Headers, decision: &Decision) {
    let end_at = headers.file_bytes.saturating_sub(Footer::SIZE as u64);
    match &headers.front {
        Err((at, error)) => report.add(Code::FrontDamaged, "start of the file", *at, error.to_string()),
        Ok((front, _)) if decision.condition == Condition::Clean => match &headers.end {
            Ok(end) if end.to_bytes() != front.to_bytes() => {
                let counts = match decision.footer.to_bytes() == front.to_bytes() {
                    true => "the copy at the start counts",
                    false => "the footer at the end counts",
                };
                report.add(Code::FootersDiffer, "footer", end_at, counts);
            }
            Ok(_) => {}
            Err(error) => match ends_short(file, headers.file_bytes, front) {
                true => report.add(Code::FooterShort, "footer", end_at + 1, "it has 511 bytes"),
                false => {
                    let what = match behind_which_junk(file, end_at, front) {
                        Some(at) => {
                            let junk = headers.file_bytes - at - Footer::SIZE as u64;
                            format!(
                                "it stands at offset {at}, and {junk} bytes behind it: other programs look for it at the end"
                            )
                        }
                        None => error.to_string(),
                    };
                    report.add(Code::FooterDamaged, "footer", end_at, what);
                }
            },
        },
        Ok(_) => {}
    }
    if decision.superblock.is_none() || decision.front_lost {
        return;
    }
    match &headers.backup {
        Err(error) => {
            report.add(
                Code::BackupDamaged,
                "header backup",
                headers.base + HEADER_BACKUP_OFFSET,
                error.to_string(),
            );
        }
        Ok((footer, header)) if !is_copy(footer, header, decision) => {
            let what = "it is not the same as the start of the file";
            report.add(Code::BackupOutdated, "header backup", headers.base + HEADER_BACKUP_OFFSET, what);
        }
        Ok(_) => {}
    }
}

/// Where the footer stands if something was appended to the file, as far as that is short.
fn behind_which_junk(file: &dyn File, end_at: u64, front: &Footer) -> Option<u64> {
    let start = end_at.saturating_sub(MAX_JUNK_BYTES).max(SECTOR).next_multiple_of(SECTOR);
    let mut bytes = vec![0; usize::try_from((end_at + SECTOR).checked_sub(start)?).ok()?];
    file.read_or_zero_at(&mut bytes, start).ok()?;
    let sectors = bytes.chunks_exact(Footer::SIZE);
    let last = (0..).zip(sectors).filter(|(_, sector)| *sector == front.to_bytes()).last();
    last.map(|(number, _): (u64, _)| start + number * SECTOR)
}

/// Whether a backup is what it is a backup of.
pub(super) fn is_copy(footer: &Footer, header: &DynamicHeader, decision: &Decision) -> bool {
    header.cookie == HeaderCookie::Normal
        && footer.to_bytes() == decision.footer.to_bytes()
        && header.to_bytes() == decision.header.to_bytes()
}

fn check_superblocks(report: &mut Report, headers: &Headers, decision: &Decision) {
    let Some((current, _)) = decision.superblock else {
        return check_lost_superblocks(report, headers, decision);
    };
    let mut sequences = Vec::new();
    for (superblock, at) in headers.superblocks.iter().zip(headers.superblock_offsets()) {
        match superblock {
            Ok(superblock) if superblock.disk_id == decision.footer.unique_id => {
                sequences.push(superblock.sequence);
            }
            Ok(superblock) => {
                let what = format!("it belongs to disk {}", superblock.disk_id);
                report.add(Code::SuperblockDamaged, "superblock", at, what);
            }
            Err(SuperblockError::Invalid(error) | SuperblockError::Newer { error, .. }) => {
                report.add(Code::SuperblockDamaged, "superblock", at, error.to_string());
            }
        }
    }
    if let [a, b] = sequences.as_slice()
        && a == b
    {
        report.add(
            Code::SuperblockSequence,
            "superblock",
            headers.superblock_offsets()[0],
            format!("both have {a}"),
        );
    }
    if current.sync_failed {
        report.add(Code::SyncFailed, "superblock", headers.superblock_offsets()[0], "the mark is set");
    }
}

/// Without superblocks an image is an ordinary VHD. Whether it had them, the backup tells, and what is left of them.
fn check_lost_superblocks(report: &mut Report, headers: &Headers, decision: &Decision) {
    let at = SUPERBLOCK_OFFSETS[0];
    let is_ours = matches!(&headers.backup, Ok((footer, header))
        if footer.unique_id == decision.footer.unique_id && header.table_offset == decision.header.table_offset);
    if is_ours {
        return report.add(Code::SuperblocksLost, "superblock", at, "neither of the two is valid");
    }
    if let Some(superblock) = headers.superblocks.iter().flatten().next() {
        let what = format!("they belong to disk {}", superblock.disk_id);
        report.add(Code::SuperblockOther, "superblock", at, what);
    }
}
