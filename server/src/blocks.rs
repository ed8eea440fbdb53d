//! [`Blocks`]: an answer as a list of thoughts, texts and calls, for endpoints whose wire types are such lists.

use ember_common::{FinishReason, openai::ChunkDelta};
use ember_engine::{Delta, Finish};

use crate::{answer::Answer, chat_request::Reading, tools::ToolPlan};

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Block {
    /// Thoughts.
    Reasoning(String),
    /// Text.
    Text(String),
    /// A tool call; `arguments` is JSON as text.
    #[allow(missing_docs)]
    Call { id: String, name: String, arguments: String },
}

/// What new output did to the block of this number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockEvent {
    /// It began, still empty.
    Opened(usize),
    /// It grew by this text.
    Grew(usize, String),
    /// It is complete.
    Closed(usize),
}

/// One answer as it comes.
pub struct Blocks {
    answer: Answer,
    tools: ToolPlan,
    list: Vec<Block>,
    is_open: bool,
    finish: Option<Finish>,
}

impl Blocks {
    /// An answer that is to be understood like this.
    pub fn new(reading: Reading) -> Self {
        Self { answer: reading.any_answer(), tools: reading.tools, list: Vec::new(), is_open: false, finish: None }
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
        let ChunkDelta { role: _, content, reasoning, tool_calls } = self.answer.push(delta);
        if let Some(text) = reasoning {
            if !matches!(self.list.last(), Some(Block::Reasoning(_))) {
                self.open(&mut events, Block::Reasoning(String::new()));
            }
            self.grow(&mut events, text);
        }
        if let Some(text) = content {
            if !matches!(self.list.last(), Some(Block::Text(_))) {
                self.open(&mut events, Block::Text(String::new()));
            }
            self.grow(&mut events, text);
        }
        for call in tool_calls {
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
        if let Some(Block::Reasoning(text) | Block::Text(text) | Block::Call { arguments: text, .. }) =
            self.list.last_mut().filter(|_| !new.is_empty())
        {
            text.push_str(&new);
            events.push(BlockEvent::Grew(idx, new));
        }
    }

    fn close(&mut self, events: &mut Vec<BlockEvent>) {
        if std::mem::take(&mut self.is_open) {
            events.push(BlockEvent::Closed(self.list.len() - 1));
        }
    }
}
