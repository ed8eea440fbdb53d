//! `POST /v1/messages` and `POST /v1/messages/count_tokens`: a conversation in Anthropic's shape.

use std::sync::Arc;

use ember_common::{
    anthropic::{Content, InputMessage, Message, MessageUsage, MessagesFields, MessagesToolChoice, TokenCount},
    openai::{ChatFields, FunctionName, OneOrMany, SamplingFields, ToolChoice},
};
use hyper::Response;
use serde_json::{Map, Value, json};

use super::Call;
use crate::{
    ApiError,
    app::{App, Body},
    blocks::Blocks,
    chat_request::{self, ChatRequest},
    json,
    prompt::{self, TextEncoding},
    stream::{ChunkWriter, MessageFrames, SseBody, UsageMeter},
};

pub async fn answer(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let own: MessagesFields = json::parse(&call.body)?;
    let model = app.model_name(own.model.as_deref())?.to_owned();
    if own.max_tokens.is_none() {
        return Err(ApiError::schema("max_tokens", "missing field `max_tokens`"));
    }
    let fields = sampling_fields(&own);
    let chat = chat_fields(own)?;
    let request = ChatRequest::start(&app, &call.parts.headers, &fields, chat).await;
    let ChatRequest { id, reading, mut choices, .. } =
        request.map_err(|error| error.rename("stop", "stop_sequences"))?;
    let mut frames = MessageFrames {
        app: app.clone(),
        message: Message {
            id: format!("msg_{id}"),
            kind: "message".into(),
            role: "assistant".into(),
            model,
            content: Vec::new(),
            stop_reason: None,
            stop_sequence: None,
            usage: MessageUsage::default(),
        },
        blocks: Blocks::new(reading),
        is_started: false,
    };
    let mut usage = UsageMeter::new(&app.config, None, 1, 1);
    if fields.stream == Some(true) {
        choices.wait_for_output().await?;
        let interval = app.stream_interval(&fields);
        return Ok(SseBody::new(choices, frames, ChunkWriter::of_events(), usage, interval).into_response());
    }
    let finished = choices.collect(|delta| drop(frames.blocks.push(delta))).await?;
    usage.finished(&finished);
    json::response(&frames.finished(usage.total()))
}

/// `POST /v1/messages/count_tokens`.
pub async fn count_tokens(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let own: MessagesFields = json::parse(&call.body)?;
    app.model_name(own.model.as_deref())?;
    let text = chat_request::conversation(&app, chat_fields(own)?)?.render(&app)?;
    let encoding = TextEncoding { add_special_tokens: false, will_be_cut: false };
    let input_tokens = prompt::encode_chat(app, text, encoding).await?.ids.len();
    json::response(&TokenCount { input_tokens })
}

fn sampling_fields(own: &MessagesFields) -> SamplingFields {
    SamplingFields {
        max_tokens: own.max_tokens,
        temperature: own.temperature,
        top_p: own.top_p,
        top_k: own.top_k,
        stop: own.stop_sequences.clone().map(OneOrMany::Many),
        stream: own.stream,
        ..SamplingFields::default()
    }
}

fn chat_fields(own: MessagesFields) -> Result<ChatFields, ApiError> {
    for (field, value) in [
        ("container", &own.container),
        ("mcp_servers", &own.mcp_servers),
        ("context_management", &own.context_management),
        ("output_config", &own.output_config),
        ("output_format", &own.output_format),
    ] {
        if value.is_some() {
            return Err(ApiError::unsupported(field));
        }
    }
    if own.thinking.is_some_and(|thinking| thinking["type"] != "disabled") {
        return Err(ApiError::invalid("thinking", "`thinking` cannot be steered on this server; leave it out."));
    }
    let mut messages = Vec::new();
    if let Some(system) = own.system {
        messages.push(json!({"role": "system", "content": plain_text("system", system)?}));
    }
    // A last word of the assistant is the beginning of its answer.
    let is_begun = own.messages.last().is_some_and(|last| last.role == "assistant");
    for (idx, message) in own.messages.into_iter().enumerate() {
        push_message(&mut messages, idx, message)?;
    }
    let tools = own.tools.filter(|tools| !tools.is_empty());
    let tools = tools.map(|tools| tools.into_iter().enumerate().map(chat_tool).collect::<Result<_, _>>());
    let is_serial = own.tool_choice.as_ref().is_some_and(|choice| choice.disable_parallel_tool_use == Some(true));
    Ok(ChatFields {
        messages,
        tools: tools.transpose()?,
        tool_choice: own.tool_choice.map(tool_choice).transpose()?,
        parallel_tool_calls: Some(!is_serial),
        continue_final_message: is_begun.then_some(true),
        ..ChatFields::default()
    })
}

