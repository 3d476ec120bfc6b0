//! A disk in memory: the backend for tests, benchmarks and examples.

use crate::backend::{Backend, Errno, Extent, ExtentKind};
use parking_lot::RwLock;
use std::collections::HashMap;

const PAGE_BYTES: u64 = 64 << 10;
const SHARDS: u64 = 64;

/// One page; `Zero` is allocated but holds no memory.
enum Page {
    Data(Box<[u8]>),
    Zero,
}

type Shard = RwLock<HashMap<u64, Page>>;

/// A sparse disk in memory, allocated in pages of 64 KiB. Nothing of it is durable, so a flush has nothing to do.
pub struct MemoryBackend {
    size_bytes: u64,
    read_only: bool,
    shards: Vec<Shard>,
}

impl MemoryBackend {
    /// An empty disk of `size_bytes`, rounded down to whole sectors of 512 bytes.
    pub fn new(size_bytes: u64) -> Self {
        let shards = (0..SHARDS).map(|_| Shard::default()).collect();
        MemoryBackend { size_bytes: size_bytes / 512 * 512, read_only: false, shards }
    }

    /// The same disk, refusing writes.
    pub fn into_read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), Errno> {
        match offset.checked_add(length) {
            Some(end)
                if end <= self.size_bytes && offset.is_multiple_of(512) && length.is_multiple_of(512) =>
            {
                Ok(())
            }
            _ => Err(Errno::new(22, format!("access of {length} bytes at {offset} of {}", self.size_bytes))),
        }
    }

    fn shard(&self, page: u64) -> &Shard {
        &self.shards[(page % SHARDS) as usize]
    }

    /// Calls `each` with (page, offset in it, length) for the pages of a range.
    fn pages(offset: u64, length: u64, mut each: impl FnMut(u64, usize, usize)) {
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let within = at % PAGE_BYTES;
            let part = (PAGE_BYTES - within).min(end - at);
            each(at / PAGE_BYTES, within as usize, part as usize);
            at += part;
        }
    }

    fn clear(&self, offset: u64, length: u64, whole: impl Fn() -> Option<Page>) {
        Self::pages(offset, length, |page, within, part| {
            let mut shard = self.shard(page).write();
            if part as u64 == PAGE_BYTES {
                match whole() {
                    Some(content) => shard.insert(page, content),
                    None => shard.remove(&page),
                };
            } else if let Some(Page::Data(content)) = shard.get_mut(&page) {
                content[within..within + part].fill(0);
            } else if let Some(content) = whole() {
                shard.insert(page, content);
            }
        });
    }
}

impl Backend for MemoryBackend {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), Errno> {
        self.check(offset, buf.len() as u64)?;
        let mut rest = buf;
        Self::pages(offset, rest.len() as u64, |page, within, part| {
            let (target, after) = std::mem::take(&mut rest).split_at_mut(part);
            rest = after;
            match self.shard(page).read().get(&page) {
                Some(Page::Data(content)) => target.copy_from_slice(&content[within..within + part]),
                Some(Page::Zero) | None => target.fill(0),
            }
        });
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), Errno> {
        self.check(offset, buf.len() as u64)?;
        if self.read_only {
            return Err(Errno::EROFS);
        }
        let mut rest = buf;
        Self::pages(offset, rest.len() as u64, |page, within, part| {
            let (source, after) = rest.split_at(part);
            rest = after;
            let mut shard = self.shard(page).write();
            let content = shard.entry(page).or_insert(Page::Zero);
            if let Page::Zero = content {
                *content = Page::Data(vec![0; PAGE_BYTES as usize].into_boxed_slice());
            }
            if let Page::Data(content) = content {
                content[within..within + part].copy_from_slice(source);
            }
        });
        Ok(())
    }

    fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, punch: bool) -> Result<(), Errno> {
        self.check(offset, length)?;
        if self.read_only {
            return Err(Errno::EROFS);
        }
        self.clear(offset, length, || if punch { None } else { Some(Page::Zero) });
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.write_zeroes(offset, length, true)
    }

    fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, Errno> {
        self.check(offset, length)?;
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = offset;
        Self::pages(offset, length, |page, _, part| {
            let kind = match self.shard(page).read().get(&page) {
                Some(Page::Data(_)) => ExtentKind::Data,
                Some(Page::Zero) => ExtentKind::Zero,
                None => ExtentKind::Hole,
            };
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.length += part as u64,
                _ => extents.push(Extent { offset: at, length: part as u64, kind }),
            }
            at += part as u64;
        });
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_across_pages_read_back_and_zeroing_frees_whole_pages_only() {
        let disk = MemoryBackend::new(1 << 20);
        let data: Vec<u8> = (0..200_192u32).map(|at| (at % 251) as u8).collect();
        disk.write_at(&data, 512).unwrap();
        let mut back = vec![9; data.len() + 1024];
        disk.read_at(&mut back, 0).unwrap();
        assert_eq!(&back[512..512 + data.len()], &data[..]);
        assert!(back[..512].iter().all(|byte| *byte == 0));
        disk.write_zeroes(1024, 131_072, true).unwrap();
        let kinds: Vec<_> = disk.extents(0, 1 << 20).unwrap().iter().map(|e| (e.kind, e.length)).collect();
        assert_eq!(
            kinds,
            [
                (ExtentKind::Data, 65536),
                (ExtentKind::Hole, 65536),
                (ExtentKind::Data, 131_072),
                (ExtentKind::Hole, (1 << 20) - 262_144)
            ]
        );
        disk.read_at(&mut back, 0).unwrap();
        assert!(back[1024..1024 + 131_072].iter().all(|byte| *byte == 0));
        assert_eq!(back[1023], data[511]);
        assert_eq!(back[1024 + 131_072], data[512 + 131_072]);
    }

    #[test]
    fn zeroing_without_punching_allocates() {
        let disk = MemoryBackend::new(1 << 20);
        disk.write_zeroes(0, 65536 + 512, false).unwrap();
        let extents = disk.extents(0, 1 << 20).unwrap();
        assert_eq!((extents[0].kind, extents[0].length), (ExtentKind::Zero, 131_072));
    }
}
