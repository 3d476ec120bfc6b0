//! What each guest operation costs in operations on the file, counted exactly on the simulated medium.
//!
//! The budget: an overwrite and a write to a new block are one write; a small flush is one durable write to the journal's
//! ring; a full flush is one sync, and one durable write where maps changed or a data or zero record is live; a flush of
//! overwrites alone is one or the other; a flush with nothing to do is nothing. A new block costs at most 2.1 writes, the checkpoint
//! that brings its metadata in place included. Reads are counted apart: a small flush reads back what it journals, and a differencing
//! disk reads what it copies up.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cowvhd::check::{Consent, repair};
use cowvhd::sim::{Counts, SimVfs};
use cowvhd::vfs::Vfs;
use cowvhd::{CreateOptions, Disk, OpenOptions, ZeroMode};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

const GIB: u64 = 1 << 30;
const BLOCK: u64 = 2 << 20;
const TABLE: u64 = 3 << 20;
const SLOTS: u64 = 7 << 20;
const STRIDE: u64 = BLOCK + 4096;
const SMALL: [u8; 4096] = [0xa5; 4096];
/// So many small requests are more data than a flush puts into the journal.
const MANY: u64 = 64;

const NOTHING: Counts =
    Counts { writes: 0, durable_writes: 0, syncs: 0, reads: 0, punches: 0, set_lengths: 0, shares: 0 };
const ONE_WRITE: Counts = Counts { writes: 1, ..NOTHING };
const ONE_READ: Counts = Counts { reads: 1, ..NOTHING };
/// Reads back one piece of data and puts it into the journal.
const SMALL_FLUSH: Counts = Counts { durable_writes: 1, reads: 1, ..NOTHING };
const SYNC_AND_ENTRY: Counts = Counts { durable_writes: 1, syncs: 1, ..NOTHING };
const SYNC_ALONE: Counts = Counts { syncs: 1, ..NOTHING };

const PATH: &str = "/disk.vhd";

/// The ring of an image made here.
const RING: Range<usize> = (256 << 10)..(256 << 10) + (2 << 20);

struct Guest {
    vfs: SimVfs,
    disk: Disk,
}

fn open(vfs: &SimVfs) -> Disk {
    OpenOptions::new().vfs(Arc::new(vfs.clone())).open(Path::new(PATH)).unwrap()
}

impl Guest {
    /// A new disk of 1 GiB, of the shape that users get.
    fn new() -> Self {
        let vfs = SimVfs::new(1);
        CreateOptions::new(GIB).vfs(Arc::new(vfs.clone())).create(Path::new(PATH)).unwrap();
        let disk = open(&vfs);
        Guest { vfs, disk }
    }

    /// A disk whose first blocks hold data, all of it flushed by a sync, so that no data record is live.
    fn with_blocks() -> Self {
        let guest = Guest::new();
        guest.write_to_blocks(0..MANY);
        guest.disk.flush().unwrap();
        guest
    }

    /// A differencing disk of the same size. Its parent holds data in the first blocks, each of them in its second MiB.
    fn over_parent() -> Self {
        let guest = Guest::new();
        guest.disk.close().unwrap();
        let vfs = guest.vfs;
        let shared = || Arc::new(vfs.clone());
        let parent = Path::new("/parent.vhd");
        CreateOptions::new(GIB).vfs(shared()).create(parent).unwrap();
        let disk = OpenOptions::new().vfs(shared()).open(parent).unwrap();
        (0..MANY).for_each(|block| disk.write_at(&[7; 1 << 20], block * BLOCK + (1 << 20)).unwrap());
        disk.close().unwrap();
        vfs.remove(Path::new(PATH)).unwrap();
        CreateOptions::child_of(parent).vfs(shared()).create(Path::new(PATH)).unwrap();
        let disk = open(&vfs);
        Guest { vfs, disk }
    }

