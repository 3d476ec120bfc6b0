//! Clients that mean harm: each takes no more than its share, and an honest client beside it works on.

use crate::disk::{FLUSH, TestDisk};
use crate::raw::{Client, cmd, info, opt, option, request};
use crate::serving::{MIB, serve_memory, serve_with};
use cowvhd_export::{Event, Limits, MemoryBackend, NbdAddress, Server, ServerOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// An honest client's work: small and large, reads and writes.
fn works(client: &mut Client) {
    client.write(512, &[1; 4096]);
    assert_eq!(client.read(512, 4096), [1; 4096]);
    assert_eq!(client.simple(0, cmd::FLUSH, 0, 0), 0);
}

/// Whoever does nothing for a moment is dropped, however little would be enough.
fn impatient() -> Limits {
    Limits {
        handshake_timeout: Duration::from_millis(100),
        stall_timeout: Duration::from_millis(100),
        min_bytes_per_second: 1,
        ..Limits::default()
    }
}

#[test]
fn a_silent_client_is_dropped_after_the_handshake_timeout() {
    let server = serve_with(Arc::new(MemoryBackend::new(MIB)), impatient());
    let mut honest = Client::connect(&server.path).go();
    let mut silent = Client::silent(UnixStream::connect(&server.path).unwrap());
    let mut half = Client::connect(&server.path);
    half.raw(&option(opt::GO, &info("", &[]))[..9]);
    assert!(silent.is_closed());
    assert!(half.is_closed());
    works(&mut honest);
}

#[test]
fn a_client_that_stops_within_a_request_is_dropped_and_one_that_idles_is_not() {
    let server = serve_with(Arc::new(MemoryBackend::new(MIB)), impatient());
    let mut idle = Client::connect(&server.path).go();
    let mut header = Client::connect(&server.path).go();
    header.raw(&request(0, cmd::READ, 1, 0, 512)[..27]);
    let mut payload = Client::connect(&server.path).go();
    payload.send(0, cmd::WRITE, 1, 0, 4096, &[1; 4095]);
    let mut refused = Client::connect(&server.path).go();
    refused.send(0, cmd::WRITE, 1, 1 << 40, 4096, &[1; 4095]);
    let mut large = Client::connect(&server.path).go();
    large.send(0, cmd::WRITE, 1, 0, 1 << 20, &[1; 300_000]);
    for client in [&mut header, &mut payload, &mut refused, &mut large] {
        assert!(client.is_closed());
    }
    works(&mut idle);
    assert_eq!(idle.read(0, 512), [0; 512], "nothing of a write that never came whole was written");
}

/// Doing nearly nothing is no better than doing nothing.
#[test]
fn a_client_that_trickles_is_dropped_as_one_that_stops() {
    let limits = Limits { min_bytes_per_second: 1 << 40, ..impatient() };
    let server = serve_with(Arc::new(MemoryBackend::new(64 * MIB)), limits);
    let mut honest = Client::connect(&server.path).go();
    for (offset, length) in [(0, 32 << 20), (u64::MAX, 32 << 20), (0, 33 << 20)] {
        let mut client = Client::connect(&server.path).go();
        client.send(0, cmd::WRITE, 1, offset, length, &[]);
        while client.stream.write_all(&[0]).is_ok() {
            std::thread::yield_now();
        }
        works(&mut honest);
    }
    // And so is one that fetches its answers like that.
    let mut flood = flood(&server.path, &request(0, cmd::READ, 1, 0, 1 << 20));
    std::thread::scope(|scope| {
        scope.spawn(move || while flood.stream.read(&mut [0; 1]).is_ok_and(|count| count > 0) {});
        server.events.wait_for(|event| matches!(event, Event::Disconnected { connection: 5, .. }));
        works(&mut honest);
    });
}

/// Bytes one at a time are slow, not wrong.
#[test]
fn a_client_that_dribbles_is_served_and_hinders_nobody() {
    let server = serve_memory(MIB);
    let mut honest = Client::connect(&server.path).go();
    let mut slow = Client::connect(&server.path).go();
    let mut bytes = request(0, cmd::WRITE, 7, 0, 64);
    bytes.extend([9; 64]);
    for byte in bytes {
        slow.raw(&[byte]);
        works(&mut honest);
    }
    assert_eq!(slow.simple_reply(), (0, 7));
    assert_eq!(slow.read(0, 64), [9; 64]);
}

#[test]
fn a_client_that_closes_its_half_gets_its_answers() {
    let server = serve_memory(4 * MIB);
    let mut client = Client::connect(&server.path).go();
    for cookie in 0..100 {
        client.send(0, cmd::READ, cookie, 0, 32768, &[]);
    }
    client.stream.close_write();
    let mut cookies: Vec<u64> = (0..100)
        .map(|_| {
            let (error, cookie) = client.simple_reply();
            assert_eq!(error, 0);
            client.take(32768);
            cookie
        })
        .collect();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..100).collect::<Vec<_>>());
    assert!(client.is_closed());
}

