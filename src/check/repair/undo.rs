//! The undo file: what a repair has replaced, so that it can be taken back bit by bit (docs/check.md, "The undo file").
//!
//! A header, then records, each made durable before the bytes that it saves are changed. A range is saved once, with what it
//! held before the repair; so the records can be applied in any order and as often as one likes. A record that was cut
//! ends the file: what it was to save has not been changed. Records that are synced together begin with a page of their own:
//! writing them cannot tear what is durable already.

use crate::error::{Error, FormatError, Result};
use crate::ext::PAGE_BYTES;
use crate::journal::zero_range;
use crate::layer::NewFile;
use crate::sync::Arc;
use crate::vfs::{Access, File, FileExt, FileTime, Vfs};
use crate::vhd::UniqueId;
use std::io;
use std::mem::size_of;
use std::ops::Range;
use std::path::{Path, PathBuf};
use zerocopy::big_endian::{I64, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::check::ranges::RangeSet;

const NAME: &str = "undo file";
const MAGIC: [u8; 8] = *b"cowvhdUN";
const RECORD_MAGIC: [u8; 4] = *b"URec";
/// The most bytes that one record saves.
const MAX_RECORD_BYTES: u64 = 1 << 20;

const KIND_BYTES: u32 = 1;
const KIND_ZEROS: u32 = 2;
const KIND_END: u32 = 3;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    modified_nanoseconds: U32,
    modified_seconds: I64,
    file_bytes: U64,
    disk_id: [u8; 16],
    reserved: [u8; 12],
    crc: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecord {
    magic: [u8; 4],
    kind: U32,
    offset: U64,
    length: U64,
    nanoseconds: U32,
    crc: U32,
}

const HEADER_BYTES: usize = 64;
/// Where the first record may stand.
const FIRST_RECORD: u64 = PAGE_BYTES;
const RECORD_BYTES: usize = 32;
const _: () = {
    assert!(size_of::<RawHeader>() == HEADER_BYTES);
    assert!(size_of::<RawRecord>() == RECORD_BYTES);
};

/// An image as it was before a repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Before {
    /// Length of the file in bytes.
    pub(super) file_bytes: u64,
    /// When it was last changed.
    pub(super) modified: FileTime,
    /// The disk's id, zero if nothing told.
    pub(super) disk_id: UniqueId,
}

/// One record.
enum Saved {
    Bytes(Range<u64>),
    Zeros(Range<u64>),
    End { file_bytes: u64, modified: FileTime },
}

/// An undo file that is being written.
#[derive(Debug)]
pub(super) struct UndoFile {
    path: PathBuf,
    file: Arc<dyn File>,
    before: Before,
    saved: RangeSet,
    end: u64,
}

