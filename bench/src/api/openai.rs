//! Owns the OpenAI shape: `/v1/chat/completions` and `/v1/completions`.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::{Answer, Api, Message, RequestOptions, messages, set};
use crate::dataset::Prompt;
use crate::endpoint::{Completion, EndpointKind};
use crate::{Error, Result};

/// `--api openai`.
pub struct OpenAi;

impl Api for OpenAi {
    fn name(&self) -> &'static str {
        "openai"
    }

    fn completion(&self, token_prompts: bool) -> Completion {
        if token_prompts { Completion::Completions } else { Completion::Chat }
    }

    fn body(&self, prompt: &Prompt, request: &RequestOptions<'_>) -> Result<Value> {
        let mut body = match request.template {
            Some(Value::Object(template)) => template.clone(),
            _ => Map::new(),
        };
        set(&mut body, "model", request.model);
        let chat = request.kind == EndpointKind::Chat;
        match (prompt, chat) {
            (Prompt::Body(_), _) => {}
            (prompt, true) => set(&mut body, "messages", Some(messages(prompt)?)),
            (Prompt::Text(text), false) => set(&mut body, "prompt", Some(text.as_str())),
            (Prompt::TokenIds(ids), false) => set(&mut body, "prompt", Some(ids.as_slice())),
            (Prompt::Messages(_), false) => {
                return Err(Error::flag(
                    "--url",
                    "the dataset has chat messages; give a /v1/chat/completions endpoint",
                ));
            }
        }
        let generation = request.generation;
        set(&mut body, "max_tokens", Some(request.max_tokens));
        set(&mut body, "min_tokens", request.min_tokens);
        set(&mut body, "ignore_eos", request.ignore_eos.then_some(true));
        set(&mut body, "temperature", Some(generation.temperature));
        set(&mut body, "top_p", generation.top_p);
        set(&mut body, "top_k", generation.top_k);
        set(&mut body, "frequency_penalty", generation.frequency_penalty);
        let logprobs = if chat { json!(true) } else { json!(1) };
        set(&mut body, "logprobs", generation.logprobs.then_some(logprobs));
        set(&mut body, "n", generation.n_choices);
        set(&mut body, "seed", generation.seed);
        set(&mut body, "stop", (!generation.stop.is_empty()).then(|| generation.stop.clone()));
        let stop_ids = &generation.stop_token_ids;
        set(&mut body, "stop_token_ids", (!stop_ids.is_empty()).then(|| stop_ids.clone()));
        set(&mut body, "stream", Some(request.stream));
        if request.stream {
            body.insert("stream_options".into(), json!({"include_usage": true}));
        }
        body.extend(request.extra.clone());
        if let Prompt::Body(whole) = prompt {
            body.extend(whole.clone());
        }
        Ok(body.into())
    }

    fn read_message(&self, data: &[u8], answer: &mut Answer) -> Result<Message, String> {
        let wire: Wire<'_> = serde_json::from_slice(data)
            .map_err(|error| format!("not an OpenAI message: {error}: {}", super::openai::cut(data)))?;
        wire.read(answer)
    }

    fn read_body(&self, body: &[u8], answer: &mut Answer) -> Result<(), String> {
        if self.read_message(body, answer)?.has_choices { Ok(()) } else { Err("the answer has no choices".into()) }
    }
}

/// The start of a payload, for an error message.
pub(super) fn cut(data: &[u8]) -> String {
    String::from_utf8_lossy(&data[..data.len().min(120)]).into_owned()
}

/// A string that borrows from the payload unless it has escapes.
#[derive(Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// A streamed message or a whole answer; only what is measured is read.
#[derive(Deserialize)]
struct Wire<'a> {
    #[serde(borrow)]
    choices: Option<Vec<Choice<'a>>>,
    usage: Option<Usage>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow, alias = "message")]
    delta: Option<Delta<'a>>,
    #[serde(borrow)]
    text: Option<Text<'a>>,
    #[serde(borrow)]
    finish_reason: Option<Text<'a>>,
    token_ids: Option<Vec<IgnoredAny>>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<Text<'a>>,
    #[serde(borrow)]
    reasoning: Option<Text<'a>>,
    #[serde(borrow)]
    reasoning_content: Option<Text<'a>>,
    #[serde(borrow)]
    tool_calls: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: Option<i64>,
    completion_tokens: Option<i64>,
    prompt_tokens_details: Option<PromptTokensDetails>,
}

#[derive(Deserialize)]
struct PromptTokensDetails {
    cached_tokens: Option<i64>,
}

