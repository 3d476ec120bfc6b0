//! Which parts of a buffer are worth writing.

use std::ops::Range;

/// What a file system gives space in, mostly; zeros are looked for in whole units.
const UNIT: usize = 4096;
/// A unit of zeros.
const ZEROS: [u8; UNIT] = [0; UNIT];

/// The runs of units that are not zero throughout, as ranges of `buf`; `offset` is the place of `buf` on the disk, whose
/// multiples of 4096 the units begin at.
pub(crate) fn runs_of_data(buf: &[u8], offset: u64) -> impl Iterator<Item = Range<usize>> + '_ {
    let first = UNIT - (offset % UNIT as u64) as usize;
    let unit_end = move |at: usize| match at < first {
        true => first,
        false => first + ((at - first) / UNIT + 1) * UNIT,
    };
    let is_zero = move |range: Range<usize>| {
        buf.get(range).is_none_or(|unit| ZEROS.get(..unit.len()).is_some_and(|zeros| zeros == unit))
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        let end = |at| unit_end(at).min(buf.len());
        while at < buf.len() && is_zero(at..end(at)) {
            at = end(at);
        }
        let start = at;
        while at < buf.len() && !is_zero(at..end(at)) {
            at = end(at);
        }
        (start < at).then_some(start..at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn units_begin_at_multiples_of_the_disk() {
        let mut buf = vec![0; 20_000];
        buf[0] = 1;
        buf[9000] = 1;
        assert_eq!(runs_of_data(&buf, 0).collect::<Vec<_>>(), [0..4096, 8192..12_288]);
        assert_eq!(runs_of_data(&buf, 4096 + 512).collect::<Vec<_>>(), [0..3584, 7680..11_776]);
        buf[19_999] = 1;
        assert_eq!(runs_of_data(&buf, 8192).last(), Some(16_384..20_000));
        assert_eq!(runs_of_data(&[], 77).count(), 0);
        assert_eq!(runs_of_data(&[0; 9000], 77).count(), 0);
        let mut all = runs_of_data(&[1; 9000], 77);
        assert_eq!((all.next(), all.next()), (Some(0..9000), None));
    }

    proptest! {
        #[test]
        fn all_that_is_not_zero_is_in_a_run(
            length in 0usize..40_000,
            marks in prop::collection::vec(0usize..40_000, 0..8),
            offset: u32,
        ) {
            let mut buf = vec![0; length];
            marks.iter().filter(|&&mark| mark < length).for_each(|&mark| buf[mark] = 1);
            let runs: Vec<_> = runs_of_data(&buf, offset.into()).collect();
            for run in runs {
                buf[run].fill(0);
            }
            prop_assert!(buf.iter().all(|&byte| byte == 0));
        }
    }
}
