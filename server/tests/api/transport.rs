//! What lies between clients and endpoints: origins, path prefixes, sockets, TLS, timeouts.

use std::{path::Path, sync::Arc, time::Duration};

use ember_server::{
    App,
    config::AppConfig,
    listener::{self, Listener},
};
use http_body_util::BodyExt;
use hyper::{Method, Request, StatusCode};
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, RootCertStore, pki_types::pem::PemObject},
};
use tower::ServiceExt;

use crate::{
    fake::{app, app_saying, config, get, post, send},
    lifecycle::until,
};

/// Serves until the returned sender is dropped.
fn start(listener: Listener, app: Arc<App>) -> tokio::sync::oneshot::Sender<()> {
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let stopped = async { drop(stopped.await) };
    tokio::spawn(listener::serve(listener, app, stopped, std::future::pending(), Duration::from_secs(60)));
    stop
}

/// Sends a request and reads until the other end closes.
async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> String {
    stream.write_all(b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn browsers_are_told_who_may_ask() {
    let origins = ["https://a.example".to_owned(), "https://b.example".to_owned()];
    let any = ["*".to_owned()];
    let cors = |origins: &[String], with_credentials| {
        let config = AppConfig {
            cors: ember_server::cors::layer(origins, &any, &any, with_credentials).unwrap(),
            api_keys: vec!["k".into()],
            ..config()
        };
        app(config).0
    };
    let ask = async |app: &Arc<App>, method: Method, origin: &str| {
        let request = Request::builder()
            .method(method)
            .uri("/v1/chat/completions")
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization");
        let response = app.service().oneshot(request.body(http_body_util::Full::default()).unwrap()).await.unwrap();
        let header = |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        (response.status(), header("access-control-allow-origin"), header("access-control-allow-headers"))
    };
    let two = cors(&origins, false);
    let allowed = Some("https://b.example".to_owned());
    // Without the key, which browsers do not send with the question.
    let (status, origin, headers) = ask(&two, Method::OPTIONS, "https://b.example").await;
    assert_eq!((status, origin, headers.as_deref()), (StatusCode::OK, allowed.clone(), Some("authorization")));
    let (status, origin, _) = ask(&two, Method::POST, "https://b.example").await;
    assert_eq!((status, origin), (StatusCode::UNAUTHORIZED, allowed));
    assert_eq!(ask(&two, Method::OPTIONS, "https://c.example").await.1, None);
    assert_eq!(ask(&cors(&any, true), Method::GET, "https://c.example").await.1.as_deref(), Some("https://c.example"));
    let closed = cors(&[], false);
    assert_eq!(ask(&closed, Method::GET, "https://a.example").await.1, None);
    let error = ember_server::cors::layer(&any, &["GE T".into()], &any, false).unwrap_err().to_string();
    assert!(error.starts_with("--allowed-methods"), "{error}");
}

#[tokio::test]
async fn a_proxys_prefix_may_be_there_or_not() {
    let (app, _) = app(AppConfig { root_path: "/llm".into(), api_keys: vec!["k".into()], ..config() });
    assert_eq!(send(&app, get("/llm/version")).await.0, 200);
    assert_eq!(send(&app, get("/version")).await.0, 200);
    assert_eq!(send(&app, get("/llmversion")).await.0, 404);
    assert_eq!(send(&app, get("/llm/v1/models")).await.0, 401, "the prefix does not open what keys guard");
}

#[tokio::test]
async fn requests_that_take_too_long_end_before_and_after_their_first_token() {
    let limit = Duration::from_millis(50);
    let (app, engine) = app(AppConfig { request_timeout: Some(limit), ..config() });
    for (prompt, stream, status) in
        [("wait", false, 503), ("wait", true, 503), ("hang", false, 503), ("hang", true, 200), ("ok", true, 200)]
    {
        let body = json!({"prompt": prompt, "stream": stream}).to_string();
        let (got, text) = send(&app, post("/v1/completions", body)).await;
        assert_eq!(got, status, "{prompt} {stream}: {text}");
        assert_eq!(text.contains("ServiceUnavailableError"), prompt != "ok", "{text}");
        assert_eq!(text.contains("--request-timeout"), prompt != "ok", "{text}");
        assert_eq!(text.ends_with("data: [DONE]\n\n"), status == 200, "{text}");
    }
    assert_eq!(engine.n_live.load(std::sync::atomic::Ordering::SeqCst), 0);
    assert_eq!(app.admission().n_admitted(), 0);
}

#[tokio::test]
async fn silent_streams_are_kept_alive() {
    let interval = Some(Duration::from_millis(10));
    let (app, _) = app(AppConfig { sse_keep_alive_interval: interval, ..config() });
    let request = post("/v1/completions", r#"{"prompt": "hang", "stream": true}"#);
    let mut body = app.service().oneshot(request).await.unwrap().into_body();
    let mut frames = Vec::new();
    for _ in 0..3 {
        let frame = tokio::time::timeout(Duration::from_secs(5), body.frame()).await.expect("a frame").unwrap();
        frames.push(frame.unwrap().into_data().unwrap());
    }
    assert!(frames[0].starts_with(b"data: "));
    assert_eq!(frames[1..], [b": keep-alive\n\n".as_slice(), b": keep-alive\n\n"]);
}

#[tokio::test]
async fn a_client_that_stops_reading_is_cut() {
    // More than sockets buffer.
    let app = app_saying(&"x".repeat(60_000), config());
    let listener = listener::bind("127.0.0.1", 0).await.unwrap().with_write_timeout(Duration::from_millis(200));
    let address = listener.local_addr().unwrap();
    let _stop = start(listener, app.clone());
    let mut stream = TcpStream::connect(address).await.unwrap();
    let body = r#"{"messages": [{"role": "user", "content": "x"}], "stream": true}"#;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ";
    stream.write_all(format!("{head}{}\r\n\r\n{body}", body.len()).as_bytes()).await.unwrap();
    until(|| app.admission().n_admitted() == 1).await;
    until(|| app.admission().n_admitted() == 0).await;
    // Another one that reads gets everything.
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = head.replace("host: x", "host: x\r\nconnection: close");
    stream.write_all(format!("{head}{}\r\n\r\n{body}", body.len()).as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert!(answer.len() > 10 << 20, "{} bytes", answer.len());
    assert!(String::from_utf8_lossy(&answer[answer.len() - 100..]).contains("[DONE]"));
}

#[tokio::test]
async fn a_unix_socket_is_served_and_left_clean() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ember.sock");
    // What a killed server leaves behind.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let stop = start(listener::bind_unix(&path).unwrap(), app(config()).0);
    let answer = exchange(UnixStream::connect(&path).await.unwrap()).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    let error = listener::bind_unix(&path).unwrap_err().to_string();
    assert!(error.starts_with("--uds: ") && error.contains("Another server"), "{error}");
    drop(stop);
    until(|| !path.exists()).await;
    std::fs::write(&path, "not a socket").unwrap();
    assert!(listener::bind_unix(&path).is_err() && path.exists());
}

#[tokio::test]
async fn tls_speaks_http_to_those_who_trust_it() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/api/data");
    let (cert, key) = (data.join("cert.pem"), data.join("key.pem"));
    let listener = listener::bind("127.0.0.1", 0).await.unwrap();
    let listener = listener.with_tls(Some(ember_server::tls::acceptor(&cert, &key).unwrap()));
    assert!(listener.url().starts_with("https://127.0.0.1:"));
    let address = listener.local_addr().unwrap();
    let _stop = start(listener, app(config()).0);
    let connect = async |roots: RootCertStore| {
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let client = Arc::new(client.with_root_certificates(roots).with_no_client_auth());
        let stream = TcpStream::connect(address).await.unwrap();
        TlsConnector::from(client).connect("localhost".try_into().unwrap(), stream).await
    };
    let mut roots = RootCertStore::empty();
    roots.add(tokio_rustls::rustls::pki_types::CertificateDer::from_pem_file(&cert).unwrap()).unwrap();
    let answer = exchange(connect(roots).await.unwrap()).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    assert!(connect(RootCertStore::empty()).await.is_err());

    for (cert, key, flag) in
        [(&key, &key, "--ssl-certfile"), (&cert, &cert, "--ssl-keyfile"), (&data.join("none"), &key, "--ssl-certfile")]
    {
        let error = ember_server::tls::acceptor(cert, key).err().unwrap().to_string();
        assert!(error.starts_with(flag) && error.contains("tests/api/data"), "{error}");
    }
}
