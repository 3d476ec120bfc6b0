//! A running disk whose leaf takes over what layers beneath it hold, while others read and write.
//!
//! Copies are writes of absent units with what a guest sees there; whoever writes to one of them waits, and overwrites (I8). As long
//! as this goes on no block of the leaf is given back: a block that reads as zeros over the layers of now need not do so over those that
//! will be left, and nobody would look at it again.

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

/// Layers of a running disk being merged into its leaf. One at a time.
#[derive(Debug)]
pub(crate) struct Merging<'a> {
    blocks: &'a Blocks,
    leaf: Arc<Layer>,
    /// From the bottom up.
    parents: Vec<Arc<dyn Source>>,
}

impl Disk {
    /// Starts to merge layers into the leaf of this disk.
    pub(crate) fn merging(&self) -> Result<Merging<'_>> {
        let blocks = self.blocks()?;
        if blocks.merging.swap(true, Ordering::SeqCst) {
            let what = format!("{}: a merge is under way already", self.path().display());
            return Err(Error::Invalid { what });
        }
        // Who has not seen that is done when this returns.
        blocks.generations().pass_changes();
        let generation = blocks.generations().latest_settled();
        let parents = generation.parents.as_ref().map(|parents| parents.sources().to_vec());
        let merging =
            Merging { blocks, leaf: Arc::clone(&generation.leaf), parents: parents.unwrap_or_default() };
        if merging.leaf.is_read_only() {
            return Err(Error::ReadOnly { path: self.path().to_path_buf() });
        }
        Ok(merging)
    }
}

impl Merging<'_> {
    /// The layers beneath the leaf, from the top down.
    pub(crate) fn images(&self) -> Result<Vec<&ParentImage>> {
        let image = |source: &'_ Arc<dyn Source>| source.as_parent().is_some();
        if !self.parents.iter().all(image) {
            let what =
                "a layer beneath it was its leaf in this session: close and open the disk first".to_string();
            return Err(Error::Unsupported { path: self.leaf.path().to_path_buf(), what });
        }
        Ok(self.parents.iter().rev().filter_map(|source| source.as_parent()).collect())
    }

    /// Where the leaf's file is.
    pub(crate) fn vfs(&self) -> &dyn Vfs {
        self.leaf.vfs()
    }

    /// The leaf's unique id.
    pub(crate) fn leaf_id(&self) -> UniqueId {
        self.leaf.footer().unique_id
    }

    /// Data bytes of a block.
    pub(crate) fn block_bytes(&self) -> u32 {
        self.leaf.place().block_bytes
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

    /// The leaf has all that the topmost `count` layers decide: it names the one beneath them (`parent`), and does without them.
    pub(crate) fn finish(&self, count: usize, parent: &ParentLink) -> Result<()> {
        let keep = self.parents.len().saturating_sub(count);
        self.blocks
            .generations()
            .shorten(&self.leaf, keep, parent)
            .unwrap_or_else(|| Err(self.leaf_changed()))
    }

    fn leaf_changed(&self) -> Error {
        let what =
            format!("{}: a snapshot was made during the merge: start it again", self.leaf.path().display());
        Error::Invalid { what }
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
