//! The line by which a test sums itself up.

use std::io::Write;

/// Prints a line that sums a test up, and adds it to the file `COWVHD_SUMMARY`, if that is set: so `scripts/test` shows it.
pub fn add(line: &str) {
    println!("{line}");
    if let Some(path) = std::env::var_os("COWVHD_SUMMARY") {
        let mut file = std::fs::File::options().append(true).create(true).open(path).unwrap();
        writeln!(file, "{line}").unwrap();
    }
}
