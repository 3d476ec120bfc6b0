//! See `cowvhd_fuzz::image_bytes`.

#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cowvhd_fuzz::write_seeds("image_bytes", &cowvhd_fuzz::image_bytes::seeds()),
    |data: &[u8]| cowvhd_fuzz::image_bytes::run(data)
);
