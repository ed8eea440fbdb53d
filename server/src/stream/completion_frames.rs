//! Chunks of `/v1/completions`.

use std::sync::Arc;

use ember_common::openai::CompletionLogprobs;
use ember_engine::{Delta, PromptEvent, TokenLogprobs};

use super::{ChunkWriter, Frames, UsageMeter};
use crate::{
    app::App,
    generation::wire_stop_reason,
    logprobs::{self, TokenNames},
};

/// Writes completion chunks.
pub struct CompletionFrames {
    /// Shared state.
    pub app: Arc<App>,
    /// Candidates per position; `None` for no log-probabilities.
    pub n_logprobs: Option<usize>,
    /// Show tokens as `token_id:N`.
    pub tokens_as_ids: bool,
    /// Put `token_ids` and `prompt_token_ids` on the chunks.
    pub return_token_ids: bool,
    /// With `echo`: the prompts' texts.
    pub echo: Option<Vec<String>>,
    /// Leave the output out: `max_tokens` is 0.
    pub only_echo: bool,
    /// Choices per prompt.
    pub n: usize,
    /// By prompt.
    pub prompts: Vec<Option<PromptEvent>>,
    /// By choice.
    pub choices: Vec<ChoiceState>,
}

/// What a choice has sent.
#[derive(Debug, Clone, Copy, Default)]
pub struct ChoiceState {
    started: bool,
    /// Characters so far.
    text_offset: usize,
}

impl CompletionFrames {
    /// Makes of the engine's output what the request wants to see: on the first of a choice the
    /// prompt before it, with `max_tokens` 0 the prompt alone.
    pub fn shape(&self, delta: &mut Delta, state: &ChoiceState) {
        if self.only_echo {
            delta.text.clear();
            delta.token_ids.clear();
            delta.logprobs.clear();
        }
        if state.started {
            return;
        }
        let prompt_idx = delta.index / self.n;
        if let Some(echo) = &self.echo {
            delta.text.insert_str(0, &echo[prompt_idx]);
        }
    }

    /// The log-probabilities of shaped output, those of an echoed prompt first.
    pub fn logprobs(&self, delta: &Delta, state: &mut ChoiceState, n_top: usize) -> CompletionLogprobs {
        let names = TokenNames { backend: &*self.app.backend, as_ids: self.tokens_as_ids };
        let prompt = self.prompts[delta.index / self.n].as_ref().filter(|_| !state.started && self.echo.is_some());
        let of_prompt = prompt.into_iter().flat_map(|prompt| {
            let logprobs = prompt.logprobs.iter().flatten().cloned();
            prompt.token_ids.iter().copied().zip(logprobs)
        });
        let output = delta.logprobs.iter().map(|token: &TokenLogprobs| (token.token_id, Some(token.clone())));
        let mut out = CompletionLogprobs::default();
        logprobs::push_completion(names, &mut out, &mut state.text_offset, of_prompt.chain(output), n_top);
        out
    }
}

impl Frames for CompletionFrames {
    fn prompt(&mut self, prompt_idx: usize, prompt: PromptEvent) {
        self.prompts[prompt_idx] = Some(prompt);
    }

    fn delta(&mut self, writer: &mut ChunkWriter, usage: &UsageMeter, mut delta: Delta) {
        let mut state = self.choices[delta.index];
        self.shape(&mut delta, &state);
        writer.begin().raw(r#"{"index":"#).value(&delta.index);
        writer.raw(r#","text":"#).value(&delta.text);
        writer.raw(r#","logprobs":"#);
        match self.n_logprobs {
            Some(n_top) => writer.value(&self.logprobs(&delta, &mut state, n_top)),
            None => writer.raw("null"),
        };
        let (reason, stop_reason) = delta.finish.take().map(|finish| (finish.reason, finish.stop_reason)).unzip();
        writer.raw(r#","finish_reason":"#).value(&reason);
        writer.raw(r#","stop_reason":"#).value(&stop_reason.flatten().map(wire_stop_reason));
        let prompt = self.prompts[delta.index / self.n].as_ref().filter(|_| self.return_token_ids && !state.started);
        writer.raw(r#","prompt_token_ids":"#).value(&prompt.map(|prompt| prompt.token_ids.as_ref()));
        writer.raw(r#","token_ids":"#).value(&self.return_token_ids.then_some(&delta.token_ids));
        writer.raw(r#","weight_versions":null}]"#);
        if let Some(usage) = usage.so_far(delta.index) {
            writer.raw(r#","usage":"#).value(&usage);
        }
        if reason.is_some() && !usage.at_end {
            writer.raw(r#","system_fingerprint":"#).value(&self.app.system_fingerprint);
        }
        writer.end();
        state.started = true;
        self.choices[delta.index] = state;
    }

    fn system_fingerprint(&self) -> &str {
        &self.app.system_fingerprint
    }
}
