//! Fields of completions alone.

use serde_json::json;

use super::Case;
use crate::fake::MAX_MODEL_LEN;

/// The table.
pub fn cases() -> Vec<Case> {
    let long: Vec<u32> = vec![65; MAX_MODEL_LEN + 6];
    vec![
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
        (json!({"use_beam_search": true, "stream": true}), 400, "cannot stream", "use_beam_search"),
        (json!({"use_beam_search": true, "n": 3, "logprobs": 2, "echo": true}), 200, "", ""),
        (json!({"suffix": "x"}), 400, "not supported", "suffix"),
        (json!({"prompt_embeds": "eA=="}), 400, "not supported", "prompt_embeds"),
        (
            json!({"prompt": vec![65; MAX_MODEL_LEN], "max_tokens": 1}),
            400,
            "max_tokens must be at least 1, got 0.",
            "max_tokens",
        ),
        (json!({"prompt": vec![65; MAX_MODEL_LEN - 1], "max_tokens": 60}), 200, "", ""),
        (json!({"prompt": [-1]}), 400, "expected a string", "body.prompt"),
        (json!({"prompt": [1.5]}), 400, "expected a string", "body.prompt"),
        (json!({"prompt": ["a", 65]}), 400, "expected a string", "body.prompt"),
        (json!({"prompt": 5}), 400, "expected a string", "body.prompt"),
        (json!({"prompt": ["a", ""]}), 200, "", ""),
        (json!({"prompt": vec!["a"; 1024], "max_tokens": 1}), 200, "", ""),
        (json!({"prompt": "\u{e9}", "echo": true, "logprobs": 1}), 200, "", ""),
        (json!({"logprobs": null}), 200, "", ""),
        (json!({"logprobs": 0}), 200, "", ""),
        (json!({"logprobs": 0, "logprob_token_ids": [1, 2]}), 200, "", ""),
        (json!({"logprobs": 1, "logprob_token_ids": [1], "echo": true}), 200, "", ""),
        (
            json!({"logprobs": 1, "logprob_token_ids": [1], "echo": true, "max_tokens": 0}),
            400,
            "those of the output",
            "logprob_token_ids",
        ),
        (json!({"logprobs": -2}), 400, "must be non-negative or -1, got -2", "logprobs"),
        (json!({"logprobs": "3"}), 400, "validation error", "body.logprobs"),
        (json!({"echo": false, "max_tokens": 0}), 400, "max_tokens must be at least 1, got 0", "max_tokens"),
        (json!({"echo": true, "max_tokens": 0, "stream": true}), 200, "", ""),
        (json!({"suffix": ""}), 200, "", ""),
        (json!({"suffix": null}), 200, "", ""),
        (json!({"best_of": 0}), 200, "", ""),
    ]
}
