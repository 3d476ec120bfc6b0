//! Changes of an image that know its structures: a field is changed, and then checksums and CRCs are made right again, so
//! that what looks at the field sees it.
//!
//! Written from FORMAT.md; shares no code with the library's own structures.

use crate::bases;
use crate::guest::{PARENT, PATH};
use crate::input::Input;
use cowvhd::sim::SimVfs;
use cowvhd::vfs::{Access, File, Vfs};
use cowvhd::vhd::checksum;
use std::path::Path;
use std::sync::Arc;

const PAGE: u64 = 4096;
/// Where a superblock begins to speak of seals, and where the digest of a VM state is.
const LINEAGE: usize = 176;
const STATE_DIGEST: usize = 224;
/// Bytes of each copy of the registry of children; they stand in front of the ring.
const REGISTRY: u64 = 96 << 10;

/// The changed image, and what is left of the input.
pub fn image<'a>(data: &'a [u8]) -> (SimVfs, Input<'a>) {
    let mut input = Input(data);
    let bases = bases::all();
    let base = &bases[input.below(bases.len() as u64) as usize];
    let vfs = base.to_vfs(1);
    let changes = input.u8() % 9;
    for _ in 0..changes {
        let kind = input.u8();
        // Parents are made by the same hands.
        change(&vfs, Path::new(if kind & 0x10 == 0 { PATH } else { PARENT }), kind, &mut input);
    }
    (vfs, input)
}

struct Image<'a> {
    vfs: SimVfs,
    path: &'a Path,
    file: Arc<dyn File>,
}

impl Image<'_> {
    fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let _ = self.file.read_at(&mut bytes, offset);
        bytes
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.vfs.corrupt(self.path, offset, bytes);
    }

    fn u64(&self, offset: u64) -> u64 {
        self.read(offset, 8).iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    fn length(&self) -> u64 {
        self.file.length().unwrap_or(0)
    }

    fn table_offset(&self) -> u64 {
        self.u64(512 + 16)
    }

    /// The head of the temporary journal of an image made elsewhere, if the header names one.
    fn temporary_head(&self) -> Option<u64> {
        let head = self.u64(512 + 8);
        let named = self.read(512, 8) == *b"cowdirty" && head.is_multiple_of(PAGE) && head > 0;
        named.then_some(head)
    }

    /// Where superblock A is; B is a page behind it.
    fn superblocks(&self) -> u64 {
        self.temporary_head().unwrap_or(0).saturating_add(PAGE)
    }
}

/// One change of the image at `path`: what is changed, where in it, how, and whether its checksum is made right.
pub fn change(vfs: &SimVfs, path: &Path, kind: u8, input: &mut Input) {
    let Ok(file) = vfs.open(path, Access::ReadWrite) else { return };
    let image = Image { vfs: vfs.clone(), path, file };
    let mend = kind & 0x80 == 0;
    match kind & 15 {
        // Both copies of the footer alike, or one of them.
        0 => {
            let bytes = changed(image.read(0, 512), input, mend.then_some(64));
            image.write(0, &bytes);
            if image.read(image.length().saturating_sub(512), 8) == *b"conectix" {
                image.write(image.length().saturating_sub(512), &bytes);
            }
        }
        1 => replace(&image, 0, 512, input, mend.then_some(64)),
        2 => replace(&image, image.length().saturating_sub(512), 512, input, mend.then_some(64)),
        3 | 4 => replace(&image, 512, 1024, input, mend.then_some(36)),
        // The copies of pages in a temporary journal.
        5 if image.temporary_head().is_some() && kind & 0x20 != 0 => {
            let copy = [0, 4 * PAGE, 5 * PAGE, 6 * PAGE][usize::from(kind >> 6 & 1 | input.u8() & 2)];
            let at = image.temporary_head().unwrap_or(0).saturating_add(copy);
            replace(&image, at, PAGE as usize, input, None);
        }
        5 => {
            let at = image.superblocks().saturating_add(2 * PAGE) + if kind & 0x40 == 0 { 0 } else { 512 };
            let (length, sum) = if kind & 0x40 == 0 { (512, 64) } else { (1024, 36) };
            replace(&image, at, length, input, mend.then_some(sum));
        }
        6 | 7 => {
            let copy = u64::from(kind >> 5 & 3);
            if copy < 2 {
                superblock(&image, image.superblocks().saturating_add(copy * PAGE), 0, input, mend);
            }
        }
        8 => {
            let entry = image.table_offset().saturating_add(u64::from(input.u8()) * 4);
            let value = match input.u8() % 4 {
                0 => input.u64() as u32,
                1 => image.u64(image.table_offset().saturating_add(u64::from(input.u8()) * 4)) as u32,
                2 => ((image.u64(entry) >> 32) as u32).wrapping_add(u32::from(input.u8())).wrapping_sub(128),
                _ => (image.length() / 512) as u32 ^ u32::from(input.u8()),
            };
            image.write(entry, &value.to_be_bytes());
        }
        9 => block_page(&image, input, mend),
        10 | 11 => journal(&image, input, mend, kind & 0x40 == 0),
        12 if kind & 0x40 == 0 => {
            let copies = image.superblocks();
            // In both alike, mostly: one of them alone counts only if it is the newer one.
            let before = input.clone();
            for copy in 0..if kind & 0x20 == 0 { 2 } else { 1 } {
                *input = before.clone();
                superblock(&image, copies.saturating_add(copy * PAGE), LINEAGE, input, mend);
            }
        }
        12 => registry(&image, input, mend),
        13 => {
            let length = match input.u8() % 4 {
                0 => image.length().saturating_sub(u64::from(input.u16())),
                1 => image.length() / 512 * 512 + u64::from(input.u16()) * 512,
                2 => image.length() / 2,
                _ => input.u64() >> 16,
            };
            let _ = image.file.set_len(length).and_then(|()| image.file.sync_data());
        }
        // A footer of another program at the end.
        14 => {
            let footer = image.read(0, 512);
            let end = image.length().next_multiple_of(512);
            let _ = image.file.set_len(end + 512).and_then(|()| image.file.sync_data());
            image.write(end, &footer);
        }
        _ => {
            let offset = input.u64() % image.length().max(1);
            let bytes = input.bytes(8);
            image.write(offset, bytes);
        }
    }
}

