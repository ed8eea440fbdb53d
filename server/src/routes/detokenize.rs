//! `POST /detokenize`.

use std::sync::Arc;

use ember_common::openai::{DetokenizeFields, Detokenized};
use hyper::Response;

use super::Call;
use crate::{
    ApiError,
    app::{App, Body},
    json, prompt,
};

pub async fn answer(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let fields: DetokenizeFields = json::parse(&call.body)?;
    app.model_name(fields.model.as_deref())?;
    prompt::check_vocabulary(&app, "tokens", &fields.tokens)?;
    json::response(&Detokenized { prompt: app.backend.decode(&fields.tokens, false)? })
}
