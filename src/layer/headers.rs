//! What the fixed structures of a file say: both footers, the dynamic header and its backup, both superblocks.
//!
//! Reading judges nothing but each structure by itself; which of them counts is decided in one place, [`Headers::decide`].

use super::copies::both_misfits;
use super::unreplayed::{self, Unreplayed};
use crate::error::{Error, FormatError, Result};
use crate::ext::{
    HEADER_BACKUP_OFFSET, Lineage, PAGE_BYTES, Placement, SUPERBLOCK_OFFSETS, State, Superblock,
    SuperblockError, TEMPORARY_HEAD_BYTES, Temporary,
};
use crate::vfs::{File, FileExt};
use crate::vhd::{self, DiskType, DynamicHeader, Footer, HeaderCookie};
use std::path::Path;

const FOOTER_BYTES: usize = Footer::SIZE;
pub(super) const HEADER_END: usize = FOOTER_BYTES + DynamicHeader::SIZE;
/// Where the dynamic header stands in every image that we write to.
pub(crate) const HEADER_OFFSET: u64 = FOOTER_BYTES as u64;

/// A footer and the dynamic header that it names.
pub(crate) type HeaderPair = (Footer, DynamicHeader);

/// What is wrong with a structure, and the file offset at which it starts.
type Misfit = (u64, FormatError);

/// The structures of one file as they are.
#[derive(Debug)]
pub(crate) struct Headers {
    /// Length of the file in bytes.
    pub(crate) file_bytes: u64,
    /// Footer copy at the start, and the dynamic header.
    pub(crate) front: Result<HeaderPair, Misfit>,
    /// The backup of both at its fixed place.
    pub(crate) backup: Result<HeaderPair, FormatError>,
    /// The footer at the end.
    pub(crate) end: Result<Footer, FormatError>,
    /// The same with the dynamic header that it names.
    pub(super) end_pair: Result<HeaderPair, Misfit>,
    /// Where the offsets of superblocks and backup count from: 0, or the head of a temporary journal.
    pub(crate) base: u64,
    /// Superblock A and B.
    pub(crate) superblocks: [Result<Superblock, SuperblockError>; 2],
    /// A journal that does not count and should have.
    pub(super) unreplayed: Option<Unreplayed>,
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
    /// The dynamic header as it is in the closed image.
    pub(crate) header: DynamicHeader,
    /// Where the offsets of superblocks and backup count from: 0, or the head of a temporary journal.
    pub(crate) base: u64,
    pub(crate) condition: Condition,
    /// The current superblock and which of the two places it stands in; `None` in an image made elsewhere.
    pub(crate) superblock: Option<(Superblock, usize)>,
    /// The start of the file has to be written again from the backup.
    pub(crate) front_lost: bool,
    /// A journal that does not count, as the cookie is normal, and that was never brought in place.
    pub(crate) unreplayed: Option<Unreplayed>,
    /// Why the file can be read and must not be written: its structures contradict each other.
    pub(crate) doubt: Option<String>,
}

