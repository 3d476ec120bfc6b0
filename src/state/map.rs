//! A private map of a blob: a VM resumes from it at once, and pages come in when they are touched.
//!
//! All maps of one file share its pages in the page cache until one of them writes to a page: many VMs run from one state.
//!
//! # Why the `unsafe` here is sound
//!
//! `MmapOptions::map_copy` is unsafe because the slices that its result gives out would be changed behind the compiler's back
//! when another program writes to the file. This file never makes one: the result is turned into [`MmapRaw`] at once, which
//! gives out nothing but a pointer, and whoever uses that pointer (a hypervisor, for the memory of its guest) takes on what any
//! memory shared with others asks for. The descriptor is open during the call, since it is borrowed; the map outlives it, as
//! the kernel says. Nobody but the owner of the map sees what is written to it.
//!
//! A file that is cut while it is mapped ends with SIGBUS whoever touches what is gone. The files of a state are not changed
//! by this library once they are committed.
#![allow(unsafe_code)]

use memmap2::{MmapOptions, MmapRaw};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// A private, writable map of a whole blob. What is written to it is seen through it alone, and never reaches the file.
#[derive(Debug)]
pub struct PrivateMap {
    map: MmapRaw,
}

impl PrivateMap {
    /// Maps the first `length` bytes of a file, which must have as many; `length` is not 0.
    pub(super) fn new(file: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        let mut options = MmapOptions::new();
        options.len(length);
        // A VM's memory is larger than what is free: only pages that are written to shall count.
        options.no_reserve_swap();
        // SAFETY: see above; no reference into the map is ever made.
        let map = unsafe { options.map_copy(file.as_raw_fd()) }?;
        Ok(PrivateMap { map: map.into() })
    }

    /// Where the map starts in memory. Valid for reads and writes of [`PrivateMap::length`] bytes as long as the map lives.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Length in bytes. Up to the end of its last page the map holds zeros.
    pub fn length(&self) -> usize {
        self.map.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    #[test]
    fn writes_stay_in_the_map() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 5000], 0).unwrap();
        let [one, other] = [(); 2].map(|()| PrivateMap::new(file.as_fd(), 5000).unwrap());
        assert_eq!(one.length(), 5000);
        // SAFETY: the offsets lie within both maps.
        let [written, seen, last] = unsafe {
            one.as_mut_ptr().add(4999).write_volatile(9);
            [
                one.as_mut_ptr().add(4999).read_volatile(),
                other.as_mut_ptr().add(4999).read_volatile(),
                one.as_mut_ptr().add(5000).read_volatile(),
            ]
        };
        assert_eq!([written, seen, last], [9, 7, 0]);
        let mut byte = [0];
        file.read_exact_at(&mut byte, 4999).unwrap();
        assert_eq!(byte, [7]);
    }
}