impl UndoFile {
    /// Begins an undo file for `image`, or goes on with one that a repair of it left unfinished before it changed what is saved.
    /// Fails with `Exists` where a finished one, or any other file, has the name, and as damaged where the image is no longer
    /// what was saved: what was being written as the repair was cut may be gone, and a plan made of the rest would lose it.
    pub(super) fn open(
        vfs: &dyn Vfs,
        path: &Path,
        (image, image_path): (&dyn File, &Path),
        before: Before,
    ) -> Result<Self> {
        let io = |error| Error::io(path, "making the undo file", error);
        match vfs.open(path, Access::ReadWrite) {
            Ok(file) => return Self::resume(file, path, (image, image_path), &before),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io(error)),
        }
        // Under its own name there is never half a header.
        let new = NewFile::new(vfs, path)?;
        let file = vfs.create_new(new.temporary()).map_err(io)?;
        file.write_all_at(&header_bytes(&before), 0).map_err(io)?;
        file.sync_data().map_err(io)?;
        new.publish(false)?;
        let saved = RangeSet::default();
        Ok(UndoFile { path: path.to_path_buf(), file, before, saved, end: FIRST_RECORD })
    }

    fn resume(
        file: Arc<dyn File>,
        path: &Path,
        (image, image_path): (&dyn File, &Path),
        now: &Before,
    ) -> Result<Self> {
        let exists = || Err(Error::Exists { path: path.to_path_buf() });
        let Ok(mut reader) = Reader::open(&*file, path) else { return exists() };
        let before = reader.before;
        if before.disk_id != now.disk_id && !before.disk_id.is_zero() && !now.disk_id.is_zero() {
            return exists();
        }
        let mut saved = RangeSet::default();
        let mut end = FIRST_RECORD;
        let mut is_changed = false;
        let io = |error| Error::io(image_path, "comparing with the undo file", error);
        while let Some((record, behind)) = reader.next(&*file, path)? {
            let range = match record {
                Saved::Bytes(range) => {
                    is_changed = is_changed || !holds(image, range.start, &reader.payload).map_err(io)?;
                    range
                }
                Saved::Zeros(range) => {
                    is_changed = is_changed || !holds_zeros(image, &range).map_err(io)?;
                    range
                }
                Saved::End { .. } => return exists(),
            };
            saved.insert(range);
            end = behind;
        }
        if is_changed {
            return Err(Error::Damaged {
                path: image_path.to_path_buf(),
                what: format!("a repair of it was cut short, and {} has what that replaced", path.display()),
                hint: "restore it first (cowvhd repair --undo-apply), or, if it has been used since, name another undo file",
            });
        }
        // What was cut must not look like a record behind the next one.
        file.set_len(end).map_err(|error| Error::io(path, "going on with the undo file", error))?;
        Ok(UndoFile { path: path.to_path_buf(), file, before, saved, end })
    }

    /// Saves what `ranges` of the image hold, durably; what lay behind the image's first end needs no saving.
    pub(super) fn save(&mut self, image: &dyn File, ranges: &[Range<u64>]) -> io::Result<()> {
        let mut fresh = Vec::new();
        for range in ranges {
            let start = range.start / PAGE_BYTES * PAGE_BYTES;
            let end = range.end.next_multiple_of(PAGE_BYTES).min(self.before.file_bytes);
            if start < end {
                fresh.extend(self.saved.missing(start..end));
            }
        }
        if fresh.is_empty() {
            return Ok(());
        }
        self.end = self.end.next_multiple_of(PAGE_BYTES);
        for range in &fresh {
            self.save_range(image, range.clone())?;
        }
        self.file.sync_data()?;
        fresh.into_iter().for_each(|range| self.saved.insert(range));
        Ok(())
    }

    fn save_range(&mut self, image: &dyn File, range: Range<u64>) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let data = image.next_data(at)?.filter(|data| data.start < range.end);
            let data = data.map_or(range.end..range.end, |data| data.start.max(at)..data.end.min(range.end));
            if at < data.start {
                self.append(KIND_ZEROS, at, data.start - at, 0, &[])?;
            }
            at = data.start;
            while at < data.end {
                let length = MAX_RECORD_BYTES.min(data.end - at);
                let mut bytes = vec![0; length as usize];
                image.read_or_zero_at(&mut bytes, at)?;
                self.append(KIND_BYTES, at, length, 0, &bytes)?;
                at += length;
            }
        }
        Ok(())
    }

    fn append(
        &mut self,
        kind: u32,
        offset: u64,
        length: u64,
        nanoseconds: u32,
        payload: &[u8],
    ) -> io::Result<()> {
        let mut bytes = record_bytes(kind, offset, length, nanoseconds, payload);
        bytes.extend_from_slice(payload);
        self.file.write_all_at(&bytes, self.end)?;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Says that the repair is complete, and what it left. Durable on return.
    pub(super) fn finish(&mut self, image: &dyn File) -> Result<()> {
        let path = self.path.clone();
        let io = |error| Error::io(&path, "ending the undo file", error);
        let file_bytes = image.length().map_err(io)?;
        let modified = image.modified().map_err(io)?;
        self.end = self.end.next_multiple_of(PAGE_BYTES);
        self.append(KIND_END, file_bytes, modified.seconds as u64, modified.nanoseconds, &[]).map_err(io)?;
        self.file.sync_data().map_err(io)
    }
}

/// Whether a file holds `bytes` at `offset`; behind its end there are zeros.
fn holds(file: &dyn File, offset: u64, bytes: &[u8]) -> io::Result<bool> {
    let mut found = vec![0; bytes.len()];
    file.read_or_zero_at(&mut found, offset)?;
    Ok(found == bytes)
}

fn holds_zeros(file: &dyn File, range: &Range<u64>) -> io::Result<bool> {
    let mut at = range.start;
    while let Some(data) = file.next_data(at)?.filter(|data| data.start < range.end) {
        let start = data.start.max(at);
        let length = MAX_RECORD_BYTES.min(data.end.min(range.end) - start);
        if !holds(file, start, &vec![0; length as usize])? {
            return Ok(false);
        }
        at = start + length;
    }
    Ok(true)
}