    /// What `work` changes on the medium and in the cache lies in these bytes of the file.
    fn changes_only(&self, range: Range<usize>, work: impl FnOnce(&Disk)) {
        let before = self.vfs.content(Path::new(PATH)).unwrap();
        work(&self.disk);
        let after = self.vfs.content(Path::new(PATH)).unwrap();
        assert_eq!(before.len(), after.len());
        assert!(before[..range.start] == after[..range.start], "something in front of it has changed");
        assert!(before[range.clone()] != after[range.clone()], "nothing has changed");
        assert!(before[range.end..] == after[range.end..], "something behind it has changed");
    }

    fn write(&self, offset: u64) {
        self.disk.write_at(&SMALL, offset).unwrap();
    }

    fn write_to_blocks(&self, blocks: Range<u64>) {
        blocks.into_iter().for_each(|block| self.write(block * BLOCK));
    }

    /// What `work` asks of the file.
    fn cost(&self, work: impl FnOnce(&Disk)) -> Counts {
        let before = self.vfs.counts();
        work(&self.disk);
        let after = self.vfs.counts();
        Counts {
            writes: after.writes - before.writes,
            durable_writes: after.durable_writes - before.durable_writes,
            syncs: after.syncs - before.syncs,
            reads: after.reads - before.reads,
            punches: after.punches - before.punches,
            set_lengths: after.set_lengths - before.set_lengths,
            shares: after.shares - before.shares,
        }
    }

    fn cost_of_flush(&self) -> Counts {
        self.cost(|disk| disk.flush().unwrap())
    }
}

#[test]
fn an_overwrite_is_one_write_and_its_flush_one_sync() {
    let guest = Guest::with_blocks();
    for request in 0..20 {
        assert_eq!(guest.cost(|_| guest.write(request * 4096)), ONE_WRITE);
        assert_eq!(guest.cost_of_flush(), SYNC_ALONE);
    }
}

#[test]
fn overwrites_are_journaled_while_data_is_live_and_not_for_ever() {
    let guest = Guest::with_blocks();
    guest.write(MANY * BLOCK);
    assert_eq!(guest.cost_of_flush(), SMALL_FLUSH);
    for _ in 0..8 {
        guest.write(0);
        assert_eq!(guest.cost_of_flush(), SMALL_FLUSH, "a sync would need an entry, too");
    }
    guest.write(0);
    assert_eq!(guest.cost_of_flush(), SYNC_AND_ENTRY, "retires the data");
    guest.write(0);
    assert_eq!(guest.cost_of_flush(), SYNC_ALONE);
}

#[test]
fn a_write_into_a_hole_of_a_new_block_is_journaled_once() {
    let guest = Guest::with_blocks();
    let block = MANY * BLOCK;
    guest.write(block);
    assert_eq!(guest.cost_of_flush(), SMALL_FLUSH);
    for page in 1..20 {
        guest.write(block + page * 4096);
        assert_eq!(guest.cost_of_flush(), SMALL_FLUSH, "the file system has no space there yet");
    }
    (0..8).for_each(|page| {
        guest.write(block + page * 4096);
        guest.cost_of_flush();
    });
    guest.write(block + 4096);
    assert_eq!(guest.cost_of_flush(), SYNC_AND_ENTRY, "now it has");
}

#[test]
fn a_write_to_a_new_block_is_one_write_and_its_flush_one_durable_write() {
    let guest = Guest::with_blocks();
    let mut growths = 0;
    for block in MANY..MANY + 40 {
        let cost = guest.cost(|_| guest.write(block * BLOCK));
        growths += cost.set_lengths;
        assert_eq!(Counts { set_lengths: 0, ..cost }, ONE_WRITE);
        assert_eq!(guest.cost_of_flush(), SMALL_FLUSH, "the map change travels with the data");
    }
    assert_eq!(growths, 5, "the file grows by an eighth at a time");
}

