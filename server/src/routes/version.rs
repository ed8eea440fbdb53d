//! `GET /version`.

use hyper::Response;
use serde::Serialize;

use crate::{ApiError, app::Body, json};

#[derive(Serialize)]
struct Version {
    version: &'static str,
}

pub async fn answer() -> Result<Response<Body>, ApiError> {
    json::response(&Version { version: env!("CARGO_PKG_VERSION") })
}