impl Headers {
    /// Reads all of them; missing parts of a short file read as zeros.
    pub(crate) fn read(file: &dyn File, path: &Path) -> Result<Self> {
        let read = |what: &str, offset: u64, buf: &mut [u8]| {
            file.read_or_zero_at(buf, offset)
                .map_err(|error| Error::io(path, format!("reading the {what} at offset {offset}"), error))
        };
        let file_bytes = file.length().map_err(|error| Error::io(path, "asking for the length", error))?;
        let pair = |at: u64, footer: &Result<Footer, FormatError>| -> Result<Result<HeaderPair, Misfit>> {
            let footer = match footer {
                Ok(footer) if footer.disk_type == DiskType::Fixed => {
                    return Ok(Err((at, type_without_header(footer))));
                }
                Ok(footer) => footer.clone(),
                Err(error) => return Ok(Err((at, error.clone()))),
            };
            let header_at = footer.data_offset;
            if header_at.checked_add(DynamicHeader::SIZE as u64).is_none_or(|end| end > file_bytes) {
                let expected = format!("a dynamic header inside the file of {file_bytes} bytes");
                return Ok(Err((at, FormatError::new("footer", "data offset", 16, header_at, expected))));
            }
            let mut header = [0; DynamicHeader::SIZE];
            read("dynamic header", header_at, &mut header)?;
            Ok(match DynamicHeader::parse(&header) {
                Ok(header) => Ok((footer, header)),
                Err(error) => Err((header_at, error)),
            })
        };
        let mut footer = [0; FOOTER_BYTES];
        read("footer copy", 0, &mut footer)?;
        let front = pair(0, &Footer::parse(&footer))?;
        let end_at = file_bytes.saturating_sub(FOOTER_BYTES as u64);
        read("footer", end_at, &mut footer)?;
        let end = Footer::parse(&footer);
        let end_pair = pair(end_at, &end)?;
        let superblocks_from = |base: u64| -> Result<[Result<Superblock, SuperblockError>; 2]> {
            let mut page = [0; PAGE_BYTES as usize];
            let mut superblocks = SUPERBLOCK_OFFSETS.map(|_| Superblock::parse(&[]));
            for (superblock, offset) in superblocks.iter_mut().zip(SUPERBLOCK_OFFSETS) {
                read("superblock", base + offset, &mut page)?;
                *superblock = Superblock::parse(&page);
            }
            Ok(superblocks)
        };
        let head = file_bytes
            .checked_sub(TEMPORARY_HEAD_BYTES)
            .filter(|&head| head != 0 && head.is_multiple_of(PAGE_BYTES));
        let base = match (&front, head) {
            (Ok((_, header)), Some(head)) if temporary_head(header) == Some(head) => head,
            // No guest can write to the last sector, and none knows the id that stands there.
            (Err(_), Some(head)) => {
                let of_this_disk = |superblock: &Superblock| {
                    let id = end.as_ref().map(|end| end.unique_id);
                    superblock.is_temporary() && id.is_ok_and(|id| id == superblock.disk_id)
                };
                let found = superblocks_from(head)?.iter().flatten().any(of_this_disk);
                if found { head } else { 0 }
            }
            _ => 0,
        };
        let superblocks = superblocks_from(base)?;
        let mut page = [0; PAGE_BYTES as usize];
        read("header backup", base + HEADER_BACKUP_OFFSET, &mut page)?;
        let backup = parse_backup(&page);
        let temporary = match head.filter(|_| base == 0) {
            Some(head) => Some((head, superblocks_from(head)?.map(Result::ok))),
            None => None,
        };
        let mut headers =
            Headers { file_bytes, front, backup, end, end_pair, base, superblocks, unreplayed: None };
        headers.unreplayed = unreplayed::find(file, &headers, temporary);
        Ok(headers)
    }

