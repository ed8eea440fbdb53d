//! Fields of `/v1/responses` alone, and what it refuses because it has it under another name or not at all.

use serde_json::json;

use super::Case;

/// Beside an input.
pub fn cases() -> Vec<Case> {
    let tool = json!({"type": "function", "name": "f"});
    vec![
        (json!({}), 200, "", ""),
        (json!({"input": []}), 400, "must not be empty", "input"),
        (json!({"input": null}), 400, "validation error", "body.input"),
        (json!({"input": 5}), 400, "a string or a list of items", "body.input"),
        (json!({"input": ["x"]}), 400, "expected an item", "body.input.0"),
        (json!({"input": [{"role": "king", "content": "x"}]}), 400, "unknown role `king`", "body.input.0.role"),
        (json!({"input": [{"role": "user", "content": "x"}]}), 200, "", ""),
        (json!({"model": "gpt"}), 404, "The model `gpt` does not exist", "model"),
        (json!({"instructions": "s"}), 200, "", ""),
        (json!({"instructions": 5}), 400, "validation error", "body.instructions"),
        (json!({"max_output_tokens": 3}), 200, "", ""),
        (json!({"max_output_tokens": 0}), 400, "max_output_tokens must be at least 1, got 0", "max_output_tokens"),
        (json!({"max_output_tokens": 65}), 400, "max_output_tokens=65 cannot be greater", "max_output_tokens"),
        (json!({"max_tokens": 3}), 400, "the name is max_output_tokens", "max_tokens"),
        (json!({"n": 1}), 200, "", ""),
        (json!({"n": 2}), 400, "there is one answer", "n"),
        (json!({"echo": true}), 400, "not a field of /v1/responses", "echo"),
        (json!({"echo": false}), 200, "", ""),
        (json!({"prompt_logprobs": 1}), 400, "use /v1/completions", "prompt_logprobs"),
        (
            json!({"stream_options": {"include_usage": true}, "stream": true}),
            400,
            "always has the usage",
            "stream_options",
        ),
        (json!({"stream_options": {"include_obfuscation": false}, "stream": true}), 200, "", ""),
        (json!({"response_format": {"type": "text"}}), 400, "the name is text.format", "response_format"),
        (json!({"return_token_ids": true}), 400, "use /v1/completions", "return_token_ids"),
        (json!({"return_tokens_as_token_ids": true}), 400, "use /v1/completions", "return_tokens_as_token_ids"),
        (json!({"use_beam_search": true}), 400, "use /v1/completions", "use_beam_search"),
        (json!({"temperature": 3}), 400, "temperature must be in [0, 2]", "temperature"),
        (json!({"top_k": 5, "min_p": 0.1, "seed": 1, "repetition_penalty": 1.1}), 200, "", ""),
        (json!({"text": {"format": {"type": "json_object"}}}), 200, "", ""),
        (json!({"text": {"format": {"type": "json_schema", "name": "n", "schema": {}}}}), 200, "", ""),
        (json!({"text": {"format": {"type": "json_schema", "name": "n"}}}), 400, "needs `json_schema`", "text"),
        (json!({"text": {"format": {"type": "xml"}}}), 400, "no type `xml`", "text"),
        (json!({"text": "x"}), 400, "validation error", "body.text"),
        (json!({"tools": []}), 200, "", ""),
        (json!({"tools": [tool]}), 400, "requires --enable-auto-tool-choice", "tool_choice"),
        (json!({"tools": [{"type": "web_search"}]}), 400, "only `function`", "tools"),
        (json!({"tools": [tool], "tool_choice": "none"}), 200, "", ""),
        (json!({"reasoning": {"effort": "low"}}), 200, "", ""),
        (json!({"reasoning": {"effort": "huge"}}), 400, "must be one of none, minimal", "reasoning"),
        (json!({"reasoning": {"summary": "auto"}}), 400, "reasoning.summary", "reasoning"),
        (json!({"previous_response_id": "resp_1"}), 400, "not supported", "previous_response_id"),
        (json!({"conversation": "c"}), 400, "not supported", "conversation"),
        (json!({"prompt": {"id": "p"}}), 400, "not supported", "prompt"),
        (json!({"background": true}), 400, "not supported", "background"),
        (json!({"background": false, "store": true, "metadata": {"a": "b"}}), 200, "", ""),
        (json!({"max_tool_calls": 1}), 400, "not supported", "max_tool_calls"),
        (json!({"top_logprobs": 1}), 400, "not supported", "top_logprobs"),
        (json!({"top_logprobs": 0}), 200, "", ""),
        (json!({"truncation": "auto"}), 400, "can only be `disabled`", "truncation"),
        (json!({"truncation": "disabled"}), 200, "", ""),
        (json!({"include": ["message.output_text.logprobs"]}), 400, "cannot be included", "include"),
        (json!({"include": ["reasoning.encrypted_content"]}), 200, "", ""),
    ]
}
