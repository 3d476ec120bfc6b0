//! A cowvhd disk as a [`Backend`].

use crate::backend::{Backend, Errno, Extent, ExtentKind};
use cowvhd::{Disk, Error, ZeroMode};

impl Backend for Disk {
    fn size_bytes(&self) -> u64 {
        self.size()
    }

    fn read_only(&self) -> bool {
        self.is_read_only()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), Errno> {
        Ok(Disk::read_at(self, buf, offset)?)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), Errno> {
        Ok(Disk::write_at(self, buf, offset)?)
    }

    fn flush(&self) -> Result<(), Errno> {
        Ok(Disk::flush(self)?)
    }

    fn write_zeroes(&self, offset: u64, length: u64, punch: bool) -> Result<(), Errno> {
        let mode = if punch { ZeroMode::MayPunch } else { ZeroMode::KeepAllocated };
        Ok(Disk::write_zeroes(self, offset, length, mode)?)
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        Ok(Disk::discard(self, offset, length)?)
    }

    fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, Errno> {
        Ok(Disk::extents(self, offset, length)?.into_iter().map(Extent::from).collect())
    }
}

impl From<Error> for Errno {
    fn from(error: Error) -> Self {
        Errno::new(error.errno(), error.to_string())
    }
}

impl From<cowvhd::Extent> for Extent {
    fn from(extent: cowvhd::Extent) -> Self {
        let cowvhd::Extent { offset, length, kind } = extent;
        let kind = match kind {
            cowvhd::ExtentKind::Data => ExtentKind::Data,
            cowvhd::ExtentKind::Zero => ExtentKind::Zero,
            cowvhd::ExtentKind::Hole => ExtentKind::Hole,
        };
        Extent { offset, length, kind }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cowvhd::{CreateOptions, OpenOptions};

    #[test]
    fn a_disk_behaves_as_a_backend() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.vhd");
        CreateOptions::new(8 << 20).create(&path).unwrap();
        let disk = OpenOptions::new().open(&path).unwrap();
        let backend: &dyn Backend = &disk;
        assert_eq!((backend.size_bytes(), backend.read_only()), (8 << 20, false));

        backend.write_at(&[7; 4096], 2 << 20).unwrap();
        backend.write_at(&[8; 4096], 4 << 20).unwrap();
        backend.discard(4 << 20, 2 << 20).unwrap();
        backend.write_zeroes(6 << 20, 2 << 20, false).unwrap();
        backend.flush().unwrap();
        let mut found = [0; 4096];
        backend.read_at(&mut found, 2 << 20).unwrap();
        assert_eq!(found, [7; 4096]);
        let extents = backend.extents(0, 8 << 20).unwrap();
        let kind_at =
            |at: u64| extents.iter().find(|e| e.offset <= at && at < e.offset + e.length).unwrap().kind;
        assert_eq!(
            [0, 2 << 20, 4 << 20].map(kind_at),
            [ExtentKind::Hole, ExtentKind::Data, ExtentKind::Hole]
        );
        assert_ne!(kind_at(6 << 20), ExtentKind::Hole);

        disk.close().unwrap();
        let disk = OpenOptions::new().read_only(true).open(&path).unwrap();
        let backend: &dyn Backend = &disk;
        assert!(backend.read_only());
        assert_eq!(backend.write_at(&[0; 512], 0).unwrap_err().code(), Errno::EROFS.code());
    }
}
