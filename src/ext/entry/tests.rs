//! Entries and records: vectors, bounds, and that what is written is read back.

use super::*;
use proptest::prelude::*;

const SESSION: SessionId = SessionId([0x5e; 16]);

fn header() -> EntryHeader {
    EntryHeader {
        kind: EntryKind::Records,
        length: 0,
        session: SESSION,
        sequence: 2,
        place: 0x3000,
        previous_crc: 0x01020304,
        meta_tail: Tail { sequence: 1, place: 0 },
        data_tail: Tail { sequence: 2, place: 0x3000 },
        record_bytes: 0,
        crc: 0,
    }
}

#[test]
fn records_are_read_back_and_every_flipped_bit_is_noticed() {
    let data = [7u8; 1024];
    let records = [
        Record::Alloc { block: 1, slot: 14343, allocation: 4, bitmap_set: true },
        Record::Free { block: 2, slot: 18440 },
        Record::Bits { slot: 1, allocation: 2, first_sector: 8, sectors: 16 },
        Record::Data { slot: 1, allocation: 2, first_sector: 8, bytes: &data },
        Record::Zero { slot: 1, allocation: 2, first_sector: 0, sectors: 8 },
        Record::Image { offset: 0x1_2345_6000, bytes: &data[..512] },
    ];
    let mut bytes = Vec::new();
    let written = write_entry(header(), &records, &mut bytes);
    assert_eq!(bytes.len(), 4096);
    let read = parse_entry_header(SESSION, 0x3000, &bytes).unwrap();
    assert_eq!(read, written);
    assert_eq!(parse_records(&read, &bytes).unwrap(), records);
    assert_eq!(parse_entry_header(SessionId([1; 16]), 0x3000, &bytes), None);
    assert_eq!(parse_entry_header(SESSION, 0x4000, &bytes), None);
    for byte in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[byte] ^= 0x10;
        assert_eq!(parse_entry_header(SESSION, 0x3000, &bad), None, "byte {byte}");
    }
}

#[test]
fn a_filler_covers_the_rest_of_the_lap_with_one_page() {
    let mut bytes = Vec::new();
    let written = write_filler(header(), 3 * PAGE_BYTES, &mut bytes);
    assert_eq!((bytes.len(), written.length), (4096, 3 * 4096));
    bytes.resize(3 * 4096, 0xaa);
    assert_eq!(parse_entry_header(SESSION, 0x3000, &bytes), Some(written));
    assert_eq!(parse_entry_header(SESSION, 0x3000, &bytes[..4096]), None, "would run past the ring");
}

