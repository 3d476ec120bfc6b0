//! Every option of the handshake, right, wrong and out of place.

use crate::raw::{Client, be16, be32, be64, cmd, info, opt, option, queries, rep};
use crate::serving::{MIB, serve, serve_memory};
use cowvhd_export::MemoryBackend;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

const HAS_FLAGS: u16 = 1;
const READ_ONLY: u16 = 2;
/// Flush, FUA, trim, write zeroes, multi-conn, cache, fast zero.
const FEATURES: u16 = 4 | 8 | 32 | 64 | 256 | 1024 | 2048;
const SEND_DF: u16 = 128;

fn message(reply: &(u32, Vec<u8>)) -> &str {
    std::str::from_utf8(&reply.1).unwrap()
}

#[test]
fn export_name_enters_transmission_with_and_without_padding() {
    let server = serve_memory(MIB);
    for (flags, padding) in [(3u32, 0), (1, 124), (0, 124)] {
        let mut client = Client::silent(UnixStream::connect(&server.path).unwrap());
        client.raw(&flags.to_be_bytes());
        client.raw(&option(opt::EXPORT_NAME, b"any name will do"));
        assert_eq!(be64(&client.take(8)), MIB);
        assert_eq!(be16(&client.take(2)), HAS_FLAGS | FEATURES);
        assert_eq!(client.take(padding), vec![0; padding]);
        client.write(512, &[1; 512]);
        assert_eq!(client.read(512, 512), [1; 512]);
    }
}

#[test]
fn go_tells_size_flags_and_block_sizes_when_asked() {
    let server = serve_memory(3 * MIB);
    let mut client = Client::connect(&server.path);
    let replies = client.option(opt::INFO, &info("", &[3, 0, 77]));
    assert_eq!(replies.iter().map(|reply| reply.0).collect::<Vec<_>>(), [rep::INFO, rep::INFO, rep::ACK]);
    assert_eq!((be16(&replies[0].1), be64(&replies[0].1[2..])), (0, 3 * MIB));
    assert_eq!(be16(&replies[0].1[10..]), HAS_FLAGS | FEATURES);
    let sizes = &replies[1].1;
    assert_eq!((be16(sizes), sizes.len()), (3, 14));
    assert_eq!((be32(&sizes[2..]), be32(&sizes[6..]), be32(&sizes[10..])), (512, 4096, 32 << 20));
    // INFO commits to nothing: without asking again in GO, any byte range is fine.
    let mut client = client.go();
    client.write(1, b"x");
    assert_eq!(client.read(0, 3), b"\0x\0");
}

#[test]
fn structured_replies_bring_the_df_flag() {
    let server = serve_memory(MIB);
    let mut client = Client::connect(&server.path);
    assert_eq!(client.option(opt::STRUCTURED_REPLY, &[]), [(rep::ACK, vec![])]);
    let replies = client.option(opt::GO, &info("", &[]));
    assert_eq!(be16(&replies[0].1[10..]), HAS_FLAGS | FEATURES | SEND_DF);
}

#[test]
fn a_read_only_export_says_so() {
    let server = serve(Arc::new(MemoryBackend::new(MIB).into_read_only()));
    let mut client = Client::connect(&server.path);
    let replies = client.option(opt::GO, &info("", &[]));
    assert_eq!(be16(&replies[0].1[10..]), HAS_FLAGS | FEATURES | READ_ONLY);
}

#[test]
fn the_list_has_one_export_without_name() {
    let server = serve_memory(MIB);
    let mut client = Client::connect(&server.path);
    assert_eq!(client.option(opt::LIST, &[]), [(rep::SERVER, vec![0; 4]), (rep::ACK, vec![])]);
    assert_eq!(client.option(opt::LIST, b"x")[0].0, rep::ERR_INVALID);
}

#[test]
fn abort_is_acknowledged_and_closes() {
    let server = serve_memory(MIB);
    let mut client = Client::connect(&server.path);
    assert_eq!(client.option(opt::ABORT, b"ignored"), [(rep::ACK, vec![])]);
    assert!(client.is_closed());
}

#[test]
fn tls_and_unknown_options_are_refused_and_negotiation_goes_on() {
    let server = serve_memory(MIB);
    let mut client = Client::connect(&server.path);
    let refused = &client.option(opt::STARTTLS, &[])[0];
    assert_eq!((refused.0, message(refused)), (rep::ERR_POLICY, "this server does not offer TLS"));
    assert_eq!(client.option(opt::STARTTLS, b"x")[0].0, rep::ERR_INVALID);
    for unknown in [0, 4, 11, 99, u32::MAX] {
        assert_eq!(client.option(unknown, b"data")[0].0, rep::ERR_UNSUP, "option {unknown}");
    }
    assert_eq!(client.go().read(0, 512), [0; 512]);
}

#[test]
fn malformed_options_are_invalid_and_negotiation_goes_on() {
    let server = serve_memory(MIB);
    let mut client = Client::connect(&server.path);
    assert_eq!(client.option(opt::STRUCTURED_REPLY, b"x")[0].0, rep::ERR_INVALID);
    assert_eq!(client.option(opt::STRUCTURED_REPLY, &[])[0].0, rep::ACK);
    let good = info("name", &[0, 3]);
    for number in [opt::INFO, opt::GO] {
        for length in 0..good.len() {
            assert_eq!(client.option(number, &good[..length])[0].0, rep::ERR_INVALID, "cut to {length}");
        }
        assert_eq!(client.option(number, &[&good[..], b"x"].concat())[0].0, rep::ERR_INVALID);
        assert_eq!(client.option(number, &info(&"n".repeat(4097), &[]))[0].0, rep::ERR_INVALID);
    }
    let good = queries("name", &["base:allocation", "base:"]);
    for number in [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
        for length in 0..good.len() {
            assert_eq!(client.option(number, &good[..length])[0].0, rep::ERR_INVALID, "cut to {length}");
        }
        assert_eq!(client.option(number, &[&good[..], b"x"].concat())[0].0, rep::ERR_INVALID);
    }
    assert_eq!(client.option(opt::GO, &info(&"n".repeat(4096), &[])).last().unwrap().0, rep::ACK);
}

