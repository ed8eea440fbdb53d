//! libFuzzer around the target that EMBER_FUZZ_TARGET names; its flags are libFuzzer's.

#![no_main]

use std::sync::LazyLock;

use ember_fuzz::TARGETS;

static RUN: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var("EMBER_FUZZ_TARGET").unwrap_or_default();
    let target = TARGETS.iter().find(|target| target.name == name);
    target.unwrap_or_else(|| panic!("EMBER_FUZZ_TARGET={name}: no such target")).run
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| RUN(bytes));
