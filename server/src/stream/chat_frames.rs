//! Chunks of `/v1/chat/completions`.

use std::sync::Arc;

use ember_common::openai::{ChunkDelta, StreamUsage, Usage};
use ember_engine::{Delta, Finish, PromptEvent};

use super::{ChunkWriter, Frames, UsageMeter};
use crate::{
    answer::Answer,
    app::App,
    generation::wire_stop_reason,
    logprobs::{self, TokenNames},
    tools::ToolPlan,
};

/// Writes chat chunks. Every choice starts with a chunk of its role, sent together with the
/// answer's first token and never before: load testers take it for that token.
pub struct ChatFrames {
    /// Shared state.
    pub app: Arc<App>,
    /// Candidates per position; `None` for no log-probabilities.
    pub n_top_logprobs: Option<usize>,
    /// Show tokens as `token_id:N`.
    pub tokens_as_ids: bool,
    /// Put `token_ids` and `prompt_token_ids` on the chunks.
    pub return_token_ids: bool,
    /// The prompt's text, if it is to be sent.
    pub prompt_text: Option<String>,
    /// Text to put before the output.
    pub echo: Option<String>,
    /// Choices in all; 0 once their roles are sent.
    pub n_unstarted: usize,
    /// Token ids of the prompt.
    pub prompt: Option<PromptEvent>,
    /// By choice; empty if the text is sent as it comes.
    pub answers: Vec<Answer>,
    /// How calls end a choice.
    pub tools: ToolPlan,
    /// Whether reasoning is told apart.
    pub counts_reasoning: bool,
}

impl ChatFrames {
    fn roles(&mut self, writer: &mut ChunkWriter, usage: &UsageMeter) {
        let token_ids = self.prompt.as_ref().filter(|_| self.return_token_ids).map(|prompt| prompt.token_ids.as_ref());
        let n_choices = std::mem::take(&mut self.n_unstarted);
        let echo = self.echo.take();
        for index in 0..n_choices {
            writer.begin().raw(r#"{"index":"#).value(&index);
            writer.raw(r#","delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]"#);
            if usage.continuous
                && let Some(prompt) = &self.prompt
            {
                let usage = Usage::new(prompt.token_ids.len(), 0);
                writer.raw(r#","usage":"#).value(&StreamUsage::from(usage));
            }
            writer.raw(r#","prompt_token_ids":"#).value(&token_ids);
            writer.raw(r#","prompt_text":"#).value(&self.prompt_text).end();
        }
        let Some(text) = echo else { return };
        for index in 0..n_choices {
            writer.begin().raw(r#"{"index":"#).value(&index).raw(r#","delta":{"content":"#).value(&text);
            writer.raw(r#"},"logprobs":null,"finish_reason":null,"token_ids":null}],"kv_transfer_params":null"#).end();
        }
    }
}

impl Frames for ChatFrames {
    fn prompt(&mut self, _: usize, prompt: PromptEvent) {
        self.prompt = Some(prompt);
    }

    fn delta(&mut self, writer: &mut ChunkWriter, usage: &UsageMeter, mut delta: Delta) {
        if self.n_unstarted > 0 {
            self.roles(writer, usage);
        }
        let parsed = self.answers.get_mut(delta.index).map(|answer| answer.push(&delta));
        if let Some(parsed) = &parsed {
            // Tokens that only decide what the next ones mean are not sent, unless somebody counts them.
            let is_silent = *parsed == ChunkDelta::default() && delta.finish.is_none();
            if is_silent && !self.return_token_ids && self.n_top_logprobs.is_none() {
                return;
            }
            if let Some(finish) = &mut delta.finish {
                finish.reason = self.tools.finish_reason(finish.reason, self.answers[delta.index].n_calls());
            }
        }
        writer.begin().raw(r#"{"index":"#).value(&delta.index).raw(r#","delta":"#);
        match &parsed {
            Some(parsed) => writer.value(parsed),
            None => writer.raw(r#"{"content":"#).value(&delta.text).raw("}"),
        };
        writer.raw(r#","logprobs":"#);
        match self.n_top_logprobs {
            Some(n_top) => {
                let names = TokenNames { backend: &*self.app.backend, as_ids: self.tokens_as_ids };
                writer.value(&logprobs::chat(names, &delta.logprobs, n_top));
            }
            None => {
                writer.raw("null");
            }
        }
        write_finish(writer, delta.finish.as_ref());
        let token_ids = self.return_token_ids.then_some(&delta.token_ids);
        writer.raw(r#","token_ids":"#).value(&token_ids);
        writer.raw(if delta.finish.is_some() { r#","weight_versions":null}]"# } else { "}]" });
        if let Some(usage) = usage.so_far(delta.index) {
            writer.raw(r#","usage":"#).value(&usage);
        }
        if delta.finish.is_none() {
            writer.raw(r#","kv_transfer_params":null"#);
        } else if !usage.at_end {
            writer.raw(r#","system_fingerprint":"#).value(&self.app.system_fingerprint);
        }
        writer.end();
    }

    fn n_reasoning_tokens(&self) -> Option<usize> {
        self.counts_reasoning.then(|| self.answers.iter().map(Answer::n_reasoning_tokens).sum())
    }

    fn system_fingerprint(&self) -> &str {
        &self.app.system_fingerprint
    }
}

/// Writes `finish_reason`, and `stop_reason` if there is an end.
fn write_finish(writer: &mut ChunkWriter, finish: Option<&Finish>) {
    match finish {
        None => {
            writer.raw(r#","finish_reason":null"#);
        }
        Some(finish) => {
            writer.raw(r#","finish_reason":"#).value(&finish.reason);
            writer.raw(r#","stop_reason":"#).value(&finish.stop_reason.clone().map(wire_stop_reason));
        }
    }
}
