//! Parent locators: where a differencing disk's parent may be found.
//!
//! Source: VHD specification, "Dynamic Disk Header Format: Parent Locator Entries"; the unit of *data space* and the
//! form of relative file URLs as blktap has them. The dynamic header holds eight entries of 24 bytes; each names a
//! notation and a place in the file with a path in that notation:
//!
//! | code   | payload                                                                          |
//! |--------|----------------------------------------------------------------------------------|
//! | `W2ru` | UTF-16LE, relative to the child's folder: `.\parent.vhd`                         |
//! | `W2ku` | UTF-16LE, absolute: `C:\disks\parent.vhd` (blktap and we write relative ones)    |
//! | `MacX` | file URL, UTF-8 with %-escapes: `file://host/disks/parent.vhd`; blktap's relative form is `file://./parent.vhd` |
//!
//! A path found here is a claim by whoever made the file. This is text only: whether a path may be followed is decided
//! where files are opened.

use std::mem::offset_of;
use std::ops::Range;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{MAX_FILE_OFFSET, SECTOR, quoted};
use crate::FormatError;

pub use super::parent_path::{MAX_PATH_BYTES, ParentPath, path_from_units, units_from_path};

const STRUCTURE: &str = "parent locator";

/// The most bytes a payload may have, 64 KiB: more than any path of Windows or POSIX needs.
pub const MAX_PAYLOAD: u32 = 64 << 10;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawLocator {
    platform: U32,
    data_space: U32,
    data_length: U32,
    reserved: U32,
    data_offset: U64,
}

assert_layout!(RawLocator: 24 {
    platform @ 0,
    data_space @ 4,
    data_length @ 8,
    reserved @ 12,
    data_offset @ 16,
});

/// The notation of a locator's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PlatformCode {
    /// The entry is not in use.
    #[default]
    None,
    /// Relative Windows path in some code page; deprecated, not read.
    Wi2r,
    /// Absolute Windows path in some code page; deprecated, not read.
    Wi2k,
    /// Relative Windows path in UTF-16LE.
    W2ru,
    /// Absolute Windows path in UTF-16LE.
    W2ku,
    /// Alias record of classic Mac OS; opaque.
    Mac,
    /// File URL.
    MacX,
    /// A code the specification does not know. Never one of the others' numbers.
    Other(u32),
}

impl PlatformCode {
    /// The code for its number in the file.
    pub const fn from_u32(number: u32) -> Self {
        match &number.to_be_bytes() {
            [0, 0, 0, 0] => PlatformCode::None,
            b"Wi2r" => PlatformCode::Wi2r,
            b"Wi2k" => PlatformCode::Wi2k,
            b"W2ru" => PlatformCode::W2ru,
            b"W2ku" => PlatformCode::W2ku,
            b"Mac " => PlatformCode::Mac,
            b"MacX" => PlatformCode::MacX,
            _ => PlatformCode::Other(number),
        }
    }

    /// The number in the file.
    pub const fn as_u32(self) -> u32 {
        match self {
            PlatformCode::None => 0,
            PlatformCode::Wi2r => u32::from_be_bytes(*b"Wi2r"),
            PlatformCode::Wi2k => u32::from_be_bytes(*b"Wi2k"),
            PlatformCode::W2ru => u32::from_be_bytes(*b"W2ru"),
            PlatformCode::W2ku => u32::from_be_bytes(*b"W2ku"),
            PlatformCode::Mac => u32::from_be_bytes(*b"Mac "),
            PlatformCode::MacX => u32::from_be_bytes(*b"MacX"),
            PlatformCode::Other(number) => number,
        }
    }
}

/// One of the eight locator entries of a dynamic header; all zero if not in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ParentLocator {
    /// The notation of the payload.
    pub platform: PlatformCode,
    /// Room kept free for the payload, as it stands in the file: see [`ParentLocator::space_bytes`].
    pub data_space: u32,
    /// Bytes of the payload.
    pub data_length: u32,
    /// Zero by the specification: kept as found.
    pub reserved: u32,
    /// Byte offset of the payload in the file.
    pub data_offset: u64,
}

impl ParentLocator {
    /// Bytes of an entry.
    pub const SIZE: usize = 24;

    /// A new entry: `space_bytes` (a multiple of 512) are kept for the payload at `data_offset`, and `data_length`
    /// of them are used.
    pub const fn new(platform: PlatformCode, data_offset: u64, space_bytes: u32, data_length: u32) -> Self {
        ParentLocator { platform, data_space: space_bytes, data_length, reserved: 0, data_offset }
    }

