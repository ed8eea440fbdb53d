//! `GET /health`, `GET|POST /ping`: an empty 200 while the engine lives, 503 after it failed.

use std::sync::Arc;

use bytes::Bytes;
use hyper::{Response, StatusCode};

use crate::{
    ApiError,
    app::{App, Body, full_body},
};

pub async fn answer(app: Arc<App>) -> Result<Response<Body>, ApiError> {
    let mut response = Response::new(full_body(Bytes::new()));
    if !app.is_healthy() {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    Ok(response)
}
