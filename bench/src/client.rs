//! Owns one request over one socket: connecting, sending, timing what comes back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderValue};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::api::openai::error_text;
use crate::api::{Answer, Api};
use crate::config::{Config, Timeouts};
use crate::endpoint::Endpoint;
use crate::record::RequestRecord;
use crate::sse::SseSplitter;

/// Sends requests to one server and times the answers against one clock.
pub struct Client {
    endpoint: Endpoint,
    headers: HeaderMap,
    timeouts: Timeouts,
    api: &'static dyn Api,
    stream: bool,
    start: Instant,
    /// None: plain HTTP.
    tls: Option<Result<TlsConnector, String>>,
    /// Messages with output so far over all requests, for the progress display.
    pub live_tokens: AtomicU64,
}

/// A connection that waits for its next request.
pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
}

impl Client {
    /// `start` is time zero of every record.
    pub fn new(config: &Config, start: Instant) -> Self {
        let mut headers = config.headers.clone();
        if let Ok(host) = HeaderValue::try_from(config.endpoint.authority.as_str()) {
            headers.entry(HOST).or_insert(host);
        }
        Self {
            endpoint: config.endpoint.clone(),
            headers,
            timeouts: config.timeouts,
            api: config.api,
            stream: config.stream,
            start,
            tls: config.endpoint.tls.then(tls_connector),
            live_tokens: AtomicU64::new(0),
        }
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// What went wrong, as text.
    pub async fn connect(&self) -> Result<Connection, String> {
        let address = (self.endpoint.host.as_str(), self.endpoint.port);
        let socket = timeout(self.timeouts.connect, TcpStream::connect(address))
            .await
            .map_err(|_| format!("connect timeout after {} s", self.timeouts.connect.as_secs_f64()))?
            .map_err(|error| format!("connect: {error}"))?;
        // Without it the kernel may hold a small request back for the last acknowledgement.
        socket.set_nodelay(true).map_err(|error| format!("connect: {error}"))?;
        match &self.tls {
            None => open(socket).await,
            Some(tls) => {
                let tls = tls.as_ref().map_err(String::clone)?;
                let name = ServerName::try_from(self.endpoint.host.clone());
                let name = name.map_err(|error| format!("connect: TLS: {error}"))?;
                let secured = timeout(self.timeouts.connect, tls.connect(name, socket)).await;
                let secured = secured
                    .map_err(|_| "connect timeout in the TLS handshake".to_owned())?
                    .map_err(|error| format!("connect: TLS: {error}"))?;
                open(secured).await
            }
        }
    }

    /// Sends `body` and reads the answer to its end. `connection` is used if it still stands, else replaced, and
    /// left for the next request if the answer was read whole. `intended_s`: when the request was due, if it has a
    /// schedule. Dropping the future closes the connection.
    pub async fn exchange(
        &self,
        connection: &mut Option<Connection>,
        body: Bytes,
        intended_s: Option<f64>,
    ) -> RequestRecord {
        let sent_s = self.now_s();
        let mut record = RequestRecord { intended_s: intended_s.unwrap_or(sent_s), sent_s, ..Default::default() };
        let mut answer = Answer::default();
        let attempt = self.attempt(connection, body.clone(), &mut record, &mut answer);
        let result = match timeout(self.timeouts.total, attempt).await {
            Ok(result) => result,
            Err(_) => Err(format!("total timeout after {} s", self.timeouts.total.as_secs_f64())),
        };
        if let Err(error) = result {
            *connection = None;
            record.end_s = self.now_s();
            record.error = Some(error);
        }
        record.success = record.error.is_none();
        record.request = String::from_utf8(body.into()).unwrap_or_default();
        record.response = answer.text;
        record.finish_reason = answer.finish_reason;
        record.prompt_tokens = answer.prompt_tokens;
        record.completion_tokens = answer.completion_tokens;
        record.cached_tokens = answer.cached_tokens;
        record
    }

    /// Seconds since the start of the run.
    pub fn now_s(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    async fn attempt(
        &self,
        connection: &mut Option<Connection>,
        body: Bytes,
        record: &mut RequestRecord,
        answer: &mut Answer,
    ) -> Result<(), String> {
        let response = self.send(connection, body).await?;
        record.http_status = Some(response.status().as_u16().into());
        let content_type =
            response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let is_json = content_type.starts_with("application/json");
        if response.status() != StatusCode::OK {
            let status = response.status().as_u16();
            let body = self.read_whole(response.into_body()).await?;
            return Err(format!("HTTP {status}: {}", error_text(&String::from_utf8_lossy(&body))));
        }
        if self.stream && !is_json {
            return self.read_stream(response.into_body(), record, answer).await;
        }
        let body = self.read_whole(response.into_body()).await?;
        record.end_s = self.now_s();
        record.n_messages = 1;
        self.api.read_body(&body, answer)
    }

    /// Sends on the connection at hand; a kept one that the server has closed meanwhile is replaced once.
    async fn send(&self, connection: &mut Option<Connection>, body: Bytes) -> Result<Response<Incoming>, String> {
        let mut request = Request::post(self.endpoint.path.as_str())
            .body(Full::new(body))
            .map_err(|error| format!("request: {error}"))?;
        *request.headers_mut() = self.headers.clone();
        if let Some(kept) = connection
            && kept.sender.ready().await.is_ok()
        {
            match self.idle_limit(kept.sender.try_send_request(request)).await? {
                Ok(response) => return Ok(response),
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(read_error(&error.into_error())),
                },
            }
        }
        let fresh = connection.insert(self.connect().await?);
        self.idle_limit(fresh.sender.send_request(request)).await?.map_err(|error| read_error(&error))
    }

    async fn read_stream(
        &self,
        mut body: Incoming,
        record: &mut RequestRecord,
        answer: &mut Answer,
    ) -> Result<(), String> {
        record.streamed = true;
        let mut stream =
            StreamReader { client: self, record, answer, has_choices: false, finished: false, error: None };
        let mut splitter = SseSplitter::default();
        while let Some(frame) = self.idle_limit(body.frame()).await? {
            let frame = frame.map_err(|error| read_error(&error))?;
            if let Some(piece) = frame.data_ref() {
                let now_s = self.now_s();
                splitter.push(piece, |data| stream.message(data, now_s));
            }
            if let Some(error) = stream.error.take() {
                return Err(error);
            }
        }
        let now_s = self.now_s();
        splitter.finish(|data| stream.message(data, now_s));
        match stream {
            StreamReader { error: Some(error), .. } => Err(error),
            StreamReader { has_choices: false, .. } => Err("the stream has no choices".into()),
            StreamReader { finished: false, .. } => Err("the stream ended before its finish_reason or [DONE]".into()),
            _ => Ok(()),
        }
    }

    async fn read_whole(&self, mut body: Incoming) -> Result<Vec<u8>, String> {
        let mut whole = Vec::new();
        while let Some(frame) = self.idle_limit(body.frame()).await? {
            if let Some(piece) = frame.map_err(|error| read_error(&error))?.data_ref() {
                whole.extend_from_slice(piece);
            }
        }
        Ok(whole)
    }

    async fn idle_limit<T>(&self, wait: impl Future<Output = T>) -> Result<T, String> {
        match self.timeouts.read {
            Some(limit) => {
                timeout(limit, wait).await.map_err(|_| format!("read timeout: silent for {} s", limit.as_secs_f64()))
            }
            None => Ok(wait.await),
        }
    }
}

async fn open(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Result<Connection, String> {
    let handshake = http1::handshake(TokioIo::new(io)).await;
    let (sender, connection) = handshake.map_err(|error| format!("connect: {error}"))?;
    // Its failures reach the sender too.
    tokio::spawn(connection);
    Ok(Connection { sender })
}

/// TLS that trusts what the system trusts (and `SSL_CERT_FILE`).
fn tls_connector() -> Result<TlsConnector, String> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        return Err("connect: TLS: the system has no root certificates; install ca-certificates".into());
    }
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("connect: TLS: {error}"))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config).into())
}

