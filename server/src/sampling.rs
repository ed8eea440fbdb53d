//! From the fields of a request and the model's defaults to the engine's [`SamplingParams`].

use ember_common::openai::{OneOrMany, RepetitionDetectionFields, SamplingFields};
use ember_engine::{RepetitionDetection, SamplingParams};

use crate::{ApiError, beam_search::BeamSearch, structured};

/// Most stop strings of a request.
const MAX_STOP_STRINGS: usize = 4;
/// Temperatures between 0 and this are raised to it: dividing by less overflows the logits.
const MIN_TEMPERATURE: f32 = 0.01;
const MAX_LOGIT_BIAS: f32 = 100.0;
const MAX_CACHE_SALT_CHARS: usize = 128;
/// Widest beam search.
const MAX_BEAMS: u32 = 64;

/// How many log-probabilities there can be.
#[derive(Debug, Clone, Copy, Default)]
pub struct LogprobsLimits {
    /// Most that a request may ask for.
    pub most: u32,
    /// All that there are: what -1 stands for.
    pub all: u32,
}

/// What the endpoint adds to the shared fields.
#[derive(Debug, Clone, Copy, Default)]
pub struct EndpointParams {
    /// Most output tokens and the field that said so.
    pub max_tokens: Option<(&'static str, i64)>,
    /// Candidates per position.
    pub logprobs: Option<i64>,
    /// The same for the prompt; `None` leaves it to the field `prompt_logprobs`.
    pub prompt_logprobs: Option<i64>,
    /// Longest prompt + output in tokens.
    pub max_model_len: usize,
    /// Output tokens to which more are cut.
    pub most_tokens: Option<u32>,
    /// For log-probabilities of output and prompt.
    pub logprobs_limits: LogprobsLimits,
}

/// The engine's parameters. Ranges that the engine checks itself are left to it.
///
/// # Errors
/// Status 400 naming the field that is out of range or not supported.
pub fn params(
    fields: &SamplingFields,
    endpoint: EndpointParams,
    defaults: &SamplingParams,
) -> Result<SamplingParams, ApiError> {
    refuse_unsupported(fields)?;
    check_stream(fields)?;
    check_cache_salt(fields.cache_salt.as_deref())?;
    let stop = fields.stop.clone().map_or_else(|| defaults.stop.clone(), OneOrMany::into_vec);
    if stop.len() > MAX_STOP_STRINGS {
        return Err(ApiError::invalid(
            "stop",
            format!("stop can have at most {MAX_STOP_STRINGS} strings, got {}.", stop.len()),
        ));
    }
    let prompt_logprobs = fields.prompt_logprobs.or(endpoint.prompt_logprobs);
    if fields.stream == Some(true) && fields.prompt_logprobs.is_some_and(|n| n > 0 || n == -1) {
        return Err(ApiError::invalid("prompt_logprobs", "`prompt_logprobs` are not available when `stream=True`."));
    }
    let mut stop_token_ids = defaults.stop_token_ids.clone();
    stop_token_ids.extend(token_ids("stop_token_ids", fields.stop_token_ids.as_deref().unwrap_or_default())?);
    let mut temperature = fields.temperature.unwrap_or(defaults.temperature);
    if temperature > 0.0 && temperature < MIN_TEMPERATURE {
        temperature = MIN_TEMPERATURE;
    }
    let mut params = SamplingParams {
        // The width of a beam search is not a number of samples.
        n: if fields.use_beam_search == Some(true) { 1 } else { non_negative("n", fields.n)?.unwrap_or(1) },
        temperature,
        top_p: fields.top_p.unwrap_or(defaults.top_p),
        top_k: top_k(fields.top_k)?.unwrap_or(defaults.top_k),
        min_p: fields.min_p.unwrap_or(defaults.min_p),
        presence_penalty: fields.presence_penalty.unwrap_or(defaults.presence_penalty),
        frequency_penalty: fields.frequency_penalty.unwrap_or(defaults.frequency_penalty),
        repetition_penalty: fields.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        logit_bias: logit_bias(fields)?,
        allowed_token_ids: fields
            .allowed_token_ids
            .as_deref()
            .map(|ids| token_ids("allowed_token_ids", ids))
            .transpose()?,
        bad_words: fields.bad_words.clone().unwrap_or_default(),
        structured_outputs: structured::resolve(fields)?,
        seed: fields.seed.filter(|&seed| seed != -1).map(|seed| seed as u64),
        stop,
        stop_token_ids,
        include_stop_str_in_output: fields.include_stop_str_in_output.unwrap_or(false),
        ignore_eos: fields.ignore_eos.unwrap_or(false),
        min_tokens: non_negative("min_tokens", fields.min_tokens)?.unwrap_or(0),
        repetition_detection: repetition_detection(fields.repetition_detection)?,
        // Only those who know the prompt can tell.
        thinking_budget: None,
        max_tokens: max_tokens(endpoint)?.or(defaults.max_tokens).map(|n| n.min(endpoint.most_tokens.unwrap_or(n))),
        logprobs: n_logprobs("logprobs", endpoint.logprobs, endpoint.logprobs_limits)?,
        logprob_token_ids: token_ids("logprob_token_ids", fields.logprob_token_ids.as_deref().unwrap_or_default())?,
        prompt_logprobs: n_logprobs("prompt_logprobs", prompt_logprobs, endpoint.logprobs_limits)?,
        skip_special_tokens: fields.skip_special_tokens.unwrap_or(true),
    };
    if params.is_greedy() && params.temperature >= 0.0 {
        (params.top_p, params.top_k, params.min_p) = (in_range_top_p(&params)?, 0, 0.0);
    }
    Ok(params)
}

/// What `use_beam_search` asks for; `None` if outputs are sampled.
///
/// # Errors
/// Status 400 for a width or a penalty out of range, and for fields that say how to sample or when to stop: a search
/// follows the model's own probabilities to the end of the text.
pub fn beams(fields: &SamplingFields, params: &SamplingParams) -> Result<Option<BeamSearch>, ApiError> {
    if fields.use_beam_search != Some(true) {
        return Ok(None);
    }
    for (field, is_set) in [
        ("structured_outputs", params.structured_outputs.is_some()),
        ("stop", fields.stop.clone().is_some_and(|stop| !stop.into_vec().is_empty())),
        ("stop_token_ids", fields.stop_token_ids.as_ref().is_some_and(|ids| !ids.is_empty())),
        ("min_tokens", params.min_tokens > 0),
        ("repetition_detection", params.repetition_detection.is_some()),
        ("logprob_token_ids", !params.logprob_token_ids.is_empty()),
        ("thinking_token_budget", params.thinking_budget.is_some()),
        ("logit_bias", !params.logit_bias.is_empty()),
        ("allowed_token_ids", params.allowed_token_ids.is_some()),
        ("bad_words", !params.bad_words.is_empty()),
        ("presence_penalty", fields.presence_penalty.is_some_and(|penalty| penalty != 0.0)),
        ("frequency_penalty", fields.frequency_penalty.is_some_and(|penalty| penalty != 0.0)),
        ("repetition_penalty", fields.repetition_penalty.is_some_and(|penalty| penalty != 1.0)),
    ] {
        if is_set {
            let message = format!("`{field}` has no effect on a beam search; leave it out, or `use_beam_search`.");
            return Err(ApiError::invalid(field, message));
        }
    }
    let width = fields.n.unwrap_or(1);
    let width = u32::try_from(width).ok().filter(|width| (1..=MAX_BEAMS).contains(width)).ok_or_else(|| {
        ApiError::invalid("n", format!("n must be between 1 and {MAX_BEAMS} with use_beam_search, got {width}."))
    })?;
    let length_penalty = fields.length_penalty.unwrap_or(1.0);
    if !length_penalty.is_finite() {
        return Err(ApiError::invalid("length_penalty", "length_penalty must be a finite number."));
    }
    Ok(Some(BeamSearch { width, length_penalty }))
}

fn repetition_detection(fields: Option<RepetitionDetectionFields>) -> Result<Option<RepetitionDetection>, ApiError> {
    let Some(RepetitionDetectionFields { max_pattern_size, min_pattern_size, min_count }) = fields else {
        return Ok(None);
    };
    if max_pattern_size == 0 {
        return Ok(None);
    }
    let min_pattern_size = min_pattern_size.max(1);
    let wrong = |message: String| Err(ApiError::invalid("repetition_detection", message));
    if min_pattern_size > max_pattern_size {
        return wrong(format!("min_pattern_size={min_pattern_size} is above max_pattern_size={max_pattern_size}."));
    }
    if min_count < 2 {
        return wrong(format!("min_count must be at least 2, got {min_count}."));
    }
    let [min_pattern_size, max_pattern_size, min_count] =
        [min_pattern_size, max_pattern_size, min_count].map(|n| n as usize);
    Ok(Some(RepetitionDetection { min_pattern_size, max_pattern_size, min_count }))
}

/// Greedy sampling ignores `top_p`, but one out of range is still an error.
fn in_range_top_p(params: &SamplingParams) -> Result<f32, ApiError> {
    if params.top_p > 0.0 && params.top_p <= 1.0 {
        Ok(1.0)
    } else {
        Err(ApiError::invalid("top_p", format!("top_p must be in (0, 1], got {}.", params.top_p)))
    }
}

fn refuse_unsupported(fields: &SamplingFields) -> Result<(), ApiError> {
    for (field, value) in [
        ("watermarking", &fields.watermarking),
        ("kv_transfer_params", &fields.kv_transfer_params),
        ("ec_transfer_params", &fields.ec_transfer_params),
        ("vllm_xargs", &fields.vllm_xargs),
    ] {
        if value.is_some() {
            return Err(ApiError::unsupported(field));
        }
    }
    if fields.return_weight_versions == Some(true) {
        return Err(ApiError::unsupported("return_weight_versions"));
    }
    // Removed upstream, where they are ignored too: the output is not constrained.
    for (field, value) in [
        ("guided_json", &fields.guided_json),
        ("guided_regex", &fields.guided_regex),
        ("guided_choice", &fields.guided_choice),
        ("guided_grammar", &fields.guided_grammar),
    ] {
        if value.is_some() {
            tracing::warn!(field, "this field no longer exists and is ignored");
        }
    }
    Ok(())
}

fn check_stream(fields: &SamplingFields) -> Result<(), ApiError> {
    if fields.stream_options.is_some() && fields.stream != Some(true) {
        return Err(ApiError::invalid("stream_options", "Stream options can only be defined when `stream=True`."));
    }
    if fields.stream_interval.is_some_and(|n| n < 1) {
        return Err(ApiError::invalid("stream_interval", "stream_interval must be at least 1."));
    }
    Ok(())
}

/// Checks a request's `cache_salt`.
///
/// # Errors
/// Status 400 for one that is not allowed.
pub fn check_cache_salt(salt: Option<&str>) -> Result<(), ApiError> {
    let is_valid = |salt: &str| {
        (1..=MAX_CACHE_SALT_CHARS).contains(&salt.chars().count()) && !salt.contains(['@', '/', '\\', '\0'])
    };
    if salt.is_some_and(|salt| !is_valid(salt)) {
        return Err(ApiError::invalid(
            "cache_salt",
            format!("cache_salt must have 1 to {MAX_CACHE_SALT_CHARS} characters and none of @ / \\ NUL."),
        ));
    }
    Ok(())
}

fn non_negative(param: &'static str, value: Option<i64>) -> Result<Option<u32>, ApiError> {
    value
        .map(|value| {
            u32::try_from(value).map_err(|_| {
                ApiError::invalid(param, format!("{param} must be greater than or equal to 0, got {value}."))
            })
        })
        .transpose()
}

fn max_tokens(endpoint: EndpointParams) -> Result<Option<u32>, ApiError> {
    let Some((param, value)) = endpoint.max_tokens else {
        return Ok(None);
    };
    if value < 1 {
        return Err(ApiError::invalid(param, format!("{param} must be at least 1, got {value}.")));
    }
    match u32::try_from(value) {
        Ok(n) if n as usize <= endpoint.max_model_len => Ok(Some(n)),
        _ => Err(ApiError::invalid(
            param,
            format!(
                "{param}={value} cannot be greater than max_model_len={}. Please request fewer output tokens.",
                endpoint.max_model_len
            ),
        )),
    }
}

fn top_k(value: Option<i64>) -> Result<Option<u32>, ApiError> {
    match value {
        None => Ok(None),
        Some(-1) => Ok(Some(0)),
        Some(k) => u32::try_from(k)
            .map(Some)
            .map_err(|_| ApiError::invalid("top_k", format!("top_k must be 0 (disable), or at least 1, got {k}."))),
    }
}

fn n_logprobs(
    param: &'static str,
    value: Option<i64>,
    LogprobsLimits { most, all }: LogprobsLimits,
) -> Result<Option<u32>, ApiError> {
    let asked = match value {
        None => return Ok(None),
        Some(-1) => i64::from(all),
        Some(k) if k < 0 => {
            return Err(ApiError::invalid(param, format!("{param} must be non-negative or -1, got {k}.")));
        }
        Some(k) => k,
    };
    let refused = || {
        let message = format!("Requested {param} of {asked}, which is greater than max allowed: {most}");
        ApiError::invalid(param, message)
    };
    u32::try_from(asked).ok().filter(|&asked| asked <= most).map(Some).ok_or_else(refused)
}

fn token_ids(param: &'static str, ids: &[i64]) -> Result<Vec<u32>, ApiError> {
    ids.iter()
        .map(|&id| u32::try_from(id).map_err(|_| ApiError::invalid(param, format!("{param}: {id} is not a token id."))))
        .collect()
}

fn logit_bias(fields: &SamplingFields) -> Result<Vec<(u32, f32)>, ApiError> {
    let pairs = fields.logit_bias.iter().flat_map(|bias| &bias.0);
    pairs
        .map(|(id, bias)| match id.parse() {
            Ok(id) => Ok((id, bias.clamp(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS))),
            Err(_) => Err(ApiError::invalid("logit_bias", format!("logit_bias: key `{id}` is not a token id."))),
        })
        .collect()
}
