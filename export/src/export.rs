//! The exported disk as requests see it: any byte range, on top of a backend that takes whole sectors.
//!
//! Reads widen to whole sectors and show the part asked for. Writes and zeroings of part of a sector read it, change
//! it and write it back, kept apart from every other change of that sector by [`RangeGate`]. Trims shrink to the
//! whole sectors inside. A backend that panics has failed that one request with `EIO`, no more.

use crate::backend::{Backend, Errno, Extent};
use crate::buffer::{Buffer, BufferPool};
use crate::protocol::MIN_BLOCK_BYTES;
use crate::ranges::RangeGate;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

const SECTOR: u64 = MIN_BLOCK_BYTES as u64;

pub(crate) struct Export {
    backend: Arc<dyn Backend>,
    pub(crate) buffers: Arc<BufferPool>,
    ranges: RangeGate,
}

fn round_down(offset: u64) -> u64 {
    offset - offset % SECTOR
}

/// Callers have checked that the range ends within the disk, whose size is a multiple of the sector.
fn round_up(offset: u64) -> u64 {
    round_down(offset + (SECTOR - 1))
}

/// The parts of a byte range: a first partial sector, whole sectors, a last partial sector. Any may be empty.
struct Parts {
    head: u64,
    middle: u64,
    tail: u64,
}

impl Parts {
    fn of(offset: u64, length: u64) -> Self {
        let end = offset + length;
        let middle_start = round_up(offset);
        let middle_end = round_down(end);
        if middle_start > middle_end {
            // Within one sector, touching neither of its ends.
            return Parts { head: length, middle: 0, tail: 0 };
        }
        Parts { head: middle_start - offset, middle: middle_end - middle_start, tail: end - middle_end }
    }
}

impl Export {
    pub(crate) fn new(backend: Arc<dyn Backend>, buffers: Arc<BufferPool>) -> Self {
        Export { backend, buffers, ranges: RangeGate::default() }
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        round_down(self.backend.size_bytes())
    }

    pub(crate) fn read_only(&self) -> bool {
        self.backend.read_only()
    }

    pub(crate) fn zeroes_are_fast(&self, offset: u64, length: u64, punch: bool) -> bool {
        self.backend.zeroes_are_fast(
            round_down(offset),
            round_up(offset + length) - round_down(offset),
            punch,
        )
    }

    fn call<T>(&self, operation: impl FnOnce(&dyn Backend) -> Result<T, Errno>) -> Result<T, Errno> {
        match catch_unwind(AssertUnwindSafe(|| operation(&*self.backend))) {
            Ok(result) => result,
            Err(_) => Err(Errno::new(5, "the backend panicked")),
        }
    }

    /// Reads any byte range into a buffer that shows exactly it.
    pub(crate) fn read(&self, offset: u64, length: usize) -> Result<Buffer, Errno> {
        let start = round_down(offset);
        let skip = (offset - start) as usize;
        let whole = (round_up(offset + length as u64) - start) as usize;
        let mut buffer = self.buffers.get(whole);
        self.call(|backend| backend.read_at(&mut buffer, start))?;
        buffer.narrow(skip..skip + length);
        Ok(buffer)
    }

    /// Writes any byte range.
    pub(crate) fn write(&self, data: &[u8], offset: u64) -> Result<(), Errno> {
        let length = data.len() as u64;
        self.change(offset, length, |backend, at, part, target| {
            let from = (at - offset) as usize;
            let source = &data[from..from + part as usize];
            match target {
                Some(target) => {
                    target.copy_from_slice(source);
                    Ok(())
                }
                None => backend.write_at(source, at),
            }
        })
    }

    /// Zeroes any byte range.
    pub(crate) fn write_zeroes(&self, offset: u64, length: u64, punch: bool) -> Result<(), Errno> {
        self.change(offset, length, |backend, at, part, target| match target {
            Some(target) => {
                target.fill(0);
                Ok(())
            }
            None => backend.write_zeroes(at, part, punch),
        })
    }

