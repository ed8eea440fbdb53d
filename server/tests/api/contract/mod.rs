//! What is accepted, what is refused and how: field, value, status, part of the message, param.
//! One table a file; all are asked of a running server over its socket.

mod abilities;
mod batch;
mod chat;
mod completions;
mod embeddings;
mod http;
mod output_form;
mod responses;
mod sampling;
mod tokens;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use ember_server::{App, config::AppConfig, listener};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
};

use crate::fake::{app, config};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const RESPONSES: &str = "/v1/responses";
const EMBEDDINGS: &str = "/v1/embeddings";
const SCORE: &str = "/score";
const TOKENIZE: &str = "/tokenize";
const DETOKENIZE: &str = "/detokenize";

/// Fields beside a good body, the status they are answered with, a part of the error's message and its param.
type Case = (Value, u16, &'static str, &'static str);

/// A schema of so many levels.
fn nested(depth: usize) -> Value {
    (0..depth).fold(json!(true), |inner, _| json!({"not": inner}))
}

fn body(path: &str) -> Value {
    match path {
        CHAT => json!({"messages": [{"role": "user", "content": "x"}]}),
        batch::PATH => json!({"messages": [[{"role": "user", "content": "x"}]]}),
        RESPONSES | EMBEDDINGS => json!({"input": "x"}),
        SCORE => json!({"queries": "x", "documents": ["y"]}),
        DETOKENIZE => json!({"tokens": [65]}),
        _ => json!({"prompt": "x"}),
    }
}

/// A server on a port of its own; it stops when dropped.
struct Server {
    address: SocketAddr,
    _stop: oneshot::Sender<()>,
}

impl Server {
    async fn start(config: AppConfig) -> Self {
        Self::over(app(config).0).await
    }

    async fn over(app: Arc<App>) -> Self {
        let listener = listener::bind("127.0.0.1", 0).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let stopped = async { drop(stopped.await) };
        let serving = listener::serve(listener, app, stopped, std::future::pending(), Duration::from_secs(1));
        tokio::spawn(serving);
        Self { address, _stop: stop }
    }

    /// Sends a request on a connection of its own: `head` is its first line without the version and its headers.
    async fn exchange(&self, head: &str, body: &[u8]) -> (u16, String) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let (line, headers) = head.split_once('\n').unwrap_or((head, ""));
        let headers: String = headers.lines().map(|header| format!("{header}\r\n")).collect();
        let n_bytes = body.len();
        let head =
            format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {n_bytes}\r\n{headers}\r\n");
        stream.write_all(&[head.as_bytes(), body].concat()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// Checks one case.
    ///
    /// # Errors
    /// What was answered instead.
    async fn check(&self, path: &str, (fields, status, part, param): Case) -> Result<(), String> {
        let mut request = body(path);
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let head = format!("POST {path}\ncontent-type: application/json");
        let (got, text) = self.exchange(&head, request.to_string().as_bytes()).await;
        if (got, status) == (200, 200) {
            return Ok(());
        }
        let answer: Value = serde_json::from_str(&text).unwrap_or_default();
        let error = &answer["error"];
        let kind = match status {
            404 => "NotFoundError",
            _ if param.starts_with("body") => "Bad Request",
            _ => "BadRequestError",
        };
        // Its own checks have a type of their own.
        let is_own = path == RESPONSES && error["type"] == "invalid_request_error" && kind == "BadRequestError";
        let is_right = got == status
            && error["message"].as_str().is_some_and(|message| message.contains(part))
            && (&error["param"], &error["code"]) == (&json!(param), &json!(status))
            && (error["type"] == kind || is_own);
        is_right.then_some(()).ok_or_else(|| format!("{path} {fields}: {status} expected, got {got} {text}"))
    }
}

/// Every table and the path that it is asked of.
fn tables() -> Vec<(&'static str, Vec<Case>)> {
    vec![
        (CHAT, sampling::cases()),
        (COMPLETIONS, sampling::cases()),
        (CHAT, output_form::cases()),
        (COMPLETIONS, output_form::cases()),
        (CHAT, chat::cases()),
        (batch::PATH, batch::cases()),
        (COMPLETIONS, completions::cases()),
        (RESPONSES, responses::cases()),
        (EMBEDDINGS, embeddings::cases()),
        (SCORE, embeddings::score()),
        (TOKENIZE, tokens::tokenize()),
        (DETOKENIZE, tokens::detokenize()),
    ]
}

#[tokio::test]
async fn fields_are_accepted_or_refused_by_name() {
    let server = Server::start(config()).await;
    let mut n_cases = 0;
    let mut failures = Vec::new();
    for (path, cases) in tables() {
        for case in cases {
            failures.extend(server.check(path, case).await.err());
            n_cases += 1;
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(n_cases >= 500, "{n_cases}");
}

#[tokio::test]
async fn the_operator_says_how_many_logprobs_there_are() {
    for (max_logprobs, prompt_logprobs, status) in
        [(None, -1, 200), (None, 258, 200), (None, 259, 400), (Some(3), 3, 200), (Some(3), 4, 400), (Some(0), 0, 200)]
    {
        let server = Server::start(AppConfig { max_logprobs, ..config() }).await;
        let part = if prompt_logprobs > 258 { "max allowed: 258" } else { "max allowed: 3" };
        let fields = json!({"prompt_logprobs": prompt_logprobs});
        server.check(COMPLETIONS, (fields, status, part, "prompt_logprobs")).await.unwrap();
    }
    let server = Server::start(AppConfig { max_logprobs: None, ..config() }).await;
    let request = br#"{"prompt": "x", "max_tokens": 1, "logprobs": -1, "return_tokens_as_token_ids": true}"#;
    let (_, text) = server.exchange(&format!("POST {COMPLETIONS}\ncontent-type: application/json"), request).await;
    let answer: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(answer["choices"][0]["logprobs"]["top_logprobs"][0].as_object().unwrap().len(), 258, "{text}");
}