#[test]
fn a_write_over_several_blocks_is_one_write_to_each() {
    let guest = Guest::with_blocks();
    let cost = guest.cost(|disk| disk.write_at(&vec![1; 4 << 20], BLOCK / 2).unwrap());
    assert_eq!(cost, Counts { writes: 3, ..NOTHING });
}

#[test]
fn a_read_is_one_read_or_none() {
    let guest = Guest::with_blocks();
    let read = |offset| guest.cost(|disk| disk.read_at(&mut [0; 4096], offset).unwrap());
    assert_eq!(read(0), ONE_READ);
    assert_eq!(read(512 << 20), NOTHING, "an absent block");
}

#[test]
fn a_flush_with_nothing_to_do_is_nothing() {
    let guest = Guest::new();
    assert_eq!(guest.cost_of_flush(), NOTHING, "just opened");
    guest.write(0);
    assert_eq!(guest.cost_of_flush(), SMALL_FLUSH);
    assert_eq!(guest.cost_of_flush(), NOTHING, "after a small flush");
    guest.write_to_blocks(0..MANY);
    assert_eq!(guest.cost_of_flush(), SYNC_AND_ENTRY);
    assert_eq!(guest.cost_of_flush(), NOTHING, "after a full flush");
    guest.disk.read_at(&mut [0; 4096], 0).unwrap();
    assert_eq!(guest.cost_of_flush(), NOTHING, "after a read");
}

#[test]
fn a_small_flush_of_many_pieces_is_one_durable_write() {
    let guest = Guest::with_blocks();
    guest.write_to_blocks(MANY..MANY + 20);
    assert_eq!(guest.cost_of_flush(), Counts { reads: 20, ..SMALL_FLUSH });
    (1..20).for_each(|piece| guest.write(MANY * BLOCK + piece * 4096));
    assert_eq!(guest.cost_of_flush(), SMALL_FLUSH, "pieces that touch are read back as one");
}

#[test]
fn a_full_flush_is_a_sync_where_maps_did_not_change() {
    let guest = Guest::with_blocks();
    for _ in 0..3 {
        guest.write_to_blocks(0..MANY);
        assert_eq!(guest.cost_of_flush(), SYNC_ALONE);
    }
}

#[test]
fn a_full_flush_writes_an_entry_where_maps_changed() {
    let guest = Guest::with_blocks();
    guest.write_to_blocks(MANY..2 * MANY);
    assert_eq!(guest.cost_of_flush(), SYNC_AND_ENTRY);
    guest.write_to_blocks(0..MANY);
    assert_eq!(
        guest.cost(|disk| disk.discard(0, BLOCK).unwrap()),
        NOTHING,
        "freeing a block waits for the flush"
    );
    assert_eq!(guest.cost_of_flush(), SYNC_AND_ENTRY);
}

#[test]
fn a_full_flush_writes_an_entry_where_a_data_record_is_live() {
    let guest = Guest::with_blocks();
    guest.write(MANY * BLOCK);
    assert_eq!(guest.cost_of_flush(), SMALL_FLUSH);
    guest.write_to_blocks(0..MANY);
    assert_eq!(guest.cost_of_flush(), SYNC_AND_ENTRY, "or a crash would replay the old data");
    guest.write_to_blocks(0..MANY);
    assert_eq!(guest.cost_of_flush(), SYNC_ALONE, "it is retired now");
}

#[test]
fn a_full_flush_writes_an_entry_where_a_zero_record_is_live() {
    let guest = Guest::with_blocks();
    let punch = guest.cost(|disk| disk.discard(8192, 4096).unwrap());
    assert_eq!(punch, Counts { punches: 1, ..NOTHING });
    assert_eq!(guest.cost_of_flush(), Counts { durable_writes: 1, ..NOTHING }, "zeros are not read back");
    guest.write_to_blocks(0..MANY);
    assert_eq!(guest.cost_of_flush(), SYNC_AND_ENTRY);
    guest.write_to_blocks(0..MANY);
    assert_eq!(guest.cost_of_flush(), SYNC_ALONE);
}

