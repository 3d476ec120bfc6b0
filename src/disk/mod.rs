//! What a guest sees: a disk of bytes.
//!
//! [`Disk`] checks what is asked and hands it to what keeps the bytes: a file in order, or blocks of a layer. It knows
//! nothing of journals or slots.

mod blocks;
mod fixed;
mod generation;
mod info;
mod maintaining;
mod merging;
mod storage;
mod turn;

pub(crate) use generation::{Ready, Stopped, Switch};
pub use info::{DiskInfo, ForeignChanges, JournalState, ParentInfo};
pub(crate) use merging::Merging;

use crate::chain::{self, ChildClaims, Leaf, ParentPolicy};
use crate::error::{Error, Result};
use crate::layer::{self, CreateParameters, Fixed, Image, Layer};
use crate::sync::Arc;
use crate::vfs::{Access, File, HostVfs, Vfs};
use crate::vhd::{self, DiskType, Footer};
use blocks::Blocks;
use fixed::FixedDisk;
use std::io::{IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use storage::Storage;
pub(crate) use turn::Checkpointing;
use turn::Turn;

/// Journal ring of a new image, in bytes.
pub(crate) const RING_BYTES: u64 = 2 << 20;

/// How a new disk is made.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    vfs: Arc<dyn Vfs>,
    size: u64,
    block_bytes: u32,
    ring_bytes: u64,
    fixed: bool,
    parent: Option<PathBuf>,
    registered: bool,
    policy: ParentPolicy,
}

impl CreateOptions {
    /// A dynamic disk of `size` bytes: a multiple of 512, at most 2040 GiB.
    pub fn new(size: u64) -> Self {
        CreateOptions {
            vfs: Arc::new(HostVfs),
            size,
            block_bytes: vhd::BLOCK_SIZE,
            ring_bytes: RING_BYTES,
            fixed: false,
            parent: None,
            registered: true,
            policy: ParentPolicy::default(),
        }
    }

    /// The parent is neither sealed, nor told of its child.
    pub(crate) fn unregistered(mut self) -> Self {
        self.registered = false;
        self
    }

    /// A differencing disk over the image at `parent`: it shows what the parent holds, and keeps what is written to it. It has
    /// its parent's size and block size. The parent is sealed, if it is an image of cowvhd that is not yet: it cannot be written
    /// to from then on. A fixed one loses everybody's permission to write to its file. One made elsewhere nothing but the caller
    /// keeps from being written to.
    pub fn child_of(parent: &Path) -> Self {
        CreateOptions { parent: Some(parent.to_path_buf()), ..Self::new(0) }
    }

    /// Lets the parents of the parent lie in this folder and below, too.
    pub fn allow_parents_in(mut self, folder: &Path) -> Self {
        self.policy.allowed.push(folder.to_path_buf());
        self
    }

    /// A fixed disk instead: the file is as long as the disk and a footer, and sparse. It has no journal and promises what a
    /// raw file promises; its size may be more than 2040 GiB.
    pub fn fixed(mut self) -> Self {
        self.fixed = true;
        self
    }

    /// Makes the image in another place than the host's file system.
    pub fn vfs(mut self, vfs: Arc<dyn Vfs>) -> Self {
        self.vfs = vfs;
        self
    }

    /// Small blocks and a small ring, so that a simulator meets every boundary soon. Other tools need not understand such
    /// an image; not for anything but tests.
    #[cfg(feature = "sim")]
    pub fn test_geometry(mut self, block_bytes: u32, ring_bytes: u64) -> Self {
        (self.block_bytes, self.ring_bytes) = (block_bytes, ring_bytes);
        self
    }

    /// Creates the image at `path`, which must not exist. It appears under its name complete and durable, or not at all.
    pub fn create(&self, path: &Path) -> Result<()> {
        if self.fixed {
            return layer::create_fixed(&*self.vfs, path, self.size);
        }
        if let Some(parent) = &self.parent {
            let geometry = (self.block_bytes, self.ring_bytes);
            return chain::create_child(&self.vfs, path, parent, &self.policy, geometry, self.registered);
        }
        let parameters = CreateParameters {
            size: self.size,
            block_bytes: self.block_bytes,
            ring_bytes: self.ring_bytes,
            parent: None,
        };
        layer::create(&*self.vfs, path, &parameters)
    }
}

