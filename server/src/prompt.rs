//! Prompts: from text, token ids or messages to the token ids that the engine gets.

use std::sync::Arc;

use ember_common::openai::SamplingFields;
use ember_engine::text::ChatOptions;
use serde_json::{Map, Value};

use crate::{ApiError, app::App};

/// Texts longer than this many bytes are tokenised on a thread of their own (about a millisecond of work).
const INLINE_BYTES: usize = 8 << 10;
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// How a text becomes tokens.
#[derive(Debug, Clone, Copy)]
pub struct TextEncoding {
    /// Whether the tokenizer adds its own special tokens, such as BOS.
    pub add_special_tokens: bool,
    /// A text that is longer than the context is no error: it will be cut.
    pub will_be_cut: bool,
}

/// A prompt's tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptTokens {
    /// All of them.
    pub ids: Vec<u32>,
    /// How many at the beginning and at the end were added by the tokenizer.
    n_added: (usize, usize),
}

impl PromptTokens {
    /// Tokens that came as such.
    pub fn bare(ids: Vec<u32>) -> Self {
        Self { ids, n_added: (0, 0) }
    }

    /// As many as `keep`, the last ones or the first; what the tokenizer added stays as long as there is room.
    pub fn cut(self, keep: usize, keeps_end: bool) -> Vec<u32> {
        let Self { mut ids, n_added: (n_before, n_after) } = self;
        if ids.len() <= keep {
            return ids;
        }
        // Between what was added.
        let text = n_before..ids.len() - n_after;
        let n_dropped = text.len().min(ids.len() - keep);
        ids.drain(if keeps_end { text.start..text.start + n_dropped } else { text.end - n_dropped..text.end });
        if keeps_end {
            ids.drain(..ids.len().saturating_sub(keep));
        } else {
            ids.truncate(keep);
        }
        ids
    }
}

/// Plain text to token ids.
pub async fn encode(app: Arc<App>, text: String, encoding: TextEncoding) -> Result<PromptTokens, ApiError> {
    run(app, text, encoding, move |app, text| {
        let n_added = if encoding.add_special_tokens { app.backend.n_added_tokens() } else { (0, 0) };
        Ok(PromptTokens { ids: app.backend.encode(text, encoding.add_special_tokens)?, n_added })
    })
    .await
}

/// A rendered conversation to token ids. Templates write the special tokens themselves, so
/// `add_special_tokens` is rarely wanted.
pub async fn encode_chat(app: Arc<App>, text: String, encoding: TextEncoding) -> Result<PromptTokens, ApiError> {
    run(app, text, encoding, move |app, text| {
        let mut ids = if encoding.add_special_tokens { app.backend.encode("", true)? } else { Vec::new() };
        let n_added = (ids.len(), 0);
        ids.extend(app.backend.encode_with_special(text)?);
        Ok(PromptTokens { ids, n_added })
    })
    .await
}

async fn run(
    app: Arc<App>,
    text: String,
    encoding: TextEncoding,
    encode: impl FnOnce(&App, &str) -> Result<PromptTokens, ApiError> + Send + 'static,
) -> Result<PromptTokens, ApiError> {
    if !encoding.will_be_cut {
        check_length(&app, &text)?;
    }
    if text.len() <= INLINE_BYTES {
        return encode(&app, &text);
    }
    tokio::task::spawn_blocking(move || encode(&app, &text))
        .await
        .map_err(|error| ApiError::internal(format!("tokenising failed: {error}")))?
}

/// Refuses texts that cannot fit whatever their tokens are, before any work is spent on them.
fn check_length(app: &App, text: &str) -> Result<(), ApiError> {
    let max_model_len = app.backend.info().max_model_len;
    let max_bytes = max_model_len.saturating_mul(app.max_token_bytes);
    if text.len() > max_bytes {
        return Err(ApiError::invalid(
            "input_text",
            format!(
                "This model's maximum context length is {max_model_len} tokens. However, your prompt contains {} characters, more than that many tokens can stand for. Please reduce the length of the input prompt.",
                text.chars().count()
            ),
        ));
    }
    Ok(())
}

/// Checks that every id is a token.
pub fn check_vocabulary(app: &App, param: &'static str, ids: &[u32]) -> Result<(), ApiError> {
    let vocab_size = app.backend.info().vocab_size;
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => Err(ApiError::invalid(param, format!("Token id {id} is out of vocabulary (size {vocab_size})."))),
        None => Ok(()),
    }
}

