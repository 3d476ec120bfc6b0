//! Making a new image. It appears under its name only when it is complete and durable.

use super::Layer;
use super::headers::pair_bytes;
use super::new_file::NewFile;
use super::open::Opening;
use super::table::entries_crc;
use crate::error::{Error, FormatError, Result};
use crate::ext::{
    BAT_ROOM_BYTES, DataCrcs, Fingerprint, FixedParent, HEADER_BACKUP_OFFSET, LOCATORS_OFFSET, Lineage,
    PAGE_BYTES, Placement, SUPERBLOCK_OFFSETS, SealId, SessionId, State, Superblock, Tail,
};
use crate::sync::Arc;
use crate::vfs::{Access, File, FileExt, FileTime, Vfs};
use crate::vhd::locator::{encode_relative, units_from_path};
use crate::vhd::{self, DiskType, DynamicHeader, Footer, ParentLocator, PlatformCode, Timestamp, UniqueId};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What a new image is like.
#[derive(Debug, Clone)]
pub(crate) struct CreateParameters {
    /// Size of the disk in bytes, a multiple of 512.
    pub(crate) size: u64,
    /// Data bytes of a block.
    pub(crate) block_bytes: u32,
    /// Length of the journal ring in bytes.
    pub(crate) ring_bytes: u64,
    /// The parent, of a differencing image.
    pub(crate) parent: Option<ParentLink>,
}

impl CreateParameters {
    fn lineage(&self) -> Lineage {
        let lineage = Lineage::default();
        self.parent.as_ref().map_or(lineage, |parent| parent.in_lineage(&lineage))
    }
}

/// How a differencing image names its parent.
#[derive(Debug, Clone)]
pub(crate) struct ParentLink {
    /// The parent's unique id.
    pub(crate) unique_id: UniqueId,
    /// When the parent's file was last changed.
    pub(crate) modified: Timestamp,
    /// Path of the parent from the folder of the child.
    pub(crate) path: PathBuf,
    /// The parent's seal, if it has one, or is about to.
    pub(crate) seal_id: SealId,
    /// What the parent is like, if it is a fixed disk.
    pub(crate) fixed: FixedParent,
}

/// Bytes kept for each parent locator: a page, which no path of this size outgrows.
const LOCATOR_SPACE: u32 = PAGE_BYTES as u32;

impl ParentLink {
    /// The lineage of an image with this parent. One whose parent has no seal, and is not fixed, has nothing to say.
    pub(super) fn in_lineage(&self, lineage: &Lineage) -> Lineage {
        let known = self.seal_id.is_some() || self.fixed != FixedParent::default();
        Lineage {
            parent_seal: self.seal_id,
            parent_id: if known { self.unique_id } else { UniqueId::default() },
            fixed_parent: self.fixed,
            ..*lineage
        }
    }

    /// Puts the link into a dynamic header, with locators in these pages. Returns the payloads of the locators and where they go.
    pub(super) fn describe(
        &self,
        header: &mut DynamicHeader,
        pages: [u64; 3],
    ) -> Result<Vec<(u64, Vec<u8>)>> {
        let path = self.path.as_os_str().as_bytes();
        let refuse = |error: FormatError| Error::Invalid {
            what: format!(
                "the path \"{}\" cannot be written into a VHD as that of a parent: {error}",
                self.path.display()
            ),
        };
        header.parent_unique_id = self.unique_id;
        header.parent_timestamp = self.modified;
        let name = self.path.file_name().unwrap_or_default().as_bytes();
        let units = units_from_path(name).ok_or_else(|| Error::Invalid {
            what: format!(
                "the name \"{}\" is not UTF-8: a VHD cannot name it as a parent",
                self.path.display()
            ),
        })?;
        header.set_parent_name(&units).map_err(refuse)?;
        header.locators = [ParentLocator::default(); 8];
        let mut payloads = Vec::new();
        let platforms = [PlatformCode::MacX, PlatformCode::W2ku, PlatformCode::W2ru];
        for ((platform, locator), offset) in platforms.into_iter().zip(&mut header.locators).zip(pages) {
            let payload = encode_relative(platform, path).map_err(refuse)?;
            if payload.len() > LOCATOR_SPACE as usize {
                let what = format!("the path \"{}\" of the parent is too long", self.path.display());
                return Err(Error::Invalid { what });
            }
            *locator = ParentLocator::new(platform, offset, LOCATOR_SPACE, payload.len() as u32);
            payloads.push((offset, payload));
        }
        Ok(payloads)
    }
}

/// An image that is complete and durable, and has no name yet.
#[derive(Debug)]
pub(crate) struct NewImage<'a> {
    new: NewFile<'a>,
    file: Arc<dyn File>,
    unique_id: UniqueId,
}

impl<'a> NewImage<'a> {
    /// Makes an empty dynamic or differencing image that is to be `path`.
    pub(crate) fn new(vfs: &'a dyn Vfs, path: &'a Path, parameters: &CreateParameters) -> Result<Self> {
        let entries = table_entries(parameters)?;
        let place = Placement::new(entries, parameters.block_bytes, parameters.ring_bytes);
        let random = vfs.random_id().map_err(|error| Error::io(path, "asking for a random id", error))?;
        let (new, file) = NewFile::create(vfs, path)?;
        let unique_id = UniqueId::from_bytes(random);
        write_image(&*file, path, vfs.now(), place, parameters, unique_id)?;
        Ok(NewImage { new, file, unique_id })
    }

