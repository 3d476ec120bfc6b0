//! A parent's path as text, freed of the notation in which a file holds it.
//!
//! Source: VHD specification, "Dynamic Disk Header Format: Parent Unicode Name"; separators and prefixes as blktap and
//! Hyper-V write them. Windows names are UTF-16 that need not be well-formed, POSIX names are bytes. They meet in WTF-8:
//! UTF-8 in which an unpaired surrogate is encoded as if it were a character, so that no name is lost or changed.

use std::fmt::{self, Write};

use super::quoted;
use crate::FormatError;

/// The longest path taken or given, in bytes: what Linux takes.
pub const MAX_PATH_BYTES: usize = 4096;

/// Where a parent is said to be. All paths have `/` between components, and neither empty nor `.` components; `..` is
/// kept, and to be judged by whoever follows the path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ParentPath {
    /// Relative to the folder of the child.
    Relative(Vec<u8>),
    /// From the root of a POSIX file system; starts with `/`.
    Absolute(Vec<u8>),
    /// On a drive or share of Windows (`C:/…`, `//host/share/…`): only its file name can be of use elsewhere.
    Windows(Vec<u8>),
}

impl ParentPath {
    /// Reads a path in UTF-16 units, from a `W2ru` or `W2ku` locator or the header's parent name. Both `\` and `/`
    /// separate.
    ///
    /// # Errors
    ///
    /// Field `payload`, if it is empty, holds a zero, or is longer than [`MAX_PATH_BYTES`].
    pub fn from_units(units: &[u16]) -> Result<ParentPath, FormatError> {
        let mut path = path_from_units(units);
        for byte in &mut path {
            if *byte == b'\\' {
                *byte = b'/';
            }
        }
        match path.as_slice() {
            [b'/', b'/', share @ ..] => Ok(ParentPath::Windows(normalize(b"//", share)?)),
            [drive, b':', rest @ ..] if drive.is_ascii_alphabetic() => {
                // `C:name` is relative to a folder nobody knows; to us it is a Windows path like any other.
                let root: &[u8] =
                    if rest.starts_with(b"/") { &[*drive, b':', b'/'] } else { &[*drive, b':'] };
                Ok(ParentPath::Windows(normalize(root, rest)?))
            }
            [b'/', ..] => ParentPath::absolute(&path),
            _ => ParentPath::relative(&path),
        }
    }

    /// A path relative to the child's folder.
    pub(super) fn relative(path: &[u8]) -> Result<ParentPath, FormatError> {
        Ok(ParentPath::Relative(normalize(b"", path)?))
    }

    /// A path from the root.
    pub(super) fn absolute(path: &[u8]) -> Result<ParentPath, FormatError> {
        Ok(ParentPath::Absolute(normalize(b"/", path)?))
    }

    /// The path's bytes: UTF-8, unless the name was not well-formed.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            ParentPath::Relative(path) | ParentPath::Absolute(path) | ParentPath::Windows(path) => path,
        }
    }

    /// The last component, unless it is `..`: what the parent is called if it lies beside its child.
    pub fn file_name(&self) -> Option<&[u8]> {
        self.as_bytes()
            .rsplit(|&byte| byte == b'/' || (byte == b':' && matches!(self, ParentPath::Windows(_))))
            .next()
            .filter(|name| !name.is_empty() && *name != b"..")
    }
}

impl fmt::Display for ParentPath {
    /// The path for people: control characters, which could drive a terminal, and bytes that are not UTF-8 are
    /// escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.as_bytes().utf8_chunks() {
            for character in chunk.valid().chars() {
                if character.is_control() {
                    write!(f, "{}", character.escape_default())?;
                } else {
                    f.write_char(character)?;
                }
            }
            write!(f, "{}", chunk.invalid().escape_ascii())?;
        }
        Ok(())
    }
}

/// `root` and the components of `path` that are neither empty nor `.`, with `/` between them.
fn normalize(root: &[u8], path: &[u8]) -> Result<Vec<u8>, FormatError> {
    let refuse = |expected: &str| {
        let found = quoted(path.get(..128).unwrap_or(path));
        Err(FormatError::new("parent locator", "payload", 0, found, expected))
    };
    if path.contains(&0) {
        return refuse("a path without zero bytes");
    }
    let components: Vec<&[u8]> =
        path.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".").collect();
    if components.is_empty() {
        return refuse("a path that names a file");
    }
    let normal = [root, &components.join(&b'/')].concat();
    if normal.len() > MAX_PATH_BYTES {
        return refuse("a path of at most 4096 bytes");
    }
    Ok(normal)
}

/// UTF-16 units as WTF-8 bytes. Every sequence of units has its own bytes; separators are left alone.
pub fn path_from_units(units: &[u16]) -> Vec<u8> {
    let mut path = Vec::with_capacity(units.len());
    for decoded in char::decode_utf16(units.iter().copied()) {
        match decoded {
            Ok(character) => path.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
            Err(unpaired) => {
                let unit = unpaired.unpaired_surrogate();
                path.extend([
                    0xE0 | (unit >> 12) as u8,
                    0x80 | (unit >> 6 & 0x3F) as u8,
                    0x80 | (unit & 0x3F) as u8,
                ]);
            }
        }
    }
    path
}

