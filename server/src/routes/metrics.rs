//! `GET /metrics`: Prometheus text.

use std::sync::Arc;

use hyper::{Response, header};

use crate::{
    ApiError,
    app::{App, Body, full_body},
};

pub async fn answer(app: Arc<App>) -> Result<Response<Body>, ApiError> {
    app.metrics.steps(&app.backend.take_step_sizes());
    let text = app.metrics.render(&app.backend.stats());
    let mut response = Response::new(full_body(text));
    let content_type = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    Ok(response)
}
