//! What is refused before any field is read: routes, methods, keys, bodies; and what is right where a request is silent.

use ember_server::{config::AppConfig, sampling_defaults::SamplingDefaults};
use hyper::StatusCode;
use serde_json::{Value, json};

use super::{CHAT, COMPLETIONS, Server, body};
use crate::fake::{app, config, post, send};

/// First line and headers, status.
const ROUTES: &[(&str, u16)] = &[
    ("GET /v1/models", 200),
    ("GET /v1/models?x=1", 200),
    ("GET /v1/models/", 404),
    ("GET /v1/models/tiny", 404),
    ("GET /v1/nothing", 404),
    ("POST /v1/nothing", 404),
    ("POST /v1/audio/speech", 404),
    ("GET /v1/responses", 405),
    ("GET /nothing", 404),
    ("GET /V1/models", 404),
    ("DELETE /v1/models", 405),
    ("POST /v1/models", 405),
    ("GET /v1/completions", 405),
    ("PUT /v1/completions", 405),
    ("GET /v1/chat/completions", 405),
    ("OPTIONS /v1/chat/completions", 405),
    ("GET /tokenize", 405),
    ("PATCH /detokenize", 405),
    ("POST /health", 405),
    ("POST /metrics", 405),
    ("POST /version", 405),
    ("PUT /ping", 405),
    ("GET /", 200),
    ("POST /", 405),
    ("GET /health", 200),
    ("GET /ping", 200),
    ("POST /ping", 200),
    ("GET /version", 200),
    ("GET /load", 200),
    ("GET /metrics", 200),
    ("GET /openapi.json", 200),
];

/// First line and headers, status, on a server with the keys `one` and `two`.
const KEYS: &[(&str, u16)] = &[
    ("GET /v1/models", 401),
    ("GET /v1/models\nauthorization: Bearer three", 401),
    ("GET /v1/models\nauthorization: Bearer", 401),
    ("GET /v1/models\nauthorization: Bearer ", 401),
    ("GET /v1/models\nauthorization: one", 401),
    ("GET /v1/models\nauthorization: Basic one", 401),
    ("GET /v1/models\nauthorization: Bearer onetwo", 401),
    ("GET /v1/models\nauthorization: Bearer one", 200),
    ("GET /v1/models\nauthorization: bearer two", 200),
    ("GET /v1/models\nauthorization: BEARER  two", 200),
    ("POST /v1/completions\ncontent-type: application/json", 401),
    ("GET /v1/nothing", 401),
    ("GET /v2/nothing", 401),
    ("OPTIONS /v1/models", 405),
    ("GET /health", 200),
    ("GET /metrics", 200),
    ("GET /ping", 200),
    ("GET /version", 200),
    ("POST /tokenize\ncontent-type: application/json", 400),
    ("POST /detokenize\ncontent-type: application/json", 400),
];

/// Content types of a good body, status.
const CONTENT_TYPES: &[(&str, u16)] = &[
    ("content-type: application/json", 200),
    ("content-type: application/json; charset=utf-8", 200),
    ("content-type: Application/JSON", 200),
    ("content-type: application/json ;x=y", 200),
    ("content-type: text/plain", 400),
    ("content-type: application/jsonl", 400),
    ("content-type: application/x-www-form-urlencoded", 400),
    ("x-none: 1", 400),
];

