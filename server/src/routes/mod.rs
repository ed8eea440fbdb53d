//! The table of endpoints. One file per endpoint, one row here.

mod chat_batch;
mod chat_completions;
mod completions;
mod detokenize;
mod embeddings;
mod health;
mod invocations;
mod load;
mod messages;
mod metrics;
mod models;
mod openapi;
mod page;
mod rerank;
mod responses;
mod score;
mod tokenize;
mod version;

use std::{future::Future, pin::Pin, sync::Arc};

use bytes::Bytes;
use ember_common::{
    anthropic::{Message, MessageEvent, MessagesFields, TokenCount},
    openai::{
        ChatCompletion, ChatCompletionChunk, ChatFields, Completion, CompletionChunk, CompletionFields,
        DetokenizeFields, Detokenized, EmbeddingFields, EmbeddingList, ModelList, ModelResponse, Ranking, RerankFields,
        ResponseEvent, ResponsesFields, SamplingFields, ScoreFields, ScoreList, TokenizeFields, Tokenized,
    },
};
use hyper::{Method, Response, http::request::Parts};
use schemars::{JsonSchema, Schema, SchemaGenerator};

use crate::{
    ApiError, Task,
    app::{App, Body},
};

/// One request to an endpoint.
pub struct Call {
    /// Method, path and headers.
    pub parts: Parts,
    /// The whole body; empty unless the route takes JSON.
    pub body: Bytes,
}

const GET: &[Method] = &[Method::GET];
const POST: &[Method] = &[Method::POST];
const GET_OR_POST: &[Method] = &[Method::GET, Method::POST];
/// Here and below errors have Anthropic's shape.
const MESSAGES: &str = "/v1/messages";

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, ApiError>> + Send>>;

/// One endpoint.
pub struct Route {
    /// Its exact path.
    pub path: &'static str,
    /// The methods it answers.
    pub methods: &'static [Method],
    /// Whether its requests count in the HTTP metrics; probes do not.
    pub is_measured: bool,
    /// What the model must be for, and the endpoint's name in the error if it is not.
    pub needs: Option<(Task, &'static str)>,
    /// What it does, in one line.
    pub summary: &'static str,
    /// Schemas of the JSON body that it needs; several together make it up. Empty for one that takes no body.
    pub request: &'static [SchemaOf],
    /// Its answer's body.
    pub answer: AnswerBody,
    /// Answers a request.
    pub handler: fn(Arc<App>, Call) -> Answer,
}

/// Makes the schema of a type.
pub type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// What an endpoint answers with.
pub enum AnswerBody {
    /// Nothing.
    Empty,
    /// Text.
    Text,
    /// A web page.
    Html,
    /// JSON.
    Json(SchemaOf),
    /// JSON, or server-sent events of the second.
    JsonOrStream(SchemaOf, SchemaOf),
}

impl Route {
    /// Checks that the model can serve it.
    ///
    /// # Errors
    /// Status 501.
    pub(crate) fn check_needs(&self, app: &App) -> Result<(), ApiError> {
        match self.needs {
            Some((task, name)) if !app.backend.does(task) => {
                Err(ApiError::not_implemented(format!("The model does not support {name}")))
            }
            _ => Ok(()),
        }
    }

