//! `POST /invocations`: SageMaker's one path to every model; the body's shape says which endpoint is meant.

use std::sync::Arc;

use hyper::{Method, Response};
use serde_json::{Map, Value};

use super::Call;
use crate::{
    ApiError,
    app::{App, Body},
    json,
};

/// A field that only the bodies of an endpoint have, and its path; the first that is there counts.
const SHAPES: [(&str, &str); 7] = [
    ("messages", "/v1/chat/completions"),
    ("prompt", "/v1/completions"),
    ("input", "/v1/embeddings"),
    ("queries", "/score"),
    ("text_1", "/score"),
    ("data_1", "/score"),
    ("query", "/rerank"),
];

pub async fn answer(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let fields: Map<String, Value> = json::parse(&call.body)?;
    let shape = SHAPES.iter().find(|(field, _)| fields.contains_key(*field));
    let route = shape.and_then(|(_, path)| super::find(&Method::POST, path).ok()).ok_or_else(|| {
        ApiError::schema("", "no field says what is wanted: `messages`, `prompt`, `input`, `queries` or `query`")
    })?;
    route.check_needs(&app)?;
    (route.handler)(app, call).await
}
