//! A set of ranges, kept merged.

use std::collections::BTreeMap;
use std::ops::Range;

/// Ranges of bytes; neighbours are merged.
#[derive(Debug, Default, Clone)]
pub(super) struct RangeSet {
    /// End by start.
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Adds a range.
    pub(super) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        if let Some((&before, &before_end)) = self.ranges.range(..=start).next_back()
            && before_end >= start
        {
            start = before;
            end = end.max(before_end);
        }
        while let Some((&next, &next_end)) = self.ranges.range(start..=end).next() {
            end = end.max(next_end);
            self.ranges.remove(&next);
        }
        self.ranges.insert(start, end);
    }

    /// The parts of `range` that are not in the set, in order.
    pub(super) fn missing(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut missing = Vec::new();
        let mut at = range.start;
        let first = self.ranges.range(..=at).next_back().map_or(at, |(&start, _)| start);
        for (&start, &end) in self.ranges.range(first..range.end) {
            if at < start {
                missing.push(at..start);
            }
            at = at.max(end);
        }
        if at < range.end {
            missing.push(at..range.end);
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_set_of_numbers_is_the_model(ranges in prop::collection::vec((0u64..60, 0u64..10), 0..20), from in 0u64..70, length in 0u64..30) {
            let mut set = RangeSet::default();
            let mut model = [false; 128];
            for (start, length) in ranges {
                set.insert(start..start + length);
                (start..start + length).for_each(|i| model[i as usize] = true);
            }
            let mut missing = [false; 128];
            for range in set.missing(from..from + length) {
                prop_assert!(!range.is_empty());
                range.for_each(|i| missing[i as usize] = true);
            }
            for i in from..from + length {
                prop_assert_eq!(missing[i as usize], !model[i as usize]);
            }
        }
    }
}
