//! The kinds of VHD file.
//!
//! Source: VHD specification, "Hard Disk Footer Format: Disk Type".

use std::fmt;

/// What a VHD file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskType {
    /// All data in order, then the footer.
    Fixed,
    /// Blocks that are allocated as they are written.
    Dynamic,
    /// Blocks that hold what differs from a parent.
    Differencing,
}

impl DiskType {
    /// The type for its number in the footer; `None` for the unused, reserved and long abandoned ones.
    pub const fn from_u32(number: u32) -> Option<Self> {
        match number {
            2 => Some(DiskType::Fixed),
            3 => Some(DiskType::Dynamic),
            4 => Some(DiskType::Differencing),
            _ => None,
        }
    }

    /// The number in the footer.
    pub const fn as_u32(self) -> u32 {
        match self {
            DiskType::Fixed => 2,
            DiskType::Dynamic => 3,
            DiskType::Differencing => 4,
        }
    }
}

impl fmt::Display for DiskType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DiskType::Fixed => "fixed",
            DiskType::Dynamic => "dynamic",
            DiskType::Differencing => "differencing",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_have_names() {
        let names = [2, 3, 4].map(|number| DiskType::from_u32(number).unwrap().to_string());
        assert_eq!(names, ["fixed", "dynamic", "differencing"]);
    }

    #[test]
    fn numbers_go_both_ways_and_others_are_none() {
        for number in 0..10 {
            match DiskType::from_u32(number) {
                Some(disk_type) => assert_eq!(disk_type.as_u32(), number),
                None => assert!(matches!(number, 0 | 1 | 5..)),
            }
        }
    }
}
