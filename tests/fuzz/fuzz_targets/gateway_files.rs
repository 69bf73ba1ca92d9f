#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| supervisor::untrusted::gateway_files(bytes));
