//! Reading request bodies and writing response bodies as JSON.

use bytes::Bytes;
use hyper::{Response, header};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    ApiError,
    app::{Body, full_body},
};

/// Reads `body` as `T`; unknown fields are ignored.
///
/// # Errors
/// Status 400 with the dotted path of the field at fault.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    // Structs would read arrays, too.
    if body.iter().find(|byte| !byte.is_ascii_whitespace()).is_some_and(|&byte| byte != b'{') {
        return Err(ApiError::schema("", "expected a JSON object"));
    }
    // The path is found by a second, slower pass that only bad requests pay for.
    serde_json::from_slice(body).map_err(|_| {
        let mut deserializer = serde_json::Deserializer::from_slice(body);
        match serde_path_to_error::deserialize::<_, T>(&mut deserializer) {
            Err(error) => {
                // `tokens[0]` as `tokens.0`.
                let path = error.path().to_string().replace('[', ".").replace(']', "");
                let message = error.inner().to_string();
                let missing = message.strip_prefix("missing field `").and_then(|rest| rest.split('`').next());
                let field = match (path.as_str(), missing) {
                    (".", Some(field)) => field.to_owned(),
                    // `?` is where no field had begun.
                    ("." | "?", None) => String::new(),
                    (path, Some(field)) => format!("{path}.{field}"),
                    (path, None) => path.to_owned(),
                };
                ApiError::schema(&field, message)
            }
            Ok(_) => ApiError::schema("", "the body must be one JSON object with nothing after it"),
        }
    })
}

/// A 200 response with `value` as its body.
pub fn response(value: &impl Serialize) -> Result<Response<Body>, ApiError> {
    let body = serde_json::to_vec(value).map_err(|error| ApiError::internal(error.to_string()))?;
    let mut response = Response::new(full_body(Bytes::from(body)));
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    Ok(response)
}
