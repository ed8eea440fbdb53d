//! `/v1/responses` and `/v1/messages`: shapes, what is refused, tools and reasoning.

use std::sync::Arc;

use ember_server::{App, config::AppConfig};
use serde_json::{Value, json};

use crate::fake::{app, app_that_reads, config, post, redacted, send};

const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";
const TEXT: &str = "<think>hm</think>Ok.<tool_call>{\"name\": \"now\", \"arguments\": {\"a\": 1}}</tool_call>";

/// Short enough for the context with all that `/v1/messages` needs.
const CALL: &str = "Ok.<tool_call>{\"name\":\"now\",\"arguments\":{\"a\":1}}</tool_call>";

/// Ids of calls are random.
fn without_call_ids(text: &str) -> String {
    let mut parts = text.split("chatcmpl-tool-");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |out, part| out + "call-*" + &part[32..])
}

/// Compares the whole answer and the stream with snapshots of this name.
async fn check(name: &str, app: &Arc<App>, path: &str, mut body: Value) {
    let (status, text) = send(app, post(path, body.to_string())).await;
    assert_eq!(status, 200, "{text}");
    insta::assert_snapshot!(name, shown(&text));
    body["stream"] = json!(true);
    let (status, text) = send(app, post(path, body.to_string())).await;
    assert_eq!(status, 200, "{text}");
    insta::assert_snapshot!(format!("{name}_stream"), shown(&text));
}

fn shown(text: &str) -> String {
    without_call_ids(&redacted(&text.replace("\"created_at\":", "\"created_at\": \"created\":")))
}

