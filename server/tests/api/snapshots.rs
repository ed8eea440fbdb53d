//! The bytes on the wire of every response.

use serde_json::{Value, json};

use crate::fake::{app, ask, config, get, redacted, send};

/// Compares the answer with the snapshot of this name.
async fn check(name: &str, path: &str, body: Value) {
    let (status, text) = ask(path, &body).await;
    assert_eq!(status, 200, "{text}");
    insta::assert_snapshot!(name, redacted(&text), &body.to_string());
}

const MESSAGES: &str = r#"[{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]"#;

fn chat(fields: Value) -> Value {
    let mut body = json!({"messages": serde_json::from_str::<Value>(MESSAGES).unwrap()});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn chat_completions() {
    let path = "/v1/chat/completions";
    check("chat", path, chat(json!({}))).await;
    check(
        "chat_with_everything",
        path,
        chat(json!({
            "n": 2, "max_completion_tokens": 2, "logprobs": true, "top_logprobs": 2, "prompt_logprobs": 1,
            "return_token_ids": true, "return_prompt_text": true, "model": "alias"
        })),
    )
    .await;
    check("chat_stop_string", path, chat(json!({"stop": "!"}))).await;
    check("chat_stop_token", path, chat(json!({"stop_token_ids": [105]}))).await;
    check(
        "chat_echo",
        path,
        json!({"messages": [{"role": "assistant", "content": "I say: "}], "echo": true, "continue_final_message": true}),
    )
    .await;
}

#[tokio::test]
async fn chat_completion_streams() {
    let path = "/v1/chat/completions";
    check("chat_stream", path, chat(json!({"stream": true}))).await;
    check(
        "chat_stream_usage",
        path,
        chat(json!({"stream": true, "max_tokens": 2, "stream_options": {"include_usage": true}})),
    )
    .await;
    check(
        "chat_stream_with_everything",
        path,
        chat(json!({
            "stream": true, "n": 2, "max_tokens": 2, "logprobs": true, "top_logprobs": 1, "return_token_ids": true,
            "return_prompt_text": true, "return_tokens_as_token_ids": true,
            "stream_options": {"include_usage": true, "continuous_usage_stats": true}
        })),
    )
    .await;
    check("chat_stream_interval", path, chat(json!({"stream": true, "stream_interval": 4}))).await;
}

#[tokio::test]
async fn completions() {
    let path = "/v1/completions";
    check("completion", path, json!({"prompt": "ab"})).await;
    check(
        "completion_with_everything",
        path,
        json!({
            "prompt": ["ab", "c"], "n": 2, "max_tokens": 1, "logprobs": 2, "prompt_logprobs": 0,
            "return_token_ids": true, "echo": true
        }),
    )
    .await;
    check("completion_echo_alone", path, json!({"prompt": [97, 98], "max_tokens": 0, "echo": true, "logprobs": 0}))
        .await;
}

#[tokio::test]
async fn completion_streams() {
    let path = "/v1/completions";
    check("completion_stream", path, json!({"prompt": "ab", "stream": true})).await;
    check(
        "completion_stream_with_everything",
        path,
        json!({
            "prompt": ["ab", "c"], "stream": true, "max_tokens": 2, "logprobs": 1, "return_token_ids": true,
            "echo": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true}
        }),
    )
    .await;
    check(
        "completion_stream_echo_alone",
        path,
        json!({"prompt": "ab", "stream": true, "max_tokens": 0, "echo": true, "stream_options": {"include_usage": true}}),
    )
    .await;
}

#[tokio::test]
async fn beams() {
    check(
        "completion_beams",
        "/v1/completions",
        json!({"prompt": "ab", "use_beam_search": true, "n": 2, "max_tokens": 2, "logprobs": 1}),
    )
    .await;
    check(
        "chat_beams_stream",
        "/v1/chat/completions",
        chat(json!({"use_beam_search": true, "n": 2, "max_tokens": 2, "stream": true})),
    )
    .await;
}

#[tokio::test]
async fn vectors() {
    // Ids are random.
    let check = async |name: &str, path: &str, body: Value| {
        let (status, text) = ask(path, &body).await;
        assert_eq!(status, 200, "{text}");
        let mut answer: Value =
            serde_json::from_str(&redacted(&text).replace("\"created\":*", "\"created\":0")).unwrap();
        let id = answer["id"].as_str().unwrap().split_once('-').unwrap().0.to_owned();
        answer["id"] = json!(format!("{id}-*"));
        insta::assert_snapshot!(name, answer.to_string(), &body.to_string());
    };
    check("embeddings", "/v1/embeddings", json!({"input": ["ab", "c"]})).await;
    check("embeddings_base64", "/v1/embeddings", json!({"input": [97, 98], "encoding_format": "base64"})).await;
    check("score", "/score", json!({"text_1": "ab", "text_2": ["ab", "c"]})).await;
    check("rerank", "/rerank", json!({"query": "ab", "documents": ["c", "ab"], "top_n": 2})).await;
}

