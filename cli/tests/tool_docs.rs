//! What the documents say about the tool and the library is true.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers are test code too")]

mod tool_support;

use std::fs;
use std::path::Path;
use tool_support::Bench;

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What README shows is compiled as an example.
#[test]
fn the_readmes_example_is_the_example() {
    let example = document("examples/first_disk.rs");
    let (_, code) = example.split_once("\n\n").unwrap();
    assert!(document("README.md").contains(&format!("```rust\n{code}```\n")));
}

/// The first command of README makes and serves a disk, and says what README says that it does.
#[test]
fn the_readmes_first_command_works() {
    let readme = document("README.md");
    let command = readme.lines().find_map(|line| line.strip_prefix("cargo run --release -- serve ")).unwrap();
    let bench = Bench::new();
    let serving = bench.serve(&command.split(' ').collect::<Vec<_>>());
    assert!(readme.contains(&format!("```text\n{}```\n", serving.ready)), "{}", serving.ready);
    assert!(readme.contains(&format!("file={},", serving.uri())));
    serving.terminate();
}

#[test]
fn every_key_of_the_json_is_documented() {
    let bench = Bench::new();
    bench.cowvhd(&["create", "vm.vhd", "1G"]).must_be(0);
    let documented = document("docs/tool.md");
    for key in bench.info("vm.vhd").as_object().unwrap().keys() {
        assert!(documented.contains(&format!("\n| `{key}` |")), "{key}");
    }
}

#[test]
fn every_option_of_serve_is_documented() {
    let bench = Bench::new();
    let help = bench.cowvhd(&["serve", "--help"]);
    let documented = document("docs/tool.md");
    for option in
        help.must_be(0).split_whitespace().filter(|word| word.starts_with("--") && *word != "--help")
    {
        assert!(documented.contains(option), "{option}");
    }
}
