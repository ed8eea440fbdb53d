//! `POST /v1/chat/completions`: answers a conversation.

use std::sync::Arc;

use ember_common::openai::{ChatChoice, ChatCompletion, ChatFields, ChatMessage, SamplingFields};
use ember_engine::{Delta, GenerateRequest, Prompt, SamplingParams};
use hyper::Response;
use serde_json::Value;

use super::Call;
use crate::{
    ApiError,
    answer::{Answer, MessageBuilder},
    app::{App, Body},
    generation::{Choices, wire_stop_reason},
    json,
    logprobs::{self, TokenNames},
    output::{AnswerParser, ReasoningFormat},
    priority,
    prompt::{self, Chat},
    request_id,
    sampling::{self, EndpointParams},
    stream::{ChatFrames, ChunkHead, ChunkWriter, SseBody, UsageMeter},
    structured,
    tools::ToolPlan,
};

const REASONING_EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

pub async fn answer(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let fields: SamplingFields = json::parse(&call.body)?;
    let own: ChatFields = json::parse(&call.body)?;
    let model = app.model_name(fields.model.as_deref())?.to_owned();
    refuse_unsupported(&own)?;
    let tools = ToolPlan::resolve(&own, &app.config)?;
    let n_top_logprobs = n_top_logprobs(&own)?;
    let max_tokens_field = max_tokens_field(&fields, &own);
    let endpoint = EndpointParams {
        max_tokens: max_tokens_field,
        logprobs: n_top_logprobs,
        prompt_logprobs: None,
        max_model_len: app.backend.info().max_model_len,
        most_tokens: app.config.sampling_defaults.max_tokens(),
        logprobs_limits: app.logprobs_limits(),
    };
    let mut params = sampling::params(&fields, endpoint, &app.sampling_defaults)?;
    let id = request_id::resolve(&call.parts.headers, fields.request_id.as_deref());
    tracing::Span::current().record("id", &id);

    let echo = if fields.echo == Some(true) { own.messages.last().and_then(assistant_text) } else { None };
    let return_prompt_text = own.return_prompt_text == Some(true);
    let shows_reasoning = own.include_reasoning != Some(false);
    let text = conversation(&app, own)?.render(&app)?;
    let form_param = match tools.grammar()? {
        None => structured::param(&fields),
        // A call that must be made outranks the form of an answer.
        grammar => {
            params.structured_outputs = grammar;
            "tools"
        }
    };
    let reading = Reading { reasoning: reasoning(&app, &text, &mut params)?, shows_reasoning, tools };
    let prompt_text = return_prompt_text.then(|| text.clone());
    let ids = prompt::encode_chat(app.clone(), text, fields.add_special_tokens == Some(true)).await?;
    let ids = prompt::fit(&app, ids, &fields, params.max_tokens)?;
    let mut request = GenerateRequest::new(Prompt::Tokens(ids), params.clone());
    request.cache_salt = fields.cache_salt.clone();
    request.priority = priority::of(&call.parts.headers, &fields)?;

    let name_of_max_tokens = max_tokens_field.map_or("max_tokens", |(name, _)| name);
    let mut choices = Choices::start(&app, id.clone(), vec![request])
        .await
        .map_err(|error| name_max_tokens(error, name_of_max_tokens).rename("structured_outputs", form_param))?;
    let usage = UsageMeter::new(&app.config, fields.stream_options, 1, choices.n_choices());
    let id = format!("chatcmpl-{id}");
    let created = app.now();
    if fields.stream == Some(true) {
        choices.wait_for_output().await?;
        let head = ChunkHead { id: &id, object: "chat.completion.chunk", created, model: &model };
        let frames = ChatFrames {
            app: app.clone(),
            n_top_logprobs: params.logprobs.map(|n| n as usize),
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
        return Ok(SseBody::new(choices, frames, ChunkWriter::new(head), usage, interval).into_response());
    }
    let head = Head { id, created, model, echo: echo.unwrap_or_default(), prompt_text };
    json::response(&whole(&app, head, &fields, &params, Running { choices, usage, reading }).await?)
}

/// How the answers' text is to be understood.
struct Reading {
    /// How reasoning is marked, and whether answers begin within it.
    reasoning: Option<(&'static ReasoningFormat, bool)>,
    shows_reasoning: bool,
    tools: ToolPlan,
}

impl Reading {
    /// For one choice; `None` if its text is content as it comes.
    fn answer(&self) -> Option<Answer> {
        let calls = self.tools.parser();
        if self.reasoning.is_none() && calls.is_none() {
            return None;
        }
        let parser = AnswerParser::new(self.reasoning, calls);
        Some(Answer::new(parser, self.tools.is_parallel, self.shows_reasoning))
    }
}

/// How reasoning is marked in answers to `prompt`. A prescribed form holds for what comes after it.
fn reasoning(
    app: &App,
    prompt: &str,
    params: &mut SamplingParams,
) -> Result<Option<(&'static ReasoningFormat, bool)>, ApiError> {
    let Some((format, is_inside)) =
        app.config.reasoning_parser.and_then(|format| Some((format, format.begins_inside(prompt)?)))
    else {
        return Ok(None);
    };
    if let Some(outputs) = &mut params.structured_outputs {
        match app.backend.encode_with_special(format.end)?[..] {
            [end] => outputs.begins_after = Some(end),
            // The model has no such token: it does not reason.
            _ => return Ok(None),
        }
    }
    Ok(Some((format, is_inside)))
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
            logprobs: params.logprobs.map(|n_top| logprobs::chat(names, &delta.logprobs, n_top as usize)),
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

fn refuse_unsupported(own: &ChatFields) -> Result<(), ApiError> {
    for (field, value) in [
        ("chat_template", &own.chat_template),
        ("mm_processor_kwargs", &own.mm_processor_kwargs),
        ("media_io_kwargs", &own.media_io_kwargs),
    ] {
        if value.is_some() {
            return Err(ApiError::unsupported(field));
        }
    }
    Ok(())
}

fn n_top_logprobs(own: &ChatFields) -> Result<Option<i64>, ApiError> {
    let n_top = own.top_logprobs.unwrap_or(0);
    if own.logprobs == Some(true) {
        if n_top < -1 {
            let message = format!("top_logprobs must be non-negative or -1, got {n_top}.");
            return Err(ApiError::invalid("top_logprobs", message));
        }
        return Ok(Some(n_top));
    }
    if n_top != 0 {
        return Err(ApiError::invalid("top_logprobs", "when using `top_logprobs`, `logprobs` must be set to true."));
    }
    Ok(None)
}

fn max_tokens_field(fields: &SamplingFields, own: &ChatFields) -> Option<(&'static str, i64)> {
    let current = own.max_completion_tokens.map(|n| ("max_completion_tokens", n));
    current.or(fields.max_tokens.map(|n| ("max_tokens", n)))
}

/// The engine knows `max_tokens` alone; clients may have sent its newer name.
fn name_max_tokens(mut error: ApiError, name: &'static str) -> ApiError {
    if error.param.as_deref() == Some("max_tokens") {
        error.message = error.message.replacen("max_tokens", name, 1);
        error.param = Some(name.into());
    }
    error
}

fn conversation(app: &App, own: ChatFields) -> Result<Chat, ApiError> {
    let mut kwargs = app.chat_template_kwargs(own.chat_template_kwargs);
    if let Some(effort) = own.reasoning_effort {
        if !REASONING_EFFORTS.contains(&effort.as_str()) {
            return Err(ApiError::invalid(
                "reasoning_effort",
                format!("reasoning_effort must be one of {}.", REASONING_EFFORTS.join(", ")),
            ));
        }
        kwargs.entry("reasoning_effort").or_insert(Value::String(effort));
    }
    Ok(Chat {
        messages: own.messages,
        tools: own.tools,
        documents: own.documents,
        kwargs,
        add_generation_prompt: own.add_generation_prompt,
        continue_final_message: own.continue_final_message,
    })
}

/// The text of a message that the assistant said.
fn assistant_text(message: &Value) -> Option<String> {
    let is_assistant = message.get("role").and_then(Value::as_str) == Some("assistant");
    message.get("content").and_then(Value::as_str).filter(|_| is_assistant).map(str::to_owned)
}