/// Wherever a client stops talking for good, the server notices at once, without a timeout, and nothing of an unfinished
/// request has happened.
#[test]
fn a_client_that_closes_its_half_in_the_middle_is_let_go() {
    let disk = Arc::new(TestDisk::new(MIB));
    let server = serve_with(disk.clone(), Limits::default());
    let mut honest = Client::connect(&server.path).go();
    honest.write(0, &[1; 4096]);
    let greeted = || Client::silent(UnixStream::connect(&server.path).unwrap());
    let go = || Client::connect(&server.path).go();
    let cut = |mut client: Client, bytes: &[u8]| {
        client.raw(bytes);
        client.stream.close_write();
        assert!(client.is_closed());
    };
    cut(greeted(), &[]);
    cut(greeted(), &[0, 0]);
    let whole = option(opt::GO, &info("", &[3]));
    for end in [0, 1, 15, 16, 17, whole.len() - 1] {
        cut(Client::connect(&server.path), &whole[..end]);
    }
    let mut write = request(0, cmd::WRITE, 1, 0, 4096);
    write.extend([9; 4096]);
    for end in [0, 1, 27, 28, 29, 28 + 4095] {
        cut(go(), &write[..end]);
    }
    assert_eq!(honest.read(0, 4096), [1; 4096]);
    // A request under way is finished and answered all the same.
    disk.hold(8192);
    let mut client = go();
    client.send(0, cmd::WRITE, 5, 8192, 512, &[7; 512]);
    client.raw(&write[..100]);
    client.stream.close_write();
    disk.wait_held(8192, 1);
    works(&mut honest);
    disk.release(8192);
    assert_eq!(client.simple_reply(), (0, 5));
    assert!(client.is_closed());
    assert_eq!(honest.read(8192, 512), [7; 512]);
}

/// A handshake ends: by its timeout, however busy the client is, and by the number of its options.
#[test]
fn a_handshake_that_never_ends_is_cut() {
    let busy = |limits: Limits, fetch: bool| {
        let server = serve_with(Arc::new(MemoryBackend::new(MIB)), limits);
        let mut honest = Client::connect(&server.path).go();
        let mut client = Client::connect(&server.path);
        let mut sent = 0u64;
        while client.stream.write_all(&option(opt::LIST, &[])).is_ok() {
            sent += 1;
            if fetch && client.stream.read(&mut [0; 1024]).is_err() {
                break;
            }
        }
        works(&mut honest);
        sent
    };
    let by_count = busy(Limits::default(), false);
    busy(Limits::default(), true);
    assert!(by_count < 100_000, "{by_count} options");
    // One byte after the other: each is progress, and it helps nothing.
    let server = serve_with(Arc::new(MemoryBackend::new(MIB)), impatient());
    let mut client = Client::connect(&server.path);
    client.raw(&option(opt::GO, &[0; 60_000])[..16]);
    while client.stream.write_all(&[0]).is_ok() {
        std::thread::yield_now();
    }
    works(&mut Client::connect(&server.path).go());
}