/// How a disk is opened.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    pub(crate) vfs: Arc<dyn Vfs>,
    access: Access,
    direct: bool,
    pub(crate) policy: ParentPolicy,
    /// Data bytes of a block and bytes of the journal ring of a child over a fixed disk, which has neither.
    pub(crate) child_geometry: (u32, u64),
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl OpenOptions {
    /// For reading and writing, on the host's file system.
    pub fn new() -> Self {
        OpenOptions {
            vfs: Arc::new(HostVfs),
            access: Access::ReadWrite,
            direct: false,
            policy: ParentPolicy::default(),
            child_geometry: (vhd::BLOCK_SIZE, RING_BYTES),
        }
    }

    /// The same as [`CreateOptions::test_geometry`] for what is made over fixed disks.
    #[cfg(feature = "sim")]
    pub fn test_geometry(mut self, block_bytes: u32, ring_bytes: u64) -> Self {
        self.child_geometry = (block_bytes, ring_bytes);
        self
    }

    /// For reading alone: the file is not changed, not even to recover it; a journal is replayed in memory.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
        self
    }

    /// Opens the image in another place than the host's file system.
    pub fn vfs(mut self, vfs: Arc<dyn Vfs>) -> Self {
        self.vfs = vfs;
        self
    }

    /// Reads and writes past the host's page cache (`O_DIRECT`), so that the guest's cache is the only one. Requests of whole
    /// 4 KiB pages profit, most of all from buffers at multiples of 4096; all others are served as ever. Parents of a
    /// differencing disk, which many disks may share, are read through the cache. Fails with
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) where the file system cannot do it.
    pub fn direct(mut self, direct: bool) -> Self {
        self.direct = direct;
        self
    }

    /// Takes the file at `path` for the parent that a differencing image names, wherever the image says it is. It still has to
    /// be the disk with the right unique id.
    pub fn parent(mut self, path: &Path) -> Self {
        self.policy.explicit = Some(path.to_path_buf());
        self
    }

    /// Lets parents lie in this folder and below, too. Without, all of them have to lie in the image's own folder or below it:
    /// an image could else make its reader open any file of the system.
    pub fn allow_parents_in(mut self, folder: &Path) -> Self {
        self.policy.allowed.push(folder.to_path_buf());
        self
    }

    /// The same for one of the disk's parents: what the caller says of the disk's own parent does not hold for that one's.
    pub(crate) fn for_a_parent(&self) -> Self {
        let mut options = self.clone();
        options.policy.explicit = None;
        options
    }

    /// Opens the image at `path`. One opened for writing after a crash is recovered first.
    ///
    /// Fails with [`ErrorKind::InUse`](crate::ErrorKind::InUse) while another process has it open for writing (or, to open
    /// it for writing, at all).
    pub fn open(&self, path: &Path) -> Result<Disk> {
        match self.access {
            Access::ReadOnly => self.open_once(path),
            Access::ReadWrite => chain::with_recovered_layers(&self.vfs, || self.open_once(path)),
        }
    }

    fn open_once(&self, path: &Path) -> Result<Disk> {
        let vfs = match self.direct {
            false => Arc::clone(&self.vfs),
            true => self.vfs.direct().ok_or_else(|| Error::Unsupported {
                path: path.to_path_buf(),
                what: "there is no way past the page cache here: open the image without `direct`".into(),
            })?,
        };
        let locked = chain::open_leaf(&self.vfs, Arc::clone(&vfs), path, self.access)?;
        let lineage = locked.lineage().unwrap_or_default();
        let (image, parents) = locked.open(|file, footer, header| {
            let claims = ChildClaims { path, file, footer, header, lineage };
            chain::open_parents(&self.vfs, &claims, &self.policy)
        })?;
        let (storage, footer): (Box<dyn Storage>, Footer) = match image {
            Image::Dynamic(layer) => {
                let footer = layer.footer().clone();
                (Box::new(Blocks::new(layer, parents)), footer)
            }
            Image::Fixed(fixed) => {
                let footer = fixed.footer().clone();
                (Box::new(FixedDisk::new(fixed)), footer)
            }
        };
        let leaf = match self.access {
            Access::ReadWrite => Some(Leaf::resolve(&*self.vfs, path)?),
            Access::ReadOnly => None,
        };
        let origin = Origin { options: self.clone(), image_vfs: vfs, leaf, snapshots: Turn::default() };
        Ok(Disk { size: footer.current_size, storage, origin })
    }
}