#[tokio::test]
async fn tokens() {
    check("tokenize", "/tokenize", json!({"prompt": "ab"})).await;
    check("tokenize_chat", "/tokenize", chat(json!({"return_token_strs": true, "add_generation_prompt": false}))).await;
    check("detokenize", "/detokenize", json!({"tokens": [97, 98]})).await;
    let (status, text) = ask("/detokenize", &json!({"tokens": [999]})).await;
    assert_eq!(status, 400, "{text}");
    let (status, text) = ask("/tokenize", &json!({})).await;
    assert_eq!(status, 400, "{text}");
}

#[tokio::test]
async fn models_version_and_probes() {
    let (app, engine) = app(config());
    let (status, text) = send(&app, get("/v1/models")).await;
    assert_eq!(status, 200);
    let mut models: Value = serde_json::from_str(&text).unwrap();
    for card in models["data"].as_array_mut().unwrap() {
        card["permission"][0]["id"] = json!("modelperm-*");
    }
    insta::assert_snapshot!("models", models.to_string());
    let (status, text) = send(&app, get("/version")).await;
    assert_eq!((status.as_u16(), text), (200, format!(r#"{{"version":"{}"}}"#, env!("CARGO_PKG_VERSION"))));
    assert_eq!(send(&app, get("/load")).await, (hyper::StatusCode::OK, r#"{"server_load":0}"#.to_owned()));
    assert_eq!(send(&app, get("/health")).await, (hyper::StatusCode::OK, String::new()));
    engine.is_healthy.store(false, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(send(&app, get("/health")).await.0, 503);
    assert_eq!(send(&app, get("/ping")).await.0, 503);
}

#[tokio::test]
async fn metrics() {
    let (app, _) = app(config());
    let body = json!({"prompt": "ab", "n": 2, "max_tokens": 3}).to_string();
    assert_eq!(send(&app, crate::fake::post("/v1/completions", body)).await.0, 200);
    let (_, text) = send(&app, get("/metrics")).await;
    for line in [
        "# TYPE vllm:time_to_first_token_seconds histogram",
        r#"vllm:request_success_total{model_name="tiny",engine="0",finished_reason="length"} 2"#,
        r#"vllm:request_success_total{model_name="tiny",engine="0",finished_reason="abort"} 0"#,
        r#"vllm:time_to_first_token_seconds_count{model_name="tiny",engine="0"} 2"#,
        r#"vllm:time_to_first_token_seconds_bucket{model_name="tiny",engine="0",le="2560"} 2"#,
        r#"vllm:inter_token_latency_seconds_count{model_name="tiny",engine="0"} 4"#,
        r#"vllm:request_time_per_output_token_seconds_count{model_name="tiny",engine="0"} 2"#,
        r#"vllm:e2e_request_latency_seconds_count{model_name="tiny",engine="0"} 2"#,
        r#"vllm:request_prompt_tokens_sum{model_name="tiny",engine="0"} 6"#,
        r#"vllm:request_queue_time_seconds_sum{model_name="tiny",engine="0"} 2"#,
        r#"vllm:request_prefill_time_seconds_sum{model_name="tiny",engine="0"} 1"#,
        r#"vllm:request_prefill_time_seconds_bucket{model_name="tiny",engine="0",le="0.8"} 0"#,
        r#"vllm:request_inference_time_seconds_count{model_name="tiny",engine="0"} 2"#,
        r#"vllm:request_prefill_kv_computed_tokens_sum{model_name="tiny",engine="0"} 0"#,
        r#"vllm:iteration_tokens_total_sum{model_name="tiny",engine="0"} 74"#,
        r#"vllm:iteration_tokens_total_bucket{model_name="tiny",engine="0",le="16"} 2"#,
        r#"vllm:num_requests_waiting_by_reason{model_name="tiny",engine="0",reason="capacity"} 1"#,
        r#"vllm:admission_rejections_total{model_name="tiny",engine="0",reason="max_num_queued_reqs"} 0"#,
        r#"vllm:request_generation_tokens_sum{model_name="tiny",engine="0"} 6"#,
        r#"vllm:request_params_n_sum{model_name="tiny",engine="0"} 2"#,
        r#"vllm:request_params_max_tokens_sum{model_name="tiny",engine="0"} 6"#,
        r#"vllm:num_requests_running{model_name="tiny",engine="0"} 2"#,
        r#"vllm:num_requests_waiting{model_name="tiny",engine="0"} 1"#,
        r#"vllm:kv_cache_usage_perc{model_name="tiny",engine="0"} 0.25"#,
        r#"vllm:prefix_cache_hits_total{model_name="tiny",engine="0"} 5"#,
        r#"http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1"#,
    ] {
        assert!(text.lines().any(|got| got == line), "no line `{line}` in\n{text}");
    }
    assert!(
        text.contains(r#"vllm:cache_config_info{model_name="tiny",engine="0",block_size="16",num_gpu_blocks="64""#)
    );
}
