//! `POST /score`: how near pairs of texts are.

use std::sync::Arc;

use ember_common::openai::{PoolingUsage, Score, ScoreFields, ScoreList};
use hyper::Response;

use super::{
    Call,
    embeddings::{Truncation, check_documents, cosine, embed_pairs},
};
use crate::{
    ApiError,
    app::{App, Body},
    json, request_id,
};

pub async fn answer(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let fields: ScoreFields = json::parse(&call.body)?;
    let model = app.model_name(fields.model.as_deref())?.to_owned();
    let truncation = Truncation::of(&app, fields.truncate_prompt_tokens, None)?;
    let (queries, documents) = (fields.queries.into_vec(), fields.documents.into_vec());
    let (n_queries, n) = (queries.len(), documents.len());
    check_documents(n)?;
    if n_queries != 1 && n_queries != n {
        let message = format!("There must be one query or as many as documents ({n}), not {n_queries}.");
        return Err(ApiError::invalid("queries", message));
    }
    let of_queries = truncation.and_at_most(&app, "max_tokens_per_query", fields.max_tokens_per_query)?;
    let of_documents = truncation.and_at_most(&app, "max_tokens_per_doc", fields.max_tokens_per_doc)?;
    let (vectors, n_tokens) = embed_pairs(&app, (queries, of_queries), (documents, of_documents)).await?;
    let (queries, documents) = vectors.split_at(n_queries);
    let data = documents.iter().enumerate().map(|(index, document)| {
        let query = &queries[if n_queries == 1 { 0 } else { index }];
        Score { index, object: "score", score: cosine(query, document) }
    });
    json::response(&ScoreList {
        id: format!("score-{}", request_id::resolve(&call.parts.headers, fields.request_id.as_deref())),
        object: "list",
        created: app.now(),
        model,
        data: data.collect(),
        usage: PoolingUsage::of(n_tokens),
    })
}
