//! Events of `/v1/messages`.

use std::sync::Arc;

use ember_common::{
    FinishReason,
    anthropic::{BlockDelta, ContentBlock, Message, MessageEnd, MessageEvent},
    openai::Usage,
};
use ember_engine::{Delta, PromptEvent, StopReason};
use serde_json::{Value, json};

use super::{ChunkWriter, Frames, UsageMeter};
use crate::{
    ApiError,
    app::App,
    blocks::{Block, BlockEvent, Blocks},
};

/// Writes the events of a message.
pub struct MessageFrames {
    /// Shared state.
    pub app: Arc<App>,
    /// The message before it has content.
    pub message: Message,
    /// The content so far.
    pub blocks: Blocks,
    /// Whether `message_start` was sent.
    pub is_started: bool,
}

impl MessageFrames {
    /// The message at its end.
    pub fn finished(&self, usage: Usage) -> Message {
        let MessageEnd { stop_reason, stop_sequence } = self.end_of_message();
        let content = self.blocks.list().iter().cloned().map(|block| match block {
            Block::Reasoning(thinking) => ContentBlock::Thinking { thinking, signature: String::new() },
            Block::Text { text, .. } => ContentBlock::Text { text },
            Block::Call { id, name, arguments } => {
                // Arguments that were cut off are no JSON; the stop reason says so.
                let input = serde_json::from_str(&arguments).ok().filter(Value::is_object).unwrap_or_else(|| json!({}));
                ContentBlock::ToolUse { id, name, input }
            }
        });
        let content = content.collect();
        Message { content, stop_reason, stop_sequence, usage: usage.into(), ..self.message.clone() }
    }

    fn end_of_message(&self) -> MessageEnd {
        let has_calls = self.blocks.list().iter().any(|block| matches!(block, Block::Call { .. }));
        let (reason, stop_sequence) = match self.blocks.finish().map(|finish| (finish.reason, &finish.stop_reason)) {
            None | Some((FinishReason::Length, _)) => ("max_tokens", None),
            Some((_, Some(StopReason::Text(text)))) => ("stop_sequence", Some(text.clone())),
            Some(_) if has_calls => ("tool_use", None),
            Some(_) => ("end_turn", None),
        };
        MessageEnd { stop_reason: Some(reason.into()), stop_sequence }
    }
}

fn event(writer: &mut ChunkWriter, event: &MessageEvent) {
    writer.event(event.name(), event);
}

impl Frames for MessageFrames {
    fn prompt(&mut self, _: usize, _: PromptEvent) {}

    fn delta(&mut self, writer: &mut ChunkWriter, usage: &UsageMeter, delta: Delta) {
        if !std::mem::replace(&mut self.is_started, true) {
            let usage = Usage { completion_tokens: 0, ..usage.total() }.into();
            event(writer, &MessageEvent::MessageStart { message: Message { usage, ..self.message.clone() } });
        }
        for change in self.blocks.push(&delta) {
            let blocks = self.blocks.list();
            let change = match change {
                BlockEvent::Opened(index) => MessageEvent::ContentBlockStart {
                    index,
                    content_block: match &blocks[index] {
                        Block::Reasoning(_) => {
                            ContentBlock::Thinking { thinking: String::new(), signature: String::new() }
                        }
                        Block::Text { .. } => ContentBlock::Text { text: String::new() },
                        Block::Call { id, name, .. } => {
                            ContentBlock::ToolUse { id: id.clone(), name: name.clone(), input: json!({}) }
                        }
                    },
                },
                BlockEvent::Grew(index, new, _) => MessageEvent::ContentBlockDelta {
                    index,
                    delta: match &blocks[index] {
                        Block::Reasoning(_) => BlockDelta::ThinkingDelta { thinking: new },
                        Block::Text { .. } => BlockDelta::TextDelta { text: new },
                        Block::Call { .. } => BlockDelta::InputJsonDelta { partial_json: new },
                    },
                },
                BlockEvent::Closed(index) => MessageEvent::ContentBlockStop { index },
            };
            event(writer, &change);
        }
    }

    fn n_reasoning_tokens(&self) -> Option<usize> {
        self.app.config.reasoning_parser.map(|_| self.blocks.n_reasoning_tokens())
    }

    fn system_fingerprint(&self) -> &str {
        &self.app.system_fingerprint
    }

    fn end(&mut self, writer: &mut ChunkWriter, usage: &UsageMeter) {
        let end = MessageEvent::MessageDelta { delta: self.end_of_message(), usage: usage.total().into() };
        event(writer, &end);
        event(writer, &MessageEvent::MessageStop);
    }

    fn error(&mut self, writer: &mut ChunkWriter, error: &ApiError) {
        event(writer, &MessageEvent::Error { error: error.to_anthropic() });
    }
}
