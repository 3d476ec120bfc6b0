//! Makes a disk, writes to it, and reads it back after opening it again: `cargo run --example first_disk -- vm.vhd`

use cowvhd::{CreateOptions, OpenOptions};
use std::path::PathBuf;

fn main() -> cowvhd::Result<()> {
    let path = PathBuf::from(std::env::args_os().nth(1).unwrap_or_else(|| "first.vhd".into()));
    CreateOptions::new(64 << 30).create(&path)?;

    let disk = OpenOptions::new().open(&path)?;
    disk.write_at(&[7; 4096], 1 << 20)?;
    disk.flush()?; // From here on the data survives a crash.
    disk.close()?; // From here on other VHD tools can open the file.

    let disk = OpenOptions::new().open(&path)?;
    for notice in disk.notices() {
        eprintln!("{notice}"); // E.g. that it was recovered, had it not been closed.
    }
    let mut found = [0; 4096];
    disk.read_at(&mut found, 1 << 20)?;
    assert_eq!(found, [7; 4096]);
    disk.close()
}
