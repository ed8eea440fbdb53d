//! Owns the table of request and answer shapes, and what they have in common. One file per shape.

mod custom;
mod dashscope;
pub(crate) mod openai;

use serde_json::{Map, Value, json};

use crate::dataset::Prompt;
use crate::endpoint::{Completion, EndpointKind};
use crate::{Error, Result};

/// Every shape that `--api` knows, by name.
pub const TABLE: &[&dyn Api] = &[&custom::Custom, &dashscope::DashScope, &openai::OpenAi];

/// A shape of requests and answers.
pub trait Api: Sync + Send {
    /// Value of `--api`.
    fn name(&self) -> &'static str;

    /// How `--url` is completed; `token_prompts`: the dataset sends token ids.
    fn completion(&self, token_prompts: bool) -> Completion;

    /// Headers of its own; `stream`: the answer shall be streamed.
    fn headers(&self, stream: bool) -> &'static [(&'static str, &'static str)] {
        let _ = stream;
        &[]
    }

    /// The request body.
    ///
    /// # Errors
    /// If the prompt or a flag cannot be expressed in this shape; the error names the flag.
    fn body(&self, prompt: &Prompt, request: &RequestOptions<'_>) -> Result<Value>;

    /// Reads one message of a streamed answer.
    ///
    /// # Errors
    /// The failure as text, if the message is an error or not of this shape.
    fn read_message(&self, data: &[u8], answer: &mut Answer) -> Result<Message, String>;

    /// Reads a whole answer.
    ///
    /// # Errors
    /// The failure as text, if the answer is an error or not of this shape.
    fn read_body(&self, body: &[u8], answer: &mut Answer) -> Result<(), String>;
}

/// The shape called `name`.
///
/// # Errors
/// If there is none: the error lists those that exist.
pub fn find(name: &str) -> Result<&'static dyn Api> {
    TABLE.iter().copied().find(|api| api.name() == name).ok_or_else(|| {
        let names: Vec<&str> = TABLE.iter().map(|api| api.name()).collect();
        Error::flag("--api", format!("no API {name:?}; there are {}", names.join(", ")))
    })
}

/// What the flags say about the generation of answers.
#[derive(Debug, Clone, Default)]
pub struct Generation {
    pub temperature: f64,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub frequency_penalty: Option<f64>,
    pub logprobs: bool,
    pub n_choices: Option<u32>,
    pub seed: Option<i64>,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
}

/// Everything but the prompt that a request body is built from.
#[derive(Debug, Clone, Copy)]
pub struct RequestOptions<'a> {
    pub model: Option<&'a str>,
    pub kind: EndpointKind,
    pub stream: bool,
    pub max_tokens: u32,
    pub min_tokens: Option<u32>,
    pub ignore_eos: bool,
    pub generation: &'a Generation,
    /// Body to start from.
    pub template: Option<&'a Value>,
    /// Fields laid over the body last.
    pub extra: &'a Map<String, Value>,
}

/// What an answer has said so far.
#[derive(Debug, Default)]
pub struct Answer {
    pub text: String,
    pub finish_reason: Option<String>,
    pub prompt_tokens: Option<i64>,
    pub completion_tokens: Option<i64>,
    pub cached_tokens: Option<i64>,
}

/// What one message of a stream was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Message {
    /// It had non-empty `choices`.
    pub has_choices: bool,
    /// It carried text, reasoning, a tool call or token ids.
    pub has_output: bool,
    /// It gave the reason why the answer ends.
    pub finishes: bool,
}

/// The prompt as chat messages.
fn messages(prompt: &Prompt) -> Result<Value> {
    match prompt {
        Prompt::Text(text) => Ok(json!([{"role": "user", "content": text}])),
        Prompt::Messages(messages) => Ok(messages.clone()),
        Prompt::TokenIds(_) => Err(Error::flag(
            "--url",
            "this dataset sends token ids, which only a /v1/completions endpoint takes; give that, or a bare host",
        )),
        Prompt::Body(_) => Err(Error::flag("--dataset", "whole request bodies need --api openai")),
    }
}

fn set(body: &mut Map<String, Value>, key: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        body.insert(key.into(), value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sorted_and_unique() {
        assert!(TABLE.windows(2).all(|pair| pair[0].name() < pair[1].name()));
        assert!(find("grpc").err().unwrap().to_string().contains("custom, dashscope, openai"));
    }
}
