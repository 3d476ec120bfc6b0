//! Buffers for payloads, reused across requests and connections.
//!
//! A fresh large allocation costs page faults, and clearing it costs as much as the copy it is for; a reused one costs
//! neither. Invariants:
//!
//! 1. A buffer's memory is a power of two between 4 KiB and 64 MiB; [`class_bytes`] is what a request of a given
//!    length occupies, and is what the budget charges for it.
//! 2. The pool keeps at most `keep_bytes` of idle memory; what comes back beyond that is freed.
//! 3. A buffer handed out holds stale bytes, of whichever client: whoever takes one overwrites all of its view before
//!    any of it is sent.

use parking_lot::Mutex;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

const SMALLEST_SHIFT: u32 = 12;
const LARGEST_SHIFT: u32 = 26;
const CLASSES: usize = (LARGEST_SHIFT - SMALLEST_SHIFT + 1) as usize;

/// The memory that a buffer for `length` bytes occupies.
pub(crate) fn class_bytes(length: usize) -> usize {
    1 << (SMALLEST_SHIFT as usize + class_of(length))
}

/// Lengths come from requests that were checked against the payload limit, far below the largest class.
fn class_of(length: usize) -> usize {
    let shift = length.max(1).next_power_of_two().trailing_zeros();
    debug_assert!(shift <= LARGEST_SHIFT);
    (shift.clamp(SMALLEST_SHIFT, LARGEST_SHIFT) - SMALLEST_SHIFT) as usize
}

/// The pool.
pub(crate) struct BufferPool {
    idle: Mutex<Idle>,
    keep_bytes: usize,
}

struct Idle {
    classes: [Vec<Vec<u8>>; CLASSES],
    bytes: usize,
}

impl BufferPool {
    pub(crate) fn new(keep_bytes: usize) -> Arc<Self> {
        let idle = Idle { classes: std::array::from_fn(|_| Vec::new()), bytes: 0 };
        Arc::new(BufferPool { idle: Mutex::new(idle), keep_bytes })
    }

    /// A buffer whose view is `length` bytes of unspecified content.
    pub(crate) fn get(self: &Arc<Self>, length: usize) -> Buffer {
        let class = class_of(length);
        let reused = {
            let mut idle = self.idle.lock();
            let memory = idle.classes[class].pop();
            if let Some(memory) = &memory {
                idle.bytes -= memory.len();
            }
            memory
        };
        let memory = reused.unwrap_or_else(|| vec![0; 1 << (SMALLEST_SHIFT as usize + class)]);
        Buffer { memory, view: 0..length, pool: Arc::clone(self) }
    }

    fn put(&self, memory: Vec<u8>) {
        let mut idle = self.idle.lock();
        if idle.bytes + memory.len() <= self.keep_bytes {
            idle.bytes += memory.len();
            idle.classes[class_of(memory.len())].push(memory);
        }
    }
}

/// A buffer from the pool; dropping it gives it back.
pub(crate) struct Buffer {
    memory: Vec<u8>,
    view: Range<usize>,
    pool: Arc<BufferPool>,
}

impl Buffer {
    /// Restricts the view to `range` of the present view.
    pub(crate) fn narrow(&mut self, range: Range<usize>) {
        debug_assert!(range.start <= range.end && range.end <= self.view.len());
        self.view = self.view.start + range.start..self.view.start + range.end;
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.view.clone()]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.view.clone()]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.put(std::mem::take(&mut self.memory));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_powers_of_two_that_hold_the_length() {
        for (length, bytes) in [(0, 4096), (1, 4096), (4096, 4096), (4097, 8192), (32 << 20, 32 << 20)] {
            assert_eq!(class_bytes(length), bytes, "length {length}");
        }
    }

    #[test]
    fn idle_memory_is_reused_and_bounded() {
        let pool = BufferPool::new(16 << 10);
        let held: Vec<_> = (0..8).map(|_| pool.get(4096)).collect();
        drop(held);
        assert_eq!(pool.idle.lock().bytes, 16 << 10);
        let again = pool.get(100);
        assert_eq!(again.len(), 100);
        assert_eq!(pool.idle.lock().bytes, 12 << 10);
    }

    #[test]
    fn a_narrowed_view_is_relative_to_the_view_before() {
        let pool = BufferPool::new(0);
        let mut buffer = pool.get(1024);
        for (at, byte) in buffer.iter_mut().enumerate() {
            *byte = at as u8;
        }
        buffer.narrow(10..20);
        buffer.narrow(1..3);
        assert_eq!(&buffer[..], &[11, 12]);
    }
}
