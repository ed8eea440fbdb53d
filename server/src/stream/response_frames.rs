//! Events of `/v1/responses`.

use std::sync::Arc;

use ember_common::openai::{
    ChatTokenLogprob, ContentPart, IncompleteDetails, ModelResponse, OutputItem, ResponseError, ResponseEvent,
    ResponseEventKind, Usage,
};
use ember_engine::{Delta, PromptEvent, TokenLogprobs};

use super::{ChunkWriter, Frames, UsageMeter};
use crate::{
    ApiError,
    app::App,
    blocks::{Block, BlockEvent, Blocks},
    logprobs::{self, TokenNames},
};

/// Writes the events of a response.
pub struct ResponseFrames {
    /// Shared state.
    pub app: Arc<App>,
    /// The response before it has output.
    pub response: ModelResponse,
    /// The output so far.
    pub blocks: Blocks,
    /// Candidates shown of each token.
    pub n_top_logprobs: usize,
    /// Events so far.
    pub n_events: u64,
}

impl ResponseFrames {
    /// The response at its end.
    pub fn finished(&self, usage: Usage) -> ModelResponse {
        let is_cut_off = self.blocks.is_cut_off();
        let last = self.blocks.list().len().saturating_sub(1);
        let status = |idx: usize| if is_cut_off && idx == last { "incomplete" } else { "completed" };
        ModelResponse {
            status: if is_cut_off { "incomplete" } else { "completed" }.into(),
            incomplete_details: is_cut_off.then(|| IncompleteDetails { reason: "max_output_tokens".into() }),
            output: (0..self.blocks.list().len()).map(|idx| self.item(idx, status(idx))).collect(),
            usage: Some(usage.into()),
            ..self.response.clone()
        }
    }

    fn item_id(&self, idx: usize) -> String {
        let prefix = match self.blocks.list()[idx] {
            Block::Reasoning(_) => "rs",
            Block::Text { .. } => "msg",
            Block::Call { .. } => "fc",
        };
        let name = self.response.id.strip_prefix("resp_").unwrap_or(&self.response.id);
        format!("{prefix}_{name}_{idx}")
    }

    fn item(&self, idx: usize, status: &str) -> OutputItem {
        let (id, status) = (self.item_id(idx), status.to_owned());
        let is_new = status == "in_progress";
        match self.blocks.list()[idx].clone() {
            Block::Reasoning(text) => OutputItem::Reasoning {
                id,
                summary: Vec::new(),
                content: if is_new { Vec::new() } else { vec![ContentPart::ReasoningText { text }] },
                status,
            },
            Block::Text { text, logprobs } => OutputItem::Message {
                id,
                status,
                role: "assistant".into(),
                content: if is_new { Vec::new() } else { vec![output_text(text, self.logprobs(&logprobs))] },
            },
            Block::Call { id: call_id, name, arguments } => {
                let arguments = if is_new { String::new() } else { arguments };
                OutputItem::FunctionCall { id, call_id, name, arguments, status }
            }
        }
    }

    fn logprobs(&self, tokens: &[TokenLogprobs]) -> Vec<ChatTokenLogprob> {
        let names = TokenNames { backend: &*self.app.backend, as_ids: false };
        logprobs::chat(names, tokens, self.n_top_logprobs).content
    }

    fn event(&mut self, writer: &mut ChunkWriter, kind: ResponseEventKind) {
        let name = kind.name();
        writer.event(name, &ResponseEvent { kind, sequence_number: self.n_events });
        self.n_events += 1;
    }

    fn opened(&mut self, writer: &mut ChunkWriter, output_index: usize) {
        let item = self.item(output_index, "in_progress");
        self.event(writer, ResponseEventKind::ItemAdded { output_index, item });
        let part = match self.blocks.list()[output_index] {
            Block::Call { .. } => return,
            Block::Reasoning(_) => ContentPart::ReasoningText { text: String::new() },
            Block::Text { .. } => output_text(String::new(), Vec::new()),
        };
        let item_id = self.item_id(output_index);
        self.event(writer, ResponseEventKind::PartAdded { item_id, output_index, content_index: 0, part });
    }

