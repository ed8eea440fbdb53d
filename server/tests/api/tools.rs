//! Tool calls and reasoning on the wire, streamed and whole.

use ember_common::openai::{ChatCompletion, ChatCompletionChunk, ToolCallDelta};
use serde_json::{Value, json};

use crate::fake::{app_that_reads, post, send};

const CALLS: &str = concat!(
    "Well.<tool_call>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Köln\"}}</tool_call>",
    "<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>"
);

fn body(fields: Value) -> Value {
    let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}});
    let mut body = json!({"messages": [{"role": "user", "content": "x"}], "tools": [tool("get_weather"), tool("now")]});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

async fn whole(text: &str, fields: Value) -> ChatCompletion {
    let (status, answer) = send(&app_that_reads(text), post("/v1/chat/completions", body(fields).to_string())).await;
    assert_eq!(status, 200, "{answer}");
    serde_json::from_str(&answer).unwrap()
}

/// Everything that a client puts together of a stream.
#[derive(Debug, Default)]
struct Streamed {
    content: String,
    reasoning: String,
    calls: Vec<(String, String, String)>,
    finish_reason: Value,
    n_chunks: usize,
    usage: Value,
}

async fn streamed(text: &str, mut fields: Value) -> Streamed {
    fields["stream"] = json!(true);
    fields["stream_options"] = json!({"include_usage": true});
    let (status, answer) = send(&app_that_reads(text), post("/v1/chat/completions", body(fields).to_string())).await;
    assert_eq!(status, 200, "{answer}");
    let mut out = Streamed::default();
    for frame in answer.split_terminator("\n\n").map(|frame| frame.strip_prefix("data: ").unwrap()) {
        if frame == "[DONE]" {
            continue;
        }
        let chunk: ChatCompletionChunk = serde_json::from_str(frame).unwrap();
        out.usage = serde_json::to_value(&chunk.usage).unwrap();
        for choice in chunk.choices {
            out.n_chunks += 1;
            out.content.push_str(choice.delta.content.as_deref().unwrap_or_default());
            out.reasoning.push_str(choice.delta.reasoning.as_deref().unwrap_or_default());
            for ToolCallDelta { id, kind, index, function } in choice.delta.tool_calls {
                if let Some(id) = id {
                    assert_eq!((index, kind.as_deref()), (out.calls.len(), Some("function")));
                    out.calls.push((id, function.name.unwrap(), String::new()));
                }
                out.calls[index].2.push_str(&function.arguments);
            }
            if let Some(reason) = choice.finish_reason {
                out.finish_reason = json!(reason);
            }
        }
    }
    out
}

#[tokio::test]
async fn calls_are_taken_out_of_the_text() {
    let answer = whole(CALLS, json!({})).await;
    let choice = &answer.choices[0];
    assert_eq!(choice.message.content.as_deref(), Some("Well."));
    assert_eq!(json!(choice.finish_reason), "tool_calls");
    let calls: Vec<_> = choice.message.tool_calls.iter().map(|call| &call.function).collect();
    assert_eq!(calls[0].name, "get_weather");
    assert_eq!(serde_json::from_str::<Value>(&calls[0].arguments).unwrap(), json!({"city": "Köln"}));
    assert_eq!((calls[1].name.as_str(), calls[1].arguments.as_str()), ("now", "{}"));
    assert!(choice.message.tool_calls.iter().all(|call| call.id.starts_with("chatcmpl-tool-")));

    let stream = streamed(CALLS, json!({})).await;
    assert_eq!((stream.content.as_str(), &stream.finish_reason), ("Well.", &json!("tool_calls")));
    let calls: Vec<_> = stream.calls.iter().map(|(_, name, arguments)| (name.as_str(), arguments.as_str())).collect();
    assert_eq!(calls, [("get_weather", "{\"city\": \"Köln\"}"), ("now", "{}")]);
    assert_ne!(stream.calls[0].0, stream.calls[1].0);
    // Arguments come as they are written, not all at once.
    assert!(stream.n_chunks > 20, "{}", stream.n_chunks);
}

