//! [`Blocks`]: an answer as a list of thoughts, texts and calls, for endpoints whose wire types are such lists.

use ember_common::{FinishReason, openai::ChunkDelta};
use ember_engine::{Delta, Finish, TokenLogprobs};

use crate::{answer::Answer, chat_request::Reading, tools::ToolPlan};

/// A part of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Block {
    /// Thoughts.
    Reasoning(String),
    /// Text, and the log-probabilities of its tokens if they were asked for.
    #[allow(missing_docs)]
    Text { text: String, logprobs: Vec<TokenLogprobs> },
    /// A tool call; `arguments` is JSON as text.
    #[allow(missing_docs)]
    Call { id: String, name: String, arguments: String },
}

/// What new output did to the block of this number.
#[derive(Debug, Clone, PartialEq)]
pub enum BlockEvent {
    /// It began, still empty.
    Opened(usize),
    /// It grew by this text, of tokens with these log-probabilities.
    Grew(usize, String, Vec<TokenLogprobs>),
    /// It is complete.
    Closed(usize),
}

/// One answer as it comes.
pub struct Blocks {
    answer: Answer,
    tools: ToolPlan,
    list: Vec<Block>,
    is_open: bool,
    /// Of tokens whose text has not come yet.
    pending: Vec<TokenLogprobs>,
    finish: Option<Finish>,
}

impl Blocks {
    /// An answer that is to be understood like this.
    pub fn new(reading: Reading) -> Self {
        Self {
            answer: reading.any_answer(),
            tools: reading.tools,
            list: Vec::new(),
            is_open: false,
            pending: Vec::new(),
            finish: None,
        }
    }

    /// The blocks so far.
    pub fn list(&self) -> &[Block] {
        &self.list
    }

    /// Why the answer ended; `None` while it goes on.
    pub fn finish(&self) -> Option<&Finish> {
        self.finish.as_ref()
    }

    /// Whether it was cut off.
    pub fn is_cut_off(&self) -> bool {
        self.finish.as_ref().is_none_or(|finish| finish.reason == FinishReason::Length)
    }

    /// Tokens that were reasoning.
    pub fn n_reasoning_tokens(&self) -> usize {
        self.answer.n_reasoning_tokens()
    }

    /// Takes in new output.
    pub fn push(&mut self, delta: &Delta) -> Vec<BlockEvent> {
        let mut events = Vec::new();
        if !self.answer.is_reasoning() {
            self.pending.extend_from_slice(&delta.logprobs);
        }
        let ChunkDelta { role: _, content, reasoning, tool_calls } = self.answer.push(delta);
        if let Some(text) = reasoning {
            // Those of the mark that began it.
            self.pending.clear();
            if !matches!(self.list.last(), Some(Block::Reasoning(_))) {
                self.open(&mut events, Block::Reasoning(String::new()));
            }
            self.grow(&mut events, text);
        }
        if let Some(text) = content {
            if !matches!(self.list.last(), Some(Block::Text { .. })) {
                self.open(&mut events, Block::Text { text: String::new(), logprobs: Vec::new() });
            }
            self.grow(&mut events, text);
        }
        for call in tool_calls {
            self.pending.clear();
            if let (Some(id), Some(name)) = (call.id, call.function.name) {
                self.open(&mut events, Block::Call { id, name, arguments: String::new() });
            }
            self.grow(&mut events, call.function.arguments);
        }
        if let Some(finish) = &delta.finish {
            self.close(&mut events);
            let reason = self.tools.finish_reason(finish.reason, self.answer.n_calls());
            self.finish = Some(Finish { reason, stop_reason: finish.stop_reason.clone() });
        }
        events
    }

    fn open(&mut self, events: &mut Vec<BlockEvent>, block: Block) {
        self.close(events);
        self.is_open = true;
        events.push(BlockEvent::Opened(self.list.len()));
        self.list.push(block);
    }

    fn grow(&mut self, events: &mut Vec<BlockEvent>, new: String) {
        let idx = self.list.len().saturating_sub(1);
        let Some(block) = self.list.last_mut().filter(|_| !new.is_empty()) else { return };
        let mut of_new = Vec::new();
        match block {
            Block::Reasoning(text) | Block::Call { arguments: text, .. } => text.push_str(&new),
            Block::Text { text, logprobs } => {
                text.push_str(&new);
                of_new = std::mem::take(&mut self.pending);
                logprobs.extend_from_slice(&of_new);
            }
        }
        events.push(BlockEvent::Grew(idx, new, of_new));
    }

    fn close(&mut self, events: &mut Vec<BlockEvent>) {
        if std::mem::take(&mut self.is_open) {
            events.push(BlockEvent::Closed(self.list.len() - 1));
        }
    }
}
