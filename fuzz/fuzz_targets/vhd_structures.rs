//! See `cowvhd_fuzz::vhd_structures`.

#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cowvhd_fuzz::write_seeds("vhd_structures", &cowvhd_fuzz::vhd_structures::seeds()),
    |data: &[u8]| cowvhd_fuzz::vhd_structures::run(data)
);
