//! See `cowvhd_fuzz::nbd_bytes`.

#![no_main]

libfuzzer_sys::fuzz_target!(
    init: cowvhd_fuzz::write_seeds("nbd_bytes", &cowvhd_fuzz::nbd_bytes::seeds()),
    |data: &[u8]| cowvhd_fuzz::nbd_bytes::run(data)
);
