//! What the fixed structures of a file say: both footers, the dynamic header and its backup, both superblocks.
//!
//! Reading judges nothing but each structure by itself; which of them counts is decided in one place, [`Headers::decide`].

use crate::error::{Error, FormatError, Result};
use crate::ext::{HEADER_BACKUP_OFFSET, PAGE_BYTES, Placement, SUPERBLOCK_OFFSETS, State, Superblock};
use crate::vfs::{File, FileExt};
use crate::vhd::{self, DiskType, DynamicHeader, Footer, HeaderCookie};
use std::path::Path;

const FOOTER_BYTES: usize = Footer::SIZE;
const HEADER_END: usize = FOOTER_BYTES + DynamicHeader::SIZE;

/// Footer and dynamic header as they stand together at the start of the file and in the backup.
pub(crate) type HeaderPair = (Footer, DynamicHeader);

/// The structures of one file as they are.
#[derive(Debug)]
pub(crate) struct Headers {
    /// Length of the file in bytes.
    pub(crate) file_bytes: u64,
    /// Footer copy and dynamic header at the start.
    pub(crate) front: Result<HeaderPair, FormatError>,
    /// The backup of both at its fixed place.
    pub(crate) backup: Result<HeaderPair, FormatError>,
    /// The footer at the end.
    pub(crate) end: Result<Footer, FormatError>,
    /// Superblock A and B.
    pub(crate) superblocks: [Result<Superblock, FormatError>; 2],
}

/// What is to be done with an image when it is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    /// Nothing: everything is in place.
    Clean,
    /// The journal of the superblock's session is to be replayed.
    Dirty,
    /// The last close was cut short behind its superblock: everything is in place but the end of the close.
    HalfClosed,
}

/// The structures that count.
#[derive(Debug, Clone)]
pub(crate) struct Decision {
    pub(crate) footer: Footer,
    /// The dynamic header, with its normal cookie.
    pub(crate) header: DynamicHeader,
    pub(crate) condition: Condition,
    /// The current superblock and which of the two places it stands in; `None` in an image made elsewhere.
    pub(crate) superblock: Option<(Superblock, usize)>,
    /// The start of the file has to be written again from the backup.
    pub(crate) front_lost: bool,
}

impl Headers {
    /// Reads all of them; missing parts of a short file read as zeros.
    pub(crate) fn read(file: &dyn File, path: &Path) -> Result<Self> {
        let read = |what: &str, offset: u64, buf: &mut [u8]| {
            file.read_or_zero_at(buf, offset)
                .map_err(|error| Error::io(path, format!("reading the {what} at offset {offset}"), error))
        };
        let file_bytes = file.length().map_err(|error| Error::io(path, "asking for the length", error))?;
        let mut page = [0; PAGE_BYTES as usize];
        read("footer copy and dynamic header", 0, &mut page)?;
        let front = parse_pair(&page);
        read("header backup", HEADER_BACKUP_OFFSET, &mut page)?;
        let backup = parse_pair(&page);
        let mut end = [0; FOOTER_BYTES];
        read("footer", file_bytes.saturating_sub(FOOTER_BYTES as u64), &mut end)?;
        let mut superblocks = SUPERBLOCK_OFFSETS.map(|_| Superblock::parse(&[]));
        for (superblock, offset) in superblocks.iter_mut().zip(SUPERBLOCK_OFFSETS) {
            read("superblock", offset, &mut page)?;
            *superblock = Superblock::parse(&page);
        }
        Ok(Headers { file_bytes, front, backup, end: Footer::parse(&end), superblocks })
    }

    /// Decides which structures count and what open has to do (FORMAT.md, "States and recovery").
    pub(crate) fn decide(&self, path: &Path) -> Result<Decision> {
        let (pair, front_lost) = match (&self.front, &self.backup) {
            (Ok(front), _) => (front, false),
            // The backup counts only where a superblock of the same disk vouches for it.
            (Err(_), Ok(backup)) if self.superblock_of(&backup.0).is_some() => (backup, true),
            (Err(error), _) => return Err(error.clone().at(path, 0)),
        };
        let (footer, mut header) = pair.clone();
        let cookie = header.cookie;
        header.cookie = HeaderCookie::Normal;
        let superblock = self.superblock_of(&footer);
        let condition = match (
            cookie,
            front_lost,
            superblock.as_ref().map(|(superblock, _)| superblock.state),
        ) {
            // A journal under a normal cookie is never replayed.
            (HeaderCookie::Normal, false, _) => Condition::Clean,
            (_, _, Some(State::Dirty)) => Condition::Dirty,
            (_, _, Some(State::Clean)) => Condition::HalfClosed,
            (_, _, None) => {
                let (what, hint) = (
                    "the dynamic header says that a journal is ahead of the file, but neither superblock is valid",
                    "run `cowvhd repair` on a copy",
                );
                return Err(Error::Damaged { path: path.to_path_buf(), what: what.into(), hint });
            }
        };
        vhd::validate_geometry(&footer, &header).map_err(|error| error.at(path, 0))?;
        Ok(Decision { footer, header, condition, superblock, front_lost })
    }

