//! [`Answer`]: one choice of a chat answer, taken apart into what goes on the wire.

use ember_common::openai::{ChatMessage, ChunkDelta, FunctionCall, FunctionCallDelta, ToolCall, ToolCallDelta};
use ember_engine::Delta;

use crate::output::{AnswerParser, Piece};

/// One choice as it comes.
pub struct Answer {
    parser: AnswerParser,
    /// Whether calls after the first count.
    is_parallel: bool,
    shows_reasoning: bool,
    /// Calls so far, those that do not count included.
    n_calls: usize,
    n_reasoning_tokens: usize,
}

impl Answer {
    /// An answer that `parser` takes apart.
    pub fn new(parser: AnswerParser, is_parallel: bool, shows_reasoning: bool) -> Self {
        Self { parser, is_parallel, shows_reasoning, n_calls: 0, n_reasoning_tokens: 0 }
    }

    /// Calls that were given out.
    pub fn n_calls(&self) -> usize {
        if self.is_parallel { self.n_calls } else { self.n_calls.min(1) }
    }

    /// Whether what comes next is reasoning, as far as one knows.
    pub fn is_reasoning(&self) -> bool {
        self.parser.is_reasoning()
    }

    /// Tokens that were reasoning.
    pub fn n_reasoning_tokens(&self) -> usize {
        self.n_reasoning_tokens
    }

    /// Takes in new output; all fields of what comes back may be empty.
    pub fn push(&mut self, delta: &Delta) -> ChunkDelta {
        if self.parser.is_reasoning() {
            self.n_reasoning_tokens += delta.token_ids.len();
        }
        let mut out = ChunkDelta::default();
        for piece in self.parser.push(&delta.text, delta.finish.is_some()) {
            match piece {
                Piece::Content(text) => out.content.get_or_insert_default().push_str(&text),
                Piece::Reasoning(text) if self.shows_reasoning => {
                    out.reasoning.get_or_insert_default().push_str(&text);
                }
                Piece::Reasoning(_) => {}
                Piece::Call(name) => {
                    self.n_calls += 1;
                    if self.is_current_call_shown() {
                        out.tool_calls.push(self.head(name));
                    }
                }
                Piece::Arguments(text) if self.is_current_call_shown() => self.arguments(&mut out, &text),
                Piece::Arguments(_) => {}
            }
        }
        out
    }

    fn is_current_call_shown(&self) -> bool {
        self.is_parallel || self.n_calls == 1
    }

    fn head(&self, name: String) -> ToolCallDelta {
        ToolCallDelta {
            id: Some(format!("chatcmpl-tool-{}", uuid::Uuid::new_v4().simple())),
            kind: Some("function".into()),
            index: self.n_calls - 1,
            function: FunctionCallDelta { name: Some(name), arguments: String::new() },
        }
    }

    fn arguments(&self, out: &mut ChunkDelta, text: &str) {
        let index = self.n_calls - 1;
        match out.tool_calls.last_mut() {
            Some(call) if call.index == index => call.function.arguments.push_str(text),
            _ => out.tool_calls.push(ToolCallDelta {
                index,
                function: FunctionCallDelta { name: None, arguments: text.to_owned() },
                ..ToolCallDelta::default()
            }),
        }
    }
}

/// A message put together from its parts.
#[derive(Default)]
pub struct MessageBuilder {
    content: Option<String>,
    reasoning: Option<String>,
    tool_calls: Vec<ToolCall>,
}

impl MessageBuilder {
    /// Appends what [`Answer::push`] gave out.
    pub fn append(&mut self, delta: ChunkDelta) {
        let ChunkDelta { role: _, content, reasoning, tool_calls } = delta;
        for (whole, new) in [(&mut self.content, content), (&mut self.reasoning, reasoning)] {
            if let Some(new) = new {
                whole.get_or_insert_default().push_str(&new);
            }
        }
        for call in tool_calls {
            match self.tool_calls.get_mut(call.index) {
                Some(known) => known.function.arguments.push_str(&call.function.arguments),
                None => self.tool_calls.push(ToolCall {
                    id: call.id.unwrap_or_default(),
                    kind: call.kind.unwrap_or_default(),
                    function: FunctionCall {
                        name: call.function.name.unwrap_or_default(),
                        arguments: call.function.arguments,
                    },
                }),
            }
        }
    }

    /// The message; its content is null if there is other output instead.
    pub fn into_message(self) -> ChatMessage {
        let is_all = self.tool_calls.is_empty() && self.reasoning.is_none();
        ChatMessage {
            content: self.content.or(is_all.then(String::new)),
            reasoning: self.reasoning,
            tool_calls: self.tool_calls,
            ..ChatMessage::assistant(String::new())
        }
    }
}
