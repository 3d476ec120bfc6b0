//! The ring of journal entries: one write in flight, entries that never wrap, space by the durable tails alone.
//!
//! Positions count bytes since the session began and only grow; a position modulo the ring's length is a place. The live
//! part reaches from the lower *durable* tail (the one that the newest durable entry names) to the head. What a tail in
//! memory would give back is not free yet: until an entry carries it to the medium, a crash still replays from the old one.

use super::scan::Scan;
use crate::defect::{self, Defect};
use crate::ext::{self, EntryHeader, EntryKind, PAGE_BYTES, Record, SessionId, Tail};
use crate::vfs::File;
use std::io;

/// A tail by sequence and position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RingTail {
    sequence: u64,
    position: u64,
}

/// Both tails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tails {
    meta: RingTail,
    data: RingTail,
}

/// What an append did.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Appended {
    /// The entry's sequence.
    pub(crate) sequence: u64,
    /// How many of the records it holds.
    pub(crate) records: usize,
}

/// The ring of one session.
#[derive(Debug)]
pub(crate) struct Ring {
    offset: u64,
    bytes: u64,
    session: SessionId,
    next_sequence: u64,
    head: u64,
    last_crc: u32,
    tails: Tails,
    durable: Tails,
    /// Sequence of the newest entry with a data or zero record; 0 for none.
    last_data: u64,
    buffer: Vec<u8>,
}

impl Ring {
    /// An empty ring at file offset `offset`, `bytes` long, for a new session.
    pub(crate) fn new(offset: u64, bytes: u64, session: SessionId) -> Self {
        let start = RingTail { sequence: 1, position: 0 };
        let tails = Tails { meta: start, data: start };
        Ring {
            offset,
            bytes,
            session,
            next_sequence: 1,
            head: 0,
            last_crc: ext::session_crc(session),
            tails,
            durable: tails,
            last_data: 0,
            buffer: Vec::new(),
        }
    }

    /// The ring of a session that ended without closing, ready to go on behind its newest entry.
    pub(crate) fn resume(offset: u64, bytes: u64, session: SessionId, scan: &Scan) -> Self {
        let mut ring = Ring::new(offset, bytes, session);
        if let Some(newest) = scan.newest() {
            // One lap ahead, so that a tail at a higher place than the newest entry lies below it.
            let newest_position = newest.place + bytes;
            let position = |tail: Tail| RingTail {
                sequence: tail.sequence,
                position: if tail.place <= newest.place { tail.place + bytes } else { tail.place },
            };
            ring.head = newest_position + newest.length;
            ring.next_sequence = newest.sequence + 1;
            ring.last_crc = newest.crc;
            ring.tails = Tails { meta: position(newest.meta_tail), data: position(newest.data_tail) };
            ring.durable = ring.tails;
        }
        ring
    }

    /// How many bytes of records one entry can hold at most.
    pub(crate) fn max_entry_bytes(&self) -> u64 {
        (self.bytes / 4 / PAGE_BYTES).clamp(2, 256) * PAGE_BYTES
    }

    /// Bytes not live.
    pub(crate) fn free_bytes(&self) -> u64 {
        let tails = if defect::active(Defect::SpaceByMemoryTails) { self.tails } else { self.durable };
        let tail = tails.meta.position.min(tails.data.position);
        self.bytes.saturating_sub(self.head - tail)
    }

    /// Map records of lower sequence are in place.
    pub(crate) fn in_place_before(&self) -> u64 {
        self.tails.meta.sequence
    }

    /// Data and zero records of lower sequence are dead, durably.
    pub(crate) fn data_dead_before(&self) -> u64 {
        self.durable.data.sequence
    }

    /// Everything appended so far has been synced in place: both tails move to the next entry, in memory.
    pub(crate) fn all_in_place(&mut self) {
        let tail = RingTail { sequence: self.next_sequence, position: self.head };
        self.tails = Tails { meta: tail, data: tail };
    }