/// The units whose WTF-8 is `path`: the inverse of [`path_from_units`]. `None` if there are none.
pub fn units_from_path(path: &[u8]) -> Option<Vec<u16>> {
    let mut units = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some(chunk) = rest.utf8_chunks().next() {
        units.extend(chunk.valid().encode_utf16());
        rest = rest.get(chunk.valid().len()..)?;
        match rest {
            [] => break,
            [0xED, second @ 0xA0..=0xBF, third @ 0x80..=0xBF, behind @ ..] => {
                units.push(0xD000 | u16::from(second & 0x3F) << 6 | u16::from(third & 0x3F));
                rest = behind;
            }
            _ => return None,
        }
    }
    // Two surrogates that make a pair are encoded as the character they mean, never one by one.
    (path_from_units(&units) == path).then_some(units)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<ParentPath, FormatError> {
        ParentPath::from_units(&text.encode_utf16().collect::<Vec<_>>())
    }

    #[test]
    fn knows_the_kinds_of_path() {
        for (text, path, name) in [
            ("p.vhd", ParentPath::Relative("p.vhd".into()), Some("p.vhd")),
            (r"a\..\p.vhd", ParentPath::Relative("a/../p.vhd".into()), Some("p.vhd")),
            (r".\c:p.vhd", ParentPath::Relative("c:p.vhd".into()), Some("c:p.vhd")),
            (r"..\..", ParentPath::Relative("../..".into()), None),
            (r"\mnt\.\p.vhd", ParentPath::Absolute("/mnt/p.vhd".into()), Some("p.vhd")),
            (r"1:p.vhd", ParentPath::Relative("1:p.vhd".into()), Some("1:p.vhd")),
            (r"c:p.vhd", ParentPath::Windows("c:p.vhd".into()), Some("p.vhd")),
            (r"C:\\x\p.vhd", ParentPath::Windows("C:/x/p.vhd".into()), Some("p.vhd")),
            (r"\\host\share\p.vhd", ParentPath::Windows("//host/share/p.vhd".into()), Some("p.vhd")),
            (r"\\?\C:\p.vhd", ParentPath::Windows("//?/C:/p.vhd".into()), Some("p.vhd")),
        ] {
            assert_eq!(path.file_name(), name.map(str::as_bytes), "{text}");
            assert_eq!(parse(text), Ok(path), "{text}");
        }
    }

    #[test]
    fn refuses_what_names_no_file() {
        for text in ["", ".", r".\", r"\", r"\\", "C:", r"C:\", "a\0b", &"a".repeat(4097)] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.field, "payload", "{text:?}");
            assert!(error.to_string().len() < 400, "{error}");
        }
        let longest = "a".repeat(4096);
        assert_eq!(parse(&longest), Ok(ParentPath::Relative(longest.into())));
    }

    #[test]
    fn keeps_unpaired_surrogates() {
        let units = [0x61, 0xD83D, 0x62, 0xDE00, 0xD83D, 0xDE00, 0xDFFF];
        let path = path_from_units(&units);
        assert_eq!(path, b"a\xED\xA0\xBDb\xED\xB8\x80\xF0\x9F\x98\x80\xED\xBF\xBF");
        assert_eq!(units_from_path(&path), Some(units.into()));
    }

    #[test]
    fn prints_without_driving_the_terminal() {
        let path = ParentPath::Relative(b"d\xC3\xA9j\xC3\xA0 \x1B[2J\n\xFF.vhd".to_vec());
        assert_eq!(path.to_string(), "d\u{e9}j\u{e0} \\u{1b}[2J\\n\\xff.vhd");
    }

    #[test]
    fn bytes_that_are_no_wtf8_have_no_units() {
        for path in
            [&b"\xFF"[..], b"a\xC0\x80", b"\xED\xA0", b"\xED\xA0\xBD\xED\xB8\x80", b"\xF4\x90\x80\x80"]
        {
            assert_eq!(units_from_path(path), None, "{path:x?}");
        }
    }

    proptest! {
        #[test]
        fn every_name_comes_back(units: Vec<u16>, mixed in prop::collection::vec(0xD700u16..0xE100, 0..20)) {
            for units in [units, mixed] {
                prop_assert_eq!(units_from_path(&path_from_units(&units)), Some(units));
            }
        }

        #[test]
        fn any_bytes_come_back_or_have_no_units(path in prop::collection::vec(prop_oneof![
            any::<u8>(), Just(0xED), 0xA0u8..0xC0
        ], 0..12)) {
            if let Some(units) = units_from_path(&path) {
                prop_assert_eq!(path_from_units(&units), path);
            }
        }
    }
}
