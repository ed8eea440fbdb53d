//! [`GenerationDefaults`]: what a model's files say of how to generate with it.

use std::path::Path;

use serde_json::Value;

use super::HfConfig;
use crate::{Error, text::Tokenizer};

/// A model's own generation settings; requests override them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end a sequence, the tokenizer's own first.
    pub eos_token_ids: Vec<u32>,
    /// Token that begins every sequence.
    pub bos_token_id: Option<u32>,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Nucleus sampling.
    pub top_p: Option<f32>,
    /// Best tokens kept.
    pub top_k: Option<u32>,
    /// Least probability relative to the best token's.
    pub min_p: Option<f32>,
    /// Penalty of repeated tokens.
    pub repetition_penalty: Option<f32>,
    /// Output tokens at most.
    pub max_new_tokens: Option<u32>,
}

impl GenerationDefaults {
    /// The tokenizer's special tokens alone.
    pub(super) fn from_tokenizer(tokenizer: &Tokenizer) -> Self {
        Self {
            eos_token_ids: tokenizer.eos_token_ids().to_vec(),
            bos_token_id: tokenizer.bos_token_id(),
            ..Self::default()
        }
    }

    /// generation_config.json over config.json over the tokenizer's special tokens. As in vLLM, the tokenizer's
    /// end-of-sequence token is the primary one, and sampling parameters count whatever `do_sample` says.
    pub(super) fn from_folder(path: &Path, config: &HfConfig, tokenizer: &Tokenizer) -> Result<Self, Error> {
        let mut defaults = Self::from_tokenizer(tokenizer);
        let file = path.join("generation_config.json");
        let generation = if file.is_file() { Some(HfConfig::open(&file)?) } else { None };
        for source in generation.iter().chain([config]) {
            for id in token_ids(source, "eos_token_id")? {
                if !defaults.eos_token_ids.contains(&id) {
                    defaults.eos_token_ids.push(id);
                }
            }
            if defaults.bos_token_id.is_none() {
                defaults.bos_token_id = token_ids(source, "bos_token_id")?.first().copied();
            }
        }
        if let Some(generation) = &generation {
            defaults.temperature = generation.number("temperature")?;
            defaults.top_p = generation.number("top_p")?;
            defaults.min_p = generation.number("min_p")?;
            defaults.repetition_penalty = generation.number("repetition_penalty")?;
            // 0 means all tokens and is the default.
            defaults.top_k = generation.get("top_k").and_then(Value::as_u64).and_then(|k| u32::try_from(k).ok());
            defaults.max_new_tokens = generation.count("max_new_tokens")?.and_then(|n| u32::try_from(n).ok());
        }
        Ok(defaults)
    }
}

/// A token id or a list of them.
fn token_ids(config: &HfConfig, field: &str) -> Result<Vec<u32>, Error> {
    let id = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
    let ids = match config.get(field) {
        None => Some(Vec::new()),
        Some(Value::Array(values)) => values.iter().map(id).collect(),
        Some(value) => id(value).map(|id| vec![id]),
    };
    ids.ok_or_else(|| config.error(format!("'{field}' must be a token id or a list of them")))
}
