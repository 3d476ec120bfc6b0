//! A second reader of VHD files, for tests only: slow to forgive, and sharing no code with the library.
//!
//! Written from the format's description alone, so that a mistake in `src/` cannot hide by being made twice. It refuses
//! whatever the pickiest tool refuses (7-Zip, vhd-lib, `vhd-util check`), and more:
//!
//! * The file ends with a footer; in dynamic and differencing files the first sector is the same, byte for byte.
//! * Checksums hold, reserved bytes are zero, versions are 1.0, the dynamic header lies at 512.
//! * The BAT has exactly one entry per block and is padded with 0xFF to a whole sector.
//! * Headers, BAT, locators and blocks lie before the footer, and no two of them overlap. Holes are allowed anywhere.
//! * In a dynamic disk, data under a clear bit is zero: tools differ on whether they look at the bit.
//! * A dynamic disk names no parent; a differencing one names it by id, and by a name or path.
//! * With creator `win `, which we write, the geometry is the specification's.
//!
//! Not judged: time stamps, creators, bits of a bitmap beyond the block or the disk.
//!
//! Every refusal says what was found where. All offsets and sizes are in bytes.

#![allow(dead_code, reason = "each test that includes this file uses a part of it")]

use std::fmt::Display;
use std::io::{self, Cursor, Read, Seek, SeekFrom};

const SECTOR: u64 = 512;
const FOOTER_BYTES: u64 = 512;
const HEADER_OFFSET: u64 = 512;
const HEADER_BYTES: u64 = 1024;
const UNALLOCATED: u32 = 0xFFFF_FFFF;
const MAX_DYNAMIC_SIZE: u64 = 2040 << 30;

/// A refusal is a sentence.
pub type Result<T> = std::result::Result<T, String>;

/// Where an image comes from.
pub trait Source: Read + Seek {}
impl<T: Read + Seek> Source for T {}

/// Something that a guest, or a child, can read from.
pub trait Guest {
    /// Its size.
    fn size(&self) -> u64;
    /// Its identity, by which a child knows it.
    fn unique_id(&self) -> [u8; 16];
    /// Fills `buffer` from `offset` on; both offset and length are whole sectors, within the size.
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()>;
}

/// What kind of VHD a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Fixed,
    Dynamic,
    Differencing,
}

/// A parent locator in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Locator {
    /// The code, e.g. `W2ru`.
    pub code: [u8; 4],
    /// Where the payload lies.
    pub offset: u64,
    /// Room kept for it.
    pub space: u64,
    /// The payload itself.
    pub payload: Vec<u8>,
}

/// A file that is read by position, as a source.
pub struct Positional<F> {
    length: u64,
    read_at: F,
    at: u64,
}

impl<F: FnMut(&mut [u8], u64) -> io::Result<usize>> Positional<F> {
    /// A file of `length` bytes; `read_at` reads at a byte of it and returns how many bytes there were.
    pub fn new(length: u64, read_at: F) -> Self {
        Positional { length, read_at, at: 0 }
    }
}

impl<F: FnMut(&mut [u8], u64) -> io::Result<usize>> Read for Positional<F> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = (self.read_at)(buf, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl<F> Seek for Positional<F> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.at = match to {
            SeekFrom::Start(at) => at,
            SeekFrom::End(offset) => self.length.saturating_add_signed(offset),
            SeekFrom::Current(offset) => self.at.saturating_add_signed(offset),
        };
        Ok(self.at)
    }
}

/// An image that passed every check that can be made without reading its data.
pub struct StrictVhd<'a> {
    source: Box<dyn Source + 'a>,
    parent: Option<Box<dyn Guest + 'a>>,
    kind: Kind,
    size: u64,
    unique_id: [u8; 16],
    sparse: Option<Sparse>,
}

/// What a dynamic or differencing image has beyond a fixed one.
struct Sparse {
    block_size: u64,
    bitmap_bytes: u64,
    table: Vec<u32>,
    parent_unique_id: [u8; 16],
    parent_name: String,
    locators: Vec<Locator>,
    /// The bitmap read last, with the number of its block.
    cached: Option<(u64, Vec<u8>)>,
}

/// A part of the file that belongs to one thing alone.
struct Region {
    start: u64,
    end: u64,
    owner: Owner,
}

