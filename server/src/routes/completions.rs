//! `POST /v1/completions`: continues prompts given as text or token ids.

use std::sync::Arc;

use ember_common::openai::{Completion, CompletionChoice, CompletionFields, PromptInput, SamplingFields};
use ember_engine::{Delta, GenerateRequest, Prompt};
use hyper::Response;

use super::Call;
use crate::{
    ApiError,
    app::{App, Body},
    generation::{Choices, wire_stop_reason},
    json,
    logprobs::{self, TokenNames},
    priority,
    prompt::{self, PromptTokens, TextEncoding},
    request_id,
    sampling::{self, EndpointParams},
    stream::{ChoiceState, ChunkHead, ChunkWriter, CompletionFrames, SseBody, UsageMeter},
    structured, thinking,
};

const DEFAULT_MAX_TOKENS: i64 = 16;
const MAX_PROMPTS: usize = 1024;

pub async fn answer(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let fields: SamplingFields = json::parse(&call.body)?;
    let own: CompletionFields = json::parse(&call.body)?;
    let model = app.model_name(fields.model.as_deref())?.to_owned();
    refuse_unsupported(&own)?;
    let is_echo = fields.echo == Some(true);
    // With `echo` 0 asks for the prompt alone; the engine computes it while sampling one token.
    let only_echo = is_echo && fields.max_tokens == Some(0);
    let max_tokens = if only_echo { 1 } else { fields.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS) };
    let endpoint = EndpointParams {
        max_tokens: Some(("max_tokens", max_tokens)),
        logprobs: own.logprobs,
        prompt_logprobs: own.logprobs.filter(|_| is_echo),
        max_model_len: app.backend.info().max_model_len,
        most_tokens: app.config.sampling_defaults.max_tokens(),
        logprobs_limits: app.logprobs_limits(),
    };
    let mut params = sampling::params(&fields, endpoint, &app.sampling_defaults)?;
    if only_echo && !params.logprob_token_ids.is_empty() {
        let message = "logprob_token_ids are those of the output, of which there is none with `max_tokens` 0.";
        return Err(ApiError::invalid("logprob_token_ids", message));
    }
    params.thinking_budget = thinking::budget(&app, &fields, false)?;
    let beams = sampling::beams(&fields, &params)
        .map_err(|error| error.rename("structured_outputs", structured::param(&fields)))?;
    if beams.is_some() && fields.stream == Some(true) {
        return Err(ApiError::invalid(
            "use_beam_search",
            "Beam search has no output before its end: it cannot stream.",
        ));
    }
    let id = request_id::resolve(&call.parts.headers, fields.request_id.as_deref());
    tracing::Span::current().record("id", &id);

    let mut echo = is_echo.then(Vec::new);
    let mut requests = Vec::new();
    for input in prompts(own.prompt)? {
        let (ids, text) = tokenize(&app, input, &fields).await?;
        let ids = prompt::fit(&app, ids, &fields, params.max_tokens)?;
        if let Some(echo) = &mut echo {
            echo.push(match text {
                Some(text) => text,
                None => app.backend.decode(&ids, false)?,
            });
        }
        let mut request = GenerateRequest::new(Prompt::Tokens(ids), params.clone());
        request.cache_salt = fields.cache_salt.clone();
        request.priority = priority::of(&call.parts.headers, &fields)?;
        requests.push(request);
    }
    let n = beams.map_or(params.n, |beams| beams.width) as usize;
    let n_prompts = requests.len();
    let mut usage = UsageMeter::new(&app.config, fields.stream_options, n_prompts, n);
    usage.only_prompts = only_echo;
    let mut choices = Choices::start(&app, id.clone(), requests, beams)
        .await
        .map_err(|error| error.rename("structured_outputs", structured::param(&fields)))?;
    let frames = CompletionFrames {
        app: app.clone(),
        n_logprobs: logprobs::n_shown(&params),
        tokens_as_ids: fields.return_tokens_as_token_ids == Some(true),
        return_token_ids: fields.return_token_ids == Some(true),
        echo,
        only_echo,
        n,
        prompts: vec![None; n_prompts],
        choices: vec![ChoiceState::default(); n_prompts * n],
    };
    let id = format!("cmpl-{id}");
    let created = app.now();
    if fields.stream == Some(true) {
        choices.wait_for_output().await?;
        let writer = ChunkWriter::new(ChunkHead { id: &id, object: "text_completion", created, model: &model });
        let interval = app.stream_interval(&fields);
        return Ok(SseBody::new(choices, frames, writer, usage, interval).into_response());
    }
    let choices = whole_choices(frames, &mut usage, choices).await?;
    json::response(&Completion {
        id,
        object: "text_completion".into(),
        created,
        model,
        choices,
        service_tier: None,
        system_fingerprint: Some(app.system_fingerprint.clone()),
        usage: usage.total(),
        kv_transfer_params: None,
        ec_transfer_params: None,
        metrics: None,
    })
}

