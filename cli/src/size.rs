//! Sizes as people write and read them.

use std::fmt;

const SUFFIXES: [(char, u32); 6] = [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50), ('E', 60)];

/// Reads a number of bytes: `10737418240`, or with a binary suffix `512M`, `64G`, `1T`, also as `64GiB`.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    if number.is_empty() {
        return Err("expected bytes or a size such as 512M, 64G, 1T".into());
    }
    let shift = shift(suffix)?;
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| "larger than any file can be".into())
}

fn shift(suffix: &str) -> Result<u32, String> {
    let mut rest = suffix.chars();
    let Some(first) = rest.next() else { return Ok(0) };
    let known = SUFFIXES.iter().find(|(letter, _)| first.eq_ignore_ascii_case(letter));
    match (known, rest.as_str()) {
        (Some((_, shift)), "" | "iB") => Ok(*shift),
        (Some((letter, _)), "B" | "b") => {
            Err(format!("it is unclear whether {suffix} counts in 1000 or 1024: {letter} counts in 1024"))
        }
        _ if first == '.' => Err("no fractions: 1.5G is 1536M".into()),
        _ => Err(format!("\"{suffix}\" is no suffix; known are K, M, G, T, P and E, which count in 1024")),
    }
}

/// A number of bytes for people, in the largest unit that keeps it at least 1: `64 GiB`, `2.07 MiB`, `512 B`.
pub(crate) struct Human(pub(crate) u64);

impl fmt::Display for Human {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Human(bytes) = *self;
        let Some((letter, shift)) = SUFFIXES.iter().rev().find(|(_, shift)| bytes >> shift != 0) else {
            return write!(f, "{bytes} B");
        };
        let whole = bytes >> shift;
        // Rounded down: 63.99 GiB must not read as 64.
        let hundredths = (u128::from(bytes & ((1 << shift) - 1)) * 100) >> shift;
        match hundredths {
            0 => write!(f, "{whole} {letter}iB"),
            tens if tens % 10 == 0 => write!(f, "{whole}.{} {letter}iB", tens / 10),
            _ => write!(f, "{whole}.{hundredths:02} {letter}iB"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bytes_or_binary_multiples() {
        let good = [
            ("0", 0),
            ("512", 512),
            ("10737418240", 10 << 30),
            ("4K", 4096),
            ("512M", 512 << 20),
            ("64G", 64 << 30),
            ("64g", 64 << 30),
            ("64GiB", 64 << 30),
            ("1T", 1 << 40),
            ("2P", 2 << 50),
            ("15E", 15 << 60),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, bytes) in good {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_a_reason() {
        let bad = [
            ("", "expected"),
            ("G", "expected"),
            ("-1G", "expected"),
            (" 1G", "expected"),
            ("1.5G", "1536M"),
            ("64GB", "1024"),
            ("64Q", "\"Q\" is no suffix"),
            ("64 G", "no suffix"),
            ("64Gi", "no suffix"),
            ("64G\u{e9}", "no suffix"),
            ("0x10", "no suffix"),
            ("16E", "larger"),
            ("18446744073709551616", "larger"),
        ];
        for (text, reason) in bad {
            let error = parse(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_print_in_the_largest_fitting_unit_and_never_too_large() {
        let cases = [
            (0, "0 B"),
            (511, "511 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            ((64 << 30) - 512, "63.99 GiB"),
            (64 << 30, "64 GiB"),
            ((64 << 30) + 512, "64 GiB"),
            ((2 << 20) + (52 << 10), "2.05 MiB"),
            (2040 << 30, "1.99 TiB"),
            (u64::MAX, "15.99 EiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(Human(bytes).to_string(), text);
        }
    }
}
