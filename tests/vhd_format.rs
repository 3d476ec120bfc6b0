//! The published structures against known vectors, and as properties: what is written is read back the same, what is
//! read is written back byte for byte, what is wrong is refused by the name of its field.

#![allow(clippy::unwrap_used, reason = "helpers and generators are test code too")]

use cowvhd::FormatError;
use cowvhd::vhd::{
    BLOCK_SIZE, Chs, DiskType, DynamicHeader, Footer, HeaderCookie, MAX_DYNAMIC_SIZE, ParentLocator,
    PlatformCode, Timestamp, UniqueId, checksum, validate_geometry, validate_locators,
};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

/// A dynamic disk of 64 MiB, ids 10 to 1f: the first bytes of its footer.
const FOOTER: &str = "
    636f6e6563746978 00000002 00010000 0000000000000200 29b92700 77696e20 000a0000 5769326b
    0000000004000000 0000000004000000 03c3 08 11 00000003 fffff65d 101112131415161718191a1b1c1d1e1f 00 000000";

/// Its dynamic header: BAT at 1536, 32 blocks of 2 MiB.
const HEADER: &str = "
    6378737061727365 ffffffffffffffff 0000000000000600 00010000 00000020 00200000 fffff457";

/// The footer of a differencing disk of 4 MiB that Windows 10 wrote.
const WINDOWS_FOOTER: &str = "
    636f6e6563746978 00000002 00010000 0000000000000200 27198e1b 77696e20 000a0000 5769326b
    0000000000400000 0000000000400000 0078 04 11 00000004 fffff02c f84f1636cd9e9041a69edcc2380e416a 00";

/// Two of its parent locators.
const WINDOWS_LOCATORS: &str = "
    57326b75 00001000 00000054 00000000 0000000000001000
    57327275 00010000 00000020 00000000 0000000000003000";

fn unhex(text: &str, length: usize) -> Vec<u8> {
    let digits: Vec<char> = text.chars().filter(|character| !character.is_whitespace()).collect();
    let mut bytes: Vec<u8> = digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(&pair.iter().collect::<String>(), 16).unwrap())
        .collect();
    bytes.resize(length, 0);
    bytes
}

fn footer() -> Footer {
    let id = UniqueId::from_bytes(std::array::from_fn(|i| 0x10 + i as u8));
    Footer::new(DiskType::Dynamic, 64 * MIB, id, Timestamp(700_000_000))
}

fn header() -> DynamicHeader {
    DynamicHeader::new(1536, 32, BLOCK_SIZE)
}

