//! Permits, disconnects and draining.

use std::{sync::atomic::Ordering, time::Duration};

use ember_server::{
    config::AppConfig,
    listener::{self, End},
};
use http_body_util::BodyExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
};
use tower::ServiceExt;

use crate::fake::{app, config, post, send};

const HANGS: &str = r#"{"prompt": "hang", "stream": true}"#;

fn limited() -> AppConfig {
    // The fake engine runs two sequences at once.
    AppConfig { max_num_queued_reqs: Some(1), ..config() }
}

#[tokio::test]
async fn a_full_queue_answers_503_until_a_stream_is_dropped() {
    let (app, engine) = app(limited());
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(app.service().oneshot(post("/v1/completions", HANGS)).await.unwrap());
    }
    assert_eq!((app.admission().n_admitted(), engine.n_live.load(Ordering::SeqCst)), (3, 3));
    let response = app.service().oneshot(post("/v1/completions", HANGS)).await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["retry-after"], "1");
    let text = crate::fake::read(response).await;
    assert!(text.contains("--max-num-queued-reqs"), "{text}");

    let mut body = streams.pop().unwrap().into_body();
    assert!(body.frame().await.unwrap().is_ok());
    drop(body);
    assert_eq!((app.admission().n_admitted(), engine.n_live.load(Ordering::SeqCst)), (2, 2));
    assert_eq!(send(&app, post("/v1/completions", r#"{"prompt": "ok"}"#)).await.0, 200);
    // More sequences than fit at all wait for an empty server.
    let many = r#"{"prompt": "ok", "n": 9}"#;
    assert_eq!(send(&app, post("/v1/completions", many)).await.0, 503);
    streams.clear();
    assert_eq!(send(&app, post("/v1/completions", many)).await.0, 200);
    assert_eq!(app.admission().n_admitted(), 0);
}

#[tokio::test]
async fn a_request_dropped_before_its_first_token_is_cancelled() {
    let (app, engine) = app(limited());
    let waiting = app.service().oneshot(post("/v1/completions", r#"{"prompt": "wait", "stream": true}"#));
    assert!(tokio::time::timeout(Duration::from_millis(50), waiting).await.is_err());
    assert_eq!((app.admission().n_admitted(), engine.n_live.load(Ordering::SeqCst)), (0, 0));
}

/// A server on a free port, and the senders that stop and abort it.
async fn start() -> (
    std::net::SocketAddr,
    oneshot::Sender<()>,
    oneshot::Sender<()>,
    tokio::task::JoinHandle<End>,
    std::sync::Arc<ember_server::App>,
) {
    let (app, _) = app(config());
    let socket = listener::bind("127.0.0.1", 0).await.unwrap();
    let address = socket.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let (abort, aborted) = oneshot::channel();
    let server = listener::serve(
        socket,
        app.clone(),
        async { stopped.await.unwrap() },
        async { aborted.await.unwrap() },
        Duration::from_secs(60),
    );
    (address, stop, abort, tokio::spawn(server), app)
}

async fn request(address: std::net::SocketAddr, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    stream
}

pub async fn until(mut is_so: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("nothing changed for 5 s");
}

#[tokio::test]
async fn a_client_that_hangs_up_frees_its_permit() {
    let (address, _stop, _abort, _server, app) = start().await;
    for body in [HANGS, r#"{"prompt": "wait", "stream": true}"#, r#"{"prompt": "hang"}"#] {
        let stream = request(address, body).await;
        until(|| app.admission().n_admitted() == 1).await;
        drop(stream);
        until(|| app.admission().n_admitted() == 0).await;
    }
}

#[tokio::test]
async fn draining_waits_for_answers_and_takes_no_more_connections() {
    let (address, stop, abort, server, app) = start().await;
    // Idle connections must not hold the server up.
    let _idle = TcpStream::connect(address).await.unwrap();
    let mut stream = request(address, HANGS).await;
    until(|| app.admission().n_admitted() == 1).await;
    stop.send(()).unwrap();
    let mut first = [0; 12];
    stream.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    for _ in 0..1000 {
        if TcpStream::connect(address).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(TcpStream::connect(address).await.is_err());
    assert!(!server.is_finished());
    drop(stream);
    assert_eq!(server.await.unwrap(), End::Drained);
    drop(abort);
}

#[tokio::test]
async fn a_second_signal_aborts() {
    let (address, stop, abort, server, app) = start().await;
    let _stream = request(address, HANGS).await;
    until(|| app.admission().n_admitted() == 1).await;
    stop.send(()).unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!server.is_finished());
    abort.send(()).unwrap();
    assert_eq!(server.await.unwrap(), End::Aborted);
}

#[tokio::test]
async fn a_taken_port_is_named_with_its_flag() {
    let socket = listener::bind("127.0.0.1", 0).await.unwrap();
    let error = listener::bind("127.0.0.1", socket.local_addr().unwrap().port()).await.unwrap_err().to_string();
    assert!(error.contains("--port") && error.contains("127.0.0.1:"), "{error}");
}

#[tokio::test]
async fn request_ids_come_back_only_if_wanted() {
    for wanted in [false, true] {
        let (app, _) = app(AppConfig { enable_request_id_headers: wanted, ..config() });
        let response = app.service().oneshot(post("/v1/completions", r#"{"prompt": "x"}"#)).await.unwrap();
        let header = response.headers().get("x-request-id").map(|id| id.to_str().unwrap().to_owned());
        assert_eq!(header, wanted.then(|| "test".to_owned()));
        assert!(crate::fake::read(response).await.starts_with(r#"{"id":"cmpl-test""#));
    }
}
