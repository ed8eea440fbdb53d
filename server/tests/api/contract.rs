//! What is refused and how: field, value, status, part of the message, param.

use hyper::{Method, Request, StatusCode};
use serde_json::{Value, json};

use crate::fake::{MAX_MODEL_LEN, app, ask, config, get, post, send};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// A schema of so many levels.
fn nested(depth: usize) -> Value {
    (0..depth).fold(json!(true), |inner, _| json!({"not": inner}))
}

fn body(path: &str) -> Value {
    match path {
        CHAT => json!({"messages": [{"role": "user", "content": "x"}]}),
        _ => json!({"prompt": "x"}),
    }
}

/// `fields` beside a good body are answered with `status`; errors name `param` and say `part`.
async fn check(path: &str, fields: Value, status: u16, part: &str, param: Value) {
    let mut request = body(path);
    for (key, value) in fields.as_object().unwrap() {
        request[key] = value.clone();
    }
    let (got, text) = ask(path, &request).await;
    assert_eq!(got, status, "{path} {fields}: {text}");
    if status == 200 {
        return;
    }
    let answer: Value = serde_json::from_str(&text).unwrap();
    let error = &answer["error"];
    assert!(error["message"].as_str().unwrap().contains(part), "{path} {fields}: {text}");
    assert_eq!(error["param"], param, "{path} {fields}: {text}");
    assert_eq!(error["code"], status);
    let kind = match (status, error["param"].as_str()) {
        (404, _) => "NotFoundError",
        (_, Some(param)) if param.starts_with("body") => "Bad Request",
        _ => "BadRequestError",
    };
    assert_eq!(error["type"], kind, "{path} {fields}: {text}");
}

