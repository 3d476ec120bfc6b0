//! A sealed layer in the middle of a running disk's chain that is written to: what shows through it does not change, so neither does
//! what anybody sees.
//!
//! The disk reads the layer through the session that writes to it, and so finds each copy as soon as it is there, in this layer or in the
//! one beneath the same. What the flat map says of the layer stays true: nothing in it moves. Everybody else is kept out by the layer's
//! lock. For a moment, in which the disk gives its own lock back and has not got the other one, nobody is; whoever comes then does
//! maintenance, too, and the disk reads on and leaves it alone.

use super::merging::Merging;
use crate::chain::{self, ParentImage, Parents, Source};
use crate::error::{Error, Result};
use crate::layer::{Image, Layer};
use crate::sync::Arc;
use crate::vfs::{Access, LockMode, Vfs};
use std::path::{Path, PathBuf};

/// A layer of a running disk that is open for maintenance.
#[derive(Debug)]
pub(crate) struct Maintained<'a> {
    merging: Merging<'a>,
    /// How many layers are above it, but for the leaf.
    depth: usize,
    path: PathBuf,
    layer: Arc<Layer>,
}

impl<'a> Merging<'a> {
    /// Opens the layer so far beneath the leaf (0: right beneath it) for maintenance. Fails where somebody else reads it.
    pub(crate) fn maintain(mut self, depth: usize) -> Result<Maintained<'a>> {
        let Some(image) = self.images().get(depth).copied() else {
            return Err(Error::Invalid { what: format!("there is no layer {depth} beneath the disk") });
        };
        let (path, id) = (image.path().to_path_buf(), image.unique_id());
        if !image.seal_id().is_some() {
            let what =
                "it is not sealed, so that nothing says who reads it: end the disk over it first".to_string();
            return Err(Error::Unsupported { path, what });
        }
        // A handle of our own, which is not opened again: while the layer is written to it would be refused.
        let reader = Arc::new(open_parent(&*self.vfs, &path)?);
        if (reader.unique_id(), reader.seal_id()) != (id, image.seal_id()) {
            let what = "another file took its name while the disk was open".to_string();
            return Err(Error::Unsupported { path, what });
        }
        self.replace(depth, Arc::clone(&reader) as Arc<dyn Source>);
        let unlocked = reader.file().unlock();
        let opened = unlocked
            .map_err(|error| Error::io(&path, "giving the lock of the layer back", error))
            .and_then(|()| self.open(&path));
        match opened {
            Ok(layer) => {
                let layer = Arc::from(layer);
                self.replace(depth, Arc::clone(&layer) as Arc<dyn Source>);
                Ok(Maintained { merging: self, depth, path, layer })
            }
            Err(error) => {
                // Without, it is read all the same.
                let _ = reader.file().lock(LockMode::Shared);
                Err(error)
            }
        }
    }

    fn open(&self, path: &Path) -> Result<Box<Layer>> {
        let image = chain::open_for_maintenance(&self.vfs, path)?;
        match image.open(|_, _, _| Ok(()))?.0 {
            Image::Dynamic(layer) => Ok(layer),
            Image::Fixed(_) => Err(Error::Invalid { what: format!("{}: it has no parent", path.display()) }),
        }
    }

    /// The number of the layer so far beneath the leaf, counted from the bottom.
    fn number(&self, depth: usize) -> usize {
        self.parents.len().saturating_sub(depth + 1)
    }

    /// The disk reads a layer by way of `source` from now on.
    fn replace(&mut self, depth: usize, source: Arc<dyn Source>) {
        self.blocks.generations().replace_parent(self.number(depth), &source);
        if let Some(parent) = self.parents.get_mut(depth) {
            *parent = source;
        }
    }
}

impl Maintained<'_> {
    /// The layer.
    pub(crate) fn layer(&self) -> &Layer {
        &self.layer
    }

    /// Where parents are.
    pub(crate) fn vfs(&self) -> &dyn Vfs {
        &*self.merging.vfs
    }

    /// The layers beneath it, from the top down.
    pub(crate) fn images(&self) -> Vec<&ParentImage> {
        self.beneath().filter_map(|source| source.as_parent()).collect()
    }

    /// The same as one disk.
    pub(crate) fn below(&self) -> Parents {
        let sources = self.beneath().rev().cloned().collect();
        Parents::new(sources, self.layer.place().block_bytes, self.layer.footer().current_size)
    }

    fn beneath(&self) -> impl DoubleEndedIterator<Item = &Arc<dyn Source>> {
        self.merging.parents.iter().skip(self.depth + 1)
    }

    /// Seals the layer again. Where it is `alone` it does without the layer right beneath it, and so does the disk from now on.
    pub(crate) fn end(self, alone: bool) -> Result<()> {
        self.layer.seal_again()?;
        let image = open_parent(&*self.merging.vfs, &self.path);
        // Without, it stays open as it is.
        let source = match image.and_then(|image| chain::bound(&self.merging.vfs, image)) {
            Ok(image) => Arc::new(image) as Arc<dyn Source>,
            Err(_) => Arc::clone(&self.layer) as Arc<dyn Source>,
        };
        let number = self.merging.number(self.depth);
        let generations = self.merging.blocks.generations();
        match alone {
            true => generations.absorb(number, &source),
            false => generations.replace_parent(number, &source),
        }
        Ok(())
    }
}

fn open_parent(vfs: &dyn Vfs, path: &Path) -> Result<ParentImage> {
    let file =
        vfs.open(path, Access::ReadOnly).map_err(|error| Error::io(path, "opening the layer", error))?;
    ParentImage::open(file, path)
}
