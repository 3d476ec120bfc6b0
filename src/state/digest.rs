//! The digest of a blob: BLAKE3 over the BLAKE3 digests of its chunks of 4 MiB, the last of which may be shorter.
//!
//! So threads share the work, and a chunk that is a hole costs neither reading nor hashing: zeros have a digest that is known.

use super::Digest;
use crate::error::{Error, Result};
use crate::sync::{AtomicUsize, Mutex, Ordering};
use crate::vfs::{File, FileExt};
use std::path::Path;
use std::thread;

/// Bytes of a chunk.
const CHUNK_BYTES: u64 = 4 << 20;
/// Chunks whose digests are held at once: 16 GiB.
const WINDOW_CHUNKS: u64 = 4096;

/// The digest of all of a small file.
pub(super) fn of_bytes(bytes: &[u8]) -> Digest {
    Digest(*blake3::hash(bytes).as_bytes())
}

/// The digest of the first `length` bytes of a file, by as many threads as the machine runs at once; what lies past the file's
/// end counts as zeros.
pub(super) fn of_file(file: &dyn File, path: &Path, length: u64) -> Result<Digest> {
    let chunks = length.div_ceil(CHUNK_BYTES);
    let threads = thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let zeros = hash_of_zeros();
    let mut whole = blake3::Hasher::new();
    for first in (0..chunks).step_by(WINDOW_CHUNKS as usize) {
        let count = (chunks - first).min(WINDOW_CHUNKS);
        let mut digests = vec![[0; 32]; count as usize];
        let work = Work { file, path, length, first, zeros, next: AtomicUsize::new(0) };
        if count == 1 || threads == 1 {
            work.run(&Mutex::new(&mut digests))?;
        } else {
            let shared = Mutex::new(&mut digests);
            thread::scope(|scope| {
                let workers: Vec<_> =
                    (0..threads.min(count)).map(|_| scope.spawn(|| work.run(&shared))).collect();
                workers.into_iter().try_for_each(|worker| match worker.join() {
                    Ok(result) => result,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
            })?;
        }
        whole.update(digests.as_flattened());
    }
    Ok(Digest(*whole.finalize().as_bytes()))
}

/// The digest of a whole chunk of zeros.
fn hash_of_zeros() -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    let zeros = [0; 64 << 10];
    for _ in 0..CHUNK_BYTES as usize / zeros.len() {
        hasher.update(&zeros);
    }
    *hasher.finalize().as_bytes()
}

/// A window of chunks, taken one after the other by whoever has time.
struct Work<'a> {
    file: &'a dyn File,
    path: &'a Path,
    length: u64,
    first: u64,
    zeros: [u8; 32],
    next: AtomicUsize,
}

impl Work<'_> {
    fn run(&self, digests: &Mutex<&mut Vec<[u8; 32]>>) -> Result<()> {
        let mut buffer = Vec::new();
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= digests.lock().len() {
                return Ok(());
            }
            let digest = self.chunk(self.first + index as u64, &mut buffer).inspect_err(|_| {
                // The others need not go on.
                self.next.store(usize::MAX / 2, Ordering::Relaxed);
            })?;
            if let Some(place) = digests.lock().get_mut(index) {
                *place = digest;
            }
        }
    }

    fn chunk(&self, chunk: u64, buffer: &mut Vec<u8>) -> Result<[u8; 32]> {
        let start = chunk * CHUNK_BYTES;
        let length = (self.length - start).min(CHUNK_BYTES);
        let failed = |error| Error::io(self.path, format!("reading {length} bytes at offset {start}"), error);
        let data = self.file.next_data(start).map_err(failed)?;
        if length == CHUNK_BYTES && data.is_none_or(|data| data.start >= start + length) {
            return Ok(self.zeros);
        }
        buffer.resize(length as usize, 0);
        self.file.read_or_zero_at(buffer, start).map_err(failed)?;
        Ok(*blake3::hash(buffer).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfs::{HostVfs, Vfs};

    fn digest(bytes: &[u8], holes: &[(u64, u64)], length: u64) -> Digest {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blob");
        let file = HostVfs.create_new(&path).unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file.set_len(length).unwrap();
        for &(offset, count) in holes {
            file.punch_hole(offset, count).unwrap();
        }
        of_file(&*file, &path, length).unwrap()
    }

    /// As FORMAT.md says it.
    fn plainly(bytes: &[u8]) -> Digest {
        let chunks: Vec<u8> =
            bytes.chunks(4 << 20).flat_map(|chunk| *blake3::hash(chunk).as_bytes()).collect();
        Digest(*blake3::hash(&chunks).as_bytes())
    }

    #[test]
    fn holes_count_as_the_zeros_that_they_are() {
        let mut bytes: Vec<u8> = (0..13 << 20).map(|at: u32| (at >> 3) as u8 | 1).collect();
        bytes.truncate((13 << 20) - 100);
        let length = bytes.len() as u64;
        assert_eq!(digest(&bytes, &[], length), plainly(&bytes));
        bytes[4 << 20..(8 << 20) + 4096].fill(0);
        let holes = [(4 << 20, (4 << 20) + 4096)];
        assert_eq!(digest(&bytes, &holes, length), plainly(&bytes));
        assert_eq!(digest(&bytes, &[], length), plainly(&bytes));
        bytes.resize((16 << 20) + 1, 0);
        assert_eq!(digest(&bytes, &holes, (16 << 20) + 1), plainly(&bytes));
    }

    #[test]
    fn the_smallest_blobs_have_digests_too() {
        for length in [0, 1, 4096] {
            assert_eq!(digest(&vec![7; length], &[], length as u64), plainly(&vec![7; length]));
        }
    }
}