fn header_bytes(before: &Before) -> [u8; HEADER_BYTES] {
    let mut raw = RawHeader {
        magic: MAGIC,
        version: 1.into(),
        modified_nanoseconds: before.modified.nanoseconds.into(),
        modified_seconds: before.modified.seconds.into(),
        file_bytes: before.file_bytes.into(),
        disk_id: *before.disk_id.as_bytes(),
        reserved: [0; 12],
        crc: 0.into(),
    };
    raw.crc = crc32fast::hash(raw.as_bytes().get(..HEADER_BYTES - 4).unwrap_or_default()).into();
    zerocopy::transmute!(raw)
}

fn record_bytes(kind: u32, offset: u64, length: u64, nanoseconds: u32, payload: &[u8]) -> Vec<u8> {
    let mut raw = RawRecord {
        magic: RECORD_MAGIC,
        kind: kind.into(),
        offset: offset.into(),
        length: length.into(),
        nanoseconds: nanoseconds.into(),
        crc: 0.into(),
    };
    raw.crc = record_crc(&raw, payload).into();
    raw.as_bytes().to_vec()
}

/// CRC-32 of the head without its CRC, then of the payload.
fn record_crc(raw: &RawRecord, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(raw.as_bytes().get(..RECORD_BYTES - 4).unwrap_or_default());
    hasher.update(payload);
    hasher.finalize()
}

/// Walks over the records of an undo file.
struct Reader {
    before: Before,
    at: u64,
    payload: Vec<u8>,
}

impl Reader {
    fn open(file: &dyn File, path: &Path) -> Result<Self> {
        let mut bytes = [0; HEADER_BYTES];
        file.read_or_zero_at(&mut bytes, 0)
            .map_err(|error| Error::io(path, "reading the undo file", error))?;
        let wrong = |field, offset, found: String, expected: &str| {
            Err(FormatError::new(NAME, field, offset, found, expected).at(path, 0))
        };
        let raw: RawHeader = zerocopy::transmute!(bytes);
        if raw.magic != MAGIC {
            return wrong("magic", 0, format!("{:02x?}", raw.magic), "cowvhdUN");
        }
        let crc = crc32fast::hash(bytes.get(..HEADER_BYTES - 4).unwrap_or_default());
        if raw.crc.get() != crc {
            return wrong("CRC", 60, format!("{:#010x}", raw.crc), &format!("{crc:#010x}"));
        }
        if raw.version.get() != 1 {
            return wrong("version", 8, raw.version.to_string(), "1");
        }
        let modified =
            FileTime { seconds: raw.modified_seconds.get(), nanoseconds: raw.modified_nanoseconds.get() };
        let disk_id = UniqueId::from_bytes(raw.disk_id);
        let before = Before { file_bytes: raw.file_bytes.get(), modified, disk_id };
        Ok(Reader { before, at: FIRST_RECORD, payload: Vec::new() })
    }

    /// The next record and where it ends; `None` behind the last whole one. The bytes it saved are in `payload`.
    fn next(&mut self, file: &dyn File, path: &Path) -> Result<Option<(Saved, u64)>> {
        if let Some(next) = self.record(file, path)? {
            return Ok(Some(next));
        }
        // The next ones to be synced together begin with the next page.
        self.at = self.at.next_multiple_of(PAGE_BYTES);
        self.record(file, path)
    }

    fn record(&mut self, file: &dyn File, path: &Path) -> Result<Option<(Saved, u64)>> {
        let io = |error| Error::io(path, "reading the undo file", error);
        let mut head = [0; RECORD_BYTES];
        file.read_or_zero_at(&mut head, self.at).map_err(io)?;
        let raw: RawRecord = zerocopy::transmute!(head);
        let (kind, offset, length) = (raw.kind.get(), raw.offset.get(), raw.length.get());
        let payload_bytes = if kind == KIND_BYTES { length } else { 0 };
        if raw.magic != RECORD_MAGIC || payload_bytes > MAX_RECORD_BYTES {
            return Ok(None);
        }
        self.payload.resize(payload_bytes as usize, 0);
        file.read_or_zero_at(&mut self.payload, self.at + RECORD_BYTES as u64).map_err(io)?;
        if raw.crc.get() != record_crc(&raw, &self.payload) {
            return Ok(None);
        }
        self.at += RECORD_BYTES as u64 + payload_bytes;
        let range = offset..offset.saturating_add(length);
        let saved = match kind {
            KIND_BYTES => Saved::Bytes(range),
            KIND_ZEROS => Saved::Zeros(range),
            KIND_END => {
                let modified = FileTime { seconds: length as i64, nanoseconds: raw.nanoseconds.get() };
                Saved::End { file_bytes: offset, modified }
            }
            _ => return Ok(None),
        };
        Ok(Some((saved, self.at)))
    }
}

