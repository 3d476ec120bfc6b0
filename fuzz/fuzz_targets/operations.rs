//! See `cowvhd_fuzz::operations`.

#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cowvhd_fuzz::write_seeds("operations", &cowvhd_fuzz::operations::seeds()),
    |data: &[u8]| cowvhd_fuzz::operations::run(data)
);
