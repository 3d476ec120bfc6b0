//! Finding the live part of a ring after a crash.
//!
//! The whole ring is looked at; the newest entry is the valid one with the highest sequence. From the lower of the two
//! tails it names up to itself the entries must follow each other without a gap in sequence, place and CRC chain. One
//! write is in flight at a time, so a gap is no torn end but damage. A torn newest entry was never acknowledged and is not
//! seen at all; that a flipped bit in it looks the same cannot be told.

use crate::error::FormatError;
use crate::ext::{
    self, EntryHeader, EntryKind, MAX_COUNTER, PAGE_BYTES, Record, SessionId, Superblock, Tail,
};
use std::collections::BTreeMap;

/// The live entries of a ring, in order.
#[derive(Debug)]
pub(crate) struct Scan {
    ring: Vec<u8>,
    live: Vec<EntryHeader>,
}

impl Scan {
    /// The scan of a ring that holds nothing.
    pub(crate) fn empty() -> Self {
        Scan { ring: Vec::new(), live: Vec::new() }
    }

    /// Scans the bytes of a ring for the session in `superblock`.
    pub(crate) fn new(ring: Vec<u8>, superblock: &Superblock) -> Result<Self, FormatError> {
        let session = superblock.session;
        let valid = valid_entries(&ring, session);
        let Some(newest) = valid.values().max_by_key(|entry| entry.sequence).copied() else {
            // Superblocks name tails of a session only at its start, when the ring is empty.
            return Ok(Scan { ring, live: Vec::new() });
        };
        if newest.sequence > MAX_COUNTER {
            let (found, expected) = (newest.sequence, "at most 2^63 - 1");
            return Err(FormatError::new("journal ring", "sequence", newest.place, found, expected));
        }
        check_tail("meta tail", &newest, newest.meta_tail, ring.len())?;
        check_tail("data tail", &newest, newest.data_tail, ring.len())?;
        let tail = if newest.meta_tail.sequence <= newest.data_tail.sequence {
            newest.meta_tail
        } else {
            newest.data_tail
        };
        let mut live: Vec<EntryHeader> = Vec::new();
        let mut place = tail.place;
        for sequence in tail.sequence..=newest.sequence {
            let previous_crc = match live.last() {
                Some(previous) => Some(previous.crc),
                None if sequence == 1 => Some(ext::session_crc(session)),
                None => None,
            };
            let entry = valid
                .get(&place)
                .filter(|entry| entry.sequence == sequence)
                .filter(|entry| previous_crc.is_none_or(|crc| crc == entry.previous_crc));
            let Some(entry) = entry else {
                let found = "no valid entry that follows the one before";
                let expected = format!("entry {sequence}, which entry {} still needs", newest.sequence);
                return Err(FormatError::new("journal ring", "entry", place, found, expected));
            };
            live.push(*entry);
            place = (place + entry.length) % ring.len() as u64;
        }
        Ok(Scan { ring, live })
    }

    /// What can still be read of a ring with a gap: all valid entries from the lower tail on, whatever is missing between them.
    /// For a repair alone, after [`Scan::new`] has failed.
    pub(crate) fn with_gaps(ring: Vec<u8>, superblock: &Superblock) -> Self {
        let mut live: Vec<EntryHeader> = valid_entries(&ring, superblock.session).into_values().collect();
        live.retain(|entry| entry.sequence <= MAX_COUNTER);
        live.sort_by_key(|entry| entry.sequence);
        if let Some(newest) = live.last().copied() {
            let tail = newest.meta_tail.sequence.min(newest.data_tail.sequence);
            live.retain(|entry| entry.sequence >= tail);
        }
        Scan { ring, live }
    }

    /// The newest valid entry.
    pub(crate) fn newest(&self) -> Option<&EntryHeader> {
        self.live.last()
    }

    /// The records that count, in order of sequence: map records and images from the meta tail on, data and zero records
    /// from the data tail on.
    pub(crate) fn records(&self) -> Result<Vec<Record<'_>>, FormatError> {
        let Some(newest) = self.newest() else { return Ok(Vec::new()) };
        let (meta_from, data_from) = (newest.meta_tail.sequence, newest.data_tail.sequence);
        let mut records = Vec::new();
        for entry in self.live.iter().filter(|entry| entry.kind == EntryKind::Records) {
            let bytes = self.ring.get(entry.place as usize..).unwrap_or_default();
            for record in ext::parse_records(entry, bytes)? {
                let from = match record {
                    Record::Data { .. } | Record::Zero { .. } => data_from,
                    _ => meta_from,
                };
                if entry.sequence >= from {
                    records.push(record);
                }
            }
        }
        Ok(records)
    }
}

/// An entry names no record as live that is newer than itself, and none outside the ring.
fn check_tail(
    field: &'static str,
    newest: &EntryHeader,
    tail: Tail,
    ring_bytes: usize,
) -> Result<(), FormatError> {
    let wrong = |found: u64, expected: String| {
        Err(FormatError::new("journal ring", field, newest.place, found, expected))
    };
    if tail.sequence > newest.sequence {
        return wrong(tail.sequence, format!("at most its own sequence, {}", newest.sequence));
    }
    if tail.place >= ring_bytes as u64 || !tail.place.is_multiple_of(PAGE_BYTES) {
        return wrong(tail.place, format!("a page of the ring of {ring_bytes} bytes"));
    }
    Ok(())
}

/// All valid entries of the session by place.
fn valid_entries(ring: &[u8], session: SessionId) -> BTreeMap<u64, EntryHeader> {
    let mut valid = BTreeMap::new();
    let mut place = 0;
    while place < ring.len() as u64 {
        let entry = ext::parse_entry_header(session, place, ring.get(place as usize..).unwrap_or_default());
        // Behind a filler's first page older entries may stand: they are looked at and lose by their sequence.
        place += match &entry {
            Some(entry) if entry.kind == EntryKind::Records => entry.length,
            _ => PAGE_BYTES,
        };
        if let Some(entry) = entry {
            valid.insert(entry.place, entry);
        }
    }
    valid
}