    /// The newest valid superblock of the disk that `footer` describes, and its place.
    fn superblock_of(&self, footer: &Footer) -> Option<(Superblock, usize)> {
        let of_this_disk = self.superblocks.iter().enumerate().filter_map(|(index, superblock)| {
            let superblock = superblock.as_ref().ok().filter(|s| s.disk_id == footer.unique_id)?;
            Some((*superblock, index))
        });
        of_this_disk.max_by_key(|(superblock, _)| superblock.sequence)
    }
}

impl Decision {
    /// Where things lie, from the header and the superblock; checks that no area covers another and all lie in the file.
    pub(crate) fn placement(&self, path: &Path, file_bytes: u64) -> Result<Placement> {
        if self.footer.disk_type != DiskType::Dynamic {
            let what =
                format!("it is a {:?} disk; this version opens dynamic disks only", self.footer.disk_type);
            return Err(Error::Unsupported { path: path.to_path_buf(), what });
        }
        let header = &self.header;
        let table_end = header.table_offset.saturating_add(vhd::bat_bytes(header.max_table_entries));
        if table_end > file_bytes {
            let found = format!("{} to {table_end}", header.table_offset);
            let expected = format!("a table inside the file of {file_bytes} bytes");
            return Err(FormatError::new("dynamic header", "table offset", 16, found, expected).at(path, 512));
        }
        let place = Placement {
            ring_offset: self.superblock.map_or(0, |(s, _)| s.ring_offset),
            ring_bytes: self.superblock.map_or(0, |(s, _)| s.ring_bytes),
            table_offset: header.table_offset,
            table_entries: header.max_table_entries,
            slot_origin: self.superblock.map_or(table_end, |(s, _)| s.slot_origin),
            block_bytes: header.block_size,
        };
        let Some((_, index)) = self.superblock else { return Ok(place) };
        let at = SUPERBLOCK_OFFSETS.get(index).copied().unwrap_or_default();
        let wrong = |field, offset, found: u64, expected: &str| {
            Err(FormatError::new("superblock", field, offset, found, expected).at(path, at))
        };
        let aligned = |offset: u64| offset.is_multiple_of(PAGE_BYTES);
        let ring_end = place.ring_offset.saturating_add(place.ring_bytes);
        if !aligned(place.ring_offset) || place.ring_offset < HEADER_BACKUP_OFFSET + PAGE_BYTES {
            return wrong("ring offset", 80, place.ring_offset, "a page behind the header backup");
        }
        if !aligned(place.ring_bytes) || !(MIN_RING_BYTES..=MAX_RING_BYTES).contains(&place.ring_bytes) {
            return wrong("ring bytes", 88, place.ring_bytes, "whole pages, from 128 KiB to 16 MiB");
        }
        if ring_end > place.table_offset {
            return wrong("ring bytes", 88, place.ring_bytes, "a ring that ends before the block table");
        }
        if !aligned(place.table_offset) {
            let found = place.table_offset;
            return Err(
                FormatError::new("dynamic header", "table offset", 16, found, "a whole page").at(path, 512)
            );
        }
        if !aligned(place.slot_origin) || place.slot_origin < table_end.next_multiple_of(PAGE_BYTES) {
            return wrong("slot origin", 136, place.slot_origin, "a page behind the block table");
        }
        if !aligned(place.block_bytes.into()) || place.bitmap_bytes() > MAX_BITMAP_BYTES {
            let found = place.block_bytes;
            return Err(
                FormatError::new("dynamic header", "block size", 32, found, "4 KiB to 8 MiB").at(path, 512)
            );
        }
        Ok(place)
    }
}

/// The smallest ring that holds the reserve for images and entries beside it, in bytes.
pub(crate) const MIN_RING_BYTES: u64 = 32 * PAGE_BYTES;
const MAX_RING_BYTES: u64 = 16 << 20;
/// A block page is at most half bitmap, so that the header has room.
const MAX_BITMAP_BYTES: u64 = 2048;

/// Parses a footer and a dynamic header behind it.
fn parse_pair(page: &[u8]) -> Result<HeaderPair, FormatError> {
    let footer = Footer::parse(page.get(..FOOTER_BYTES).unwrap_or_default())?;
    let header = DynamicHeader::parse(page.get(FOOTER_BYTES..HEADER_END).unwrap_or_default())?;
    Ok((footer, header))
}

/// The bytes of a pair, as they stand at the start of the file and in the backup.
pub(crate) fn pair_bytes(footer: &Footer, header: &DynamicHeader) -> [u8; HEADER_END] {
    let mut bytes = [0; HEADER_END];
    let (front, back) = bytes.split_at_mut(FOOTER_BYTES);
    front.copy_from_slice(&footer.to_bytes());
    back.copy_from_slice(&header.to_bytes());
    bytes
}