/// Restores the image at `path` to what it was before the repair that wrote `undo`, bit by bit, its length and its time of
/// change included. May be repeated. With `force` also if the image was changed since.
pub(super) fn apply(vfs: &dyn Vfs, undo: &Path, path: &Path, force: bool) -> Result<()> {
    let saved = vfs.open(undo, Access::ReadOnly).map_err(|e| Error::io(undo, "opening the undo file", e))?;
    let image = super::lock(vfs, path)?;
    let io = |error| Error::io(path, "restoring the image", error);

    let mut reader = Reader::open(&*saved, undo)?;
    while let Some((record, _)) = reader.next(&*saved, undo)? {
        if let Saved::End { file_bytes, modified } = record {
            let now = (image.length().map_err(io)?, image.modified().map_err(io)?);
            let restored = (reader.before.file_bytes, reader.before.modified);
            if now != (file_bytes, modified) && now != restored && !force {
                return Err(Error::Damaged {
                    path: path.to_path_buf(),
                    what: "it was changed after the repair, and going back would mix the two".into(),
                    hint: "use --force if that is what you want",
                });
            }
        }
    }
    let mut reader = Reader::open(&*saved, undo)?;
    image.set_len(reader.before.file_bytes).map_err(io)?;
    while let Some((record, _)) = reader.next(&*saved, undo)? {
        match record {
            Saved::Bytes(range) => image.write_all_at(&reader.payload, range.start).map_err(io)?,
            Saved::Zeros(range) => {
                let end = range.end.min(reader.before.file_bytes);
                if range.start < end {
                    zero_range(&*image, range.start, end - range.start).map_err(io)?;
                }
            }
            Saved::End { .. } => {}
        }
    }
    image.sync_data().map_err(io)?;
    image.set_modified(reader.before.modified).map_err(io)?;
    image.sync_data().map_err(io)
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::*;
    use crate::sim::SimVfs;

    #[test]
    fn a_record_with_any_byte_changed_is_none() {
        let vfs = SimVfs::new(1);
        let image = vfs.create_new(Path::new("/image")).unwrap();
        image.write_all_at(&[7; 4096], 0).unwrap();
        let before = Before {
            file_bytes: 4096,
            modified: FileTime::default(),
            disk_id: UniqueId::from_bytes([1; 16]),
        };
        let path = Path::new("/undo");
        UndoFile::open(&vfs, path, (&*image, Path::new("/image")), before)
            .unwrap()
            .save(&*image, std::slice::from_ref(&(0..4096)))
            .unwrap();
        let file = vfs.open(path, Access::ReadWrite).unwrap();
        let first = || Reader::open(&*file, path).unwrap().next(&*file, path).unwrap();
        assert!(matches!(first(), Some((Saved::Bytes(range), 8224)) if range == (0..4096)));
        let mut byte = [0];
        for at in (0..RECORD_BYTES as u64).chain([32, 4096 + 31]) {
            file.read_or_zero_at(&mut byte, FIRST_RECORD + at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x40], FIRST_RECORD + at).unwrap();
            assert!(first().is_none(), "byte {at}");
            file.write_all_at(&byte, FIRST_RECORD + at).unwrap();
        }
        assert!(first().is_some());
    }

    #[test]
    fn zeros_are_looked_for_to_the_end() {
        let file = SimVfs::new(1).create_new(Path::new("/image")).unwrap();
        let length = 3 * MAX_RECORD_BYTES;
        file.write_all_at(&vec![0; length as usize], 0).unwrap();
        assert!(holds_zeros(&*file, &(0..length)).unwrap());
        for at in [0, MAX_RECORD_BYTES, length - 1] {
            file.write_all_at(&[1], at).unwrap();
            assert!(!holds_zeros(&*file, &(0..length)).unwrap());
            // Up to it, and behind it.
            assert!(holds_zeros(&*file, &(0..at)).unwrap());
            assert!(holds_zeros(&*file, &(at + 1..length)).unwrap());
            file.write_all_at(&[0], at).unwrap();
        }
        // A file is zeros behind its end.
        assert!(holds_zeros(&*file, &(length - 1..2 * length)).unwrap());
    }
}