#[test]
fn metadata_contexts_are_listed_by_name_by_wildcard_and_in_whole() {
    let server = serve_memory(MIB);
    let mut client = Client::connect(&server.path);
    let context = |id: u32| (rep::META_CONTEXT, [&id.to_be_bytes()[..], b"base:allocation"].concat());
    let ack = (rep::ACK, vec![]);
    assert_eq!(client.option(opt::LIST_META_CONTEXT, &queries("", &[]))[0].0, rep::ERR_INVALID);
    assert_eq!(client.option(opt::SET_META_CONTEXT, &queries("", &[]))[0].0, rep::ERR_INVALID);
    client.option(opt::STRUCTURED_REPLY, &[]);
    for found in [&[][..], &["base:"], &["base:allocation"], &["qemu:x", "base:allocation"]] {
        let replies = client.option(opt::LIST_META_CONTEXT, &queries("", found));
        assert_eq!(replies, [context(0), ack.clone()], "{found:?}");
    }
    assert_eq!(
        client.option(opt::LIST_META_CONTEXT, &queries("", &["qemu:", "base:all"])),
        std::slice::from_ref(&ack)
    );
    for nothing in [&[][..], &["base:"], &["base:other"], &["qemu:dirty-bitmap:x"], &["nonsense"]] {
        assert_eq!(
            client.option(opt::SET_META_CONTEXT, &queries("", nothing)),
            std::slice::from_ref(&ack),
            "{nothing:?}"
        );
    }
    let twice = queries("", &["base:allocation", "base:allocation"]);
    assert_eq!(client.option(opt::SET_META_CONTEXT, &twice), [context(1), ack]);
}

#[test]
fn a_metadata_context_counts_for_the_export_it_was_set_for_and_the_last_setting() {
    let server = serve_memory(MIB);
    let structured = |options: &[(u32, Vec<u8>)]| {
        let mut client = Client::connect(&server.path);
        client.option(opt::STRUCTURED_REPLY, &[]);
        for (number, data) in options {
            client.option(*number, data);
        }
        client.structured(0, cmd::BLOCK_STATUS, 0, 4096)
    };
    let set = |name| (opt::SET_META_CONTEXT, queries(name, &["base:allocation"]));
    let go = |name| (opt::GO, info(name, &[]));
    let has_status = |contents: Vec<crate::raw::Content>| {
        matches!(contents[..], [crate::raw::Content::Status { context: 1, .. }])
    };
    assert!(has_status(structured(&[set("a"), go("a")])));
    assert!(!has_status(structured(&[set("a"), go("b")])));
    assert!(!has_status(structured(&[set(""), (opt::SET_META_CONTEXT, queries("", &[])), go("")])));
    assert!(!has_status(structured(&[set(""), (opt::SET_META_CONTEXT, b"bad".to_vec()), go("")])));
    assert!(!has_status(structured(&[go("")])));
}

#[test]
fn options_too_long_are_refused_and_far_too_long_ones_end_the_connection() {
    let server = serve_memory(MIB);
    let mut client = Client::connect(&server.path);
    assert_eq!(client.option(opt::GO, &vec![0; 100_000])[0].0, rep::ERR_TOO_BIG);
    assert_eq!(client.option(opt::LIST, &[]).len(), 2);
    let mut endless = option(opt::GO, &[]);
    endless[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    client.raw(&endless);
    assert!(client.is_closed());
    let mut client = Client::connect(&server.path);
    client.raw(&option(opt::EXPORT_NAME, &vec![b'n'; 4097]));
    assert!(client.is_closed());
}

#[test]
fn what_is_no_handshake_ends_the_connection() {
    let server = serve_memory(MIB);
    let connect = || Client::silent(UnixStream::connect(&server.path).unwrap());
    // Unknown client flags.
    let mut client = connect();
    client.raw(&7u32.to_be_bytes());
    assert!(client.is_closed());
    // No magic.
    let mut client = Client::connect(&server.path);
    client.raw(b"GET / HTTP/1.1\r\n\r\n");
    assert!(client.is_closed());
    // An option without fixed newstyle.
    let mut client = connect();
    client.raw(&0u32.to_be_bytes());
    client.raw(&option(opt::LIST, &[]));
    assert!(client.is_closed());
    // Options without end.
    let mut client = Client::connect(&server.path);
    let mut answered = 0;
    loop {
        let sent = client.stream.write_all(&option(opt::LIST, &[]));
        if sent.is_err() || client.is_closed() {
            break;
        }
        client.take(19 + 4 + 20);
        answered += 1;
        assert!(answered < 1000);
    }
}

/// Requests that arrive together with the option before them are not lost.
#[test]
fn requests_sent_along_with_go_are_answered() {
    let server = serve_memory(MIB);
    let mut client = Client::connect(&server.path);
    let mut bytes = option(opt::GO, &info("", &[]));
    for cookie in 0..3 {
        bytes.extend(crate::raw::request(0, cmd::FLUSH, cookie, 0, 0));
    }
    client.raw(&bytes);
    assert_eq!(client.option_reply(opt::GO).0, rep::INFO);
    assert_eq!(client.option_reply(opt::GO).0, rep::ACK);
    let mut cookies: Vec<u64> = (0..3).map(|_| client.simple_reply().1).collect();
    cookies.sort_unstable();
    assert_eq!(cookies, [0, 1, 2]);
}