/// A client that fetches its answers byte by byte gets them, whole and in step, and others do not wait for it.
#[test]
fn a_client_that_fetches_byte_by_byte_hinders_nobody() {
    let limits = Limits { workers: 2, workers_per_connection: 2, ..Limits::default() };
    let server = serve_with(Arc::new(MemoryBackend::new(MIB)), limits);
    let mut honest = Client::connect(&server.path).go();
    honest.write(0, &[6; 512]);
    let mut slow: Vec<Client> = (0..4).map(|_| Client::connect(&server.path).go()).collect();
    for client in &mut slow {
        for cookie in 0..64 {
            client.send(0, cmd::READ, cookie, 0, 512, &[]);
        }
    }
    let mut answers = vec![Vec::new(); slow.len()];
    for at in 0..64 * (16 + 512) {
        for (client, answer) in slow.iter_mut().zip(&mut answers) {
            answer.extend(client.take(1));
        }
        if at % 2000 == 0 {
            works(&mut honest);
            honest.write(0, &[6; 512]);
        }
    }
    for answer in answers {
        for reply in answer.chunks(16 + 512) {
            assert_eq!(reply[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
            assert_eq!(reply[16..], [6; 512]);
        }
    }
}

/// Cookies are the client's business: all alike, each request still has its answer.
#[test]
fn a_client_may_give_all_requests_one_cookie() {
    let disk = Arc::new(TestDisk::new(MIB));
    let server = serve_with(disk.clone(), Limits::default());
    let mut client = Client::connect(&server.path).go();
    disk.hold(0);
    for _ in 0..8 {
        client.send(0, cmd::WRITE, 3, 0, 512, &[1; 512]);
    }
    disk.wait_held(0, 1);
    disk.release(0);
    for _ in 0..8 {
        assert_eq!(client.simple_reply(), (0, 3));
    }
    works(&mut client);
}

/// Sends until nothing more goes in, and reads nothing.
fn flood(path: &Path, requests: &[u8]) -> Client {
    flood_after(Client::go, path, requests)
}

fn flood_after(enter: fn(Client) -> Client, path: &Path, requests: &[u8]) -> Client {
    let stream = UnixStream::connect(path).unwrap();
    let mut client = enter(Client::over(stream.try_clone().unwrap()));
    stream.set_nonblocking(true).unwrap();
    let mut rounds = 0;
    loop {
        match client.stream.write(requests) {
            Ok(sent) if sent == requests.len() && rounds < 100_000 => rounds += 1,
            _ => break,
        }
    }
    stream.set_nonblocking(false).unwrap();
    client
}

#[test]
fn clients_that_fetch_no_answers_hold_neither_workers_nor_others() {
    let limits = Limits { workers: 2, workers_per_connection: 2, ..Limits::default() };
    let server = serve_with(Arc::new(MemoryBackend::new(64 * MIB)), limits);
    let mut honest = Client::connect(&server.path).go();
    let floods: Vec<Client> = (0..8)
        .map(|at| flood(&server.path, &request(0, cmd::READ, 1, 0, if at % 2 == 0 { 1 << 20 } else { 512 })))
        .collect();
    for _ in 0..20 {
        works(&mut honest);
        assert_eq!(honest.read(0, 1 << 20).len(), 1 << 20);
    }
    // A flooder that turns honest gets its answers.
    let mut turned = floods.into_iter().nth(1).unwrap();
    for _ in 0..100 {
        assert_eq!(turned.simple_reply(), (0, 1));
        turned.take(512);
    }
}

#[test]
fn a_client_that_fetches_no_answers_is_dropped_in_time() {
    let server = serve_with(Arc::new(MemoryBackend::new(64 * MIB)), impatient());
    let _flood = flood(&server.path, &request(0, cmd::READ, 1, 0, 1 << 20));
    server.events.wait_for(|event| matches!(event, Event::Disconnected { connection: 1, .. }));
    works(&mut Client::connect(&server.path).go());
}

/// 40 clients announce 32 MiB each and send nothing more: the memory they tie up is bounded, others need not wait for
/// it.
#[test]
fn clients_that_announce_large_writes_do_not_starve_small_requests() {
    let server = serve_memory(64 * MIB);
    let mut honest = Client::connect(&server.path).go();
    let liars: Vec<Client> = (0..40)
        .map(|_| {
            let mut liar = Client::connect(&server.path).go();
            liar.send(0, cmd::WRITE, 1, 0, 32 << 20, &[]);
            liar
        })
        .collect();
    for _ in 0..20 {
        works(&mut honest);
    }
    // When the liars leave, their memory is free for a large request.
    drop(liars);
    assert_eq!(honest.read(0, 32 << 20).len(), 32 << 20);
}

/// A large request waits for memory that others have taken and do nothing with, but not for longer than they are put up with.
#[test]
fn clients_that_announce_large_writes_give_their_memory_back_in_time() {
    let limits = Limits { stall_timeout: Duration::from_secs(1), ..impatient() };
    let server = serve_with(Arc::new(MemoryBackend::new(64 * MIB)), limits);
    let mut honest = Client::connect(&server.path).go();
    let mut liars: Vec<Client> = (0..10)
        .map(|_| {
            let mut liar = Client::connect(&server.path).go();
            liar.send(0, cmd::WRITE, 1, 0, 32 << 20, &[0; 4096]);
            liar
        })
        .collect();
    assert_eq!(honest.read(0, 32 << 20).len(), 32 << 20);
    assert!(liars.iter_mut().all(Client::is_closed));
}

#[test]
fn a_thousand_connects_leave_room_for_an_honest_client() {
    let limits = Limits { max_connections: 16, ..Limits::default() };
    let server = serve_with(Arc::new(MemoryBackend::new(MIB)), limits);
    let mut early = Client::connect(&server.path).go();
    let mut crowd = Vec::new();
    for at in 0..1000 {
        crowd.push(UnixStream::connect(&server.path).unwrap());
        if at % 100 == 0 {
            works(&mut early);
            // A newcomer takes the place of one that only occupies it.
            works(&mut Client::connect(&server.path).go());
        }
    }
    assert!(server.handle.connections() <= 16);
    works(&mut early);
}

#[test]
fn when_all_places_are_in_use_a_newcomer_is_turned_away() {
    let limits = Limits { max_connections: 2, ..Limits::default() };
    let server = serve_with(Arc::new(MemoryBackend::new(MIB)), limits);
    let mut one = Client::connect(&server.path).go();
    let mut two = Client::connect(&server.path).go();
    let mut refused = UnixStream::connect(&server.path).unwrap();
    let mut nothing = Vec::new();
    let _ = refused.read_to_end(&mut nothing);
    assert!(nothing.is_empty());
    works(&mut one);
    works(&mut two);
    one.send(0, cmd::DISC, 1, 0, 0, &[]);
    assert!(one.is_closed());
    server.events.wait_for(|event| matches!(event, Event::Disconnected { connection: 1, .. }));
    works(&mut Client::connect(&server.path).go());
}

#[test]
fn a_client_that_leaves_in_the_middle_of_everything_does_no_harm() {
    let disk = Arc::new(TestDisk::new(64 * MIB));
    let server = serve_with(disk.clone(), Limits::default());
    let mut honest = Client::connect(&server.path).go();
    for round in 0..50 {
        let mut client = Client::connect(&server.path).go_structured();
        for cookie in 0..20 {
            client.send(0, cmd::READ, cookie, 0, 1 << 20, &[]);
            client.send(0, cmd::FLUSH, 100 + cookie, 0, 0, &[]);
        }
        client.send(0, cmd::WRITE, 1, 0, 4096, &[1; 100]);
        client.take(round * 7);
        drop(client);
        works(&mut honest);
    }
    // Also with requests held up in the disk.
    disk.hold(FLUSH);
    let mut client = Client::connect(&server.path).go();
    client.send(0, cmd::FLUSH, 1, 0, 0, &[]);
    disk.wait_held(FLUSH, 1);
    drop(client);
    disk.release(FLUSH);
    works(&mut honest);
}

/// Noise after a good handshake: whatever it parses to, the server outlives it.
#[test]
fn noise_ends_one_connection_at_most() {
    let server = serve_memory(MIB);
    let mut honest = Client::connect(&server.path).go();
    let mut random = 12345u64;
    for round in 0..200 {
        let mut client = Client::connect(&server.path);
        if round % 4 != 0 {
            client = client.go_structured();
        }
        let mut noise = Vec::new();
        for _ in 0..50 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1442);
            let bits = random >> 20;
            match bits % 3 {
                0 => noise.extend(bits.to_be_bytes()),
                1 => noise.extend(request(
                    bits as u16 & 0x3f,
                    (bits >> 8) as u16 % 9,
                    bits,
                    bits % MIB,
                    bits as u32 % 9000,
                )),
                _ => noise.extend(option((bits >> 8) as u32 % 12, &noise.clone()[..noise.len().min(30)])),
            }
        }
        // The server may close at any point of it.
        let _ = client.stream.write_all(&noise);
        drop(client);
        works(&mut honest);
    }
}