#[tokio::test]
async fn responses() {
    let (plain, _) = app(config());
    check("response", &plain, RESPONSES, json!({"input": "q", "instructions": "s"})).await;
    check("response_cut_off", &plain, RESPONSES, json!({"input": "q", "max_output_tokens": 2})).await;
    let tools = json!([{"type": "function", "name": "now", "parameters": {"type": "object"}}]);
    check("response_with_everything", &app_that_reads(TEXT), RESPONSES, json!({"input": "q", "tools": tools})).await;
    let (_, text) = send(&plain, post(RESPONSES, r#"{"input": "die", "stream": true}"#)).await;
    assert!(text.contains("event: response.failed\n") && !text.contains("nvidia"), "{text}");
}

#[tokio::test]
async fn messages() {
    let (plain, _) = app(config());
    let asked = json!([{"role": "user", "content": "q"}]);
    check("message", &plain, MESSAGES, json!({"max_tokens": 40, "messages": asked, "system": "s"})).await;
    check("message_stop", &plain, MESSAGES, json!({"max_tokens": 40, "messages": asked, "stop_sequences": ["!"]}))
        .await;
    check("message_cut_off", &plain, MESSAGES, json!({"max_tokens": 2, "messages": asked})).await;
    let tools = json!([{"name": "now", "input_schema": {"type": "object"}}]);
    let body = json!({"max_tokens": 64, "messages": asked, "tools": tools});
    check("message_thoughts", &app_that_reads(TEXT), MESSAGES, body.clone()).await;
    check("message_call", &app_that_reads(CALL), MESSAGES, body).await;
    let body = json!({"messages": asked, "system": "s"}).to_string();
    let (_, text) = send(&plain, post("/v1/messages/count_tokens", body)).await;
    assert_eq!(text, format!(r#"{{"input_tokens":{}}}"#, "system:s\nuser:q\nassistant:".len()));
    let body = json!({"max_tokens": 9, "stream": true, "messages": [{"role": "user", "content": "die"}]}).to_string();
    let (_, text) = send(&plain, post(MESSAGES, body)).await;
    assert!(text.contains("event: error\n") && !text.contains("nvidia"), "{text}");
}

#[tokio::test]
async fn conversations_reach_the_template() {
    let (plain, _) = app(config());
    let call = json!({"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"});
    let output = json!({"type": "function_call_output", "call_id": "1", "output": "four"});
    let parts = json!([{"type": "input_text", "text": "a"}]);
    let body = json!({"input": [{"role": "user", "content": parts}, call, output, {"role": "user", "content": "b"}]});
    let (status, text) = send(&plain, post(RESPONSES, body.to_string())).await;
    assert_eq!(status, 200, "{text}");
    let n_prompt = "user:a\nassistant:\ntool:four\nuser:b\nassistant:".len();
    assert!(text.contains(&format!(r#""input_tokens":{n_prompt},"#)), "{text}");
    let use_block = json!({"type": "tool_use", "id": "1", "name": "f", "input": {}});
    let result = json!({"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "four"}]});
    let body = json!({"max_tokens": 4, "messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": [use_block]},
        {"role": "user", "content": [result, {"type": "text", "text": "b"}]}]});
    let (status, text) = send(&plain, post(MESSAGES, body.to_string())).await;
    assert_eq!(status, 200, "{text}");
    assert!(text.contains(&format!(r#""input_tokens":{n_prompt},"#)), "{text}");
}

#[tokio::test]
async fn what_responses_refuse() {
    let (plain, _) = app(config());
    for (fields, part, param) in [
        (json!({"input": null}), "expected a string or a list", "body.input"),
        (json!({"input": []}), "must not be empty", "input"),
        (json!({"input": [5]}), "an object", "body.input.0"),
        (json!({"input": [{"role": "king", "content": "x"}]}), "`king`", "body.input.0.role"),
        (json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}), "`input_image`", "input"),
        (json!({"input": [{"type": "web_search_call"}]}), "`web_search_call`", "input"),
        (json!({"previous_response_id": "resp_1"}), "not supported", "previous_response_id"),
        (json!({"background": true}), "not supported", "background"),
        (json!({"conversation": "c"}), "not supported", "conversation"),
        (json!({"top_logprobs": 21}), "must be between 0 and 20", "top_logprobs"),
        (json!({"truncation": "auto"}), "`disabled`", "truncation"),
        (json!({"include": ["file_search_call.results"]}), "cannot be included", "include"),
        (json!({"reasoning": {"effort": "huge"}}), "must be one of", "reasoning"),
        (json!({"reasoning": {"summary": "auto"}}), "reasoning.summary", "reasoning"),
        (json!({"text": {"format": {"type": "xml"}}}), "no type `xml`", "text"),
        (json!({"max_output_tokens": 65}), "max_output_tokens=65 cannot be greater", "max_output_tokens"),
        (json!({"tools": [{"type": "web_search"}]}), "`web_search`", "tools"),
        (json!({"tool_choice": {"type": "file_search"}}), "must be none", "tool_choice"),
        (json!({"temperature": 3}), "temperature must be in", "temperature"),
    ] {
        let mut body = json!({"input": "q"});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let (status, text) = send(&plain, post(RESPONSES, body.to_string())).await;
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!(param)), "{fields}: {text}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(part), "{fields}: {text}");
    }
}

#[tokio::test]
async fn what_messages_refuse() {
    let (plain, _) = app(AppConfig { api_keys: vec!["k".into()], ..config() });
    let image = json!([{"role": "user", "content": [{"type": "image"}]}]);
    for (fields, status, kind, part) in [
        (json!({"max_tokens": null}), 400, "invalid_request_error", "missing field `max_tokens`"),
        (json!({"max_tokens": 65}), 400, "invalid_request_error", "max_tokens=65 cannot be greater"),
        (json!({"model": "gpt"}), 404, "not_found_error", "does not exist"),
        (json!({"messages": []}), 400, "invalid_request_error", "at least one message"),
        (json!({"messages": image}), 400, "invalid_request_error", "blocks of type `image`"),
        (json!({"messages": [{"role": "system", "content": "x"}]}), 400, "invalid_request_error", "unknown role"),
        (json!({"thinking": {"type": "enabled"}}), 400, "invalid_request_error", "`thinking`"),
        (json!({"container": "c"}), 400, "invalid_request_error", "`container`"),
        (json!({"tools": [{"type": "bash_20250124", "name": "b"}]}), 400, "invalid_request_error", "`bash_20250124`"),
        (json!({"tool_choice": {"type": "tool"}}), 400, "invalid_request_error", "tool_choice must be"),
        (json!({"stop_sequences": [""]}), 400, "invalid_request_error", "empty string"),
    ] {
        let mut body = json!({"max_tokens": 4, "messages": [{"role": "user", "content": "q"}]});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let mut request = post(MESSAGES, body.to_string());
        request.headers_mut().insert("x-api-key", "k".parse().unwrap());
        let (got, text) = send(&plain, request).await;
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((got.as_u16(), &answer["type"]), (status, &json!("error")), "{fields}: {text}");
        assert_eq!(answer["error"]["type"], kind, "{fields}: {text}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(part), "{fields}: {text}");
    }
    let mut request = post(MESSAGES, "{}");
    request.headers_mut().insert("x-api-key", "other".parse().unwrap());
    assert_eq!(send(&plain, request).await.0, 401);
}