    /// Decides which structures count and what open has to do (FORMAT.md, "States and recovery").
    pub(crate) fn decide(&self, path: &Path) -> Result<Decision> {
        self.refuse_fixed(path)?;
        let (pair, front_lost, doubt) = self.pair_in_use(path)?;
        let (footer, mut header) = pair.clone();
        self.refuse_newer(path, &footer)?;
        let cookie = header.cookie;
        if let Some(head) = temporary_head(&header).filter(|_| !front_lost) {
            if head != self.base {
                let what = format!(
                    "the dynamic header says that a temporary journal of {TEMPORARY_HEAD_BYTES} bytes at offset {head} ends \
                     the file, which has {} bytes",
                    self.file_bytes
                );
                let hint =
                    "if the file was copied or cut, use the original; else run `cowvhd repair` on a copy";
                return Err(Error::Damaged { path: path.to_path_buf(), what, hint });
            }
            let backup = self.backup.as_ref().ok().filter(|backup| backup.0.to_bytes() == footer.to_bytes());
            header.data_offset = backup.map_or(u64::MAX, |(_, backup)| backup.data_offset);
        }
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
                let what = format!(
                    "the dynamic header says that a journal is ahead of the file, but neither superblock is valid: {}",
                    both_misfits(self, &footer, self.superblock_offsets())
                );
                let hint = "run `cowvhd repair` on a copy";
                return Err(Error::Damaged { path: path.to_path_buf(), what, hint });
            }
        };
        vhd::validate_geometry(&footer, &header).map_err(|error| {
            let at = if error.structure == "footer" { 0 } else { footer.data_offset };
            error.at(path, at)
        })?;
        let stale = superblock.filter(|_| front_lost && condition == Condition::HalfClosed && self.base == 0);
        let unreplayed = self.unreplayed.clone();
        let doubt = unreplayed
            .as_ref()
            .map(Unreplayed::doubt)
            .or(doubt)
            .or_else(|| self.stale_backup(&footer, &header, &stale?.0));
        Ok(Decision { footer, header, base: self.base, condition, superblock, front_lost, unreplayed, doubt })
    }

    /// In a fixed disk all but the last sector is the guest's, who can write any VHD, dirty or not, to the start of it. So
    /// nothing but the last sector tells; in a dynamic disk that is never the guest's.
    fn refuse_fixed(&self, path: &Path) -> Result<()> {
        match &self.end {
            Ok(end) if end.disk_type == DiskType::Fixed && holds_fixed(end, self.file_bytes) => {
                let what = "it is a fixed disk, which has no parent, table or journal".to_string();
                Err(Error::Unsupported { path: path.to_path_buf(), what })
            }
            _ => Ok(()),
        }
    }

    /// Neither copy may say what only a newer version understands. The older one must not stand in: it describes a past.
    fn refuse_newer(&self, path: &Path, footer: &Footer) -> Result<()> {
        for (superblock, at) in self.superblocks.iter().zip(self.superblock_offsets()) {
            if let Err(SuperblockError::Newer { disk_id, error }) = superblock
                && *disk_id == footer.unique_id
            {
                let what =
                    format!("at offset {at}: {error}; a newer version of cowvhd wrote it: use that one");
                return Err(Error::Unsupported { path: path.to_path_buf(), what });
            }
        }
        Ok(())
    }

    /// File offsets of superblock A and B.
    pub(crate) fn superblock_offsets(&self) -> [u64; 2] {
        SUPERBLOCK_OFFSETS.map(|offset| self.base + offset)
    }

    /// Whether a superblock is of the kind that stands where this one does.
    fn is_in_place(&self, superblock: &Superblock) -> bool {
        superblock.is_temporary() == (self.base != 0)
    }

    /// Whether a superblock belongs to the disk that `footer` describes, be it one that only a newer version understands.
    fn has_superblock(&self, footer: &Footer) -> bool {
        self.superblocks.iter().any(|superblock| match superblock {
            Ok(superblock) => self.is_in_place(superblock) && superblock.disk_id == footer.unique_id,
            Err(SuperblockError::Newer { disk_id, .. }) => *disk_id == footer.unique_id,
            Err(SuperblockError::Invalid(_)) => false,
        })
    }

    /// Footer and header that count, whether the start of the file is lost, and what speaks against writing.
    fn pair_in_use(&self, path: &Path) -> Result<(&HeaderPair, bool, Option<String>)> {
        let normal = |pair: &&HeaderPair| pair.1.cookie == HeaderCookie::Normal;
        let end_pair = self.end_pair.as_ref().ok().filter(normal).filter(|pair| self.holds(pair));
        match (&self.front, &self.backup) {
            // A dirty image has no footer at its end.
            (Ok(front), _) if front.1.cookie == HeaderCookie::Dirty => Ok((front, false, None)),
            (Ok(front), _) => match &self.end {
                Ok(end) if end.to_bytes() != front.0.to_bytes() => {
                    let fields = differing_fields(&front.0, end);
                    let doubt = |used: &str| {
                        format!(
                            "the footers at the start and at the end differ ({fields}), that at the {used} counts"
                        )
                    };
                    match end_pair {
                        Some(pair) if !self.holds(front) => Ok((pair, false, Some(doubt("end")))),
                        _ => Ok((front, false, Some(doubt("start")))),
                    }
                }
                _ => Ok((front, false, None)),
            },
            // The backup counts only where a superblock of the same disk vouches for it. In an image made elsewhere a guest could
            // have written both; then the footer at the end is that of another disk.
            (Err(_), Ok(backup))
                if self.has_superblock(&backup.0)
                    && self.end.as_ref().map_or(true, |end| end.unique_id == backup.0.unique_id) =>
            {
                Ok((backup, true, None))
            }
            (Err((at, error)), _) => match end_pair {
                Some(pair) => {
                    let doubt =
                        format!("the start of the file is damaged ({error}), the footer at the end counts");
                    Ok((pair, false, Some(doubt)))
                }
                None => Err(match &self.end {
                    Ok(end) if end.disk_type == DiskType::Fixed => {
                        let expected = format!("512 less than the file's {} bytes", self.file_bytes);
                        FormatError::new("footer", "current size", 48, end.current_size, expected)
                            .at(path, self.file_bytes.saturating_sub(FOOTER_BYTES as u64))
                    }
                    _ if self.file_bytes < FOOTER_BYTES as u64 => {
                        let found = format!("a file of {} bytes", self.file_bytes);
                        FormatError::new("footer", "length", 0, found, "at least the 512 bytes of a footer")
                            .at(path, 0)
                    }
                    Err(_) if *at == 0 && error.structure == "footer" => {
                        let expected = format!("{}; the last sector holds no footer either", error.expected);
                        FormatError { expected, ..error.clone() }.at(path, 0)
                    }
                    _ => error.clone().at(path, *at),
                }),
            },
        }
    }

    /// Whether something speaks against the backup where the start of a closed file is lost: another program may have
    /// changed footer and header since the close that the superblock describes.
    fn stale_backup(
        &self,
        footer: &Footer,
        header: &DynamicHeader,
        superblock: &Superblock,
    ) -> Option<String> {
        let left = superblock.fingerprint;
        let as_left = left.footer_crc == crc32fast::hash(&footer.to_bytes())
            && left.header_crc == crc32fast::hash(&header.to_bytes());
        // A recovery that was cut may have removed the footer at the end.
        let newer = self.end.as_ref().ok().filter(|end| end.to_bytes() != footer.to_bytes());
        let why = match newer {
            Some(end) => format!("the footer at the end differs from it ({})", differing_fields(footer, end)),
            None if !as_left => "it is not what the last close left".to_string(),
            None => return None,
        };
        Some(format!("the start of the file is lost, and its backup may be out of date: {why}"))
    }

    /// Whether the file is built as a pair says.
    fn holds(&self, (footer, header): &HeaderPair) -> bool {
        vhd::validate_geometry(footer, header).is_ok() && table_end(header) <= self.file_bytes
    }

    /// The newest valid superblock of the disk that `footer` describes, and its place.
    fn superblock_of(&self, footer: &Footer) -> Option<(Superblock, usize)> {
        let of_this_disk = self.superblocks.iter().enumerate().filter_map(|(index, superblock)| {
            let superblock = superblock.as_ref().ok().filter(|s| self.is_in_place(s))?;
            let superblock = Some(superblock).filter(|s| s.disk_id == footer.unique_id)?;
            Some((*superblock, index))
        });
        of_this_disk.max_by_key(|(superblock, _)| superblock.sequence)
    }
}