    /// The unique id that it got.
    pub(crate) fn unique_id(&self) -> UniqueId {
        self.unique_id
    }

    /// Its file.
    pub(crate) fn file(&self) -> &Arc<dyn File> {
        &self.file
    }

    /// Opens it for writing, locked, before it has a name; errors will call it `path`.
    pub(crate) fn open(&self, vfs: Arc<dyn Vfs>, path: &Path) -> Result<Layer> {
        super::lock(&*self.file, path, Access::ReadWrite)?;
        Opening::new(vfs, Arc::clone(&self.file), path)?.open(Access::ReadWrite)
    }

    /// Gives it its name, durably; fails where that is taken.
    pub(crate) fn publish(self) -> Result<()> {
        self.new.publish(false)
    }
}

/// Creates an empty dynamic or differencing image at `path`, which must not exist.
pub(crate) fn create(vfs: &dyn Vfs, path: &Path, parameters: &CreateParameters) -> Result<()> {
    NewImage::new(vfs, path, parameters)?.publish()
}

fn table_entries(parameters: &CreateParameters) -> Result<u32> {
    let size = parameters.size;
    if size == 0 || !size.is_multiple_of(vhd::SECTOR) {
        let what =
            format!("a disk of {size} bytes cannot be created: the size must be a multiple of 512, above 0");
        return Err(Error::Invalid { what });
    }
    if size > vhd::MAX_DYNAMIC_SIZE {
        let what = format!(
            "a disk of {size} bytes cannot be created: a dynamic VHD holds at most 2040 GiB ({} bytes), because its block \
             table counts 512-byte sectors in 32 bits",
            vhd::MAX_DYNAMIC_SIZE
        );
        return Err(Error::Invalid { what });
    }
    let blocks = size.div_ceil(parameters.block_bytes.into());
    u32::try_from(blocks)
        .ok()
        .filter(|&entries| vhd::bat_bytes(entries) <= BAT_ROOM_BYTES)
        .ok_or_else(|| Error::Invalid { what: format!("a disk of {size} bytes needs too many blocks") })
}

fn write_image(
    file: &dyn File,
    path: &Path,
    now: FileTime,
    place: Placement,
    parameters: &CreateParameters,
    disk_id: UniqueId,
) -> Result<()> {
    let disk_type = match parameters.parent {
        Some(_) => DiskType::Differencing,
        None => DiskType::Dynamic,
    };
    let footer = Footer::new(disk_type, parameters.size, disk_id, Timestamp::from_unix_seconds(now.seconds));
    let mut header = DynamicHeader::new(place.table_offset, place.table_entries, place.block_bytes);
    let locators = match &parameters.parent {
        Some(parent) => {
            let page = |index: u64| LOCATORS_OFFSET + index * PAGE_BYTES;
            parent.describe(&mut header, [page(0), page(1), page(2)])?
        }
        None => Vec::new(),
    };
    let pair = pair_bytes(&footer, &header);
    let file_bytes = place.slot_origin + Footer::SIZE as u64;
    let superblock = Superblock {
        sequence: 1,
        disk_id,
        incompatible: 0,
        read_only_compatible: 0,
        compatible: 0,
        state: State::Clean,
        sync_failed: false,
        foreign_blocks: false,
        session: SessionId::default(),
        ring_offset: place.ring_offset,
        ring_bytes: place.ring_bytes,
        meta_tail: Tail::FIRST,
        data_tail: Tail::FIRST,
        next_allocation: 1,
        slot_origin: place.slot_origin,
        fingerprint: Fingerprint {
            file_bytes,
            footer_crc: crc32fast::hash(&footer.to_bytes()),
            header_crc: crc32fast::hash(&header.to_bytes()),
            bat_crc: entries_crc(&vec![vhd::UNALLOCATED; place.table_entries as usize]),
            modified: now,
        },
        lineage: parameters.lineage(),
        data_crcs: DataCrcs::default(),
    };
    let second = Superblock { sequence: 2, ..superblock };
    let table = vec![0xff; vhd::bat_bytes(place.table_entries).next_multiple_of(PAGE_BYTES) as usize];
    let mut parts: Vec<(&str, u64, Vec<u8>)> = vec![
        ("footer copy and dynamic header", 0, pair.to_vec()),
        ("superblock", SUPERBLOCK_OFFSETS[0], superblock.to_bytes().to_vec()),
        ("superblock", SUPERBLOCK_OFFSETS[1], second.to_bytes().to_vec()),
        ("header backup", HEADER_BACKUP_OFFSET, pair.to_vec()),
        // Written, not only reserved, so that a journal entry never has to allocate space or convert an extent.
        ("journal ring", place.ring_offset, vec![0; place.ring_bytes as usize]),
        ("block table", place.table_offset, table),
        ("footer", place.slot_origin, footer.to_bytes().to_vec()),
    ];
    parts.extend(locators.into_iter().map(|(offset, payload)| ("parent locator", offset, payload)));
    for (what, offset, bytes) in parts {
        file.write_all_at(&bytes, offset)
            .map_err(|error| Error::io(path, format!("writing the {what} at offset {offset}"), error))?;
    }
    finish(file, now).map_err(|error| Error::io(path, "making the new image durable", error))
}

fn finish(file: &dyn File, now: FileTime) -> io::Result<()> {
    file.sync_data()?;
    file.set_modified(now)
}
