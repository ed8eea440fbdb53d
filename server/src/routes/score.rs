//! `POST /score`: how near pairs of texts are.

use std::sync::Arc;

use ember_common::openai::{PoolingUsage, Score, ScoreFields, ScoreList};
use hyper::Response;

use super::{
    Call,
    embeddings::{MAX_TEXTS, Truncation, cosine, embed, encode, now},
};
use crate::{
    ApiError,
    app::{App, Body},
    json,
};

pub async fn answer(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let fields: ScoreFields = json::parse(&call.body)?;
    let model = app.model_name(fields.model.as_deref())?.to_owned();
    let truncation = Truncation::of(&app, fields.truncate_prompt_tokens, None)?;
    let (queries, documents) = (fields.queries.into_vec(), fields.documents.into_vec());
    let (n_queries, n) = (queries.len(), documents.len());
    if n == 0 || n > MAX_TEXTS {
        return Err(ApiError::invalid("documents", format!("There must be 1 to {MAX_TEXTS} documents, not {n}.")));
    }
    if n_queries != 1 && n_queries != n {
        let message = format!("There must be one query or as many as documents ({n}), not {n_queries}.");
        return Err(ApiError::invalid("queries", message));
    }
    let mut texts = Vec::with_capacity(n_queries + n);
    for text in queries.into_iter().chain(documents) {
        texts.push(truncation.cut(encode(&app, text, true).await?));
    }
    let (vectors, n_tokens) = embed(app.clone(), texts).await?;
    let (queries, documents) = vectors.split_at(n_queries);
    let data = documents.iter().enumerate().map(|(index, document)| {
        let query = &queries[if n_queries == 1 { 0 } else { index }];
        Score { index, object: "score", score: cosine(query, document) }
    });
    json::response(&ScoreList {
        id: format!("score-{}", uuid::Uuid::new_v4().simple()),
        object: "list",
        created: now(),
        model,
        data: data.collect(),
        usage: PoolingUsage::of(n_tokens),
    })
}
