//! A request's priority: the header's, else the body's.

use ember_common::openai::SamplingFields;
use hyper::HeaderMap;

use crate::ApiError;

/// Carries a request's priority; lower goes first.
const HEADER: &str = "x-vllm-priority";

/// The priority of a request; 0 if it says none.
///
/// # Errors
/// Status 400 if the header is not a number.
pub fn of(headers: &HeaderMap, fields: &SamplingFields) -> Result<i64, ApiError> {
    let Some(value) = headers.get(HEADER) else {
        return Ok(fields.priority.unwrap_or(0));
    };
    let number = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    number.ok_or_else(|| ApiError::invalid("priority", "The header X-Vllm-Priority must be an integer."))
}
