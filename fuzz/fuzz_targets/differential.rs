//! See `cowvhd_fuzz::differential`.

#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cowvhd_fuzz::write_seeds("differential", &cowvhd_fuzz::differential::seeds()),
    |data: &[u8]| cowvhd_fuzz::differential::run(data)
);