    /// Whether a data or zero record is live according to the durable tail.
    pub(crate) fn has_live_data(&self) -> bool {
        self.last_data >= self.durable.data.sequence && self.last_data != 0
    }

    /// Whether the tails in memory are ahead of the durable ones.
    pub(crate) fn tails_pending(&self) -> bool {
        self.tails != self.durable
    }

    /// Appends one durable entry with as many leading `records` as fit while `keep_free` bytes of the ring stay free. With
    /// `data_synced` its data tail is the entry itself: a sync that began after every older data record covers them.
    /// `None` where not even the first record fits. On an error nothing of this entry counts and the ring is as before,
    /// but the medium may hold any part of it: the caller must not append anything else in this session.
    pub(crate) fn append(
        &mut self,
        file: &dyn File,
        records: &[Record<'_>],
        data_synced: bool,
        keep_free: u64,
    ) -> io::Result<Option<Appended>> {
        let first = entry_bytes(records.first().map_or(0, Record::encoded_bytes));
        let lap_rest = self.bytes - self.head % self.bytes;
        let filler = if lap_rest < first { lap_rest } else { 0 };
        let Some(room) = self.free_bytes().checked_sub(keep_free + filler).filter(|&room| room >= first)
        else {
            return Ok(None);
        };
        if filler != 0 {
            self.write(file, None, false)?;
        }
        let limit = room.min(self.max_entry_bytes()).min(self.bytes - self.head % self.bytes).max(first);
        let mut size = 0;
        let count = records
            .iter()
            .take_while(|record| {
                size += record.encoded_bytes();
                entry_bytes(size) <= limit
            })
            .count();
        let sequence = self.write(file, records.get(..count), data_synced)?;
        Ok(Some(Appended { sequence, records: count }))
    }

    /// Writes one entry (or a filler to the end of the lap) at the head; the caller has made sure of the room.
    fn write(
        &mut self,
        file: &dyn File,
        records: Option<&[Record<'_>]>,
        data_synced: bool,
    ) -> io::Result<u64> {
        let place = self.head % self.bytes;
        let mut tails = self.tails;
        if data_synced {
            tails.data = RingTail { sequence: self.next_sequence, position: self.head };
            if defect::active(Defect::OneTail) {
                tails.meta = tails.data;
            }
        }
        let header = EntryHeader {
            kind: EntryKind::Records,
            length: 0,
            session: self.session,
            sequence: self.next_sequence,
            place,
            previous_crc: self.last_crc,
            meta_tail: self.tail_on_disk(tails.meta),
            data_tail: self.tail_on_disk(tails.data),
            record_bytes: 0,
            crc: 0,
        };
        let mut buffer = std::mem::take(&mut self.buffer);
        let written = match records {
            Some(records) => ext::write_entry(header, records, &mut buffer),
            None => ext::write_filler(header, self.bytes - place, &mut buffer),
        };
        let result = file.write_durable_at(&buffer, self.offset + place);
        self.buffer = buffer;
        result?;
        self.head += written.length;
        self.next_sequence += 1;
        self.last_crc = written.crc;
        self.tails = tails;
        self.durable = tails;
        let is_data = |record: &Record<'_>| matches!(record, Record::Data { .. } | Record::Zero { .. });
        if records.unwrap_or_default().iter().any(is_data) {
            self.last_data = written.sequence;
        }
        Ok(written.sequence)
    }

    fn tail_on_disk(&self, tail: RingTail) -> Tail {
        Tail { sequence: tail.sequence, place: tail.position % self.bytes }
    }
}

/// Bytes of an entry with `record_bytes` of records.
pub(crate) fn entry_bytes(record_bytes: usize) -> u64 {
    ((ext::ENTRY_HEADER_BYTES + record_bytes) as u64).next_multiple_of(PAGE_BYTES)
}