/// The golden vector of FORMAT.md.
#[test]
fn golden_vector() {
    let mut bytes = Vec::new();
    let records = [Record::Alloc { block: 1, slot: 14343, allocation: 4, bitmap_set: true }];
    write_entry(header(), &records, &mut bytes);
    assert_eq!(
        hex(&bytes[..128]),
        [
            "636f777668644a45",
            "00001000",
            "00000001",
            "5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e",
            "0000000000000002",
            "0000000000003000",
            "0000000000000001",
            "0000000000000000",
            "0000000000000002",
            "0000000000003000",
            "00000020",
            "01020304",
            "00000000",
            "1c95bfa2",
            "0001",
            "0001",
            "00000020",
            "00000001",
            "00003807",
            "0000000000000004",
            "00000000",
            "00000000",
        ]
        .concat()
    );
    assert!(bytes[128..].iter().all(|&b| b == 0));
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// FORMAT.md: which CRC-32, and what the first entry of a session names as its predecessor.
#[test]
fn crc_vectors() {
    assert_eq!(crc32fast::hash(b"123456789"), 0xcbf4_3926);
    assert_eq!(session_crc(SESSION), 0xfd43_631f);
}

/// The golden vector of FORMAT.md: the first 96 bytes of a filler, which its CRC covers with the zeros behind them.
#[test]
fn filler_golden_vector() {
    let mut bytes = Vec::new();
    write_filler(header(), 3 * PAGE_BYTES, &mut bytes);
    assert_eq!(
        hex(&bytes[..ENTRY_HEADER_BYTES]),
        concat!(
            "636f777668644a45",
            "00003000",
            "00000002",
            "5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e",
            "0000000000000002",
            "0000000000003000",
            "0000000000000001",
            "0000000000000000",
            "0000000000000002",
            "0000000000003000",
            "00000000",
            "01020304",
            "00000000",
            "80ba627e",
        )
    );
}

/// The golden vectors of FORMAT.md: the head of each record, and the CRC of an entry that holds all of them.
#[test]
fn record_golden_vectors() {
    let sector = [7; SECTOR];
    let vectors = [
        (
            Record::Alloc { block: 1, slot: 14343, allocation: 4, bitmap_set: true },
            "0001000100000020000000010000380700000000000000040000000000000000",
        ),
        (
            Record::Free { block: 2, slot: 18447 },
            "0002000000000020000000020000480f00000000000000000000000000000000",
        ),
        (
            Record::Bits { slot: 14343, allocation: 4, first_sector: 8, sectors: 16 },
            "0003000000000020000000000000380700000000000000040000000800000010",
        ),
        (
            Record::Data { slot: 14343, allocation: 4, first_sector: 8, bytes: &sector },
            "0004000000000220000000000000380700000000000000040000000800000001",
        ),
        (
            Record::Zero { slot: 14343, allocation: 4, first_sector: 0, sectors: 8 },
            "0005000000000020000000000000380700000000000000040000000000000008",
        ),
        (
            Record::Image { offset: 0x1_2345_6000, bytes: &sector },
            "0006000000000220000000012345600000000000000000000000000000000001",
        ),
    ];
    for (record, head) in &vectors {
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        assert_eq!(hex(&bytes[..RECORD_BYTES]), *head);
        assert_eq!(bytes.len(), record.encoded_bytes());
        assert!(bytes[RECORD_BYTES..].iter().all(|&b| b == 7));
    }
    let records: Vec<_> = vectors.iter().map(|(record, _)| *record).collect();
    let mut bytes = Vec::new();
    let written = write_entry(header(), &records, &mut bytes);
    assert_eq!((written.record_bytes, written.crc), (1216, 0x3897_419f));
}

/// Bytes of an entry with a right CRC that cowvhd would not write.
fn mended(entry: &[u8], change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = entry.to_vec();
    change(&mut bytes);
    let crc = entry_crc(SESSION, &bytes);
    bytes[CRC_OFFSET..CRC_OFFSET + 4].copy_from_slice(&crc.to_be_bytes());
    bytes
}

#[test]
fn headers_out_of_bounds_are_no_entry() {
    let mut bytes = Vec::new();
    write_entry(header(), &[Record::Free { block: 1, slot: 2 }; 125], &mut bytes);
    assert_eq!(bytes.len(), 4096, "125 records fill a page");
    let parse = |bytes: &[u8]| parse_entry_header(SESSION, 0x3000, bytes);
    assert_eq!(parse(&mended(&bytes, |_| {})).unwrap().record_bytes, 4000);
    let with = |at: usize, value: u32| {
        parse(&mended(&bytes, |bytes| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes())))
    };
    for length in [0, 1, 95, 4095, 4097, 8192, u32::MAX] {
        assert_eq!(with(8, length), None, "a length of {length} bytes");
    }
    for kind in [0, 3, u32::MAX] {
        assert_eq!(with(12, kind), None, "kind {kind}");
    }
    for record_bytes in [4001, 4096, u32::MAX] {
        assert_eq!(with(80, record_bytes), None, "{record_bytes} bytes of records");
    }
    assert_eq!(with(80, 0).unwrap().record_bytes, 0);
    // Right in all but the magic, in all but the session, in all but the place.
    assert_eq!(parse(&mended(&bytes, |bytes| bytes[0] ^= 1)), None);
    let other = EntryHeader { session: SessionId([1; 16]), ..header() };
    let mut stranger = Vec::new();
    write_entry(other, &[], &mut stranger);
    assert_eq!(parse(&stranger), None);
    assert_eq!(parse_entry_header(SESSION, 0, &mended(&bytes, |_| {})), None);
    // Cut anywhere it is none.
    for length in [0, 95, 96, 4095] {
        assert_eq!(parse(&bytes[..length]), None);
    }
}

#[test]
fn what_is_written_says_itself_what_it_is() {
    let (mut entry, mut filler) = (Vec::new(), Vec::new());
    let odd = EntryHeader { kind: EntryKind::Filler, record_bytes: 77, ..header() };
    assert_eq!(write_entry(odd, &[], &mut entry).kind, EntryKind::Records);
    assert_eq!(parse_entry_header(SESSION, 0x3000, &entry).unwrap().kind, EntryKind::Records);
    let odd = EntryHeader { record_bytes: 77, ..header() };
    let written = write_filler(odd, PAGE_BYTES, &mut filler);
    assert_eq!((written.kind, written.record_bytes), (EntryKind::Filler, 0));
}

/// The records of an entry whose bytes behind the header are these.
fn records_of(records: &[u8]) -> Result<Vec<Record<'_>>, FormatError> {
    let entry = [&[0; ENTRY_HEADER_BYTES][..], records].concat().leak();
    parse_records(&EntryHeader { record_bytes: records.len() as u32, ..header() }, entry)
}