#[test]
fn zeros_cost_a_punch_or_a_write_and_a_freed_block_nothing_before_its_flush() {
    let guest = Guest::with_blocks();
    let zeroes = |offset, length, mode| guest.cost(|disk| disk.write_zeroes(offset, length, mode).unwrap());
    assert_eq!(zeroes(0, 4096, ZeroMode::KeepAllocated), ONE_WRITE);
    assert_eq!(zeroes(0, 4096, ZeroMode::MayPunch), Counts { punches: 1, ..NOTHING });
    assert_eq!(zeroes(BLOCK, BLOCK, ZeroMode::MayPunch), NOTHING);
    assert_eq!(zeroes(512 << 20, 1 << 20, ZeroMode::MayPunch), NOTHING, "an absent block");
}

/// 64 new blocks on a new disk, one flush, and a close, which checkpoints everything. What a close costs beyond the
/// checkpoint, once for a session and not for each block: the footer, a superblock and the header's cookie.
#[test]
fn a_new_block_costs_at_most_two_writes_and_a_tenth_with_its_checkpoint() {
    let guest = Guest::new();
    let data = guest.cost(|_| guest.write_to_blocks(0..MANY));
    assert_eq!(data, Counts { writes: 64, set_lengths: 29, ..NOTHING });
    let flush = guest.cost_of_flush();
    assert_eq!(flush, SYNC_AND_ENTRY);

    let close = guest.cost(|disk| disk.close().unwrap());
    // In place: each block's page and one page of the block table; and the footer.
    let in_place = MANY + 1;
    // Into the ring: the image of the table's page, and the tails. Then a superblock and the header's cookie.
    let ring = 2;
    assert_eq!(
        close,
        Counts { writes: in_place + 1, durable_writes: ring + 2, syncs: 3, set_lengths: 1, ..NOTHING }
    );

    let writes = data.writes + flush.durable_writes + in_place + ring;
    assert_eq!(writes, 132);
    assert!(writes * 10 <= MANY * 21, "{writes} writes for {MANY} blocks");
}

#[test]
fn an_open_is_four_durable_writes_and_a_sync_and_the_first_touch_of_a_block_one_read() {
    let mut guest = Guest::with_blocks();
    guest.disk.close().unwrap();
    let before = guest.vfs.counts();
    guest.disk = open(&guest.vfs);
    let after = guest.vfs.counts();
    assert_eq!(after.writes - before.writes, 1, "zeros where the footer was");
    assert_eq!(
        after.durable_writes - before.durable_writes,
        4,
        "the header backup, two superblocks, the header"
    );
    assert_eq!(after.syncs - before.syncs, 1);
    assert_eq!(after.set_lengths - before.set_lengths, 1);

    let read = |offset| guest.cost(|disk| disk.read_at(&mut [0; 4096], offset).unwrap());
    assert_eq!(read(0), Counts { reads: 2, ..NOTHING });
    assert_eq!(read(4096), ONE_READ);
    assert_eq!(guest.cost(|_| guest.write(BLOCK)), Counts { reads: 1, ..ONE_WRITE });
}

/// The durable writes that the budget speaks of go to the ring, and nothing else of the file changes.
#[test]
fn a_flush_writes_to_the_ring_and_nowhere_else() {
    let guest = Guest::new();
    guest.write(0);
    guest.changes_only(RING, |disk| assert_eq!(guest.cost(|_| disk.flush().unwrap()), SMALL_FLUSH));
    guest.write(0);
    guest.disk.write_at(&[3; 256 << 10], BLOCK).unwrap();
    guest.changes_only(RING, |disk| assert_eq!(guest.cost(|_| disk.flush().unwrap()), SYNC_AND_ENTRY));
}

