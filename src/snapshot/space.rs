//! Whether there is space for what is going to be copied: looked at before anything is, from metadata alone.
//!
//! What the file system says is not kept for us, and zeros in the data that take no space are counted. So a merge that begins may
//! still run out of space, which loses nothing.

use super::diff::{View, missing_data};
use super::pull::{UNIT_BYTES, WINDOW_BYTES};
use crate::error::{Error, Result};
use crate::layer::Layer;
use std::collections::BTreeSet;

/// Fails with [`Error::NoSpace`] where the file system has no space for what `layer` lacks of `layers`.
pub(super) fn check_space(layer: &Layer, layers: &[View<'_>], size: u64, block_bytes: u64) -> Result<()> {
    let path = layer.path();
    let available = layer.file().available_bytes();
    let available = available.map_err(|error| Error::io(path, "asking for the space that is left", error))?;
    let Some(available) = available else { return Ok(()) };
    let needed = needed(&View::Top(layer), layers, size, block_bytes)?;
    if needed <= available {
        return Ok(());
    }
    let what = format!(
        "up to {needed} bytes are to be copied into it, and its file system has {available} left; nothing was changed: free some space first"
    );
    Err(Error::NoSpace { path: path.to_path_buf(), what })
}

/// Bytes of space that `top` needs at most to take over what `layers` hold: data, and a page for each new block.
fn needed(top: &View<'_>, layers: &[View<'_>], size: u64, block_bytes: u64) -> Result<u64> {
    let mut bytes = 0;
    let mut blocks = BTreeSet::new();
    let mut start = 0;
    while start < size {
        let end = size.min(start + WINDOW_BYTES);
        for range in missing_data(top, layers, start..end)? {
            let units = range.start / UNIT_BYTES..range.end.div_ceil(UNIT_BYTES);
            bytes += (units.end - units.start) * UNIT_BYTES;
            blocks.extend(range.start / block_bytes..range.end.div_ceil(block_bytes));
        }
        start = end;
    }
    Ok(bytes + blocks.len() as u64 * UNIT_BYTES)
}