/// `bytes` with those at `offset` replaced, and the checksum made right again.
fn patched(mut bytes: Vec<u8>, offset: usize, new: &[u8]) -> Vec<u8> {
    let checksum_offset = if bytes.len() == Footer::SIZE { 64 } else { 36 };
    bytes[offset..offset + new.len()].copy_from_slice(new);
    let sum = checksum(&bytes, checksum_offset);
    bytes[checksum_offset..checksum_offset + 4].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// Which structure, which field, and where: what an error must name.
fn named<T>(result: Result<T, FormatError>) -> (&'static str, &'static str, u64) {
    match result {
        Ok(_) => ("", "", 0),
        Err(error) => (error.structure, error.field, error.offset),
    }
}

#[test]
fn footer_vector() {
    let bytes = unhex(FOOTER, Footer::SIZE);
    assert_eq!(Footer::parse(&bytes), Ok(footer()));
    assert_eq!(footer().to_bytes()[..], bytes);
    assert_eq!(footer().geometry, Chs { cylinders: 963, heads: 8, sectors_per_track: 17 });
    assert_eq!(footer().timestamp.to_string(), "2022-03-07T20:26:40Z");
    assert_eq!(footer().unique_id.to_string(), "10111213-1415-1617-1819-1a1b1c1d1e1f");
}

#[test]
fn header_vector() {
    let bytes = unhex(HEADER, DynamicHeader::SIZE);
    assert_eq!(DynamicHeader::parse(&bytes), Ok(header()));
    assert_eq!(header().to_bytes()[..], bytes);
    assert_eq!(validate_geometry(&footer(), &header()), Ok(()));
}

#[test]
fn footer_by_windows() {
    let bytes = unhex(WINDOWS_FOOTER, Footer::SIZE);
    let footer = Footer::parse(&bytes).unwrap();
    assert_eq!(footer.disk_type, DiskType::Differencing);
    assert_eq!(footer.current_size, 4 * MIB);
    assert_eq!(footer.geometry, Chs::for_size(4 * MIB));
    assert_eq!(footer.timestamp.to_string(), "2020-10-14T10:23:23Z");
    assert_eq!(Footer::new(footer.disk_type, 4 * MIB, footer.unique_id, footer.timestamp), footer);
    assert_eq!(footer.to_bytes()[..], bytes);
}

#[test]
fn locators_by_windows() {
    let bytes = patched(header().to_bytes().into(), 576, &unhex(WINDOWS_LOCATORS, 48));
    let header = DynamicHeader::parse(&bytes).unwrap();
    assert_eq!(header.locators[0], ParentLocator::new(PlatformCode::W2ku, 4096, 4096, 84));
    assert_eq!(header.locators[1], ParentLocator::new(PlatformCode::W2ru, 12_288, 65_536, 32));
    assert!(header.locators[2..].iter().all(|locator| *locator == ParentLocator::default()));
    assert_eq!(header.locators[1].payload_range(), Ok(Some(12_288..12_320)));
    assert_eq!(header.to_bytes()[..], bytes);
}

#[test]
fn new_fixed_footer_points_nowhere() {
    let footer = Footer::new(DiskType::Fixed, MIB, UniqueId([1; 16]), Timestamp(0));
    assert_eq!(footer.data_offset, u64::MAX);
    assert_eq!(footer.validate_size(), Ok(()));
}

#[test]
fn footer_of_511_bytes_is_read() {
    let bytes = unhex(FOOTER, Footer::SIZE);
    assert_eq!(Footer::parse(&bytes[..511]), Ok(footer()));
}

#[test]
fn footer_names_its_wrong_field() {
    let good = footer().to_bytes().to_vec();
    for (wrong, field, offset) in [
        (vec![], "length", 0),
        (good[..510].to_vec(), "length", 0),
        ([&good[..], &[0]].concat(), "length", 0),
        (vec![0; 512], "cookie", 0),
        (patched(good.clone(), 0, b"connectix"), "cookie", 0),
        (patched(good.clone(), 12, &[0, 2, 0, 0]), "version", 12),
        (patched(good.clone(), 12, &[0, 0, 0xFF, 0xFF]), "version", 12),
        (patched(good.clone(), 60, &[0, 0, 0, 0]), "disk type", 60),
        (patched(good.clone(), 60, &[0, 0, 0, 1]), "disk type", 60),
        (patched(good.clone(), 60, &[0, 0, 0, 5]), "disk type", 60),
        (patched(good.clone(), 60, &[0, 0, 0, 6]), "disk type", 60),
        (patched(good.clone(), 60, &[3, 0, 0, 3]), "disk type", 60),
    ] {
        assert_eq!(named(Footer::parse(&wrong)), ("footer", field, offset));
    }
}

#[test]
fn header_names_its_wrong_field() {
    let good = header().to_bytes().to_vec();
    let mut cases = vec![
        (vec![], "length", 0),
        (good[..1023].to_vec(), "length", 0),
        ([&good[..], &[0]].concat(), "length", 0),
        (vec![0; 1024], "cookie", 0),
        (patched(good.clone(), 0, b"cxsparsE"), "cookie", 0),
        (patched(good.clone(), 24, &[0, 2, 0, 0]), "version", 24),
        (patched(good.clone(), 28, &[0, 0, 0, 0]), "max table entries", 28),
    ];
    for table_offset in [0u64, 1, 511, 1537, (1 << 63) + 1, u64::MAX] {
        cases.push((patched(good.clone(), 16, &table_offset.to_be_bytes()), "table offset", 16));
    }
    for block_size in [0u32, 1, 256, 511, 513, 3 << 20, 1 << 31, u32::MAX] {
        cases.push((patched(good.clone(), 32, &block_size.to_be_bytes()), "block size", 32));
    }
    for (wrong, field, offset) in cases {
        assert_eq!(named(DynamicHeader::parse(&wrong)), ("dynamic header", field, offset));
    }
}

#[test]
fn any_flipped_bit_is_seen() {
    let footer = footer().to_bytes();
    for bit in 0..footer.len() * 8 {
        let mut wrong = footer;
        wrong[bit / 8] ^= 1 << (bit % 8);
        let field = if bit < 64 { ("footer", "cookie", 0) } else { ("footer", "checksum", 64) };
        assert_eq!(named(Footer::parse(&wrong)), field);
    }
    let header = header().to_bytes();
    for bit in 0..header.len() * 8 {
        let mut wrong = header;
        wrong[bit / 8] ^= 1 << (bit % 8);
        let field =
            if bit < 64 { ("dynamic header", "cookie", 0) } else { ("dynamic header", "checksum", 36) };
        assert_eq!(named(DynamicHeader::parse(&wrong)), field);
    }
}

#[test]
fn both_cookies_are_read_and_written() {
    for (cookie, text) in [(HeaderCookie::Normal, b"cxsparse"), (HeaderCookie::Dirty, b"cowdirty")] {
        let header = DynamicHeader { cookie, ..header() };
        assert_eq!(&header.to_bytes()[..8], text);
        assert_eq!(DynamicHeader::parse(&header.to_bytes()), Ok(header));
    }
}

#[test]
fn odd_but_readable_values_are_kept() {
    for (offset, new) in [
        (8, &[0, 0, 0, 0][..]),   // features 0
        (8, &[0, 0, 0, 6]),       // an extra feature bit
        (12, &[0, 1, 0, 1]),      // version 1.1
        (16, &[0xFF; 8]),         // no data offset
        (28, b"\0\xFFx\n"),       // any creator
        (48, &[0xFF; 8]),         // a size that cannot be
        (56, &[0; 4]),            // CHS 0
        (56, &[0xFF; 4]),         // CHS 65535/255/255
        (68, &[0; 16]),           // no id
        (84, &[1, 1]),            // saved state, blktap's "hidden"
        (508, &[1, 2, 3, 4][..]), // reserved bytes
    ] {
        let bytes = patched(footer().to_bytes().into(), offset, new);
        assert_eq!(Footer::parse(&bytes).unwrap().to_bytes()[..], bytes);
    }
    for (offset, new) in [
        (8, &[0; 8][..]),
        (24, &[0, 1, 0, 1]),
        (28, &[0xFF; 4]),
        (32, &[0, 0, 2, 0]),
        (32, &[0x40, 0, 0, 0]),
        (60, &[1; 4]),
        (64, &[0xD8; 512]),
        (576, &[0xFF; 192]),
        (1023, &[1]),
    ] {
        let bytes = patched(header().to_bytes().into(), offset, new);
        assert_eq!(DynamicHeader::parse(&bytes).unwrap().to_bytes()[..], bytes);
    }
}

#[test]
fn parent_name_is_bounded() {
    let mut header = header();
    let name: Vec<u16> = "vm@s1.vhd".encode_utf16().chain([0xD800]).collect();
    header.set_parent_name(&name).unwrap();
    assert_eq!(header.parent_name_units(), name);
    let before = header.clone();
    assert_eq!(named(header.set_parent_name(&[0x61; 256])), ("dynamic header", "parent name", 64));
    assert_eq!(named(header.set_parent_name(&[0x61, 0, 0x61])), ("dynamic header", "parent name", 64));
    assert_eq!(header, before);
    header.set_parent_name(&[0x61; 255]).unwrap();
    assert_eq!(header.parent_name_units().len(), 255);
    header.set_parent_name(&[]).unwrap();
    assert!(header.parent_name_units().is_empty());
    header.parent_name = [0x61; 256];
    assert_eq!(header.parent_name_units().len(), 256);
}

#[test]
fn geometry_is_checked_across_structures() {
    let size = |current_size| Footer { current_size, ..footer() };
    let table = |table_offset| DynamicHeader { table_offset, ..header() };
    let header_at = |data_offset| Footer { data_offset, ..footer() };
    let fixed = Footer::new(DiskType::Fixed, 64 * MIB, UniqueId([1; 16]), Timestamp(0));
    for (footer, header, structure, field) in [
        (fixed, header(), "footer", "disk type"),
        (size(0), header(), "footer", "current size"),
        (size(64 * MIB - 1), header(), "footer", "current size"),
        (
            size(MAX_DYNAMIC_SIZE + 512),
            DynamicHeader::new(1536, u32::MAX, BLOCK_SIZE),
            "footer",
            "current size",
        ),
        (size(u64::MAX), header(), "footer", "current size"),
        (size(1 << 63), header(), "footer", "current size"),
        (size(64 * MIB + 512), header(), "dynamic header", "max table entries"),
        (footer(), DynamicHeader::new(1536, 31, BLOCK_SIZE), "dynamic header", "max table entries"),
        (
            size(MAX_DYNAMIC_SIZE),
            DynamicHeader::new(1536, 0xFEFF_FFFF, 512),
            "dynamic header",
            "max table entries",
        ),
        (header_at(0), header(), "footer", "data offset"),
        (header_at(511), header(), "footer", "data offset"),
        (header_at(513), header(), "footer", "data offset"),
        (header_at(u64::MAX), header(), "footer", "data offset"),
        (header_at(u64::MAX - 511), header(), "footer", "data offset"),
        (header_at(1 << 63), header(), "footer", "data offset"),
        (footer(), table(512), "dynamic header", "table offset"),
        (footer(), table(1024), "dynamic header", "table offset"),
        (header_at(4096), DynamicHeader::new(512, 4096, BLOCK_SIZE), "dynamic header", "table offset"),
        (footer(), table(1 << 63), "dynamic header", "table offset"),
        (footer(), table(u64::MAX - 511), "dynamic header", "table offset"),
    ] {
        let found = named(validate_geometry(&footer, &header));
        assert_eq!((found.0, found.1), (structure, field), "{footer:?} {header:?}");
    }
}

#[test]
fn unusual_places_and_sizes_are_accepted() {
    for (footer, header) in [
        (Footer { current_size: 512, ..footer() }, header()),
        (footer(), DynamicHeader::new(1536, u32::MAX, BLOCK_SIZE)),
        (footer(), DynamicHeader::new(1 << 40, 32, BLOCK_SIZE)),
        (footer(), DynamicHeader::new(1536, 131_072, 512)),
        (Footer { data_offset: 4096, ..footer() }, DynamicHeader::new(512, 32, BLOCK_SIZE)),
        (
            Footer { current_size: MAX_DYNAMIC_SIZE, ..footer() },
            DynamicHeader::new(1536, 1_044_480, BLOCK_SIZE),
        ),
    ] {
        assert_eq!(validate_geometry(&footer, &header), Ok(()));
    }
    let fixed = Footer::new(DiskType::Fixed, MAX_DYNAMIC_SIZE + 512, UniqueId([1; 16]), Timestamp(0));
    assert_eq!(fixed.validate_size(), Ok(()));
    assert_eq!(named(Footer { current_size: 1 << 63, ..fixed }.validate_size()).1, "current size");
}

#[test]
fn locators_are_checked_across_structures() {
    let footer = Footer { disk_type: DiskType::Differencing, ..footer() };
    let with = |locator| {
        let mut header = header();
        header.locators[2] = locator;
        validate_locators(&footer, &header)
    };
    let good = ParentLocator::new(PlatformCode::W2ru, 2048, 512, 16);
    assert_eq!(with(good), Ok(()));
    assert_eq!(with(ParentLocator { platform: PlatformCode::None, data_offset: 1, ..good }), Ok(()));
    for (wrong, field, offset) in [
        (ParentLocator { data_space: 513, ..good }, "data space", 4),
        (ParentLocator { data_length: 0, ..good }, "data length", 8),
        (ParentLocator { data_length: 513, ..good }, "data length", 8),
        (ParentLocator { data_offset: 0, ..good }, "data offset", 16),
        (ParentLocator { data_offset: 500, ..good }, "data offset", 16),
        (ParentLocator { data_offset: 1535, ..good }, "data offset", 16),
        (ParentLocator { data_offset: 2047, ..good }, "data offset", 16),
        (ParentLocator { data_offset: u64::MAX - 3, ..good }, "data offset", 16),
    ] {
        assert_eq!(named(with(wrong)), ("dynamic header", field, 576 + 2 * 24 + offset));
    }
}

#[test]
fn errors_say_what_was_found_and_expected() {
    let error = DynamicHeader::parse(&patched(header().to_bytes().into(), 32, &[0, 0x30, 0, 0])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "dynamic header: field block size (byte 32) is 3145728, expected a power of two from 512 bytes to 1 GiB"
    );
    let error = Footer::parse(&patched(footer().to_bytes().into(), 0, b"vhdxfile")).unwrap_err();
    assert_eq!(error.to_string(), "footer: field cookie (byte 0) is \"vhdxfile\", expected \"conectix\"");
}

prop_compose! {
    fn any_footer()(
        words in any::<[u32; 4]>(),
        longs in any::<[u64; 3]>(),
        (creator_app, creator_os) in any::<([u8; 4], [u8; 4])>(),
        (cylinders, heads, sectors_per_track) in any::<(u16, u8, u8)>(),
        disk_type in prop::sample::select(vec![DiskType::Fixed, DiskType::Dynamic, DiskType::Differencing]),
        (unique_id, saved_state, minor) in any::<([u8; 16], u8, u16)>(),
        reserved in prop::collection::vec(any::<u8>(), 427),
    ) -> Footer {
        Footer {
            features: words[0],
            version: 0x0001_0000 | u32::from(minor),
            data_offset: longs[0],
            timestamp: Timestamp(words[1]),
            creator_app,
            creator_version: words[2],
            creator_os,
            original_size: longs[1],
            current_size: longs[2],
            geometry: Chs { cylinders, heads, sectors_per_track },
            disk_type,
            unique_id: UniqueId(unique_id),
            saved_state,
            reserved: reserved.try_into().unwrap(),
        }
    }
}

prop_compose! {
    fn any_header()(
        dirty: bool,
        words in any::<[u32; 3]>(),
        longs in any::<[u64; 2]>(),
        (parent_unique_id, minor) in any::<([u8; 16], u16)>(),
        block_shift in 9u32..=30,
        max_table_entries in 1u32..,
        parent_name in prop::collection::vec(any::<u16>(), 256),
        locators in any::<[(u32, u32, u32, u32, u64); 8]>(),
        reserved2 in prop::collection::vec(any::<u8>(), 256),
    ) -> DynamicHeader {
        DynamicHeader {
            cookie: if dirty { HeaderCookie::Dirty } else { HeaderCookie::Normal },
            data_offset: longs[0],
            table_offset: (longs[1] & !511).max(512),
            version: 0x0001_0000 | u32::from(minor),
            max_table_entries,
            block_size: 1 << block_shift,
            parent_unique_id: UniqueId(parent_unique_id),
            parent_timestamp: Timestamp(words[0]),
            reserved1: words[1],
            parent_name: parent_name.try_into().unwrap(),
            locators: locators.map(|(platform, data_space, data_length, reserved, data_offset)| ParentLocator {
                platform: PlatformCode::from_u32(platform),
                data_space,
                data_length,
                reserved,
                data_offset,
            }),
            reserved2: reserved2.try_into().unwrap(),
        }
    }
}

proptest! {
    #[test]
    fn footer_comes_back(footer in any_footer()) {
        prop_assert_eq!(Footer::parse(&footer.to_bytes())?, footer);
    }

    #[test]
    fn header_comes_back(header in any_header()) {
        prop_assert_eq!(DynamicHeader::parse(&header.to_bytes())?, header);
    }

    /// Arbitrary bytes with the few fields made right that would otherwise refuse them all.
    #[test]
    fn footer_bytes_come_back(mut bytes in prop::collection::vec(any::<u8>(), 512), disk_type in 0u8..7) {
        bytes[..8].copy_from_slice(b"conectix");
        bytes[12..14].copy_from_slice(&[0, 1]);
        let bytes = patched(bytes, 60, &[0, 0, 0, disk_type]);
        match Footer::parse(&bytes) {
            Ok(footer) => prop_assert_eq!(&footer.to_bytes()[..], &bytes),
            Err(error) => prop_assert_eq!(error.field, "disk type"),
        }
    }

    #[test]
    fn header_bytes_come_back(
        mut bytes in prop::collection::vec(any::<u8>(), 1024),
        dirty: bool,
        block_shift in 0u32..32,
        entries in 0u8..4,
    ) {
        bytes[..8].copy_from_slice(if dirty { b"cowdirty" } else { b"cxsparse" });
        bytes[22] &= 0xFE;
        bytes[23] = 0;
        bytes[24..26].copy_from_slice(&[0, 1]);
        bytes[28..32].copy_from_slice(&[0, 0, 0, entries]);
        let bytes = patched(bytes, 32, &(1u32 << block_shift).to_be_bytes());
        match DynamicHeader::parse(&bytes) {
            Ok(header) => prop_assert_eq!(&header.to_bytes()[..], &bytes),
            Err(error) => prop_assert!(["block size", "max table entries"].contains(&error.field), "{}", error),
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..1100)) {
        prop_assert!(Footer::parse(&bytes).is_err());
        prop_assert!(DynamicHeader::parse(&bytes).is_err());
    }

    #[test]
    fn checks_never_panic(footer in any_footer(), header in any_header()) {
        let _ = validate_geometry(&footer, &header);
        let _ = validate_locators(&footer, &header);
        let _ = footer.validate_size();
    }
}
