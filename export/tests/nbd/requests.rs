//! Every command: what it does, what it refuses, and that a refused one leaves the stream in step.

use crate::disk::{Call, FLUSH, TestDisk};
use crate::raw::{Client, Content, cmd, flag, info, opt, rep, request};
use crate::serving::{Events, MIB, Running, serve, serve_memory};
use cowvhd_export::{Backend, Event, MemoryBackend};
use std::sync::Arc;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;

fn test_disk(size_bytes: u64) -> (Arc<TestDisk>, Running) {
    let disk = Arc::new(TestDisk::new(size_bytes));
    let server = serve(disk.clone());
    (disk, server)
}

fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u8
        })
        .collect()
}

fn error_code(contents: &[Content]) -> u32 {
    match contents {
        [Content::Error { code, message }] => {
            assert!(!message.is_empty());
            *code
        }
        other => panic!("expected one error chunk, got {other:?}"),
    }
}

#[test]
fn reads_and_writes_of_all_sizes_with_simple_replies() {
    let server = serve_memory(64 * MIB);
    let mut client = Client::connect(&server.path).go();
    for (at, length) in [512, 4096, 65536, 131_072, 1 << 20, 32 << 20].into_iter().enumerate() {
        let data = pattern(length, at as u64);
        let offset = at as u64 * 512;
        client.write(offset, &data);
        assert_eq!(client.read(offset, length as u32), data, "{length} bytes");
    }
    assert_eq!(client.simple(0, cmd::READ, 0, 0), 0);
    assert_eq!(client.try_write(0, 0, &[]), 0);
}

#[test]
fn structured_reads_send_data_and_holes() {
    let server = serve_memory(8 * MIB);
    let mut client = Client::connect(&server.path).go_structured();
    let data = pattern(65536, 1);
    client.write(MIB, &data);
    assert_eq!(
        client.structured(0, cmd::READ, MIB, 4096),
        [Content::Data { offset: MIB, data: data[..4096].into() }]
    );
    assert_eq!(
        client.structured(0, cmd::READ, 2 * MIB, 512),
        [Content::Data { offset: 2 * MIB, data: vec![0; 512] }]
    );
    assert_eq!(
        client.structured(0, cmd::READ, 0, 3 << 20),
        [
            Content::Hole { offset: 0, length: 1 << 20 },
            Content::Data { offset: MIB, data: data.clone() },
            Content::Hole { offset: MIB + 65536, length: (2 << 20) - 65536 },
        ]
    );
    // Do not fragment: one chunk, zeros and all.
    let [Content::Data { offset: 0, data: whole }] = &client.structured(flag::DF, cmd::READ, 0, 3 << 20)[..]
    else {
        panic!("expected one chunk of data");
    };
    assert_eq!(&whole[MIB as usize..][..65536], &data);
    assert_eq!(whole.len(), 3 << 20);
    assert_eq!(client.structured(0, cmd::READ, 4 * MIB, 0), [Content::None]);
}

#[test]
fn any_byte_range_works_for_a_client_that_negotiated_no_block_size() {
    let server = serve_memory(MIB);
    let mut client = Client::connect(&server.path).go_structured();
    let mut model = vec![0u8; 8192];
    for (round, (offset, length)) in
        [(1, 1), (511, 2), (100, 4000), (513, 511), (1023, 513), (3000, 5000)].into_iter().enumerate()
    {
        let data = pattern(length, round as u64);
        client.write(offset as u64, &data);
        model[offset..offset + length].copy_from_slice(&data);
        let zeros = offset + length / 4..offset + length / 2;
        let zeroed = client.simple(0, cmd::WRITE_ZEROES, zeros.start as u64, zeros.len() as u32);
        assert_eq!(zeroed, 0);
        model[zeros].fill(0);
        assert_eq!(
            client.structured(0, cmd::READ, 1, 8190),
            [Content::Data { offset: 1, data: model[1..8191].into() }],
            "round {round}"
        );
    }
    // A trim of part of a sector may not touch the rest of it.
    assert_eq!(client.simple(0, cmd::TRIM, 1, 1000), 0);
    assert_eq!(client.structured(0, cmd::READ, 0, 8192), [Content::Data { offset: 0, data: model }]);
    let [Content::Status { extents, .. }] = &client.structured(0, cmd::BLOCK_STATUS, 3, 7)[..] else {
        panic!("expected block status");
    };
    assert_eq!(extents, &[(7, 0)]);
}

