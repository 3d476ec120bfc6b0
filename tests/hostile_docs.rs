//! docs/hostile-input.md names tests that are there.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

#[test]
fn every_test_that_the_table_names_exists() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let document = include_str!("../docs/hostile-input.md");
    let mut named = 0;
    for name in document.split('`').skip(1).step_by(2).filter(|name| name.contains("::")) {
        let (file, function) = name.split_once("::").unwrap();
        let source = fs::read_to_string(tests.join(file).with_extension("rs"))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let source = source.replace("\n    ", "\n");
        assert!(source.contains(&format!("#[test]\nfn {function}(")), "there is no {name}");
        named += 1;
    }
    assert!(named > 60, "only {named} tests are named");
    let cases = document.lines().filter(|line| line.starts_with("| ") && !line.starts_with("|---"));
    for row in cases {
        assert!(row.contains('`') || row.contains("the same") || row.ends_with("| test |"), "no test: {row}");
    }
}
