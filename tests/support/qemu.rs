//! QEMU's tool for images.

use std::process::Command;

/// Runs `qemu-img`, which must succeed, and returns what it prints.
pub fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("qemu-img: {error}; scripts/install-test-tools installs it"));
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}