#[tokio::test]
async fn routes_and_methods() {
    let server = Server::start(config()).await;
    for &(head, status) in ROUTES {
        let (got, text) = server.exchange(head, b"").await;
        assert_eq!(got, status, "{head}: {text}");
        if status == 404 {
            assert_eq!(text, r#"{"error":{"message":"Not Found","type":"Not Found","param":null,"code":404}}"#);
        }
        assert_eq!(status == 405, text.contains(r#""type":"Method Not Allowed""#), "{head}: {text}");
    }
}

#[tokio::test]
async fn anthropics_clients_get_errors_of_their_shape_whatever_fails() {
    let server = Server::start(config()).await;
    let keyed = Server::start(AppConfig { api_keys: vec!["one".into()], ..config() }).await;
    let json = "\ncontent-type: application/json";
    let ask = |content: &str| json!({"max_tokens": 1, "messages": [{"role": "user", "content": content}]}).to_string();
    let huge = " ".repeat((64 << 20) + 1);
    for (server, head, body, status, kind) in [
        (&server, "GET /v1/messages", String::new(), 405, "invalid_request_error"),
        (&server, "POST /v1/messages/none", String::new(), 404, "not_found_error"),
        (&server, "POST /v1/messages", String::new(), 400, "invalid_request_error"),
        (&server, &format!("POST /v1/messages{json}"), "{".to_owned(), 400, "invalid_request_error"),
        (&server, &format!("POST /v1/messages{json}"), huge, 413, "request_too_large"),
        (&server, &format!("POST /v1/messages{json}"), ask("panic"), 500, "api_error"),
        (&keyed, &format!("POST /v1/messages{json}"), ask("x"), 401, "authentication_error"),
    ] {
        let (got, text) = server.exchange(head, body.as_bytes()).await;
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((got, &answer["type"], &answer["error"]["type"]), (status, &json!("error"), &json!(kind)), "{text}");
        assert!(answer["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{text}");
    }
}

#[tokio::test]
async fn keys_guard_v1_and_nothing_else() {
    let server = Server::start(AppConfig { api_keys: vec!["one".into(), "two".into()], ..config() }).await;
    for &(head, status) in KEYS {
        let (got, text) = server.exchange(head, b"").await;
        assert_eq!(got, status, "{head}: {text}");
        assert_eq!(status == 401, text == r#"{"error":"Unauthorized"}"#, "{head}: {text}");
    }
}

#[tokio::test]
async fn content_types() {
    let server = Server::start(config()).await;
    for &(header, status) in CONTENT_TYPES {
        let head = format!("POST {COMPLETIONS}\n{header}");
        let (got, text) = server.exchange(&head, br#"{"prompt": "x"}"#).await;
        assert_eq!(got, status, "{header}: {text}");
        let says = text.contains("the header Content-Type must be application/json");
        assert_eq!(says, status == 400, "{header}: {text}");
    }
}

#[tokio::test]
async fn bodies_that_are_not_the_endpoints_json() {
    let (app, _) = app(config());
    for (bytes, part, param) in [
        (&b"{"[..], "EOF", "body"),
        (b"", "EOF", "body"),
        (b"[1]", "expected a JSON object", "body"),
        (b"null", "expected a JSON object", "body"),
        (b" \"x\"", "expected a JSON object", "body"),
        (b"{'prompt': 'x'}", "", "body"),
        (b"{\"prompt\": \"x\",}", "", "body"),
        (b"{\"prompt\": \"x\", \"prompt\": \"y\"}", "duplicate field `prompt`", "body"),
        (b"{\"prompt\": \"x\"} extra", "", "body"),
        (b"{\"prompt\": \"\xff\"}", "", "body"),
    ] {
        let (status, text) = send(&app, post(COMPLETIONS, bytes.to_vec())).await;
        assert_eq!(status, 400, "{text}");
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert!(answer["error"]["message"].as_str().unwrap().contains(part), "{text}");
        assert!(answer["error"]["param"].as_str().unwrap().starts_with(param), "{text}");
        assert!(!text.contains("body.?") && !text.contains("struct"), "{text}");
        assert_eq!(answer["error"]["type"], "Bad Request");
    }
    let huge = vec![b' '; (64 << 20) + 1];
    let (status, text) = send(&app, post(COMPLETIONS, huge)).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{text}");
    assert!(text.contains("larger than 67108864 bytes") && text.contains(r#""code":413"#), "{text}");
    let mut fits = br#"{"prompt": "x"}"#.to_vec();
    fits.resize(64 << 20, b' ');
    assert_eq!(send(&app, post(COMPLETIONS, fits)).await.0, 200);
}

#[tokio::test]
async fn the_operators_defaults_hold_where_a_request_is_silent() {
    let sampling_defaults = SamplingDefaults::new("vllm", Some(r#"{"temperature": 0, "max_new_tokens": 3}"#)).unwrap();
    let (app, _) = app(AppConfig { sampling_defaults, ..config() });
    let ask = async |fields: Value| {
        let mut body = body(CHAT);
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        send(&app, post(CHAT, body.to_string())).await
    };
    // Greedy, so one choice at most.
    assert_eq!(ask(json!({"n": 2})).await.0, 400);
    assert_eq!(ask(json!({"n": 2, "temperature": 1})).await.0, 200);
    for max_tokens in [json!(null), json!(50)] {
        let (_, text) = ask(json!({"max_tokens": max_tokens})).await;
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(answer["usage"]["completion_tokens"], 3, "{text}");
    }
}