#[derive(Clone, Copy)]
enum Owner {
    FrontFooter,
    Header,
    Table,
    Locator(usize),
    Block(usize),
    Footer,
}

impl<'a> StrictVhd<'a> {
    /// Opens an image that lies in memory.
    pub fn from_bytes(image: &'a [u8]) -> Result<Self> {
        Self::open(Cursor::new(image))
    }

    /// Opens an image and checks all its structures. A differencing image needs [`StrictVhd::with_parent`] before
    /// what it lacks can be read.
    pub fn open(source: impl Source + 'a) -> Result<Self> {
        let mut source: Box<dyn Source + 'a> = Box::new(source);
        let length = source.seek(SeekFrom::End(0)).map_err(|error| format!("the length: {error}"))?;
        require(length >= FOOTER_BYTES, || format!("a file of {length} bytes has no room for a footer"))?;
        require(length.is_multiple_of(SECTOR), || format!("file length {length} is not a multiple of 512"))?;
        let footer_offset = length - FOOTER_BYTES;

        let footer = read_vec(&mut source, footer_offset, FOOTER_BYTES, "the footer")?;
        let fields = Fields { bytes: &footer, of: "footer" };
        let (kind, size) = check_footer(fields)?;
        let unique_id = fields.array(68);
        require(unique_id != [0; 16], || "footer: the unique id is zero".into())?;

        let sparse = match kind {
            Kind::Fixed => {
                fields.equals("data offset", 16, &u64::MAX.to_be_bytes())?;
                require(footer_offset == size, || {
                    format!("a fixed disk of {size} bytes has {footer_offset} bytes of data")
                })?;
                None
            }
            Kind::Dynamic | Kind::Differencing => {
                fields.equals("data offset", 16, &HEADER_OFFSET.to_be_bytes())?;
                require(size <= MAX_DYNAMIC_SIZE, || format!("footer: size {size} is more than 2040 GiB"))?;
                let front = read_vec(&mut source, 0, FOOTER_BYTES, "the footer copy")?;
                if let Some(at) = first_difference(&front, &footer) {
                    return Err(format!("the footer copy differs from the footer in byte {at}"));
                }
                Some(Sparse::open(&mut source, kind, size, footer_offset)?)
            }
        };
        Ok(StrictVhd { source, parent: None, kind, size, unique_id, sparse })
    }

    /// Adds the parent of a differencing image.
    pub fn with_parent(mut self, parent: impl Guest + 'a) -> Result<Self> {
        require(self.kind == Kind::Differencing, || format!("a {:?} disk has no parent", self.kind))?;
        let (wanted, found) = (self.parent_unique_id(), parent.unique_id());
        require(wanted == found, || format!("the parent has id {found:02x?}, not {wanted:02x?}"))?;
        require(parent.size() <= self.size, || {
            format!("the parent has {} bytes, its child only {}", parent.size(), self.size)
        })?;
        self.parent = Some(Box::new(parent));
        Ok(self)
    }

    /// Fixed, dynamic or differencing.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes in a block; zero in a fixed image.
    pub fn block_size(&self) -> u64 {
        self.sparse.as_ref().map_or(0, |sparse| sparse.block_size)
    }

    /// The numbers of the blocks that have a place in the file, in order.
    pub fn allocated_blocks(&self) -> Vec<u64> {
        let table = self.sparse.as_ref().map_or(&[][..], |sparse| &sparse.table);
        (0..).zip(table).filter(|(_, entry)| **entry != UNALLOCATED).map(|(block, _)| block).collect()
    }

    /// The parent's id; zero if there is no parent.
    pub fn parent_unique_id(&self) -> [u8; 16] {
        self.sparse.as_ref().map_or([0; 16], |sparse| sparse.parent_unique_id)
    }

    /// The parent's name in the header; empty if there is none.
    pub fn parent_name(&self) -> &str {
        self.sparse.as_ref().map_or("", |sparse| &sparse.parent_name)
    }

    /// The locators in use, in the order of the header.
    pub fn locators(&self) -> &[Locator] {
        self.sparse.as_ref().map_or(&[], |sparse| &sparse.locators)
    }

    /// Everything the guest sees, which also checks all data. For images that fit in memory.
    pub fn read_all(&mut self) -> Result<Vec<u8>> {
        let size = usize::try_from(self.size).map_err(|_| "the disk does not fit in memory".to_string())?;
        let mut content = vec![0; size];
        self.read_at(0, &mut content)?;
        Ok(content)
    }

