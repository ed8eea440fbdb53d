//! Owns the DashScope shape: Alibaba Cloud's native text generation API.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Answer, Api, Message, RequestOptions, messages, set};
use crate::Result;
use crate::dataset::Prompt;
use crate::endpoint::Completion;

/// `--api dashscope`.
pub struct DashScope;

impl Api for DashScope {
    fn name(&self) -> &'static str {
        "dashscope"
    }

    fn completion(&self, _token_prompts: bool) -> Completion {
        Completion::Path("/api/v1/services/aigc/text-generation/generation")
    }

    fn headers(&self, stream: bool) -> &'static [(&'static str, &'static str)] {
        if stream { &[("x-dashscope-sse", "enable")] } else { &[] }
    }

    fn body(&self, prompt: &Prompt, request: &RequestOptions<'_>) -> Result<Value> {
        let mut body = match request.template {
            Some(Value::Object(template)) => template.clone(),
            _ => Map::new(),
        };
        set(&mut body, "model", request.model);
        body.insert("input".into(), json!({"messages": messages(prompt)?}));
        let generation = request.generation;
        let mut parameters = Map::new();
        parameters.insert("result_format".into(), "message".into());
        set(&mut parameters, "incremental_output", request.stream.then_some(true));
        set(&mut parameters, "max_tokens", Some(request.max_tokens));
        set(&mut parameters, "temperature", Some(generation.temperature));
        set(&mut parameters, "top_p", generation.top_p);
        set(&mut parameters, "top_k", generation.top_k);
        set(&mut parameters, "frequency_penalty", generation.frequency_penalty);
        set(&mut parameters, "logprobs", generation.logprobs.then_some(true));
        set(&mut parameters, "n", generation.n_choices);
        set(&mut parameters, "seed", generation.seed);
        set(&mut parameters, "stop", (!generation.stop.is_empty()).then(|| generation.stop.clone()));
        parameters.extend(request.extra.clone());
        match body.get_mut("parameters") {
            Some(Value::Object(of_template)) => of_template.extend(parameters),
            _ => set(&mut body, "parameters", Some(parameters)),
        }
        Ok(body.into())
    }

    fn read_message(&self, data: &[u8], answer: &mut Answer) -> Result<Message, String> {
        let wire: Wire<'_> = serde_json::from_slice(data)
            .map_err(|error| format!("not a DashScope message: {error}: {}", super::openai::cut(data)))?;
        let Some(output) = wire.output else {
            let code = wire.code.unwrap_or(Cow::Borrowed("no output in the answer"));
            return Err(format!("{code}: {}", wire.message.unwrap_or_default()));
        };
        if let Some(usage) = wire.usage {
            answer.prompt_tokens = usage.input_tokens.or(answer.prompt_tokens);
            answer.completion_tokens = usage.output_tokens.or(answer.completion_tokens);
        }
        let mut message = Message::default();
        let mut take = |text: Option<Cow<'_, str>>, finish_reason: Option<Cow<'_, str>>| {
            message.has_choices = true;
            if let Some(text) = text {
                message.has_output |= !text.is_empty();
                answer.text.push_str(&text);
            }
            // A stream that goes on says "null", as a string.
            if let Some(reason) = finish_reason.filter(|reason| reason != "null") {
                message.finishes = true;
                answer.finish_reason = Some(reason.into_owned());
            }
        };
        if output.text.is_some() {
            take(output.text, output.finish_reason);
        }
        for choice in output.choices.into_iter().flatten() {
            take(choice.message.and_then(|message| message.content), choice.finish_reason);
        }
        Ok(message)
    }

    fn read_body(&self, body: &[u8], answer: &mut Answer) -> Result<(), String> {
        if self.read_message(body, answer)?.has_choices { Ok(()) } else { Err("the answer has no choices".into()) }
    }
}

#[derive(Deserialize)]
struct Wire<'a> {
    output: Option<Output<'a>>,
    usage: Option<Usage>,
    code: Option<Cow<'a, str>>,
    message: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Output<'a> {
    text: Option<Cow<'a, str>>,
    finish_reason: Option<Cow<'a, str>>,
    choices: Option<Vec<Choice<'a>>>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    message: Option<Content<'a>>,
    finish_reason: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Content<'a> {
    content: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Usage {
    input_tokens: Option<i64>,
    output_tokens: Option<i64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Generation;
    use crate::endpoint::EndpointKind;

    #[test]
    fn parameters_go_apart_from_the_input() {
        let (generation, extra) = (Generation::default(), Map::new());
        let options = RequestOptions {
            model: Some("qwen-plus"),
            kind: EndpointKind::Chat,
            stream: true,
            max_tokens: 9,
            min_tokens: None,
            ignore_eos: false,
            generation: &generation,
            template: None,
            extra: &extra,
        };
        insta::assert_json_snapshot!("dashscope_body", DashScope.body(&Prompt::Text("hi".into()), &options).unwrap());
    }

    #[test]
    fn messages_and_errors_are_read() {
        let mut answer = Answer::default();
        let mut read = |data: &str| DashScope.read_message(data.as_bytes(), &mut answer);
        let first = r#"{"output":{"choices":[{"message":{"content":"你","role":"assistant"},"finish_reason":"null"}]},"usage":{"input_tokens":3,"output_tokens":1}}"#;
        assert_eq!(read(first).unwrap(), Message { has_choices: true, has_output: true, finishes: false });
        assert!(
            read(r#"{"output":{"text":"好","finish_reason":"stop"},"usage":{"input_tokens":3,"output_tokens":2}}"#)
                .unwrap()
                .finishes
        );
        assert_eq!(read(r#"{"code":"InvalidApiKey","message":"bad key"}"#).unwrap_err(), "InvalidApiKey: bad key");
        assert_eq!((answer.text.as_str(), answer.prompt_tokens, answer.completion_tokens), ("你好", Some(3), Some(2)));
    }
}
