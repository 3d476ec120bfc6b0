//! Sharing parts of files (`FICLONERANGE`), on file systems that can: btrfs, XFS, bcachefs and others.
//!
//! `copy_file_range` shares as well, but where a file system cannot it copies, and does not say which of both it did. Whoever
//! shares wants to know: what has to be copied is looked through for zeros first.
//!
//! # Why the `unsafe` here is sound
//!
//! An ioctl is unsafe because its number decides what the kernel does with the pointer that goes with it. This one reads a
//! [`Range`], whose layout is that of the kernel's `struct file_clone_range` (asserted below), and neither writes to it nor keeps
//! it. The descriptors are open during the call, since they are borrowed.
#![allow(unsafe_code)]

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// `struct file_clone_range` of `linux/fs.h`.
#[repr(C)]
struct Range {
    source: i64,
    source_offset: u64,
    /// 0 is all to the end of the source.
    length: u64,
    offset: u64,
}

const _: () = assert!(size_of::<Range>() == 32 && align_of::<Range>() == 8);

/// `FICLONERANGE`.
const CLONE_RANGE: Opcode = opcode::write::<Range>(0x94, 13);

/// Makes `length` bytes (not 0) of `target` at `offset` share the space of those of `source` at `source_offset`. `Unsupported`
/// where the file system cannot share these two ranges; then nothing was changed.
pub(super) fn share(
    target: impl AsFd,
    offset: u64,
    source: BorrowedFd<'_>,
    source_offset: u64,
    length: u64,
) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    match clone(target, offset, source, source_offset, length) {
        Ok(()) => Ok(()),
        // It has no such call, or not for these files or ranges; or a sandbox forbids it.
        Err(
            Errno::OPNOTSUPP
            | Errno::NOTTY
            | Errno::NOSYS
            | Errno::XDEV
            | Errno::INVAL
            | Errno::PERM
            | Errno::ACCESS
            | Errno::TXTBSY,
        ) => Err(io::ErrorKind::Unsupported.into()),
        Err(error) => Err(error.into()),
    }
}

/// Whether the file system can share parts of these files.
pub(super) fn is_possible(target: impl AsFd, source: BorrowedFd<'_>) -> bool {
    /// No file is so long: whoever can share says that the call makes no sense, and everybody else that it cannot be made.
    const NOWHERE: u64 = 1 << 62;
    clone(target, 0, source, NOWHERE, 4096) == Err(Errno::INVAL)
}

fn clone(
    target: impl AsFd,
    offset: u64,
    source: BorrowedFd<'_>,
    source_offset: u64,
    length: u64,
) -> Result<(), Errno> {
    let range = Range { source: source.as_raw_fd().into(), source_offset, length, offset };
    // SAFETY: see above.
    unsafe { ioctl(target, Setter::<CLONE_RANGE, Range>::new(range)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_the_one_of_the_kernel() {
        // _IOW(0x94, 13, struct file_clone_range), where `_IOW` puts its bits as most architectures do.
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))]
        assert_eq!(CLONE_RANGE, 0x4020_940d);
    }
}