impl Wire<'_> {
    fn read(self, answer: &mut Answer) -> Result<Message, String> {
        if let Some(error) = self.error {
            return Err(error_text(error.get()));
        }
        if let Some(usage) = self.usage {
            answer.prompt_tokens = usage.prompt_tokens.or(answer.prompt_tokens);
            answer.completion_tokens = usage.completion_tokens.or(answer.completion_tokens);
            let details = usage.prompt_tokens_details;
            answer.cached_tokens = details.and_then(|details| details.cached_tokens).or(answer.cached_tokens);
        }
        let mut message = Message::default();
        for choice in self.choices.into_iter().flatten() {
            message.has_choices = true;
            message.has_output |= choice.token_ids.is_some_and(|ids| !ids.is_empty());
            let mut output = |text: &str| {
                message.has_output |= !text.is_empty();
                answer.text.push_str(text);
            };
            if let Some(delta) = &choice.delta {
                // vLLM says `reasoning`, older servers `reasoning_content`, some send both with the same text.
                let reasoning = delta.reasoning.as_ref().or(delta.reasoning_content.as_ref());
                reasoning.inspect(|text| output(&text.0));
                delta.content.as_ref().inspect(|text| output(&text.0));
                let calls = delta.tool_calls.map(RawValue::get).filter(|calls| *calls != "[]");
                calls.inspect(|calls| output(calls));
            }
            choice.text.as_ref().inspect(|text| output(&text.0));
            if let Some(reason) = choice.finish_reason {
                message.finishes = true;
                answer.finish_reason = Some(reason.0.into_owned());
            }
        }
        Ok(message)
    }
}

/// The message of an error object, or the error as it is.
pub(crate) fn error_text(error: &str) -> String {
    let value: Value = match serde_json::from_str(error) {
        Ok(value) => value,
        Err(_) => return error.trim().chars().take(300).collect(),
    };
    let inner = value.get("error").filter(|inner| !inner.is_null()).unwrap_or(&value);
    let text = match inner.get("message").unwrap_or(inner) {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    text.chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Generation;

    fn read(data: &str) -> (Result<Message, String>, Answer) {
        let mut answer = Answer::default();
        (OpenAi.read_message(data.as_bytes(), &mut answer), answer)
    }

    #[test]
    fn messages_of_servers_are_read() {
        let check = |data: &str, has_output: bool, text: &str| {
            let (message, answer) = read(data);
            let message = message.unwrap();
            assert_eq!(
                (message.has_choices, message.has_output, answer.text.as_str()),
                (true, has_output, text),
                "{data}"
            );
        };
        check(r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#, false, "");
        check(r#"{"choices":[{"index":0,"delta":{"content":"a\n你"},"logprobs":null}]}"#, true, "a\n你");
        check(r#"{"choices":[{"delta":{"reasoning":"hm","reasoning_content":"hm"}}]}"#, true, "hm");
        check(r#"{"choices":[{"delta":{"tool_calls":[{"id":"x"}]}}]}"#, true, r#"[{"id":"x"}]"#);
        check(r#"{"choices":[{"delta":{"content":null,"tool_calls":[]}}]}"#, false, "");
        check(r#"{"choices":[{"text":" b","index":0}]}"#, true, " b");
        check(r#"{"choices":[{"text":"","token_ids":[5]}]}"#, true, "");
    }

    #[test]
    fn usage_and_the_end_are_read() {
        let usage = r#"{"choices":[],"usage":{"prompt_tokens":5,"total_tokens":8,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}"#;
        let (message, answer) = read(usage);
        assert_eq!(message.unwrap(), Message::default());
        assert_eq!((answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens), (Some(5), Some(3), Some(4)));
        let (message, answer) = read(r#"{"choices":[{"delta":{},"finish_reason":"length"}],"usage":null}"#);
        assert!(message.unwrap().finishes);
        assert_eq!(answer.finish_reason.as_deref(), Some("length"));
    }

    #[test]
    fn errors_are_failures() {
        assert_eq!(read(r#"{"error":{"message":"no room","code":500}}"#).0.unwrap_err(), "no room");
        assert_eq!(read(r#"{"error":"model not loaded"}"#).0.unwrap_err(), "model not loaded");
        assert!(read("<html>").0.unwrap_err().starts_with("not an OpenAI message"));
        assert_eq!(OpenAi.read_body(b"{}", &mut Answer::default()).unwrap_err(), "the answer has no choices");
    }

    #[test]
    fn bodies_carry_every_flag_that_is_set() {
        let generation = Generation {
            temperature: 0.5,
            top_p: Some(0.9),
            top_k: Some(40),
            frequency_penalty: Some(0.1),
            logprobs: true,
            n_choices: Some(2),
            seed: Some(7),
            stop: vec!["END".into()],
            stop_token_ids: vec![2],
        };
        let extra = json!({"temperature": 1.0}).as_object().unwrap().clone();
        let template = json!({"messages": [], "user": "me"});
        let mut options = RequestOptions {
            model: Some("m"),
            kind: EndpointKind::Chat,
            stream: true,
            max_tokens: 9,
            min_tokens: Some(3),
            ignore_eos: true,
            generation: &generation,
            template: Some(&template),
            extra: &extra,
        };
        let prompt = Prompt::Text("hi".into());
        insta::assert_json_snapshot!("chat_body", OpenAi.body(&prompt, &options).unwrap());
        (options.kind, options.stream, options.template) = (EndpointKind::Completions, false, None);
        insta::assert_json_snapshot!("completions_body", OpenAi.body(&Prompt::TokenIds(vec![1, 2]), &options).unwrap());
        let whole = Prompt::Body(json!({"model": "mine", "prompt": "x"}).as_object().unwrap().clone());
        assert_eq!(OpenAi.body(&whole, &options).unwrap()["model"], "mine");
        options.kind = EndpointKind::Chat;
        let message = OpenAi.body(&Prompt::TokenIds(vec![1]), &options).unwrap_err().to_string();
        assert!(message.contains("/v1/completions"), "{message}");
    }
}