    /// Bytes kept free for the payload.
    ///
    /// The specification counts sectors, while Virtual PC, Hyper-V and most others write bytes. As blktap does, a
    /// value below 512 is taken as sectors, a multiple of 512 as bytes.
    ///
    /// # Errors
    ///
    /// Field `data space`, if it is neither.
    pub fn space_bytes(&self) -> Result<u64, FormatError> {
        let space = u64::from(self.data_space);
        if space < SECTOR {
            Ok(space * SECTOR)
        } else if space.is_multiple_of(SECTOR) {
            Ok(space)
        } else {
            let expected = "sectors (below 512) or bytes (a multiple of 512)";
            Err(wrong("data space", offset_of!(RawLocator, data_space), self.data_space, expected))
        }
    }

    /// The bytes of the file that the payload covers; `None` if the entry is not in use. At most [`MAX_PAYLOAD`]
    /// bytes, behind the file's first sector; that they lie within the file is for the caller to check.
    ///
    /// # Errors
    ///
    /// Field `data space`, `data length` (zero, above [`MAX_PAYLOAD`], more than the space) or `data offset`.
    pub fn payload_range(&self) -> Result<Option<Range<u64>>, FormatError> {
        if self.platform == PlatformCode::None {
            return Ok(None);
        }
        let limit = self.space_bytes()?.min(u64::from(MAX_PAYLOAD));
        let length = u64::from(self.data_length);
        if length == 0 || length > limit {
            let expected = match limit {
                0 => "0 bytes, as its data space is".to_string(),
                _ => format!("1 to {limit} bytes"),
            };
            return Err(wrong("data length", offset_of!(RawLocator, data_length), length, &expected));
        }
        match self.data_offset.checked_add(length) {
            Some(end) if self.data_offset >= SECTOR && end <= MAX_FILE_OFFSET => {
                Ok(Some(self.data_offset..end))
            }
            _ => Err(self.misplaced()),
        }
    }

    /// An error for a payload whose place is taken, or no place at all.
    pub(super) fn misplaced(&self) -> FormatError {
        let expected = "a place clear of footer copy, dynamic header and BAT";
        wrong("data offset", offset_of!(RawLocator, data_offset), self.data_offset, expected)
    }

    pub(super) fn from_raw(raw: RawLocator) -> Self {
        ParentLocator {
            platform: PlatformCode::from_u32(raw.platform.get()),
            data_space: raw.data_space.get(),
            data_length: raw.data_length.get(),
            reserved: raw.reserved.get(),
            data_offset: raw.data_offset.get(),
        }
    }

    pub(super) fn to_raw(self) -> RawLocator {
        RawLocator {
            platform: self.platform.as_u32().into(),
            data_space: self.data_space.into(),
            data_length: self.data_length.into(),
            reserved: self.reserved.into(),
            data_offset: self.data_offset.into(),
        }
    }
}

/// The payload that names the parent by a path relative to the child's folder.
///
/// `path` has `/` between its components. Any of the codes `W2ru`, `W2ku` and `MacX` gets the relative path: an absolute
/// one would stop resolving as soon as the files are moved, which makes `vhd-util check` fail.
///
/// # Errors
///
/// Field `path`, if it is absolute, empty, longer than [`MAX_PATH_BYTES`], or not expressible: a zero byte in it, or
/// for the two Windows notations a backslash or bytes that are not UTF-8. Field `platform code` for any other code.
pub fn encode_relative(platform: PlatformCode, path: &[u8]) -> Result<Vec<u8>, FormatError> {
    let refuse = |expected: &str| Err(wrong("path", 0, quoted(path.get(..128).unwrap_or(path)), expected));
    if path.len() > MAX_PATH_BYTES {
        return refuse("a path of at most 4096 bytes");
    }
    if path.starts_with(b"/") {
        return refuse("a path relative to the child's folder");
    }
    let ParentPath::Relative(path) = ParentPath::relative(path)? else {
        return refuse("a path relative to the child's folder");
    };
    match platform {
        PlatformCode::W2ru | PlatformCode::W2ku => {
            if path.contains(&b'\\') {
                return refuse("a path without backslashes, which separate folders here");
            }
            let Some(mut units) = units_from_path(&path) else {
                return refuse("a path in UTF-8");
            };
            for unit in &mut units {
                if *unit == u16::from(b'/') {
                    *unit = u16::from(b'\\');
                }
            }
            let prefix = if path.starts_with(b"../") { "" } else { ".\\" };
            Ok(encode_units(&prefix.encode_utf16().chain(units).collect::<Vec<_>>()))
        }
        PlatformCode::MacX => Ok([FILE_SCHEME, b"./", &percent_encode(&path)].concat()),
        other => Err(wrong_platform(other)),
    }
}