fn raw(kind: u16, flags: u16, length: u32, allocation: u64, sectors: u32, payload: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(kind.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend([0; 8]);
    bytes.extend(allocation.to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(sectors.to_be_bytes());
    bytes.resize(RECORD_BYTES + payload, 7);
    bytes
}

#[test]
fn records_that_break_a_bound_are_refused_with_their_place() {
    let good = raw(2, 0, 32, 0, 0, 0);
    for (record, field, offset) in [
        (raw(1, 0, 31, 0, 0, 0), "record length", 4),
        (raw(1, 0, 0, 0, 0, 0), "record length", 4),
        (raw(1, 0, 33, 0, 0, 0), "record length", 4),
        (raw(1, 0, u32::MAX, 0, 0, 0), "record length", 4),
        (raw(0, 0, 32, 0, 0, 0), "record type", 0),
        (raw(7, 0, 32, 0, 0, 0), "record type", 0),
        (raw(1, 0, 32, MAX_COUNTER + 1, 0, 0), "record allocation sequence", 16),
        (raw(4, 0, 32 + 512, 0, 2, 512), "record sectors", 28),
        (raw(4, 0, 32 + 511, 0, 1, 511), "record sectors", 28),
        (raw(4, 0, 32 + 512, 0, u32::MAX, 512), "record sectors", 28),
        (raw(6, 0, 32 + 512, 0, 0, 512), "record sectors", 28),
        // More than a page.
        (raw(6, 0, 32 + 4608, 0, 9, 4608), "record sectors", 28),
        (vec![0; 31], "record", 0),
    ] {
        let error = records_of(&record).unwrap_err();
        assert_eq!((error.field, error.offset), (field, 96 + offset), "{error}");
        let error = records_of(&[&good[..], &record].concat()).unwrap_err();
        assert_eq!((error.field, error.offset), (field, 96 + 32 + offset), "behind another one: {error}");
    }
    assert_eq!(records_of(&raw(6, 0, 32 + 4096, 0, 8, 4096)).unwrap().len(), 1);
    assert_eq!(records_of(&raw(1, 0, 32, MAX_COUNTER, 0, 0)).unwrap().len(), 1);
    assert_eq!(records_of(&[]).unwrap(), []);
}

/// What a type has no use for is ignored, other flags among it.
#[test]
fn the_bitmap_flag_is_bit_0_alone() {
    for (flags, set) in [(0, false), (1, true), (2, false), (3, true), (0xfffe, false)] {
        let record = raw(1, flags, 32, 4, 0, 0);
        let expected = Record::Alloc { block: 0, slot: 0, allocation: 4, bitmap_set: set };
        assert_eq!(records_of(&record).unwrap(), [expected]);
    }
}

fn any_record() -> impl Strategy<Value = Record<'static>> {
    let counter = 0..=MAX_COUNTER;
    let payload = |sectors: std::ops::Range<usize>| {
        (sectors, any::<u8>()).prop_map(|(sectors, fill)| &*vec![fill; sectors * SECTOR].leak())
    };
    let (block, slot, first_sector, sectors) = (any::<u32>(), any::<u32>(), any::<u32>(), any::<u32>());
    prop_oneof![
        (block, slot, counter, any::<bool>()).prop_map(|(block, slot, allocation, bitmap_set)| {
            Record::Alloc { block, slot, allocation, bitmap_set }
        }),
        (any::<u32>(), any::<u32>()).prop_map(|(block, slot)| Record::Free { block, slot }),
        (any::<u32>(), any::<u64>(), first_sector, sectors).prop_map(
            |(slot, allocation, first_sector, sectors)| {
                Record::Bits { slot, allocation, first_sector, sectors }
            }
        ),
        (any::<u32>(), any::<u64>(), any::<u32>(), payload(0..20)).prop_map(
            |(slot, allocation, first_sector, bytes)| Record::Data { slot, allocation, first_sector, bytes }
        ),
        (any::<u32>(), any::<u64>(), any::<u32>(), any::<u32>()).prop_map(
            |(slot, allocation, first_sector, sectors)| {
                Record::Zero { slot, allocation, first_sector, sectors }
            }
        ),
        (any::<u64>(), payload(0..9)).prop_map(|(offset, bytes)| Record::Image { offset, bytes }),
    ]
}

proptest! {
    #[test]
    fn records_come_back(records in proptest::collection::vec(any_record(), 0..8)) {
        let mut bytes = Vec::new();
        let written = write_entry(header(), &records, &mut bytes);
        let read = parse_entry_header(SESSION, 0x3000, &bytes).unwrap();
        prop_assert_eq!(read, written);
        prop_assert_eq!(parse_records(&read, &bytes).unwrap(), records);
    }

    /// What is read of any bytes is what would be written for it, read again.
    #[test]
    fn records_of_any_bytes_come_back(bytes in proptest::collection::vec(0_u8..8, 0..200)) {
        if let Ok(records) = records_of(&bytes) {
            let mut written = Vec::new();
            let header = write_entry(header(), &records, &mut written);
            prop_assert_eq!(parse_records(&header, &written).unwrap(), records);
        }
    }

    #[test]
    fn arbitrary_record_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 96..600)) {
        let header = EntryHeader { record_bytes: (bytes.len() - 96) as u32, ..header() };
        let _ = parse_records(&header, &bytes);
        let _ = parse_entry_header(SESSION, 0, &bytes);
    }
}
