//! [`Backend`]: what an endpoint sees of the engine. Knows nothing of HTTP.

use std::pin::Pin;

use ember_engine::{Engine, EngineInfo, EngineStats, Error, Event, GenerateRequest, SamplingParams, text::ChatOptions};
use futures_util::Stream;
use serde_json::Value;

/// The events of one prompt. Dropping it cancels the prompt's sequences.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<Event, Error>> + Send>>;

/// What a model can be for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// It generates text.
    Generate,
    /// It makes vectors of texts.
    Embed,
}

/// What an endpoint sees of the engine. Errors are those of the [`Engine`] method of the same name.
#[allow(missing_docs)]
pub trait Backend: Send + Sync + 'static {
    fn submit(&self, request: GenerateRequest) -> Result<EventStream, Error>;
    fn info(&self) -> &EngineInfo;
    fn stats(&self) -> EngineStats;
    fn take_step_sizes(&self) -> Vec<u32>;
    fn is_healthy(&self) -> bool;
    fn default_sampling_params(&self) -> &SamplingParams;
    /// Plain text to token ids, with the tokenizer's own special tokens (BOS) if wanted.
    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error>;
    /// How many tokens [`Backend::encode`] puts before and after a text if wanted.
    fn n_added_tokens(&self) -> (usize, usize);
    /// Text that a chat template made to token ids; special tokens in it are parsed.
    fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, Error>;
    fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, Error>;
    /// The bytes that token `id` stands for; empty if there is no such token.
    fn token_bytes(&self, id: u32) -> Vec<u8>;
    /// The vocabulary's spelling of token `id`.
    fn token_piece(&self, id: u32) -> Option<String>;
    /// Renders `messages` with the model's chat template; [`Error::InvalidRequest`] if it has none.
    fn render_chat(&self, messages: &[Value], options: &ChatOptions<'_>) -> Result<String, Error>;
    /// Whether the model does what `task` says.
    fn does(&self, task: Task) -> bool {
        task == Task::Generate
    }
    /// The vectors of `texts`, token ids; blocks. [`Error::InvalidRequest`] if the model makes none.
    fn embed(&self, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, Error> {
        let _ = texts;
        Err(Error::invalid("model", "This model generates text; it makes no embeddings."))
    }
}

impl Backend for Engine {
    fn submit(&self, request: GenerateRequest) -> Result<EventStream, Error> {
        Ok(Box::pin(Engine::submit(self, request)?))
    }

    fn info(&self) -> &EngineInfo {
        Engine::info(self)
    }

    fn stats(&self) -> EngineStats {
        Engine::stats(self)
    }

    fn take_step_sizes(&self) -> Vec<u32> {
        Engine::take_step_sizes(self)
    }

    fn is_healthy(&self) -> bool {
        Engine::is_healthy(self)
    }

    fn default_sampling_params(&self) -> &SamplingParams {
        Engine::default_sampling_params(self)
    }

    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        self.tokenizer().encode(text, add_special_tokens)
    }

    fn n_added_tokens(&self) -> (usize, usize) {
        self.tokenizer().n_added()
    }

    fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.tokenizer().encode_with_special(text)
    }

    fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, Error> {
        self.tokenizer().decode(ids, skip_special_tokens)
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.tokenizer().token_bytes(id)
    }

    fn token_piece(&self, id: u32) -> Option<String> {
        self.tokenizer().token_piece(id)
    }

    fn render_chat(&self, messages: &[Value], options: &ChatOptions<'_>) -> Result<String, Error> {
        let template = self.chat_template().ok_or_else(|| {
            Error::invalid(
                "messages",
                "This model has no chat template. Use /v1/completions, or a model folder whose tokenizer_config.json has `chat_template`.",
            )
        })?;
        template.render(messages, options)
    }
}
