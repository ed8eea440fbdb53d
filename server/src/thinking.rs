//! `thinking_token_budget`: how long a model may reason, as the engine is told.

use ember_common::openai::SamplingFields;
use ember_engine::ThinkingBudget;

use crate::{ApiError, app::App};

/// The limit that the request sets; `None` if it sets none. `begins_inside`: the output begins within reasoning even if
/// no mark of that is in the prompt.
///
/// # Errors
/// Status 400 for a number out of range, and where the server does not know how reasoning is marked.
pub fn budget(app: &App, fields: &SamplingFields, begins_inside: bool) -> Result<Option<ThinkingBudget>, ApiError> {
    const PARAM: &str = "thinking_token_budget";
    let Some(n_tokens) = fields.thinking_token_budget.filter(|&n| n != -1) else {
        return Ok(None);
    };
    let n_tokens = u32::try_from(n_tokens)
        .map_err(|_| ApiError::invalid(PARAM, format!("{PARAM} must be non-negative or -1, got {n_tokens}.")))?;
    let format = app.config.reasoning_parser.ok_or_else(|| {
        ApiError::invalid(
            PARAM,
            format!("{PARAM} needs to know how reasoning is marked: start the server with --reasoning-parser."),
        )
    })?;
    let [start, end] = [format.start, format.end].map(|tag| app.backend.encode_with_special(tag));
    Ok(Some(ThinkingBudget { n_tokens, start: start?, end: end?, begins_inside }))
}
