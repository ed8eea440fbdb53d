//! `POST /v1/embeddings`: texts to vectors.

use std::sync::Arc;

use ember_common::openai::{Embedding, EmbeddingFields, EmbeddingList, PoolingUsage, PromptInput};
use hyper::Response;

use super::Call;
use crate::{
    ApiError,
    app::{App, Body},
    embedding_encoding::EmbeddingEncoding,
    json,
    prompt::{self, PromptTokens, TextEncoding, check_vocabulary},
    request_id,
    sampling::check_cache_salt,
};

/// Most texts of a request.
const MAX_TEXTS: usize = 2048;

pub async fn answer(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let fields: EmbeddingFields = json::parse(&call.body)?;
    let model = app.model_name(fields.model.as_deref())?.to_owned();
    for (is_set, field) in [
        (fields.messages.is_some(), "messages"),
        (fields.normalize.is_some(), "normalize"),
        (fields.use_activation == Some(false), "use_activation"),
        (fields.padding.is_some(), "padding"),
    ] {
        if is_set {
            return Err(ApiError::unsupported(field));
        }
    }
    check_cache_salt(fields.cache_salt.as_deref())?;
    let encoding = EmbeddingEncoding::of(&fields)?;
    let truncation = Truncation::of(&app, fields.truncate_prompt_tokens, fields.truncation_side.as_deref())?;
    let add_special_tokens = fields.add_special_tokens.unwrap_or(true);
    let texts = match fields.input {
        PromptInput::Text(text) => truncation.encode(&app, vec![text], add_special_tokens).await?,
        PromptInput::Texts(texts) => {
            check_count(texts.len())?;
            truncation.encode(&app, texts, add_special_tokens).await?
        }
        // `[]` reads as no token ids, too.
        PromptInput::Tokens(ids) if ids.is_empty() => Vec::new(),
        PromptInput::Tokens(ids) => truncation.cut_all(vec![ids]),
        PromptInput::TokenLists(lists) => truncation.cut_all(lists),
    };
    check_count(texts.len())?;
    for ids in &texts {
        check_vocabulary(&app, "input", ids)?;
    }
    let (vectors, n_tokens) = embed(app.clone(), texts).await?;
    if let Some(wanted) = fields.dimensions
        && vectors.first().is_some_and(|vector| usize::try_from(wanted) != Ok(vector.len()))
    {
        let message = format!("This model's vectors have {} dimensions and cannot be cut.", vectors[0].len());
        return Err(ApiError::invalid("dimensions", message));
    }
    let data = vectors.into_iter().enumerate();
    json::response(&EmbeddingList {
        id: format!("embd-{}", request_id::resolve(&call.parts.headers, fields.request_id.as_deref())),
        object: "list",
        created: app.now(),
        model,
        data: data.map(|(index, v)| Embedding { index, object: "embedding", embedding: encoding.value(v) }).collect(),
        usage: PoolingUsage::of(n_tokens),
    })
}

fn check_count(n: usize) -> Result<(), ApiError> {
    match n {
        0 => Err(ApiError::invalid("input", "input must have at least one text.")),
        1..=MAX_TEXTS => Ok(()),
        _ => Err(ApiError::invalid("input", format!("input has {n} texts; at most {MAX_TEXTS} are allowed."))),
    }
}

/// Checks how many documents a query is compared with.
pub(super) fn check_documents(n: usize) -> Result<(), ApiError> {
    match n {
        1..=MAX_TEXTS => Ok(()),
        _ => Err(ApiError::invalid("documents", format!("There must be 1 to {MAX_TEXTS} documents, not {n}."))),
    }
}

/// The vectors of queries and documents with the model's special tokens, in this order, and how many tokens they have.
pub(super) async fn embed_pairs(
    app: &Arc<App>,
    (queries, of_queries): (Vec<String>, Truncation),
    (documents, of_documents): (Vec<String>, Truncation),
) -> Result<(Vec<Vec<f32>>, usize), ApiError> {
    let mut texts = of_queries.encode(app, queries, true).await?;
    texts.extend(of_documents.encode(app, documents, true).await?);
    embed(app.clone(), texts).await
}

/// How long texts are cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Truncation {
    keep: Option<usize>,
    keeps_end: bool,
}

impl Truncation {
    /// From a request's fields.
    pub(super) fn of(app: &App, n: Option<i64>, side: Option<&str>) -> Result<Self, ApiError> {
        let most = app.backend.info().max_model_len;
        let keep = n.map(|asked| prompt::kept_tokens(app, asked, most)).transpose()?;
        Ok(Self { keep, keeps_end: prompt::keeps_end(side, false)? })
    }

    /// The same, but for texts of `n` tokens of their own at most; 0 sets no limit. `param` is the field's name.
    pub(super) fn and_at_most(self, app: &App, param: &'static str, n: Option<i64>) -> Result<Self, ApiError> {
        let max_model_len = app.backend.info().max_model_len;
        match usize::try_from(n.unwrap_or(0)) {
            Ok(0) => Ok(self),
            Ok(n) if n <= max_model_len => {
                let (before, after) = app.backend.n_added_tokens();
                let most = n + before + after;
                Ok(Self { keep: Some(self.keep.map_or(most, |keep| keep.min(most))), ..self })
            }
            _ => Err(ApiError::invalid(param, format!("{param} must be between 0 and max_model_len={max_model_len}."))),
        }
    }

    /// Texts as token ids, cut.
    async fn encode(
        self,
        app: &Arc<App>,
        texts: Vec<String>,
        add_special_tokens: bool,
    ) -> Result<Vec<Vec<u32>>, ApiError> {
        let encoding = TextEncoding { add_special_tokens, will_be_cut: self.keep.is_some() };
        let mut all = Vec::with_capacity(texts.len());
        for text in texts {
            all.push(self.cut(prompt::encode(app.clone(), text, encoding).await?));
        }
        Ok(all)
    }

    fn cut_all(self, texts: Vec<Vec<u32>>) -> Vec<Vec<u32>> {
        texts.into_iter().map(|ids| self.cut(PromptTokens::bare(ids))).collect()
    }

    fn cut(self, tokens: PromptTokens) -> Vec<u32> {
        match self.keep {
            Some(keep) => tokens.cut(keep, self.keeps_end),
            None => tokens.ids,
        }
    }
}

/// The vectors of `texts`, and how many tokens they have.
async fn embed(app: Arc<App>, texts: Vec<Vec<u32>>) -> Result<(Vec<Vec<f32>>, usize), ApiError> {
    let n_tokens = texts.iter().map(Vec::len).sum();
    let vectors = tokio::task::spawn_blocking(move || app.backend.embed(&texts))
        .await
        .map_err(|error| ApiError::internal(format!("embedding failed: {error}")))??;
    Ok((vectors, n_tokens))
}

/// The cosine of the angle between `a` and `b`; 0 if one is zero.
pub(super) fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let lengths = (dot(a, a) * dot(b, b)).sqrt();
    if lengths > 0.0 { dot(a, b) / lengths } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosines_do_not_depend_on_lengths() {
        assert!((cosine(&[3.0, 0.0], &[0.5, 0.5]) - 0.5f32.sqrt()).abs() < 1e-6);
        assert_eq!(cosine(&[0.0, 0.0], &[1.0, 2.0]), 0.0);
    }
}
