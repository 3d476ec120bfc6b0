//! Texts that are compared with a file of this folder, line by line, and written again with `COWVHD_TEST_WRITE=1`.

use std::fs;
use std::path::Path;

/// Compares what was said with `tests/support/<name>`, which holds `expected`.
pub fn compare(name: &str, said: &str, expected: &str) {
    if std::env::var_os("COWVHD_TEST_WRITE").is_some() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support").join(name);
        fs::write(path, said).unwrap();
    }
    for (number, (found, expected)) in (1..).zip(said.lines().zip(expected.lines())) {
        let hint = "COWVHD_TEST_WRITE=1 writes it again, and the difference is to be read";
        assert_eq!(found, expected, "line {number} of tests/support/{name}; {hint}");
    }
    assert_eq!(said.len(), expected.len(), "bytes of tests/support/{name}");
}

/// Without the ids that are drawn, checksums over them, and times.
pub fn nameless(what: &str) -> String {
    let drawn = |word: &str| {
        let (dashes, digits) = (word.matches('-').count(), word.trim_end_matches(','));
        let is_time = dashes == 2 && word.matches(':').count() == 2;
        dashes == 4 && word.len() > 30 || digits.starts_with("0x") && digits.len() == 10 || is_time
    };
    what.split(' ').map(|word| if drawn(word) { "…" } else { word }).collect::<Vec<_>>().join(" ")
}
