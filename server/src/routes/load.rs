//! `GET /load`: how many sequences are running or waiting.

use std::sync::Arc;

use hyper::Response;
use serde::Serialize;

use crate::{
    ApiError,
    app::{App, Body},
    json,
};

#[derive(Serialize)]
struct Load {
    server_load: usize,
}

pub async fn answer(app: Arc<App>) -> Result<Response<Body>, ApiError> {
    json::response(&Load { server_load: app.admission.n_admitted() })
}
