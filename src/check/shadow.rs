//! A file whose changes stay in memory: a repair that runs over it shows what it would do.

use super::ranges::RangeSet;
use crate::sync::{Arc, Mutex};
use crate::vfs::{File, FileExt, FileIdentity, FileTime, LockMode};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

const PAGE: u64 = 4096;

/// What differs from the file beneath.
#[derive(Debug)]
struct Changes {
    length: u64,
    /// Changed pages by their number.
    pages: BTreeMap<u64, Box<[u8; PAGE as usize]>>,
    /// What reads as zeros unless a page says otherwise; whole pages.
    zeros: RangeSet,
    modified: FileTime,
}

/// A view of a file, which is never changed.
#[derive(Debug)]
pub(super) struct Shadow {
    inner: Arc<dyn File>,
    changes: Mutex<Changes>,
}

impl Shadow {
    pub(super) fn new(inner: Arc<dyn File>) -> io::Result<Self> {
        let (length, modified) = (inner.length()?, inner.modified()?);
        let changes = Changes { length, pages: BTreeMap::new(), zeros: RangeSet::default(), modified };
        Ok(Shadow { inner, changes: Mutex::new(changes) })
    }

    /// The page with that number as it reads now.
    fn page(&self, changes: &Changes, number: u64) -> io::Result<Box<[u8; PAGE as usize]>> {
        if let Some(page) = changes.pages.get(&number) {
            return Ok(page.clone());
        }
        let mut page = Box::new([0; PAGE as usize]);
        let start = number * PAGE;
        if !changes.zeros.missing(start..start + PAGE).is_empty() {
            self.inner.read_or_zero_at(page.as_mut_slice(), start)?;
        }
        Ok(page)
    }

    /// Makes a range zero.
    fn clear(&self, changes: &mut Changes, range: Range<u64>) -> io::Result<()> {
        let (first, last) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
        if first < last {
            let numbers: Vec<u64> = changes.pages.range(first / PAGE..last / PAGE).map(|(&n, _)| n).collect();
            numbers.iter().for_each(|number| {
                changes.pages.remove(number);
            });
            changes.zeros.insert(first..last);
        }
        let edges = if first < last {
            [range.start..first, last..range.end]
        } else {
            [range.clone(), range.end..range.end]
        };
        for edge in edges {
            let mut at = edge.start;
            while at < edge.end {
                let number = at / PAGE;
                let end = ((number + 1) * PAGE).min(edge.end);
                let mut page = self.page(changes, number)?;
                let within = (at - number * PAGE) as usize..(end - number * PAGE) as usize;
                page.get_mut(within).unwrap_or_default().fill(0);
                changes.pages.insert(number, page);
                at = end;
            }
        }
        Ok(())
    }
}