fn refuse_unsupported(own: &CompletionFields) -> Result<(), ApiError> {
    if own.prompt_embeds.is_some() {
        return Err(ApiError::unsupported("prompt_embeds"));
    }
    if own.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::unsupported("suffix"));
    }
    Ok(())
}

fn prompts(input: Option<PromptInput>) -> Result<Vec<Prompt>, ApiError> {
    let prompts: Vec<Prompt> = match input {
        None => Vec::new(),
        Some(PromptInput::Text(text)) => vec![Prompt::Text(text)],
        Some(PromptInput::Tokens(ids)) if ids.is_empty() => Vec::new(),
        Some(PromptInput::Tokens(ids)) => vec![Prompt::Tokens(ids)],
        Some(PromptInput::Texts(texts)) => texts.into_iter().map(Prompt::Text).collect(),
        Some(PromptInput::TokenLists(lists)) => lists.into_iter().map(Prompt::Tokens).collect(),
    };
    match prompts.len() {
        0 => Err(ApiError::invalid("prompt", "`prompt` must be given and must not be empty.")),
        n if n > MAX_PROMPTS => {
            Err(ApiError::invalid("prompt", format!("A request can have at most {MAX_PROMPTS} prompts, got {n}.")))
        }
        _ => Ok(prompts),
    }
}

/// The prompt's token ids, and its text if it came as one and is to be repeated.
async fn tokenize(
    app: &Arc<App>,
    input: Prompt,
    fields: &SamplingFields,
) -> Result<(PromptTokens, Option<String>), ApiError> {
    match input {
        Prompt::Tokens(ids) => {
            prompt::check_vocabulary(app, "prompt", &ids)?;
            Ok((PromptTokens::bare(ids), None))
        }
        Prompt::Text(text) => {
            let echo = (fields.echo == Some(true)).then(|| text.clone());
            let encoding = TextEncoding {
                add_special_tokens: fields.add_special_tokens.unwrap_or(true),
                will_be_cut: fields.truncate_prompt_tokens.is_some(),
            };
            Ok((prompt::encode(app.clone(), text, encoding).await?, echo))
        }
    }
}

async fn whole_choices(
    mut frames: CompletionFrames,
    usage: &mut UsageMeter,
    choices: Choices,
) -> Result<Vec<CompletionChoice>, ApiError> {
    let finished = choices.collect(|_| {}).await?;
    frames.prompts = finished.prompts;
    for (idx, prompt) in frames.prompts.iter().enumerate() {
        if let Some(prompt) = prompt {
            usage.prompt(idx, prompt);
        }
    }
    let choice = |mut delta: Delta| {
        usage.output(delta.index, delta.token_ids.len());
        let mut state = ChoiceState::default();
        frames.shape(&mut delta, &state);
        let prompt = frames.prompts[delta.index / frames.n].as_ref();
        let names = TokenNames { backend: &*frames.app.backend, as_ids: frames.tokens_as_ids };
        let prompt_logprobs = prompt.and_then(|prompt| prompt.logprobs.as_deref());
        let logprobs = frames.n_logprobs.map(|n_top| frames.logprobs(&delta, &mut state, n_top));
        let (reason, stop_reason) = delta.finish.map(|finish| (finish.reason, finish.stop_reason)).unzip();
        CompletionChoice {
            index: delta.index,
            logprobs,
            text: delta.text,
            finish_reason: reason,
            stop_reason: stop_reason.flatten().map(wire_stop_reason),
            token_ids: frames.return_token_ids.then_some(delta.token_ids),
            prompt_logprobs: prompt_logprobs.map(|tokens| logprobs::prompt(names, tokens)),
            prompt_token_ids: prompt.filter(|_| frames.return_token_ids).map(|prompt| prompt.token_ids.to_vec()),
            routed_experts: None,
            weight_versions: None,
        }
    };
    Ok(finished.choices.into_iter().map(choice).collect())
}