#[test]
fn a_client_that_negotiated_block_sizes_is_held_to_them() {
    let server = serve_memory(MIB);
    let mut client = Client::connect(&server.path);
    assert_eq!(client.option(opt::GO, &info("", &[3])).last().unwrap().0, rep::ACK);
    assert_eq!(client.simple(0, cmd::READ, 1, 512), EINVAL);
    assert_eq!(client.simple(0, cmd::READ, 512, 511), EINVAL);
    assert_eq!(client.try_write(0, 100, &[1; 512]), EINVAL);
    assert_eq!(client.simple(0, cmd::WRITE_ZEROES, 0, 100), EINVAL);
    assert_eq!(client.simple(0, cmd::TRIM, 5, 512), EINVAL);
    assert_eq!(client.read(512, 512), [0; 512]);
}

#[test]
fn accesses_past_the_end_or_overflowing_are_refused() {
    let server = serve_memory(MIB);
    let mut client = Client::connect(&server.path).go();
    for (offset, length) in
        [(MIB, 1u32), (MIB - 512, 1024), (u64::MAX, 1), (u64::MAX - 511, 512), (1 << 63, 512)]
    {
        assert_eq!(client.simple(0, cmd::READ, offset, length), EINVAL, "read at {offset}");
        assert_eq!(client.simple(0, cmd::TRIM, offset, length), EINVAL, "trim at {offset}");
        assert_eq!(client.simple(0, cmd::CACHE, offset, length), EINVAL, "cache at {offset}");
        assert_eq!(client.simple(0, cmd::WRITE_ZEROES, offset, length), ENOSPC, "zeroes at {offset}");
        assert_eq!(client.try_write(0, offset, &vec![1; length as usize]), ENOSPC, "write at {offset}");
    }
    assert_eq!(client.simple(0, cmd::WRITE_ZEROES, 0, u32::MAX), ENOSPC);
    assert_eq!(client.read(MIB - 512, 512), [0; 512]);
}

#[test]
fn a_payload_beyond_the_maximum_is_drained_and_far_beyond_it_ends_the_connection() {
    let server = serve_memory(256 * MIB);
    let mut client = Client::connect(&server.path).go();
    assert_eq!(client.simple(0, cmd::READ, 0, (32 << 20) + 1), EINVAL);
    assert_eq!(client.try_write(0, 0, &vec![1; (32 << 20) + 1]), EINVAL);
    assert_eq!(client.read(0, 512), [0; 512]);
    client.send(0, cmd::WRITE, 1, 0, (64 << 20) + 1, &[]);
    assert!(client.is_closed());
    let mut client = Client::connect(&server.path).go_structured();
    assert_eq!(error_code(&client.structured(0, cmd::READ, 0, (32 << 20) + 1)), EOVERFLOW);
}

#[test]
fn unknown_commands_and_flags_are_invalid_and_the_stream_stays_in_step() {
    let server = serve_memory(MIB);
    let mut client = Client::connect(&server.path).go();
    for command in [8, 9, 100, u16::MAX] {
        assert_eq!(client.simple(0, command, 0, 512), EINVAL, "command {command}");
    }
    for (command, flags) in [
        (cmd::READ, flag::DF),
        (cmd::READ, 1 << 15),
        (cmd::READ, flag::NO_HOLE),
        (cmd::FLUSH, flag::FAST_ZERO),
        (cmd::TRIM, flag::NO_HOLE),
        (cmd::WRITE_ZEROES, flag::DF),
        (cmd::CACHE, flag::REQ_ONE),
    ] {
        assert_eq!(client.simple(flags, command, 0, 512), EINVAL, "command {command} flags {flags:#x}");
    }
    assert_eq!(client.try_write(flag::NO_HOLE, 0, &[9; 512]), EINVAL);
    assert_eq!(client.simple(0, cmd::BLOCK_STATUS, 0, 512), EINVAL);
    assert_eq!(client.simple(0, cmd::FLUSH, 0, 1), EINVAL);
    // FUA is allowed everywhere.
    assert_eq!(client.simple(flag::FUA, cmd::FLUSH, 0, 0), 0);
    assert_eq!(client.simple(flag::FUA, cmd::READ, 0, 512), 0);
    assert_eq!(client.take(512), [0; 512]);
}

