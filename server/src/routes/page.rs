//! `GET /`: a page to chat with the model and watch it work, one file without anything from elsewhere.

use hyper::{Response, header};

use crate::{
    ApiError,
    app::{Body, full_body},
};

const PAGE: &str = include_str!("page.html");
/// The page runs its own script, and asks this server alone.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub async fn answer() -> Result<Response<Body>, ApiError> {
    let mut response = Response::new(full_body(PAGE));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(header::CONTENT_SECURITY_POLICY, header::HeaderValue::from_static(POLICY));
    Ok(response)
}
