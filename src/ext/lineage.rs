//! What a superblock says of an image's place in a chain: its seal, a snapshot under way, the seal of its parent
//! (FORMAT.md, "Lineage").

use crate::vfs::FileTime;
use crate::vhd::UniqueId;
use std::fmt;

/// The random name of one sealed state; all zeros where there is none.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SealId(pub [u8; 16]);

impl SealId {
    /// Whether it names a seal.
    pub fn is_some(&self) -> bool {
        *self != SealId::default()
    }
}

impl fmt::Debug for SealId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for SealId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A name of at most `N` bytes, padded with zeros; empty where there is none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Name<const N: usize>(pub [u8; N]);

impl<const N: usize> Default for Name<N> {
    fn default() -> Self {
        Name([0; N])
    }
}

impl<const N: usize> Name<N> {
    /// The name with these bytes; `None` where they do not fit or hold a zero.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let mut name = Self::default();
        name.0.get_mut(..bytes.len())?.copy_from_slice(bytes);
        (!bytes.contains(&0)).then_some(name)
    }

    /// The bytes of the name.
    pub fn as_bytes(&self) -> &[u8] {
        let end = self.0.iter().position(|&byte| byte == 0).unwrap_or(N);
        self.0.get(..end).unwrap_or_default()
    }
}

impl<const N: usize> fmt::Debug for Name<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(self.as_bytes()))
    }
}

/// What a fixed disk was like when a child was made over it: it has no place for a seal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FixedParent {
    /// Length of its file in bytes.
    pub file_bytes: u64,
    /// When its content was last changed.
    pub modified: FileTime,
}

impl FixedParent {
    /// Whether a file with this time of its last change has the time that was noted. Some file systems keep whole seconds, or even ones.
    pub fn has_time(&self, found: FileTime) -> bool {
        let FileTime { seconds, .. } = self.modified;
        let coarser = [seconds, seconds & !1].map(|seconds| FileTime { seconds, nanoseconds: 0 });
        found == self.modified || coarser.contains(&found)
    }
}

/// An image's place in a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lineage {
    /// The seal of this image; while there is one the guest's content never changes.
    pub seal_id: SealId,
    /// The child that took over when this image was sealed; or, without a seal, that of a snapshot under way. Zero where the
    /// image was sealed in its place.
    pub child_id: UniqueId,
    /// The seal that the parent had, or was about to get, when this image was made over it.
    pub parent_seal: SealId,
    /// The parent that this and `fixed_parent` are about.
    pub parent_id: UniqueId,
    /// Digest of the manifest of the VM state that was saved with the seal; zeros where there is none.
    pub state_digest: [u8; 32],
    /// File name, in the same folder, of that manifest. Its presence commits the seal: until then it may be taken away again.
    pub manifest: Name<256>,
    /// The name of the snapshot, sealed or under way.
    pub snapshot: Name<64>,
    /// The name that the file had, and the child takes over.
    pub leaf_name: Name<256>,
    /// The image is being taken out of its chain: whoever opens it resumes that.
    pub deleting: bool,
    /// What the parent was like, where it is a fixed disk; zeros where there is none.
    pub fixed_parent: FixedParent,
}

impl Lineage {
    /// Whether the image is sealed.
    pub fn is_sealed(&self) -> bool {
        self.seal_id.is_some()
    }

    /// The snapshot that was under way is undone.
    pub fn forget_snapshot(&mut self) {
        (self.child_id, self.snapshot) = Default::default();
    }

    /// Whether a snapshot of the image was begun, of which it is not known whether it was undone.
    pub fn has_snapshot_under_way(&self) -> bool {
        !self.is_sealed() && (!self.child_id.is_zero() || self.snapshot != Name::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fill_their_field_at_most() {
        let name = Name::<6>::new(b"vm.vhd").unwrap();
        assert_eq!((name.as_bytes(), format!("{name:?}")), (&b"vm.vhd"[..], "\"vm.vhd\"".into()));
        assert_eq!(Name::<6>::new(b"vm").unwrap().0, *b"vm\0\0\0\0");
        assert_eq!(Name::<6>::new(b"vm").unwrap().as_bytes(), b"vm");
        assert_eq!(Name::<6>::new(b""), Some(Name::default()));
        assert_eq!(Name::<6>::new(b"vm2.vhd"), None);
        assert_eq!(Name::<6>::new(b"v\0m"), None);
    }

    #[test]
    fn a_file_system_may_keep_coarser_times() {
        let time = |seconds, nanoseconds| FileTime { seconds, nanoseconds };
        let noted = FixedParent { file_bytes: 1, modified: time(1001, 7) };
        for same in [time(1001, 7), time(1001, 0), time(1000, 0)] {
            assert!(noted.has_time(same), "{same:?}");
        }
        for other in [time(1001, 8), time(1002, 0), time(1000, 7), time(999, 0)] {
            assert!(!noted.has_time(other), "{other:?}");
        }
    }

    #[test]
    fn seals_are_printed_in_hexadecimal() {
        let seal = SealId(std::array::from_fn(|n| n as u8));
        let text = "000102030405060708090a0b0c0d0e0f";
        assert_eq!((seal.to_string(), format!("{seal:?}")), (text.into(), text.into()));
        assert!(seal.is_some() && !SealId::default().is_some());
    }

    #[test]
    fn a_snapshot_is_under_way_until_it_is_sealed_or_forgotten() {
        let (child_id, snapshot) = (UniqueId::from_bytes([1; 16]), Name::new(b"s1").unwrap());
        let none = Lineage::default();
        assert!(!none.has_snapshot_under_way() && !none.is_sealed());
        for begun in [
            Lineage { child_id, ..none },
            Lineage { snapshot, ..none },
            Lineage { child_id, snapshot, ..none },
        ] {
            assert!(begun.has_snapshot_under_way() && !begun.is_sealed());
            let sealed = Lineage { seal_id: SealId([1; 16]), ..begun };
            assert!(!sealed.has_snapshot_under_way() && sealed.is_sealed());
            let mut forgotten = begun;
            forgotten.forget_snapshot();
            assert_eq!(forgotten, none);
        }
    }
}