impl Decision {
    /// The image's place in a chain; that of an image without a superblock is none.
    pub(crate) fn lineage(&self) -> Lineage {
        self.superblock.map(|(superblock, _)| superblock.lineage).unwrap_or_default()
    }

    /// The headers in a journaled image of the start of the file: those that count, but for what they say of the parent.
    pub(super) fn journaled_pair(&self, page: &[u8]) -> Result<HeaderPair, FormatError> {
        let footer = Footer::parse(page.get(..FOOTER_BYTES).unwrap_or_default())?;
        let header = DynamicHeader::parse(page.get(FOOTER_BYTES..HEADER_END).unwrap_or_default())?;
        let differs = |field, found: u64, expected: u64| {
            Err(FormatError::new("journaled header", field, 0, found, expected))
        };
        if footer.unique_id != self.footer.unique_id {
            let found = footer.unique_id;
            return Err(FormatError::new("journaled footer", "unique id", 68, found, self.footer.unique_id));
        }
        if footer.current_size != self.footer.current_size {
            return differs("current size", footer.current_size, self.footer.current_size);
        }
        if header.table_offset != self.header.table_offset {
            return differs("table offset", header.table_offset, self.header.table_offset);
        }
        if (header.max_table_entries, header.block_size)
            != (self.header.max_table_entries, self.header.block_size)
        {
            return differs(
                "max table entries",
                header.max_table_entries.into(),
                self.header.max_table_entries.into(),
            );
        }
        Ok((footer, DynamicHeader { cookie: HeaderCookie::Normal, ..header }))
    }