impl File for Shadow {
    fn length(&self) -> io::Result<u64> {
        Ok(self.changes.lock().length)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let changes = self.changes.lock();
        let end = changes.length.min(offset.saturating_add(buf.len() as u64));
        let Some(length) = end.checked_sub(offset).filter(|&length| length > 0) else { return Ok(0) };
        if changes.pages.range(offset / PAGE..end.div_ceil(PAGE)).next().is_none()
            && changes.zeros.missing(offset..end).first() == Some(&(offset..end))
        {
            let rest = buf.get_mut(..length as usize).unwrap_or_default();
            self.inner.read_or_zero_at(rest, offset)?;
            return Ok(length as usize);
        }
        // Page by page; the caller comes back for the rest.
        let number = offset / PAGE;
        let page = self.page(&changes, number)?;
        let from = (offset - number * PAGE) as usize;
        let length = (PAGE as usize - from).min(length as usize);
        let source = page.get(from..from + length).unwrap_or_default();
        buf.get_mut(..length).unwrap_or_default().copy_from_slice(source);
        Ok(length)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let mut changes = self.changes.lock();
        let number = offset / PAGE;
        let from = (offset - number * PAGE) as usize;
        let length = (PAGE as usize - from).min(buf.len());
        let mut page = match length as u64 == PAGE {
            // What it was need not be readable.
            true => Box::new([0; PAGE as usize]),
            false => self.page(&changes, number)?,
        };
        if let (Some(target), Some(source)) = (page.get_mut(from..from + length), buf.get(..length)) {
            target.copy_from_slice(source);
        }
        changes.pages.insert(number, page);
        changes.length = changes.length.max(offset + length as u64);
        Ok(length)
    }

    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        (self as &dyn File).write_all_at(buf, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn forget_cached(&self, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut changes = self.changes.lock();
        let now = changes.length;
        if length < now {
            self.clear(&mut changes, length..now.next_multiple_of(PAGE))?;
        }
        changes.length = length;
        Ok(())
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut changes = self.changes.lock();
        let end = offset.saturating_add(length).min(changes.length);
        if offset < end {
            // The last page is a whole one: nothing is behind the end.
            let end = if end == changes.length { end.next_multiple_of(PAGE) } else { end };
            self.clear(&mut changes, offset..end)?;
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let changes = self.changes.lock();
        let page = changes.pages.range(offset / PAGE..).next().map(|(&number, _)| number * PAGE);
        let page = page.map(|start| start.max(offset)..start + PAGE);
        let mut at = offset;
        let beneath = loop {
            let Some(data) = self.inner.next_data(at)? else { break None };
            match changes.zeros.missing(data.start.max(offset)..data.end).into_iter().next() {
                Some(range) => break Some(range),
                None => at = data.end,
            }
        };
        let first = match (page, beneath) {
            (Some(page), Some(beneath)) if page.start <= beneath.start => Some(page),
            (Some(page), Some(beneath)) => Some(beneath.start..beneath.end.min(page.start)),
            (page, beneath) => page.or(beneath),
        };
        Ok(first.filter(|range| range.start < changes.length).map(|r| r.start..r.end.min(changes.length)))
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.inner.allocated_bytes()
    }

    fn modified(&self) -> io::Result<FileTime> {
        Ok(self.changes.lock().modified)
    }

    fn set_modified(&self, time: FileTime) -> io::Result<()> {
        self.changes.lock().modified = time;
        Ok(())
    }

    fn lock(&self, _mode: LockMode) -> io::Result<()> {
        Ok(())
    }

    fn unlock(&self) -> io::Result<()> {
        Ok(())
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        self.inner.identity()
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::*;
    use crate::sim::SimVfs;
    use crate::vfs::{Access, Vfs};
    use proptest::prelude::*;
    use std::path::Path;

    #[derive(Debug, Clone)]
    enum Change {
        Write(u64, u8, usize),
        Punch(u64, u64),
        Length(u64),
    }

    /// Places at and around the edges of pages, and between them.
    fn place() -> impl Strategy<Value = u64> {
        prop_oneof![
            (0u64..9, 0u64..3).prop_map(|(page, by)| (page * PAGE + by).saturating_sub(1)),
            0u64..9 * PAGE
        ]
    }

    fn change() -> impl Strategy<Value = Change> {
        prop_oneof![
            3 => (place(), 1u8.., 1usize..10_000).prop_map(|(at, fill, length)| Change::Write(at, fill, length)),
            3 => (place(), place()).prop_map(|(at, length)| Change::Punch(at, length)),
            1 => place().prop_map(Change::Length),
        ]
    }

    proptest! {
        #[test]
        fn a_view_is_a_file_and_leaves_that_beneath_alone(
            length in place(),
            written in prop::collection::vec(any::<bool>(), 9),
            changes in prop::collection::vec(change(), 0..12),
            reads in prop::collection::vec((place(), 1usize..20_000), 4),
        ) {
            let vfs = SimVfs::new(1);
            let file = vfs.create_new(Path::new("/file")).unwrap();
            file.set_len(length).unwrap();
            let mut model = vec![0; length as usize];
            for (number, _) in (0..).zip(&written).filter(|&(_, &written)| written) {
                let (start, end) = (length.min(number * PAGE), length.min((number + 1) * PAGE));
                file.write_all_at(&vec![0xee; (end - start) as usize], start).unwrap();
                model[start as usize..end as usize].fill(0xee);
            }
            let before = model.clone();
            let shadow = Shadow::new(vfs.open(Path::new("/file"), Access::ReadOnly).unwrap()).unwrap();
            let view: &dyn File = &shadow;
            for change in changes {
                match change {
                    Change::Write(at, fill, length) => {
                        view.write_all_at(&vec![fill; length], at).unwrap();
                        let end = at as usize + length;
                        model.resize(model.len().max(end), 0);
                        model[at as usize..end].fill(fill);
                    }
                    Change::Punch(at, length) => {
                        view.punch_hole(at, length).unwrap();
                        let end = ((at + length) as usize).min(model.len());
                        if let Some(range) = model.get_mut(at as usize..end) {
                            range.fill(0);
                        }
                    }
                    Change::Length(length) => {
                        view.set_len(length).unwrap();
                        model.resize(length as usize, 0);
                    }
                }
                prop_assert_eq!(view.length().unwrap(), model.len() as u64);
            }
            for (at, length) in reads {
                let mut found = vec![0x11; length];
                view.read_or_zero_at(&mut found, at).unwrap();
                let expected = (at as usize..).take(length).map(|i| model.get(i).copied().unwrap_or(0));
                prop_assert!(expected.eq(found));
                match view.next_data(at).unwrap() {
                    None => prop_assert!(model.iter().skip(at as usize).all(|&byte| byte == 0)),
                    Some(data) => {
                        prop_assert!(at <= data.start && data.start < data.end && data.end <= model.len() as u64);
                        prop_assert!(model[at as usize..data.start as usize].iter().all(|&byte| byte == 0));
                    }
                }
            }
            prop_assert_eq!(vfs.content(Path::new("/file")).unwrap(), before);
        }
    }

    #[test]
    fn what_was_punched_is_a_hole_of_the_view() {
        let vfs = SimVfs::new(1);
        let file = vfs.create_new(Path::new("/file")).unwrap();
        file.write_all_at(&[1; 6 * PAGE as usize], 0).unwrap();
        let beneath = file.allocated_bytes().unwrap();
        assert!(beneath >= 6 * PAGE);
        let view = Shadow::new(file).unwrap();
        view.write_at(&[2; 100], 2 * PAGE).unwrap();
        view.punch_hole(PAGE - 10, 3 * PAGE + 20).unwrap();
        // Pages 1 to 3 are gone with what was written, the edges are kept.
        assert_eq!(view.next_data(0).unwrap(), Some(0..PAGE));
        assert_eq!(view.next_data(PAGE).unwrap(), Some(4 * PAGE..5 * PAGE));
        assert_eq!(view.next_data(5 * PAGE + 7).unwrap(), Some(5 * PAGE + 7..6 * PAGE));
        view.set_len(5 * PAGE + 7).unwrap();
        assert_eq!(view.next_data(5 * PAGE + 7).unwrap(), None);
        assert_eq!(view.allocated_bytes().unwrap(), beneath);
        let time = FileTime { seconds: 7, nanoseconds: 8 };
        assert_ne!(view.modified().unwrap(), time);
        view.set_modified(time).unwrap();
        assert_eq!(view.modified().unwrap(), time);
    }
}