/// What a range of a disk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data.
    Data,
    /// Zeros for which the file has space.
    Zero,
    /// Zeros for which the file has no space.
    Hole,
}

/// A range of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Guest byte offset.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// What is there.
    pub kind: ExtentKind,
}

/// A range of a disk, and where it stands in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappedExtent {
    /// The range and what it holds.
    pub extent: Extent,
    /// Where it starts in its file, if it has a place there. In a fixed disk a hole has one, too.
    pub file_offset: Option<u64>,
    /// Which file: 0 is the image itself, 1 its parent, and so on.
    pub depth: u32,
}

impl MappedExtent {
    /// Whether `next`, the range behind this one, is of the same kind and behind this one in the file, too.
    fn is_followed_by(&self, next: &MappedExtent) -> bool {
        self.extent.kind == next.extent.kind
            && self.depth == next.depth
            && self.file_offset.map(|at| at + self.extent.length) == next.file_offset
    }
}

/// How [`Disk::write_zeroes`] goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroMode {
    /// Space may be given back.
    MayPunch,
    /// The range stays, or becomes, allocated, so that later writes to it cannot run out of space.
    KeepAllocated,
}

/// An open disk.
///
/// All methods take `&self` and may be called from many threads at once. A write counts from its return; it survives a
/// crash once a [`flush`](Disk::flush) that was called after it has returned. Overlapping calls at the same time leave
/// each 512-byte sector as one of them wanted it.
///
/// Dropping a disk without [`close`](Disk::close) leaves it as a crash would: the next open recovers it, and other tools
/// refuse the file until then.
#[derive(Debug)]
pub struct Disk {
    storage: Box<dyn Storage>,
    size: u64,
    origin: Origin,
}

/// What a running disk writes to.
#[derive(Debug, Clone)]
pub(crate) enum RunningLeaf {
    /// A layer of blocks.
    Layer(Arc<Layer>),
    /// A fixed disk.
    Fixed(Arc<Fixed>),
}

/// Where a disk comes from, for what is done around it while it is open.
#[derive(Debug)]
pub(crate) struct Origin {
    /// How its parents are found.
    pub(crate) options: OpenOptions,
    /// The way to its own file.
    pub(crate) image_vfs: Arc<dyn Vfs>,
    /// The file, found once when the disk was opened for writing.
    pub(crate) leaf: Option<Leaf>,
    /// One snapshot at a time.
    pub(crate) snapshots: Turn,
}

impl Disk {
    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fixed, dynamic or differencing.
    pub fn disk_type(&self) -> DiskType {
        self.storage.disk_type()
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.storage.path()
    }

    /// Whether the disk was opened read-only.
    pub fn is_read_only(&self) -> bool {
        self.storage.is_read_only()
    }

    /// What opening the disk found and did, in words for a person; empty if there is nothing to say.
    pub fn notices(&self) -> Vec<String> {
        self.storage.notices()
    }