    /// How many blocks the disk has, as far as the table knows them.
    fn disk_entries(&self) -> u32 {
        u32::try_from(self.footer.current_size.div_ceil(self.header.block_size.into()))
            .unwrap_or(u32::MAX)
            .min(self.header.max_table_entries)
    }

    /// The places of an image made elsewhere whose temporary journal is at the end of the file: the ring, at once behind it the
    /// table, at once behind that the head.
    fn temporary_placement(&self, path: &Path) -> Result<Placement> {
        let (superblock, at) = self.superblock.map_or((None, 0), |(superblock, index)| {
            (Some(superblock), SUPERBLOCK_OFFSETS.get(index).map_or(0, |offset| self.base + offset))
        });
        let wrong = |field, offset, found: u64, expected: &str| {
            Err(FormatError::new("superblock", field, offset, found, expected).at(path, at))
        };
        let Some(superblock) = superblock else {
            return wrong("magic", 0, 0, "a superblock of the temporary journal");
        };
        let place = Placement {
            ring_offset: superblock.ring_offset,
            ring_bytes: superblock.ring_bytes,
            table_offset: superblock.ring_offset.saturating_add(superblock.ring_bytes),
            table_entries: self.disk_entries(),
            slot_origin: superblock.slot_origin,
            block_bytes: self.header.block_size,
            temporary: Some(Temporary {
                head: self.base,
                table_offset: self.header.table_offset,
                table_end: table_end(&self.header),
            }),
        };
        let aligned = |offset: u64| offset.is_multiple_of(PAGE_BYTES);
        if !aligned(place.ring_bytes) || !(MIN_RING_BYTES..=MAX_RING_BYTES).contains(&place.ring_bytes) {
            return wrong("ring bytes", 88, place.ring_bytes, "whole pages, from 128 KiB to 16 MiB");
        }
        // First whether the ring is in the file at all: what lies behind it is counted from its end.
        if !aligned(place.ring_offset)
            || place.table_offset > self.base
            || place.table_pages_end() - place.table_offset > MAX_TABLE_ROOM_BYTES
            || place.table_pages_end() != self.base
        {
            return wrong(
                "ring offset",
                80,
                place.ring_offset,
                "a ring and a table that end where the head starts",
            );
        }
        if !aligned(place.slot_origin)
            || place.slot_origin < table_end(&self.header)
            || place.slot_origin > place.ring_offset
        {
            return wrong(
                "slot origin",
                136,
                place.slot_origin,
                "a page between the block table and the ring",
            );
        }
        writable_blocks(&place, path, self.footer.data_offset)?;
        Ok(place)
    }

    /// Where things lie, from the header and the superblock; checks that no area covers another and all lie in the file.
    pub(crate) fn placement(&self, path: &Path, file_bytes: u64) -> Result<Placement> {
        let header = &self.header;
        let table_end = table_end(header);
        if table_end > file_bytes {
            let found = format!("{} to {table_end}", header.table_offset);
            let expected = format!("a table inside the file of {file_bytes} bytes");
            return Err(FormatError::new("dynamic header", "table offset", 16, found, expected)
                .at(path, self.footer.data_offset));
        }
        if self.base != 0 {
            return self.temporary_placement(path);
        }
        let place = Placement {
            ring_offset: self.superblock.map_or(0, |(s, _)| s.ring_offset),
            ring_bytes: self.superblock.map_or(0, |(s, _)| s.ring_bytes),
            table_offset: header.table_offset,
            // Of an image made elsewhere no more is read than the disk has blocks.
            table_entries: match self.superblock {
                Some(_) => header.max_table_entries,
                None => self.disk_entries(),
            },
            slot_origin: self.superblock.map_or(table_end, |(s, _)| s.slot_origin),
            block_bytes: header.block_size,
            temporary: None,
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
            return Err(FormatError::new("dynamic header", "table offset", 16, found, "a whole page")
                .at(path, self.footer.data_offset));
        }
        if !aligned(place.slot_origin) || place.slot_origin < table_end.next_multiple_of(PAGE_BYTES) {
            return wrong("slot origin", 136, place.slot_origin, "a page behind the block table");
        }
        if place.slot_origin > place.table_offset.saturating_add(MAX_TABLE_ROOM_BYTES) {
            return wrong(
                "slot origin",
                136,
                place.slot_origin,
                "at most 16 MiB behind the start of the table",
            );
        }
        if place.slot_entry(0).is_none() {
            return wrong("slot origin", 136, place.slot_origin, "a place below 2 TiB");
        }
        writable_blocks(&place, path, self.footer.data_offset)?;
        Ok(place)
    }
}

