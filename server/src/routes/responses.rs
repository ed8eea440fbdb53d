//! `POST /v1/responses`: answers a conversation in OpenAI's newer shape. Nothing is stored.

use std::sync::Arc;

use ember_common::openai::{
    ChatFields, JsonSchemaFormat, ModelResponse, ReasoningOptions, ResponseFormat, ResponseInput, ResponseText,
    ResponsesFields, SamplingFields, TextFormat, ToolChoice,
};
use hyper::Response;
use serde_json::{Map, Value, json};

use super::Call;
use crate::{
    ApiError,
    app::{App, Body},
    blocks::Blocks,
    chat_request::ChatRequest,
    json, logprobs,
    stream::{ChunkWriter, ResponseFrames, SseBody, UsageMeter},
};

/// What may be asked for beside the answer.
const INCLUDABLE: [&str; 2] = [LOGPROBS, "reasoning.encrypted_content"];
const LOGPROBS: &str = "message.output_text.logprobs";
/// Most candidates of a token, as upstream.
const MAX_TOP_LOGPROBS: i64 = 20;

pub async fn answer(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let mut fields: SamplingFields = json::parse(&call.body)?;
    let own: ResponsesFields = json::parse(&call.body)?;
    let model = app.model_name(fields.model.as_deref())?.to_owned();
    refuse_unsupported(&own).and_then(|()| refuse_fields_of_others(&fields)).map_err(of_responses)?;
    let format = own.text.as_ref().and_then(|text| text.format.clone());
    let format = format.unwrap_or(TextFormat { kind: "text".into(), name: None, schema: None });
    only_of_responses(&mut fields, &format);
    let skeleton = skeleton(&own, format);
    let chat = chat_fields(own)?;
    let request = ChatRequest::start(&app, &call.parts.headers, &fields, chat).await;
    let ChatRequest { id, params, reading, mut choices, .. } = request.map_err(|error| {
        error
            .rename_field("max_completion_tokens", "max_output_tokens")
            .rename_field("logprobs", "top_logprobs")
            .rename("response_format", "text")
            .rename("messages", "input")
            .rename("reasoning_effort", "reasoning")
    })?;
    let mut frames = ResponseFrames {
        app: app.clone(),
        response: ModelResponse {
            id: format!("resp_{id}"),
            created_at: app.now(),
            model,
            max_output_tokens: params.max_tokens.filter(|_| skeleton.max_output_tokens.is_some()),
            temperature: params.temperature,
            top_p: params.top_p,
            ..skeleton
        },
        blocks: Blocks::new(reading),
        n_top_logprobs: logprobs::n_shown(&params).unwrap_or(0),
        n_events: 0,
    };
    let mut usage = UsageMeter::new(&app.config, None, 1, 1);
    if fields.stream == Some(true) {
        choices.wait_for_output().await?;
        let interval = app.stream_interval(&fields);
        return Ok(SseBody::new(choices, frames, ChunkWriter::of_events(), usage, interval).into_response());
    }
    let finished = choices.collect(|delta| drop(frames.blocks.push(delta))).await?;
    usage.finished(&finished);
    usage.n_reasoning = app.config.reasoning_parser.map(|_| frames.blocks.n_reasoning_tokens());
    json::response(&frames.finished(usage.total()))
}

fn refuse_unsupported(own: &ResponsesFields) -> Result<(), ApiError> {
    for (field, value) in [
        ("previous_response_id", &own.previous_response_id),
        ("conversation", &own.conversation),
        ("prompt", &own.prompt),
        ("max_tool_calls", &own.max_tool_calls),
    ] {
        if value.is_some() {
            return Err(ApiError::unsupported(field));
        }
    }
    if own.background == Some(true) {
        return Err(ApiError::unsupported("background"));
    }
    if let Some(n) = own.top_logprobs
        && !(0..=MAX_TOP_LOGPROBS).contains(&n)
    {
        let message = format!("top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}, got {n}.");
        return Err(ApiError::invalid("top_logprobs", message));
    }
    if own.reasoning.as_ref().is_some_and(|reasoning| reasoning.summary.is_some()) {
        return Err(ApiError::invalid(
            "reasoning",
            "`reasoning.summary` is not supported by this server; leave it out.",
        ));
    }
    if own.truncation.as_deref().is_some_and(|truncation| truncation != "disabled") {
        return Err(ApiError::invalid("truncation", "truncation can only be `disabled` on this server."));
    }
    if let Some(other) = own.include.iter().flatten().find(|include| !INCLUDABLE.contains(&include.as_str())) {
        return Err(ApiError::invalid("include", format!("`{other}` cannot be included by this server.")));
    }
    Ok(())
}

