//! The geometry a disk claims to have: cylinders, heads, sectors per track.
//!
//! Source: VHD specification, "Appendix: CHS Calculation". Nothing of ours depends on the result: a disk's size is the
//! footer's current size. Virtual PC and old releases of QEMU go by the geometry, so it must be the usual one.

use super::SECTOR;

/// A disk geometry. Its product is at most the disk's size, and often a little less.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Chs {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors per track.
    pub sectors_per_track: u8,
}

impl Chs {
    /// The largest geometry there is, about 127.5 GiB; every larger disk has it too.
    pub const MAX: Chs = Chs { cylinders: 65_535, heads: 16, sectors_per_track: 255 };

    /// The geometry of a disk of `bytes`, by the specification's algorithm.
    pub fn for_size(bytes: u64) -> Self {
        let sectors = (bytes / SECTOR).min(Chs::MAX.sectors());
        let (mut heads, mut sectors_per_track, mut tracks);
        if sectors >= 65_535 * 16 * 63 {
            (heads, sectors_per_track) = (16, 255);
            tracks = sectors / 255;
        } else {
            sectors_per_track = 17;
            tracks = sectors / 17;
            heads = tracks.div_ceil(1024).max(4);
            if tracks >= heads * 1024 || heads > 16 {
                (heads, sectors_per_track) = (16, 31);
                tracks = sectors / 31;
            }
            if tracks >= heads * 1024 {
                (heads, sectors_per_track) = (16, 63);
                tracks = sectors / 63;
            }
        }
        // Lossless: at most 65 535 cylinders by the bounds above, 16 heads, 255 sectors.
        Chs { cylinders: (tracks / heads) as u16, heads: heads as u8, sectors_per_track }
    }

    /// The sectors of this geometry: the product of its three numbers.
    pub const fn sectors(self) -> u64 {
        self.cylinders as u64 * self.heads as u64 * self.sectors_per_track as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn matches_the_geometry_other_tools_write() {
        for (bytes, cylinders, heads, sectors_per_track) in [
            (0, 0, 4, 17),
            (3 * MIB, 90, 4, 17),
            (4 * MIB, 120, 4, 17),
            (16 * MIB, 481, 4, 17),
            (64 * MIB, 963, 8, 17),
            (504 * MIB, 1024, 16, 63),
            (GIB, 2080, 16, 63),
            (8 * GIB, 16_644, 16, 63),
            (31 * GIB, 64_495, 16, 63),
            (32 * GIB, 16_448, 16, 255),
            (127 * GIB, 65_278, 16, 255),
            (128 * GIB, 65_535, 16, 255),
            (2040 * GIB, 65_535, 16, 255),
            (u64::MAX, 65_535, 16, 255),
        ] {
            assert_eq!(Chs::for_size(bytes), Chs { cylinders, heads, sectors_per_track }, "{bytes} bytes");
        }
    }

    /// The sizes at which the number of heads or the length of a track changes, and the ones before.
    #[test]
    fn changes_exactly_at_each_limit() {
        for (sectors, cylinders, heads, sectors_per_track) in [
            (4 * 1024 * 17 - 1, 1023, 4, 17),
            (4 * 1024 * 17, 140, 16, 31),
            (5 * 1024 * 17 - 1, 1023, 5, 17),
            (5 * 1024 * 17, 175, 16, 31),
            (16 * 1024 * 17 - 17, 1023, 16, 17),
            (16 * 1024 * 17, 561, 16, 31),
            (16 * 1024 * 31 - 1, 1023, 16, 31),
            (16 * 1024 * 31, 503, 16, 63),
        ] {
            let chs = Chs { cylinders, heads, sectors_per_track };
            assert_eq!(Chs::for_size(sectors * SECTOR), chs, "{sectors} sectors");
        }
    }

    #[test]
    fn changes_track_length_exactly_at_the_limit() {
        let limit = 65_535 * 16 * 63 * SECTOR;
        assert_eq!(Chs::for_size(limit - SECTOR).sectors_per_track, 63);
        assert_eq!(Chs::for_size(limit).sectors_per_track, 255);
    }

    proptest! {
        #[test]
        fn is_never_larger_than_the_disk(bytes in any::<u64>(), shift in 0u32..40) {
            let bytes = bytes >> shift;
            prop_assert!(Chs::for_size(bytes).sectors() <= bytes / SECTOR);
        }

        #[test]
        fn is_close_to_the_disk(sectors in 4 * 17..65_535u64 * 16 * 255) {
            let chs = Chs::for_size(sectors * SECTOR);
            prop_assert!(sectors - chs.sectors() < u64::from(chs.heads) * u64::from(chs.sectors_per_track) * 2);
        }
    }
}