/// The state machine alone, without threads: what the fuzz target `nbd_bytes` drives, on its seeds, on each beginning of
/// them, and on each with one bit changed.
#[test]
fn the_stream_server_survives_any_input() {
    use crate::nbd_bytes::{run, seeds};
    for (_, seed) in seeds() {
        for length in 0..=seed.len() {
            run(&seed[..length]);
        }
        for at in 0..seed.len() {
            for bit in 0..8 {
                let mut broken = seed.clone();
                broken[at] ^= 1 << bit;
                run(&broken);
            }
        }
    }
    // A whole session, as its client sees it.
    struct Duplex<'a>(&'a [u8], Vec<u8>);
    impl Read for Duplex<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(buffer)
        }
    }
    impl Write for Duplex<'_> {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.1.write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut session = 3u32.to_be_bytes().to_vec();
    session.extend(option(opt::GO, &info("", &[3])));
    session.extend(request(0, cmd::WRITE, 1, 512, 512));
    session.extend([5; 512]);
    session.extend(request(0, cmd::READ, 2, 0, 1024));
    session.extend(request(0, cmd::FLUSH, 3, 0, 0));
    let mut whole = Duplex(&session, Vec::new());
    let disk = Arc::new(MemoryBackend::new(MIB));
    assert_eq!(cowvhd_export::serve_stream(&mut whole, disk).unwrap(), 3);
    assert!(whole.1.windows(1024).any(|bytes| bytes[..512] == [0; 512] && bytes[512..] == [5; 512]));
}