    /// Whether it needs `Content-Type: application/json` and a body.
    pub fn takes_json(&self) -> bool {
        !self.request.is_empty()
    }
}

const fn schema<T: JsonSchema>() -> SchemaOf {
    |generator| generator.subschema_for::<T>()
}

/// All endpoints, sorted by path.
pub const ROUTES: &[Route] = &[
    probe("/", GET, "A page to chat with the model.", AnswerBody::Html, |_, _| Box::pin(page::answer())),
    Route {
        path: "/detokenize",
        methods: POST,
        is_measured: true,
        needs: None,
        summary: "Token ids to text.",
        request: &[schema::<DetokenizeFields>()],
        answer: AnswerBody::Json(schema::<Detokenized>()),
        handler: |app, call| Box::pin(detokenize::answer(app, call)),
    },
    probe("/health", GET, "200 while the engine lives, 503 after it failed.", AnswerBody::Empty, |app, _| {
        Box::pin(health::answer(app))
    }),
    Route {
        path: "/invocations",
        methods: POST,
        is_measured: true,
        needs: None,
        summary: "What the endpoint for a body of this shape answers, for SageMaker.",
        request: &[schema::<serde_json::Map<String, serde_json::Value>>()],
        answer: AnswerBody::Json(schema::<serde_json::Value>()),
        handler: |app, call| Box::pin(invocations::answer(app, call)),
    },
    probe(
        "/load",
        GET,
        "Sequences that are running or waiting.",
        AnswerBody::Json(schema::<load::Load>()),
        |app, _| Box::pin(load::answer(app)),
    ),
    probe("/metrics", GET, "Metrics in Prometheus' text format.", AnswerBody::Text, |app, _| {
        Box::pin(metrics::answer(app))
    }),
    probe("/openapi.json", GET, "This document.", AnswerBody::Json(schema::<serde_json::Value>()), |app, _| {
        Box::pin(openapi::answer(app))
    }),
    probe("/ping", GET_OR_POST, "As /health.", AnswerBody::Empty, |app, _| Box::pin(health::answer(app))),
    rerank("/rerank"),
    score("/score"),
    Route {
        path: "/tokenize",
        methods: POST,
        is_measured: true,
        needs: None,
        summary: "A text or a conversation to token ids.",
        request: &[schema::<TokenizeFields>()],
        answer: AnswerBody::Json(schema::<Tokenized>()),
        handler: |app, call| Box::pin(tokenize::answer(app, call)),
    },
    Route {
        path: "/v1/chat/completions",
        methods: POST,
        is_measured: true,
        needs: Some((Task::Generate, "Chat Completions API")),
        summary: "Answers a conversation.",
        request: &[schema::<SamplingFields>(), schema::<ChatFields>()],
        answer: AnswerBody::JsonOrStream(schema::<ChatCompletion>(), schema::<ChatCompletionChunk>()),
        handler: |app, call| Box::pin(chat_completions::answer(app, call)),
    },
    Route {
        path: "/v1/chat/completions/batch",
        methods: POST,
        is_measured: true,
        needs: Some((Task::Generate, "Chat Completions API")),
        summary: "Answers several conversations, one choice for each; `messages` is a list of them.",
        request: &[schema::<SamplingFields>(), schema::<ChatFields>()],
        answer: AnswerBody::Json(schema::<ChatCompletion>()),
        handler: |app, call| Box::pin(chat_batch::answer(app, call)),
    },
    Route {
        path: "/v1/completions",
        methods: POST,
        is_measured: true,
        needs: Some((Task::Generate, "Completions API")),
        summary: "Continues prompts.",
        request: &[schema::<SamplingFields>(), schema::<CompletionFields>()],
        answer: AnswerBody::JsonOrStream(schema::<Completion>(), schema::<CompletionChunk>()),
        handler: |app, call| Box::pin(completions::answer(app, call)),
    },
    Route {
        path: "/v1/embeddings",
        methods: POST,
        is_measured: true,
        needs: Some((Task::Embed, "Embeddings API")),
        summary: "Vectors of texts, by an embedding model.",
        request: &[schema::<EmbeddingFields>()],
        answer: AnswerBody::Json(schema::<EmbeddingList>()),
        handler: |app, call| Box::pin(embeddings::answer(app, call)),
    },
    Route {
        path: MESSAGES,
        methods: POST,
        is_measured: true,
        needs: Some((Task::Generate, "Messages API")),
        summary: "Answers a conversation in Anthropic's shape.",
        request: &[schema::<MessagesFields>()],
        answer: AnswerBody::JsonOrStream(schema::<Message>(), schema::<MessageEvent>()),
        handler: |app, call| Box::pin(messages::answer(app, call)),
    },
    Route {
        path: "/v1/messages/count_tokens",
        methods: POST,
        is_measured: true,
        needs: Some((Task::Generate, "Messages API")),
        summary: "Counts a conversation's tokens.",
        request: &[schema::<MessagesFields>()],
        answer: AnswerBody::Json(schema::<TokenCount>()),
        handler: |app, call| Box::pin(messages::count_tokens(app, call)),
    },
    Route {
        path: "/v1/models",
        methods: GET,
        is_measured: true,
        needs: None,
        summary: "The served names.",
        request: &[],
        answer: AnswerBody::Json(schema::<ModelList>()),
        handler: |app, _| Box::pin(models::answer(app)),
    },
    rerank("/v1/rerank"),
    Route {
        path: "/v1/responses",
        methods: POST,
        is_measured: true,
        needs: Some((Task::Generate, "Responses API")),
        summary: "Answers a conversation in OpenAI's newer shape.",
        request: &[schema::<SamplingFields>(), schema::<ResponsesFields>()],
        answer: AnswerBody::JsonOrStream(schema::<ModelResponse>(), schema::<ResponseEvent>()),
        handler: |app, call| Box::pin(responses::answer(app, call)),
    },
    score("/v1/score"),
    rerank("/v2/rerank"),
    probe("/version", GET, "The server's version.", AnswerBody::Json(schema::<version::Version>()), |_, _| {
        Box::pin(version::answer())
    }),
];

const fn score(path: &'static str) -> Route {
    Route {
        path,
        methods: POST,
        is_measured: true,
        needs: Some((Task::Embed, "Score API")),
        summary: "How near pairs of texts are, by an embedding model.",
        request: const { &[schema::<ScoreFields>()] },
        answer: AnswerBody::Json(schema::<ScoreList>()),
        handler: |app, call| Box::pin(score::answer(app, call)),
    }
}

const fn rerank(path: &'static str) -> Route {
    Route {
        path,
        methods: POST,
        is_measured: true,
        needs: Some((Task::Embed, "Rerank API")),
        summary: "Documents in the order of their nearness to a query, by an embedding model.",
        request: const { &[schema::<RerankFields>()] },
        answer: AnswerBody::Json(schema::<Ranking>()),
        handler: |app, call| Box::pin(rerank::answer(app, call)),
    }
}

const fn probe(
    path: &'static str,
    methods: &'static [Method],
    summary: &'static str,
    answer: AnswerBody,
    handler: fn(Arc<App>, Call) -> Answer,
) -> Route {
    Route { path, methods, is_measured: false, needs: None, summary, request: &[], answer, handler }
}

/// The answer to a request to `path` that failed, whether there is such an endpoint or not.
pub fn failed(path: &str, error: ApiError) -> Response<Body> {
    if is_anthropic(path) { error.into_anthropic_response() } else { error.into_response() }
}

/// Whether the clients of `path` are Anthropic's.
pub fn is_anthropic(path: &str) -> bool {
    path.strip_prefix(MESSAGES).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The endpoint at `path`.
///
/// # Errors
/// `None` if there is none, else the methods it answers, as the header `Allow` says them.
pub fn find(method: &Method, path: &str) -> Result<&'static Route, Option<String>> {
    let route = ROUTES.iter().find(|route| route.path == path).ok_or(None)?;
    if route.methods.contains(method) {
        Ok(route)
    } else {
        Err(Some(route.methods.iter().map(Method::as_str).collect::<Vec<_>>().join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_its_paths_are_unique() {
        assert!(ROUTES.windows(2).all(|pair| pair[0].path < pair[1].path));
        assert!(ROUTES.iter().all(|route| route.path.starts_with('/') && !route.methods.is_empty()));
    }

    #[test]
    fn unknown_paths_and_wrong_methods_are_told_apart() {
        assert!(find(&Method::GET, "/v1/models").is_ok());
        assert_eq!(find(&Method::GET, "/v1/models/x").err(), Some(None));
        assert_eq!(find(&Method::PUT, "/ping").err(), Some(Some("GET, POST".into())));
    }
}
