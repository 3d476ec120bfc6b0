//! A disk whose flushes do nothing, for a test that must fail with it. Compiled only with the feature `test-faults`.

use cowvhd_export::{Backend, Errno, Extent};
use std::sync::Arc;

const VARIABLE: &str = "COWVHD_TEST_IGNORE_FLUSH";

/// Puts the fault in place if the environment asks for it.
pub(crate) fn wrap(disk: Arc<dyn Backend>) -> Arc<dyn Backend> {
    if std::env::var_os(VARIABLE).is_some_and(|value| value == "1") {
        crate::output::say(format_args!("{VARIABLE}=1: flushes do nothing, data WILL be lost"));
        Arc::new(IgnoreFlush(disk))
    } else {
        disk
    }
}

struct IgnoreFlush(Arc<dyn Backend>);

impl Backend for IgnoreFlush {
    /// The fault. FUA comes through here too.
    fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }

    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn read_only(&self) -> bool {
        self.0.read_only()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), Errno> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), Errno> {
        self.0.write_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, length: u64, punch: bool) -> Result<(), Errno> {
        self.0.write_zeroes(offset, length, punch)
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.0.discard(offset, length)
    }

    fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, Errno> {
        self.0.extents(offset, length)
    }

    fn zeroes_are_fast(&self, offset: u64, length: u64, punch: bool) -> bool {
        self.0.zeroes_are_fast(offset, length, punch)
    }
}
