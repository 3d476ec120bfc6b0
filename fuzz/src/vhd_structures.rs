//! Target `vhd_structures`: whatever the bytes, the published structures are read without panic, and what is read is
//! written back byte for byte.
//!
//! The first byte of an input chooses what the rest is. A structure comes either as it is, or *mended*: with cookie,
//! version and checksum made right, since no fuzzer guesses a checksum.

use cowvhd::vhd::{
    DynamicHeader, Footer, ParentPath, PlatformCode, bat, bitmap, bitmap_bytes, checksum, locator,
    validate_geometry, validate_locators,
};

use crate::Seed;

const AS_IT_IS: u8 = 0;
const MENDED: u8 = 1;
const LOCATOR_PAYLOAD: u8 = 2;
const BAT: u8 = 3;
const BITMAP: u8 = 4;
const KINDS: u8 = 5;

const CODES: [PlatformCode; 3] = [PlatformCode::W2ru, PlatformCode::W2ku, PlatformCode::MacX];

/// The body of the target.
pub fn run(data: &[u8]) {
    let Some((&choice, rest)) = data.split_first() else { return };
    match choice % KINDS {
        AS_IT_IS => {
            footer(rest);
            header(rest);
        }
        MENDED => mended(rest),
        LOCATOR_PAYLOAD => CODES.into_iter().for_each(|code| locator_payload(code, rest)),
        BAT => table(rest),
        _ => sector_bitmap(rest),
    }
}

fn footer(bytes: &[u8]) -> Option<Footer> {
    let footer = Footer::parse(bytes).ok()?;
    let written = footer.to_bytes();
    assert_eq!(written[..bytes.len()], *bytes);
    assert_eq!(Footer::parse(&written), Ok(footer.clone()));
    let _ = footer.validate_size();
    Some(footer)
}

fn header(bytes: &[u8]) -> Option<DynamicHeader> {
    let header = DynamicHeader::parse(bytes).ok()?;
    assert_eq!(header.to_bytes()[..], *bytes);
    for locator in &header.locators {
        if let Ok(Some(payload)) = locator.payload_range() {
            assert!(payload.end - payload.start <= u64::from(locator::MAX_PAYLOAD));
        }
    }
    if let Ok(path) = ParentPath::from_units(header.parent_name_units()) {
        normal(&path);
    }
    Some(header)
}

/// A footer and a dynamic header, one behind the other, zeros for what is missing.
fn mended(data: &[u8]) {
    let mut bytes = [0; Footer::SIZE + DynamicHeader::SIZE];
    let given = data.len().min(bytes.len());
    bytes[..given].copy_from_slice(&data[..given]);
    let (footer_bytes, header_bytes) = bytes.split_at_mut(Footer::SIZE);

    footer_bytes[..8].copy_from_slice(b"conectix");
    footer_bytes[12..14].copy_from_slice(&[0, 1]);
    mend_checksum(footer_bytes, 64);
    let cookie: &[u8; 8] = if header_bytes[0] & 1 == 0 { b"cowdirty" } else { b"cxsparse" };
    header_bytes[..8].copy_from_slice(cookie);
    header_bytes[24..26].copy_from_slice(&[0, 1]);
    mend_checksum(header_bytes, 36);

    let footer = footer(footer_bytes);
    let header = header(header_bytes);
    if let (Some(footer), Some(header)) = (footer, header) {
        let _ = validate_locators(&footer, &header);
        if validate_geometry(&footer, &header).is_ok() {
            let table = header.table_offset..header.table_offset + bat::bat_bytes(header.max_table_entries);
            assert!(table.start >= footer.data_offset + 1024 || table.end <= footer.data_offset);
            let room = u64::from(header.max_table_entries) * u64::from(header.block_size);
            assert!((512..=room).contains(&footer.current_size));
        }
    }
}

fn mend_checksum(bytes: &mut [u8], offset: usize) {
    let sum = checksum(bytes, offset);
    bytes[offset..offset + 4].copy_from_slice(&sum.to_be_bytes());
}

fn locator_payload(code: PlatformCode, payload: &[u8]) {
    let Ok(path) = locator::decode_payload(code, payload) else { return };
    normal(&path);
    if let (ParentPath::Relative(text), Ok(written)) =
        (&path, locator::encode_relative(code, path.as_bytes()))
    {
        assert_eq!(locator::decode_payload(code, &written), Ok(ParentPath::Relative(text.clone())));
    }
}

/// A path that was read is bounded, and has no components that mean nothing.
fn normal(path: &ParentPath) {
    let bytes = path.as_bytes();
    assert!(!path.to_string().contains(char::is_control));
    assert!(!bytes.is_empty() && bytes.len() <= locator::MAX_PATH_BYTES && !bytes.contains(&0));
    match path {
        ParentPath::Relative(text) => {
            assert!(text.split(|&byte| byte == b'/').all(|name| !name.is_empty() && name != b"."));
        }
        ParentPath::Absolute(text) => assert!(text.starts_with(b"/") && !text.starts_with(b"//")),
        ParentPath::Windows(text) => assert!(text.starts_with(b"//") || text.get(1) == Some(&b':')),
    }
    assert!(path.file_name().is_none_or(|name| !name.contains(&b'/')));
}

