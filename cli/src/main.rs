//! The `cowvhd` command.

fn main() {}