/// More new blocks than the ring has room for at a time, a flush after each 64: every operation of the session counts, from the
/// first write to the end of the close.
#[test]
fn a_new_block_costs_at_most_two_writes_and_a_tenth_in_a_long_session() {
    const BLOCKS: u64 = 512 * 1024;
    const SMALL_BLOCK: u64 = 4096;
    let vfs = SimVfs::new(1);
    let create = CreateOptions::new(BLOCKS * SMALL_BLOCK).vfs(Arc::new(vfs.clone()));
    create.test_geometry(SMALL_BLOCK as u32, 2 << 20).create(Path::new(PATH)).unwrap();
    let guest = Guest { disk: open(&vfs), vfs };
    let new_blocks = 32 * 1024;
    let cost = guest.cost(|disk| {
        for block in 0..new_blocks {
            disk.write_at(&SMALL, block * SMALL_BLOCK).unwrap();
            if block % 64 == 63 {
                disk.flush().unwrap();
            }
        }
        disk.close().unwrap();
    });
    let writes = cost.writes + cost.durable_writes;
    assert!(writes * 10 <= new_blocks * 21, "{writes} writes for {new_blocks} blocks");
    // Data, each block's page, each of the table's pages, and the footer.
    assert_eq!(cost.writes, new_blocks + new_blocks + 32 + 1);
    // Two checkpoints, one when the ring is full and one at the close: images of the table's pages, and the tails. Then a superblock
    // and the header.
    let flushes = new_blocks / 64;
    assert_eq!((cost.durable_writes, cost.syncs, cost.reads), (flushes + 2 * 2 + 2, flushes + 4, 0));
}

#[test]
fn in_a_differencing_disk_a_write_is_one_write_and_what_it_copies_up_is_read() {
    let guest = Guest::over_parent();
    // So many that the ring has room for all of it.
    for block in 0..16 {
        let (zeros, data) = (block * BLOCK, block * BLOCK + (1 << 20));
        let write = |length, offset| guest.cost(|disk| disk.write_at(&vec![1; length], offset).unwrap());
        // A new block.
        let cost = write(4096, zeros);
        assert_eq!(Counts { set_lengths: 0, ..cost }, ONE_WRITE, "whole units bring nothing up");
        assert_eq!(guest.cost_of_flush(), SMALL_FLUSH, "alloc, bits and data in one entry");
        // Absent units of it: the parent's block is touched for the first time, then it is known.
        assert_eq!(write(512, data + 512), Counts { reads: 3, ..ONE_WRITE });
        assert_eq!(write(512, data + 4096 + 512), Counts { reads: 1, ..ONE_WRITE });
        assert_eq!(write(512, data + 2 * 4096), Counts { reads: 1, ..ONE_WRITE });
        assert_eq!(write(512, data + 4 * 4096 - 512), Counts { reads: 1, ..ONE_WRITE });
        let both_ends = write(3 * 4096, data + 5 * 4096 + 512);
        assert_eq!(both_ends, Counts { writes: 3, reads: 2, ..NOTHING }, "both ends, and what is between");
        assert_eq!(write(512, data + 512), ONE_WRITE, "a unit that is here");
        let flush = guest.cost_of_flush();
        assert_eq!(Counts { reads: 0, ..flush }, Counts { durable_writes: 1, ..NOTHING });
    }
    // A part of a unit where the parent has no block.
    let write = |offset| guest.cost(|disk| disk.write_at(&[1; 512], offset).unwrap());
    let cost = Counts { set_lengths: 0, ..write(MANY * BLOCK + 512) };
    assert_eq!(cost, Counts { reads: 1, ..ONE_WRITE }, "the parent's table");
    assert_eq!(write(MANY * BLOCK + 8192 + 512), ONE_WRITE, "zeros are not read");
}

