//! [`ChatTemplate`]: renders a conversation as the prompt that the model was trained on.
//!
//! Templates are Jinja2 as Hugging Face transformers runs it (`apply_chat_template`): blocks are trimmed, loop
//! controls are on, and `raise_exception`, `strftime_now` and a plain `tojson` are there.

use std::path::Path;

use minijinja::{Environment, ErrorKind, Value as JinjaValue, value::Serde};
use serde_json::Value;

use super::{Tokenizer, tojson::tojson, tokenizer::read_json};
use crate::{Error, weights::gguf::Gguf};

/// Marks where the last message's text ends, to be cut off there (as transformers does).
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// Instructions a template may run: far above any real conversation, so that a broken template ends.
const FUEL: u64 = 50_000_000;

/// A model's chat template, or its several named ones.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Source of the default template.
    source: String,
}

/// What a template sees beside the messages.
#[derive(Debug, Clone, Default)]
pub struct ChatOptions<'a> {
    /// End with the assistant's header.
    pub add_generation_prompt: bool,
    /// Leave the last message open so that it is continued.
    pub continue_final_message: bool,
    /// Tool definitions in OpenAI's shape.
    pub tools: Option<&'a [Value]>,
    /// Documents (`[{title, text}]`) for retrieval templates.
    pub documents: Option<&'a [Value]>,
    /// Extra variables (`chat_template_kwargs`).
    pub kwargs: Option<&'a serde_json::Map<String, Value>>,
}

impl ChatTemplate {
    /// The template of a Hugging Face folder: chat_template.jinja, else tokenizer_config.json's
    /// `chat_template`, else chat_template.json. `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Model`] if it cannot be read or is not valid Jinja.
    pub fn from_folder(folder: &Path, tokenizer: &Tokenizer) -> Result<Option<Self>, Error> {
        let path = folder.join("chat_template.jinja");
        if path.is_file() {
            let source = std::fs::read_to_string(&path);
            let source = source.map_err(|e| Error::model(&path, format!("cannot read the file: {e}")))?;
            return Self::named(&path, vec![("default".into(), source)], tokenizer).map(Some);
        }
        for file in ["tokenizer_config.json", "chat_template.json"] {
            let path = folder.join(file);
            let Some(config) = read_json(&path)? else {
                continue;
            };
            let templates = match &config["chat_template"] {
                Value::Null => continue,
                Value::String(source) => vec![("default".to_owned(), source.clone())],
                Value::Array(list) => {
                    let entry = |e: &Value| Some((e["name"].as_str()?.to_owned(), e["template"].as_str()?.to_owned()));
                    let templates = list.iter().map(entry).collect::<Option<_>>();
                    templates
                        .ok_or_else(|| Error::model(&path, "'chat_template' must list {name, template} objects"))?
                }
                _ => {
                    return Err(Error::model(&path, "'chat_template' must be a string or a list"));
                }
            };
            return Self::named(&path, templates, tokenizer).map(Some);
        }
        Ok(None)
    }

    /// The template in a GGUF file, and its `tool_use` variant. `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Model`] if it is not valid Jinja.
    pub fn from_gguf(gguf: &Gguf, tokenizer: &Tokenizer) -> Result<Option<Self>, Error> {
        let Some(source) = gguf.string("tokenizer.chat_template")? else {
            return Ok(None);
        };
        let mut templates = vec![("default".to_owned(), source.to_owned())];
        if let Some(source) = gguf.string("tokenizer.chat_template.tool_use")? {
            templates.push(("tool_use".into(), source.to_owned()));
        }
        Self::named(gguf.path(), templates, tokenizer).map(Some)
    }

    /// The template `source`, from the file `path`, with `tokenizer`'s special tokens as variables.
    ///
    /// # Errors
    /// [`Error::Model`] if it is not valid Jinja.
    pub fn from_source(path: &Path, source: &str, tokenizer: &Tokenizer) -> Result<Self, Error> {
        Self::named(path, vec![("default".into(), source.to_owned())], tokenizer)
    }