/// An index, a sector, and a table to change.
fn table(data: &[u8]) {
    let Some((&[index, a, b, c, d], table)) = data.split_first_chunk() else { return };
    let (index, sector) = (u32::from(index), u32::from_be_bytes([a, b, c, d]));
    let mut table = table.to_vec();
    let former = bat::entry(&table, index);
    assert_eq!(former, bat::entries(&table).nth(index as usize));
    assert_eq!(bat::set_entry(&mut table, index, sector), former);
    assert_eq!(bat::entry(&table, index), former.map(|_| sector));
    assert!(bat::block_offset(sector).is_none_or(|offset| offset / 512 == u64::from(sector)));
}

/// A range to change, a value, a range to ask for, and a bitmap.
fn sector_bitmap(data: &[u8]) {
    let Some((&[a, b, c, d, e, f, g, h, value], given)) = data.split_first_chunk() else { return };
    let [from, to, ask_from, ask_to] =
        [[a, b], [c, d], [e, f], [g, h]].map(|pair| u32::from(u16::from_be_bytes(pair)));
    let value = value & 1 == 1;
    let mut bitmap = given.to_vec();
    bitmap::set_range(&mut bitmap, from..to, value);
    for (sector, changed) in (0..bitmap.len() as u32 * 8).map(|sector| (sector, (from..to).contains(&sector)))
    {
        let expected = if changed { value } else { bitmap::get(given, sector) };
        assert_eq!(bitmap::get(&bitmap, sector), expected);
    }
    let mut next = ask_from;
    for run in bitmap::runs(&bitmap, ask_from..ask_to) {
        assert!(run.sectors.start == next && run.sectors.end > next);
        assert_eq!(bitmap::all_set(&bitmap, run.sectors.clone()), run.set);
        assert_eq!(bitmap::none_set(&bitmap, run.sectors.clone()), !run.set);
        next = run.sectors.end;
    }
    assert_eq!(next, ask_to.max(ask_from));
    assert_eq!(bitmap_bytes(from) % 512, 0);
}

/// Inputs to start from: a disk of each type, every notation of a parent's path, a table, a bitmap.
pub fn seeds() -> Vec<Seed> {
    use cowvhd::vhd::{BLOCK_SIZE, DiskType, HeaderCookie, ParentLocator, Timestamp, UniqueId};

    let size = 64 << 20;
    let footer = |disk_type| Footer::new(disk_type, size, UniqueId([7; 16]), Timestamp(700_000_000));
    let header = DynamicHeader::new(1536, 32, BLOCK_SIZE);
    let mut child = DynamicHeader {
        cookie: HeaderCookie::Dirty,
        parent_unique_id: UniqueId([9; 16]),
        parent_timestamp: Timestamp(600_000_000),
        ..header.clone()
    };
    for (unit, letter) in child.parent_name.iter_mut().zip("parent.vhd".encode_utf16()) {
        *unit = letter;
    }
    for (index, code) in CODES.into_iter().enumerate() {
        child.locators[index] = ParentLocator::new(code, 4096 * (index as u64 + 1), 4096, 24);
    }

    let input = |kind: u8, parts: &[&[u8]]| [&[kind], parts.concat().as_slice()].concat();
    let relative = |code| locator::encode_relative(code, b"../base/a b.vhd").unwrap_or_default();
    let windows = |path: &str| locator::encode_units(&path.encode_utf16().collect::<Vec<_>>());
    vec![
        ("footer-fixed", input(AS_IT_IS, &[&footer(DiskType::Fixed).to_bytes()])),
        ("footer-511", input(AS_IT_IS, &[&footer(DiskType::Fixed).to_bytes()[..511]])),
        ("header", input(AS_IT_IS, &[&header.to_bytes()])),
        ("header-dirty", input(AS_IT_IS, &[&child.to_bytes()])),
        ("dynamic", input(MENDED, &[&footer(DiskType::Dynamic).to_bytes(), &header.to_bytes()])),
        ("differencing", input(MENDED, &[&footer(DiskType::Differencing).to_bytes(), &child.to_bytes()])),
        ("path-w2ru", input(LOCATOR_PAYLOAD, &[&relative(PlatformCode::W2ru)])),
        ("path-macx", input(LOCATOR_PAYLOAD, &[&relative(PlatformCode::MacX)])),
        ("path-url", input(LOCATOR_PAYLOAD, &[b"file://localhost/disks/a%20b.vhd"])),
        ("path-drive", input(LOCATOR_PAYLOAD, &[&windows(r"C:\disks\p.vhd")])),
        ("path-share", input(LOCATOR_PAYLOAD, &[&windows(r"\\host\share\p.vhd")])),
        ("path-surrogates", input(LOCATOR_PAYLOAD, &[b"\x3d\xd8a\0\x3d\xd8\x00\xde"])),
        ("bat", input(BAT, &[&[2, 0, 0, 0, 5], &[0xFF; 16]])),
        ("bitmap", input(BITMAP, &[&[0, 3, 0, 70, 0, 0, 1, 0, 1], &[0xA5; 24]])),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_and_their_neighbours() {
        for (_, seed) in seeds() {
            run(&seed);
            (0..seed.len()).for_each(|length| run(&seed[..length]));
            for index in 0..seed.len() {
                for flip in [0x01, 0x80, 0xFF] {
                    let mut changed = seed.clone();
                    changed[index] ^= flip;
                    run(&changed);
                }
            }
        }
    }

    #[test]
    fn structures_of_the_seeds_are_read() {
        for (name, seed) in seeds().into_iter().take(4) {
            assert!(footer(&seed[1..]).is_some() || header(&seed[1..]).is_some(), "{name}");
        }
    }
}
