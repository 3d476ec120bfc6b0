//! Many requests and many clients at once: what waits for what, and what must not.

use crate::disk::{FLUSH, TestDisk, write_only};
use crate::raw::{Client, cmd};
use crate::serving::{MIB, Running, serve, serve_with};
use cowvhd_export::Limits;
use std::collections::HashMap;
use std::sync::Arc;

fn test_disk(size_bytes: u64) -> (Arc<TestDisk>, Running) {
    let disk = Arc::new(TestDisk::new(size_bytes));
    let server = serve(disk.clone());
    (disk, server)
}

/// Reads are fast until proven otherwise, so the first is executed by the thread that reads: this is the monitor's
/// case.
#[test]
fn a_request_that_hangs_does_not_hold_up_later_ones() {
    let (disk, server) = test_disk(MIB);
    let mut client = Client::connect(&server.path).go();
    disk.hold(0);
    client.send(0, cmd::READ, 1, 0, 512, &[]);
    disk.wait_held(0, 1);
    for cookie in 2..50 {
        client.send(0, cmd::READ, cookie, 4096, 512, &[]);
        assert_eq!(client.simple_reply(), (0, cookie));
        client.take(512);
    }
    disk.release(0);
    assert_eq!(client.simple_reply(), (0, 1));
    client.take(512);
}

#[test]
fn several_that_hang_are_answered_in_the_order_they_finish() {
    let (disk, server) = test_disk(MIB);
    let mut client = Client::connect(&server.path).go();
    let offsets: Vec<u64> = (0..8).map(|at| at * 4096).collect();
    for offset in &offsets {
        disk.hold(*offset);
        client.send(0, cmd::WRITE, *offset, *offset, 512, &[1; 512]);
        disk.wait_held(*offset, 1);
    }
    for offset in offsets.iter().rev() {
        disk.release(*offset);
        assert_eq!(client.simple_reply(), (0, *offset));
    }
}

#[test]
fn a_burst_of_slow_requests_is_executed_at_once_up_to_the_limit() {
    let limits = Limits { workers_per_connection: 5, ..Limits::default() };
    let disk = Arc::new(TestDisk::new(MIB));
    let server = serve_with(disk.clone(), limits);
    let mut client = Client::connect(&server.path).go();
    disk.hold(FLUSH);
    let burst: Vec<u8> =
        (0..20).flat_map(|cookie| crate::raw::request(0, cmd::FLUSH, cookie, 0, 0)).collect();
    client.raw(&burst);
    // Five workers, and the thread that reads.
    disk.wait_held(FLUSH, 6);
    // Another client is served all the same.
    Client::connect(&server.path).go().read(0, 512);
    assert_eq!(disk.waiting(FLUSH), 6);
    disk.release(FLUSH);
    let mut answered: Vec<u64> = (0..20).map(|_| client.simple_reply().1).collect();
    answered.sort_unstable();
    assert_eq!(answered, (0..20).collect::<Vec<_>>());
}

#[test]
fn clients_that_use_up_all_workers_do_not_stop_others() {
    let limits = Limits { workers: 4, ..Limits::default() };
    let disk = Arc::new(TestDisk::new(MIB));
    let server = serve_with(disk.clone(), limits);
    disk.hold(FLUSH);
    let mut greedy = Vec::new();
    for _ in 0..3 {
        let mut client = Client::connect(&server.path).go();
        let burst: Vec<u8> =
            (0..9).flat_map(|cookie| crate::raw::request(0, cmd::FLUSH, cookie, 0, 0)).collect();
        client.raw(&burst);
        greedy.push(client);
    }
    // Four workers and three threads that read.
    disk.wait_held(FLUSH, 7);
    let mut client = Client::connect(&server.path).go();
    client.write(0, &[1; 512]);
    assert_eq!(client.read(0, 512), [1; 512]);
    disk.release(FLUSH);
    for client in &mut greedy {
        for _ in 0..9 {
            assert_eq!(client.simple_reply().0, 0);
        }
    }
}

#[test]
fn a_flush_covers_what_was_answered_before_it_on_any_connection() {
    let (disk, server) = test_disk(64 * MIB);
    let mut writers: Vec<Client> = (0..4).map(|_| Client::connect(&server.path).go()).collect();
    let mut flusher = Client::connect(&server.path).go();
    for round in 0..50u64 {
        let offsets: Vec<u64> = (0..4).map(|at| (round * 4 + at + 1) * 4096).collect();
        for (client, offset) in writers.iter_mut().zip(&offsets) {
            client.write(*offset, &[round as u8; 4096]);
        }
        assert_eq!(flusher.simple(0, cmd::FLUSH, 0, 0), 0);
        for offset in offsets {
            assert!(disk.is_durable(offset), "round {round}, the write at {offset}");
        }
    }
}