    /// The template `given`: a file's name, or the template itself, which has a tag.
    ///
    /// # Errors
    /// [`Error::Model`] if the file cannot be read or the template is not valid Jinja.
    pub fn from_file_or_text(given: &str, tokenizer: &Tokenizer) -> Result<Self, Error> {
        if given.contains("{{") || given.contains("{%") {
            return Self::from_source(Path::new("--chat-template"), given, tokenizer);
        }
        let path = Path::new(given);
        let source = std::fs::read_to_string(path);
        let source = source.map_err(|e| Error::model(path, format!("--chat-template: cannot read the file: {e}")))?;
        Self::from_source(path, &source, tokenizer)
    }

    fn named(path: &Path, templates: Vec<(String, String)>, tokenizer: &Tokenizer) -> Result<Self, Error> {
        let Some((_, source)) = templates.iter().find(|(name, _)| name == "default").cloned() else {
            let names: Vec<_> = templates.iter().map(|(name, _)| name.as_str()).collect();
            return Err(Error::model(path, format!("no chat template is named 'default', only: {}", names.join(", "))));
        };
        let mut environment = environment();
        for (name, text) in tokenizer.special_token_texts() {
            environment.add_global(name.clone(), text.clone());
        }
        for (name, source) in templates {
            let fail = |e| Error::model(path, format!("chat template '{name}' is not valid: {}", describe(&e)));
            environment.add_template_owned(name.clone(), without_generation_blocks(&source)).map_err(fail)?;
        }
        Ok(Self { environment, source })
    }

    /// The default template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt for `messages` in OpenAI's shape.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if options contradict each other or the template refuses the messages.
    pub fn render(&self, messages: &[Value], options: &ChatOptions<'_>) -> Result<String, Error> {
        let fail = |e: minijinja::Error| Error::invalid("messages", format!("chat template: {}", describe(&e)));
        let has_tool_template = options.tools.is_some() && self.environment.get_template("tool_use").is_ok();
        let name = if has_tool_template { "tool_use" } else { "default" };
        let template = self.environment.get_template(name).map_err(fail)?;
        if !options.continue_final_message {
            return template.render(variables(messages, options)).map_err(fail);
        }
        if options.add_generation_prompt {
            return Err(Error::invalid(
                "continue_final_message",
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
            ));
        }
        let mut messages = messages.to_vec();
        let last = messages.last_mut().and_then(|message| last_text(message.get_mut("content")?)).ok_or_else(|| {
            Error::invalid("continue_final_message", "continue_final_message needs a last message that ends with text.")
        })?;
        last.push_str(CONTINUE_TAG);
        cut_at_tag(template.render(variables(&messages, options)).map_err(fail)?)
    }
}

fn variables(messages: &[Value], options: &ChatOptions<'_>) -> JinjaValue {
    let fixed = [
        ("messages", JinjaValue::from(Serde(messages))),
        ("tools", JinjaValue::from(Serde(options.tools))),
        ("documents", JinjaValue::from(Serde(options.documents))),
        ("add_generation_prompt", JinjaValue::from(options.add_generation_prompt)),
    ];
    let extra = options.kwargs.into_iter().flatten();
    let extra = extra.map(|(name, value)| (name.as_str(), JinjaValue::from(Serde(value))));
    JinjaValue::from_pairs(fixed.into_iter().chain(extra))
}

/// The text that ends a message: its content, or the last text part of it.
fn last_text(content: &mut Value) -> Option<&mut String> {
    match content {
        Value::String(text) => Some(text),
        Value::Array(parts) => parts.iter_mut().rev().find_map(|part| match part.get_mut("text") {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }),
        _ => None,
    }
}

/// Cuts `prompt` where the last message's own text ends.
fn cut_at_tag(mut prompt: String) -> Result<String, Error> {
    let Some(at) = prompt.rfind(CONTINUE_TAG.trim_end()) else {
        return Err(Error::invalid(
            "continue_final_message",
            "continue_final_message is set but the final message does not appear in the chat after applying the chat \
             template.",
        ));
    };
    // A template that trims messages has also trimmed what was before the tag's own space.
    let trimmed = !prompt[at..].starts_with(CONTINUE_TAG);
    prompt.truncate(at);
    if trimmed {
        prompt.truncate(prompt.trim_end().len());
    }
    Ok(prompt)
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    // Fails on delimiters that contradict each other; these are the defaults.
    if let Ok(syntax) = minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| -> Result<String, minijinja::Error> {
        jiff::fmt::strtime::format(&format, &jiff::Zoned::now())
            .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
    });
    environment
}

