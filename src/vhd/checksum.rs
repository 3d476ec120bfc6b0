//! The checksum of the footer and the dynamic header.
//!
//! Source: VHD specification, "Hard Disk Footer Format: Checksum" and "Dynamic Disk Header Format: Checksum".

/// The one's complement of the sum of all bytes of a structure, its own four checksum bytes counted as zero.
///
/// `checksum_offset` is the byte offset of the checksum field. Reserved bytes count.
pub fn checksum(bytes: &[u8], checksum_offset: usize) -> u32 {
    let field = checksum_offset..checksum_offset.saturating_add(4);
    let sum = bytes
        .iter()
        .enumerate()
        .filter(|(offset, _)| !field.contains(offset))
        .fold(0u32, |sum, (_, &byte)| sum.wrapping_add(u32::from(byte)));
    !sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_nothing_is_all_ones() {
        assert_eq!(checksum(&[], 0), 0xFFFF_FFFF);
        assert_eq!(checksum(&[0; 512], 64), 0xFFFF_FFFF);
    }

    #[test]
    fn leaves_out_its_own_field_and_nothing_else() {
        let mut bytes = [0u8; 12];
        bytes[4..8].fill(0xAA);
        assert_eq!(checksum(&bytes, 4), !0);
        bytes[3] = 1;
        bytes[8] = 2;
        assert_eq!(checksum(&bytes, 4), !3);
    }

    #[test]
    fn survives_a_field_outside_the_bytes() {
        assert_eq!(checksum(&[1, 2, 3], usize::MAX), !6);
        assert_eq!(checksum(&[1, 2, 3], 2), !3);
    }
}
