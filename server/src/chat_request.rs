//! [`ChatRequest`]: a conversation in flight, whatever the endpoint and the shape of its answer.

use std::sync::Arc;

use ember_common::openai::{ChatFields, SamplingFields};
use ember_engine::{GenerateRequest, Prompt, SamplingParams};
use hyper::HeaderMap;
use serde_json::Value;

use crate::{
    ApiError,
    answer::Answer,
    app::App,
    generation::Choices,
    output::{AnswerParser, ReasoningFormat},
    priority,
    prompt::{self, Chat, TextEncoding},
    request_id,
    sampling::{self, EndpointParams},
    structured, thinking,
    tools::ToolPlan,
};

const REASONING_EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// A conversation that the engine is answering.
pub struct ChatRequest {
    /// The request's name, without a prefix.
    pub id: String,
    /// As given to the engine.
    pub params: SamplingParams,
    /// The rendered conversation, if `return_prompt_text` asks for it.
    pub prompt_text: Option<String>,
    /// How the answers' text is to be understood.
    pub reading: Reading,
    /// The answers.
    pub choices: Choices,
}

impl ChatRequest {
    /// Checks the fields, renders the conversation and submits it.
    ///
    /// # Errors
    /// Status 400 naming the field at fault, 503 when the queue is full, else what the engine says.
    pub async fn start(
        app: &Arc<App>,
        headers: &HeaderMap,
        fields: &SamplingFields,
        own: ChatFields,
    ) -> Result<Self, ApiError> {
        refuse_unsupported(&own)?;
        let tools = ToolPlan::resolve(&own, &app.config)?;
        let max_tokens_field = max_tokens_field(fields, &own);
        let endpoint = EndpointParams {
            max_tokens: max_tokens_field,
            logprobs: n_top_logprobs(&own)?,
            prompt_logprobs: None,
            max_model_len: app.backend.info().max_model_len,
            most_tokens: app.config.sampling_defaults.max_tokens(),
            logprobs_limits: app.logprobs_limits(),
        };
        let mut params = sampling::params(fields, endpoint, &app.sampling_defaults)?;
        let id = request_id::resolve(headers, fields.request_id.as_deref());
        tracing::Span::current().record("id", &id);

        let return_prompt_text = own.return_prompt_text == Some(true);
        let shows_reasoning = own.include_reasoning != Some(false);
        let text = conversation(app, own)?.render(app)?;
        let form_param = match tools.grammar()? {
            None => structured::param(fields),
            // A call that must be made outranks the form of an answer.
            grammar => {
                params.structured_outputs = grammar;
                "tools"
            }
        };
        let reading = Reading { reasoning: reasoning(app, &text, &mut params)?, shows_reasoning, tools };
        let budget = thinking::budget(app, fields, reading.reasoning.is_some_and(|(_, is_inside)| is_inside))?;
        params.thinking_budget = budget.filter(|_| reading.reasoning.is_some());
        let beams = sampling::beams(fields, &params).map_err(|error| error.rename("structured_outputs", form_param))?;
        let prompt_text = return_prompt_text.then(|| text.clone());
        let encoding = TextEncoding {
            add_special_tokens: fields.add_special_tokens == Some(true),
            will_be_cut: fields.truncate_prompt_tokens.is_some(),
        };
        let ids = prompt::encode_chat(app.clone(), text, encoding).await?;
        let ids = prompt::fit(app, ids, fields, params.max_tokens)?;
        let mut request = GenerateRequest::new(Prompt::Tokens(ids), params.clone());
        request.cache_salt = fields.cache_salt.clone();
        request.priority = priority::of(headers, fields)?;
        // The engine knows `max_tokens` alone; clients may have sent its newer name.
        let name_of_max_tokens = max_tokens_field.map_or("max_tokens", |(name, _)| name);
        let choices = Choices::start(app, id.clone(), vec![request], beams).await.map_err(|error| {
            error.rename_field("max_tokens", name_of_max_tokens).rename("structured_outputs", form_param)
        })?;
        Ok(Self { id, params, prompt_text, reading, choices })
    }
}

/// How the answers' text is to be understood.
pub struct Reading {
    /// How reasoning is marked, and whether answers begin within it.
    reasoning: Option<(&'static ReasoningFormat, bool)>,
    shows_reasoning: bool,
    /// How the answer is made to call tools.
    pub tools: ToolPlan,
}

impl Reading {
    /// For one choice; `None` if its text is content as it comes.
    pub fn answer(&self) -> Option<Answer> {
        let is_plain = self.reasoning.is_none() && self.tools.parser().is_none();
        (!is_plain).then(|| self.any_answer())
    }

    /// For one choice, also if its text is content as it comes.
    pub fn any_answer(&self) -> Answer {
        let parser = AnswerParser::new(self.reasoning, self.tools.parser());
        Answer::new(parser, self.tools.is_parallel, self.shows_reasoning)
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

/// The conversation, with what the server adds to it.
///
/// # Errors
/// Status 400 for an effort of reasoning that there is not.
pub fn conversation(app: &App, own: ChatFields) -> Result<Chat, ApiError> {
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
