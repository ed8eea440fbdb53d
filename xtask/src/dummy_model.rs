//! Model folders without weights: the dimensions of well-known models and a made-up tokenizer, for measuring speed
//! with `--load-format dummy`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

pub struct DummyModel {
    pub name: &'static str,
    pub vocab_size: u32,
    config: fn() -> Value,
}

pub const LLAMA_3_1_8B: DummyModel = DummyModel { name: "llama-3.1-8b", vocab_size: 128_256, config: llama_config };
/// For what is asked of the server alone: the model takes next to no time.
pub const TINY: DummyModel = DummyModel { name: "tiny", vocab_size: 512, config: tiny_config };
pub const QWEN2_0_5B: DummyModel = DummyModel { name: "qwen2-0.5b", vocab_size: 151_936, config: qwen2_config };

fn llama_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "attention_bias": false,
        "mlp_bias": false, "rope_theta": 500000.0, "bos_token_id": 128000, "eos_token_id": 128001,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    })
}

fn tiny_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 512, "max_position_embeddings": 1024, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false, "rope_theta": 10000.0, "eos_token_id": 511,
    })
}

fn qwen2_config() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16",
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "rope_theta": 1000000.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "use_sliding_window": false,
    })
}

impl DummyModel {
    /// Writes the folder under `parent` and returns its path.
    pub fn write(&self, parent: &Path) -> Result<PathBuf> {
        let dir = parent.join(self.name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        fs::write(dir.join("config.json"), (self.config)().to_string())?;
        fs::write(dir.join("tokenizer.json"), tokenizer(self.vocab_size).to_string())?;
        fs::write(dir.join("tokenizer_config.json"), json!({ "chat_template": CHAT_TEMPLATE }).to_string())?;
        Ok(dir)
    }
}

const CHAT_TEMPLATE: &str =
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:";

/// A byte-level BPE without merges: text becomes one token a byte, and each id, also those past the bytes, decodes to
/// some text, so that streamed answers have pieces to time.
fn tokenizer(vocab_size: u32) -> Value {
    let mut vocab = Map::new();
    for (id, byte_char) in byte_level_alphabet().into_iter().enumerate() {
        vocab.insert(byte_char.to_string(), json!(id));
    }
    for id in 256..vocab_size {
        vocab.insert(format!("Ġw{id}"), json!(id));
    }
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    })
}

/// The printable stand-ins of the 256 bytes, as GPT-2's `bytes_to_unicode` orders them.
fn byte_level_alphabet() -> Vec<char> {
    let is_printable = |it: &u32| matches!(it, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let printable = (0..256).filter(is_printable);
    let n_others = 256 - printable.clone().count() as u32;
    printable.chain(256..256 + n_others).filter_map(char::from_u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_id_of_the_vocabulary_has_one_token() {
        for model in [LLAMA_3_1_8B, QWEN2_0_5B, TINY] {
            let tokenizer = tokenizer(model.vocab_size);
            let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
            assert_eq!(vocab.len(), model.vocab_size as usize, "{}", model.name);
            assert_eq!((model.config)()["vocab_size"], model.vocab_size, "{}", model.name);
        }
        assert_eq!(byte_level_alphabet().len(), 256);
    }
}
