#!/bin/sh
# Cargo's compiler for the workspace's own crates in `cargo xtask fuzz`: counts the edges that an input takes, for
# libFuzzer, and checks what release builds do not. These options are cargo-fuzz's, less the sanitizers that need nightly.
case " $* " in
*" --crate-name build_script"* | *" --crate-name ___ "*) exec "$@" ;;
esac
exec "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cllvm-args=-simplifycfg-branch-fold-threshold=0 \
    -Coverflow-checks=on -Cdebug-assertions=on -Ccodegen-units=1
