//! Request bodies: every endpoint that takes JSON, before a real engine with a tiny random model.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use bytes::Bytes;
use ember_engine::{DeviceChoice, Engine, EngineConfig, LoadFormat};
use ember_server::{App, config::AppConfig, output};
use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tower::ServiceExt;

/// The first byte of an input chooses one. Append only: the committed inputs count on the order.
const PATHS: [&str; 11] = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/v1/score",
    "/v1/chat/completions/batch",
    "/invocations",
];
/// Long enough for a tiny model, short enough for thousands of inputs.
const REQUEST_TIMEOUT: Duration = Duration::from_millis(200);

struct Server {
    app: Arc<App>,
    runtime: Runtime,
}

static SERVER: LazyLock<Server> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 258, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "eos_token_id": 257,
    });
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ tools | tojson }}";
    for (file, content) in [("config.json", config), ("tokenizer_config.json", json!({"chat_template": template}))] {
        std::fs::write(folder.path().join(file), content.to_string()).expect("written");
    }
    let engine = EngineConfig {
        device: DeviceChoice::Cpu,
        load_format: LoadFormat::Dummy,
        kv_cache_memory_bytes: Some(1 << 20),
        ..EngineConfig::default()
    };
    let engine = Engine::load(folder.path(), engine).expect("a tiny model");
    let app = AppConfig {
        request_timeout: Some(REQUEST_TIMEOUT),
        enable_auto_tool_choice: true,
        tool_call_parser: Some(output::tool_format("hermes").expect("a format")),
        ..AppConfig::default()
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    Server { app: App::new(Arc::new(engine), app), runtime: runtime.expect("a runtime") }
});

/// A byte that chooses the endpoint, and the body.
pub fn run(bytes: &[u8]) {
    let Some((&path, body)) = bytes.split_first() else {
        return;
    };
    let path = PATHS[usize::from(path) % PATHS.len()];
    let request = Request::post(path)
        .header("content-type", "application/json")
        .body(Full::new(Bytes::copy_from_slice(body)))
        .expect("a request");
    let (status, answer) = SERVER.runtime.block_on(async {
        let response = SERVER.app.service().oneshot(request).await.unwrap_or_else(|never| match never {});
        let status = response.status();
        (status, response.into_body().collect().await.map(|body| body.to_bytes()))
    });
    let answer = answer.expect("an answer ends");
    assert!(status.as_u16() != 500, "{path}: {}", String::from_utf8_lossy(&answer));
    let is_stream = answer.starts_with(b"data: ") || answer.starts_with(b"event: ");
    if !is_stream {
        let json: Value = serde_json::from_slice(&answer).expect("an answer is JSON");
        assert!(
            json.is_object() && (status == StatusCode::OK) == json.get("error").is_none_or(Value::is_null),
            "{json}"
        );
    }
}