    /// The part of one block from `offset` (of the disk) on.
    fn read_block(&mut self, block: u64, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let Some(sparse) = &mut self.sparse else { return Err("a fixed disk has no blocks".into()) };
        let entry = usize::try_from(block).ok().and_then(|block| sparse.table.get(block)).copied();
        let Some(start) = entry.filter(|&entry| entry != UNALLOCATED).map(|entry| u64::from(entry) * SECTOR)
        else {
            return self.read_below(offset, buffer);
        };

        let bitmap = match sparse.cached.take() {
            Some((of, bitmap)) if of == block => bitmap,
            _ => read_vec(&mut self.source, start, sparse.bitmap_bytes, "a sector bitmap")?,
        };
        let data_start = start + sparse.bitmap_bytes;
        let first_sector = offset % sparse.block_size / SECTOR;
        let sectors = buffer.len() as u64 / SECTOR;
        let bit = |sector: u64| {
            let sector = first_sector + sector;
            bitmap.get((sector / 8) as usize).is_some_and(|byte| byte >> (7 - sector % 8) & 1 == 1)
        };
        let mut from = 0;
        while from < sectors {
            let present = bit(from);
            let to = (from + 1..sectors).find(|&sector| bit(sector) != present).unwrap_or(sectors);
            let part = buffer
                .get_mut((from * SECTOR) as usize..(to * SECTOR) as usize)
                .ok_or("a run of sectors that is not in the buffer")?;
            if !present && self.kind == Kind::Differencing {
                self.read_below(offset + from * SECTOR, part)?;
            } else {
                read_into(&mut self.source, data_start + (first_sector + from) * SECTOR, part, "data")?;
                if !present && let Some(at) = part.iter().position(|&byte| byte != 0) {
                    let at = offset + from * SECTOR + at as u64;
                    return Err(format!(
                        "block {block}: byte {at} of the disk is not zero, but its bit is clear"
                    ));
                }
            }
            from = to;
        }
        if let Some(sparse) = &mut self.sparse {
            sparse.cached = Some((block, bitmap));
        }
        Ok(())
    }

    /// What lies under this image: the parent as far as it goes, then zeros.
    fn read_below(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        buffer.fill(0);
        if self.kind != Kind::Differencing {
            return Ok(());
        }
        let Some(parent) = &mut self.parent else {
            return Err(format!("byte {offset} of the disk lies in the parent, which was not given"));
        };
        let within = parent.size().saturating_sub(offset).min(buffer.len() as u64) as usize;
        match buffer.get_mut(..within) {
            Some(part) if !part.is_empty() => parent.read_at(offset, part),
            _ => Ok(()),
        }
    }
}

impl Guest for StrictVhd<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn unique_id(&self) -> [u8; 16] {
        self.unique_id
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let length = buffer.len() as u64;
        require(offset.is_multiple_of(SECTOR) && length.is_multiple_of(SECTOR), || {
            format!("{length} bytes at {offset} are not whole sectors")
        })?;
        require(offset.checked_add(length).is_some_and(|end| end <= self.size), || {
            format!("{length} bytes at {offset} do not lie in a disk of {} bytes", self.size)
        })?;
        let block_size = self.block_size();
        if block_size == 0 {
            return read_into(&mut self.source, offset, buffer, "data");
        }
        let (mut offset, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let in_block = (block_size - offset % block_size).min(rest.len() as u64);
            let (part, behind) = rest.split_at_mut(in_block as usize);
            self.read_block(offset / block_size, offset, part)?;
            (offset, rest) = (offset + in_block, behind);
        }
        Ok(())
    }
}

