//! [`App`]: finds the endpoint for a request and answers whatever happens on the way.

use std::{any::Any, convert::Infallible, hash::Hasher, panic::AssertUnwindSafe, sync::Arc, time::Instant};

use bytes::Bytes;
use ember_common::openai::SamplingFields;
use ember_engine::SamplingParams;
use futures_util::FutureExt;
use http_body_util::{BodyExt, Full, Limited, combinators::UnsyncBoxBody};
use hyper::{HeaderMap, Request, Response, StatusCode, header, http::request::Parts};
use serde_json::{Map, Value};
use tower::{BoxError, ServiceBuilder, ServiceExt, util::BoxCloneService};
use tower_http::trace::TraceLayer;

use crate::{
    Admission, ApiError, Backend, auth,
    config::AppConfig,
    metrics::Metrics,
    request_id,
    routes::{self, Call, Route},
    sampling::LogprobsLimits,
};

/// Largest request body in bytes.
const MAX_BODY_BYTES: usize = 64 << 20;

/// A response body: complete or a stream.
pub type Body = UnsyncBoxBody<Bytes, BoxError>;
/// The whole server as a tower service over request bodies `B`.
pub type Service<B> = BoxCloneService<Request<B>, Response<Body>, Infallible>;

/// Everything that endpoints share.
pub struct App {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) config: AppConfig,
    pub(crate) metrics: Metrics,
    pub(crate) admission: Admission,
    pub(crate) system_fingerprint: String,
    /// For sampling fields that a request leaves open.
    pub(crate) sampling_defaults: SamplingParams,
    /// Length of the longest token's text in bytes: a longer text than this times the context cannot fit.
    pub(crate) max_token_bytes: usize,
}

impl App {
    /// An app that answers from `backend`.
    pub fn new(backend: Arc<dyn Backend>, config: AppConfig) -> Arc<Self> {
        let info = backend.info();
        let mut hasher = std::hash::DefaultHasher::new();
        hasher.write(info.model_path.as_os_str().as_encoded_bytes());
        hasher.write(info.executor.as_bytes());
        let system_fingerprint = format!("ember-{}-{:08x}", env!("CARGO_PKG_VERSION"), hasher.finish() as u32);
        let max_token_bytes =
            (0..info.vocab_size as u32).map(|id| backend.token_bytes(id).len()).max().unwrap_or(1).max(1);
        let metrics = Metrics::new(info, &config);
        let admission = Admission::new(info.max_num_seqs, config.max_num_queued_reqs);
        let sampling_defaults = config.sampling_defaults.over(backend.default_sampling_params());
        Arc::new(Self { backend, config, metrics, admission, system_fingerprint, sampling_defaults, max_token_bytes })
    }

    /// Who is admitted.
    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    /// False once the engine has failed.
    pub fn is_healthy(&self) -> bool {
        self.backend.is_healthy()
    }

    /// Folds what was recorded since the last call into the histograms; call it every few seconds.
    pub fn run_metrics_upkeep(&self) {
        self.metrics.steps(&self.backend.take_step_sizes());
        self.metrics.run_upkeep();
    }

