//! The table of endpoints. One file per endpoint, one row here.

mod chat_completions;
mod completions;
mod detokenize;
mod health;
mod load;
mod metrics;
mod models;
mod tokenize;
mod version;

use std::{future::Future, pin::Pin, sync::Arc};

use bytes::Bytes;
use hyper::{Method, Response, http::request::Parts};

use crate::{
    ApiError,
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

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, ApiError>> + Send>>;

/// One endpoint.
pub struct Route {
    /// Its exact path.
    pub path: &'static str,
    /// The methods it answers.
    pub methods: &'static [Method],
    /// Whether it needs `Content-Type: application/json` and a body.
    pub takes_json: bool,
    /// Whether its requests count in the HTTP metrics; probes do not.
    pub is_measured: bool,
    /// Answers a request.
    pub handler: fn(Arc<App>, Call) -> Answer,
}

/// All endpoints, sorted by path.
pub const ROUTES: &[Route] = &[
    json("/detokenize", |app, call| Box::pin(detokenize::answer(app, call))),
    probe("/health", GET, |app, _| Box::pin(health::answer(app))),
    probe("/load", GET, |app, _| Box::pin(load::answer(app))),
    probe("/metrics", GET, |app, _| Box::pin(metrics::answer(app))),
    probe("/ping", GET_OR_POST, |app, _| Box::pin(health::answer(app))),
    json("/tokenize", |app, call| Box::pin(tokenize::answer(app, call))),
    json("/v1/chat/completions", |app, call| Box::pin(chat_completions::answer(app, call))),
    json("/v1/completions", |app, call| Box::pin(completions::answer(app, call))),
    Route {
        path: "/v1/models",
        methods: GET,
        takes_json: false,
        is_measured: true,
        handler: |app, _| Box::pin(models::answer(app)),
    },
    probe("/version", GET, |_, _| Box::pin(version::answer())),
];

const fn json(path: &'static str, handler: fn(Arc<App>, Call) -> Answer) -> Route {
    Route { path, methods: POST, takes_json: true, is_measured: true, handler }
}

const fn probe(path: &'static str, methods: &'static [Method], handler: fn(Arc<App>, Call) -> Answer) -> Route {
    Route { path, methods, takes_json: false, is_measured: false, handler }
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
