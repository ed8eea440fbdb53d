//! The small model that tests read: SmolLM2-135M-Instruct in Ember's model cache.

use std::{
    path::PathBuf,
    sync::{Arc, LazyLock},
};

use super::Tokenizer;
use crate::weights::gguf::Gguf;

/// Its file, which must be there.
pub(crate) fn smollm2_path() -> PathBuf {
    let home = std::env::var_os("HOME").expect("HOME is set");
    let path = PathBuf::from(home).join(".cache/ember/models/SmolLM2-135M-Instruct-Q4_1.gguf");
    assert!(path.is_file(), "{} is missing; run `cargo xtask model smollm2` first", path.display());
    path
}

/// Its tokenizer, built once.
pub(crate) fn smollm2_tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
        let gguf = Gguf::open(&smollm2_path()).expect("valid");
        Arc::new(Tokenizer::from_gguf(&gguf).expect("valid"))
    });
    TOKENIZER.clone()
}
