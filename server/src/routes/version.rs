//! `GET /version`.

use hyper::Response;
use schemars::JsonSchema;
use serde::Serialize;

use crate::{ApiError, app::Body, json};

/// The body of `GET /version`.
#[derive(Serialize, JsonSchema)]
pub struct Version {
    /// Of the server.
    version: &'static str,
}

pub async fn answer() -> Result<Response<Body>, ApiError> {
    json::response(&Version { version: env!("CARGO_PKG_VERSION") })
}
