//! A running disk whose leaf takes over what layers beneath it hold, while others read and write.
//!
//! Copies are writes of absent units with what a guest sees there; whoever writes to one of them waits, and overwrites (I8). As long
//! as this goes on no block of the leaf is given back: a block that reads as zeros over the layers of now need not do so over those that
//! will be left, and nobody would look at it again.
//!
//! **A leaf without a parent.** When it holds all that is beneath it, only zeros show through its absent units. From a moment on, at
//! which no write is under way, it takes new blocks whole, as a root disk does. So the partial ones come to an end.

use super::Disk;
use super::blocks::Blocks;
use crate::chain::{ParentImage, Source};
use crate::defect::{self, Defect};
use crate::error::{Error, Result};
use crate::layer::{Layer, ParentLink};
use crate::sync::{Arc, Ordering};
use crate::vfs::Vfs;
use crate::vhd::UniqueId;
use std::cell::Cell;
use std::ops::Range;

/// Layers of a running disk being merged. One at a time.
#[derive(Debug)]
pub(crate) struct Merging<'a> {
    pub(super) blocks: &'a Blocks,
    pub(super) vfs: Arc<dyn Vfs>,
    leaf: Arc<Layer>,
    /// From the top down.
    pub(super) parents: Vec<Arc<dyn Source>>,
}

impl Disk {
    /// Starts to merge layers of this disk.
    pub(crate) fn merging(&self) -> Result<Merging<'_>> {
        let blocks = self.blocks()?;
        if blocks.merging.swap(true, Ordering::SeqCst) {
            let holder = Some("a merge that is under way".into());
            return Err(Error::InUse { path: self.path().to_path_buf(), holder });
        }
        // Given back from here on.
        let mut merging = Merging {
            blocks,
            vfs: Arc::clone(&self.origin().options.vfs),
            leaf: blocks.leaf(),
            parents: Vec::new(),
        };
        // Who has not seen that blocks must stay is done when this returns.
        blocks.generations().pass_changes();
        let generation = blocks.generations().latest_settled();
        merging.leaf = Arc::clone(&generation.leaf);
        if merging.leaf.is_read_only() {
            return Err(Error::ReadOnly { path: self.path().to_path_buf() });
        }
        if let Some(parents) = &generation.parents {
            merging.parents = parents.sources().iter().rev().cloned().collect();
        }
        if !merging.parents.iter().all(|source| source.as_parent().is_some()) {
            let what =
                "a layer beneath it was written to in this session and is not closed: close the disk and open it again first".to_string();
            return Err(Error::Unsupported { path: self.path().to_path_buf(), what });
        }
        Ok(merging)
    }
}

impl Disk {
    /// The layers beneath the leaf of now, from the top down; none in a disk that needs no parents.
    pub(crate) fn layers_beneath(&self) -> Result<Vec<Arc<dyn Source>>> {
        let generation = self.blocks()?.generations().latest_settled();
        let parents = generation.parents.as_ref().map(|parents| parents.sources().iter().rev().cloned());
        Ok(parents.map(Iterator::collect).unwrap_or_default())
    }
}

impl Merging<'_> {
    /// The layers beneath the leaf, from the top down.
    pub(crate) fn images(&self) -> Vec<&ParentImage> {
        self.parents.iter().filter_map(|source| source.as_parent()).collect()
    }

    /// Where parents are.
    pub(crate) fn vfs(&self) -> &Arc<dyn Vfs> {
        &self.vfs
    }

    /// The leaf.
    pub(crate) fn leaf(&self) -> &Layer {
        &self.leaf
    }

    /// The leaf's unique id.
    pub(crate) fn leaf_id(&self) -> UniqueId {
        self.leaf.footer().unique_id
    }

    /// Data bytes of a block of the leaf.
    pub(crate) fn block_bytes(&self) -> u32 {
        self.leaf.place().block_bytes
    }

    /// How many blocks the leaf has, absent ones included.
    pub(crate) fn blocks(&self) -> u32 {
        self.leaf.place().table_entries
    }

    /// Copies up what of bytes `range` of `block` (whole units) the leaf lacks.
    pub(crate) fn fill(&self, block: u32, range: Range<u64>) -> Result<u64> {
        let filled = Cell::new(0);
        self.blocks.change(|generation| {
            if !Arc::ptr_eq(&generation.leaf, &self.leaf) {
                return Err(self.leaf_changed());
            }
            filled.set(generation.leaf.fill(block, range.clone(), generation.below())?);
            Ok(())
        })?;
        Ok(filled.get())
    }

    /// The leaf holds all data beneath it: it takes new blocks whole from now on.
    pub(crate) fn take_whole_blocks(&self) -> Result<()> {
        let generations = self.blocks.generations();
        match generations.while_frozen(&self.leaf, Layer::take_whole_blocks) {
            true => Ok(()),
            false => Err(self.leaf_changed()),
        }
    }

    /// Whether some of the units of a block that the leaf has are not there.
    pub(crate) fn is_partial(&self, block: u32) -> Result<bool> {
        self.leaf.is_partial(block)
    }

    /// The leaf has all that the topmost `count` layers decide: it names the one beneath them (`parent`), and does without them.
    /// Without a parent `count` is all of them, and no block of the leaf is partial.
    pub(crate) fn finish(&self, count: usize, parent: Option<&ParentLink>) -> Result<()> {
        let keep = self.parents.len().saturating_sub(count);
        self.blocks
            .generations()
            .shorten(&self.leaf, keep, parent)
            .unwrap_or_else(|| Err(self.leaf_changed()))
    }

    fn leaf_changed(&self) -> Error {
        let what = "a snapshot was taken during the merge, which ended it: start it again".to_string();
        Error::Unsupported { path: self.leaf.path().to_path_buf(), what }
    }
}

impl Drop for Merging<'_> {
    fn drop(&mut self) {
        self.blocks.merging.store(false, Ordering::SeqCst);
    }
}

impl Blocks {
    /// Whether blocks of the leaf must stay.
    pub(super) fn keeps_blocks(&self) -> bool {
        self.merging.load(Ordering::SeqCst) && !defect::active(Defect::MergeLetsBlocksGo)
    }
}