    /// Reads `buf.len()` bytes at byte `offset`. Any offset and length within the disk are served.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        self.storage.read_at(buf, offset)
    }

    /// Reads into several buffers, one after the other, from byte `offset` on.
    pub fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let mut at = offset;
        self.check_range(offset, bufs.iter().map(|buf| buf.len() as u64).sum())?;
        for buf in bufs {
            self.read_at(buf, at)?;
            at += buf.len() as u64;
        }
        Ok(())
    }

    /// Writes `buf` at byte `offset`; both must be multiples of 512.
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_writable(offset, buf.len() as u64)?;
        self.storage.write_at(buf, offset)
    }

    /// Writes several buffers, one after the other, from byte `offset` on; each must be a multiple of 512 long.
    pub fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let mut at = offset;
        self.check_writable(offset, bufs.iter().map(|buf| buf.len() as u64).sum())?;
        for buf in bufs {
            self.write_at(buf, at)?;
            at += buf.len() as u64;
        }
        Ok(())
    }

    /// Makes a range read as zeros; offset and length must be multiples of 512.
    pub fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<()> {
        self.check_writable(offset, length)?;
        self.storage.write_zeroes(offset, length, mode == ZeroMode::KeepAllocated)
    }

    /// The guest no longer needs a range: it reads as zeros afterwards and its space is given back as far as possible.
    pub fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.write_zeroes(offset, length, ZeroMode::MayPunch)
    }

    /// Returns when every write, zeroing and discard that returned before the call, on any thread, is durable.
    ///
    /// An error means that this is not known. After a failed sync the disk stops
    /// ([`ErrorKind::Poisoned`](crate::ErrorKind::Poisoned)); a lack of space leaves it usable, and a later flush may succeed.
    pub fn flush(&self) -> Result<()> {
        self.storage.flush()
    }

    /// Flushes and closes the file cleanly, so that other tools can open it. Waits for calls under way; later writes fail.
    pub fn close(&self) -> Result<()> {
        self.storage.close()
    }

    /// What a range holds, from metadata alone; neighbours of one kind are joined.
    pub fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>> {
        self.check_range(offset, length)?;
        let mut extents: Vec<Extent> = Vec::new();
        self.storage.map(offset, length, &mut |MappedExtent { extent, .. }| match extents.last_mut() {
            Some(last) if last.kind == extent.kind => last.length += extent.length,
            _ => extents.push(extent),
        })?;
        Ok(extents)
    }

    /// What a range holds and where in the file it stands; neighbours of one kind that are neighbours in the file, too, are
    /// joined.
    pub fn map(&self, offset: u64, length: u64) -> Result<Vec<MappedExtent>> {
        self.check_range(offset, length)?;
        let mut extents: Vec<MappedExtent> = Vec::new();
        self.storage.map(offset, length, &mut |next| match extents.last_mut() {
            Some(last) if last.is_followed_by(&next) => last.extent.length += next.extent.length,
            _ => extents.push(next),
        })?;
        Ok(extents)
    }

    /// The file in which what [`Disk::map`] finds at depth 0 stands as a guest sees it, if it does, and nobody changes it.
    pub(crate) fn stored_in(&self) -> Option<Arc<dyn File>> {
        self.storage.stored_in()
    }

    /// Where it comes from.
    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// What is written to at this moment.
    pub(crate) fn leaf(&self) -> Result<RunningLeaf> {
        match self.storage.as_fixed() {
            Some(disk) => Ok(RunningLeaf::Fixed(Arc::clone(disk.fixed()))),
            None => self.blocks().map(|blocks| RunningLeaf::Layer(blocks.leaf())),
        }
    }

    /// Makes `child`, an image that holds nothing, open for writing, the leaf of this running disk; the leaf of now becomes its
    /// parent. Every change of the disk is in the old leaf if it returned before the call, and in the new one if it began after.
    /// Changes wait for a moment, reads do not.
    ///
    /// On return nobody reads or changes the old leaf but as a parent; a flush of it that was called before may be under way. What
    /// is in the new leaf is lost until it has a durable place in the chain, so flushes called from now on, and a close, wait for
    /// [`Switch::commit`]; where that does not come, the disk stops.
    pub(crate) fn switch_leaf(&self, child: Box<Layer>) -> Result<Switch<'_>> {
        match self.storage.as_fixed() {
            Some(disk) => disk.switch(child),
            None => self.blocks()?.switch(child),
        }
    }

    /// The first half of [`Disk::switch_leaf`], for several disks at one point.
    pub(crate) fn prepare_leaf(&self, child: Box<Layer>) -> Result<Ready<'_>> {
        self.blocks()?.prepare(child)
    }

    fn blocks(&self) -> Result<&Blocks> {
        self.storage.as_blocks().ok_or_else(|| Error::Unsupported {
            path: self.path().to_path_buf(),
            what: "it is a fixed disk: it has no parent, and no blocks of its own".into(),
        })
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(Error::OutOfRange { offset, length, size: self.size, why: "it ends past the disk" }),
        }
    }

    fn check_writable(&self, offset: u64, length: u64) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::ReadOnly { path: self.path().to_path_buf() });
        }
        self.check_range(offset, length)?;
        if !offset.is_multiple_of(vhd::SECTOR) || !length.is_multiple_of(vhd::SECTOR) {
            let why = "offset and length must be multiples of 512";
            return Err(Error::OutOfRange { offset, length, size: self.size, why });
        }
        Ok(())
    }
}
