//! The unique id of a disk.
//!
//! Source: VHD specification, "Hard Disk Footer Format: Unique ID".

use std::fmt;

/// A disk's identity: 16 raw bytes, compared as bytes and nothing else.
///
/// A differencing disk names its parent by the parent's id. The printed form is the big-endian text of RFC 4122, as
/// libvhdi, DiscUtils and blktap print it; Microsoft's own code swaps the first three groups, so text from
/// different tools must not be compared.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct UniqueId(pub [u8; 16]);

impl UniqueId {
    /// The id from its bytes, in file order.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        UniqueId(bytes)
    }

    /// The bytes, in file order.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Whether all bytes are zero: no disk's own id, and as a parent's id "none" (to blktap: a raw parent).
    pub fn is_zero(&self) -> bool {
        self.0 == [0; 16]
    }
}

impl fmt::Display for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UniqueId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_as_big_endian_uuid() {
        let id = UniqueId::from_bytes(std::array::from_fn(|i| 0x10 + i as u8));
        assert_eq!(id.to_string(), "10111213-1415-1617-1819-1a1b1c1d1e1f");
        assert_eq!(format!("{id:?}"), "UniqueId(10111213-1415-1617-1819-1a1b1c1d1e1f)");
        assert!(!id.is_zero());
        assert!(UniqueId::default().is_zero());
    }
}