/// While a flush is under way, further writes are answered; it need not cover them.
#[test]
fn a_flush_does_not_hold_up_writes() {
    let (disk, server) = test_disk(MIB);
    let mut client = Client::connect(&server.path).go();
    client.write(4096, &[1; 512]);
    disk.hold(FLUSH);
    client.send(0, cmd::FLUSH, 5, 0, 0, &[]);
    disk.wait_held(FLUSH, 1);
    client.write(8192, &[2; 512]);
    disk.release(FLUSH);
    assert_eq!(client.simple_reply(), (0, 5));
    assert!(disk.is_durable(4096));
}

/// Clients that add to bytes of the same sectors without whole-sector accesses, next to one that writes whole sectors.
#[test]
fn byte_granular_writes_of_many_clients_lose_nothing() {
    let (_disk, server) = test_disk(MIB);
    let path = &server.path;
    std::thread::scope(|scope| {
        for own in 0..4u64 {
            scope.spawn(move || {
                let mut client = Client::connect(path).go();
                for round in 1..=100u8 {
                    // Byte `own` of each of the first 8 sectors, and a write across two of them.
                    for sector in 0..8 {
                        client.write(sector * 512 + own, &[round]);
                    }
                    client.write(8192 + own * 300, &[round; 300]);
                    assert_eq!(client.read(8192 + own * 300, 300), [round; 300]);
                }
            });
        }
        scope.spawn(move || {
            let mut client = Client::connect(path).go();
            for round in 1..=100u8 {
                client.write(16384, &[round; 1024]);
                assert_eq!(client.read(16384, 1024), [round; 1024]);
            }
        });
    });
    let mut client = Client::connect(path).go();
    for sector in 0..8 {
        assert_eq!(client.read(sector * 512, 5), [100, 100, 100, 100, 0], "sector {sector}");
    }
}

/// An aligned write waits for a read-modify-write of its sector, which would otherwise put the old bytes back over it.
#[test]
fn a_read_modify_write_never_undoes_an_acknowledged_write() {
    let (disk, server) = test_disk(MIB);
    let mut bytes = Client::connect(&server.path).go();
    let mut sectors = Client::connect(&server.path).go();
    for round in 0..20 {
        let offset = round * 4096;
        disk.hold(write_only(offset));
        bytes.send(0, cmd::WRITE, 1, offset + 1, 1, b"b");
        // It has read the sector and is about to write it back.
        disk.wait_held(write_only(offset), 1);
        sectors.send(0, cmd::WRITE, 2, offset, 512, &[b's'; 512]);
        // Writes elsewhere need not wait.
        bytes.write(offset + 512, &[1; 512]);
        disk.release(write_only(offset));
        assert_eq!(bytes.simple_reply(), (0, 1));
        assert_eq!(sectors.simple_reply(), (0, 2));
        assert_eq!(sectors.read(offset, 3), b"sss");
    }
}

/// Of a long write that is not aligned only the sectors at its ends are read and written back. Others may write to its middle meanwhile.
#[test]
fn an_unaligned_write_holds_up_nobody_in_its_middle() {
    let (disk, server) = test_disk(MIB);
    let mut long = Client::connect(&server.path).go();
    let mut other = Client::connect(&server.path).go();
    for (command, held) in [(cmd::WRITE, write_only(4096)), (cmd::WRITE_ZEROES, 4096)] {
        disk.hold(held);
        let payload: &[u8] = if command == cmd::WRITE { &[7; 65_538] } else { &[] };
        long.send(0, command, 1, 4095, 65_538, payload);
        disk.wait_held(held, 1);
        other.write(32768, &[1; 512]);
        disk.release(held);
        assert_eq!(long.simple_reply(), (0, 1));
    }
}

/// Random requests in flight all the time, from several threads on several connections; each thread knows what its
/// part of the disk must hold.
#[test]
fn pipelined_requests_of_many_clients_match_a_model() {
    let (_disk, server) = test_disk(64 * MIB);
    let path = &server.path;
    std::thread::scope(|scope| {
        for own in 0..4u64 {
            scope.spawn(move || {
                let base = own * 16 * MIB;
                let mut client = Client::connect(path).go();
                let mut replies = client.again();
                let mut model: HashMap<u64, u8> = HashMap::new();
                let mut random = own + 1;
                for round in 0..200u64 {
                    // A batch of writes to distinct places, then their replies, then reads of them.
                    let mut places = Vec::new();
                    for at in 0..32u64 {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
                        let place = base + (at * 16 + (random >> 40) % 16) * 4096;
                        let stamp = (round + at) as u8;
                        client.send(0, cmd::WRITE, place, place, 4096, &[stamp; 4096]);
                        model.insert(place, stamp);
                        places.push(place);
                    }
                    let mut answered: Vec<u64> = places.iter().map(|_| replies.simple_reply().1).collect();
                    answered.sort_unstable();
                    places.sort_unstable();
                    assert_eq!(answered, places);
                    for place in &places {
                        client.send(0, cmd::READ, *place, *place, 4096, &[]);
                    }
                    for _ in &places {
                        let (error, place) = replies.simple_reply();
                        assert_eq!(error, 0);
                        assert_eq!(replies.take(4096), vec![model[&place]; 4096]);
                    }
                }
            });
        }
    });
}