/// How many tokens `truncate_prompt_tokens` keeps of a text; `most` for -1.
pub fn kept_tokens(app: &App, asked: i64, most: usize) -> Result<usize, ApiError> {
    let max_model_len = app.backend.info().max_model_len;
    match asked {
        -1 => Ok(most),
        n if n >= 1 && n as usize <= max_model_len => Ok(n as usize),
        _ => Err(ApiError::invalid(
            "truncate_prompt_tokens",
            format!("truncate_prompt_tokens must be -1 or between 1 and max_model_len={max_model_len}."),
        )),
    }
}

/// Whether `truncation_side` leaves a text's end; `default` if it is not set.
pub fn keeps_end(side: Option<&str>, default: bool) -> Result<bool, ApiError> {
    match side {
        None => Ok(default),
        Some("left") => Ok(true),
        Some("right") => Ok(false),
        Some(_) => Err(ApiError::invalid("truncation_side", "truncation_side must be `left` or `right`.")),
    }
}

/// Truncates the prompt if the request says so, and checks that it leaves room for output.
pub fn fit(
    app: &App,
    tokens: PromptTokens,
    fields: &SamplingFields,
    max_tokens: Option<u32>,
) -> Result<Vec<u32>, ApiError> {
    let max_model_len = app.backend.info().max_model_len;
    let keeps_end = keeps_end(fields.truncation_side.as_deref(), true)?;
    let ids = match fields.truncate_prompt_tokens {
        Some(asked) => tokens.cut(kept_tokens(app, asked, max_model_len - 1)?, keeps_end),
        None => tokens.ids,
    };
    if ids.is_empty() {
        return Err(ApiError::invalid("prompt", "The prompt is empty: it has no tokens."));
    }
    if ids.len() > max_model_len {
        let asked = max_tokens.map_or_else(String::new, |n| format!("you requested {n} output tokens and "));
        return Err(ApiError::invalid(
            "input_tokens",
            format!(
                "This model's maximum context length is {max_model_len} tokens. However, {asked}your prompt contains {} input tokens. Please reduce the length of the input prompt or the number of requested output tokens.",
                ids.len()
            ),
        ));
    }
    if ids.len() == max_model_len {
        return Err(ApiError::invalid("max_tokens", "max_tokens must be at least 1, got 0."));
    }
    Ok(ids)
}

/// A conversation and how to render it.
pub struct Chat {
    /// As sent.
    pub messages: Vec<Value>,
    /// Tool definitions.
    pub tools: Option<Vec<Value>>,
    /// Documents for retrieval templates.
    pub documents: Option<Vec<Value>>,
    /// Extra variables of the template.
    pub kwargs: Map<String, Value>,
    /// End with the assistant's header; default true unless the last message is continued.
    pub add_generation_prompt: Option<bool>,
    /// Leave the last message open.
    pub continue_final_message: Option<bool>,
}

impl Chat {
    /// The conversation as text.
    pub fn render(mut self, app: &App) -> Result<String, ApiError> {
        if self.messages.is_empty() {
            return Err(ApiError::invalid("messages", "messages must have at least one message."));
        }
        for (idx, message) in self.messages.iter_mut().enumerate() {
            normalize(idx, message)?;
        }
        let continue_final_message = self.continue_final_message.unwrap_or(false);
        if continue_final_message && self.add_generation_prompt == Some(true) {
            return Err(ApiError::invalid(
                "continue_final_message",
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
            ));
        }
        let options = ChatOptions {
            add_generation_prompt: self.add_generation_prompt.unwrap_or(!continue_final_message),
            continue_final_message,
            tools: self.tools.as_deref(),
            documents: self.documents.as_deref(),
            kwargs: (!self.kwargs.is_empty()).then_some(&self.kwargs),
        };
        Ok(app.backend.render_chat(&self.messages, &options)?)
    }
}

