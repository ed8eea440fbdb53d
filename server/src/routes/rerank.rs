//! `POST /rerank`: documents in the order of their nearness to a query.

use std::sync::Arc;

use ember_common::openai::{PoolingUsage, Ranked, RankedDocument, Ranking, RerankFields};
use hyper::Response;

use super::{
    Call,
    embeddings::{Truncation, check_documents, cosine, embed_texts},
};
use crate::{
    ApiError,
    app::{App, Body},
    json,
};

pub async fn answer(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let fields: RerankFields = json::parse(&call.body)?;
    let model = app.model_name(fields.model.as_deref())?.to_owned();
    let truncation = Truncation::of(&app, fields.truncate_prompt_tokens, None)?;
    let n = fields.documents.len();
    check_documents(n)?;
    let texts = std::iter::once(&fields.query).chain(&fields.documents).cloned().collect();
    let (vectors, n_tokens) = embed_texts(&app, texts, truncation).await?;
    let scores = vectors[1..].iter().map(|document| cosine(&vectors[0], document));
    let mut results: Vec<Ranked> = fields
        .documents
        .into_iter()
        .zip(scores)
        .enumerate()
        .map(|(index, (text, relevance_score))| Ranked { index, document: RankedDocument { text }, relevance_score })
        .collect();
    // Stable: equal documents keep their order.
    results.sort_by(|a, b| b.relevance_score.total_cmp(&a.relevance_score));
    results.truncate(fields.top_n.filter(|&n| n > 0).unwrap_or(n));
    json::response(&Ranking {
        id: format!("rerank-{}", uuid::Uuid::new_v4().simple()),
        model,
        usage: PoolingUsage::of(n_tokens),
        results,
    })
}