impl Sparse {
    fn open(source: &mut dyn Source, kind: Kind, size: u64, footer_offset: u64) -> Result<Self> {
        let header = read_vec(source, HEADER_OFFSET, HEADER_BYTES, "the dynamic header")?;
        let header = Fields { bytes: &header, of: "dynamic header" };
        header.equals("cookie", 0, b"cxsparse")?;
        header.check_sum(36)?;
        header.equals("data offset", 8, &u64::MAX.to_be_bytes())?;
        header.equals("version", 24, &0x0001_0000u32.to_be_bytes())?;
        header.zero("reserved", 60, 4)?;
        header.zero("reserved", 768, 256)?;

        let block_size = u64::from(header.u32(32));
        require(block_size >= SECTOR && block_size.is_power_of_two(), || {
            format!("dynamic header: block size {block_size} is not a power of two from 512 on")
        })?;
        let bitmap_bytes = (block_size / SECTOR).div_ceil(8).next_multiple_of(SECTOR);
        let entries = u64::from(header.u32(28));
        let blocks = size.div_ceil(block_size);
        require(entries == blocks, || format!("dynamic header: {entries} BAT entries for {blocks} blocks"))?;

        let table_offset = header.u64(16);
        let table_bytes = (entries * 4).next_multiple_of(SECTOR);
        let table_end = table_offset.checked_add(table_bytes).filter(|&end| end <= footer_offset);
        let Some(table_end) = table_end.filter(|_| table_offset.is_multiple_of(SECTOR)) else {
            return Err(format!("dynamic header: a BAT of {table_bytes} bytes cannot lie at {table_offset}"));
        };
        let (table, padding) = read_table(source, table_offset, table_bytes, entries)?;
        if let Some(at) = padding.iter().position(|&byte| byte != 0xFF) {
            return Err(format!("BAT: byte {at} of the padding is not 0xFF"));
        }

        let (parent_unique_id, parent_name) = check_parent(header, kind)?;
        let locators = read_locators(source, header, footer_offset)?;
        match kind {
            Kind::Differencing => require(!locators.is_empty() || !parent_name.is_empty(), || {
                "a differencing disk with neither parent name nor locator".into()
            })?,
            _ => require(locators.is_empty(), || "a parent locator in a dynamic disk".into())?,
        }

        let mut regions = vec![
            Region { start: 0, end: FOOTER_BYTES, owner: Owner::FrontFooter },
            Region { start: HEADER_OFFSET, end: HEADER_OFFSET + HEADER_BYTES, owner: Owner::Header },
            Region { start: table_offset, end: table_end, owner: Owner::Table },
            Region { start: footer_offset, end: footer_offset + FOOTER_BYTES, owner: Owner::Footer },
        ];
        for (number, locator) in locators.iter().enumerate() {
            let end = locator.offset + locator.space;
            regions.push(Region { start: locator.offset, end, owner: Owner::Locator(number) });
        }
        for (block, &entry) in table.iter().enumerate().filter(|(_, entry)| **entry != UNALLOCATED) {
            let start = u64::from(entry) * SECTOR;
            regions.push(Region {
                start,
                end: start + bitmap_bytes + block_size,
                owner: Owner::Block(block),
            });
        }
        check_regions(regions)?;

        Ok(Sparse { block_size, bitmap_bytes, table, parent_unique_id, parent_name, locators, cached: None })
    }
}

/// Everything in a footer that needs no other structure; returns the kind and the size.
fn check_footer(footer: Fields<'_>) -> Result<(Kind, u64)> {
    footer.equals("cookie", 0, b"conectix")?;
    footer.check_sum(64)?;
    let features = footer.u32(8);
    require(features & !1 == 2, || format!("footer: features {features:#x} are not 2 or 3"))?;
    footer.equals("version", 12, &0x0001_0000u32.to_be_bytes())?;
    for (field, offset) in [("original size", 40), ("current size", 48)] {
        let size = footer.u64(offset);
        require(size > 0 && size.is_multiple_of(SECTOR), || {
            format!("footer: {field} {size} is not a number of whole sectors")
        })?;
    }
    let size = footer.u64(48);
    let [c0, c1, heads, sectors_per_track] = footer.array(56);
    let geometry = (u64::from(u16::from_be_bytes([c0, c1])), u64::from(heads), u64::from(sectors_per_track));
    let expected = geometry_of(size / SECTOR);
    if footer.array(28) == *b"win " {
        require(geometry == expected, || format!("footer: geometry {geometry:?} is not {expected:?}"))?;
    } else {
        let (cylinders, heads, sectors_per_track) = geometry;
        let product = cylinders * heads * sectors_per_track;
        require(product <= size / SECTOR || geometry == (65_535, 16, 255), || {
            format!("footer: geometry {geometry:?} is larger than the disk")
        })?;
    }
    let saved_state = footer.array::<1>(84)[0];
    require(saved_state <= 1, || format!("footer: saved state {saved_state} is not 0 or 1"))?;
    footer.zero("reserved", 85, 427)?;
    let kind = match footer.u32(60) {
        2 => Kind::Fixed,
        3 => Kind::Dynamic,
        4 => Kind::Differencing,
        other => return Err(format!("footer: disk type {other} is not 2, 3 or 4")),
    };
    Ok((kind, size))
}

