//! Moving bytes within the file.

use crate::journal::write_zeros;
use crate::vfs::{File, FileExt};
use std::io;
use std::ops::Range;

const CHUNK_BYTES: u64 = 1 << 20;

/// Copies a range to where nothing stands; holes stay holes.
pub(super) fn copy(file: &dyn File, from: u64, to: u64, length: u64) -> io::Result<()> {
    let end = from + length;
    let mut at = from;
    let mut buf = vec![0; CHUNK_BYTES.min(length) as usize];
    while at < end {
        let Some(data) = file.next_data(at)?.filter(|data| data.start < end) else { break };
        at = data.start.max(at);
        let count = CHUNK_BYTES.min(data.end.min(end).saturating_sub(at));
        if count == 0 {
            break;
        }
        let chunk = buf.get_mut(..count as usize).unwrap_or_default();
        file.read_or_zero_at(chunk, at)?;
        file.write_all_at(chunk, to + (at - from))?;
        at += count;
    }
    Ok(())
}

/// Makes a range read as zeros and gives its space back where that works.
pub(super) fn clear(file: &dyn File, range: Range<u64>) -> io::Result<()> {
    let length = range.end.saturating_sub(range.start);
    if length == 0 {
        return Ok(());
    }
    match file.punch_hole(range.start, length) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => write_zeros(file, range.start, length),
        result => result,
    }
}
