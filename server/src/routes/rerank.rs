//! `POST /rerank`: documents in the order of their nearness to a query.

use std::sync::Arc;

use ember_common::openai::{PoolingUsage, Ranked, RankedDocument, Ranking, RerankFields};
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
    let fields: RerankFields = json::parse(&call.body)?;
    let model = app.model_name(fields.model.as_deref())?.to_owned();
    let truncation = Truncation::of(&app, fields.truncate_prompt_tokens, None)?;
    let n = fields.documents.len();
    check_documents(n)?;
    let of_query = truncation.and_at_most(&app, "max_tokens_per_query", fields.max_tokens_per_query)?;
    let of_documents = truncation.and_at_most(&app, "max_tokens_per_doc", fields.max_tokens_per_doc)?;
    let documents = (fields.documents.clone(), of_documents);
    let (vectors, n_tokens) = embed_pairs(&app, (vec![fields.query], of_query), documents).await?;
    let scores = vectors[1..].iter().map(|document| cosine(&vectors[0], document));
    let mut results: Vec<Ranked> = fields
        .documents
        .into_iter()
        .zip(scores)
        .enumerate()
        .map(|(index, (text, relevance_score))| Ranked {
            index,
            document: RankedDocument { text, multi_modal: None },
            relevance_score,
        })
        .collect();
    // Stable: equal documents keep their order.
    results.sort_by(|a, b| b.relevance_score.total_cmp(&a.relevance_score));
    results.truncate(fields.top_n.filter(|&n| n > 0).unwrap_or(n));
    json::response(&Ranking {
        id: format!("rerank-{}", request_id::resolve(&call.parts.headers, fields.request_id.as_deref())),
        model,
        usage: PoolingUsage::of(n_tokens),
        results,
    })
}
