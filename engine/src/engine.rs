//! [`Engine`]: loads a model and runs the serving loop on its own thread.

use std::path::{Path, PathBuf};

use crate::{
    EngineConfig, Error, GenerateRequest, Generation, Output, Prompt, SamplingParams,
    text::{ChatTemplate, Tokenizer},
};

/// A loaded model that answers requests until it is dropped.
pub struct Engine {
    info: EngineInfo,
}

/// What was loaded, and how.
#[derive(Debug, Clone)]
pub struct EngineInfo {
    /// The model folder or file.
    pub model_path: PathBuf,
    /// Upstream name, such as `LlamaForCausalLM`.
    pub architecture: String,
    /// Parameters of the model.
    pub n_parameters: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Longest prompt + output in tokens.
    pub max_model_len: usize,
    /// Most sequences in one step.
    pub max_num_seqs: usize,
    /// Tokens that the KV cache holds.
    pub n_kv_tokens: usize,
    /// Device, element type and memory plan, in one line.
    pub executor: String,
    /// When the model was loaded, seconds since the Unix epoch.
    pub created: u64,
}

/// The engine's state now and its counters since start.
#[derive(Debug, Clone, Copy, Default)]
pub struct EngineStats {
    /// Sequences in the batch.
    pub n_running: usize,
    /// Sequences waiting for a place in it.
    pub n_waiting: usize,
    /// KV pages held by sequences.
    pub n_pages_in_use: usize,
    /// KV pages in all.
    pub n_pages: usize,
    /// Prompt tokens looked up in the prefix cache.
    pub n_prefix_queries: u64,
    /// Prompt tokens found there.
    pub n_prefix_hits: u64,
    /// Sequences put back to recompute.
    pub n_preemptions: u64,
    /// Prompt tokens processed.
    pub n_prompt_tokens: u64,
    /// Tokens sampled.
    pub n_generation_tokens: u64,
}

impl Engine {
    /// Loads the model at `source` (a Hugging Face folder or a GGUF file) and starts its thread.
    ///
    /// # Errors
    /// [`Error::Model`] for missing, broken or unsupported files; [`Error::Config`] for options that
    /// cannot be honoured; [`Error::Device`] if the device fails or lacks memory.
    pub fn load(source: impl AsRef<Path>, config: EngineConfig) -> Result<Self, Error> {
        let _ = (source.as_ref(), config);
        unimplemented!()
    }

    /// Starts one request.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] for parameters out of range or a prompt longer than the context;
    /// [`Error::Stopped`] after a device error.
    pub fn submit(&self, request: GenerateRequest) -> Result<Generation, Error> {
        let _ = request;
        unimplemented!()
    }

    /// Runs `prompts` to their end and returns the outputs ordered by prompt, then by index. Blocks.
    ///
    /// # Errors
    /// As [`Engine::submit`], and [`Error::Device`].
    pub fn generate(
        &self,
        prompts: impl IntoIterator<Item = impl Into<Prompt>>,
        params: &SamplingParams,
    ) -> Result<Vec<Output>, Error> {
        let _ = (prompts.into_iter().map(Into::into).collect::<Vec<Prompt>>(), params);
        unimplemented!()
    }

    /// What was loaded.
    pub fn info(&self) -> &EngineInfo {
        &self.info
    }

    /// State and counters.
    pub fn stats(&self) -> EngineStats {
        EngineStats::default()
    }

    /// False once the device has failed.
    pub fn is_healthy(&self) -> bool {
        true
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        unimplemented!()
    }

    /// The model's chat template, if it has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        None
    }

    /// The model's own defaults (generation_config.json), for fields that a request leaves open.
    pub fn default_sampling_params(&self) -> &SamplingParams {
        unimplemented!()
    }
}