#[tokio::test]
async fn fields_that_both_endpoints_share() {
    let long = vec![65; MAX_MODEL_LEN];
    for path in [CHAT, COMPLETIONS] {
        for (fields, status, part, param) in [
            (json!({"model": "alias"}), 200, "", ""),
            (json!({"model": ""}), 200, "", ""),
            (json!({"model": "gpt"}), 404, "The model `gpt` does not exist. Valid aliases: tiny, alias", "model"),
            (json!({"temperature": 2}), 200, "", ""),
            (
                json!({"temperature": 2.5}),
                400,
                "temperature must be in [0, 2], got 2.5. (parameter=temperature, value=2.5)",
                "temperature",
            ),
            (json!({"temperature": -0.1}), 400, "temperature", "temperature"),
            (json!({"temperature": "hot"}), 400, "1 validation error", "body.temperature"),
            (json!({"top_p": 0}), 400, "top_p must be in (0, 1]", "top_p"),
            (json!({"top_p": 0, "temperature": 0}), 400, "top_p", "top_p"),
            (json!({"top_k": -1}), 200, "", ""),
            (json!({"top_k": -2}), 400, "top_k must be 0 (disable), or at least 1, got -2.", "top_k"),
            (json!({"min_p": 1.5}), 400, "min_p", "min_p"),
            (json!({"presence_penalty": 3}), 400, "presence_penalty", "presence_penalty"),
            (json!({"frequency_penalty": -2.5}), 400, "frequency_penalty", "frequency_penalty"),
            (json!({"repetition_penalty": 0}), 400, "repetition_penalty", "repetition_penalty"),
            (json!({"seed": -1}), 200, "", ""),
            (json!({"seed": i64::MIN}), 200, "", ""),
            (json!({"seed": u64::MAX}), 400, "validation error", "body.seed"),
            (json!({"n": 0}), 400, "n must be", "n"),
            (json!({"n": -1}), 400, "n must be", "n"),
            (json!({"n": 2, "temperature": 0}), 400, "n must be 1 when using greedy sampling", "n"),
            (json!({"stop": ["a", "b", "c", "d"]}), 200, "", ""),
            (json!({"stop": ["a", "b", "c", "d", "e"]}), 400, "at most 4", "stop"),
            (json!({"stop": ""}), 400, "empty string", "stop"),
            (json!({"stop": 1}), 400, "validation error", "body.stop"),
            (json!({"stop_token_ids": [999]}), 400, "out of vocabulary", "stop_token_ids"),
            (json!({"stop_token_ids": [-1]}), 400, "not a token id", "stop_token_ids"),
            (json!({"max_tokens": 0}), 400, "max_tokens must be at least 1, got 0", "max_tokens"),
            (json!({"max_tokens": MAX_MODEL_LEN}), 200, "", ""),
            (
                json!({"max_tokens": MAX_MODEL_LEN + 1}),
                400,
                "max_tokens=65 cannot be greater than max_model_len=64",
                "max_tokens",
            ),
            (
                json!({"min_tokens": 5, "max_tokens": 4}),
                400,
                "min_tokens must be less than or equal to max_tokens=4",
                "min_tokens",
            ),
            (json!({"min_tokens": -1}), 400, "min_tokens", "min_tokens"),
            (json!({"logit_bias": {"65": 1000}}), 200, "", ""),
            (json!({"logit_bias": {"x": 1}}), 400, "key `x` is not a token id", "logit_bias"),
            (json!({"logit_bias": {"999": 1}}), 400, "out of vocabulary", "logit_bias"),
            (json!({"allowed_token_ids": []}), 400, "empty", "allowed_token_ids"),
            (json!({"prompt_logprobs": 21}), 400, "greater than max allowed: 20", "prompt_logprobs"),
            (json!({"prompt_logprobs": -2}), 400, "non-negative", "prompt_logprobs"),
            (json!({"prompt_logprobs": 1, "stream": true}), 400, "not available when `stream=True`", "prompt_logprobs"),
            (
                json!({"stream_options": {"include_usage": true}}),
                400,
                "only be defined when `stream=True`",
                "stream_options",
            ),
            (json!({"stream_interval": 0}), 400, "at least 1", "stream_interval"),
            (json!({"truncate_prompt_tokens": -1}), 200, "", ""),
            (
                json!({"truncate_prompt_tokens": 0}),
                400,
                "truncate_prompt_tokens must be -1 or between",
                "truncate_prompt_tokens",
            ),
            (
                json!({"truncate_prompt_tokens": 3, "truncation_side": "up"}),
                400,
                "`left` or `right`",
                "truncation_side",
            ),
            (json!({"cache_salt": "a@b"}), 400, "cache_salt must have", "cache_salt"),
            (json!({"cache_salt": "ab"}), 200, "", ""),
            (json!({"response_format": {"type": "text"}}), 200, "", ""),
            (json!({"response_format": {"type": "json_object"}}), 200, "", ""),
            (json!({"response_format": {"type": "xml"}}), 400, "no type `xml`", "response_format"),
            (json!({"response_format": {}}), 400, "missing field `type`", "body.response_format.type"),
            (json!({"response_format": {"type": "structural_tag"}}), 400, "not supported", "structural_tag"),
            (json!({"response_format": {"type": "json_schema"}}), 400, "needs `json_schema`", "response_format"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}),
                400,
                "`name` and `schema`",
                "response_format",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}),
                400,
                "missing field `name`",
                "body.response_format.json_schema.name",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": [1]}}}),
                400,
                "A JSON schema is an object",
                "response_format",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": true}}}),
                200,
                "",
                "",
            ),
            (json!({"structured_outputs": {"regex": "a"}}), 200, "", ""),
            (json!({"structured_outputs": {"json": "{\"type\": \"null\"}"}}), 200, "", ""),
            (json!({"structured_outputs": {"json": "{"}}), 400, "is not JSON", "structured_outputs"),
            (json!({"structured_outputs": {"json": nested(65)}}), 400, "deeper than 64", "structured_outputs"),
            (json!({"structured_outputs": {"choice": []}}), 400, "must not be empty", "structured_outputs"),
            (json!({"structured_outputs": {"choice": "a"}}), 400, "validation error", "body.structured_outputs.choice"),
            (json!({"structured_outputs": {}}), 400, "got 0", "structured_outputs"),
            (json!({"structured_outputs": {"json_object": false}}), 400, "got 0", "structured_outputs"),
            (json!({"structured_outputs": {"regex": "a", "choice": ["b"]}}), 400, "got 2", "structured_outputs"),
            (
                json!({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}),
                400,
                "Exactly one",
                "structured_outputs",
            ),
            (json!({"structured_outputs": {"json_object": true, "disable_any_whitespace": true}}), 200, "", ""),
            (json!({"structured_outputs": {"structural_tag": "x"}}), 400, "not supported", "structural_tag"),
            (json!({"priority": -3}), 200, "", ""),
            (json!({"priority": "high"}), 400, "validation error", "body.priority"),
            (json!({"use_beam_search": true}), 400, "not supported", "use_beam_search"),
            (json!({"bad_words": []}), 200, "", ""),
            (json!({"bad_words": ["x"]}), 200, "", ""),
            (json!({"bad_words": [""]}), 400, "cannot contain an empty string", "bad_words"),
            (json!({"bad_words": "x"}), 400, "validation error", "body.bad_words"),
            (json!({"repetition_detection": {}}), 400, "not supported", "repetition_detection"),
            (json!({"thinking_token_budget": 5}), 400, "not supported", "thinking_token_budget"),
            (json!({"logprob_token_ids": [1]}), 400, "not supported", "logprob_token_ids"),
            (json!({"guided_json": {}, "best_of": 3, "store": true, "user": "u", "made_up": [1]}), 200, "", ""),
            (
                json!({"temperature": null, "n": null, "stop": null, "stream": null, "stream_options": null, "max_tokens": null}),
                200,
                "",
                "",
            ),
        ] {
            let param = if param.is_empty() { Value::Null } else { json!(param) };
            check(path, fields, status, part, param).await;
        }
    }
    let fields = json!({"prompt": long, "max_tokens": 1});
    check(COMPLETIONS, fields, 400, "max_tokens must be at least 1, got 0.", json!("max_tokens")).await;
}

