//! Fields of `/tokenize` and `/detokenize`.

use serde_json::json;

use super::Case;

/// Beside a prompt.
pub fn tokenize() -> Vec<Case> {
    let message = json!({"role": "user", "content": "x"});
    vec![
        (json!({}), 200, "", ""),
        (json!({"model": "alias"}), 200, "", ""),
        (json!({"model": "gpt"}), 404, "The model `gpt` does not exist", "model"),
        (json!({"prompt": ""}), 200, "", ""),
        (json!({"prompt": null}), 400, "either `prompt` or `messages`", "body"),
        (json!({"prompt": 5}), 400, "validation error", "body.prompt"),
        (json!({"prompt": ["a"]}), 400, "validation error", "body.prompt"),
        (json!({"messages": [message]}), 400, "either `prompt` or `messages`", "body"),
        (json!({"prompt": null, "messages": [message]}), 200, "", ""),
        (json!({"prompt": null, "messages": []}), 400, "at least one message", "messages"),
        (json!({"prompt": null, "messages": [{"role": "king", "content": ""}]}), 400, "`king`", "body.messages.0.role"),
        (
            json!({"prompt": null, "messages": [message], "add_generation_prompt": true, "continue_final_message": true}),
            400,
            "Cannot set both",
            "continue_final_message",
        ),
        (json!({"prompt": null, "messages": [message], "chat_template": "x"}), 400, "not supported", "chat_template"),
        (json!({"add_special_tokens": false}), 200, "", ""),
        (json!({"add_special_tokens": "x"}), 400, "validation error", "body.add_special_tokens"),
        (json!({"return_token_strs": true}), 200, "", ""),
        (json!({"return_token_strs": 1}), 400, "validation error", "body.return_token_strs"),
        (json!({"made_up": 1}), 200, "", ""),
    ]
}

/// Beside a list of tokens.
pub fn detokenize() -> Vec<Case> {
    vec![
        (json!({}), 200, "", ""),
        (json!({"tokens": []}), 200, "", ""),
        (json!({"tokens": null}), 400, "validation error", "body.tokens"),
        (json!({"tokens": "x"}), 400, "validation error", "body.tokens"),
        (json!({"tokens": ["x"]}), 400, "validation error", "body.tokens.0"),
        (json!({"tokens": [-1]}), 400, "validation error", "body.tokens.0"),
        (json!({"tokens": [1.5]}), 400, "validation error", "body.tokens.0"),
        (json!({"tokens": [65, 258]}), 400, "Token id 258 is out of vocabulary", "tokens"),
        (json!({"model": "gpt"}), 404, "The model `gpt` does not exist", "model"),
    ]
}