    fn grew(&mut self, writer: &mut ChunkWriter, output_index: usize, (delta, logprobs): (String, Vec<TokenLogprobs>)) {
        let item_id = self.item_id(output_index);
        let content_index = 0;
        let kind = match self.blocks.list()[output_index] {
            Block::Reasoning(_) => ResponseEventKind::ReasoningDelta { item_id, output_index, content_index, delta },
            Block::Text { .. } => {
                let logprobs = self.logprobs(&logprobs);
                ResponseEventKind::TextDelta { item_id, output_index, content_index, delta, logprobs }
            }
            Block::Call { .. } => ResponseEventKind::ArgumentsDelta { item_id, output_index, delta },
        };
        self.event(writer, kind);
    }

    fn closed(&mut self, writer: &mut ChunkWriter, output_index: usize) {
        let item_id = self.item_id(output_index);
        let content_index = 0;
        let (done, part) = match self.blocks.list()[output_index].clone() {
            Block::Reasoning(text) => {
                let part = ContentPart::ReasoningText { text: text.clone() };
                let item_id = item_id.clone();
                (ResponseEventKind::ReasoningDone { item_id, output_index, content_index, text }, Some(part))
            }
            Block::Text { text, logprobs } => {
                let logprobs = self.logprobs(&logprobs);
                let part = output_text(text.clone(), logprobs.clone());
                let item_id = item_id.clone();
                (ResponseEventKind::TextDone { item_id, output_index, content_index, text, logprobs }, Some(part))
            }
            Block::Call { name, arguments, .. } => {
                let item_id = item_id.clone();
                (ResponseEventKind::ArgumentsDone { item_id, output_index, name, arguments }, None)
            }
        };
        self.event(writer, done);
        if let Some(part) = part {
            self.event(writer, ResponseEventKind::PartDone { item_id, output_index, content_index, part });
        }
        let is_last = self.blocks.finish().is_some() && output_index + 1 == self.blocks.list().len();
        let status = if is_last && self.blocks.is_cut_off() { "incomplete" } else { "completed" };
        let item = self.item(output_index, status);
        self.event(writer, ResponseEventKind::ItemDone { output_index, item });
    }
}

fn output_text(text: String, logprobs: Vec<ChatTokenLogprob>) -> ContentPart {
    ContentPart::OutputText { text, annotations: [], logprobs }
}

impl Frames for ResponseFrames {
    fn prompt(&mut self, _: usize, _: PromptEvent) {}

    fn delta(&mut self, writer: &mut ChunkWriter, _: &UsageMeter, delta: Delta) {
        if self.n_events == 0 {
            let response = Box::new(self.response.clone());
            self.event(writer, ResponseEventKind::Created { response: response.clone() });
            self.event(writer, ResponseEventKind::InProgress { response });
        }
        // What came at once is told block by block, so that no event shows more than was said before it.
        for event in self.blocks.push(&delta) {
            match event {
                BlockEvent::Opened(idx) => self.opened(writer, idx),
                BlockEvent::Grew(idx, text, logprobs) => self.grew(writer, idx, (text, logprobs)),
                BlockEvent::Closed(idx) => self.closed(writer, idx),
            }
        }
    }

    fn n_reasoning_tokens(&self) -> Option<usize> {
        self.app.config.reasoning_parser.map(|_| self.blocks.n_reasoning_tokens())
    }

    fn system_fingerprint(&self) -> &str {
        &self.app.system_fingerprint
    }

    fn end(&mut self, writer: &mut ChunkWriter, usage: &UsageMeter) {
        let response = Box::new(self.finished(usage.total()));
        let is_cut_off = self.blocks.is_cut_off();
        let kind = if is_cut_off {
            ResponseEventKind::Incomplete { response }
        } else {
            ResponseEventKind::Completed { response }
        };
        self.event(writer, kind);
    }

    fn error(&mut self, writer: &mut ChunkWriter, error: &ApiError) {
        let error = ResponseError { code: "server_error".into(), message: error.message.clone() };
        let response = ModelResponse { status: "failed".into(), error: Some(error), ..self.response.clone() };
        self.event(writer, ResponseEventKind::Failed { response: Box::new(response) });
    }
}