#[tokio::test]
async fn fields_of_completions() {
    let long: Vec<u32> = vec![65; MAX_MODEL_LEN + 6];
    for (fields, status, part, param) in [
        (json!({"prompt": [65, 66]}), 200, "", ""),
        (json!({"prompt": [[65], [66]]}), 200, "", ""),
        (json!({"prompt": ["a", "b"]}), 200, "", ""),
        (json!({"prompt": ""}), 200, "", ""),
        (json!({"prompt": "", "add_special_tokens": false}), 400, "prompt is empty", "prompt"),
        (json!({"prompt": null}), 400, "must be given", "prompt"),
        (json!({"prompt": []}), 400, "must not be empty", "prompt"),
        (json!({"prompt": [[]]}), 400, "prompt is empty", "prompt"),
        (json!({"prompt": vec!["a"; 1025]}), 400, "at most 1024 prompts, got 1025", "prompt"),
        (json!({"prompt": [999]}), 400, "Token id 999 is out of vocabulary", "prompt"),
        (json!({"prompt": {"a": 1}}), 400, "expected a string, a list of strings", "body.prompt"),
        (
            json!({"prompt": long}),
            400,
            "This model's maximum context length is 64 tokens. However, you requested 16 output tokens and your prompt contains 70 input tokens",
            "input_tokens",
        ),
        (json!({"prompt": long, "truncate_prompt_tokens": 10}), 200, "", ""),
        (json!({"prompt": "x".repeat(65)}), 400, "maximum context length is 64 tokens", "input_text"),
        (json!({"prompt": ["a", "b"], "n": 10_000}), 400, "at most 16384 choices", "n"),
        (json!({"logprobs": 20}), 200, "", ""),
        (json!({"logprobs": 21}), 400, "greater than max allowed: 20", "logprobs"),
        (json!({"logprobs": -1}), 400, "greater than max allowed: 20", "logprobs"),
        (json!({"logprobs": true}), 400, "validation error", "body.logprobs"),
        (json!({"echo": true, "max_tokens": 0}), 200, "", ""),
        (json!({"suffix": "x"}), 400, "not supported", "suffix"),
        (json!({"prompt_embeds": "eA=="}), 400, "not supported", "prompt_embeds"),
    ] {
        let param = if param.is_empty() { Value::Null } else { json!(param) };
        check(COMPLETIONS, fields, status, part, param).await;
    }
}

