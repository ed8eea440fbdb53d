//! Streams: the fast path against the wire types, errors before and after the first token.

use ember_common::openai::{ChatCompletionChunk, CompletionChunk};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::fake::{TEXT, app, ask, config, post, send};

fn frames(stream: &str) -> Vec<&str> {
    let frames: Vec<&str> =
        stream.split_terminator("\n\n").map(|frame| frame.strip_prefix("data: ").unwrap()).collect();
    assert_eq!(frames.last(), Some(&"[DONE]"));
    frames[..frames.len() - 1].to_vec()
}

fn without_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(without_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(without_nulls),
        _ => {}
    }
}

/// Every frame is what serde would write of the same chunk, but for keys that are null.
fn check_frames<T: Serialize + DeserializeOwned>(stream: &str) -> Vec<T> {
    let check = |frame: &str| {
        let chunk: T = serde_json::from_str(frame).unwrap_or_else(|error| panic!("{error}: {frame}"));
        let mut by_serde = serde_json::to_value(&chunk).unwrap();
        let mut by_hand: Value = serde_json::from_str(frame).unwrap();
        without_nulls(&mut by_serde);
        without_nulls(&mut by_hand);
        assert_eq!(by_hand, by_serde);
        chunk
    };
    frames(stream).into_iter().map(check).collect()
}

#[tokio::test]
async fn chunks_are_what_the_wire_types_say() {
    for options in [
        json!({}),
        json!({"logprobs": true, "top_logprobs": 3, "return_token_ids": true, "n": 3}),
        json!({"stream_options": {"include_usage": true, "continuous_usage_stats": true}, "stream_interval": 3}),
    ] {
        let mut body = json!({"messages": [{"role": "user", "content": "\u{1}\"\\"}], "stream": true});
        body.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        let (_, stream) = ask("/v1/chat/completions", &body).await;
        let chunks: Vec<ChatCompletionChunk> = check_frames(&stream);
        let n = options["n"].as_u64().unwrap_or(1) as usize;
        for index in 0..n {
            let choices = chunks.iter().flat_map(|chunk| &chunk.choices).filter(|choice| choice.index == index);
            let text: String = choices.filter_map(|choice| choice.delta.content.clone()).collect();
            assert_eq!(text, TEXT);
        }
        if body.get("stream_options").is_some() {
            let usage = chunks.last().unwrap().usage.as_ref().unwrap();
            assert_eq!(usage.completion_tokens, TEXT.len() + 1);
            assert!(chunks.iter().all(|chunk| chunk.usage.is_some()));
        } else {
            assert!(chunks.iter().all(|chunk| chunk.usage.is_none()));
        }
    }
    for options in [json!({}), json!({"logprobs": 2, "echo": true, "return_token_ids": true, "n": 2})] {
        let mut body = json!({"prompt": ["a", "b"], "stream": true, "model": "alias"});
        body.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        let (_, stream) = ask("/v1/completions", &body).await;
        let chunks: Vec<CompletionChunk> = check_frames(&stream);
        assert!(chunks.iter().all(|chunk| chunk.model == "alias" && chunk.id == "cmpl-test"));
        let last = chunks.iter().flat_map(|chunk| &chunk.choices).filter(|choice| choice.finish_reason.is_some());
        assert_eq!(last.count(), 2 * options["n"].as_u64().unwrap_or(1) as usize);
    }
}

#[tokio::test]
async fn one_chunk_per_token_and_the_role_with_the_first() {
    let body = json!({"messages": [{"role": "user", "content": "x"}], "stream": true});
    let (_, stream) = ask("/v1/chat/completions", &body).await;
    let chunks: Vec<ChatCompletionChunk> = check_frames(&stream);
    // The role, one per byte, the end-of-sequence token.
    assert_eq!(chunks.len(), 1 + TEXT.len() + 1);
    assert_eq!(chunks[0].choices[0].delta.role.as_deref(), Some("assistant"));
}

#[tokio::test]
async fn an_error_before_the_first_token_is_a_status_and_after_it_a_frame() {
    let (app, _) = app(config());
    let body = |stream: bool| json!({"prompt": "please die", "stream": stream}).to_string();
    let (status, text) = send(&app, post("/v1/completions", body(false))).await;
    assert_eq!(status, 500);
    assert!(text.contains(r#""type":"InternalServerError""#) && !text.contains("nvidia"), "{text}");
    let (status, text) = send(&app, post("/v1/completions", body(true))).await;
    assert_eq!(status, 200);
    let frames = frames(&text);
    assert_eq!(frames.len(), 2, "{text}");
    let error: Value = serde_json::from_str(frames[1]).unwrap();
    assert_eq!(error["error"]["code"], 500);
    let (_, metrics) = send(&app, crate::fake::get("/metrics")).await;
    assert!(metrics.contains(r#"finished_reason="error"} 2"#), "{metrics}");
}

#[tokio::test]
async fn a_panic_costs_only_its_own_request() {
    let (app, _) = app(config());
    let (status, text) = send(&app, post("/v1/completions", r#"{"prompt": "panic"}"#)).await;
    assert_eq!(status, 500);
    assert!(text.contains(r#""type":"InternalServerError""#), "{text}");
    assert_eq!(app.admission().n_admitted(), 0);
    assert_eq!(send(&app, post("/v1/completions", r#"{"prompt": "ok"}"#)).await.0, 200);
}
