//! `GET /load`: how many sequences are running or waiting.

use std::sync::Arc;

use hyper::Response;
use schemars::JsonSchema;
use serde::Serialize;

use crate::{
    ApiError,
    app::{App, Body},
    json,
};

/// The body of `GET /load`.
#[derive(Serialize, JsonSchema)]
pub struct Load {
    /// Sequences that are running or waiting.
    server_load: usize,
}

pub async fn answer(app: Arc<App>) -> Result<Response<Body>, ApiError> {
    json::response(&Load { server_load: app.admission.n_admitted() })
}
