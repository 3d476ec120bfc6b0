//! Tests on a file system of their own, which is small.

use std::path::PathBuf;
use std::process::Command;

/// Runs a test of this file again, with a small file system of its own, which ends with it.
pub fn on_a_small_file_system(test: &str, size: &str) {
    let dir = tempfile::tempdir().unwrap();
    let is_root = Command::new("id").arg("-u").output().expect("id is missing: apt-get install coreutils");
    let user: &[&str] = if is_root.stdout == b"0\n" { &[] } else { &["--user", "--map-root-user"] };
    let mount = format!("mount -t tmpfs -o size={size} tmpfs \"$0\" && exec \"$@\"");
    let output = Command::new("unshare")
        .args(user)
        .args(["--mount", "sh", "-c", &mount])
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env("COWVHD_SMALL_DIR", dir.path())
        .output()
        .expect("unshare is missing: apt-get install util-linux");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// The folder of that file system.
pub fn small_folder() -> PathBuf {
    std::env::var_os("COWVHD_SMALL_DIR").expect("run by another test").into()
}