fn replace(image: &Image, offset: u64, length: usize, input: &mut Input, sum: Option<usize>) {
    let bytes = changed(image.read(offset, length), input, sum);
    image.write(offset, &bytes);
}

/// A structure with one field changed: an offset, a width, a value.
fn changed(mut bytes: Vec<u8>, input: &mut Input, sum: Option<usize>) -> Vec<u8> {
    field(&mut bytes, input);
    if let Some(at) = sum {
        let sum = checksum(&bytes, at);
        bytes[at..at + 4].copy_from_slice(&sum.to_be_bytes());
    }
    bytes
}

fn field(bytes: &mut [u8], input: &mut Input) {
    let how = input.u8();
    let width = [1, 2, 4, 8][usize::from(how & 3)].min(bytes.len());
    // Mostly aligned, and in the front where the fields are.
    let reach = if how & 4 == 0 { bytes.len().min(192) } else { bytes.len() };
    let at = (usize::from(input.u16()) % reach / width * width).min(bytes.len() - width);
    let old = bytes[at..at + width].iter().fold(0u64, |number, &byte| number << 8 | u64::from(byte));
    let new = match how >> 3 & 7 {
        0 | 1 => input.u64(),
        2 => old.wrapping_add(u64::from(input.u8())),
        3 => old.wrapping_sub(u64::from(input.u8())),
        4 => old ^ 1 << (input.u8() & 63),
        5 => 1 << (input.u8() & 63),
        6 => u64::MAX << (input.u8() & 63),
        _ => u64::from(input.u16()),
    };
    bytes[at..at + width].copy_from_slice(&new.to_be_bytes()[8 - width..]);
}

/// A field of a superblock, at `from` or behind it.
fn superblock(image: &Image, place: u64, from: usize, input: &mut Input, mend: bool) {
    let mut bytes = image.read(place, PAGE as usize);
    field(&mut bytes[from..4092], input);
    if mend {
        let crc = crc32fast::hash(&bytes[..4092]);
        bytes[4092..].copy_from_slice(&crc.to_be_bytes());
    }
    image.write(place, &bytes);
}

/// A field of the registry of children, in one copy or in both.
fn registry(image: &Image, input: &mut Input, mend: bool) {
    let ring = image.u64(image.superblocks().saturating_add(80));
    let before = input.clone();
    for copy in 1..=1 + u64::from(before.clone().u8() & 1) {
        *input = before.clone();
        input.u8();
        let Some(place) = ring.checked_sub(copy * REGISTRY) else { return };
        let mut bytes = image.read(place, PAGE as usize);
        field(&mut bytes, input);
        if mend {
            // Of what it says is its body.
            let body = bytes[36..40].iter().fold(0, |number, &byte| number << 8 | usize::from(byte));
            let mut hasher = crc32fast::Hasher::new();
            hasher.update(&bytes[..60]);
            hasher.update(&bytes[64..(64 + body).min(bytes.len())]);
            bytes[60..64].copy_from_slice(&hasher.finalize().to_be_bytes());
        }
        image.write(place, &bytes);
    }
}