const CHILD_SOCKET: &str = "COWVHD_TEST_NBD_SOCKET";

/// The body of the process that [`memory_is_bounded_whatever_clients_do`] measures; as a test of its own it does
/// nothing.
#[test]
fn child_process_that_serves() {
    let Some(path) = std::env::var_os(CHILD_SOCKET) else { return };
    let limits = Limits { total_bytes: 128 << 20, max_connections: 64, ..Limits::default() };
    let options = ServerOptions { limits, ..ServerOptions::default() };
    let address = NbdAddress::Unix(PathBuf::from(path));
    // All holes: the disk itself takes no memory.
    let server = Server::bind(&address, Arc::new(MemoryBackend::new(1 << 40)), options).unwrap();
    println!("serving");
    server.run().unwrap();
}

struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn peak_bytes(child: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() * 1024
}

#[test]
fn memory_is_bounded_whatever_clients_do() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nbd.sock");
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "hostile::child_process_that_serves", "--nocapture"])
        .env(CHILD_SOCKET, &path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut served = Served(child);
    let mut lines = BufReader::new(served.0.stdout.take().unwrap()).lines();
    while !lines.next().unwrap().unwrap().contains("serving") {}

    let mut honest = Client::connect(&path).go();
    let mut hostile = Vec::new();
    for at in 0..60u32 {
        hostile.push(match at % 12 {
            0 => flood(&path, &request(0, cmd::READ, 1, 0, 4 << 20)),
            1 => flood(&path, &request(0, cmd::READ, 1, 0, 512)),
            2 => flood(&path, &request(0, 99, 1, 0, 0)),
            3 => flood(&path, &request(0, cmd::FLUSH, 1, 0, 0)),
            4 => {
                let mut liar = Client::connect(&path).go();
                liar.send(0, cmd::WRITE, 1, 0, 32 << 20, &[0; 100_000]);
                liar
            }
            5 => {
                let mut client = Client::connect(&path);
                client.raw(&option(opt::GO, &vec![0; 65_000])[..40_000]);
                client
            }
            // Oversized in every way.
            6 => flood(&path, &request(0, cmd::READ, 1, 0, u32::MAX)),
            7 => flood(&path, &request(0, cmd::CACHE, 1, 0, u32::MAX)),
            8 => flood(&path, &request(1, cmd::TRIM, 1, 1 << 30, u32::MAX)),
            9 => flood(&path, &request(0, cmd::READ, 1, u64::MAX - 511, 512)),
            10 => {
                let mut liar = Client::connect(&path).go();
                // Just below what ends the connection: read, and dropped.
                let _ = liar.stream.write_all(&request(0, cmd::WRITE, 1, 0, 64 << 20));
                let _ = liar.stream.write_all(&vec![0; 40 << 20]);
                liar
            }
            _ => {
                let status = request(0, cmd::BLOCK_STATUS, 1, 0, u32::MAX - 511);
                flood_after(Client::go_structured, &path, &status)
            }
        });
        works(&mut honest);
    }
    // All places are taken now. A thousand more clients, who stay, find the door shut.
    let crowd: Vec<UnixStream> = (0..1000).filter_map(|_| UnixStream::connect(&path).ok()).collect();
    works(&mut honest);
    let count = |of: &str| std::fs::read_dir(format!("/proc/{}/{of}", served.0.id())).unwrap().count();
    let (threads, descriptors) = (count("task"), count("fd"));
    assert!(threads <= 2 * 64 + 64 + 16, "{threads} threads");
    assert!(descriptors <= 64 + 32, "{descriptors} descriptors");
    drop(crowd);
    let bound = (128 << 20) + 64 * (512 << 10) + (32 << 20) + (48 << 20);
    let peak = peak_bytes(&served.0);
    assert!(peak <= bound, "{} MiB of at most {}", peak >> 20, bound >> 20);
}