/// What a stream has brought so far.
struct StreamReader<'a> {
    client: &'a Client,
    record: &'a mut RequestRecord,
    answer: &'a mut Answer,
    has_choices: bool,
    finished: bool,
    error: Option<String>,
}

impl StreamReader<'_> {
    fn message(&mut self, data: &[u8], now_s: f64) {
        if self.error.is_some() {
            return;
        }
        if data == b"[DONE]" {
            self.finished = true;
            return;
        }
        tracing::debug!(message = %String::from_utf8_lossy(&data[..data.len().min(200)]));
        let message = match self.client.api.read_message(data, self.answer) {
            Ok(message) => message,
            Err(error) => {
                self.error = Some(error);
                return;
            }
        };
        let record = &mut *self.record;
        record.penultimate_message_s = (record.n_messages > 0).then_some(record.end_s);
        record.first_message_s.get_or_insert(now_s);
        record.end_s = now_s;
        record.n_messages += 1;
        self.finished |= message.finishes;
        if !message.has_choices {
            return;
        }
        self.has_choices = true;
        record.first_choices_s.get_or_insert(now_s);
        if message.has_output {
            record.first_token_s.get_or_insert(now_s);
        }
        // An empty message between two others is a token whose text is held back; an empty last one is not a token.
        if message.has_output || (record.first_token_s.is_some() && !message.finishes) {
            record.token_offsets_us.push(((now_s - record.sent_s) * 1e6) as u64);
            self.client.live_tokens.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn read_error(error: &hyper::Error) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    if error.is_incomplete_message() {
        "the server hung up before the answer's end".into()
    } else {
        format!("read: {error}{cause}")
    }
}