/// The specification's geometry for a number of sectors.
fn geometry_of(sectors: u64) -> (u64, u64, u64) {
    let sectors = sectors.min(65_535 * 16 * 255);
    if sectors >= 65_535 * 16 * 63 {
        return (sectors / 255 / 16, 16, 255);
    }
    let tracks = sectors / 17;
    let heads = tracks.div_ceil(1024).max(4);
    if tracks < heads * 1024 && heads <= 16 {
        return (tracks / heads, heads, 17);
    }
    let tracks = sectors / 31;
    if tracks < 16 * 1024 {
        return (tracks / 16, 16, 31);
    }
    (sectors / 63 / 16, 16, 63)
}

/// The parent's id and name, as the kind of disk demands them.
fn check_parent(header: Fields<'_>, kind: Kind) -> Result<([u8; 16], String)> {
    if kind != Kind::Differencing {
        header.zero("parent fields of a dynamic disk", 40, 728)?;
        return Ok(([0; 16], String::new()));
    }
    let unique_id = header.array(40);
    require(unique_id != [0; 16], || "dynamic header: the parent's id is zero".into())?;
    let units: Vec<u16> = header
        .slice(64, 512)
        .chunks_exact(2)
        .map(|pair| pair.iter().fold(0, |sum, &byte| sum << 8 | u16::from(byte)))
        .collect();
    let Some(end) = units.iter().position(|&unit| unit == 0) else {
        return Err("dynamic header: the parent name has no end".into());
    };
    require(units.iter().skip(end).all(|&unit| unit == 0), || {
        "dynamic header: something stands behind the end of the parent name".into()
    })?;
    Ok((unique_id, String::from_utf16_lossy(units.get(..end).unwrap_or_default())))
}

/// The locators in use, each once, known and well-formed, within the file.
fn read_locators(source: &mut dyn Source, header: Fields<'_>, footer_offset: u64) -> Result<Vec<Locator>> {
    let mut locators: Vec<Locator> = Vec::new();
    for number in 0..8 {
        let at = 576 + number * 24;
        let code: [u8; 4] = header.array(at);
        if code == [0; 4] {
            header.zero("unused locator", at, 24)?;
            continue;
        }
        let name = code.escape_ascii();
        require([b"W2ru", b"W2ku", b"MacX", b"Mac ", b"Wi2r", b"Wi2k"].contains(&&code), || {
            format!("locator {number}: unknown code {name}")
        })?;
        require(locators.iter().all(|locator| locator.code != code), || {
            format!("locator {number}: a second one of code {name}")
        })?;
        header.zero("reserved word of a locator", at + 12, 4)?;

        let space = match u64::from(header.u32(at + 4)) {
            sectors @ 1..SECTOR => sectors * SECTOR,
            bytes if bytes > 0 && bytes.is_multiple_of(SECTOR) => bytes,
            other => return Err(format!("locator {number}: space {other} is neither sectors nor bytes")),
        };
        let (length, offset) = (u64::from(header.u32(at + 8)), header.u64(at + 16));
        require(length > 0 && length <= space, || {
            format!("locator {number}: {length} bytes in a space of {space}")
        })?;
        require(offset.checked_add(space).is_some_and(|end| end <= footer_offset), || {
            format!("locator {number}: a space of {space} bytes at {offset} is not in the file")
        })?;
        let payload = read_vec(source, offset, length, "a locator's payload")?;
        match &code {
            b"W2ru" | b"W2ku" => {
                let whole = payload.len().is_multiple_of(2);
                require(whole && payload.chunks_exact(2).all(|unit| unit != [0, 0]), || {
                    format!("locator {number}: the path is not UTF-16 without zeros")
                })?;
            }
            b"MacX" => {
                require(payload.starts_with(b"file://"), || format!("locator {number}: not a file URL"))?
            }
            _ => {}
        }
        locators.push(Locator { code, offset, space, payload });
    }
    Ok(locators)
}

