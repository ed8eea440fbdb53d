//! [`EmbeddingBackend`]: an embedding model as a [`Backend`] that generates nothing.

use std::{
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use ember_engine::{
    EngineConfig, EngineInfo, EngineStats, Error, GenerateRequest, SamplingParams, embedding::EmbeddingEngine,
    text::ChatOptions,
};
use serde_json::Value;

use crate::{Backend, EventStream, Task};

/// Requests that may wait for each other before more are queued; those that wait run together.
const MAX_NUM_SEQS: usize = 64;

/// An embedding model behind the endpoints.
pub struct EmbeddingBackend {
    engine: EmbeddingEngine,
    info: EngineInfo,
    defaults: SamplingParams,
}

impl EmbeddingBackend {
    /// Loads the Hugging Face folder or GGUF file `path`.
    ///
    /// # Errors
    /// Those of [`EmbeddingEngine::load`].
    pub fn load(path: &Path, config: EngineConfig) -> Result<Self, Error> {
        let engine = EmbeddingEngine::load(path, config)?;
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let of = engine.info();
        let info = EngineInfo {
            model_path: of.path.clone(),
            architecture: of.architecture.clone(),
            n_parameters: of.n_parameters,
            file_dtype: of.file_dtype.clone(),
            vocab_size: engine.tokenizer().vocab_size(),
            max_model_len: of.max_model_len,
            max_num_seqs: MAX_NUM_SEQS,
            max_num_batched_tokens: of.max_num_batched_tokens,
            n_kv_tokens: 0,
            max_logprobs: 0,
            executor: of.executor.clone(),
            eos_token_ids: Vec::new(),
            created,
        };
        Ok(Self { engine, info, defaults: SamplingParams::default() })
    }
}

impl Backend for EmbeddingBackend {
    fn submit(&self, _: GenerateRequest) -> Result<EventStream, Error> {
        Err(Error::invalid("model", "This model makes embeddings; it cannot generate. Use /v1/embeddings."))
    }

    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn stats(&self) -> EngineStats {
        EngineStats::default()
    }

    fn take_step_sizes(&self) -> Vec<u32> {
        Vec::new()
    }

    fn is_healthy(&self) -> bool {
        self.engine.is_healthy()
    }

    fn default_sampling_params(&self) -> &SamplingParams {
        &self.defaults
    }

    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        self.engine.tokenizer().encode(text, add_special_tokens)
    }

    fn n_added_tokens(&self) -> (usize, usize) {
        self.engine.tokenizer().n_added()
    }

    fn does(&self, task: Task) -> bool {
        task == Task::Embed
    }

    fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.engine.tokenizer().encode_with_special(text)
    }

    fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, Error> {
        self.engine.tokenizer().decode(ids, skip_special_tokens)
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.engine.tokenizer().token_bytes(id)
    }

    fn token_piece(&self, id: u32) -> Option<String> {
        self.engine.tokenizer().token_piece(id)
    }

    fn render_chat(&self, _: &[Value], _: &ChatOptions<'_>) -> Result<String, Error> {
        Err(Error::invalid("messages", "This model makes embeddings; it has no chat template."))
    }

    fn embed(&self, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, Error> {
        self.engine.embed(texts)
    }
}
