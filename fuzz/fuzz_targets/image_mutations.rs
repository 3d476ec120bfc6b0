//! See `cowvhd_fuzz::image_mutations`.

#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cowvhd_fuzz::write_seeds("image_mutations", &cowvhd_fuzz::image_mutations::seeds()),
    |data: &[u8]| cowvhd_fuzz::image_mutations::run(data)
);