#[tokio::test]
async fn fields_of_chat() {
    let tool = json!({"type": "function", "function": {"name": "f"}});
    for (fields, status, part, param) in [
        (json!({"messages": []}), 400, "at least one message", "messages"),
        (json!({"messages": null}), 400, "validation error", "body.messages"),
        (json!({"messages": [{"role": "user"}]}), 400, "missing field `content`", "body.messages.0.content"),
        (json!({"messages": [{"role": "king", "content": ""}]}), 400, "unknown role `king`", "body.messages.0.role"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
            400,
            "`image_url`",
            "messages",
        ),
        (
            json!({"messages": [{"role": "user", "content": "x".repeat(50)}]}),
            400,
            "your prompt contains 66 characters",
            "input_text",
        ),
        (
            json!({"max_completion_tokens": 65}),
            400,
            "max_completion_tokens=65 cannot be greater",
            "max_completion_tokens",
        ),
        (json!({"max_completion_tokens": 5, "max_tokens": 500}), 200, "", ""),
        (json!({"top_logprobs": 2}), 400, "`logprobs` must be set to true", "top_logprobs"),
        (json!({"top_logprobs": 0}), 200, "", ""),
        (json!({"logprobs": true, "top_logprobs": 21}), 400, "greater than max allowed: 20", "logprobs"),
        (json!({"logprobs": 1}), 400, "validation error", "body.logprobs"),
        (json!({"tools": []}), 400, "must not be an empty array", "tools"),
        (json!({"tools": [tool]}), 400, "requires --enable-auto-tool-choice and --tool-call-parser", "tool_choice"),
        (json!({"tools": [tool], "tool_choice": "required"}), 400, "requires --tool-call-parser", "tool_choice"),
        (
            json!({"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "f"}}}),
            400,
            "requires --tool-call-parser",
            "tool_choice",
        ),
        (json!({"tools": [tool], "tool_choice": "always"}), 400, "`always`", "tool_choice"),
        (json!({"tools": [tool], "tool_choice": 1}), 400, "expected \"none\"", "body.tool_choice"),
        (json!({"tools": [{"type": "function"}]}), 400, "missing field `function`", "body.tools.0"),
        (json!({"tools": [{"type": "custom", "function": {"name": "f"}}]}), 400, "`function`", "body.tools.0.type"),
        (
            json!({"tools": [{"type": "function", "function": {"name": ""}}]}),
            400,
            "must not be empty",
            "body.tools.0.function.name",
        ),
        (json!({"tools": [tool], "tool_choice": "none"}), 200, "", ""),
        (json!({"tool_choice": "required"}), 400, "`tools` must be set", "tool_choice"),
        (json!({"tool_choice": "none"}), 200, "", ""),
        (json!({"chat_template": "{{ x }}"}), 400, "not supported", "chat_template"),
        (json!({"mm_processor_kwargs": {}}), 400, "not supported", "mm_processor_kwargs"),
        (json!({"reasoning_effort": "huge"}), 400, "must be one of none, minimal", "reasoning_effort"),
        (
            json!({"add_generation_prompt": true, "continue_final_message": true}),
            400,
            "Cannot set both",
            "continue_final_message",
        ),
        (json!({"continue_final_message": true}), 200, "", ""),
    ] {
        let param = if param.is_empty() { Value::Null } else { json!(param) };
        check(CHAT, fields, status, part, param).await;
    }
}

#[tokio::test]
async fn bodies_that_are_not_the_endpoints_json() {
    let (app, _) = app(config());
    for (bytes, part, param) in [
        (&b"{"[..], "EOF", "body"),
        (b"", "EOF", "body"),
        (b"[1]", "", "body"),
        (b"{\"prompt\": \"x\"} extra", "", "body"),
        (b"{\"prompt\": \"\xff\"}", "", "body"),
    ] {
        let (status, text) = send(&app, post(COMPLETIONS, bytes.to_vec())).await;
        assert_eq!(status, 400, "{text}");
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert!(answer["error"]["message"].as_str().unwrap().contains(part), "{text}");
        assert!(answer["error"]["param"].as_str().unwrap().starts_with(param), "{text}");
        assert_eq!(answer["error"]["type"], "Bad Request");
    }
    let mut request = post(COMPLETIONS, "{\"prompt\": \"x\"}");
    request.headers_mut().insert("content-type", "text/plain".parse().unwrap());
    let (status, text) = send(&app, request).await;
    assert_eq!(status, 400);
    assert!(text.contains("Content-Type must be application/json"), "{text}");
    let huge = vec![b' '; (64 << 20) + 1];
    let (status, text) = send(&app, post(COMPLETIONS, huge)).await;
    assert_eq!(status, 413, "{text}");
}

#[tokio::test]
async fn unknown_routes_and_methods() {
    let (app, _) = app(config());
    let (status, text) = send(&app, get("/v1/nothing")).await;
    assert_eq!(status, 404);
    assert_eq!(text, r#"{"error":{"message":"Not Found","type":"Not Found","param":null,"code":404}}"#);
    let (status, text) = send(&app, get(CHAT)).await;
    assert_eq!(status, 405);
    assert!(text.contains(r#""type":"Method Not Allowed""#), "{text}");
}

#[tokio::test]
async fn keys_guard_v1_and_nothing_else() {
    let (app, _) = app(ember_server::config::AppConfig { api_keys: vec!["one".into(), "two".into()], ..config() });
    let with_key = |method: Method, path: &str, value: Option<&str>| {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(value) = value {
            request = request.header("authorization", value);
        }
        request.body(http_body_util::Full::default()).unwrap()
    };
    for (value, status) in [
        (None, 401),
        (Some("Bearer three"), 401),
        (Some("Bearer "), 401),
        (Some("one"), 401),
        (Some("Basic one"), 401),
        (Some("Bearer one"), 200),
        (Some("bearer two"), 200),
    ] {
        let (got, text) = send(&app, with_key(Method::GET, "/v1/models", value)).await;
        assert_eq!(got, status, "{value:?}");
        assert!(status == 200 || text == r#"{"error":"Unauthorized"}"#, "{text}");
    }
    let (status, _) = send(&app, with_key(Method::OPTIONS, "/v1/models", None)).await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
    for path in ["/health", "/metrics", "/ping", "/version"] {
        assert_eq!(send(&app, with_key(Method::GET, path, None)).await.0, 200, "{path}");
    }
}

#[tokio::test]
async fn the_operators_defaults_hold_where_a_request_is_silent() {
    let sampling_defaults = ember_server::sampling_defaults::SamplingDefaults::new(
        "vllm",
        Some(r#"{"temperature": 0, "max_new_tokens": 3}"#),
    )
    .unwrap();
    let (app, _) = app(ember_server::config::AppConfig { sampling_defaults, ..config() });
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