/// Appends one turn; results of tools become messages of their own.
fn push_message(messages: &mut Vec<Value>, idx: usize, message: InputMessage) -> Result<(), ApiError> {
    let InputMessage { role, content } = message;
    if !matches!(role.as_str(), "user" | "assistant") {
        let message = format!("unknown role `{role}`, expected `user` or `assistant`");
        return Err(ApiError::schema(&format!("messages.{idx}.role"), message));
    }
    let blocks = match content {
        Content::Text(text) => {
            messages.push(json!({"role": role, "content": text}));
            return Ok(());
        }
        Content::Blocks(blocks) => blocks,
    };
    let (mut texts, mut calls, mut reasoning) = (Vec::new(), Vec::new(), None);
    for (block_idx, mut block) in blocks.into_iter().enumerate() {
        let at = format!("messages.{idx}.content.{block_idx}");
        let kind = text_of(&at, &block, "type")?;
        match (kind.as_str(), role.as_str()) {
            ("text", _) => texts.push(text_of(&at, &block, "text")?),
            ("thinking", "assistant") => reasoning = Some(text_of(&at, &block, "thinking")?),
            ("tool_use", "assistant") => {
                let arguments = block.remove("input").unwrap_or_else(|| json!({}));
                let function = json!({"name": text_of(&at, &block, "name")?, "arguments": arguments});
                calls.push(json!({"id": text_of(&at, &block, "id")?, "type": "function", "function": function}));
            }
            ("tool_result", "user") => {
                let id = text_of(&at, &block, "tool_use_id")?;
                let content = match block.remove("content") {
                    None | Some(Value::Null) => String::new(),
                    Some(content) => {
                        let content = serde_json::from_value(content)
                            .map_err(|error| ApiError::schema(&format!("{at}.content"), error))?;
                        plain_text(&format!("{at}.content"), content)?
                    }
                };
                messages.push(json!({"role": "tool", "tool_call_id": id, "content": content}));
            }
            (other, role) => {
                let message =
                    format!("{at}: this model does not take blocks of type `{other}` in messages of the {role}.");
                return Err(ApiError::invalid("messages", message));
            }
        }
    }
    if role == "user" && texts.is_empty() && messages.last().is_some_and(|last| last["role"] == "tool") {
        return Ok(());
    }
    let mut message = json!({"role": role, "content": texts.join("\n")});
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    if let Some(reasoning) = reasoning {
        message["reasoning"] = reasoning.into();
    }
    messages.push(message);
    Ok(())
}

fn text_of(at: &str, block: &Map<String, Value>, field: &str) -> Result<String, ApiError> {
    let text = block.get(field).and_then(Value::as_str).map(str::to_owned);
    text.ok_or_else(|| ApiError::schema(&format!("{at}.{field}"), "expected a string"))
}

/// Content that can only be text.
fn plain_text(at: &str, content: Content) -> Result<String, ApiError> {
    let blocks = match content {
        Content::Text(text) => return Ok(text),
        Content::Blocks(blocks) => blocks,
    };
    let text = |(idx, block): (usize, &Map<String, Value>)| match block.get("type").and_then(Value::as_str) {
        Some("text") => text_of(&format!("{at}.{idx}"), block, "text"),
        _ => Err(ApiError::schema(&format!("{at}.{idx}.type"), "expected `text`")),
    };
    Ok(blocks.iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?.join("\n"))
}

/// A tool as chat templates and parsers know it.
fn chat_tool((idx, tool): (usize, Value)) -> Result<Value, ApiError> {
    if let Some(other) = tool["type"].as_str().filter(|kind| *kind != "custom") {
        let message = format!("tools.{idx}: tools of type `{other}` are not supported by this server, only `custom`.");
        return Err(ApiError::invalid("tools", message));
    }
    if tool["name"].as_str().is_none_or(str::is_empty) {
        return Err(ApiError::schema(&format!("tools.{idx}.name"), "expected a name"));
    }
    let function = json!({
        "name": tool["name"], "description": tool["description"], "parameters": tool["input_schema"]
    });
    Ok(json!({"type": "function", "function": function}))
}

fn tool_choice(choice: MessagesToolChoice) -> Result<ToolChoice, ApiError> {
    let mode = |mode: &str| Ok(ToolChoice::Mode(mode.to_owned()));
    match (choice.kind.as_str(), choice.name) {
        ("auto", _) => mode("auto"),
        ("any", _) => mode("required"),
        ("none", _) => mode("none"),
        ("tool", Some(name)) => Ok(ToolChoice::Named { kind: "function".into(), function: FunctionName { name } }),
        _ => {
            Err(ApiError::invalid("tool_choice", "tool_choice must be of type auto, any, none, or tool with a `name`."))
        }
    }
}