/// Reads a payload of code `W2ru`, `W2ku` or `MacX`.
///
/// # Errors
///
/// Field `payload` if it is longer than [`MAX_PAYLOAD`] or no path in that notation; `platform code` for any other
/// code.
pub fn decode_payload(platform: PlatformCode, payload: &[u8]) -> Result<ParentPath, FormatError> {
    if payload.len() > MAX_PAYLOAD as usize {
        return Err(wrong("payload", 0, format!("{} bytes", payload.len()), "at most 64 KiB"));
    }
    match platform {
        PlatformCode::W2ru | PlatformCode::W2ku => ParentPath::from_units(&decode_units(payload)?),
        PlatformCode::MacX => decode_url(payload),
        other => Err(wrong_platform(other)),
    }
}

/// UTF-16LE bytes of `units`, as in `W2ru` and `W2ku`: no byte order mark, no terminating zero.
pub fn encode_units(units: &[u16]) -> Vec<u8> {
    units.iter().flat_map(|unit| unit.to_le_bytes()).collect()
}

/// The units of a `W2ru` or `W2ku` payload, up to a zero if there is one; surrogates need not be paired.
///
/// # Errors
///
/// Field `payload`, if its length is odd.
pub fn decode_units(payload: &[u8]) -> Result<Vec<u16>, FormatError> {
    let (pairs, rest) = payload.as_chunks();
    if !rest.is_empty() {
        return Err(wrong("payload", 0, format!("{} bytes", payload.len()), "whole UTF-16 units"));
    }
    Ok(pairs.iter().map(|&pair| u16::from_le_bytes(pair)).take_while(|&unit| unit != 0).collect())
}

const FILE_SCHEME: &[u8] = b"file://";

/// Reads `file://host/path`, `file:///path`, and blktap's relative `file://./path`. The host is not looked at.
fn decode_url(url: &[u8]) -> Result<ParentPath, FormatError> {
    let refuse = |expected: &str| Err(wrong("payload", 0, quoted(url.get(..128).unwrap_or(url)), expected));
    let end = url.iter().position(|&byte| byte == 0).unwrap_or(url.len());
    let Some(rest) = url.get(..end).and_then(|url| url.strip_prefix(FILE_SCHEME)) else {
        return refuse("a URL that starts with file://");
    };
    let relative = rest.starts_with(b"./") || rest.starts_with(b"../");
    let path = match rest.iter().position(|&byte| byte == b'/') {
        _ if relative => rest,
        Some(host_end) => &rest[host_end..],
        None => return refuse("a path behind the URL's host"),
    };
    match percent_decode(path) {
        Some(path) if relative => ParentPath::relative(&path),
        Some(path) => ParentPath::absolute(&path),
        None => refuse("two hexadecimal digits after each %"),
    }
}