/// All sixteen bits with every command: each is taken where the protocol has it, and elsewhere refused before anything is done.
#[test]
fn every_flag_is_taken_where_it_belongs_and_nowhere_else() {
    let (disk, server) = test_disk(MIB);
    let mut client = Client::connect(&server.path).go();
    let mut structured = Client::connect(&server.path).go_structured();
    for bit in (0..16).map(|shift| 1u16 << shift) {
        for (command, allowed) in [
            (cmd::READ, flag::FUA),
            (cmd::WRITE, flag::FUA),
            (cmd::FLUSH, flag::FUA),
            (cmd::TRIM, flag::FUA),
            (cmd::CACHE, flag::FUA),
            (cmd::WRITE_ZEROES, flag::FUA | flag::NO_HOLE | flag::FAST_ZERO),
            (cmd::BLOCK_STATUS, 0),
        ] {
            let length = if command == cmd::FLUSH { 0 } else { 512 };
            let payload: &[u8] = if command == cmd::WRITE { &[1; 512] } else { &[] };
            client.send(bit, command, 5, 0, length, payload);
            let taken = bit & allowed != 0;
            let expected = if taken { 0 } else { EINVAL };
            assert_eq!(client.simple_reply(), (expected, 5), "command {command} flags {bit:#x}");
            if taken && command == cmd::READ {
                client.take(512);
            }
            let calls = disk.take_calls();
            assert_eq!(
                calls.is_empty(),
                !taken || command == cmd::CACHE,
                "command {command} {bit:#x}: {calls:?}"
            );
        }
        for (command, allowed) in
            [(cmd::READ, flag::FUA | flag::DF), (cmd::BLOCK_STATUS, flag::FUA | flag::REQ_ONE)]
        {
            let answer = structured.structured(bit, command, 0, 512);
            match bit & allowed != 0 {
                true => assert!(!matches!(answer[..], [Content::Error { .. }]), "{answer:?}"),
                false => assert_eq!(error_code(&answer), EINVAL, "command {command} flags {bit:#x}"),
            }
        }
        disk.take_calls();
    }
}

#[test]
fn a_read_only_export_refuses_every_change_with_eperm() {
    let memory = MemoryBackend::new(MIB);
    memory.write_at(&[4; 512], 0).unwrap();
    let server = serve(Arc::new(memory.into_read_only()));
    let mut client = Client::connect(&server.path).go();
    assert_eq!(client.try_write(0, 0, &[5; 512]), EPERM);
    assert_eq!(client.try_write(0, 3, &[5; 5]), EPERM);
    assert_eq!(client.simple(0, cmd::TRIM, 0, 512), EPERM);
    assert_eq!(client.simple(0, cmd::WRITE_ZEROES, 0, 512), EPERM);
    assert_eq!(client.simple(0, cmd::FLUSH, 0, 0), 0);
    assert_eq!(client.read(0, 512), [4; 512]);
}

