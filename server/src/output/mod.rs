//! What a chat model's text means: reasoning, content, tool calls. One file per format, one row here.
//!
//! Parsers take text in any cuts, as it streams in, and give out [`Piece`]s as early as they can be sure of them.

mod call_scanner;
mod forced;
mod hermes;
mod llama3_json;
mod tag;
mod think;

pub use forced::{Named, Required};

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Thoughts, not meant for the user.
    Reasoning(String),
    /// The answer itself.
    Content(String),
    /// A tool call begins: the function's name.
    Call(String),
    /// More of the last call's arguments, as JSON text.
    Arguments(String),
}

/// Takes an answer's text apart.
pub trait Parser: Send {
    /// Takes in more text.
    fn push(&mut self, text: &str, out: &mut Vec<Piece>);
    /// The text has ended.
    fn finish(&mut self, out: &mut Vec<Piece>);
}

/// A format of tool calls.
#[derive(Debug)]
pub struct ToolFormat {
    /// Value of `--tool-call-parser`.
    pub name: &'static str,
    /// A parser for one answer.
    pub parser: fn() -> Box<dyn Parser>,
}

/// Formats of tool calls, sorted by name.
pub const TOOL_FORMATS: &[ToolFormat] = &[hermes::FORMAT, llama3_json::FORMAT];

/// A way to mark reasoning.
#[derive(Debug)]
pub struct ReasoningFormat {
    /// Value of `--reasoning-parser`.
    pub name: &'static str,
    /// Stands before the reasoning part, if the prompt does not end with it already.
    pub start: &'static str,
    /// Stands after it.
    pub end: &'static str,
    /// Whether every answer begins with reasoning, marked or not.
    pub always: bool,
}

/// Ways to mark reasoning, sorted by name.
pub const REASONING_FORMATS: &[ReasoningFormat] = &[
    ReasoningFormat { name: "deepseek_r1", start: "<think>", end: "</think>", always: true },
    ReasoningFormat { name: "qwen3", start: "<think>", end: "</think>", always: false },
];

/// The format of tool calls called `name`.
///
/// # Errors
/// The names that exist.
pub fn tool_format(name: &str) -> Result<&'static ToolFormat, String> {
    let names = || TOOL_FORMATS.iter().map(|format| format.name).collect::<Vec<_>>().join(", ");
    TOOL_FORMATS.iter().find(|format| format.name == name).ok_or_else(|| format!("no parser `{name}`: {}", names()))
}

/// The way to mark reasoning called `name`.
///
/// # Errors
/// The names that exist.
pub fn reasoning_format(name: &str) -> Result<&'static ReasoningFormat, String> {
    let names = || REASONING_FORMATS.iter().map(|format| format.name).collect::<Vec<_>>().join(", ");
    REASONING_FORMATS
        .iter()
        .find(|format| format.name == name)
        .ok_or_else(|| format!("no parser `{name}`: {}", names()))
}

impl ReasoningFormat {
    /// Whether an answer to `prompt` begins within reasoning; `None` if reasoning is over before it begins.
    pub fn begins_inside(&self, prompt: &str) -> Option<bool> {
        match (prompt.rfind(self.start), prompt.rfind(self.end)) {
            (Some(start), end) if end.is_none_or(|end| end < start) => Some(true),
            // A closed part right before the answer says that there is to be none.
            (_, Some(end)) if prompt[end + self.end.len()..].trim().is_empty() => None,
            _ => Some(self.always),
        }
    }
}

/// Everything that is to be taken apart in one answer.
pub struct AnswerParser {
    reasoning: Option<think::Think>,
    calls: Option<Box<dyn Parser>>,
    /// Scratch.
    pieces: Vec<Piece>,
}

impl AnswerParser {
    /// Text is content, but for what the given parsers find in it.
    pub fn new(reasoning: Option<(&'static ReasoningFormat, bool)>, calls: Option<Box<dyn Parser>>) -> Self {
        let reasoning = reasoning.map(|(format, is_inside)| think::Think::new(format, is_inside));
        Self { reasoning, calls, pieces: Vec::new() }
    }

    /// Whether the text so far ends within reasoning.
    pub fn is_reasoning(&self) -> bool {
        self.reasoning.as_ref().is_some_and(think::Think::is_inside)
    }

    /// Takes in more text, the last if `is_end`.
    pub fn push(&mut self, text: &str, is_end: bool) -> Vec<Piece> {
        let mut out = Vec::new();
        match &mut self.reasoning {
            None => self.pieces.push(Piece::Content(text.to_owned())),
            Some(reasoning) => {
                reasoning.push(text, &mut self.pieces);
                if is_end {
                    reasoning.finish(&mut self.pieces);
                }
            }
        }
        for piece in self.pieces.drain(..) {
            match (piece, &mut self.calls) {
                (Piece::Content(text), Some(calls)) => calls.push(&text, &mut out),
                (piece, _) => out.push(piece),
            }
        }
        if is_end && let Some(calls) = &mut self.calls {
            calls.finish(&mut out);
        }
        out.retain(|piece| !matches!(piece, Piece::Content(text) | Piece::Reasoning(text) if text.is_empty()));
        out
    }
}

#[cfg(test)]
mod tests;