#[tokio::test]
async fn what_a_request_allows_of_calls() {
    let one = json!({"parallel_tool_calls": false});
    assert_eq!(whole(CALLS, one.clone()).await.choices[0].message.tool_calls.len(), 1);
    assert_eq!(streamed(CALLS, one).await.calls.len(), 1);
    let none = whole(CALLS, json!({"tool_choice": "none"})).await;
    assert_eq!(none.choices[0].message.content.as_deref(), Some(CALLS));
    assert_eq!(json!(none.choices[0].finish_reason), "stop");
    let plain = whole("No calls.", json!({})).await;
    assert!(plain.choices[0].message.tool_calls.is_empty());
    assert_eq!(json!(plain.choices[0].finish_reason), "stop");
    // Cut off within a call.
    let cut = streamed(CALLS, json!({"max_tokens": 60})).await;
    assert_eq!((cut.finish_reason, cut.calls.len()), (json!("length"), 1));
}

#[tokio::test]
async fn forced_calls_are_the_whole_answer() {
    let named = json!({"tool_choice": {"type": "function", "function": {"name": "now"}}});
    let answer = whole("{\"a\": 1}", named.clone()).await;
    let choice = &answer.choices[0];
    assert_eq!((choice.message.content.as_ref(), json!(choice.finish_reason)), (None, json!("stop")));
    assert_eq!(choice.message.tool_calls[0].function.name, "now");
    assert_eq!(choice.message.tool_calls[0].function.arguments, "{\"a\": 1}");
    assert_eq!(streamed("{\"a\": 1}", named).await.calls[0].2, "{\"a\": 1}");

    let text = "[{\"name\": \"now\", \"parameters\": {}}, {\"name\": \"now\", \"parameters\": {\"b\": []}}]";
    let answer = whole(text, json!({"tool_choice": "required"})).await;
    assert_eq!(json!(answer.choices[0].finish_reason), "tool_calls");
    assert_eq!(answer.choices[0].message.tool_calls[1].function.arguments, "{\"b\": []}");
    let unknown = body(json!({"tool_choice": {"type": "function", "function": {"name": "gone"}}}));
    let (status, text) = send(&app_that_reads(""), post("/v1/chat/completions", unknown.to_string())).await;
    assert!(status == 400 && text.contains("`gone` of `tool_choice` is not among `tools`"), "{text}");
    let conflict = json!({"tool_choice": "required", "tools": [
        {"type": "function", "function": {"name": "f", "parameters": {"$defs": {"a": {"type": "null"}}}}},
        {"type": "function", "function": {"name": "g", "parameters": {"$defs": {"a": {"type": "string"}}}}}]});
    let (status, text) = send(&app_that_reads(""), post("/v1/chat/completions", body(conflict).to_string())).await;
    assert!(status == 400 && text.contains("different definitions of `a`"), "{text}");
}

#[tokio::test]
async fn reasoning_is_told_apart_and_counted() {
    let text = "<think>\nhm</think>\n\nYes.";
    let answer = whole(text, json!({})).await;
    let message = &answer.choices[0].message;
    assert_eq!((message.reasoning.as_deref(), message.content.as_deref()), (Some("hm"), Some("Yes.")));
    // Bytes from the first that is surely reasoning to the end tag's last.
    let n_reasoning = answer.usage.completion_tokens_details.unwrap().reasoning_tokens;
    assert_eq!(n_reasoning, "\nhm</think>".len());
    let stream = streamed(text, json!({})).await;
    assert_eq!((stream.reasoning.as_str(), stream.content.as_str()), ("hm", "Yes."));
    assert_eq!(stream.usage["completion_tokens_details"]["reasoning_tokens"], n_reasoning);
    let hidden = whole(text, json!({"include_reasoning": false})).await;
    assert_eq!(hidden.choices[0].message.reasoning, None);
    assert_eq!(hidden.choices[0].message.content.as_deref(), Some("Yes."));
    assert_eq!(streamed(text, json!({"include_reasoning": false})).await.reasoning, "");
    let both = whole(&format!("<think>a</think>{CALLS}"), json!({})).await;
    assert_eq!(both.choices[0].message.tool_calls.len(), 2);
    assert_eq!(both.choices[0].message.reasoning.as_deref(), Some("a"));
}