    /// Discards the whole sectors of a byte range.
    pub(crate) fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let parts = Parts::of(offset, length);
        if parts.middle == 0 {
            return Ok(());
        }
        let start = offset + parts.head;
        let _entered = self.ranges.shared(start..start + parts.middle);
        self.call(|backend| backend.discard(start, parts.middle))
    }

    pub(crate) fn flush(&self) -> Result<(), Errno> {
        self.call(|backend| backend.flush())
    }

    /// The extents of a range of whole sectors, checked: they cover the range exactly, in order.
    pub(crate) fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, Errno> {
        let extents = self.call(|backend| backend.extents(offset, length))?;
        let mut at = offset;
        for extent in &extents {
            let whole_sectors = extent.length > 0 && extent.length % SECTOR == 0;
            if extent.offset != at || !whole_sectors || extent.length > offset + length - at {
                return Err(Errno::new(
                    5,
                    format!(
                        "the backend's extents of {length} bytes at {offset} do not cover them: {extent:?} at {at}"
                    ),
                ));
            }
            at += extent.length;
        }
        if at != offset + length {
            return Err(Errno::new(
                5,
                format!("the backend's extents end at {at}, not at {}", offset + length),
            ));
        }
        Ok(extents)
    }

    /// Changes a byte range. `change` is called with (backend, offset, length, target) for each part: with a target it
    /// fills the bytes that a partial sector is patched with, without one it writes whole sectors to the backend.
    fn change(
        &self,
        offset: u64,
        length: u64,
        change: impl Fn(&dyn Backend, u64, u64, Option<&mut [u8]>) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let parts = Parts::of(offset, length);
        // Each part enters by itself: whoever writes to the middle of a long change that is not aligned need not wait for it.
        let patch = |at: u64, part: u64| {
            if part == 0 {
                return Ok(());
            }
            let _entered = self.ranges.exclusive(round_down(at)..round_up(at + part));
            let mut sector = [0u8; SECTOR as usize];
            let within = (at % SECTOR) as usize;
            self.call(|backend| {
                backend.read_at(&mut sector, round_down(at))?;
                change(backend, at, part, Some(&mut sector[within..within + part as usize]))?;
                backend.write_at(&sector, round_down(at))
            })
        };
        patch(offset, parts.head)?;
        let middle = offset + parts.head;
        if parts.middle > 0 {
            let _entered = self.ranges.shared(middle..middle + parts.middle);
            self.call(|backend| change(backend, middle, parts.middle, None))?;
        }
        patch(middle + parts.middle, parts.tail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryBackend;

    fn export(size: u64) -> Export {
        Export::new(Arc::new(MemoryBackend::new(size)), BufferPool::new(1 << 20))
    }

    /// Every offset and length around sector borders, against a plain array.
    #[test]
    fn byte_ranges_behave_like_an_array() {
        let export = export(4096);
        let mut model = vec![0u8; 4096];
        let mut stamp = 0u8;
        for offset in [0u64, 1, 255, 511, 512, 513, 1023, 1024, 1500] {
            for length in [1u64, 2, 256, 511, 512, 513, 1023, 1024, 1025, 2000] {
                stamp = stamp.wrapping_add(1);
                let data = vec![stamp; length as usize];
                let range = offset as usize..(offset + length) as usize;
                export.write(&data, offset).unwrap();
                model[range.clone()].copy_from_slice(&data);
                assert_eq!(&export.read(0, 4096).unwrap()[..], &model[..], "write {length} at {offset}");
                assert_eq!(&export.read(offset, length as usize).unwrap()[..], &model[range.clone()]);
                let zeroed = range.start + range.len() / 3..range.end - range.len() / 3;
                export.write_zeroes(zeroed.start as u64, zeroed.len() as u64, true).unwrap();
                model[zeroed].fill(0);
                assert_eq!(&export.read(0, 4096).unwrap()[..], &model[..], "zeroes {length} at {offset}");
            }
        }
    }

    #[test]
    fn a_discard_of_part_of_a_sector_touches_nothing() {
        let export = export(4096);
        export.write(&[7; 4096], 0).unwrap();
        export.discard(1, 1022).unwrap();
        assert!(export.read(0, 4096).unwrap().iter().all(|byte| *byte == 7));
    }

    struct Broken;

    impl Backend for Broken {
        fn size_bytes(&self) -> u64 {
            1 << 20
        }
        fn read_only(&self) -> bool {
            false
        }
        fn read_at(&self, _: &mut [u8], _: u64) -> Result<(), Errno> {
            panic!("as a test")
        }
        fn write_at(&self, _: &[u8], _: u64) -> Result<(), Errno> {
            panic!("as a test")
        }
        fn flush(&self) -> Result<(), Errno> {
            Err(Errno::EIO)
        }
        fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), Errno> {
            Err(Errno::EIO)
        }
        fn discard(&self, _: u64, _: u64) -> Result<(), Errno> {
            Err(Errno::EIO)
        }
        fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, Errno> {
            use crate::backend::ExtentKind::Data;
            Ok(vec![Extent { offset, length: length + 512, kind: Data }])
        }
    }

    #[test]
    fn a_backend_that_panics_or_lies_fails_the_request_and_releases_the_range() {
        let export = Export::new(Arc::new(Broken), BufferPool::new(0));
        assert_eq!(export.write(&[0; 512], 0).unwrap_err().code(), 5);
        assert_eq!(export.write(&[0; 5], 0).unwrap_err().code(), 5);
        assert_eq!(export.read(0, 512).err().unwrap().code(), 5);
        assert!(export.extents(0, 4096).unwrap_err().message().contains("do not cover"));
        drop(export.ranges.exclusive(0..1 << 20));
    }
}
