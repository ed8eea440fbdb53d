//! Real models that `cargo xtask model NAME` puts into the user's cache.

use std::path::PathBuf;

/// The file or folder `cached` of the model that xtask calls `name`.
pub fn model(name: &str, cached: &str) -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache"), PathBuf::from);
    let path = cache.join("ember/models").join(cached);
    assert!(path.exists(), "{} is missing: run `cargo xtask model {name}` first", path.display());
    path
}
