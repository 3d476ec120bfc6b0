//! The published structures: read, written, read again. See `cowvhd_fuzz::vhd_structures`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cowvhd_fuzz::vhd_structures::run(data));