/// Whether blocks are of a size that can be written to.
pub(super) fn writable_blocks(place: &Placement, path: &Path, header_at: u64) -> Result<()> {
    if u64::from(place.block_bytes).is_multiple_of(PAGE_BYTES) && place.bitmap_bytes() <= MAX_BITMAP_BYTES {
        return Ok(());
    }
    let found = place.block_bytes;
    Err(FormatError::new("dynamic header", "block size", 32, found, "4 KiB to 8 MiB").at(path, header_at))
}

/// The head of the temporary journal that a dynamic header names. In a closed image, and in one made here, the field is all ones,
/// or whatever else another program has left there; no multiple of a page, at any rate.
pub(crate) fn temporary_head(header: &DynamicHeader) -> Option<u64> {
    let head = header.data_offset;
    let names = header.cookie == HeaderCookie::Dirty && head != 0 && head.is_multiple_of(PAGE_BYTES);
    names.then_some(head)
}

/// The smallest ring that holds the reserve for images and entries beside it, in bytes.
pub(crate) const MIN_RING_BYTES: u64 = 32 * PAGE_BYTES;
/// The largest ring, in bytes: bounds the memory of a scan.
pub(crate) const MAX_RING_BYTES: u64 = 16 << 20;
/// From the start of the BAT to the first slot; bounds the memory that a table takes, whatever length a sparse file claims.
pub(super) const MAX_TABLE_ROOM_BYTES: u64 = 16 << 20;
/// A block page is at most half bitmap, so that the header has room.
const MAX_BITMAP_BYTES: u64 = 2048;

pub(super) fn table_end(header: &DynamicHeader) -> u64 {
    header.table_offset.saturating_add(vhd::bat_bytes(header.max_table_entries))
}

fn holds_fixed(footer: &Footer, file_bytes: u64) -> bool {
    footer.current_size.checked_add(FOOTER_BYTES as u64) == Some(file_bytes)
}

fn type_without_header(footer: &Footer) -> FormatError {
    let found = footer.disk_type.as_u32();
    FormatError::new(
        "footer",
        "disk type",
        60,
        found,
        "3 (dynamic) or 4 (differencing), with a dynamic header",
    )
}

/// The fields in which two footers differ, for a person.
fn differing_fields(a: &Footer, b: &Footer) -> String {
    let fields = [
        ("disk type", a.disk_type != b.disk_type),
        ("current size", a.current_size != b.current_size),
        ("data offset", a.data_offset != b.data_offset),
        ("unique id", a.unique_id != b.unique_id),
        ("saved state", a.saved_state != b.saved_state),
        ("time stamp", a.timestamp != b.timestamp),
    ];
    let names: Vec<&str> = fields.iter().filter(|(_, differ)| *differ).map(|(name, _)| *name).collect();
    if names.is_empty() { "other fields".into() } else { names.join(", ") }
}

/// Parses the backup: a footer and a dynamic header behind it. One whose header stood elsewhere is none of ours.
fn parse_backup(page: &[u8]) -> Result<HeaderPair, FormatError> {
    let footer = Footer::parse(page.get(..FOOTER_BYTES).unwrap_or_default())?;
    let header = DynamicHeader::parse(page.get(FOOTER_BYTES..HEADER_END).unwrap_or_default())?;
    if footer.data_offset != HEADER_OFFSET {
        return Err(FormatError::new("footer", "data offset", 16, footer.data_offset, HEADER_OFFSET));
    }
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

#[cfg(all(test, feature = "sim"))]
mod tests;
