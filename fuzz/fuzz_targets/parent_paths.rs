//! See `cowvhd_fuzz::parent_paths`.

#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cowvhd_fuzz::write_seeds("parent_paths", &cowvhd_fuzz::parent_paths::seeds()),
    |data: &[u8]| cowvhd_fuzz::parent_paths::run(data)
);