/// Escapes all bytes but letters, digits, the marks that URLs leave alone, and `/`.
fn percent_encode(path: &[u8]) -> Vec<u8> {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut escaped = Vec::with_capacity(path.len());
    for &byte in path {
        if byte.is_ascii_alphanumeric() || b"/-._~@+=,:".contains(&byte) {
            escaped.push(byte);
        } else {
            escaped.extend([b'%', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        }
    }
    escaped
}

fn percent_decode(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let mut path = Vec::with_capacity(text.len());
    let mut rest = text;
    loop {
        match rest {
            [] => return Some(path),
            [b'%', high, low, behind @ ..] => {
                path.push(digit(*high)? << 4 | digit(*low)?);
                rest = behind;
            }
            [b'%', ..] => return None,
            [byte, behind @ ..] => {
                path.push(*byte);
                rest = behind;
            }
        }
    }
}

fn wrong_platform(found: PlatformCode) -> FormatError {
    let found = quoted(&found.as_u32().to_be_bytes());
    wrong("platform code", offset_of!(RawLocator, platform), found, "W2ru, W2ku or MacX")
}

fn wrong(field: &'static str, offset: usize, found: impl std::fmt::Display, expected: &str) -> FormatError {
    FormatError::new(STRUCTURE, field, offset as u64, found, expected)
}

#[cfg(test)]
mod tests {
    use super::PlatformCode::{MacX, W2ku, W2ru};
    use super::*;
    use proptest::prelude::*;

    fn utf16le(text: &str) -> Vec<u8> {
        encode_units(&text.encode_utf16().collect::<Vec<_>>())
    }

    fn relative(path: &str) -> Result<ParentPath, FormatError> {
        Ok(ParentPath::Relative(path.into()))
    }

    #[test]
    fn codes_go_both_ways() {
        for (code, number) in [
            (PlatformCode::None, 0),
            (PlatformCode::Wi2r, 0x5769_3272),
            (PlatformCode::Wi2k, 0x5769_326B),
            (W2ru, 0x5732_7275),
            (W2ku, 0x5732_6B75),
            (PlatformCode::Mac, 0x4D61_6320),
            (MacX, 0x4D61_6358),
            (PlatformCode::Other(0x4F55_524A), 0x4F55_524A),
        ] {
            assert_eq!(code.as_u32(), number);
            assert_eq!(PlatformCode::from_u32(number), code);
        }
    }

    #[test]
    fn space_is_sectors_or_bytes() {
        let space = |data_space| ParentLocator { data_space, ..ParentLocator::default() }.space_bytes().ok();
        assert_eq!(space(1), Some(512));
        assert_eq!(space(511), Some(511 * 512));
        assert_eq!(space(512), Some(512));
        assert_eq!(space(65_536), Some(65_536));
        assert_eq!(space(513), None);
        assert_eq!(space(u32::MAX), None);
    }

    #[test]
    fn payload_is_bounded() {
        let good = ParentLocator::new(W2ru, 4096, 512, 16);
        assert_eq!(good.payload_range(), Ok(Some(4096..4112)));
        assert_eq!(ParentLocator::default().payload_range(), Ok(None));
        let full = ParentLocator { data_length: 512, ..good };
        assert_eq!(full.payload_range(), Ok(Some(4096..4608)));
        for (data_space, expected) in [(0, "0 bytes, as its data space is"), (512, "1 to 512 bytes")] {
            let error = ParentLocator { data_space, data_length: 513, ..good }.payload_range().unwrap_err();
            assert_eq!(error.expected, expected);
        }
        let huge = 0xFFFF_FE00;
        for (wrong, field) in [
            (ParentLocator { data_space: 0, ..good }, "data length"),
            (ParentLocator { data_space: 700, ..good }, "data space"),
            (ParentLocator { data_length: 0, ..good }, "data length"),
            (ParentLocator { data_length: 513, ..good }, "data length"),
            (ParentLocator { data_space: huge, data_length: huge, ..good }, "data length"),
            (ParentLocator { data_offset: 0, ..good }, "data offset"),
            (ParentLocator { data_offset: 511, ..good }, "data offset"),
            (ParentLocator { data_offset: u64::MAX, ..good }, "data offset"),
            (ParentLocator { data_offset: 1 << 63, ..good }, "data offset"),
        ] {
            assert_eq!(wrong.payload_range().unwrap_err().field, field, "{wrong:?}");
        }
    }

    #[test]
    fn writes_what_other_tools_write() {
        assert_eq!(encode_relative(W2ru, b"parent.vhd").unwrap(), utf16le(r".\parent.vhd"));
        assert_eq!(encode_relative(W2ku, b"a/b.vhd").unwrap(), utf16le(r".\a\b.vhd"));
        assert_eq!(encode_relative(W2ru, b"../base/p.vhd").unwrap(), utf16le(r"..\base\p.vhd"));
        assert_eq!(encode_relative(MacX, b"parent.vhd").unwrap(), b"file://./parent.vhd");
        assert_eq!(
            encode_relative(MacX, "vm@a b%\u{e9}.vhd".as_bytes()).unwrap(),
            b"file://./vm@a%20b%25%C3%A9.vhd"
        );
    }

    #[test]
    fn reads_what_other_tools_write() {
        for text in [r".\parent.vhd", "./parent.vhd", "parent.vhd", r".\\.\parent.vhd", ".\\parent.vhd\0junk"]
        {
            assert_eq!(decode_payload(W2ru, &utf16le(text)), relative("parent.vhd"), "{text}");
        }
        assert_eq!(decode_payload(W2ru, &utf16le(r"..\base\p.vhd")), relative("../base/p.vhd"));
        assert_eq!(
            decode_payload(W2ku, &utf16le(r"C:\x\parent.vhd")),
            Ok(ParentPath::Windows("C:/x/parent.vhd".into()))
        );
        assert_eq!(
            decode_payload(W2ku, &utf16le(r"\\host\share\p.vhd")),
            Ok(ParentPath::Windows("//host/share/p.vhd".into()))
        );
        assert_eq!(
            decode_payload(W2ku, &utf16le(r"\mnt\p.vhd")),
            Ok(ParentPath::Absolute("/mnt/p.vhd".into()))
        );
        assert_eq!(decode_payload(MacX, b"file://./a%20b.vhd"), relative("a b.vhd"));
        assert_eq!(decode_payload(MacX, b"file://../p.vhd\0"), relative("../p.vhd"));
        for url in ["file:///mnt/p.vhd", "file://localhost/mnt/p.vhd", "file://host//mnt/./%70.vhd"] {
            assert_eq!(
                decode_payload(MacX, url.as_bytes()),
                Ok(ParentPath::Absolute("/mnt/p.vhd".into())),
                "{url}"
            );
        }
    }

    #[test]
    fn refuses_what_is_no_path() {
        for (platform, payload) in [
            (W2ru, &b""[..]),
            (W2ru, b"."),
            (W2ru, b".\0\\\0"),
            (W2ru, b"a\0b"),
            (W2ku, b"\0\0a\0"),
            (MacX, b""),
            (MacX, b"http://host/x"),
            (MacX, b"file://"),
            (MacX, b"file://host"),
            (MacX, b"file:///"),
            (MacX, b"file://./"),
            (MacX, b"file:///a%2"),
            (MacX, b"file:///a%zz"),
            (MacX, b"file:///a%+1"),
            (MacX, b"file:///a%00b"),
        ] {
            let error = decode_payload(platform, payload).unwrap_err();
            assert_eq!((error.structure, error.field), ("parent locator", "payload"), "{payload:?}");
        }
        assert_eq!(decode_payload(W2ru, &[b'a'; 65_538]).unwrap_err().field, "payload");
        for platform in [PlatformCode::None, PlatformCode::Wi2k, PlatformCode::Mac, PlatformCode::Other(1)] {
            assert_eq!(decode_payload(platform, b"x").unwrap_err().field, "platform code");
            assert_eq!(encode_relative(platform, b"x").unwrap_err().field, "platform code");
        }
    }

    #[test]
    fn refuses_to_write_what_would_not_be_read_back() {
        for path in [&b""[..], b".", b"./", b"/p.vhd", b"//h/p.vhd", b"a\0b", &[b'a'; MAX_PATH_BYTES + 1]] {
            for platform in [W2ru, W2ku, MacX] {
                encode_relative(platform, path).unwrap_err();
            }
        }
        // What stands behind a zero counts, too.
        for (length, fits) in [(65_536, true), (65_538, false), (131_072, false)] {
            let mut payload = vec![0; length];
            payload[0] = b'a';
            assert_eq!(decode_payload(W2ku, &payload).is_ok(), fits, "{length} bytes");
        }
        // Whatever is left of it without the parts that mean nothing.
        for (path, fits) in [(b"./".repeat(2047), true), (b"./".repeat(2048), false)] {
            let path = [&path[..], b"ab"].concat();
            assert_eq!(encode_relative(MacX, &path).is_ok(), fits, "{} bytes", path.len());
        }
        assert_eq!(encode_relative(W2ru, br"a\b").unwrap_err().field, "path");
        assert_eq!(encode_relative(W2ru, b"a\xFFb").unwrap_err().field, "path");
        assert_eq!(encode_relative(MacX, b"a\\\xFFb").unwrap(), b"file://./a%5C%FFb");
    }

    proptest! {
        #[test]
        fn payloads_never_panic(number in 0usize..3, payload in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = decode_payload([W2ru, W2ku, MacX][number], &payload);
            let _ = decode_payload(MacX, &[FILE_SCHEME, &payload].concat());
        }

        #[test]
        fn units_are_kept_whole(units in prop::collection::vec(1u16.., 0..40)) {
            prop_assert_eq!(decode_units(&encode_units(&units)), Ok(units));
        }

        #[test]
        fn relative_paths_come_back(
            path in "(\\.\\./){0,2}[a-zA-Z:%\u{80}-\u{10FFFF} ]{1,10}(/[^/\\\\\0]{1,10}){0,3}",
            number in 0usize..3,
        ) {
            let platform = [W2ru, W2ku, MacX][number];
            let expected = ParentPath::relative(path.as_bytes())?;
            let payload = encode_relative(platform, path.as_bytes())?;
            prop_assert_eq!(decode_payload(platform, &payload)?, expected);
        }
    }
}