    /// The whole server as a tower service.
    pub fn service<B>(self: &Arc<Self>) -> Service<B>
    where
        B: hyper::body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        let app = self.clone();
        ServiceBuilder::new()
            .option_layer(self.config.cors.clone())
            .map_response(|response: Response<_>| response.map(|body| Body::new(BodyExt::map_err(body, Into::into))))
            .layer(TraceLayer::new_for_http().make_span_with(request_span::<B>).on_failure(()))
            .service_fn(move |request| {
                let app = app.clone();
                async move { Ok::<_, Infallible>(app.respond(request).await) }
            })
            .boxed_clone()
    }

    /// The first served name, or the one that the request asks for.
    pub(crate) fn model_name<'a>(&'a self, asked: Option<&'a str>) -> Result<&'a str, ApiError> {
        let served = &self.config.served_model_names;
        match asked {
            None | Some("") => Ok(&served[0]),
            Some(name) if served.iter().any(|served| served == name) => Ok(name),
            Some(name) => Err(ApiError::unknown_model(name, served)),
        }
    }

    /// How many log-probabilities a request may ask for.
    pub(crate) fn logprobs_limits(&self) -> LogprobsLimits {
        let info = self.backend.info();
        let as_u32 = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let possible = as_u32(info.max_logprobs);
        LogprobsLimits {
            most: self.config.max_logprobs.unwrap_or(possible).min(possible),
            all: as_u32(info.vocab_size),
        }
    }

    /// Tokens per stream chunk: what the request asks for, at least the server's own.
    pub(crate) fn stream_interval(&self, fields: &SamplingFields) -> usize {
        let asked = fields.stream_interval.and_then(|n| usize::try_from(n).ok()).unwrap_or(1);
        asked.max(self.config.stream_interval)
    }

    /// Variables of the chat template: the request's over the server's.
    pub(crate) fn chat_template_kwargs(&self, own: Option<Map<String, Value>>) -> Map<String, Value> {
        let mut kwargs = self.config.default_chat_template_kwargs.clone();
        kwargs.extend(own.unwrap_or_default());
        kwargs
    }

    /// The path without the prefix that a proxy may have left on it.
    fn own_path<'a>(&self, path: &'a str) -> &'a str {
        match path.strip_prefix(&*self.config.root_path) {
            Some(rest) if rest.starts_with('/') => rest,
            _ => path,
        }
    }

    /// Seconds since the Unix epoch.
    pub(crate) fn now(&self) -> u64 {
        std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |elapsed| elapsed.as_secs())
    }

    async fn respond<B>(self: Arc<Self>, request: Request<B>) -> Response<Body>
    where
        B: hyper::body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        let started = Instant::now();
        let (parts, body) = request.into_parts();
        let method = parts.method.clone();
        let request_id = parts.headers.get(request_id::HEADER).cloned();
        let path = self.own_path(parts.uri.path()).to_owned();
        if !auth::is_authorized(&self.config.api_keys, &method, &path, &parts.headers) {
            return auth::unauthorized(&path);
        }
        let route = match routes::find(&method, &path) {
            Ok(route) => route,
            Err(allow) => return not_routed(&path, allow),
        };
        // A bug in one request's way is that request's alone.
        let answered = AssertUnwindSafe(self.call(route, parts, body)).catch_unwind().await;
        let answered = answered.unwrap_or_else(|panic| Err(panicked(&*panic)));
        let mut response = answered.unwrap_or_else(|error| routes::failed(&path, error));
        if self.config.enable_request_id_headers && !response.headers().contains_key(request_id::HEADER) {
            let id = request_id.unwrap_or_else(|| {
                uuid::Uuid::new_v4().simple().to_string().parse().expect("hexadecimal digits are a valid header value")
            });
            response.headers_mut().insert(request_id::HEADER, id);
        }
        if route.is_measured {
            self.metrics.http_request(route.path, &method, response.status(), started.elapsed());
        }
        response
    }

    async fn call<B>(self: &Arc<Self>, route: &Route, parts: Parts, body: B) -> Result<Response<Body>, ApiError>
    where
        B: hyper::body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        route.check_needs(self)?;
        let body = if route.takes_json() {
            check_content_type(&parts.headers)?;
            read_body(body).await?
        } else {
            Bytes::new()
        };
        (route.handler)(self.clone(), Call { parts, body: body.clone() })
            .await
            .map_err(|error| error.with_value_from(&body))
    }
}

/// A complete body.
pub(crate) fn full_body(bytes: impl Into<Bytes>) -> Body {
    Body::new(Full::new(bytes.into()).map_err(|never| match never {}))
}

fn request_span<B>(request: &Request<B>) -> tracing::Span {
    tracing::debug_span!("http", method = %request.method(), path = request.uri().path(), id = tracing::field::Empty)
}

fn panicked(panic: &(dyn Any + Send)) -> ApiError {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("unknown");
    tracing::error!(panic = message, "a request panicked");
    ApiError::internal("The server failed on this request; its log has the reason.")
}

fn not_routed(path: &str, allow: Option<String>) -> Response<Body> {
    match allow {
        None => routes::failed(path, ApiError::http(StatusCode::NOT_FOUND)),
        Some(allow) => {
            let mut response = routes::failed(path, ApiError::http(StatusCode::METHOD_NOT_ALLOWED));
            if let Ok(allow) = allow.parse() {
                response.headers_mut().insert(header::ALLOW, allow);
            }
            response
        }
    }
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = value.split(';').next().unwrap_or_default().trim();
    if media_type.eq_ignore_ascii_case("application/json") {
        Ok(())
    } else {
        Err(ApiError::schema("", "the header Content-Type must be application/json"))
    }
}

async fn read_body<B>(body: B) -> Result<Bytes, ApiError>
where
    B: hyper::body::Body<Data = Bytes, Error: Into<BoxError>>,
{
    match Limited::new(body, MAX_BODY_BYTES).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(ApiError::http_with(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("The request body is larger than {MAX_BODY_BYTES} bytes."),
        )),
        Err(error) => {
            Err(ApiError::http_with(StatusCode::BAD_REQUEST, format!("The request body cannot be read: {error}")))
        }
    }
}
