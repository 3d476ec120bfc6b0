//! Moving bytes within the file.

use crate::vfs::{File, FileExt};
use std::io;

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
