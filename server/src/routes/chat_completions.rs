//! `POST /v1/chat/completions`: answers a conversation.

use std::sync::Arc;

use ember_common::openai::{ChatChoice, ChatCompletion, ChatFields, ChatMessage, SamplingFields};
use ember_engine::{Delta, SamplingParams};
use hyper::{HeaderMap, Response};
use serde_json::Value;

use super::Call;
use crate::{
    ApiError,
    answer::{Answer, MessageBuilder},
    app::{App, Body},
    chat_request::{ChatRequest, Reading},
    generation::{Choices, wire_stop_reason},
    json,
    logprobs::{self, TokenNames},
    stream::{ChatFrames, ChunkHead, ChunkWriter, SseBody, UsageMeter},
};

pub async fn answer(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let fields: SamplingFields = json::parse(&call.body)?;
    let own: ChatFields = json::parse(&call.body)?;
    if fields.stream != Some(true) {
        return json::response(&complete(&app, &call.parts.headers, &fields, own).await?);
    }
    let model = app.model_name(fields.model.as_deref())?.to_owned();
    let echo = echo_of(&fields, &own);
    let ChatRequest { id, params, prompt_text, reading, mut choices } =
        ChatRequest::start(&app, &call.parts.headers, &fields, own).await?;
    let usage = UsageMeter::new(&app.config, fields.stream_options, 1, choices.n_choices());
    let id = format!("chatcmpl-{id}");
    choices.wait_for_output().await?;
    let head = ChunkHead { id: &id, object: "chat.completion.chunk", created: app.now(), model: &model };
    let frames = ChatFrames {
        app: app.clone(),
        n_top_logprobs: logprobs::n_shown(&params),
        tokens_as_ids: fields.return_tokens_as_token_ids == Some(true),
        return_token_ids: fields.return_token_ids == Some(true),
        prompt_text,
        echo,
        n_unstarted: choices.n_choices(),
        prompt: None,
        answers: (0..choices.n_choices()).filter_map(|_| reading.answer()).collect(),
        counts_reasoning: app.config.reasoning_parser.is_some(),
        tools: reading.tools,
    };
    let interval = app.stream_interval(&fields);
    Ok(SseBody::new(choices, frames, ChunkWriter::new(head), usage, interval).into_response())
}

/// The whole answer.
///
/// # Errors
/// Those of [`ChatRequest::start`] and of the engine.
pub(super) async fn complete(
    app: &Arc<App>,
    headers: &HeaderMap,
    fields: &SamplingFields,
    own: ChatFields,
) -> Result<ChatCompletion, ApiError> {
    let model = app.model_name(fields.model.as_deref())?.to_owned();
    let echo = echo_of(fields, &own).unwrap_or_default();
    let ChatRequest { id, params, prompt_text, reading, choices } =
        ChatRequest::start(app, headers, fields, own).await?;
    let usage = UsageMeter::new(&app.config, fields.stream_options, 1, choices.n_choices());
    let head = Head { id: format!("chatcmpl-{id}"), created: app.now(), model, echo, prompt_text };
    whole(app, head, fields, &params, Running { choices, usage, reading }).await
}

/// What the assistant said last, if it is to be repeated.
fn echo_of(fields: &SamplingFields, own: &ChatFields) -> Option<String> {
    own.messages.last().filter(|_| fields.echo == Some(true)).and_then(assistant_text)
}

/// What is known of the answer before it is there.
struct Head {
    id: String,
    created: u64,
    model: String,
    echo: String,
    prompt_text: Option<String>,
}

struct Running {
    choices: Choices,
    usage: UsageMeter,
    reading: Reading,
}

async fn whole(
    app: &App,
    head: Head,
    fields: &SamplingFields,
    params: &SamplingParams,
    Running { choices, mut usage, reading }: Running,
) -> Result<ChatCompletion, ApiError> {
    let mut answers: Vec<Option<(Answer, MessageBuilder)>> =
        (0..choices.n_choices()).map(|_| Some((reading.answer()?, MessageBuilder::default()))).collect();
    let each = |delta: &Delta| {
        if let Some((answer, message)) = &mut answers[delta.index] {
            message.append(answer.push(delta));
        }
    };
    let mut finished = choices.collect(each).await?;
    let prompt = finished.prompts.pop().flatten();
    if let Some(prompt) = &prompt {
        usage.prompt(0, prompt);
    }
    let names = TokenNames { backend: &*app.backend, as_ids: fields.return_tokens_as_token_ids == Some(true) };
    let return_token_ids = fields.return_token_ids == Some(true);
    usage.n_reasoning = app.config.reasoning_parser.map(|_| 0);
    let choice = |delta: Delta| {
        usage.output(delta.index, delta.token_ids.len());
        let mut n_calls = 0;
        let mut message = match answers[delta.index].take() {
            None => ChatMessage::assistant(delta.text),
            Some((answer, message)) => {
                n_calls = answer.n_calls();
                usage.n_reasoning = usage.n_reasoning.map(|total| total + answer.n_reasoning_tokens());
                message.into_message()
            }
        };
        if !head.echo.is_empty() {
            message.content = Some(head.echo.clone() + &message.content.unwrap_or_default());
        }
        let (reason, stop_reason) = delta.finish.map(|finish| (finish.reason, finish.stop_reason)).unzip();
        let reason = reason.map(|reason| reading.tools.finish_reason(reason, n_calls));
        ChatChoice {
            index: delta.index,
            message,
            logprobs: logprobs::n_shown(params).map(|n_top| logprobs::chat(names, &delta.logprobs, n_top)),
            finish_reason: reason,
            stop_reason: stop_reason.flatten().map(wire_stop_reason),
            token_ids: return_token_ids.then_some(delta.token_ids),
            routed_experts: None,
            weight_versions: None,
        }
    };
    let choices = finished.choices.into_iter().map(choice).collect();
    let prompt_logprobs = prompt.as_ref().and_then(|prompt| prompt.logprobs.as_deref());
    Ok(ChatCompletion {
        id: head.id,
        object: "chat.completion".into(),
        created: head.created,
        model: head.model,
        choices,
        service_tier: None,
        system_fingerprint: Some(app.system_fingerprint.clone()),
        usage: usage.total(),
        prompt_logprobs: prompt_logprobs.map(|tokens| logprobs::prompt(names, tokens)),
        prompt_token_ids: prompt.as_ref().filter(|_| return_token_ids).map(|prompt| prompt.token_ids.to_vec()),
        prompt_text: head.prompt_text,
        kv_transfer_params: None,
        ec_transfer_params: None,
        metrics: None,
    })
}

/// The text of a message that the assistant said.
fn assistant_text(message: &Value) -> Option<String> {
    let is_assistant = message.get("role").and_then(Value::as_str) == Some("assistant");
    message.get("content").and_then(Value::as_str).filter(|_| is_assistant).map(str::to_owned)
}
