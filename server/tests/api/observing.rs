//! What people look at: the built-in page and the dashboard.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tower::ServiceExt;

use crate::fake::{app, config, get, post, read, send};

#[tokio::test]
async fn the_page_needs_nothing_from_elsewhere() {
    let (app, _) = app(config());
    let response = app.service().oneshot(get("/")).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["content-type"]),
        (200, &"text/html; charset=utf-8".parse().unwrap())
    );
    assert!(response.headers()["content-security-policy"].to_str().unwrap().starts_with("default-src 'none'"));
    let page = read(response).await;
    assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("src="), "{page}");
    for path in ["v1/models", "v1/chat/completions", "metrics"] {
        assert!(page.contains(&format!("at(\"{path}\")")), "{path}");
    }
    for metric in metrics_of(&page) {
        assert!(exported().await.contains(&metric), "{metric}");
    }
}

#[tokio::test]
async fn the_dashboard_shows_every_metric_and_no_other() {
    let text = include_str!("../../../docs/grafana-dashboard.json");
    let dashboard: Value = serde_json::from_str(text).unwrap();
    let queries: Vec<_> =
        dashboard["panels"].as_array().unwrap().iter().flat_map(|panel| panel["targets"].as_array().unwrap()).collect();
    let shown: BTreeSet<String> =
        queries.iter().flat_map(|query| metrics_of(query["expr"].as_str().unwrap())).collect();
    assert_eq!(shown, exported().await);
}

/// The metrics that are named in `text`, those of histograms without their endings.
fn metrics_of(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    let words = words.filter(|word| {
        word.starts_with("vllm:") || word.starts_with("http_requests_") || word.starts_with("http_request_")
    });
    let base = |word: &str| {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|ending| word.strip_suffix(ending));
        base.unwrap_or(word).to_owned()
    };
    words.map(base).collect()
}

/// What `/metrics` exports after a request.
async fn exported() -> BTreeSet<String> {
    let (app, _) = app(config());
    assert_eq!(send(&app, post("/v1/completions", json!({"prompt": "x"}).to_string())).await.0, 200);
    let (_, text) = send(&app, get("/metrics")).await;
    text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).flat_map(metrics_of).collect()
}
