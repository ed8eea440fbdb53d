//! Owns the server that tests measure: it replays a script for each request with controlled timing.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpListener;

/// What the server does for one request, step by step.
#[derive(Debug, Clone, Default)]
pub struct Script {
    pub status: u16,
    pub content_type: &'static str,
    /// Silence before the response head.
    pub head_delay: Duration,
    pub steps: Vec<Step>,
}

#[derive(Debug, Clone)]
pub enum Step {
    Wait(Duration),
    Send(Bytes),
    /// Break the connection.
    HangUp,
}

impl Script {
    pub fn json(status: u16, body: &str) -> Self {
        Self { status, content_type: "application/json", steps: vec![send(body)], ..Self::default() }
    }

    pub fn sse(steps: Vec<Step>) -> Self {
        Self { status: 200, content_type: "text/event-stream", steps, ..Self::default() }
    }
}

pub fn send(text: &str) -> Step {
    Step::Send(Bytes::copy_from_slice(text.as_bytes()))
}

pub fn wait_ms(ms: u64) -> Step {
    Step::Wait(Duration::from_millis(ms))
}

/// A request as the server saw it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub path: String,
    pub authorization: Option<String>,
    pub body: Value,
    /// Which connection it came on.
    pub connection: usize,
}

/// A running server.
pub struct Server {
    pub address: SocketAddr,
    pub seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    /// Starts a server that answers request number i (from 0) with `script(i)`.
    pub async fn start(script: impl Fn(usize) -> Script + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (script, log) = (Arc::new(script), Arc::clone(&seen));
        tokio::spawn(async move {
            for connection in 0.. {
                let (socket, _) = listener.accept().await.unwrap();
                socket.set_nodelay(true).unwrap();
                let (script, log) = (Arc::clone(&script), Arc::clone(&log));
                let service =
                    service_fn(move |request| answer(request, Arc::clone(&script), Arc::clone(&log), connection));
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(socket), service),
                );
            }
        });
        Self { address, seen }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, std::io::Error>;

async fn answer(
    request: Request<Incoming>,
    script: Arc<impl Fn(usize) -> Script>,
    log: Arc<Mutex<Vec<Seen>>>,
    connection: usize,
) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    let authorization = request.headers().get("authorization").map(|value| value.to_str().unwrap().to_owned());
    let bytes = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let body = serde_json::from_slice(&bytes).unwrap_or_default();
    let i = {
        let mut log = log.lock().unwrap();
        log.push(Seen { path, authorization, body, connection });
        log.len() - 1
    };
    let script = script(i);
    tokio::time::sleep(script.head_delay).await;
    let steps = futures_util::stream::iter(script.steps).filter_map(|step| async move {
        match step {
            Step::Wait(time) => {
                tokio::time::sleep(time).await;
                None
            }
            Step::Send(bytes) => Some(Ok(Frame::data(bytes))),
            Step::HangUp => Some(Err(std::io::Error::other("the script hangs up"))),
        }
    });
    let body = StreamBody::new(steps).boxed_unsync();
    let response = Response::builder().status(script.status).header("content-type", script.content_type);
    Ok(response.body(body).unwrap())
}