#[test]
fn a_full_flush_of_a_differencing_disk_is_a_sync_and_an_entry_where_bits_changed() {
    let guest = Guest::over_parent();
    guest.write_to_blocks(0..MANY);
    assert_eq!(guest.cost_of_flush(), SYNC_AND_ENTRY);
    for _ in 0..3 {
        guest.write_to_blocks(0..MANY);
        assert_eq!(guest.cost_of_flush(), SYNC_ALONE, "units that are here");
    }
    (0..MANY).for_each(|block| guest.write(block * BLOCK + 8192));
    assert_eq!(guest.cost_of_flush(), SYNC_AND_ENTRY, "more units of blocks that are here");
}

#[test]
fn a_new_block_of_a_differencing_disk_costs_no_more_and_bits_in_an_old_one_an_image_of_its_page() {
    let mut guest = Guest::over_parent();
    let work = |disk: &Disk, at: u64| {
        (0..MANY).for_each(|block| disk.write_at(&SMALL, block * BLOCK + at).unwrap());
        disk.flush().unwrap();
    };
    let session = guest.cost(|disk| work(disk, 0));
    assert_eq!((session.writes, session.durable_writes, session.syncs), (MANY, 1, 1));
    let close = guest.cost(|disk| disk.close().unwrap());
    // In place each block's page, one of the table, and the footer; in the ring the image of the table's page and the tails, then a
    // superblock and the header.
    assert_eq!((close.writes, close.durable_writes, close.syncs), (MANY + 2, 4, 3));
    assert!((session.writes + session.durable_writes + MANY + 1 + 2) * 10 <= MANY * 21);

    guest.disk = open(&guest.vfs);
    let session = guest.cost(|disk| work(disk, 8192));
    assert_eq!((session.writes, session.durable_writes, session.syncs), (MANY, 1, 1));
    let close = guest.cost(|disk| disk.close().unwrap());
    assert_eq!(
        (close.writes, close.durable_writes, close.syncs),
        (MANY + 1, 4, 3),
        "one entry holds the images"
    );
}

/// A repair saves what steps replace that are planned together with one write of each run and one sync, not page by page; an open
/// that recovers the image is one step. All that it saves is what changes.
#[test]
fn a_repair_saves_what_it_replaces_at_once() {
    let repaired = |closed: bool, damage: &[(u64, usize)]| {
        let Guest { vfs, disk } = Guest::with_blocks();
        match closed {
            true => disk.close().unwrap(),
            false => {
                // Of blocks that have their page in place already.
                (0..MANY).for_each(|block| disk.write_at(&SMALL, block * BLOCK + 8192).unwrap());
                disk.flush().unwrap();
            }
        }
        drop(disk);
        damage.iter().for_each(|&(at, length)| vfs.corrupt(Path::new(PATH), at, &vec![0; length]));
        let shared = || Arc::new(vfs.clone());
        let before = vfs.counts();
        let undo = Path::new("/undo");
        let repaired = repair(shared(), Path::new(PATH), Consent::All, undo).unwrap();
        assert!(repaired.is_sound(), "{:?}", repaired.after.findings());
        let after = vfs.counts();
        let saved = vfs.content(undo).unwrap().len();
        (repaired.steps.len(), after.syncs - before.syncs, after.writes - before.writes, saved)
    };
    // Steps, syncs, writes, and bytes of the undo file: header, records and their ends in pages of 4 KiB.
    let slots: Vec<_> = (0..MANY).map(|slot| (SLOTS + slot * STRIDE, 4096)).collect();
    assert_eq!(repaired(true, &[(TABLE, 4096)]), (2, 10, 12, 49184), "a page of the table");
    assert_eq!(repaired(true, &slots), (3, 11, 142, 53280), "all block pages");
    assert_eq!(repaired(false, &[]), (2, 13, 142, 36896), "not closed");
    assert_eq!(repaired(false, &[(4096, 4096)]), (2, 13, 144, 32800), "not closed, a superblock");
    assert_eq!(repaired(false, &[(TABLE, 4096)]), (5, 17, 146, 36896), "not closed, a page of the table");
}
