//! Owns the custom shape: the user's `--query-template` as the body, answers read like OpenAI's.

use serde_json::Value;

use super::openai::OpenAi;
use super::{Answer, Api, Message, RequestOptions};
use crate::dataset::Prompt;
use crate::endpoint::Completion;
use crate::{Error, Result};

/// `--api custom`: `%p` in the template's strings stands for the prompt and `%m` for the model.
pub struct Custom;

impl Api for Custom {
    fn name(&self) -> &'static str {
        "custom"
    }

    fn completion(&self, _token_prompts: bool) -> Completion {
        Completion::Path("/")
    }

    fn body(&self, prompt: &Prompt, request: &RequestOptions<'_>) -> Result<Value> {
        let Some(template) = request.template else {
            return Err(Error::flag("--query-template", "--api custom needs it: a JSON body with %p for the prompt"));
        };
        let mut body = template.clone();
        let whole = match prompt {
            Prompt::Text(text) => Value::from(text.as_str()),
            Prompt::Messages(messages) => messages.clone(),
            Prompt::TokenIds(ids) => Value::from(ids.as_slice()),
            Prompt::Body(body) => Value::Object(body.clone()),
        };
        fill(&mut body, &whole, request.model.unwrap_or_default());
        if let Value::Object(body) = &mut body {
            body.extend(request.extra.clone());
        }
        Ok(body)
    }

    fn read_message(&self, data: &[u8], answer: &mut Answer) -> Result<Message, String> {
        OpenAi.read_message(data, answer)
    }

    fn read_body(&self, body: &[u8], answer: &mut Answer) -> Result<(), String> {
        OpenAi.read_body(body, answer)
    }
}

/// Replaces `%p` and `%m`. A string that is only `%p` becomes the prompt's JSON (messages and token ids too).
fn fill(value: &mut Value, prompt: &Value, model: &str) {
    match value {
        Value::String(text) if text == "%p" => *value = prompt.clone(),
        Value::String(text) => {
            if text.contains("%m") {
                *text = text.replace("%m", model);
            }
            if text.contains("%p") {
                *text = text.replace("%p", &prompt.as_str().map_or_else(|| prompt.to_string(), str::to_owned));
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| fill(value, prompt, model)),
        Value::Object(values) => values.values_mut().for_each(|value| fill(value, prompt, model)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;
    use crate::api::Generation;
    use crate::endpoint::EndpointKind;

    #[test]
    fn the_template_is_filled_and_otherwise_left_alone() {
        let (generation, extra) = (Generation::default(), Map::new());
        let template = json!({"m": "%m", "input": ["Q: %p\nA:", "%p"], "k": 3});
        let mut options = RequestOptions {
            model: Some("mine"),
            kind: EndpointKind::Chat,
            stream: false,
            max_tokens: 9,
            min_tokens: None,
            ignore_eos: false,
            generation: &generation,
            template: Some(&template),
            extra: &extra,
        };
        let body = Custom.body(&Prompt::Text("hi \"%m\"".into()), &options).unwrap();
        assert_eq!(body, json!({"m": "mine", "input": ["Q: hi \"%m\"\nA:", "hi \"%m\""], "k": 3}));
        options.template = None;
        let message = Custom.body(&Prompt::Text("hi".into()), &options).unwrap_err().to_string();
        assert!(message.starts_with("--query-template: "), "{message}");
    }
}