/// The entries of the BAT, and the padding behind them. The caller knows that they lie within the file.
fn read_table(source: &mut dyn Source, offset: u64, bytes: u64, entries: u64) -> Result<(Vec<u32>, Vec<u8>)> {
    let mut raw = read_vec(source, offset, bytes, "the BAT")?;
    let padding = raw.split_off((entries * 4) as usize);
    let table = raw
        .chunks_exact(4)
        .map(|entry| entry.iter().fold(0, |sum, &byte| sum << 8 | u32::from(byte)))
        .collect();
    Ok((table, padding))
}

/// That no two regions share a byte, and that the footer is the last.
fn check_regions(mut regions: Vec<Region>) -> Result<()> {
    regions.sort_by_key(|region| region.start);
    for (one, next) in regions.iter().zip(regions.iter().skip(1)) {
        require(one.end <= next.start, || format!("{one} runs into {next}"))?;
    }
    match regions.last() {
        Some(Region { owner: Owner::Footer, .. }) => Ok(()),
        Some(other) => Err(format!("{other} lies at or beyond the end of the file")),
        None => Ok(()),
    }
}

impl Display for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.owner {
            Owner::FrontFooter => write!(f, "the footer copy")?,
            Owner::Header => write!(f, "the dynamic header")?,
            Owner::Table => write!(f, "the BAT")?,
            Owner::Locator(number) => write!(f, "the payload of locator {number}")?,
            Owner::Block(block) => write!(f, "block {block}")?,
            Owner::Footer => write!(f, "the footer")?,
        }
        write!(f, " ({}..{})", self.start, self.end)
    }
}

/// A structure's bytes. Offsets are constants that lie within it; beyond, everything would be zero.
#[derive(Clone, Copy)]
struct Fields<'a> {
    bytes: &'a [u8],
    of: &'static str,
}

impl<'a> Fields<'a> {
    fn slice(self, offset: usize, length: usize) -> &'a [u8] {
        self.bytes.get(offset..offset + length).unwrap_or_default()
    }

    fn array<const N: usize>(self, offset: usize) -> [u8; N] {
        self.slice(offset, N).try_into().unwrap_or([0; N])
    }

    fn u32(self, offset: usize) -> u32 {
        u32::from_be_bytes(self.array(offset))
    }

    fn u64(self, offset: usize) -> u64 {
        u64::from_be_bytes(self.array(offset))
    }

    fn equals(self, field: &str, offset: usize, expected: &[u8]) -> Result<()> {
        let found = self.slice(offset, expected.len());
        require(found == expected, || {
            let (found, expected) = (found.escape_ascii(), expected.escape_ascii());
            format!("{}: {field} is \"{found}\", not \"{expected}\"", self.of)
        })
    }

    fn zero(self, field: &str, offset: usize, length: usize) -> Result<()> {
        match self.slice(offset, length).iter().position(|&byte| byte != 0) {
            Some(at) => Err(format!("{}: {field}: byte {} is not zero", self.of, offset + at)),
            None => Ok(()),
        }
    }

    fn check_sum(self, offset: usize) -> Result<()> {
        let total: u32 = self.bytes.iter().map(|&byte| u32::from(byte)).sum();
        let own: u32 = self.slice(offset, 4).iter().map(|&byte| u32::from(byte)).sum();
        let (found, expected) = (self.u32(offset), !(total - own));
        require(found == expected, || format!("{}: checksum {found:#010x} is not {expected:#010x}", self.of))
    }
}

fn require(holds: bool, refusal: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(refusal()) }
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a != b)
}

/// Reads `length` bytes, which memory is taken for as they come: a length may be a lie.
fn read_vec(source: &mut dyn Source, offset: u64, length: u64, what: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source
        .seek(SeekFrom::Start(offset))
        .and_then(|_| source.take(length).read_to_end(&mut bytes))
        .map_err(|error| format!("{what} at {offset}: {error}"))?;
    require(bytes.len() as u64 == length, || {
        format!("{what} at {offset}: the file ends within its {length} bytes")
    })?;
    Ok(bytes)
}

fn read_into(source: &mut dyn Source, offset: u64, buffer: &mut [u8], what: &str) -> Result<()> {
    source
        .seek(SeekFrom::Start(offset))
        .and_then(|_| source.read_exact(buffer))
        .map_err(|error| format!("{what} at {offset}: {error}"))
}
