//! Safetensors files and the index of a sharded model.

use std::sync::LazyLock;

use ember_engine::{LoadFormat, models::Model};
use serde_json::json;
use tempfile::TempDir;

/// The rest of a model folder.
static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 4, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
    folder
});

/// The first byte says what the others are: the index, or the one file.
pub fn run(bytes: &[u8]) {
    let Some((&kind, content)) = bytes.split_first() else {
        return;
    };
    let is_index = kind == b'i';
    let file = if is_index { "model.safetensors.index.json" } else { "model.safetensors" };
    let path = FOLDER.path().join(file);
    // Removed and made anew: a file that is still mapped must not change.
    let _ = std::fs::remove_file(&path);
    std::fs::write(&path, content).expect("written");
    // There is no tokenizer, so that a whole model always fails after its weights; no bytes may open it.
    assert!(Model::open(FOLDER.path(), LoadFormat::Auto, 0).is_err());
    let _ = std::fs::remove_file(&path);
}