/// Refuses what this endpoint has under another name, or not at all.
fn refuse_fields_of_others(fields: &SamplingFields) -> Result<(), ApiError> {
    let usage = fields.stream_options.is_some_and(|it| it.include_usage.or(it.continuous_usage_stats).is_some());
    for (field, is_set, instead) in [
        ("n", fields.n.is_some_and(|n| n != 1), "there is one answer"),
        ("max_tokens", fields.max_tokens.is_some(), "the name is max_output_tokens"),
        ("echo", fields.echo == Some(true), "the input is not repeated"),
        ("prompt_logprobs", fields.prompt_logprobs.is_some(), "use /v1/completions"),
        ("stream_options", usage, "the last event always has the usage"),
        ("response_format", fields.response_format.is_some(), "the name is text.format"),
        ("return_token_ids", fields.return_token_ids == Some(true), "use /v1/completions"),
        ("return_tokens_as_token_ids", fields.return_tokens_as_token_ids == Some(true), "use /v1/completions"),
        ("use_beam_search", fields.use_beam_search == Some(true), "use /v1/completions"),
    ] {
        if is_set {
            return Err(ApiError::invalid(field, format!("`{field}` is not a field of /v1/responses: {instead}.")));
        }
    }
    Ok(())
}

/// The endpoint's own checks have a type of their own.
fn of_responses(error: ApiError) -> ApiError {
    ApiError { kind: "invalid_request_error", ..error }
}

/// Takes the form from `text.format`, and leaves aside what says nothing.
fn only_of_responses(fields: &mut SamplingFields, format: &TextFormat) {
    (fields.n, fields.stream_options) = (None, None);
    let schema = JsonSchemaFormat { name: format.name.clone().unwrap_or_default(), schema: format.schema.clone() };
    fields.response_format = (format.kind != "text").then(|| ResponseFormat {
        kind: format.kind.clone(),
        json_schema: Some(schema),
        structures: None,
        triggers: None,
    });
}

/// What is known of the response from the request alone.
fn skeleton(own: &ResponsesFields, format: TextFormat) -> ModelResponse {
    ModelResponse {
        id: String::new(),
        object: "response".into(),
        created_at: 0,
        status: "in_progress".into(),
        background: false,
        error: None,
        incomplete_details: None,
        instructions: own.instructions.clone(),
        max_output_tokens: own.max_output_tokens.and_then(|n| u32::try_from(n).ok()),
        max_tool_calls: None,
        model: String::new(),
        output: Vec::new(),
        parallel_tool_calls: own.parallel_tool_calls.unwrap_or(true),
        previous_response_id: None,
        reasoning: ReasoningOptions {
            effort: own.reasoning.as_ref().and_then(|reasoning| reasoning.effort.clone()),
            summary: None,
        },
        service_tier: None,
        store: false,
        temperature: 0.0,
        text: ResponseText { format },
        tool_choice: own.tool_choice.clone().unwrap_or_else(|| "auto".into()),
        tools: own.tools.clone().unwrap_or_default(),
        top_logprobs: own.top_logprobs.and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
        top_p: 0.0,
        truncation: "disabled".into(),
        usage: None,
        user: None,
        metadata: own.metadata.clone().unwrap_or_default(),
    }
}

fn chat_fields(own: ResponsesFields) -> Result<ChatFields, ApiError> {
    let includes_logprobs = own.include.iter().flatten().any(|include| include == LOGPROBS);
    let mut messages = Vec::new();
    messages.extend(own.instructions.map(|text| json!({"role": "system", "content": text})));
    match own.input {
        ResponseInput::Text(text) => messages.push(json!({"role": "user", "content": text})),
        ResponseInput::Items(items) if items.is_empty() => {
            return Err(ApiError::invalid("input", "`input` must be given and must not be empty."));
        }
        ResponseInput::Items(items) => {
            let mut reasoning = None;
            for (idx, item) in items.into_iter().enumerate() {
                push_item(&mut messages, &mut reasoning, (idx, item))?;
            }
        }
    }
    let tools = own.tools.filter(|tools| !tools.is_empty());
    let tools = tools.map(|tools| tools.into_iter().enumerate().map(chat_tool).collect::<Result<_, _>>());
    Ok(ChatFields {
        messages,
        max_completion_tokens: own.max_output_tokens,
        logprobs: Some(includes_logprobs),
        top_logprobs: own.top_logprobs.filter(|_| includes_logprobs),
        tools: tools.transpose()?,
        tool_choice: own.tool_choice.map(tool_choice).transpose()?,
        parallel_tool_calls: own.parallel_tool_calls,
        reasoning_effort: own.reasoning.and_then(|reasoning| reasoning.effort),
        chat_template_kwargs: own.chat_template_kwargs,
        ..ChatFields::default()
    })
}