/// A field of the manifest of a VM state at `path`. Mended, the seals of all images in `images` that name one name this one.
pub fn manifest(vfs: &SimVfs, path: &Path, images: &[&Path], input: &mut Input, mend: bool) {
    let Some(mut bytes) = vfs.content(path).filter(|bytes| bytes.len() > 72) else { return };
    let end = bytes.len() - 4;
    let from = [0, 64, 352, end - 128][usize::from(input.u8() & 3)].min(end - 8);
    field(&mut bytes[from..end], input);
    if mend {
        let crc = crc32fast::hash(&bytes[..end]);
        bytes[end..].copy_from_slice(&crc.to_be_bytes());
    }
    vfs.corrupt(path, 0, &bytes);
    let digest = blake3::hash(&bytes);
    for &path in images.iter().filter(|_| mend) {
        let Ok(file) = vfs.open(path, Access::ReadWrite) else { continue };
        let image = Image { vfs: vfs.clone(), path, file };
        for copy in 0..2 {
            let place = image.superblocks().saturating_add(copy * PAGE);
            let mut superblock = image.read(place, PAGE as usize);
            if superblock.starts_with(b"cowvhdSB") && superblock[STATE_DIGEST..][..32] != [0; 32] {
                superblock[STATE_DIGEST..][..32].copy_from_slice(digest.as_bytes());
                let crc = crc32fast::hash(&superblock[..4092]);
                superblock[4092..].copy_from_slice(&crc.to_be_bytes());
                image.write(place, &superblock);
            }
        }
    }
}

/// The header or the bitmap of a block, found by the table.
fn block_page(image: &Image, input: &mut Input, mend: bool) {
    let entry = image.table_offset().saturating_add(u64::from(input.u8()) * 4);
    let sector = image.u64(entry) >> 32;
    if sector == 0xffff_ffff {
        return;
    }
    if input.u8() & 1 == 0 {
        let bitmap = sector * 512;
        return replace(image, bitmap, 512, input, None);
    }
    let page = sector * 512 / PAGE * PAGE;
    let mut bytes = image.read(page, 64);
    field(&mut bytes, input);
    if mend {
        let crc = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_be_bytes());
    }
    image.write(page, &bytes);
}

/// One entry of the journal: its header or its records. Its CRC is made right, and with `chain` the link of the next one.
fn journal(image: &Image, input: &mut Input, mend: bool, chain: bool) {
    let superblock = image.superblocks();
    let [ring, bytes] = [80, 88].map(|field| image.u64(superblock.saturating_add(field)));
    let end = ring.saturating_add(bytes).min(image.length());
    let pages = (0..1024).map(|page| ring.saturating_add(page * PAGE)).take_while(|&at| at < end);
    let entries: Vec<u64> = pages.filter(|&at| image.read(at, 8) == *b"cowvhdJE").collect();
    if entries.is_empty() {
        return;
    }
    let at = entries[input.below(entries.len() as u64) as usize];
    let old = entry_bytes(image, at);
    let mut entry = old.clone();
    match input.u8() % 10 {
        // A record's head; entries of this size begin with one.
        0..=3 => field(&mut entry[96..160], input),
        4 | 5 => field(&mut entry[..96], input),
        6 => field(&mut entry, input),
        7 | 8 => headers_image(&mut entry, input, mend),
        // The same entry again in another place.
        _ => {
            let to = ring.saturating_add(u64::from(input.u8()) * PAGE);
            image.write(to, &entry);
            return;
        }
    }
    if mend {
        let crc = entry_crc(&entry);
        entry[92..96].copy_from_slice(&crc.to_be_bytes());
    }
    image.write(at, &entry);
    if chain {
        // Each names the one before, so that all behind it change.
        let mut previous = (at, entry);
        while let Some(&next) = entries.iter().find(|&&next| next == previous.0 + previous.1.len() as u64) {
            let mut entry = entry_bytes(image, next);
            let crc = previous.1[92..96].to_vec();
            entry[84..88].copy_from_slice(&crc);
            let crc = entry_crc(&entry);
            entry[92..96].copy_from_slice(&crc.to_be_bytes());
            image.write(next, &entry);
            previous = (next, entry);
        }
    }
}

/// The first page image in an entry that holds a footer copy and a dynamic header: one of these is changed.
fn headers_image(entry: &mut [u8], input: &mut Input, mend: bool) {
    let number = |bytes: &[u8]| bytes.iter().fold(0, |number, &byte| number << 8 | usize::from(byte));
    let mut at = 96;
    while let Some(head) = entry.get(at..at + 32) {
        let (kind, length) = (number(&head[..2]), number(&head[4..8]));
        let payload = at + 32..at + length;
        if let Some(page) = entry.get_mut(payload).filter(|page| kind == 6 && page.starts_with(b"conectix")) {
            let (range, sum) = if input.u8() & 1 == 0 { (0..512, 64) } else { (512..1536, 36) };
            if let Some(part) = page.get_mut(range) {
                let new = changed(part.to_vec(), input, mend.then_some(sum));
                part.copy_from_slice(&new);
            }
            return;
        }
        at += length.max(32);
    }
}

fn entry_bytes(image: &Image, at: u64) -> Vec<u8> {
    let length = (image.u64(at + 8) >> 32).clamp(PAGE, 1 << 20);
    image.read(at, length as usize)
}

fn entry_crc(entry: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&entry[16..32]);
    hasher.update(&entry[..92]);
    hasher.update(&[0; 4]);
    // A filler's CRC ends with its first page.
    let filler = entry[12..16] == [0, 0, 0, 2];
    hasher.update(&entry[96..if filler { PAGE as usize } else { entry.len() }]);
    hasher.finalize()
}