/// The template with `{% generation %}` blocks, which only mark spans for training, as plain ones. The dashes of
/// the tags keep their meaning.
fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open + 2);
        out.push_str(before);
        let close = tag.find("%}").unwrap_or(tag.len());
        let (body, after) = tag.split_at(close);
        let replacement = match body.trim_matches(['-', '+', ' ', '\t', '\n']) {
            "generation" => body.replace("generation", "if true"),
            "endgeneration" => body.replace("endgeneration", "endif"),
            _ => body.to_owned(),
        };
        out.push_str(&replacement);
        rest = after;
    }
    out + rest
}

/// The message of `error` without the template's internals, and the line where it happened.
fn describe(error: &minijinja::Error) -> String {
    let message = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{message} (line {line} of the template)"),
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::text::test_model::{smollm2_path, smollm2_tokenizer};

    /// Every construct that Llama 3.1's own template uses, and those of other families.
    const TOOLS: &str = include_str!("testdata/tools.jinja");
    const QWEN2: &str = include_str!("testdata/qwen2.jinja");

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::from_source(Path::new("test.jinja"), source, &smollm2_tokenizer()).expect("valid")
    }

    fn prompt() -> ChatOptions<'static> {
        ChatOptions { add_generation_prompt: true, ..ChatOptions::default() }
    }

    fn message_of(result: Result<String, Error>) -> String {
        result.map(|text| format!("no error but {text:?}")).unwrap_or_else(|e| e.to_string())
    }

    #[test]
    fn smollm2_renders_as_its_model_card_says() {
        let gguf = Gguf::open(&smollm2_path()).expect("valid");
        let tokenizer = smollm2_tokenizer();
        let template = ChatTemplate::from_gguf(&gguf, &tokenizer).expect("valid").expect("there");
        let text =
            template.render(&[json!({"role": "user", "content": "Hi <|im_end|>"})], &prompt()).expect("rendered");
        assert_eq!(
            text,
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
             <|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
        );
        let ids = tokenizer.encode_with_special(&text).expect("encodable");
        assert_eq!((ids[0], ids.iter().filter(|&&id| id == 1).count()), (1, 3));
    }

    #[test]
    fn qwen2_renders_with_and_without_a_system_message() {
        let template = template(QWEN2);
        let user = json!({"role": "user", "content": "Hi"});
        assert_eq!(
            template.render(std::slice::from_ref(&user), &prompt()).expect("rendered"),
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
        let system = json!({"role": "system", "content": "S"});
        assert_eq!(
            template.render(&[system, user], &ChatOptions::default()).expect("rendered"),
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        );
    }

    #[test]
    fn constructs_render_as_in_jinja2() {
        let template = template(TOOLS);
        let tools = [json!({"type": "function", "function": {
            "name": "find", "description": "Finds <b>&'é'</b>",
            "parameters": {"type": "object", "properties": {}, "required": []}}})];
        let call = json!({"function": {"name": "find", "arguments": {"q": "<é>", "n": [1, 2.5, true, null]}}});
        let messages = [
            json!({"role": "system", "content": " Be brief. "}),
            json!({"role": "user", "content": " Hi \n"}),
            json!({"role": "skip", "content": "x"}),
            json!({"role": "assistant", "tool_calls": [call.clone()]}),
            json!({"role": "tool", "content": {"a": 1}}),
        ];
        let kwargs = json!({"builtin": ["a", "hidden", "b"], "bos_token": "<s>"});
        let options = ChatOptions { tools: Some(&tools), kwargs: kwargs.as_object(), ..prompt() };
        // Rendered by Jinja2 3.1 with transformers' settings.
        assert_eq!(template.render(&messages, &options).expect("rendered"), WITH_TOOLS);
        let kwargs = json!({"date": "today", "bos_token": "<s>"});
        let options = ChatOptions { kwargs: kwargs.as_object(), ..ChatOptions::default() };
        assert_eq!(template.render(&messages, &options).expect("rendered"), WITHOUT_TOOLS);

        let two = json!({"role": "assistant", "tool_calls": [call.clone(), call]});
        let message = message_of(template.render(&[two], &prompt()));
        assert!(message.contains("This model only supports single tool-calls at once!"), "{message}");
    }

    #[test]
    fn special_tokens_and_the_date_are_there() {
        let template = template("{{ bos_token }}{{ eos_token }}{{ strftime_now('%Y-%m-%d') }}");
        let text = template.render(&[], &ChatOptions::default()).expect("rendered");
        let today = jiff::Zoned::now().strftime("%Y-%m-%d").to_string();
        assert_eq!(text, format!("<|im_start|><|im_end|>{today}"));
    }

    #[test]
    fn the_final_message_can_be_continued() {
        let options = ChatOptions { continue_final_message: true, ..ChatOptions::default() };
        let messages = |content: Value| {
            [json!({"role": "system", "content": ""}), json!({"role": "assistant", "content": content})]
        };
        let qwen = template(QWEN2);
        let expected = "<|im_start|>system\n<|im_end|>\n<|im_start|>assistant\nOnce upon ";
        assert_eq!(qwen.render(&messages("Once upon ".into()), &options).expect("rendered"), expected);
        // A template that trims content trims it here too.
        let trimming = template("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}");
        assert_eq!(trimming.render(&messages("Once upon ".into()), &options).expect("rendered"), "[][Once upon");
        let parts = template("{% for m in messages %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endfor %}");
        let content = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}]);
        assert_eq!(parts.render(&messages(content), &options).expect("rendered"), "(a)(b");

        let silent = template("{% for m in messages %}{{ m.role }}{% endfor %}");
        assert!(message_of(silent.render(&messages("x".into()), &options)).contains("does not appear in the chat"));
        assert!(message_of(qwen.render(&messages(json!(3)), &options)).contains("ends with text"));
        let both = ChatOptions { add_generation_prompt: true, ..options };
        assert!(message_of(qwen.render(&messages("x".into()), &both)).contains("Cannot set both"));
    }

    #[test]
    fn named_templates_are_chosen_by_tools() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |config: Value| std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string());
        write(json!({"chat_template": [
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "tools: {{ tools | length }}"},
        ]}))
        .expect("written");
        let load = || ChatTemplate::from_folder(folder.path(), &smollm2_tokenizer());
        let template = load().expect("valid").expect("there");
        assert_eq!(template.source(), "plain");
        assert_eq!(template.render(&[], &prompt()).expect("rendered"), "plain");
        let options = ChatOptions { tools: Some(&[Value::Null]), ..prompt() };
        assert_eq!(template.render(&[], &options).expect("rendered"), "tools: 1");

        write(json!({"chat_template": [{"name": "rag", "template": "x"}]})).expect("written");
        assert!(load().unwrap_err().to_string().contains("no chat template is named 'default', only: rag"));
        write(json!({"chat_template": "{% if %}"})).expect("written");
        assert!(load().unwrap_err().to_string().contains("is not valid"));
        write(json!({})).expect("written");
        assert!(load().expect("valid").is_none());
        std::fs::write(folder.path().join("chat_template.jinja"), "file").expect("written");
        assert_eq!(load().expect("valid").expect("there").source(), "file");
    }

    #[test]
    fn endless_templates_end() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}\
                       {% endfor %}{% endfor %}";
        assert!(message_of(template(endless).render(&[], &prompt())).contains("fuel"));
    }

    #[test]
    fn generation_tags_keep_their_dashes() {
        assert_eq!(
            without_generation_blocks(
                "a {%- generation -%} {{ x }} {% endgeneration %} {% if generation %}{% endif %} {%"
            ),
            "a {%- if true -%} {{ x }} {% endif %} {% if generation %}{% endif %} {%"
        );
    }

    const WITH_TOOLS: &str = r#"<s>[system]
Date: 24 Nov 2026
Builtin: a, b
{
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds <b>&'é'</b>",
        "parameters": {
            "type": "object",
            "properties": {},
            "required": []
        }
    }
}
Be brief.
[end]
[USER] Hi
{"name": "find", "parameters": {"q": "<é>", "n": [1, 2.5, true, null]}}
{"a": 1}[3 of 4][assistant]
"#;
    const WITHOUT_TOOLS: &str = r#"<s>[system]
Date: today
Be brief.
[end]
[USER] Hi
{"name": "find", "parameters": {"q": "<é>", "n": [1, 2.5, true, null]}}
{"a": 1}[3 of 4]"#;
}