/// Appends one item of the input; thoughts wait for what was said after them.
fn push_item(
    messages: &mut Vec<Value>,
    reasoning: &mut Option<String>,
    (idx, item): (usize, Value),
) -> Result<(), ApiError> {
    let at = |field: &str| format!("input.{idx}{field}");
    let Value::Object(mut item) = item else {
        return Err(ApiError::schema(&at(""), "expected an item, an object"));
    };
    let kind = item.get("type").and_then(Value::as_str).unwrap_or("message").to_owned();
    let text = |item: &Map<String, Value>, field: &str| match item.get(field) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(ApiError::schema(&at(&format!(".{field}")), "expected a string")),
        None => Err(ApiError::schema(&at(&format!(".{field}")), format!("missing field `{field}`"))),
    };
    match kind.as_str() {
        "message" => {
            let role = text(&item, "role")?;
            if !matches!(role.as_str(), "user" | "assistant" | "system" | "developer") {
                return Err(ApiError::schema(&at(".role"), format!("unknown role `{role}`")));
            }
            let content = parts(&at(".content"), item.remove("content"))?;
            let mut message = json!({"role": role, "content": content});
            if role == "assistant"
                && let Some(reasoning) = reasoning.take()
            {
                message["reasoning"] = reasoning.into();
            }
            messages.push(message);
        }
        "function_call" => {
            let arguments = text(&item, "arguments")?;
            if let Err(error) = serde_json::from_str::<Value>(&arguments) {
                return Err(ApiError::schema(&at(".arguments"), format!("not JSON: {error}")));
            }
            let function = json!({"name": text(&item, "name")?, "arguments": arguments});
            let call = json!({"id": text(&item, "call_id")?, "type": "function", "function": function});
            // Calls belong to one message together with the text before them.
            if messages.last().is_none_or(|last| last["role"] != "assistant") {
                messages.push(json!({"role": "assistant", "content": ""}));
            }
            let Some(Value::Object(message)) = messages.last_mut() else { return Ok(()) };
            if let Some(reasoning) = reasoning.take() {
                message.entry("reasoning").or_insert(reasoning.into());
            }
            if let Value::Array(calls) = message.entry("tool_calls").or_insert_with(|| json!([])) {
                calls.push(call);
            }
        }
        "function_call_output" => {
            let content = parts(&at(".output"), item.remove("output"))?;
            messages.push(json!({"role": "tool", "tool_call_id": text(&item, "call_id")?, "content": content}));
        }
        "reasoning" => {
            let content = item.remove("content").filter(|content| !content.is_null());
            *reasoning = content.map(|content| parts(&at(".content"), Some(content))).transpose()?;
        }
        other => {
            let message = format!("input.{idx}: items of type `{other}` are not supported by this server.");
            return Err(ApiError::invalid("input", message));
        }
    }
    Ok(())
}

/// Content as one text.
fn parts(at: &str, content: Option<Value>) -> Result<String, ApiError> {
    let parts = match content {
        Some(Value::String(text)) => return Ok(text),
        Some(Value::Array(parts)) => parts,
        Some(_) => return Err(ApiError::schema(at, "expected a string or a list of parts")),
        None => return Err(ApiError::schema(at, "missing")),
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (idx, part) in parts.iter().enumerate() {
        match (part["type"].as_str(), part["text"].as_str().or(part["refusal"].as_str())) {
            (Some("input_text" | "output_text" | "text" | "refusal" | "reasoning_text"), Some(text)) => {
                texts.push(text)
            }
            (Some("input_text" | "output_text" | "text" | "refusal" | "reasoning_text") | None, _) => {
                return Err(ApiError::schema(&format!("{at}.{idx}"), "expected a part with `type` and `text`"));
            }
            (Some(other), _) => {
                let message = format!("{at}.{idx}: this model does not take content parts of type `{other}`.");
                return Err(ApiError::invalid("input", message));
            }
        }
    }
    Ok(texts.join("\n"))
}

/// A tool as chat templates and parsers know it.
fn chat_tool((idx, tool): (usize, Value)) -> Result<Value, ApiError> {
    match tool["type"].as_str() {
        Some("function") => {}
        Some(other) => {
            let message =
                format!("tools.{idx}: tools of type `{other}` are not supported by this server, only `function`.");
            return Err(ApiError::invalid("tools", message));
        }
        None => return Err(ApiError::schema(&format!("tools.{idx}.type"), "missing field `type`")),
    }
    if tool["name"].as_str().is_none_or(str::is_empty) {
        return Err(ApiError::schema(&format!("tools.{idx}.name"), "expected a name"));
    }
    let mut function = tool;
    if let Some(fields) = function.as_object_mut() {
        fields.remove("type");
    }
    Ok(json!({"type": "function", "function": function}))
}

fn tool_choice(choice: Value) -> Result<ToolChoice, ApiError> {
    if let Value::String(mode) = choice {
        return Ok(ToolChoice::Mode(mode));
    }
    match (choice["type"].as_str(), choice["name"].as_str()) {
        (Some("function"), Some(name)) => Ok(ToolChoice::Named {
            kind: "function".into(),
            function: ember_common::openai::FunctionName { name: name.to_owned() },
        }),
        _ => Err(ApiError::invalid(
            "tool_choice",
            "tool_choice must be none, auto, required or `{\"type\": \"function\", \"name\": ...}`.",
        )),
    }
}
