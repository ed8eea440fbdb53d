//! Names of requests: the client's own, else a random one.

use hyper::HeaderMap;

/// Carries a request's name in both directions.
pub const HEADER: &str = "x-request-id";

/// The name in the header, else the one in the body, else 32 random hexadecimal digits.
pub fn resolve(headers: &HeaderMap, body_id: Option<&str>) -> String {
    headers
        .get(HEADER)
        .and_then(|value| value.to_str().ok())
        .or(body_id)
        .filter(|id| !id.is_empty())
        .map_or_else(|| uuid::Uuid::new_v4().simple().to_string(), str::to_owned)
}