/// Checks one message and brings it to the form that templates expect: text parts joined to one
/// string, no content as an empty one, tool-call arguments as objects, `reasoning` under its current name.
fn normalize(idx: usize, message: &mut Value) -> Result<(), ApiError> {
    let at = |field: &str| format!("messages.{idx}{field}");
    let Value::Object(message) = message else {
        return Err(ApiError::schema(&at(""), "expected an object with `role` and `content`"));
    };
    let role = match message.get("role") {
        Some(Value::String(role)) => role.clone(),
        Some(_) => return Err(ApiError::schema(&at(".role"), "expected a string")),
        None => return Err(ApiError::schema(&at(".role"), "missing field `role`")),
    };
    if !ROLES.contains(&role.as_str()) {
        return Err(ApiError::schema(&at(".role"), format!("unknown role `{role}`, expected one of {ROLES:?}")));
    }
    match message.get_mut("content") {
        Some(content @ Value::Array(_)) => *content = Value::String(joined_text(idx, content)?),
        Some(Value::String(_)) => {}
        // Beside tool calls; templates join contents as texts.
        None | Some(Value::Null) if role == "assistant" => {
            message.insert("content".into(), Value::String(String::new()));
        }
        None | Some(Value::Null) => {
            return Err(ApiError::schema(&at(".content"), "missing field `content`"));
        }
        Some(_) => {
            return Err(ApiError::schema(&at(".content"), "expected a string or a list of parts"));
        }
    }
    if let Some(reasoning) = message.remove("reasoning_content") {
        message.entry("reasoning").or_insert(reasoning);
    }
    let tool_calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in tool_calls.into_iter().flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments")
            && let Some(text) = arguments.as_str()
        {
            *arguments = serde_json::from_str(text).map_err(|error| {
                ApiError::schema(&at(".tool_calls"), format!("function.arguments is not JSON: {error}"))
            })?;
        }
    }
    Ok(())
}

fn joined_text(idx: usize, content: &Value) -> Result<String, ApiError> {
    let mut texts = Vec::new();
    for (part_idx, part) in content.as_array().into_iter().flatten().enumerate() {
        let at = format!("messages.{idx}.content.{part_idx}");
        match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
            (Some("text" | "input_text"), Some(text)) => texts.push(text),
            (Some("text" | "input_text"), None) => {
                return Err(ApiError::schema(&at, "missing field `text`"));
            }
            (Some(kind), _) => {
                return Err(ApiError::invalid(
                    "messages",
                    format!("{at}: this model does not take content parts of type `{kind}`, only `text`."),
                ));
            }
            (None, _) => return Err(ApiError::schema(&at, "expected a part with `type`")),
        }
    }
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(mut message: Value, expected: Result<Value, &str>) {
        let got = normalize(0, &mut message);
        match (got, expected) {
            (Ok(()), Ok(expected)) => assert_eq!(message, expected),
            (Err(error), Err(expected)) => {
                assert!(error.message.contains(expected), "{}", error.message)
            }
            (got, expected) => panic!("{message}: {got:?} instead of {expected:?}"),
        }
    }

    #[test]
    fn what_the_tokenizer_added_is_cut_last() {
        let cut = |n_added, keep, keeps_end| PromptTokens { ids: vec![1, 2, 3, 4], n_added }.cut(keep, keeps_end);
        assert_eq!([cut((0, 0), 9, false), cut((1, 1), 4, true)], [vec![1, 2, 3, 4], vec![1, 2, 3, 4]]);
        assert_eq!([cut((0, 0), 2, false), cut((0, 0), 2, true)], [vec![1, 2], vec![3, 4]]);
        assert_eq!([cut((1, 1), 3, false), cut((1, 1), 3, true)], [vec![1, 2, 4], vec![1, 3, 4]]);
        assert_eq!([cut((1, 0), 2, false), cut((1, 0), 2, true)], [vec![1, 2], vec![1, 4]]);
        assert_eq!([cut((1, 1), 2, false), cut((1, 1), 1, false)], [vec![1, 4], vec![1]]);
        assert_eq!([cut((1, 1), 1, true), cut((4, 0), 2, true)], [vec![4], vec![3, 4]]);
    }

    #[test]
    fn messages_take_the_form_that_templates_expect() {
        check(json!({"role": "user", "content": "hi"}), Ok(json!({"role": "user", "content": "hi"})));
        check(
            json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
            Ok(json!({"role": "user", "content": "a\nb"})),
        );
        check(
            json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{\"x\":1}"}}]}),
            Ok(json!({
                "role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]
            })),
        );
        check(
            json!({"role": "assistant", "content": "x", "reasoning_content": "r"}),
            Ok(json!({"role": "assistant", "content": "x", "reasoning": "r"})),
        );
        check(json!({"role": "user", "content": [{"type": "image_url"}]}), Err("type `image_url`"));
        check(json!({"role": "wizard", "content": "x"}), Err("unknown role `wizard`"));
        check(json!({"role": "user"}), Err("body.messages.0.content"));
        check(json!("hi"), Err("body.messages.0"));
    }
}