#[test]
fn zeroing_trimming_and_fast_zero_reach_the_disk_as_asked() {
    let (disk, server) = test_disk(MIB);
    let mut client = Client::connect(&server.path).go();
    client.write(0, &[1; 65536]);
    disk.take_calls();
    assert_eq!(client.simple(0, cmd::WRITE_ZEROES, 0, 4096), 0);
    assert_eq!(client.simple(flag::NO_HOLE, cmd::WRITE_ZEROES, 4096, 4096), 0);
    assert_eq!(client.simple(flag::FAST_ZERO, cmd::WRITE_ZEROES, 8192, 4096), 0);
    assert_eq!(client.simple(flag::FAST_ZERO | flag::NO_HOLE, cmd::WRITE_ZEROES, 12288, 4096), ENOTSUP);
    assert_eq!(client.simple(0, cmd::TRIM, 65536, 512), 0);
    assert_eq!(client.simple(0, cmd::TRIM, 0, 0), 0);
    assert_eq!(client.simple(0, cmd::WRITE_ZEROES, 0, 0), 0);
    assert_eq!(client.simple(0, cmd::CACHE, 0, 65536), 0);
    assert_eq!(
        disk.take_calls(),
        [
            Call::Zero { offset: 0, length: 4096, punch: true },
            Call::Zero { offset: 4096, length: 4096, punch: false },
            Call::Zero { offset: 8192, length: 4096, punch: true },
            Call::Discard { offset: 65536, length: 512 },
        ]
    );
    assert_eq!(client.read(12288, 512), [1; 512], "a refused fast zero changed nothing");
}

#[test]
fn fua_means_done_and_flushed_before_the_answer() {
    let (disk, server) = test_disk(MIB);
    let mut client = Client::connect(&server.path).go();
    client.write(512, &[1; 512]);
    assert!(!disk.is_durable(512));
    assert_eq!(client.try_write(flag::FUA, 1024, &[1; 512]), 0);
    assert!(disk.is_durable(1024));
    assert_eq!(client.simple(flag::FUA, cmd::WRITE_ZEROES, 2048, 512), 0);
    assert!(disk.is_durable(2048));
    assert_eq!(client.simple(flag::FUA, cmd::TRIM, 4096, 512), 0);
    assert!(disk.is_durable(4096));
    disk.fail(FLUSH, 5);
    assert_eq!(client.try_write(flag::FUA, 8192, &[1; 512]), EIO);
    assert_eq!(client.simple(0, cmd::FLUSH, 0, 0), EIO);
}

#[test]
fn the_backends_errors_reach_the_client_as_numbers_and_the_log_with_their_words() {
    let (disk, server) = test_disk(MIB);
    let mut client = Client::connect(&server.path).go_structured();
    disk.fail(0, 28);
    disk.fail(512, 30);
    disk.fail(1024, 121);
    assert_eq!(error_code(&client.structured(0, cmd::READ, 0, 512)), ENOSPC);
    assert_eq!(error_code(&client.structured(0, cmd::READ, 512, 512)), EPERM);
    assert_eq!(error_code(&client.structured(0, cmd::READ, 1024, 512)), EIO);
    let logged = |events: &Events| {
        events.wait_for(|event| matches!(event, Event::RequestFailed { error, .. } if error.code() == 121))
    };
    let Event::RequestFailed { error, request, .. } = logged(&server.events) else { unreachable!() };
    assert_eq!(error.message(), "as a test");
    assert!(request.contains("1024"), "{request}");
    // A read that fails half-way through its chunks is an error and nothing else.
    client.send(0, cmd::WRITE, 1, MIB - 65536, 65536, &[1; 65536]);
    assert_eq!(client.simple_reply(), (0, 1));
    disk.fail(MIB - 65536, 5);
    assert_eq!(error_code(&client.structured(0, cmd::READ, MIB / 2, 1 << 19)), EIO);
    assert_eq!(client.structured(0, cmd::READ, 4096, 512).len(), 1);
}

