//! Chat templates, and the conversations that they render.

use std::{path::Path, sync::LazyLock};

use ember_engine::text::{ChatOptions, ChatTemplate, Tokenizer};
use serde_json::Value;

/// Of models, chosen by `template` as a number; as a text it is the template itself.
const TEMPLATES: [&str; 2] = [
    include_str!("../../../engine/src/text/testdata/qwen2.jinja"),
    include_str!("../../../engine/src/text/testdata/tools.jinja"),
];

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::byte_level(256).expect("a tokenizer of bytes"));

/// A JSON object with what a template sees.
pub fn run(bytes: &[u8]) {
    let Ok(input) = serde_json::from_slice::<Value>(bytes) else {
        return;
    };
    let source = match &input["template"] {
        Value::String(source) => source,
        number => TEMPLATES[number.as_u64().unwrap_or(0) as usize % TEMPLATES.len()],
    };
    let Ok(template) = ChatTemplate::from_source(Path::new("template"), source, &TOKENIZER) else {
        return;
    };
    let list = |name: &str| input[name].as_array().map(Vec::as_slice);
    let is_set = |name: &str| input[name].as_bool() == Some(true);
    let options = ChatOptions {
        add_generation_prompt: is_set("add_generation_prompt"),
        continue_final_message: is_set("continue_final_message"),
        tools: list("tools"),
        documents: list("documents"),
        kwargs: input["kwargs"].as_object(),
    };
    let _ = template.render(list("messages").unwrap_or_default(), &options);
}
