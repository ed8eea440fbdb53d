//! API keys: which paths need one and whether a request has one.

use bytes::Bytes;
use hyper::{HeaderMap, Method, Response, StatusCode, header};
use subtle::ConstantTimeEq;

use crate::{
    ApiError,
    app::{Body, full_body},
    routes,
};

/// Paths below these need a key; probes, metrics and tokenisation stay open.
const GUARDED: [&str; 2] = ["/v1", "/v2"];

/// Whether a request may pass. Every key is compared in full and in constant time.
pub fn is_authorized(api_keys: &[String], method: &Method, path: &str, headers: &HeaderMap) -> bool {
    if api_keys.is_empty() || method == Method::OPTIONS || !GUARDED.iter().any(|prefix| path.starts_with(prefix)) {
        return true;
    }
    let is_known =
        |token: &[u8]| api_keys.iter().fold(0, |found, key| found | key.as_bytes().ct_eq(token).unwrap_u8()) == 1;
    // Anthropic's clients send the key alone in a header of their own.
    if path.starts_with("/v1/messages") && headers.get("x-api-key").is_some_and(|key| is_known(key.as_bytes())) {
        return true;
    }
    let Some((scheme, token)) = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
    else {
        return false;
    };
    let is_known = is_known(token.trim().as_bytes());
    scheme.eq_ignore_ascii_case("bearer") && is_known
}

/// The answer to a request without a key. Its `error` is a string, unlike every other error; Anthropic's clients get
/// the object that they know.
pub fn unauthorized(path: &str) -> Response<Body> {
    if routes::is_anthropic(path) {
        return ApiError::http(StatusCode::UNAUTHORIZED).into_anthropic_response();
    }
    Response::builder()
        .status(StatusCode::UNAUTHORIZED)
        .header(header::CONTENT_TYPE, "application/json")
        .body(full_body(Bytes::from_static(br#"{"error":"Unauthorized"}"#)))
        .expect("constant header names and values are valid")
}