#[test]
fn block_status_tells_data_zeros_and_holes() {
    let server = serve_memory(8 * MIB);
    let mut client = Client::connect(&server.path).go_structured();
    client.write(MIB, &[1; 65536]);
    client.write(MIB + 65536, &[2; 65536]);
    assert_eq!(client.simple(flag::NO_HOLE, cmd::WRITE_ZEROES, 2 * MIB, 65536), 0);
    let status = |extents: &[(u32, u32)]| vec![Content::Status { context: 1, extents: extents.to_vec() }];
    assert_eq!(
        client.structured(0, cmd::BLOCK_STATUS, 0, 8 << 20),
        status(&[(1 << 20, 3), (131_072, 0), ((1 << 20) - 131_072, 3), (65536, 2), ((6 << 20) - 65536, 3)])
    );
    assert_eq!(client.structured(flag::REQ_ONE, cmd::BLOCK_STATUS, MIB, 1 << 20), status(&[(131_072, 0)]));
    assert_eq!(client.structured(flag::REQ_ONE, cmd::BLOCK_STATUS, MIB, 512), status(&[(512, 0)]));
    assert_eq!(client.structured(0, cmd::BLOCK_STATUS, 4 * MIB, 512), status(&[(512, 3)]));
    assert_eq!(error_code(&client.structured(0, cmd::BLOCK_STATUS, 0, 0)), EINVAL);
    assert_eq!(error_code(&client.structured(0, cmd::BLOCK_STATUS, 8 * MIB, 512)), EINVAL);
}

/// A disk of alternating pieces has more extents than one answer may hold; the client asks on from where it ends.
#[test]
fn block_status_of_a_scattered_disk_comes_in_bounded_pieces() {
    let memory = MemoryBackend::new(4096 * MIB);
    for page in 0..10_000 {
        memory.write_at(&[1; 512], page * 131_072).unwrap();
    }
    let server = serve(Arc::new(memory));
    let mut client = Client::connect(&server.path).go_structured();
    let (mut offset, mut data, mut answers) = (0, 0, 0);
    while offset < 4096 * MIB {
        let length = (4096 * MIB - offset).min(u64::from(u32::MAX) / 512 * 512) as u32;
        let [Content::Status { extents, .. }] = &client.structured(0, cmd::BLOCK_STATUS, offset, length)[..]
        else {
            panic!("expected block status");
        };
        assert!((1..=8192).contains(&extents.len()));
        offset += extents.iter().map(|extent| u64::from(extent.0)).sum::<u64>();
        data += extents.iter().filter(|extent| extent.1 == 0).map(|extent| u64::from(extent.0)).sum::<u64>();
        answers += 1;
    }
    assert_eq!((offset, data), (4096 * MIB, 10_000 * 65536));
    assert!(answers >= 3);
}

#[test]
fn disconnect_finishes_what_came_before_it() {
    let (disk, server) = test_disk(MIB);
    let mut client = Client::connect(&server.path).go();
    disk.hold(0);
    client.send(0, cmd::WRITE, 1, 0, 512, &[6; 512]);
    client.send(0, cmd::DISC, 2, 0, 0, &[]);
    disk.wait_held(0, 1);
    disk.release(0);
    assert_eq!(client.simple_reply(), (0, 1));
    assert!(client.is_closed());
    assert_eq!(Client::connect(&server.path).go().read(0, 512), [6; 512]);
}

/// A client says nothing after its disconnect. What it says all the same is not done, and not answered.
#[test]
fn nothing_behind_a_disconnect_is_done() {
    let (disk, server) = test_disk(MIB);
    // Whatever else stands in it, it is a disconnect.
    for (number, (offset, length, flags)) in
        [(0, 0, 0), (u64::MAX, u32::MAX, u16::MAX)].into_iter().enumerate()
    {
        let mut client = Client::connect(&server.path).go();
        let mut bytes = request(0, cmd::WRITE, 1, 0, 512);
        bytes.extend([6; 512]);
        bytes.extend(request(flags, cmd::DISC, 2, offset, length));
        bytes.extend(request(0, cmd::WRITE, 3, 512, 512));
        bytes.extend([7; 512]);
        bytes.extend(request(0, cmd::READ, 4, 0, 512));
        bytes.extend(request(0, cmd::FLUSH, 5, 0, 0));
        client.raw(&bytes);
        assert_eq!(client.simple_reply(), (0, 1));
        assert!(client.is_closed());
        let number = number as u64 + 1;
        server.events.wait_for(
            |event| matches!(event, Event::Disconnected { connection, .. } if *connection == number),
        );
        assert_eq!(disk.take_calls(), [Call::Write { offset: 0, length: 512 }]);
    }
}
