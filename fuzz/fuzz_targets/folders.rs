//! See `cowvhd_fuzz::folders`.

#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cowvhd_fuzz::write_seeds("folders", &cowvhd_fuzz::folders::seeds()),
    |data: &[u8]| cowvhd_fuzz::folders::run(data)
);
