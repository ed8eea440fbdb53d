//! `GET /v1/models`: one card per served name.

use std::sync::Arc;

use ember_common::openai::{ModelCard, ModelList, ModelPermission};
use hyper::Response;

use crate::{
    ApiError,
    app::{App, Body},
    json,
};

pub async fn answer(app: Arc<App>) -> Result<Response<Body>, ApiError> {
    let info = app.backend.info();
    let card = |name: &String| ModelCard {
        id: name.clone(),
        object: "model".into(),
        created: info.created,
        owned_by: "ember".into(),
        root: Some(info.model_path.display().to_string()),
        parent: None,
        max_model_len: Some(info.max_model_len),
        permission: vec![ModelPermission::new(format!("modelperm-{}", uuid::Uuid::new_v4().simple()), info.created)],
    };
    json::response(&ModelList { object: "list".into(), data: app.config.served_model_names.iter().map(card).collect() })
}
