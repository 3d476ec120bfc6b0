//! The time stamps of footer and dynamic header.
//!
//! Source: VHD specification, "Hard Disk Footer Format: Time Stamp".

use std::fmt;

/// 2000-01-01 00:00:00 UTC, in seconds since 1970-01-01 00:00:00 UTC.
const EPOCH_UNIX_SECONDS: i64 = 946_684_800;

const SECONDS_PER_DAY: u32 = 86_400;

/// A point in time: seconds since 2000-01-01 00:00:00 UTC. The last one is 2136-02-07 06:28:15 UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(pub u32);

impl Timestamp {
    /// The time stamp for `seconds` since 1970-01-01 00:00:00 UTC, or the nearest that exists.
    pub fn from_unix_seconds(seconds: i64) -> Self {
        let since_epoch = seconds.saturating_sub(EPOCH_UNIX_SECONDS);
        Timestamp(u32::try_from(since_epoch.max(0)).unwrap_or(u32::MAX))
    }

    /// Seconds since 1970-01-01 00:00:00 UTC.
    pub fn to_unix_seconds(self) -> i64 {
        i64::from(self.0) + EPOCH_UNIX_SECONDS
    }
}

impl fmt::Display for Timestamp {
    /// ISO 8601 in UTC: `2022-03-07T20:26:40Z`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = civil_date(self.0 / SECONDS_PER_DAY);
        let second_of_day = self.0 % SECONDS_PER_DAY;
        let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

/// Year, month and day (both from 1) of a day counted from 2000-01-01.
///
/// Years are taken from 1 March on, so that the leap day comes last and months have a fixed rhythm: 153 days in
/// five. 1600-03-01 starts a cycle of 400 years and lies before every day asked for.
fn civil_date(days: u32) -> (u32, u32, u32) {
    const DAYS_BEFORE_2000: u32 = 146_097 - 60;
    const DAYS_IN_4_YEARS: u32 = 1_461;
    const DAYS_IN_100_YEARS: u32 = 36_524;
    const DAYS_IN_400_YEARS: u32 = 146_097;

    let day = days + DAYS_BEFORE_2000;
    let (cycle, day) = (day / DAYS_IN_400_YEARS, day % DAYS_IN_400_YEARS);
    let century = (day / DAYS_IN_100_YEARS).min(3);
    let day = day - century * DAYS_IN_100_YEARS;
    let (four_years, day) = (day / DAYS_IN_4_YEARS, day % DAYS_IN_4_YEARS);
    let year_of_four = (day / 365).min(3);
    let day = day - year_of_four * 365;

    let month_from_march = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month_from_march + 2) / 5 + 1;
    let year_from_march = 1600 + cycle * 400 + century * 100 + four_years * 4 + year_of_four;
    match month_from_march {
        0..=9 => (year_from_march, month_from_march + 3, day_of_month),
        _ => (year_from_march + 1, month_from_march - 9, day_of_month),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_known_moments() {
        for (seconds, text) in [
            (0, "2000-01-01T00:00:00Z"),
            (59 * 86_400, "2000-02-29T00:00:00Z"),
            (60 * 86_400, "2000-03-01T00:00:00Z"),
            (366 * 86_400 - 1, "2000-12-31T23:59:59Z"),
            (366 * 86_400, "2001-01-01T00:00:00Z"),
            (700_000_000, "2022-03-07T20:26:40Z"),
            (u32::MAX, "2136-02-07T06:28:15Z"),
        ] {
            assert_eq!(Timestamp(seconds).to_string(), text);
        }
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let length = |year: u32, month| match month {
            2 if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => 29,
            2 => 28,
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        let mut expected = (2000, 1, 1);
        for day in 0..=u32::MAX / SECONDS_PER_DAY {
            assert_eq!(civil_date(day), expected);
            let (year, month, of_month) = expected;
            expected = if of_month < length(year, month) {
                (year, month, of_month + 1)
            } else if month < 12 {
                (year, month + 1, 1)
            } else {
                (year + 1, 1, 1)
            };
        }
    }

    #[test]
    fn converts_to_and_from_unix_time() {
        assert_eq!(Timestamp(700_000_000).to_unix_seconds(), 1_646_684_800);
        assert_eq!(Timestamp::from_unix_seconds(1_646_684_800), Timestamp(700_000_000));
    }

    #[test]
    fn saturates_outside_its_range() {
        assert_eq!(Timestamp::from_unix_seconds(0), Timestamp(0));
        assert_eq!(Timestamp::from_unix_seconds(i64::MIN), Timestamp(0));
        assert_eq!(Timestamp::from_unix_seconds(i64::MAX), Timestamp(u32::MAX));
    }
}
