#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| idempotency_tests::fuzz::settings(bytes));
