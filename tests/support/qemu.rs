//! QEMU's tools for images.

#![allow(dead_code, reason = "each test that includes this file uses a part of it")]

use std::path::Path;
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

/// Runs commands of `qemu-io` on an image.
pub fn qemu_io(path: &Path, commands: &[String]) {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "vpc"]);
    for text in commands {
        command.args(["-c", text]);
    }
    let output = command
        .arg(path)
        .output()
        .unwrap_or_else(|error| panic!("qemu-io: {error}; scripts/install-test-tools installs it"));
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let failed = !output.status.success() || text.contains("failed") || text.contains("rror");
    assert!(!failed, "qemu-io: {text}");
}
