//! Fields that change what is answered, or what the engine is told.

use std::sync::Arc;

use ember_engine::ThinkingBudget;
use ember_server::App;
use serde_json::{Value, json};

use crate::fake::{FakeEngine, TEXT, app_that_reads, ask, config_that_reads, post, send};

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

/// Tokens of a list of log-probabilities.
fn tokens(list: &Value) -> Vec<&str> {
    list.as_array().expect("a list").iter().map(|entry| entry["token"].as_str().expect("a token")).collect()
}

#[tokio::test]
async fn chosen_tokens_come_in_place_of_the_best() {
    let ids = json!([122, 72, 121]);
    for top_logprobs in [0, 1, 5] {
        let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "logprobs": true,
            "top_logprobs": top_logprobs, "logprob_token_ids": ids});
        let (status, text) = ask("/v1/chat/completions", &body).await;
        assert_eq!(status, 200, "{text}");
        // The sampled one first; it is not said twice.
        let answer = parsed(&text);
        let of_token = &answer["choices"][0]["logprobs"]["content"][0];
        assert_eq!((of_token["token"].as_str(), tokens(&of_token["top_logprobs"])), (Some("H"), vec!["H", "z", "y"]));
    }
    let body = json!({"prompt": "ab", "max_tokens": 1, "logprobs": 0, "logprob_token_ids": ids, "echo": true});
    let (status, text) = ask("/v1/completions", &body).await;
    assert_eq!(status, 200, "{text}");
    let top = &parsed(&text)["choices"][0]["logprobs"]["top_logprobs"];
    // The prompt's are those of its own tokens alone: the list is for the output.
    assert_eq!(top, &json!([null, {"a": -0.25}, {"b": -0.25}, {"H": -0.25, "z": -1.5, "y": -1.5}]));
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "logprobs": true,
        "logprob_token_ids": ids, "stream": true});
    let (_, text) = ask("/v1/chat/completions", &body).await;
    assert!(text.contains(r#"{"token":"z","logprob":-1.5,"bytes":[122]}"#), "{text}");
}

#[tokio::test]
async fn responses_include_the_logprobs_of_their_text() {
    let text = "<think>hm</think>Ok.<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>";
    let tool = json!([{"type": "function", "name": "now", "parameters": {"type": "object"}}]);
    let body = json!({"input": "q", "tools": tool, "include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let app = app_that_reads(text);
    let (status, answer) = send(&app, post("/v1/responses", body.to_string())).await;
    assert_eq!(status, 200, "{answer}");
    let answer = parsed(&answer);
    assert_eq!(answer["top_logprobs"], 2);
    let message = &answer["output"][1]["content"][0];
    assert_eq!((message["type"].as_str(), message["text"].as_str()), (Some("output_text"), Some("Ok.")));
    // Thoughts and calls have none, nor has what marks them.
    assert_eq!(tokens(&message["logprobs"]), ["O", "k", "."]);
    assert_eq!(message["logprobs"][0]["top_logprobs"].as_array().expect("a list").len(), 2);
    assert_eq!(message["logprobs"][0]["bytes"], json!([79]));
    // Without `include` there are none, whatever their number.
    let mut body = body;
    body["include"] = json!([]);
    let (_, answer) = send(&app, post("/v1/responses", body.to_string())).await;
    let answer = parsed(&answer);
    assert_eq!((&answer["output"][1]["content"][0]["logprobs"], &answer["top_logprobs"]), (&json!([]), &json!(2)));
}

#[tokio::test]
async fn streamed_responses_bring_logprobs_with_the_text() {
    let body = json!({"input": "q", "include": ["message.output_text.logprobs"], "stream": true});
    let (status, text) = ask("/v1/responses", &body).await;
    assert_eq!(status, 200, "{text}");
    let events: Vec<Value> = text.lines().filter_map(|line| line.strip_prefix("data: ")).map(parsed).collect();
    let of = |kind: &str| events.iter().filter(|event| event["type"] == kind).collect::<Vec<_>>();
    let bytes = |list: &Value| -> Vec<u8> {
        let entries = list.as_array().expect("a list").iter();
        entries.flat_map(|entry| entry["bytes"].as_array().expect("bytes")).map(|b| b.as_u64().unwrap() as u8).collect()
    };
    for event in of("response.output_text.delta") {
        assert_eq!(bytes(&event["logprobs"]), event["delta"].as_str().expect("text").as_bytes());
        assert_eq!(event["logprobs"][0]["top_logprobs"], json!([]));
    }
    let done = of("response.output_text.done")[0];
    assert_eq!(bytes(&done["logprobs"]), TEXT.as_bytes());
    assert_eq!(bytes(&of("response.content_part.done")[0]["part"]["logprobs"]), TEXT.as_bytes());
    let last = of("response.completed")[0];
    assert_eq!(bytes(&last["response"]["output"][0]["content"][0]["logprobs"]), TEXT.as_bytes());
}

#[tokio::test]
async fn budgets_of_reasoning_reach_the_engine() {
    let engine = Arc::new(FakeEngine::saying(TEXT));
    let app = App::new(engine.clone(), config_that_reads());
    let tag = |text: &str| text.bytes().map(u32::from).collect::<Vec<u32>>();
    let budget = |n_tokens, begins_inside| {
        Some(ThinkingBudget { n_tokens, start: tag("<think>"), end: tag("</think>"), begins_inside })
    };
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let continued = |content: &str| {
        json!({"messages": [message("assistant", content)], "thinking_token_budget": 7,
            "continue_final_message": true})
    };
    let chat = "/v1/chat/completions";
    for (path, body, expected) in [
        (chat, json!({"messages": [message("user", "x")], "thinking_token_budget": 7}), budget(7, false)),
        (chat, json!({"messages": [message("user", "x")], "thinking_token_budget": -1}), None),
        (chat, json!({"messages": [message("user", "x")]}), None),
        (chat, continued("<think>"), budget(7, true)),
        // The reasoning is over.
        (chat, continued("<think></think>"), None),
        ("/v1/completions", json!({"prompt": "x", "thinking_token_budget": 0}), budget(0, false)),
        ("/v1/responses", json!({"input": "x", "thinking_token_budget": 3}), budget(3, false)),
    ] {
        let (status, text) = send(&app, post(path, body.to_string())).await;
        assert_eq!(status, 200, "{body}: {text}");
        assert_eq!(engine.last_params.lock().unwrap().thinking_budget, expected, "{body}");
    }
    let body = json!({"messages": [message("user", "x")], "thinking_token_budget": 7, "use_beam_search": true});
    let (status, text) = send(&app, post(chat, body.to_string())).await;
    assert_eq!((status.as_u16(), &parsed(&text)["error"]["param"]), (400, &json!("thinking_token_budget")), "{text}");
}

#[tokio::test]
async fn cut_texts_keep_what_the_tokenizer_added() {
    // The fake model's vector: the number of tokens, the last one, and one. Its tokenizer puts one token before.
    let long = "abcd".repeat(1 << 18);
    for (side, n, expected) in [("right", 3, [3.0, 98.0, 1.0]), ("left", 3, [3.0, 100.0, 1.0])] {
        let body = json!({"input": long, "truncate_prompt_tokens": n, "truncation_side": side});
        let (status, text) = ask("/v1/embeddings", &body).await;
        assert_eq!(status, 200, "{text}");
        assert_eq!(parsed(&text)["data"][0]["embedding"], json!(expected), "{side}");
    }
    // One token of the text, beside the one before it: a vector of 2, 98 and 1 for each but the query.
    let body = json!({"query": "a", "documents": ["bcd", "bxy"], "max_tokens_per_doc": 1});
    let (_, text) = ask("/rerank", &body).await;
    let answer = parsed(&text);
    assert_eq!(answer["usage"]["prompt_tokens"], 6);
    assert_eq!(answer["results"][0]["relevance_score"], answer["results"][1]["relevance_score"]);
    let body = json!({"prompt": "abcd", "truncate_prompt_tokens": 3, "return_token_ids": true, "max_tokens": 1});
    let (_, text) = ask("/v1/completions", &body).await;
    assert_eq!(parsed(&text)["choices"][0]["prompt_token_ids"], json!([256, 99, 100]));
    let body = json!({"prompt": [97, 98, 99], "truncate_prompt_tokens": 2, "return_token_ids": true, "max_tokens": 1});
    let (_, text) = ask("/v1/completions", &body).await;
    assert_eq!(parsed(&text)["choices"][0]["prompt_token_ids"], json!([98, 99]));
}
